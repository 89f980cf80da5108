//! Which places in the store are taken, and which of these are to be dropped.

use std::collections::BTreeSet;

use crate::core::event::IoId;
use crate::units::{BLOCK_PAGES, PageNo, Run, Slot, TIERS_MAX, TierId};

/// Drops that may start between two ticks although somebody reads from the store.
pub(crate) const BUSY_DROPS: u32 = 2;
/// Pages looked at between two ticks, for one to drop.
pub(crate) const LOOK_PAGES: u32 = 64 * BLOCK_PAGES;

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
    /// What is left of [`BUSY_DROPS`] and [`LOOK_PAGES`] until the next tick.
    pub(crate) busy_drops: u32,
    pub(crate) look_pages: u32,
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
            busy_drops: BUSY_DROPS,
            look_pages: LOOK_PAGES,
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
