//! Guest memory that its owner maps, region by region, while the engine runs.
//!
//! The owner may take a region back at any time, also while somebody waits for a page of it: the core can then still decide to
//! move a page there. Such a frame goes back to the host, and the page reads as zeros should the core want it back. Either way the
//! books count no fewer frames than there are.

use super::{Driver, NO_TICKET, StartError, report};
use crate::core::{Event, Request};
use crate::units::SlotRun;

impl Driver {
    pub(super) fn attach(&mut self, region: usize, base: usize) -> Result<(), StartError> {
        self.memory.check(region, base).map_err(StartError::Memory)?;
        // Of what the core moved there while it was nowhere, nothing is left.
        self.forget(region);
        self.memory.map_in(&self.faults, region, base)?;
        if self.prealloc {
            self.memory.runs_of(region).for_each(|run| self.prealloc(run));
        }
        Ok(())
    }

    /// A region that is not attached has nothing to give back.
    pub(super) fn detach(&mut self, region: usize) {
        self.forget(region);
        self.memory.map_out(&self.faults, region);
    }

    fn forget(&mut self, region: usize) {
        for run in self.memory.runs_of(region) {
            self.event(Event::Request { ticket: NO_TICKET, request: Request::Discard(run) });
        }
    }

    /// Instead of a move to a region that has been taken back.
    pub(super) fn drop_moved(&self, slots: SlotRun) {
        report(self.memory.release_slots(slots), "give frames back");
    }
}
