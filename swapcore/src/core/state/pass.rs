//! How far a pass has come that puts huge pages together.

use crate::table::PageTable;
use crate::units::{BLOCK_PAGES, PageNo, Run};

/// Blocks that the host copies in a tick: some milliseconds.
const BLOCKS_A_TICK: usize = 8;
/// Blocks looked at in a tick.
const LOOKS_A_TICK: usize = 16_384;
/// Ticks between the beginnings of two passes at least: 10 s.
const PASS_TICKS: u64 = 100;
/// Passes over what could not be put together, for a page was pinned, or the host had no huge page.
const AGAIN: u32 = 3;

/// A pass over the blocks.
#[derive(Debug, Default)]
pub(crate) struct Pass {
    /// Where it goes on, if there is one.
    next: Option<usize>,
    /// Blocks that the host is at.
    under_way: u32,
    /// Also over blocks that are in huge pages, for these may be mapped page by page.
    all: bool,
    began: u64,
    /// Pages that had been read from the store by then.
    read: u64,
    failed: bool,
    again_left: u32,
    /// The host is to be told whether memory may have huge pages.
    to_tell: Option<bool>,
}

impl Pass {
    /// At that tick, when so many pages have been read from the store.
    pub(crate) fn begin(&mut self, all: bool, tick: u64, read: u64) {
        let (under_way, to_tell) = (self.under_way, self.to_tell);
        let (next, again_left) = (Some(0), AGAIN);
        *self = Pass { next, under_way, all, began: tick, read, failed: false, again_left, to_tell };
    }

    /// Memory may have huge pages from now on, or may not: what the host was told last is the opposite, or is still to
    /// be told.
    pub(crate) fn flip(&mut self, allowed: bool) {
        self.to_tell = if self.to_tell.is_some() { None } else { Some(allowed) };
    }

    pub(crate) fn take_flip(&mut self) -> Option<bool> {
        self.to_tell.take()
    }

    /// Also while the host is at the last blocks: at the first that misses a page it leaves those behind it as they
    /// are.
    pub(crate) fn is_on(&self) -> bool {
        self.next.is_some() || (self.under_way > 0 && !mutant!(SamplesWhileCollapsing))
    }

    /// The host has not come to the end of what it was given.
    pub(crate) fn is_under_way(&self) -> bool {
        self.under_way > 0
    }

    fn goes_again(&self) -> bool {
        self.failed && self.again_left > 0
    }

    /// Another one is to begin: more has come, or the host refused a part of the last one.
    pub(crate) fn is_due(&self, tick: u64, read: u64) -> bool {
        self.next.is_none() && (self.read != read || self.goes_again()) && tick >= self.began + PASS_TICKS
    }

    pub(crate) fn begin_another(&mut self, tick: u64, read: u64) {
        let left = if self.read == read { self.again_left - 1 } else { AGAIN };
        self.begin(self.all && self.goes_again(), tick, read);
        self.again_left = left;
    }

    /// The next blocks that are next to each other, whole, and not in huge pages as far as is known.
    pub(crate) fn next_blocks(&mut self, table: &PageTable) -> Option<Run> {
        let from = self.next?;
        let blocks = (table.pages() / u64::from(BLOCK_PAGES)) as usize;
        let fits = |block: &usize| {
            let whole = u32::from(table.resident_in_block(*block)) == BLOCK_PAGES;
            whole && (self.all || !table.is_huge(*block))
        };
        let looked = (from + LOOKS_A_TICK).min(blocks);
        let Some(first) = (from..looked).find(fits) else {
            self.next = (looked < blocks).then_some(looked);
            return None;
        };
        let count = (first..blocks).take(BLOCKS_A_TICK).take_while(fits).count();
        self.next = (first + count < blocks).then_some(first + count);
        self.under_way = count as u32;
        Some(Run::new(PageNo(first as u64 * u64::from(BLOCK_PAGES)), count as u32 * BLOCK_PAGES))
    }

    /// The host is done with a block.
    pub(crate) fn ended(&mut self, huge: bool) {
        self.failed |= !huge;
        self.under_way -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::PageState::{Arriving, Resident};

    #[test]
    fn what_the_host_refused_is_tried_three_times_more_and_then_only_for_what_has_come() {
        let mut table = PageTable::new(1024);
        for page in (0..512).map(PageNo) {
            table.set(page, Arriving);
            table.set(page, Resident);
        }
        let mut pass = Pass::default();
        let refuse = |pass: &mut Pass| {
            assert_eq!(pass.next_blocks(&table), Some(Run::new(PageNo(0), 512)), "the other has no page");
            pass.ended(false);
            assert_eq!((pass.next_blocks(&table), pass.is_on()), (None, false));
        };
        pass.begin(false, 0, 5);
        refuse(&mut pass);
        assert!(!pass.is_due(PASS_TICKS - 1, 6), "not so soon");
        for nth in 1..=3 {
            assert!(pass.is_due(nth * PASS_TICKS, 5));
            pass.begin_another(nth * PASS_TICKS, 5);
            refuse(&mut pass);
        }
        assert!(!pass.is_due(1000, 5) && pass.is_due(1000, 6));
    }
}
