//! The memory backends: files that QEMU maps shared, in whose place it gets the engine's anonymous memory.
//!
//! ```text
//!   QEMU:  open(mem-path)                    ──▶ a sealed, empty memfd: no such file exists
//!          mmap(PROT_NONE, anonymous)        a reservation, not seen here
//!          mmap(MAP_FIXED | MAP_SHARED, fd)  ──▶ anonymous, attached to the engine; the file stays empty
//!          fallocate(fd, PUNCH_HOLE)         ──▶ discarded: untouched again
//! ```
//! Invariant: a backend is mapped at most once, whole, and stays where it is for the life of the process. Its file
//! cannot be mapped to be written but through here: a mapping that this object did not see would be memory without a
//! budget.

use std::ffi::{CStr, CString};
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::{Mutex, OnceLock, PoisonError};

use libc::c_int;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;

/// The owner that mapped memory is handed to.
pub(crate) trait Keeper: Send + Sync {
    /// Takes over backend `index`, freshly mapped. The error has been told; QEMU sees an errno.
    fn attach(&self, index: usize, address: usize, bytes: usize) -> Result<(), c_int>;

    /// The guest gave it back. Reads as zeros from the moment that this returns.
    fn discard(&self, part: Part);
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct FileId {
    dev: u64,
    ino: u64,
}

#[derive(Debug)]
struct Backend {
    path: CString,
    bytes: usize,
    file: OwnedFd,
    id: FileId,
    address: OnceLock<usize>,
}

/// A piece of a mapped backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Part {
    pub(crate) index: usize,
    pub(crate) address: usize,
    /// From the backend's start.
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
}

pub(crate) struct Backends {
    list: Vec<Backend>,
    keeper: Box<dyn Keeper>,
    /// Held while a backend is mapped.
    mapping: Mutex<()>,
}

impl std::fmt::Debug for Backends {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backends").field("list", &self.list).finish_non_exhaustive()
    }
}

impl Backends {
    /// # Errors
    /// If the kernel gives no file.
    pub(crate) fn new(
        files: impl IntoIterator<Item = (CString, usize)>,
        keeper: Box<dyn Keeper>,
    ) -> std::io::Result<Backends> {
        let backend = |(path, bytes)| {
            let file = sealed(bytes)?;
            let found = rustix::fs::fstat(&file)?;
            let id = FileId { dev: found.st_dev, ino: found.st_ino };
            Ok(Backend { path, bytes, file, id, address: OnceLock::new() })
        };
        let list = files.into_iter().map(backend).collect::<std::io::Result<_>>()?;
        Ok(Backends { list, keeper, mapping: Mutex::new(()) })
    }

    /// A new descriptor on the backend of that name; None: there is none. Allocates nothing.
    pub(crate) fn open(&self, path: &CStr) -> Option<Result<c_int, c_int>> {
        let backend = self.list.iter().find(|backend| *backend.path == *path)?;
        let copy = rustix::io::fcntl_dupfd_cloexec(&backend.file, 0);
        Some(copy.map(OwnedFd::into_raw_fd).map_err(Errno::raw_os_error))
    }

    /// Which backend the descriptor is open on. Keeps errno, allocates nothing.
    pub(crate) fn of_descriptor(&self, fd: c_int) -> Option<usize> {
        if fd < 0 {
            return None;
        }
        // SAFETY: the location of this thread's errno is always valid.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: as above.
        let before = unsafe { *errno };
        // SAFETY: a structure of numbers; all zeros is one of its values.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: fstat only writes to the structure. Not by rustix: the descriptor is QEMU's, and need not be open.
        let known = unsafe { libc::fstat(fd, &raw mut stat) } == 0;
        let id = FileId { dev: stat.st_dev, ino: stat.st_ino };
        let found = self.list.iter().position(|backend| known && backend.id == id);
        // SAFETY: as above.
        unsafe { *errno = before };
        found
    }

    /// Maps backend `index` by `reserve`, which is given the address wished for, and hands it to the keeper.
    pub(crate) fn map(
        &self,
        index: usize,
        bytes: usize,
        file_offset: i64,
        wish: usize,
        fixed: bool,
        reserve: impl FnOnce(usize) -> Result<usize, c_int>,
    ) -> Result<usize, c_int> {
        let backend = &self.list[index];
        let _turn = self.mapping.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mapped) = backend.address.get().copied() {
            // QEMU maps a page again, over itself, to have it back empty (after a memory error).
            let part = usize::try_from(file_offset).ok().filter(|offset| fixed && mapped + offset == wish);
            let part = part.and_then(|_| self.part_of_file(index, file_offset, bytes as i64));
            return match part {
                Some(part) => {
                    self.discard(part);
                    Ok(wish)
                }
                None => {
                    tracing::error!(
                        backend = ?backend.path,
                        "guest memory cannot be mapped a second time: a device that shares it with another process does \
                         not work with vmemd"
                    );
                    Err(libc::ENOTSUP)
                }
            };
        }
        if bytes != backend.bytes || file_offset != 0 {
            tracing::error!(
                backend = ?backend.path, bytes, expected = backend.bytes, file_offset,
                "QEMU maps this memory backend otherwise than vmemd was told: give it exactly that size"
            );
            return Err(libc::EINVAL);
        }
        let address = reserve(wish)?;
        self.keeper.attach(index, address, bytes)?;
        let _ = backend.address.set(address);
        Ok(address)
    }

    /// The first piece of guest memory in a range of addresses.
    pub(crate) fn first_part(&self, from: usize, to: usize) -> Option<Part> {
        let parts = self.list.iter().enumerate().filter_map(|(index, backend)| {
            let base = *backend.address.get()?;
            let (start, end) = (from.max(base), to.min(base + backend.bytes));
            (start < end).then(|| Part { index, address: start, offset: start - base, bytes: end - start })
        });
        parts.min_by_key(|part| part.address)
    }

    /// The piece of a mapped backend at a range of its file.
    pub(crate) fn part_of_file(&self, index: usize, offset: i64, bytes: i64) -> Option<Part> {
        let backend = &self.list[index];
        let base = *backend.address.get()?;
        let (offset, bytes) = (usize::try_from(offset).ok()?, usize::try_from(bytes).ok()?);
        let end = offset.checked_add(bytes)?.min(backend.bytes);
        let page = swapd::PAGE_SIZE;
        let fits = offset < end && offset.is_multiple_of(page) && end.is_multiple_of(page);
        fits.then(|| Part { index, address: base + offset, offset, bytes: end - offset })
    }

    pub(crate) fn discard(&self, part: Part) {
        self.keeper.discard(part);
    }
}

/// A file of that size which nobody can fill: QEMU compares its size, and does not set it then.
fn sealed(bytes: usize) -> std::io::Result<OwnedFd> {
    const NAME: &CStr = c"vmemd-guest-memory";
    const SEALS: SealFlags =
        SealFlags::WRITE.union(SealFlags::GROW).union(SealFlags::SHRINK).union(SealFlags::SEAL);
    let file = memfd_create(NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, bytes as u64)?;
    fcntl_add_seals(&file, SEALS)?;
    Ok(file)
}

#[cfg(test)]
#[path = "backends_tests.rs"]
mod tests;
