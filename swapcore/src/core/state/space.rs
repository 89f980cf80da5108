//! Which places in the store are taken, and which of these are to be dropped.

use std::collections::BTreeSet;

use crate::core::event::IoId;
use crate::units::{BLOCK_PAGES, PageNo, Run, Slot, TIERS_MAX, TierId};

/// Of each tick, so many microseconds may be spent on drops while somebody reads from the tiers: one eighth, for a file system keeps reads
/// waiting meanwhile.
const BUSY_US: u64 = 12_500;
/// A drop that took for ever is paid for by so many ticks without one, at most.
const DEBT_TICKS: u64 = 50;
/// How long one drop is to take, at most: a read may have to wait for the end of it.
const DROP_US: u64 = 2_000;
/// Pages in one drop: 2 MiB, and 64 MiB where the tier is quick.
pub(crate) const DROP_MIN: u32 = BLOCK_PAGES;
pub(crate) const DROP_MAX: u32 = 32 * BLOCK_PAGES;
/// Pages looked at between two ticks, for one to drop.
pub(crate) const LOOK_PAGES: u32 = 64 * BLOCK_PAGES;

const _: () = assert!(LOOK_PAGES >= 2 * DROP_MAX, "the longest drop is found within a tick");

/// How much is dropped, and when, judged by how long drops take.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Pages in one drop, at most.
    longest: u32,
    /// Microseconds of drops that are still to be paid for by time without, while somebody reads.
    owed_us: u64,
    /// How long all drops took together.
    total_us: u64,
}

impl Pace {
    pub(crate) fn new() -> Pace {
        Pace { longest: DROP_MIN, owed_us: 0, total_us: 0 }
    }

    pub(crate) fn total_us(&self) -> u64 {
        self.total_us
    }

    pub(crate) fn longest(&self) -> u32 {
        self.longest
    }

    /// Whether one more may start although somebody reads.
    pub(crate) fn may_disturb(&self) -> bool {
        self.owed_us < BUSY_US
    }

    pub(crate) fn tick(&mut self, ticks: u64) {
        self.owed_us = self.owed_us.saturating_sub(ticks.saturating_mul(BUSY_US));
    }

    /// A drop of so many pages has ended.
    pub(crate) fn dropped(&mut self, pages: u32, took_us: u64) {
        self.total_us = self.total_us.saturating_add(took_us);
        self.owed_us = self.owed_us.saturating_add(took_us).min(DEBT_TICKS * BUSY_US);
        if took_us > DROP_US {
            self.longest = (self.longest / 2).max(DROP_MIN);
        } else if took_us <= DROP_US / 2 && pages == self.longest {
            self.longest = (self.longest * 2).min(DROP_MAX);
        }
    }
}

#[derive(Debug)]
pub(crate) struct Space {
    /// One bit a page: its place is taken.
    pub(crate) taken: Vec<u64>,
    pub(crate) count: u64,
    /// The batch: blocks in which some page's place may have to be dropped.
    pub(crate) blocks: BTreeSet<usize>,
    /// Since which tick there is one.
    pub(crate) since: u64,
    /// It is complete, and being dropped.
    pub(crate) draining: bool,
    /// Where in it the next look begins.
    pub(crate) hand: PageNo,
    /// What is left of [`LOOK_PAGES`] until the next tick.
    pub(crate) look_pages: u32,
    pub(crate) pace: Pace,
    /// Pages that had been read at the last tick, and whether any was between it and the one before.
    pub(crate) read_at_tick: u64,
    pub(crate) reads_go_on: bool,
    pub(crate) under_way: Vec<(IoId, TierId, Run)>,
    /// Pages that are to be written, and have met a drop that was under way.
    pub(crate) waiting: Vec<(PageNo, Slot)>,
    /// A drop has failed: none before this tick.
    pub(crate) retry_tick: u64,
    /// False for a tier that knows no drops.
    pub(crate) supported: [bool; TIERS_MAX],
    /// The search for copies, while the store is full: the next block, and how many are left of the round.
    pub(crate) sweep: (usize, usize),
    /// Something has been dropped since the store was last found full.
    pub(crate) freed: bool,
}

