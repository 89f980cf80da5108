//! The search for the coldest pages in RAM, which give way to hotter ones while a VM arrives: a hand that goes over
//! memory.

use crate::policy::clock::{VICTIM_RUN_MAX, may_leave};
use crate::table::PageTable;
use crate::units::{BLOCK_PAGES, PageNo, Run};

/// How often, for one heat map, the search begins anew because of a page that came and is colder than all others were:
/// each time it looks at every page in RAM, and where there is no end of such pages they are not what counts.
const RESTARTS_MAX: u32 = 16;

#[derive(Debug)]
pub(crate) struct ColdHand {
    /// Where the search goes on.
    at: PageNo,
    /// No page in RAM that may leave is colder than this, and what the coldest of those behind the hand has.
    coldest: u8,
    next_coldest: u8,
    /// Since the last heat map, for what was colder than the coldest.
    restarts: u32,
}

impl ColdHand {
    pub(crate) fn new() -> ColdHand {
        ColdHand { at: PageNo(0), coldest: 0, next_coldest: u8::MAX, restarts: 0 }
    }

    pub(crate) fn coldest(&self) -> u8 {
        self.coldest
    }

    /// What was found from this page on has not left.
    pub(crate) fn back_to(&mut self, page: PageNo) {
        self.at = page;
    }

    /// A page has come to RAM, or is held there no longer. The hand may have passed it: it comes by again.
    pub(crate) fn may_give_way(&mut self, table: &PageTable, page: PageNo) {
        if !may_leave(table, page) {
            return;
        }
        let heat = table.heat(page);
        if heat < self.coldest && self.restarts < RESTARTS_MAX {
            (self.at, self.coldest, self.next_coldest) = (PageNo(0), heat, u8::MAX);
            self.restarts += 1;
        } else if page < self.at {
            self.next_coldest = self.next_coldest.min(heat);
        }
    }

    /// The coldest pages in RAM, some `want` of them, where the hand comes to next. None, if nothing there is colder
    /// than the rest.
    pub(crate) fn find(&mut self, table: &PageTable, want: u32, cold: &mut Vec<Run>) {
        cold.clear();
        let mut found = 0;
        while found < want {
            let page = self.at;
            if page.0 >= table.pages() {
                // The hand has been everywhere since the coldest were as cold as this.
                if !cold.is_empty() || self.next_coldest == u8::MAX {
                    return;
                }
                (self.at, self.coldest, self.next_coldest) = (PageNo(0), self.next_coldest, u8::MAX);
                continue;
            }
            if let Some(block) = table.skip_empty_region(page.block()) {
                self.at = PageNo(block as u64 * u64::from(BLOCK_PAGES));
                continue;
            }
            if table.resident_in_block(page.block()) == 0 {
                self.at = page.next_block();
                continue;
            }
            self.at = page.plus(1);
            if !may_leave(table, page) {
                continue;
            }
            let heat = table.heat(page);
            if heat > self.coldest {
                self.next_coldest = self.next_coldest.min(heat);
                continue;
            }
            found += 1;
            match cold.last_mut() {
                Some(run) if run.end() == page && run.len < VICTIM_RUN_MAX => run.len += 1,
                _ => cold.push(Run::one(page)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::PageState::{Arriving, Resident};

    #[test]
    fn the_coldest_are_found_first_and_what_comes_behind_the_hand_later() {
        let mut table = PageTable::new(2048);
        for page in (0..1024).map(PageNo) {
            table.set(page, Arriving);
            table.set(page, Resident);
            table.set_heat(page, if page.0 < 600 { 9 } else { 5 });
        }
        let (mut hand, mut cold) = (ColdHand::new(), vec![]);
        hand.find(&table, 100, &mut cold);
        assert_eq!((cold[0].start, hand.coldest()), (PageNo(600), 5), "none has less");
        hand.back_to(PageNo(650));
        hand.find(&table, 1, &mut cold);
        assert_eq!(cold, [Run::one(PageNo(650))]);
        table.set_heat(PageNo(3), 2);
        hand.may_give_way(&table, PageNo(3));
        hand.find(&table, 1, &mut cold);
        assert_eq!((cold[0], hand.coldest()), (Run::one(PageNo(3)), 2), "the search has begun anew");
    }
}
