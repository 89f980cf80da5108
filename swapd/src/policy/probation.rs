//! The pages that came in last, in order: they leave first, unless they prove themselves.
//!
//! A scan over more than the budget would otherwise push out everything for pages that are used once. So what comes in
//! from the store is on probation: once that is more than a tenth of the budget, the oldest of it goes to standby. A page that is
//! missed there is rescued and hot, and belongs to the clock from then on. This is the small queue of S3-FIFO (Yang et al., SOSP
//! 2023), with the rescue in the place of the second access, and heat that outlives a page-out in the place of the ghost queue.

use std::collections::VecDeque;

use crate::policy::clock::{VICTIM_RUN_MAX, may_leave};
use crate::table::PageTable;
use crate::units::{PageNo, Run};

/// One frame in so many is for pages on probation.
pub const PROBATION_SHARE: u64 = 10;
/// A page fetched by one fault has this heat; one with more is no longer on probation.
pub const HEAT_FAULT: u8 = 2;

/// Runs in the order in which they came in. Pages that left by another way meanwhile are still in it.
#[derive(Debug, Default)]
pub struct Probation {
    runs: VecDeque<Run>,
    pages: u64,
}

impl Probation {
    pub fn admit(&mut self, run: Run) {
        self.pages += u64::from(run.len);
        match self.runs.back_mut() {
            Some(last) if last.end() == run.start && last.len + run.len <= VICTIM_RUN_MAX => {
                last.len += run.len
            }
            _ => self.runs.push_back(run),
        }
    }

    /// Replaces `victims` by the next pages to go, if more are on probation than a budget of so many frames has room for.
    pub fn step(&mut self, table: &PageTable, budget: u64, victims: &mut Vec<Run>) -> bool {
        victims.clear();
        while victims.is_empty() && self.pages > budget / PROBATION_SHARE {
            let Some(run) = self.runs.pop_front() else { return false };
            self.pages -= u64::from(run.len);
            let unproven = |page: &PageNo| may_leave(table, *page) && table.heat(*page) <= HEAT_FAULT;
            victims.extend(crate::units::runs_of(run.pages().filter(unproven), VICTIM_RUN_MAX));
        }
        !victims.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::PageState::{Arriving, Resident};

    #[test]
    fn the_oldest_go_first_and_the_proven_stay() {
        let mut table = PageTable::new(1000);
        let mut probation = Probation::default();
        for page in (0..300).map(PageNo) {
            table.set(page, Arriving);
            table.set(page, Resident);
            probation.admit(Run::one(page));
        }
        table.set_heat(PageNo(10), HEAT_FAULT + 1);
        let mut victims = vec![];
        assert!(probation.step(&table, 1000, &mut victims));
        assert_eq!(victims, [Run::new(PageNo(0), 10), Run::new(PageNo(11), 53)]);
        let mut steps = 1;
        while probation.step(&table, 1000, &mut victims) {
            steps += 1;
        }
        assert_eq!((steps, probation.pages), (4, 300 - 4 * 64), "until a tenth of the budget is left");
    }
}
