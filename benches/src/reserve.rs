//! RAM of the host that a benchmark leaves alone, and RAM that it makes warm before it measures.

use vmprocess::failure::Failure;
use vmprocess::{host, signals};

/// RAM that is left free when a benchmark checks whether this host has enough.
pub(crate) const HOST_RESERVE_BYTES: u64 = 256 << 20;

/// Memory that is touched just before a target touches its own, and freed when the migration or the run begins. Where
/// a hypervisor below this host has taken free memory back, the first touch of it is ten to fifty times as slow as
/// the next, and would be counted against whichever target happens to get it. As much is touched in huge pages, and
/// once more in single frames, because a host takes the two from different places.
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
