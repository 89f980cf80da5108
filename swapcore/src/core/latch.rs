//! A store that does not take writes: what is changed stays in RAM, and only what it refused is tried again.
//!
//! ```text
//!           a write failed                 all that it had refused is written
//!   works ─────────────────▶ latched ◀──┐                  ▲
//!                               │       │ one failed       │
//!                  time, or asked       │                  │
//!                               └─▶ trying again ──────────┘
//! ```
//! While it is latched no victims are chosen, so frames only get fewer. The VM runs on as long as there are any; the first fault
//! without one is told ([`Action::Starved`]), so that its vCPUs can be stopped rather than hang. A vCPU that is emulated (QEMU's
//! TCG) stops only behind the access that it is at: for that there is the *reserve*, frames that nobody gets otherwise.

use super::Core;
use super::event::{Action, Response, Ticket};
use super::state::ios::Purpose;
use super::state::latch::Latch;
use crate::error::{CommandError, IoError};
use crate::staging::Use;
use crate::table::{Flag, PageState};
use crate::units::{Slot, TierId};

/// Frames of the reserve that are let go of at each tick at which somebody waits for one.
const DRIP_FRAMES: u64 = 4;

impl Core {
    pub(super) fn store_error(&self) -> Option<CommandError> {
        self.latch.as_ref().map(|latch| CommandError::Store(latch.error))
    }

    /// Frames that pages can have: all of the budget but what is left of the reserve. (A VM that arrives runs no vCPUs.)
    pub(super) fn limit(&self) -> u64 {
        if self.receiving.is_some() {
            return self.budget;
        }
        let dripped = self.latch.as_ref().map_or(0, |latch| latch.dripped);
        self.budget.saturating_sub(u64::from(self.marks.reserve).saturating_sub(dripped))
    }

    /// A write failed.
    pub(super) fn latch_store(&mut self, error: IoError) {
        self.counts.write_errors += 1;
        if mutant!(IgnoresFullStore) {
            return;
        }
        let Some(latch) = &mut self.latch else {
            self.actions.push_back(Action::StoreFailed(error));
            let retry_tick = self.tick + self.backoff.next();
            let (retrying, dripped, starved, waiters) = (false, 0, false, Vec::new());
            self.latch = Some(Latch { error, retry_tick, retrying, dripped, starved, waiters });
            return;
        };
        if std::mem::take(&mut latch.retrying) {
            latch.retry_tick = self.tick + self.backoff.next();
            for ticket in std::mem::take(&mut latch.waiters) {
                if mutant!(ForgetsWhoAskedForRetry) {
                    break;
                }
                let answer = Err(CommandError::Store(error));
                self.actions.push_back(Action::Answer { ticket, answer });
            }
        }
        latch.error = error;
    }

    pub(super) fn retry_on_request(&mut self, ticket: Ticket) -> Option<Result<Response, CommandError>> {
        let Some(latch) = &mut self.latch else { return Some(Ok(Response::Done)) };
        latch.waiters.push(ticket);
        self.retry_store();
        None
    }

    /// Writes again what a failed store left in staging.
    fn retry_store(&mut self) {
        match &mut self.latch {
            Some(latch) if !latch.retrying => latch.retrying = true,
            _ => return,
        }
        // They are among those found below.
        self.unwritten.clear();
        let unwritten: Vec<_> = (0..self.staging.all_slots())
            .map(Slot)
            .filter_map(|slot| match self.staging.used(slot) {
                Use::Bound(page) => Some((page, slot)),
                _ => None,
            })
            .filter(|(page, _)| {
                self.table.state(*page) == PageState::Leaving && !self.table.has(*page, Flag::Writing)
            })
            .collect();
        let purpose = if self.receiving.is_some() { Purpose::Placement } else { Purpose::PageOut };
        if !mutant!(ForgetsUnwrittenOnRetry) {
            self.write(&unwritten, purpose);
        }
        self.end_retry();
    }

    /// When nothing is being written any more, and nothing failed: the store works again.
    pub(super) fn end_retry(&mut self) {
        if self.ios.writes() > 0 {
            return;
        }
        let Some(latch) = self.latch.take_if(|latch| latch.retrying) else { return };
        self.actions.push_back(Action::StoreRecovered(TierId::STORE));
        self.actions.extend((latch.starved && !mutant!(ForgetsRelief)).then_some(Action::Relieved));
        for ticket in latch.waiters {
            self.actions.push_back(Action::Answer { ticket, answer: Ok(Response::Done) });
        }
    }

    pub(super) fn tick_latch(&mut self) {
        let Some(latch) = &mut self.latch else { return };
        if !self.deferred.is_empty() {
            latch.dripped = (latch.dripped + DRIP_FRAMES).min(u64::from(self.marks.reserve));
        }
        if self.tick >= latch.retry_tick && !mutant!(RetriesOnlyWhenAsked) {
            self.retry_store();
        }
    }

    pub(super) fn ticks_to_retry(&self) -> u64 {
        let until = |latch: &Latch| {
            if latch.retrying { u64::MAX } else { latch.retry_tick.saturating_sub(self.tick) }
        };
        self.latch.as_ref().map_or(u64::MAX, until).max(1)
    }

    /// Tells when somebody waits for a frame in vain, and when there are enough again (of a larger budget, or given back by the
    /// guest) though the store still fails.
    pub(super) fn tell_starved(&mut self) {
        let plenty = self.available() > u64::from(self.marks.high);
        let Some(latch) = &mut self.latch else { return };
        if !self.deferred.is_empty() {
            if !std::mem::replace(&mut latch.starved, true) {
                self.actions.push_back(Action::Starved(latch.error));
            }
        } else if latch.starved && plenty {
            (latch.starved, latch.dripped) = (false, 0);
            self.actions.push_back(Action::Relieved);
        }
    }
}
