//! The memory through which pages go: a few buffers, so that disk, processor and pipe each have something to do.

use memmap2::MmapMut;
use swapd::PAGE_SIZE;

use super::error::StreamError;
use super::record::MAX_RECORD_PAGES;
use crate::archive::ArchiveError;

/// Threads at the disk, and at the sums.
pub(super) const THREADS: usize = 4;
/// Twice as many: each thread has one, and the stream is never out of them meanwhile.
const BUFFERS: usize = 2 * THREADS;

/// As many as are used at once, each for a whole record and aligned for direct I/O.
pub(super) fn buffers() -> Result<Vec<MmapMut>, StreamError> {
    let buffer = |_| {
        MmapMut::map_anon(MAX_RECORD_PAGES as usize * PAGE_SIZE)
            .map_err(|error| ArchiveError::io("get memory to read", "checkpoints", error).into())
    };
    (0..BUFFERS).map(buffer).collect()
}
