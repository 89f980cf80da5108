//! Every call that changes an archive, so that tests can end an operation before any of them, as a crash would.
//!
//! Names are of files in a directory that is open: what the directory itself is called does not matter.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

/// A change.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(test), allow(dead_code, reason = "only tests look at what is about to happen"))]
pub(super) enum Step<'a> {
    MakeDir(&'a File, &'a str),
    Create(&'a File, &'a str),
    Resize,
    /// Bytes from an offset on are other ones.
    Write(&'a File, u64, u64),
    Sync(&'a File),
    SyncDir(&'a File),
    /// To a name that nothing has.
    Rename(&'a File, &'a str, &'a str),
    /// To a name whose file goes.
    Replace(&'a File, &'a str, &'a str),
    RemoveFile(&'a File, &'a str),
    RemoveDir(&'a File, &'a str),
}

/// Does it, unless the test that runs ends here.
fn run<T>(step: Step<'_>, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    #[cfg(test)]
    super::crash::before(step)?;
    let done = act()?;
    #[cfg(test)]
    super::crash::after(step);
    #[cfg(not(test))]
    let _ = step;
    Ok(done)
}

pub(super) fn make_dir(dir: &File, name: &str) -> io::Result<()> {
    run(Step::MakeDir(dir, name), || Ok(rustix::fs::mkdirat(dir, name, Mode::RWXU)?))
}

/// A new file, for direct I/O if that is wanted and the file system can.
pub(super) fn create(dir: &File, name: &str, direct: bool) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW;
    run(Step::Create(dir, name), || open_as(dir, name, flags, direct))
}

/// Opens a file, for direct I/O if that is wanted and the file system can.
pub(super) fn open(dir: &File, name: &str, direct: bool) -> io::Result<File> {
    open_as(dir, name, OFlags::RDONLY | OFlags::NOFOLLOW, direct)
}

/// Opens a file to be changed.
pub(super) fn open_to_write(dir: &File, name: &str, direct: bool) -> io::Result<File> {
    open_as(dir, name, OFlags::RDWR | OFlags::NOFOLLOW, direct)
}

fn open_as(dir: &File, name: &str, flags: OFlags, direct: bool) -> io::Result<File> {
    let open = |flags| rustix::fs::openat(dir, name, flags | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
    let opened = if direct {
        match open(flags | OFlags::DIRECT) {
            Err(Errno::INVAL) => open(flags),
            opened => opened,
        }
    } else {
        open(flags)
    };
    Ok(File::from(opened?))
}

pub(super) fn open_dir(dir: impl AsFd, name: &str) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(dir, name, flags, Mode::empty())?))
}

pub(super) fn resize(file: &File, len: u64) -> io::Result<()> {
    run(Step::Resize, || file.set_len(len))
}

pub(super) fn write(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    run(Step::Write(file, at, bytes.len() as u64), || file.write_all_at(bytes, at))
}

/// Takes the blocks of a part of a file away.
pub(super) fn make_hole(file: &File, at: u64, len: u64) -> io::Result<()> {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    run(Step::Write(file, at, len), || Ok(rustix::fs::fallocate(file, hole, at, len)?))
}

/// Makes a part of a file the same blocks as of another one; false if they cannot share any.
pub(super) fn share(from: &File, to: &File, at: u64, len: u64) -> io::Result<bool> {
    run(Step::Write(to, at, len), || swapd::share_blocks(from, at, to, at, len))
}

/// Makes a file the same blocks as another one; false if they cannot share any.
pub(super) fn share_all(from: &File, to: &File, len: u64) -> io::Result<bool> {
    run(Step::Write(to, 0, len), || swapd::share_blocks(from, 0, to, 0, len))
}

pub(super) fn sync(file: &File) -> io::Result<()> {
    run(Step::Sync(file), || flush(file))
}

pub(super) fn sync_dir(dir: &File) -> io::Result<()> {
    run(Step::SyncDir(dir), || flush(dir))
}

fn flush(file: &File) -> io::Result<()> {
    #[cfg(test)]
    if super::crash::is_simulated() {
        return Ok(());
    }
    file.sync_all()
}

/// Gives something a name that is free.
///
/// # Errors
/// `AlreadyExists` if it is not.
pub(super) fn rename(dir: &File, from: &str, to: &str) -> io::Result<()> {
    run(Step::Rename(dir, from, to), || {
        match rustix::fs::renameat_with(dir, from, dir, to, RenameFlags::NOREPLACE) {
            // A file system that knows no such rename. The archive is locked: nobody else takes the name meanwhile.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                if rustix::fs::statat(dir, to, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
                    return Err(io::ErrorKind::AlreadyExists.into());
                }
                Ok(rustix::fs::renameat(dir, from, dir, to)?)
            }
            renamed => Ok(renamed?),
        }
    })
}

/// Puts a file into the place of another one, which is gone then.
pub(super) fn replace(dir: &File, from: &str, to: &str) -> io::Result<()> {
    run(Step::Replace(dir, from, to), || Ok(rustix::fs::renameat(dir, from, dir, to)?))
}

pub(super) fn remove_file(dir: &File, name: &str) -> io::Result<()> {
    run(Step::RemoveFile(dir, name), || Ok(rustix::fs::unlinkat(dir, name, AtFlags::empty())?))
}

pub(super) fn remove_dir(dir: &File, name: &str) -> io::Result<()> {
    run(Step::RemoveDir(dir, name), || Ok(rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)?))
}

/// The names in a directory.
pub(super) fn names(dir: &File) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        // What has another kind of name is none of ours.
        if let Ok(name) = entry?.file_name().to_str()
            && name != "."
            && name != ".."
        {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}
