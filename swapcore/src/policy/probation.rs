//! The pages that streams brought in last, in order: they leave first, unless they prove themselves.
//!
//! A scan over more than the budget would otherwise push out everything for pages that are used once. So what a stream
//! brings is on probation: once that is more than a small part of the budget, the oldest of it goes to standby. A page
//! that is missed there is rescued and hot, and belongs to the clock from then on. This is the small queue of S3-FIFO
//! (Yang et al., SOSP 2023), with the rescue in the place of the second access.
//!
//! A page that a lone fault fetched is on probation likewise, in a queue of its own, unless it has kept heat from an
//! earlier stay. At the end of that queue a share stays all the same, and belongs to the clock: the larger, the more of
//! what left there comes back soon (`ghosts`). So the queue need not be long to be of use to a working set that is new:
//! its memory stays small.
//!
//! What comes back sooner than a budget's worth of pages has left was worth a frame (S3-FIFO's ghost queue; here, when
//! a page of each 256 KiB left last). But a guest that goes round and round a little more than its budget brings back
//! everything, and no page is better than another: only a part of it may stay, or all would push each other out
//! (bimodal insertion, Qureshi et al., ISCA 2007). Let *m* be the share of pages, among those that streams passed over
//! lately, that were not in RAM. A page that comes back stays with a probability of *m*/3, and of 1/64 at least. Where
//! *m* is small most of the loop is in RAM, and to replace pages only exchanges one for another. A third at most,
//! because if more stayed, eviction by the clock would advance as fast as the stream and take exactly the pages just
//! ahead of it.

use std::collections::VecDeque;

use crate::policy::clock::{VICTIM_RUN_MAX, may_leave};
use crate::policy::ghosts::Ghosts;
use crate::table::PageTable;
use crate::units::{PageNo, Run};

/// One frame in so many is for pages on probation.
const PROBATION_SHARE: u64 = 64;
/// One frame in so many is for pages fetched by a lone fault, of which nothing was known, until it is decided which of
/// them stay.
const LONE_SHARE: u64 = 20;
/// And never fewer than so many, or a page could leave before it has been used.
const LONE_MIN: u64 = 64;
/// A page fetched by one fault has this heat; one with more is no longer on probation.
pub const HEAT_FAULT: u8 = 2;
/// Heat of what a stream brought and that shall stay: older pages of which nothing is known go first.
pub const HEAT_RETURNED: u8 = 4;
/// Pages that share a note of when one of them left.
const CHUNK_PAGES: u64 = 64;
/// Shares are in parts of this.
const WHOLE: u32 = 1 << 10;
/// Of missing pages that come back, one in so many stays at most.
const STAY_SHARE: u32 = 3;
/// Of pages that did not leave lately so many stay all the same: the guest may have turned to something new.
const STRANGERS: u32 = WHOLE / 64;

/// Runs in the order in which they came in. Pages that left by another way meanwhile are still in it.
#[derive(Debug)]
pub struct Probation {
    runs: VecDeque<Run>,
    pages: u64,
    single_faults: VecDeque<PageNo>,
    /// Pages that have left so far, from 1, wrapping.
    departed: u32,
    /// `departed` when a page of the chunk left last; 0: never.
    departed_at: Vec<u32>,
    /// Pages that streams went over lately, and those of them that were in RAM.
    passed: (u64, u64),
    /// Pages that were to stay, not yet chosen, in parts of [`WHOLE`].
    owed: u64,
    /// What has left the lone pages' queue.
    ghosts: Ghosts,
}

