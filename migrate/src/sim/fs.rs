//! The simulated file systems of the target's host: what was written is lost in a crash unless it was flushed (or the
//! kernel happened to write it back); writes and flushes fail; every step takes time, so that the process may die
//! between any two. What is in memory is lost in any crash, and may be swept away before; it does not fail.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::TryLockError;
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::task::{Poll, Waker};
use std::time::Duration;

use super::bugs::{Bug, is_planted};
use super::runtime::pause;
use super::world::world;

const STEP: Duration = Duration::from_millis(2);
/// The same for what is in memory.
const MEMORY_STEP: Duration = Duration::from_micros(20);
const MEMORY: &str = "/memory";
const ROTTEN: &str = "rotten";
/// Takes so many bytes.
const SMALL: &str = "small";
const SMALL_BYTES: u64 = 1 << 20;

struct Inode {
    content: Vec<u8>,
    /// What a crash leaves.
    flushed: Vec<u8>,
    entry_flushed: bool,
}

#[derive(Default)]
struct Disk {
    files: BTreeMap<PathBuf, Inode>,
    locked: BTreeMap<PathBuf, Vec<Waker>>,
    /// After so many more writes and flushes, so many of them fail.
    failing: Option<(u32, u32)>,
    crashes: u32,
    swept: bool,
    /// Files without a name so far; and none of them keeps its content wrongly.
    unnamed: u32,
    sound: bool,
}

thread_local!(static DISK: RefCell<Disk> = RefCell::default());

fn with<T>(act: impl FnOnce(&mut Disk) -> T) -> T {
    DISK.with(|disk| act(&mut disk.borrow_mut()))
}

pub(crate) fn begin() {
    with(|disk| *disk = Disk::default());
}

/// The next writes and flushes but `skip` fail, `count` of them.
pub(crate) fn fail(skip: u32, count: u32) {
    with(|disk| disk.failing = Some((skip, count)));
}

pub(crate) fn heal() {
    with(|disk| (disk.failing, disk.sound) = (None, true));
}

/// The host has lost its power.
pub(crate) fn crash() {
    with(|disk| {
        disk.locked.clear();
        disk.crashes += 1;
        disk.files.retain(|path, file| {
            if path.starts_with(MEMORY) {
                false
            } else if world().random.one_in(2) {
                // Nothing was written back by itself.
                file.content.clone_from(&file.flushed);
                file.entry_flushed
            } else {
                true
            }
        });
    });
}

/// Somebody tidies up in memory.
pub(crate) fn sweep() {
    with(|disk| {
        disk.swept = true;
        disk.files.retain(|path, _| !path.starts_with(MEMORY));
    });
}

pub(crate) fn was_swept() -> bool {
    with(|disk| disk.swept)
}

pub(crate) fn has_crashed() -> bool {
    with(|disk| disk.crashes > 0)
}

/// What of a file survives a crash for certain.
pub(crate) fn flushed(path: &Path) -> Option<Vec<u8>> {
    with(|disk| disk.files.get(path).filter(|file| file.entry_flushed).map(|file| file.flushed.clone()))
}

pub(crate) fn content(path: &Path) -> Option<Vec<u8>> {
    with(|disk| disk.files.get(path).map(|file| file.content.clone()))
}

/// How long a step takes.
fn step(path: &Path) {
    pause(world().delay(if path.starts_with(MEMORY) { MEMORY_STEP } else { STEP }));
}

/// Takes its time, and fails if it is to.
fn changing(path: &Path) -> io::Result<()> {
    step(path);
    if path.starts_with(MEMORY) {
        return Ok(());
    }
    with(|disk| {
        let Some((skip, count)) = &mut disk.failing else { return Ok(()) };
        if *skip > 0 {
            *skip -= 1;
            return Ok(());
        }
        *count -= 1;
        if *count == 0 {
            disk.failing = None;
        }
        world().note(|| "the disk says no".to_string());
        Err(io::Error::from_raw_os_error(libc::EIO))
    })
}

pub fn boot_id() -> io::Result<String> {
    Ok(with(|disk| format!("{:036}\n", disk.crashes)))
}

pub fn make_own(_: &Path) -> io::Result<()> {
    Ok(())
}

pub fn in_memory(_: &Path) -> io::Result<PathBuf> {
    Ok(PathBuf::from(MEMORY))
}

pub fn vouch_for(_: &Path) -> io::Result<()> {
    Ok(())
}

/// For a VM's state. Some keep it wrongly, or have little room.
pub fn unnamed_file(directory: &Path) -> io::Result<File> {
    let (number, sound) = with(|disk| {
        disk.unnamed += 1;
        (disk.unnamed, disk.sound)
    });
    let kind = if sound { "sound" } else { world().random.pick(&["sound", "sound", "sound", ROTTEN, SMALL]) };
    File::create_new(&directory.join(format!("{kind}-{number}")))
}

pub fn remove_file(path: &Path) -> io::Result<()> {
    step(path);
    with(|disk| disk.files.remove(path)).map(drop).ok_or_else(|| ErrorKind::NotFound.into())
}