impl Space {
    pub(crate) fn new(pages: u64) -> Self {
        Space {
            taken: vec![0; pages.div_ceil(64) as usize],
            count: 0,
            blocks: BTreeSet::new(),
            since: 0,
            draining: false,
            hand: PageNo(0),
            look_pages: LOOK_PAGES,
            pace: Pace::new(),
            read_at_tick: 0,
            reads_go_on: false,
            under_way: Vec::new(),
            waiting: Vec::new(),
            retry_tick: 0,
            supported: [true; TIERS_MAX],
            sweep: (0, 0),
            freed: false,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of_val(&self.taken[..])
    }

    /// How many places are taken.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    pub(crate) fn is_taken(&self, page: PageNo) -> bool {
        self.taken[page.index() / 64] >> (page.index() % 64) & 1 == 1
    }

    pub(crate) fn has_taken(&self, block: usize) -> bool {
        let words = BLOCK_PAGES as usize / 64;
        self.taken.iter().skip(block * words).take(words).any(|word| *word != 0)
    }

    /// The page is about to be written, or its place has been dropped.
    pub(crate) fn set_taken(&mut self, page: PageNo, taken: bool) {
        let (word, bit) = (&mut self.taken[page.index() / 64], 1 << (page.index() % 64));
        self.count = self.count + u64::from(taken) - u64::from(*word & bit != 0);
        *word = if taken { *word | bit } else { *word & !bit };
    }

    /// Whether a drop of the page's place is under way.
    pub(crate) fn is_dropping(&self, page: PageNo) -> bool {
        self.under_way.iter().any(|(_, _, run)| run.contains(page)) && !mutant!(DropPassesLaterWrite)
    }

    /// Whether a drop is under way to the tier.
    pub(crate) fn is_busy(&self, tier: TierId) -> bool {
        self.under_way.iter().any(|(_, busy, _)| *busy == tier)
    }

    pub(crate) fn is_anything_dropping(&self) -> bool {
        !self.under_way.is_empty()
    }

    /// Whether there is something to do at the next tick.
    pub(crate) fn waits(&self, tick: u64) -> bool {
        !self.blocks.is_empty() && tick >= self.retry_tick
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ticks in which the pages are dropped at such a cost while somebody reads all the time, and the longest drop.
    fn ticks_for(pages: u32, drop_us: u64, page_us: f64) -> (u64, u32) {
        let (mut pace, mut left, mut ticks, mut longest) = (Pace::new(), pages, 0, 0);
        while left > 0 {
            while left > 0 && pace.may_disturb() {
                let run = left.min(pace.longest());
                pace.dropped(run, drop_us + (f64::from(run) * page_us) as u64);
                (left, longest) = (left - run, longest.max(run));
            }
            pace.tick(1);
            ticks += 1;
        }
        (ticks, longest)
    }

    #[test]
    fn drops_take_an_eighth_of_the_time_and_are_as_long_as_the_tier_is_quick() {
        const GIB: u32 = 1 << 18;
        // What a hole costs ext4: 0.2 ms a MiB.
        let (ticks, longest) = ticks_for(GIB, 100, 0.78);
        assert!((14..=20).contains(&ticks) && longest >= 4 * BLOCK_PAGES, "{ticks} ticks, {longest} pages");
        // Long ones cost no more than short ones: a few do.
        let (ticks, longest) = ticks_for(GIB, 1000, 0.0);
        assert!(ticks <= 3 && longest == DROP_MAX, "{ticks} ticks, {longest} pages");
        // Slow ones stay short, and take an eighth of the time.
        let (ticks, longest) = ticks_for(GIB, 10_000, 0.0);
        assert!((400..=420).contains(&ticks) && longest == DROP_MIN, "{ticks} ticks, {longest} pages");
    }

    #[test]
    fn a_drop_that_took_for_ever_is_paid_for_within_seconds() {
        let mut pace = Pace::new();
        pace.dropped(DROP_MIN, 600_000_000);
        assert!(!pace.may_disturb());
        pace.tick(DEBT_TICKS);
        assert!(pace.may_disturb());
    }
}
