//! How well the pages were placed, if the source asks for that: which pages the VM touches in its first second here,
//! and how many of them were in RAM when it started.
//!
//! The VM stands still between the end of the receiving and its start, so the check waits for nothing in that time: it
//! only asks, and looks at the answers when the VM runs. Pages that move while the engine still looks are counted as
//! found.

use swapd::{CommandError, PendingAnswer, Run, answered};

use crate::bitmap::Bitmap;
use crate::limits::PLACEMENT_WINDOW;
use crate::outside::{DirtySubscription, EngineHandle, Instant, sleep};
use crate::report::Placement;

/// A check that is under way. However it ends, the engine prefetches again.
#[derive(Debug)]
pub(super) struct Check<'a> {
    handle: &'a EngineHandle,
    /// The pages in RAM and those in the store, until they are looked at.
    maps: Option<[PendingAnswer<Vec<Run>>; 2]>,
    /// Once the VM has been started: when that was, and the subscription to its writes.
    started: Option<(Instant, PendingAnswer<DirtySubscription>)>,
}

impl<'a> Check<'a> {
    /// Asks where all pages are. Prefetching ends, so that from here on only pages that are touched come in.
    pub(super) fn begin(handle: &'a EngineHandle) -> Self {
        drop(handle.set_prefetch_async(false));
        let maps = Some([handle.resident_map_async(), handle.stored_map_async()]);
        Check { handle, maps, started: None }
    }

    /// The VM runs.
    pub(super) fn started(mut self) -> Self {
        self.started = Some((Instant::now(), self.handle.subscribe_dirty_async()));
        self
    }

    /// What the VM touches in [`PLACEMENT_WINDOW`] from its start.
    ///
    /// # Errors
    /// The engine's, if it has ended or does not track writes.
    pub(super) async fn finish(mut self) -> Result<Placement, CommandError> {
        let (since, dirty) = self.started.take().expect("only a VM that runs touches pages");
        let [resident, stored] = self.maps.take().expect("they are looked at once");
        let before = Before { resident: answered(resident).await?, stored: answered(stored).await? };
        let dirty = answered(dirty).await?;
        sleep(PLACEMENT_WINDOW.saturating_sub(since.elapsed())).await;
        let changed = answered(dirty.collect_async()).await?.into_runs();
        let resident_now = answered(self.handle.resident_map_async()).await?;
        let pages = swapd::units::pages_in(self.handle.memory_bytes());
        Ok(count(pages, &before, &changed, &resident_now))
    }
}

impl Drop for Check<'_> {
    fn drop(&mut self) {
        drop(self.handle.set_prefetch_async(true));
    }
}

/// Where pages are before the VM starts.
struct Before {
    resident: Vec<Run>,
    stored: Vec<Run>,
}

/// Counts the pages that were touched. `changed` are pages that were written, or came into the guest, or left it. Two
/// kinds of them do not count: pages that left and did not come back have made room for others and were not touched;
/// pages that were neither in RAM nor in the store are new to the guest, so nobody had to place them.
fn count(pages: u64, before: &Before, changed: &[Run], resident: &[Run]) -> Placement {
    let set = |runs: &[Run]| {
        let mut set = Bitmap::new(pages);
        runs.iter().for_each(|run| set.set_run(*run));
        set
    };
    let (stored, in_ram, changed) = (set(&before.stored), set(&before.resident), set(changed));
    let mut placement = Placement::default();
    for page in resident.iter().flat_map(|run| changed.pages_in(*run)) {
        placement.touched_pages += u64::from(stored.get(page) || in_ram.get(page));
        placement.touched_in_ram += u64::from(in_ram.get(page));
    }
    placement
}

#[cfg(test)]
mod tests {
    use swapd::PageNo;

    use super::*;

    #[test]
    fn what_made_room_for_others_was_not_touched() {
        let run = |start, len| Run::new(PageNo(start), len);
        let before = Before { resident: vec![run(0, 20)], stored: vec![run(20, 20)] };
        // 0 to 3 were written; 4 was written and came back; 20 to 25 came in, for which 10 to 15 left; 50 is new.
        let changed = [run(0, 5), run(10, 6), run(20, 6), run(50, 1)];
        let resident = [run(0, 10), run(16, 4), run(20, 6), run(50, 1)];
        let placement = count(64, &before, &changed, &resident);
        assert_eq!(placement, Placement { touched_pages: 11, touched_in_ram: 5 });
    }
}