/// As `std::fs::OpenOptions`, for a file that is there.
#[derive(Debug)]
pub struct OpenOptions;

impl OpenOptions {
    pub fn new() -> OpenOptions {
        OpenOptions
    }

    pub fn read(&mut self, _: bool) -> &mut OpenOptions {
        self
    }

    pub fn write(&mut self, _: bool) -> &mut OpenOptions {
        self
    }

    pub fn open(&self, path: &Path) -> io::Result<File> {
        step(path);
        if !with(|disk| disk.files.contains_key(path)) {
            return Err(ErrorKind::NotFound.into());
        }
        Ok(File { path: path.to_path_buf(), locked: false.into() })
    }
}

#[derive(Debug)]
pub struct File {
    path: PathBuf,
    locked: std::cell::Cell<bool>,
}

pub struct Metadata(u64);

impl Metadata {
    pub fn len(&self) -> u64 {
        self.0
    }
}

/// As `std::os::unix::fs::FileExt`.
pub trait FileExt {
    fn read_exact_at(&self, into: &mut [u8], from: u64) -> io::Result<()>;
    fn write_all_at(&self, bytes: &[u8], to: u64) -> io::Result<()>;
}

impl File {
    fn make(path: &Path) -> io::Result<()> {
        changing(path)?;
        let inode = Inode { content: Vec::new(), flushed: Vec::new(), entry_flushed: false };
        with(|disk| disk.files.insert(path.to_path_buf(), inode));
        Ok(())
    }

    pub fn create_new(path: &Path) -> io::Result<File> {
        step(path);
        if with(|disk| disk.files.contains_key(path)) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        File::make(path)?;
        Ok(File { path: path.to_path_buf(), locked: false.into() })
    }

    /// Of a file without a name, of that kind.
    fn is(&self, kind: &str) -> bool {
        self.path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(kind))
    }

    /// Of a directory: to flush its entries.
    pub fn open(path: &Path) -> io::Result<File> {
        Ok(File { path: path.to_path_buf(), locked: false.into() })
    }

    pub fn lock(&self) -> io::Result<()> {
        world().block(poll_fn(|context| {
            with(|disk| {
                if let Some(waiting) = disk.locked.get_mut(&self.path) {
                    waiting.push(context.waker().clone());
                    return Poll::Pending;
                }
                disk.locked.insert(self.path.clone(), Vec::new());
                Poll::Ready(())
            })
        }));
        self.locked.set(true);
        Ok(())
    }

    pub fn try_lock(&self) -> Result<(), TryLockError> {
        with(|disk| {
            if disk.locked.contains_key(&self.path) {
                return Err(TryLockError::WouldBlock);
            }
            disk.locked.insert(self.path.clone(), Vec::new());
            Ok(())
        })?;
        self.locked.set(true);
        Ok(())
    }

    pub fn unlock(&self) -> io::Result<()> {
        if self.locked.replace(false) {
            let waiting = with(|disk| disk.locked.remove(&self.path));
            waiting.into_iter().flatten().for_each(Waker::wake);
        }
        Ok(())
    }

    pub fn metadata(&self) -> io::Result<Metadata> {
        with(|disk| disk.files.get(&self.path).map(|file| Metadata(file.content.len() as u64)))
            .ok_or_else(|| ErrorKind::NotFound.into())
    }

    pub fn sync_data(&self) -> io::Result<()> {
        if is_planted(Bug::LeavesRecordsUnflushed) {
            return Ok(());
        }
        let result = changing(&self.path);
        with(|disk| {
            // A flush that fails has written something, or not.
            if let Some(file) = disk.files.get_mut(&self.path)
                && (result.is_ok() || world().random.one_in(2))
            {
                file.flushed.clone_from(&file.content);
            }
        });
        result
    }

    /// Of a directory.
    pub fn sync_all(&self) -> io::Result<()> {
        changing(&self.path)?;
        with(|disk| {
            let inside = disk.files.iter_mut().filter(|(path, _)| path.parent() == Some(&self.path));
            inside.for_each(|(_, file)| file.entry_flushed = true);
        });
        Ok(())
    }
}

impl FileExt for File {
    fn read_exact_at(&self, into: &mut [u8], from: u64) -> io::Result<()> {
        with(|disk| {
            let file = disk.files.get(&self.path).ok_or(ErrorKind::NotFound)?;
            let bytes = file.content.get(from as usize..from as usize + into.len());
            into.copy_from_slice(bytes.ok_or(ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    fn write_all_at(&self, bytes: &[u8], to: u64) -> io::Result<()> {
        changing(&self.path)?;
        if self.is(SMALL) && to + bytes.len() as u64 > SMALL_BYTES {
            world().note(|| "the disk is full".to_string());
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        with(|disk| {
            if let Some(file) = disk.files.get_mut(&self.path) {
                let end = to as usize + bytes.len();
                file.content.resize(end.max(file.content.len()), 0);
                file.content[to as usize..end].copy_from_slice(bytes);
                if self.is(ROTTEN) {
                    file.content[to as usize] ^= 1;
                }
            }
        });
        Ok(())
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = self.unlock();
    }
}
