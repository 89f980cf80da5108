//! The store: a nameless sparse file in a directory, or a block device. Page n is at offset n x 4096, which nobody but
//! [`Store::place_of`] need know.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::StoreError;
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

    /// Bytes that this user may still write to its file system; None of a device.
    pub(crate) fn free_bytes(&self) -> Option<u64> {
        if !self.0.metadata().ok()?.is_file() {
            return None;
        }
        let stat = rustix::fs::fstatvfs(&self.0).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

/// Opens the store for a VM of `memory_bytes`, of which `outside_bytes` must find room in it.
pub(super) fn open(path: &Path, memory_bytes: u64, outside_bytes: u64) -> Result<Store, StoreError> {
    let metadata =
        std::fs::metadata(path).map_err(|source| StoreError::Unusable { path: path.to_owned(), source })?;
    let file = if metadata.is_dir() {
        open_in_directory(path, memory_bytes, outside_bytes)?
    } else if metadata.file_type().is_block_device() {
        open_device(path, memory_bytes)?
    } else {
        return Err(StoreError::NeitherKind { path: path.to_owned() });
    };
    if metadata.blksize() > PAGE_SIZE as u64 * 16 {
        tracing::warn!(
            "the file system of {} works in blocks of {} bytes: expect slow paging",
            path.display(),
            metadata.blksize()
        );
    }
    Ok(Store(file))
}

fn open_in_directory(path: &Path, memory_bytes: u64, outside_bytes: u64) -> Result<File, StoreError> {
    let direct = |flags| {
        OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(libc::O_DIRECT | flags).open(path)
    };
    // A file without a name goes away with the VM's process, however that ends.
    let file = direct(libc::O_TMPFILE).map_err(|error| explain(path, error))?;
    // Behind that: a file system that takes no files, such as /proc, has no room either, and making some would not
    // help.
    let available_bytes =
        free_bytes(path).map_err(|source| StoreError::FreeSpace { path: path.to_owned(), source })?;
    if available_bytes < outside_bytes {
        let path = path.to_owned();
        return Err(StoreError::NoRoom { path, needed_bytes: outside_bytes, available_bytes });
    }
    file.set_len(memory_bytes).map_err(|source| {
        let path = path.to_owned();
        StoreError::SparseFile { path, needed_bytes: memory_bytes, source }
    })?;
    Ok(file)
}

/// How long a device that is in use is waited for, and how often it is tried.
const LET_GO_LIMIT: Duration = Duration::from_secs(3);
const LET_GO_EVERY: Duration = Duration::from_millis(50);

fn open_device(path: &Path, memory_bytes: u64) -> Result<File, StoreError> {
    use std::io::Seek;
    // O_EXCL on a block device: not while it is mounted or another VM's store. The kernel closes what an io_uring has
    // of a process some moments after that has ended, so the store of a VM that has just ended is busy for that long.
    let deadline = Instant::now() + LET_GO_LIMIT;
    let mut file = loop {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_DIRECT | libc::O_EXCL);
        match options.open(path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                std::thread::sleep(LET_GO_EVERY);
            }
            opened => break opened.map_err(|error| explain(path, error))?,
        }
    };
    let available_bytes = file.seek(io::SeekFrom::End(0)).map_err(|error| explain(path, error))?;
    if available_bytes < memory_bytes {
        let path = path.to_owned();
        return Err(StoreError::SmallDevice { path, needed_bytes: memory_bytes, available_bytes });
    }
    Ok(file)
}

/// What it means that no store can be opened at the path.
fn explain(path: &Path, source: io::Error) -> StoreError {
    let path = path.to_owned();
    match source.raw_os_error() {
        Some(libc::EINVAL) => StoreError::NoDirectIo { path, source },
        Some(libc::EOPNOTSUPP | libc::EISDIR) => StoreError::NoNamelessFiles { path, source },
        Some(libc::EBUSY) => StoreError::InUse { path, source },
        Some(libc::EACCES | libc::EPERM) => StoreError::NoPermission { path, source },
        _ => StoreError::Open { path, source },
    }
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
