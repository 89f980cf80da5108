//! A tier that refuses its writes, or ends none of them, gets no more to write: frames come of no page that is on its
//! way there, and whatever is in staging is in the way of pages that another tier would take.
//!
//! Looked at from outside: what the core thinks of its tiers is not asked.

use super::Sim;
use super::disk::Flight;
use super::oracle::Oracle;
use crate::table::PageState;
use crate::units::{PageNo, TIERS_MAX, TierId};

/// A tier that has writes, and has ended nothing for so many ticks, gets no more: twice what the core allows itself.
const STALLED_TICKS: u64 = 40;

#[derive(Debug, Default)]
pub(super) struct Closed {
    tiers: [Tier; TIERS_MAX],
    /// When that was last looked at: somebody had asked for something that was not answered, and how much had been asked
    /// for so far.
    asked: (bool, u64),
}

#[derive(Clone, Copy, Debug, Default)]
struct Tier {
    /// It has ended no write well since it failed at one, and there was something to be written to it all the time: what
    /// has nothing to be tried with works again.
    failed: bool,
    /// For how many ticks it has had writes and ended nothing, and whether it has ended anything since the last of
    /// them.
    stalled_ticks: u64,
    ended: bool,
    /// Pages on their way there when that was last looked at, if it was closed.
    leaving: Option<u64>,
}

impl Closed {
    /// A write or a drop has ended.
    pub(super) fn ended(&mut self, flight: &Flight, well: bool) {
        let tier = &mut self.tiers[flight.tier.index()];
        tier.failed = flight.is_write() && !well;
        (tier.stalled_ticks, tier.ended) = (0, true);
    }
}

impl Oracle {
    /// So many ticks have passed; the tier has writes or not.
    fn wait_for_writes(&mut self, tier: TierId, under_way: bool, ticks: u64) {
        let tier = &mut self.closed.tiers[tier.index()];
        let idle = std::mem::take(&mut tier.ended) || !under_way;
        tier.stalled_ticks = if idle { 0 } else { tier.stalled_ticks + ticks };
    }
}

impl Sim {
    /// To be called before each tick.
    pub(super) fn tick_closed(&mut self, ticks: u64) {
        for tier in (0..self.tiers).map(TierId) {
            let of_tier = |flight: &Flight| flight.is_write() && flight.tier == tier;
            let under_way = self.disk.flights.iter().any(of_tier);
            self.oracle.wait_for_writes(tier, under_way, ticks);
            self.oracle.closed.tiers[tier.index()].failed &= self.core.table().leaving_to(tier) > 0;
        }
    }

    /// To be called after each step. What somebody asked to be evicted, and what arrives, is sent there all the same.
    pub(super) fn check_closed(&mut self) {
        let closed = &mut self.oracle.closed;
        let asked = (!self.asked.is_empty() || self.session.is_some(), self.next_ticket);
        let quiet = std::mem::replace(&mut closed.asked, asked) == (false, asked.1) && !asked.0;
        for (index, tier) in closed.tiers.iter_mut().enumerate().take(usize::from(self.tiers)) {
            let leaving = self.core.table().leaving_to(TierId(index as u8));
            tier.failed &= leaving > 0;
            let is_closed = tier.failed || tier.stalled_ticks >= STALLED_TICKS;
            let before = std::mem::replace(&mut tier.leaving, is_closed.then_some(leaving));
            let grown = before.filter(|before| leaving > *before && is_closed && quiet);
            assert!(
                grown.is_none(),
                "{leaving} pages are on their way to a tier that takes none, after {grown:?}"
            );
        }
    }

    /// It has been told that whoever waits for a frame gets none, and that is so still: no page is in RAM that this tier
    /// would take.
    pub(super) fn check_starved(&self, tier: TierId) {
        let table = self.core.table();
        let of_tier = |page: &PageNo| table.home(page.block()) == tier;
        let stays = |page: &PageNo| table.state(*page) == PageState::Resident;
        if let Some(page) = self.memory.iter().copied().filter(of_tier).find(stays) {
            self.trace.suspect.set(Some(page));
            panic!("somebody waits for a frame, and {page}, which its tier would take, stays in RAM");
        }
    }
}
