//! The store: a nameless sparse file in a directory, or a block device. Page n is at offset n x 4096, which nobody but [`Store::place_of`]
//! need know.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::StartError;
use swapcore::units::{PAGE_SIZE, PageNo};

/// A VM's store, open for direct I/O.
#[derive(Debug)]
pub(crate) struct Store(File);

impl Store {
    pub(crate) fn file(&self) -> &File {
        &self.0
    }

    /// Byte offset of the page in it. The pages of a run lie one behind the other.
    pub(crate) fn place_of(&self, page: PageNo) -> u64 {
        page.offset()
    }
}

/// Opens the store for a VM of `memory_bytes`, of which `outside_bytes` must find room in it.
pub(super) fn open(path: &Path, memory_bytes: u64, outside_bytes: u64) -> Result<Store, StartError> {
    let shown = path.display();
    let metadata = std::fs::metadata(path).map_err(|error| {
        StartError::Store(format!(
            "cannot use {shown} as store: {error}; create the directory, or name another one"
        ))
    })?;
    let file = if metadata.is_dir() {
        open_in_directory(path, memory_bytes, outside_bytes)?
    } else if metadata.file_type().is_block_device() {
        open_device(path, memory_bytes)?
    } else {
        return Err(StartError::Store(format!(
            "{shown} is neither a directory nor a block device; name one as the store"
        )));
    };
    if metadata.blksize() > PAGE_SIZE as u64 * 16 {
        tracing::warn!(
            "the file system of {shown} works in blocks of {} bytes: expect slow paging",
            metadata.blksize()
        );
    }
    Ok(Store(file))
}

fn open_in_directory(path: &Path, memory_bytes: u64, outside_bytes: u64) -> Result<File, StartError> {
    let shown = path.display();
    let free = free_bytes(path)
        .map_err(|error| StartError::Store(format!("cannot ask for the free space of {shown}: {error}")))?;
    if free < outside_bytes {
        return Err(StartError::Store(format!(
            "the store {shown} has {free} bytes free, and {outside_bytes} bytes of the VM do not fit into its RAM budget; free some \
             space, name another store, raise the budget, or start with --store-overcommit if it will not touch all of its memory"
        )));
    }
    let direct = |flags| {
        OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(libc::O_DIRECT | flags).open(path)
    };
    // A file without a name goes away with the VM's process, however that ends.
    let file = direct(libc::O_TMPFILE).map_err(|error| explain(path, &error))?;
    file.set_len(memory_bytes).map_err(|error| {
        StartError::Store(format!("cannot make a sparse file of {memory_bytes} bytes in {shown}: {error}"))
    })?;
    Ok(file)
}

/// How long a device that is in use is waited for, and how often it is tried.
const LET_GO_LIMIT: Duration = Duration::from_secs(3);
const LET_GO_EVERY: Duration = Duration::from_millis(50);

fn open_device(path: &Path, memory_bytes: u64) -> Result<File, StartError> {
    use std::io::Seek;
    let shown = path.display();
    // O_EXCL on a block device: not while it is mounted or another VM's store. The kernel closes what an io_uring has of a process some
    // moments after that has ended, so the store of a VM that has just ended is busy for that long.
    let deadline = Instant::now() + LET_GO_LIMIT;
    let mut file = loop {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_DIRECT | libc::O_EXCL);
        match options.open(path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                std::thread::sleep(LET_GO_EVERY);
            }
            opened => break opened.map_err(|error| explain(path, &error))?,
        }
    };
    let size = file.seek(io::SeekFrom::End(0)).map_err(|error| explain(path, &error))?;
    if size < memory_bytes {
        return Err(StartError::Store(format!(
            "the device {shown} has {size} bytes, the VM needs {memory_bytes}; name a larger one"
        )));
    }
    Ok(file)
}

fn explain(path: &Path, error: &io::Error) -> StartError {
    let shown = path.display();
    StartError::Store(match error.raw_os_error() {
        Some(libc::EINVAL) => format!(
            "the file system of {shown} cannot do direct I/O (O_DIRECT); name a store on ext4, xfs or btrfs, or a block device"
        ),
        Some(libc::EOPNOTSUPP | libc::EISDIR) => format!(
            "the file system of {shown} has no nameless files (O_TMPFILE); name a store on ext4, xfs or btrfs, or a block device"
        ),
        Some(libc::EBUSY) => {
            format!("{shown} is in use (mounted, or the store of another VM); name a free device")
        }
        Some(libc::EACCES | libc::EPERM) => {
            format!("no permission to write in {shown}; change its owner, or name another store")
        }
        _ => format!("cannot open a store in {shown}: {error}"),
    })
}

/// Bytes that this user may still write to the file system of `path`.
fn free_bytes(path: &Path) -> io::Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` ends in NUL, and the kernel fills `stat` if it returns 0.
    let result = unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: filled by the successful call above.
    let stat = unsafe { stat.assume_init() };
    Ok(stat.f_bavail * stat.f_frsize)
}
