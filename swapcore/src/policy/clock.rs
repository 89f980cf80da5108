//! Victim choice: a clock hand over guest memory, with heat as the second chance.
//!
//! There are no accessed bits to read. What a page earned by faults, rescues, samples and dirty scans is its
//! heat; the hand halves the heat of what it passes and takes what has none. A page taken by mistake is
//! rescued from staging without I/O, and the rescue makes it hot (Corbató's clock, with the reference
//! bit replaced by the rescue).

use crate::table::{Flag, PageState, PageTable};
use crate::units::{BLOCK_PAGES, PageNo, Run};

/// Victims in a row at most: one ioctl, one write of 256 KiB.
pub const VICTIM_RUN_MAX: u32 = 64;
/// A sweep over all memory halves every heat; after this many sweeps any page is a victim.
const SWEEPS_MAX: u64 = 9;

/// The hand.
#[derive(Debug, Default)]
pub struct Clock {
    hand: PageNo,
}

impl Clock {
    /// Moves the hand over the next pages, cooling what it passes by, and puts the runs of victims among them into
    /// `victims`. False after so many sweeps that there can be no further victim; `passed` counts from 0 for each
    /// batch. The caller takes the victims out of the guest before it asks for more.
    pub fn step(&mut self, table: &mut PageTable, passed: &mut u64, victims: &mut Vec<Run>) -> bool {
        let pages = table.pages();
        victims.clear();
        while victims.is_empty() {
            if *passed >= pages * SWEEPS_MAX {
                return false;
            }
            let here = self.hand;
            let to_block_end = u64::from(BLOCK_PAGES) - here.0 % u64::from(BLOCK_PAGES);
            let chunk = if let Some(block) = table.skip_empty_region(here.block()) {
                block as u64 * u64::from(BLOCK_PAGES) - here.0
            } else if table.resident_in_block(here.block()) == 0 {
                to_block_end
            } else {
                let chunk = to_block_end.min(u64::from(VICTIM_RUN_MAX)).min(pages - here.0);
                take_chunk(table, Run::new(here, chunk as u32), victims);
                chunk
            };
            *passed += chunk;
            self.advance(chunk, pages);
        }
        true
    }

    fn advance(&mut self, by: u64, pages: u64) {
        self.hand.0 += by;
        if self.hand.0 >= pages {
            self.hand.0 = 0;
        }
    }
}

/// Whether the page may leave the guest at all.
pub fn may_leave(table: &PageTable, page: PageNo) -> bool {
    table.state(page) == PageState::Resident
        && (!table.has(page, Flag::Held) || mutant!(EvictsHeldPages))
        && (!table.has(page, Flag::Pinned) || mutant!(RetriesPinnedAtOnce))
        && (!table.has(page, Flag::Writing) || mutant!(EvictsPagesUnderWrite))
}

fn take_chunk(table: &mut PageTable, chunk: Run, victims: &mut Vec<Run>) {
    let mut run: Option<Run> = None;
    for page in chunk.pages() {
        let cold = may_leave(table, page) && {
            let heat = table.heat(page);
            if heat > 0 {
                table.set_heat(page, heat / 2);
            }
            heat == 0
        };
        match (&mut run, cold) {
            (Some(run), true) => run.len += 1,
            (None, true) => run = Some(Run::one(page)),
            (_, false) => victims.extend(run.take()),
        }
    }
    victims.extend(run);
}

#[cfg(test)]
mod tests {
    use super::*;
    use PageState::{Arriving, Resident};

    fn resident(pages: u64, which: impl Fn(u64) -> bool) -> PageTable {
        let mut table = PageTable::new(pages);
        for page in (0..pages).filter(|page| which(*page)).map(PageNo) {
            table.set(page, Arriving);
            table.set(page, Resident);
        }
        table
    }

    #[test]
    fn cold_pages_go_first_and_in_runs() {
        let mut table = resident(2048, |page| page >= 1000);
        (1000..1010).for_each(|page| table.set_heat(PageNo(page), 8));
        let mut victims = vec![];
        let (mut clock, mut passed) = (Clock::default(), 0);
        assert!(clock.step(&mut table, &mut passed, &mut victims));
        assert_eq!(victims, [Run::new(PageNo(1010), 14)]);
        assert_eq!(table.heat(PageNo(1000)), 4);
        assert!(clock.step(&mut table, &mut passed, &mut victims));
        assert_eq!(victims, [Run::new(PageNo(1024), 64)]);
    }

    #[test]
    fn all_hot_still_yields_victims_but_never_held_ones() {
        let mut table = resident(64, |_| true);
        (0..64).for_each(|page| table.set_heat(PageNo(page), 255));
        table.put(PageNo(5), Flag::Held, true);
        table.put(PageNo(6), Flag::Writing, true);
        table.put(PageNo(7), Flag::Pinned, true);
        let mut victims = vec![];
        assert!(Clock::default().step(&mut table, &mut 0, &mut victims));
        assert_eq!(victims, [Run::new(PageNo(0), 5), Run::new(PageNo(8), 56)]);
    }

    #[test]
    fn empty_regions_are_skipped_and_none_is_missed() {
        let pages = 5 << 18;
        let mut table = resident(pages, |page| page == 3 || page == (3 << 18) + 700 || page == pages - 1);
        let (mut clock, mut victims, mut found) = (Clock::default(), vec![], vec![]);
        for _ in 0..4 {
            assert!(clock.step(&mut table, &mut 0, &mut victims));
            found.append(&mut victims);
        }
        let one = |page| Run::one(PageNo(page));
        assert_eq!(found, [one(3), one((3 << 18) + 700), one(pages - 1), one(3)]);
    }

    #[test]
    fn nothing_resident_ends() {
        let mut victims = vec![];
        assert!(!Clock::default().step(&mut PageTable::new(1000), &mut 0, &mut victims));
    }
}
