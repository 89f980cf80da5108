//! The memory backends: files that QEMU maps shared, in whose place it gets the engine's anonymous memory.
//!
//! ```text
//!   QEMU:  mmap(PROT_NONE, anonymous)        a reservation, not seen here
//!          mmap(MAP_FIXED | MAP_SHARED, fd)  ──▶ anonymous, attached to the engine; the file stays empty
//!          fallocate(fd, PUNCH_HOLE)         ──▶ discarded: untouched again
//! ```
//! Invariant: a backend is mapped at most once, whole, and stays where it is for the life of the process.

use std::ffi::CString;
use std::sync::{Mutex, OnceLock, PoisonError};

use libc::c_int;

/// What the memory is handed to.
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
    /// Known when the file exists: QEMU may be the one that makes it.
    id: OnceLock<FileId>,
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
    pub(crate) fn new(
        files: impl IntoIterator<Item = (CString, usize)>,
        keeper: Box<dyn Keeper>,
    ) -> Backends {
        let backend = |(path, bytes)| Backend { path, bytes, id: OnceLock::new(), address: OnceLock::new() };
        Backends { list: files.into_iter().map(backend).collect(), keeper, mapping: Mutex::new(()) }
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
        // SAFETY: fstat only writes to the structure.
        let id = file_id(|stat| unsafe { libc::fstat(fd, stat) });
        let found = id.and_then(|id| self.list.iter().position(|backend| backend.id() == Some(id)));
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

impl Backend {
    fn id(&self) -> Option<FileId> {
        if self.id.get().is_none() {
            // SAFETY: the path is a C string; stat only writes to the structure.
            let id = file_id(|stat| unsafe { libc::stat(self.path.as_ptr(), stat) })?;
            let _ = self.id.set(id);
        }
        self.id.get().copied()
    }
}

fn file_id(stat: impl FnOnce(*mut libc::stat) -> c_int) -> Option<FileId> {
    // SAFETY: a structure of numbers; all zeros is one of its values.
    let mut found: libc::stat = unsafe { std::mem::zeroed() };
    (stat(&raw mut found) == 0).then_some(FileId { dev: found.st_dev, ino: found.st_ino })
}

#[cfg(test)]
#[path = "backends_tests.rs"]
mod tests;
