//! RAM of the host that a benchmark leaves alone, and RAM that it makes warm before it measures.

use vmprocess::failure::Failure;
use vmprocess::{host, signals};

/// Memory that first touches may take without being seen as full.
pub(crate) const HOST_RESERVE_BYTES: u64 = 256 << 20;

/// Memory that is in use just before a target takes it: the first touch of memory that a hypervisor below this host has taken
/// back is ten to fifty times as slow as the next, and would hit the targets unevenly. In huge pages and in single frames, because a
/// host finds the two in different places. Dropped when the migration, or the run, begins.
pub(crate) fn warm(bytes: u64) -> Result<[memmap2::MmapMut; 2], Failure> {
    const STEP: usize = 64 << 20;
    let free = host::available_ram()?.saturating_sub(HOST_RESERVE_BYTES);
    let bytes = bytes.min(free / 2) as usize;
    let fail = |error| Failure::io("cannot warm the host's memory", &error);
    let map = || memmap2::MmapMut::map_anon(bytes.max(4096)).map_err(fail);
    let mut kinds = [map()?, map()?];
    // A kernel without huge pages refuses both, and has single frames for both.
    let _ = kinds[0].advise(memmap2::Advice::HugePage);
    let _ = kinds[1].advise(memmap2::Advice::NoHugePage);
    for step in kinds.iter_mut().flat_map(|memory| memory.chunks_mut(STEP)) {
        signals::check()?;
        for page in step.chunks_mut(swapd::PAGE_SIZE) {
            page[0] = 1;
        }
    }
    Ok(kinds)
}