impl Probation {
    /// Bytes that grow with the memory.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.departed_at[..]) + self.ghosts.bytes()
    }

    /// For a memory of so many pages.
    pub fn new(pages: u64) -> Self {
        Probation {
            runs: VecDeque::new(),
            pages: 0,
            single_faults: VecDeque::new(),
            departed: 1,
            departed_at: vec![0; pages.div_ceil(CHUNK_PAGES) as usize],
            passed: (1, 0),
            owed: 0,
            ghosts: Ghosts::new(pages),
        }
    }

    /// A stream went over so many pages, of which so many were in RAM. What was longer ago than two budgets' worth
    /// fades.
    pub fn note_passed(&mut self, (pages, present): (u32, u32), budget: u64) {
        self.passed = (self.passed.0 + u64::from(pages), self.passed.1 + u64::from(present));
        if self.passed.0 > 2 * budget {
            self.passed = (self.passed.0 / 2, self.passed.1 / 2);
        }
    }

    /// Takes in what a stream brought into a budget of so many frames. False: it shall stay, and is the clock's.
    pub fn admit(&mut self, run: Run, budget: u64) -> bool {
        self.owed += u64::from(run.len) * u64::from(self.share_to_stay(run, budget));
        let price = u64::from(run.len) * u64::from(WHOLE);
        if self.owed >= price {
            self.owed -= price;
            return false;
        }
        self.pages += u64::from(run.len);
        match self.runs.back_mut() {
            Some(last) if last.end() == run.start && last.len + run.len <= VICTIM_RUN_MAX => {
                last.len += run.len
            }
            _ => self.runs.push_back(run),
        }
        true
    }

    /// Takes in a page that a lone fault fetched. The caller leaves out pages that have kept heat from an earlier stay:
    /// those are the clock's.
    pub fn admit_lone(&mut self, page: PageNo) {
        self.single_faults.push_back(page);
    }

    fn share_to_stay(&self, run: Run, budget: u64) -> u32 {
        let departed_at = self.departed_at[(run.start.0 / CHUNK_PAGES) as usize];
        let (pages, present) = self.passed;
        let missing = (u64::from(WHOLE) * (pages - present) / pages) as u32;
        // The note of a chunk says nothing of a single page: it may be another one's.
        let noted = run.len > 1 && departed_at != 0;
        let since = noted.then(|| u64::from(self.departed.wrapping_sub(departed_at)));
        share_to_stay(missing, since, budget)
    }

    /// Pages come back from the store or from staging, not by guesswork about neighbours.
    pub fn note_back(&mut self, run: Run, budget: u64) {
        self.ghosts.note_back(run, budget);
    }

    /// The run has been chosen as a victim, by whomever.
    pub fn note_left(&mut self, run: Run, budget: u64) {
        self.ghosts.note_left(run.len, budget);
        self.departed = self.departed.wrapping_add(run.len).max(1);
        self.departed_at[(run.start.0 / CHUNK_PAGES) as usize] = self.departed;
    }

    /// Replaces `victims` by the next pages to go, if more are on probation than a budget of so many frames has room
    /// for; of streams' pages, there is room for `room` at least.
    pub fn step(&mut self, table: &PageTable, budget: u64, room: u64, victims: &mut Vec<Run>) -> bool {
        victims.clear();
        let unproven = |page: &PageNo| may_leave(table, *page) && table.heat(*page) <= HEAT_FAULT;
        while victims.is_empty() && self.single_faults.len() as u64 > (budget / LONE_SHARE).max(LONE_MIN) {
            let Some(page) = self.single_faults.pop_front().filter(unproven) else { continue };
            if !self.ghosts.next_stays() {
                self.ghosts.note_unproven(page);
                victims.push(Run::one(page));
            }
        }
        while victims.is_empty() && self.pages > (budget / PROBATION_SHARE).max(room) {
            let Some(run) = self.runs.pop_front() else { return false };
            self.pages -= u64::from(run.len);
            victims.extend(crate::units::runs_of(run.pages().filter(unproven), VICTIM_RUN_MAX));
        }
        !victims.is_empty()
    }
}

