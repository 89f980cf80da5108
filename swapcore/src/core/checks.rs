//! What the drivers' checks look at: the simulation's after every step, and a debug build's.

use super::Core;
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
        let lent = || {
            self.frames
                .staging()
                .lent_to(page.block())
                .map(|slots| slots.start.plus(page.0 as u32 % BLOCK_PAGES))
        };
        self.frames.find_slot(page).or_else(lent)
    }

    /// The checksum of the page's stored content. None if nothing of it is stored.
    pub fn recorded_sum(&self, page: PageNo) -> Option<u64> {
        self.table.has(page, Flag::InStore).then(|| self.sums[page.index()])
    }

    /// Frames taken from the host: those in the guest and those in staging.
    pub fn frames_taken(&self) -> u64 {
        self.frames.taken()
    }

    /// The RAM budget, in frames.
    pub fn budget_frames(&self) -> u64 {
        self.frames.budget()
    }

    /// Whether a vCPU waits for the page.
    pub fn is_waited_for(&self, page: PageNo) -> bool {
        self.waiters.wait_for(page)
    }

    /// Whether a vCPU waits for the page, and it could not be read so far.
    pub fn is_unread(&self, page: PageNo) -> bool {
        self.bad_reads.contains_key(&page) && self.is_waited_for(page)
    }

    /// Whether somebody waits for a frame.
    pub fn waits_for_frame(&self) -> bool {
        self.waiters.any_deferred()
    }

    /// Pages that vCPUs wait for.
    pub fn faults_waiting(&self) -> usize {
        self.waiters.pages().len()
    }

    /// Panics if the core's own books disagree.
    pub fn check(&self) {
        let count = |states: &[PageState]| states.iter().map(|state| self.table.count(*state)).sum();
        let outside = [PageState::Leaving, PageState::Standby, PageState::Arriving, PageState::Sampled];
        self.frames.check(count(&[PageState::Resident]), count(&outside), self.ios.slots());
        let (hot, counted) = (self.table.find_hot_in_store(), self.table.hot_in_store());
        assert_eq!(hot, counted, "hot pages that are in the store = those counted");
        for page in self.waiters.pages() {
            let state = self.table.state(page);
            let served = match state {
                PageState::Arriving => true,
                PageState::Leaving => self.table.has(page, Flag::Writing),
                PageState::Stored | PageState::Untouched => {
                    self.waiters.is_deferred(page) || self.bad_reads.contains_key(&page)
                }
                _ => false,
            };
            assert!(served, "{page} is {state:?}, and nobody will wake who waits for it");
        }
    }
}
