//! Guest memory that its owner maps, region by region, while the engine runs.
//!
//! The owner may take a region back at any time, also while somebody waits for a page of it: the core can then still decide to
//! move a page there. Such a frame goes back to the host, and the page reads as zeros should the core want it back. Either way the
//! books count no fewer frames than there are.

use super::{Driver, NO_TICKET, StartError, report};
use crate::core::{Event, Request};
use crate::units::{Run, SlotRun};

impl Driver {
    pub(super) fn attach(&mut self, region: usize, base: usize) -> Result<(), StartError> {
        let run = self.memory.check(region, base).map_err(StartError::Memory)?;
        // Of what the core moved there while it was nowhere, nothing is left.
        self.forget(run);
        self.memory.map_in(&self.faults, region, base)?;
        if self.prealloc {
            self.prealloc(run);
        }
        Ok(())
    }

    /// A region that is not attached has nothing to give back.
    pub(super) fn detach(&mut self, region: usize) {
        if let Some(run) = self.memory.pages_of(region) {
            self.forget(run);
            self.memory.map_out(&self.faults, region);
        }
    }

    fn forget(&mut self, run: Run) {
        self.event(Event::Request { ticket: NO_TICKET, request: Request::Discard(run) });
    }

    /// Instead of a move to a region that has been taken back.
    pub(super) fn drop_moved(&self, slots: SlotRun) {
        report(self.memory.release_slots(slots), "give frames back");
    }
}