/// Which part of a run that comes back stays, in parts of [`WHOLE`]. `missing`: the part of the pages that streams
/// passed over lately which was not in RAM; `since`: how many pages have left since one of the run's did, if that is
/// known.
///
/// ```text
///   stays                                         reach, in budgets
///    1/3 ┤                       ··▪                2 ┤              ▪   a run that has left longer ago
///        │              ··▪··                         │             ╱    is a stranger: 1/64 stays
///   1/64 ┤▪▪▪▪··                                    1 ┤▪▪▪▪▪▪▪▪▪▪▪▪▪
///        └┬───────────────────────┬ missing           └┬───────────┬──┬ missing
///         0                       1                    0          3/4 1
/// ```
fn share_to_stay(missing: u32, since: Option<u64>, budget: u64) -> u32 {
    // While next to nothing of the way is in RAM, frames are better used even for what comes back later.
    let beyond = (4 * missing).saturating_sub(3 * WHOLE);
    let reach = budget + budget * u64::from(beyond) / u64::from(WHOLE);
    match since {
        Some(since) if since < reach => (missing / STAY_SHARE).max(STRANGERS),
        _ => STRANGERS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::PageState::{Arriving, Resident};

    fn bring(table: &mut PageTable, probation: &mut Probation, run: Run, budget: u64) {
        for page in run.pages() {
            if table.state(page) == crate::table::PageState::Untouched {
                table.set(page, Arriving);
                table.set(page, Resident);
            }
        }
        probation.admit(run, budget);
    }

    #[test]
    fn the_oldest_go_first_and_the_proven_stay() {
        let mut table = PageTable::new(1024);
        let mut probation = Probation::new(1024);
        (0..16).for_each(|nth| bring(&mut table, &mut probation, Run::new(PageNo(nth * 16), 16), 1000));
        table.set_heat(PageNo(10), HEAT_FAULT + 1);
        let mut victims = vec![];
        assert!(probation.step(&table, 0, 100, &mut victims));
        assert_eq!(victims, [Run::new(PageNo(0), 10), Run::new(PageNo(11), 53)]);
        let mut steps = 1;
        while probation.step(&table, 0, 100, &mut victims) {
            steps += 1;
        }
        assert_eq!((steps, probation.pages), (3, 64), "until there is room again");
    }

    #[test]
    fn lone_pages_have_a_queue_of_their_own() {
        let mut table = PageTable::new(100);
        let mut probation = Probation::new(100);
        for page in (0..90).map(PageNo) {
            table.set(page, Arriving);
            table.set(page, Resident);
            probation.admit_lone(page);
        }
        table.set_heat(PageNo(0), HEAT_FAULT + 1);
        let mut victims = vec![];
        assert!(probation.step(&table, 1600, 0, &mut victims));
        assert_eq!(victims, [Run::one(PageNo(1))], "the proven one is passed over");
        let mut left = 1;
        while probation.step(&table, 1600, 0, &mut victims) {
            left += victims.len();
        }
        assert_eq!(
            (left, probation.single_faults.len()),
            (2, 80),
            "of nine unproven ones, one in eight leaves as long as nothing is known"
        );
    }

    #[test]
    fn how_much_of_what_comes_back_stays() {
        // (what, of 1024 pages passed so many were missing, so many have left since, of a budget of 1000: so many parts
        // of 1024 stay)
        let cases = [
            ("never left, or a single page", 1024, None, 16),
            ("all is missing: a third", 1024, Some(0), 341),
            ("half is missing", 512, Some(0), 170),
            ("nearly all is in RAM", 30, Some(0), 16),
            ("all is in RAM", 0, Some(0), 16),
            ("a budget's worth has left since", 512, Some(1000), 16),
            ("not quite", 512, Some(999), 170),
            ("up to three quarters missing, one budget", 768, Some(1000), 16),
            ("from there on more", 896, Some(1499), 298),
            ("but no more than that", 896, Some(1500), 16),
            ("all is missing: two budgets", 1024, Some(1999), 341),
            ("two budgets' worth have left", 1024, Some(2000), 16),
        ];
        for (what, missing, since, stays) in cases {
            assert_eq!(share_to_stay(missing, since, 1000), stays, "{what}");
        }
    }

    #[test]
    fn a_third_of_what_comes_back_soon_stays_and_nearly_nothing_else() {
        let chunks = 1000;
        let mut table = PageTable::new(chunks * 64);
        let mut stays = |probation: &mut Probation, budget: u64| {
            let mut victims = vec![];
            let before = probation.pages;
            (0..chunks).for_each(|nth| bring(&mut table, probation, Run::new(PageNo(nth * 64), 64), budget));
            let on_probation = (probation.pages - before) / 64;
            while probation.step(&table, 0, 0, &mut victims) {
                victims.iter().for_each(|run| probation.note_left(*run, budget));
            }
            chunks - on_probation
        };
        let mut probation = Probation::new(chunks * 64);
        assert!((10..20).contains(&stays(&mut probation, 100_000)), "of strangers one in 64");
        assert!((325..340).contains(&stays(&mut probation, 100_000)), "of what comes back");
        (0..chunks).for_each(|_| probation.note_left(Run::new(PageNo(0), 64), 100_000));
        assert!((10..20).contains(&stays(&mut probation, 30_000)), "too late for so small a budget");
        probation.note_passed((1000, 900), 100_000);
        assert!((28..40).contains(&stays(&mut probation, 100_000)), "when most of the way is in RAM");
    }
}
