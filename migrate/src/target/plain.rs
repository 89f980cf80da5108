//! Memory without an engine: a private anonymous mapping.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use swapd::{PageNo, Run};

/// Unmapped when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct PlainMemory(Arc<Mapping>);

#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is plain memory, reached only through raw pointers; who uses them answers for races.
unsafe impl Send for Mapping {}
// SAFETY: as above; the struct itself never changes.
unsafe impl Sync for Mapping {}

impl PlainMemory {
    /// Address space for `bytes` of zeroed memory; none of it is taken from the host yet.
    ///
    /// # Errors
    /// If the host has no such address space to give.
    pub fn new(bytes: u64) -> io::Result<PlainMemory> {
        let bytes = usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing of ours.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(PlainMemory(Arc::new(Mapping { base, bytes })))
    }

    /// Length of the memory, as asked for.
    pub fn bytes(&self) -> u64 {
        self.0.bytes as u64
    }

    /// Address of guest page 0.
    pub fn base(&self) -> *mut u8 {
        self.0.base.as_ptr()
    }

    /// Address of a page.
    ///
    /// # Panics
    /// If the page is not within the memory.
    pub(crate) fn page_address(&self, page: PageNo) -> *mut u8 {
        assert!(page.offset() < self.bytes(), "{page} is beyond the memory");
        // SAFETY: just checked to be within the mapping.
        unsafe { self.base().add(page.offset() as usize) }
    }

    /// Makes the run's pages read as zeros, and gives their frames back.
    pub(crate) fn clear(&self, run: Run) -> io::Result<()> {
        assert!(run.end().offset() <= self.bytes(), "{run:?} is beyond the memory");
        let start = self.page_address(run.start).cast();
        // SAFETY: within the mapping, as just checked, and private anonymous memory reads as zeros afterwards.
        // Nobody holds a Rust reference into it.
        let done = unsafe { libc::madvise(start, run.bytes(), libc::MADV_DONTNEED) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and with the last clone gone nobody may use it any more.
        let done = unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
        assert_eq!(done, 0, "unmapping plain memory failed: {}", io::Error::last_os_error());
    }
}
