//! A tier that does not take writes: what is changed stays in RAM, and only what it refused is tried again.
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
use super::state::tiers::Tier;
use crate::error::{CommandError, IoError, IoErrorKind};
use crate::table::{Flag, PageState};
use crate::units::{PageNo, TierId};

/// Frames of the reserve that are let go of at each tick at which somebody waits for one.
const DRIP_FRAMES: u64 = 4;

impl Core {
    pub(super) fn store_error(&self) -> Option<CommandError> {
        self.tiers.failed().map(CommandError::Store)
    }

    /// The same of a page's own home.
    pub(super) fn tier_error(&self, page: PageNo) -> Option<CommandError> {
        let latch = self.tiers.get(self.home_of(page)).failed();
        latch.map(|latch| CommandError::Store(latch.error))
    }

    /// A write failed.
    pub(super) fn latch_store(&mut self, error: IoError) {
        self.counts.write_errors += 1;
        if mutant!(IgnoresFullStore) {
            return;
        }
        let Tier { latch, backoff, .. } = self.tiers.get_mut(error.tier);
        let Some(latch) = latch else {
            let retry_tick = self.tick + backoff.next();
            *latch = Some(Latch { error, told: false, retry_tick, retrying: false, waiters: Vec::new() });
            return self.note_failed(error.tier);
        };
        if std::mem::take(&mut latch.retrying) {
            latch.retry_tick = self.tick + backoff.next();
            for ticket in std::mem::take(&mut latch.waiters) {
                if mutant!(ForgetsWhoAskedForRetry) {
                    break;
                }
                let answer = Err(CommandError::Store(error));
                self.actions.push_back(Action::Answer { ticket, answer });
            }
        }
        latch.error = error;
        self.note_failed(error.tier);
    }

    fn note_failed(&mut self, tier: TierId) {
        if self.tiers.is_full(tier) && !mutant!(KeepsCopiesInFullStore) {
            self.make_space();
        }
        self.tell_failed();
    }

    /// Tells once that a tier takes no writes, unless that ends by itself at once.
    pub(super) fn tell_failed(&mut self) {
        for tier in self.tiers.ids() {
            let ends = self.tiers.is_full(tier) && self.room_may_come_in(tier);
            if let Some(latch) = &mut self.tiers.get_mut(tier).latch
                && !latch.told
                && !ends
                && !(latch.retrying && latch.error.kind == IoErrorKind::Full)
            {
                latch.told = true;
                self.actions.push_back(Action::StoreFailed(latch.error));
            }
        }
    }

    pub(super) fn retry_on_request(&mut self, ticket: Ticket) -> Option<Result<Response, CommandError>> {
        let latched: Vec<_> = self.tiers.ids().filter(|tier| !self.tiers.may_write(*tier)).collect();
        let Some(first) = latched.first() else { return Some(Ok(Response::Done)) };
        let latch = self.tiers.get_mut(*first).latch.as_mut().expect("just found");
        latch.waiters.push(ticket);
        latched.into_iter().for_each(|tier| self.retry_tier(tier));
        None
    }

    /// Writes again what a failed tier left in staging.
    pub(super) fn retry_tier(&mut self, tier: TierId) {
        match &mut self.tiers.get_mut(tier).latch {
            Some(latch) if !latch.retrying => latch.retrying = true,
            _ => return,
        }
        // They are among those found below.
        let table = &self.table;
        self.ios.unwritten().retain(|(page, _)| table.home(page.block()) != tier);
        let unwritten: Vec<_> = self
            .frames
            .staging()
            .bound_one_by_one()
            .filter(|(page, _)| {
                self.table.state(*page) == PageState::Leaving
                    && !self.table.has(*page, Flag::Writing)
                    && self.home_of(*page) == tier
            })
            .collect();
        let purpose = if self.receiving.is_some() { Purpose::Placement } else { Purpose::PageOut };
        if !mutant!(ForgetsUnwrittenOnRetry) {
            self.write(&unwritten, purpose);
        }
        self.end_retry(tier);
    }

    /// When nothing is being written to it any more, and nothing failed: the tier works again.
    pub(super) fn end_retry(&mut self, tier: TierId) {
        // Nor does a page wait for the drop of its place.
        let table = &self.table;
        let waits = self.space.waiting.iter().any(|(page, _)| table.home(page.block()) == tier);
        if self.ios.writes_to(tier) > 0 || waits {
            return;
        }
        let latch = &mut self.tiers.get_mut(tier).latch;
        let Some(mut latch) = latch.take_if(|latch| latch.retrying) else { return };
        self.actions.extend(latch.told.then_some(Action::StoreRecovered(tier)));
        if self.tiers.failed().is_none() {
            self.relieve();
        }
        // They asked for all tiers. What is latched still is being tried again, or has failed once more.
        let mut others = self.tiers.ids();
        let other = others.find(|other| !self.tiers.may_write(*other));
        let other = other.and_then(|other| self.tiers.get_mut(other).latch.as_mut());
        let failed = match other {
            Some(other) if other.retrying => return other.waiters.append(&mut latch.waiters),
            other => other.map(|other| other.error),
        };
        for ticket in latch.waiters {
            let answer = failed.map_or(Ok(Response::Done), |error| Err(CommandError::Store(error)));
            self.actions.push_back(Action::Answer { ticket, answer });
        }
    }

    fn relieve(&mut self) {
        self.frames.keep_reserve();
        let told = self.waiters.set_starved_told(false);
        self.actions.extend((told && !mutant!(ForgetsRelief)).then_some(Action::Relieved));
    }

    pub(super) fn tick_latch(&mut self) {
        if self.tiers.latched().is_none() {
            return;
        }
        if self.waiters.any_deferred() && (self.tiers.none_writable() || self.waiters.is_starved_told()) {
            self.frames.drip(DRIP_FRAMES);
        }
        for tier in self.tiers.ids() {
            let due = |latch: &Latch| self.tick >= latch.retry_tick;
            if self.tiers.get(tier).latch.as_ref().is_some_and(due) && !mutant!(RetriesOnlyWhenAsked) {
                self.retry_tier(tier);
            }
        }
    }

    pub(super) fn ticks_to_retry(&self) -> u64 {
        let until = |latch: &Latch| {
            if latch.retrying { u64::MAX } else { latch.retry_tick.saturating_sub(self.tick) }
        };
        let latches = self.tiers.ids().filter_map(|tier| self.tiers.get(tier).latch.as_ref());
        latches.map(until).min().unwrap_or(u64::MAX).max(1)
    }

    /// Tells when somebody waits for a frame in vain, and when there are enough again (of a larger budget, or given back by the
    /// guest) though a tier still fails. While another one takes writes, frames come of that, unless [nothing](Core::is_stuck) that is
    /// there can leave.
    pub(super) fn tell_starved(&mut self) {
        let Some(error) = self.tiers.failed().filter(|_| !self.room_may_come()) else { return };
        let plenty = self.frames.at_hand() > u64::from(self.frames.marks().high);
        let nothing_leaves = self.tiers.all_failed() || self.is_starved();
        if self.waiters.any_deferred() {
            if nothing_leaves && !self.waiters.set_starved_told(true) {
                self.actions.push_back(Action::Starved(error));
            }
        } else if self.waiters.is_starved_told() && (plenty || !nothing_leaves) {
            self.relieve();
        }
    }
}
