//! Huge pages for memory that has come in single frames: that of a VM which has arrived, or whose budget was smaller. In one go over
//! all of it once none of it need ever leave, and in another when more has come. Memory that is touched for the first time then
//! has them from the start.

use super::Core;
use super::event::Action;
use super::state::pass::Pass;
use crate::units::{BLOCK_PAGES, PageNo, Run};

/// Blocks that the host copies in a tick: some milliseconds.
const BLOCKS_A_TICK: usize = 8;
/// Blocks looked at in a tick.
const LOOKS_A_TICK: usize = 16_384;
/// Ticks between the beginnings of two passes at least: 10 s.
const PASS_TICKS: u64 = 100;
/// Passes over what could not be put together, for a page was pinned, or the host had no huge page.
const AGAIN: u32 = 3;

impl Core {
    /// `all`: writes have been tracked, which takes the mappings of huge pages to pieces.
    pub(super) fn begin_collapse(&mut self, all: bool) {
        let (began, read) = (self.tick, self.counts.pages_read);
        let under_way = self.collapse.under_way;
        self.collapse = Pass { next: Some(0), under_way, all, began, read, failed: false, again_left: AGAIN };
    }

    fn could_collapse(&self) -> bool {
        self.frames.cover_memory() && !self.dirty.is_on() && self.receiving.is_none()
    }

    /// Also while the host is at the last blocks: at the first that misses a page it leaves those behind it as they are.
    pub(super) fn is_collapsing(&self) -> bool {
        let under_way = !mutant!(SamplesWhileCollapsing) && self.collapse.under_way > 0;
        (self.collapse.next.is_some() || under_way) && self.could_collapse()
    }

    /// The next blocks that are next to each other.
    pub(super) fn collapse(&mut self) {
        if !self.could_collapse() || self.collapse.under_way > 0 {
            return;
        }
        let Pass { next, all, began, read, failed, again_left, .. } = self.collapse;
        let more = self.counts.pages_read != read;
        let again = failed && again_left > 0;
        if next.is_none() && (more || again) && self.tick >= began + PASS_TICKS {
            // From the next tick on, with every sample back.
            self.end_sampling();
            self.begin_collapse(all && again);
            if !more {
                self.collapse.again_left = again_left - 1;
            }
            return;
        }
        let Some(from) = next else { return };
        let blocks = (self.table.pages() / u64::from(BLOCK_PAGES)) as usize;
        let fits = |block: &usize| {
            let whole = u32::from(self.table.resident_in_block(*block)) == BLOCK_PAGES;
            whole && (all || !self.table.is_huge(*block))
        };
        let looked = (from + LOOKS_A_TICK).min(blocks);
        let Some(first) = (from..looked).find(fits) else {
            self.collapse.next = (looked < blocks).then_some(looked);
            return;
        };
        let count = (first..blocks).take(BLOCKS_A_TICK).take_while(fits).count();
        self.collapse.next = (first + count < blocks).then_some(first + count);
        self.collapse.under_way = count as u32;
        let start = PageNo(first as u64 * u64::from(BLOCK_PAGES));
        self.actions.push_back(Action::Collapse { run: Run::new(start, count as u32 * BLOCK_PAGES) });
    }

    pub(super) fn collapsed(&mut self, block: Run, huge: bool) {
        self.table.set_huge(block.start.block(), huge);
        self.collapse.failed |= !huge;
        self.collapse.under_way -= 1;
    }
}
