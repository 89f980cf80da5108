//! What the drivers' checks look at: the simulation's after every step, and a debug build's.

use super::Core;
use crate::staging::Use;
use crate::table::{Flag, PageState, PageTable, STATES};
use crate::units::{BLOCK_PAGES, PageNo, Slot};

impl Core {
    /// The page table: where each page is.
    pub fn table(&self) -> &PageTable {
        &self.table
    }

    /// How often each transition was taken.
    pub fn transitions(&self) -> &[[u64; STATES]; STATES] {
        self.table.transitions()
    }

    /// The slot in staging that the page has. None if it has none, as every page that is in the guest or in the store
    /// alone.
    pub fn slot_of(&self, page: PageNo) -> Option<Slot> {
        let lent =
            || self.staging.lent_to(page.block()).map(|slots| slots.start.plus(page.0 as u32 % BLOCK_PAGES));
        self.slots_of.get(&page).copied().or_else(lent)
    }

    /// The checksum of the page's stored content. None if nothing of it is stored.
    pub fn recorded_sum(&self, page: PageNo) -> Option<u64> {
        self.table.has(page, Flag::Stored).then(|| self.sums[page.index()])
    }

    /// Frames taken from the host: those in the guest and those in staging.
    pub fn frames_taken(&self) -> u64 {
        self.taken
    }

    /// The RAM budget, in frames.
    pub fn budget_frames(&self) -> u64 {
        self.budget
    }

    /// Whether a vCPU waits for the page.
    pub fn is_waited_for(&self, page: PageNo) -> bool {
        self.waiting.contains_key(&page)
    }

    /// Whether a vCPU waits for the page, and it could not be read so far.
    pub fn is_unread(&self, page: PageNo) -> bool {
        self.bad_reads.contains_key(&page) && self.is_waited_for(page)
    }

    /// Whether somebody waits for a frame.
    pub fn waits_for_frame(&self) -> bool {
        !self.deferred.is_empty()
    }

    /// Pages that vCPUs wait for.
    pub fn faults_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Panics if the core's own books disagree.
    pub fn check(&self) {
        let resident = self.table.count(PageState::Resident);
        let held = u64::from(self.staging.held_frames());
        assert_eq!(resident + held, self.taken, "frames in the guest + in staging = frames taken");
        for (page, slot) in &self.slots_of {
            assert_eq!(self.staging.used(*slot), Use::Bound(*page), "{page} is bound to {slot:?}");
        }
        self.check_slots();
        let (hot, counted) = (self.table.find_hot_in_store(), self.table.hot_in_store());
        assert_eq!(hot, counted, "hot pages that are in the store = those counted");
        let in_staging = [PageState::Leaving, PageState::Standby, PageState::Arriving, PageState::Sampled];
        let count: u64 = in_staging.iter().map(|state| self.table.count(*state)).sum();
        let lent = self.staging.lent_blocks() * BLOCK_PAGES as usize;
        assert_eq!(count, (self.slots_of.len() + lent) as u64, "every page in staging has one slot");
        for page in self.waiting.keys() {
            let state = self.table.state(*page);
            let served = match state {
                PageState::Arriving => true,
                PageState::Leaving => self.table.has(*page, Flag::Writing),
                PageState::Stored | PageState::Untouched => {
                    self.deferred.contains(page) || self.bad_reads.contains_key(page)
                }
                _ => false,
            };
            assert!(served, "{page} is {state:?}, and nobody will wake who waits for it");
        }
    }

    /// No slot is bound to a page that knows nothing of it, and no frame waits for the end of what is not under way.
    fn check_slots(&self) {
        let (mut bound, mut orphans, mut empty, mut free) = (0, 0, 0, 0);
        for slot in (0..self.staging.all_slots()).map(Slot) {
            match self.staging.used(slot) {
                Use::Bound(_) => bound += 1,
                Use::Orphan => orphans += 1,
                Use::Empty => empty += 1,
                Use::Free => free += 1,
                Use::Granted => {}
            }
        }
        let to_be_had = (self.staging.all_slots() - self.staging.held_frames(), self.staging.free_frames());
        assert_eq!((empty, free), to_be_had, "every empty slot and every free frame can be had");
        let lent = self.staging.lent_blocks() * BLOCK_PAGES as usize;
        assert_eq!(bound, self.slots_of.len() + lent, "every bound slot is that of its page");
        let pinned = self.pinned_in.iter().map(|(_, slots)| *slots);
        let awaited = self.ios.slots().chain(pinned).flat_map(|slots| slots.slots());
        let awaited = awaited.filter(|slot| self.staging.used(*slot) == Use::Orphan).count();
        assert_eq!(awaited, orphans, "every frame without a page becomes free in the end");
    }
}
