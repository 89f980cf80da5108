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
    /// Appends runs of about `want` victims (never more than one run above) to `victims`.
    /// Cools what it passes by.
    pub fn choose(&mut self, table: &mut PageTable, want: u32, victims: &mut Vec<Run>) {
        let pages = table.pages();
        let mut found = 0;
        let mut passed = 0;
        while found < want && passed < pages * SWEEPS_MAX {
            let here = self.hand;
            let to_block_end = u64::from(BLOCK_PAGES) - here.0 % u64::from(BLOCK_PAGES);
            if table.resident_in_block(here.block()) == 0 {
                passed += to_block_end;
                self.advance(to_block_end, pages);
                continue;
            }
            let chunk = to_block_end.min(u64::from(VICTIM_RUN_MAX)).min(pages - here.0) as u32;
            found += take_chunk(table, Run::new(here, chunk), victims);
            passed += u64::from(chunk);
            self.advance(u64::from(chunk), pages);
        }
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
    table.state(page) == PageState::Resident && !table.has(page, Flag::Held) && !table.has(page, Flag::Writing)
}

fn take_chunk(table: &mut PageTable, chunk: Run, victims: &mut Vec<Run>) -> u32 {
    let mut found = 0;
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
        found += u32::from(cold);
    }
    victims.extend(run);
    found
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
        Clock::default().choose(&mut table, 100, &mut victims);
        assert_eq!(victims[0], Run::new(PageNo(1010), 14), "{victims:?}");
        assert_eq!(table.heat(PageNo(1000)), 4);
        assert!(victims.iter().map(|run| run.len).sum::<u32>() >= 100);
    }

    #[test]
    fn all_hot_still_yields_victims_but_never_held_ones() {
        let mut table = resident(64, |_| true);
        (0..64).for_each(|page| table.set_heat(PageNo(page), 255));
        table.put(PageNo(5), Flag::Held, true);
        table.put(PageNo(6), Flag::Writing, true);
        let mut victims = vec![];
        Clock::default().choose(&mut table, 64, &mut victims);
        assert_eq!(victims, [Run::new(PageNo(0), 5), Run::new(PageNo(7), 57)]);
    }

    #[test]
    fn nothing_resident_ends() {
        let mut victims = vec![];
        Clock::default().choose(&mut PageTable::new(1000), 10, &mut victims);
        assert!(victims.is_empty());
    }
}
