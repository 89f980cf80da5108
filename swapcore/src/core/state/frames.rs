//! The VM's frames: how many the host has given, and where in staging each page outside of the guest has its own.
//!
//! ```text
//!           fill, take_fresh             take_free             bind               left_for_guest
//!   host ────────────────────▶ staging: free ───▶ bound to a page ───▶ the guest
//!        ◀────────────────────                ◀──      │                  │
//!           release, returned        unbind            ▼ orphan           ▼ take_empty
//!                                             a device works with it     staging, bound
//! ```
//! Invariant: frames in the guest + frames in staging = `taken`. A frame that goes from one to the other, or is
//! recycled, does not change it; each method that takes a frame from the host or gives one back does, in the same call.

use std::hash::BuildHasherDefault;

use super::page_map::PageMap;
use crate::policy::watermarks::Watermarks;
use crate::staging::{Staging, Use};
use crate::units::{PageNo, Run, Slot, SlotRun};

/// Frames given back at a time for pages that are copied to the guest.
const HEADROOM: u32 = 64;
/// Fewer are not worth it.
const HEADROOM_MIN: u32 = 16;

/// Frames and whether they come from the host just now (and read as zeros).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taken {
    pub(crate) slots: SlotRun,
    pub(crate) fresh: bool,
}

#[derive(Debug)]
pub(crate) struct Frames {
    staging: Staging,
    /// The slot of every page that is in staging, but for those of blocks that are lent as wholes.
    slots_of: PageMap<Slot>,
    budget: u64,
    /// Frames of a budget that covers all memory.
    memory: u64,
    marks: Watermarks,
    /// Taken from the host.
    taken: u64,
    /// Frames of the reserve that have been let go of.
    dripped: u64,
    /// A VM arrives, whose vCPUs do not run: it needs no reserve, and nothing is copied.
    receiving: bool,
    /// Pages that were read alone and came to the guest since frames were last given back for copies.
    copies_owed: u32,
    /// Moves into the guest that met a pinned page.
    refused: Vec<(Run, SlotRun)>,
}

impl Frames {
    /// None taken; for a memory of so many pages, and that many slots for pages and for huge pages.
    pub(crate) fn new(budget: u64, memory: u64, slots: u32, blocks: u32) -> Frames {
        Frames {
            staging: Staging::new(slots, blocks),
            slots_of: PageMap::with_capacity_and_hasher(slots as usize / 2, BuildHasherDefault::default()),
            budget,
            memory,
            marks: Watermarks::of(budget, memory, slots),
            taken: 0,
            dripped: 0,
            receiving: false,
            copies_owed: 0,
            refused: Vec::new(),
        }
    }

    // ── the budget ───────────────────────────────────────────────────────────────────────

    pub(crate) fn set_budget(&mut self, budget: u64) {
        self.set_sizes(budget, self.memory);
    }

    pub(crate) fn set_memory(&mut self, memory: u64) {
        self.set_sizes(self.budget, memory);
    }

    fn set_sizes(&mut self, budget: u64, memory: u64) {
        (self.budget, self.memory) = (budget, memory);
        self.marks = Watermarks::of(budget, memory, self.staging.slots());
    }

    pub(crate) fn budget(&self) -> u64 {
        self.budget
    }

    pub(crate) fn marks(&self) -> Watermarks {
        self.marks
    }

    pub(crate) fn taken(&self) -> u64 {
        self.taken
    }

    /// Taken beyond the budget.
    pub(crate) fn over(&self) -> u64 {
        self.taken.saturating_sub(self.budget)
    }

    /// Not taken of the budget.
    pub(crate) fn left(&self) -> u64 {
        self.budget.saturating_sub(self.taken)
    }

    /// Every page can have a frame: nothing need ever leave.
    pub(crate) fn cover_memory(&self) -> bool {
        self.budget >= self.memory
    }

    /// Frames that pages can have: all of the budget but what is left of the reserve.
    fn allowed(&self) -> u64 {
        if self.receiving {
            return self.budget;
        }
        self.budget.saturating_sub(u64::from(self.marks.reserve).saturating_sub(self.dripped))
    }

    pub(crate) fn set_receiving(&mut self, receiving: bool) {
        self.receiving = receiving;
    }

    /// So many more of the reserve may be taken.
    pub(crate) fn drip(&mut self, frames: u64) {
        self.dripped = (self.dripped + frames).min(u64::from(self.marks.reserve));
    }

    pub(crate) fn keep_reserve(&mut self) {
        self.dripped = 0;
    }

    /// To be had without taking one from a page.
    pub(crate) fn at_hand(&self) -> u64 {
        let limit = self.allowed();
        let over = self.taken.saturating_sub(limit);
        u64::from(self.staging.free_frames()).saturating_sub(over) + limit.saturating_sub(self.taken)
    }

    /// Without I/O.
    pub(crate) fn at_hand_or_standby(&self) -> u64 {
        self.at_hand() + u64::from(self.staging.standby_count())
    }

    // ── taking frames ────────────────────────────────────────────────────────────────────

    /// Up to `want` contiguous frames, not yet bound.
    pub(crate) fn take(&mut self, want: u32) -> Option<Taken> {
        let want = u64::from(want).min(self.at_hand()) as u32;
        match self.staging.take_free(want) {
            Some(slots) => Some(Taken { slots, fresh: false }),
            None => self.take_fresh(want),
        }
    }

    /// The same, from the host alone.
    pub(crate) fn take_fresh(&mut self, want: u32) -> Option<Taken> {
        let left = self.allowed().saturating_sub(self.taken) + u64::from(mutant!(OverspendsBudget));
        let want = u64::from(want).min(left) as u32;
        let slots = self.staging.take_empty(want)?;
        self.taken += u64::from(slots.len);
        Some(Taken { slots, fresh: true })
    }

    /// The host fills pages in the guest.
    pub(crate) fn fill(&mut self, pages: u32) {
        self.taken += if mutant!(MiscountsBlocks) { 1 } else { u64::from(pages) };
    }

    /// Whether a page that was read alone may be copied to a frame of the host's, which is taken; else its own goes.
    /// Frames are owed for such pages: see [`Frames::repay_copies`].
    pub(crate) fn may_copy(&mut self) -> bool {
        let recycles = !self.cover_memory() && !self.receiving;
        self.copies_owed += u32::from(recycles);
        let copies = recycles && self.taken < self.allowed();
        self.taken += u64::from(copies && !mutant!(MiscountsCopies));
        copies
    }

    /// Frames with which somebody else works until they are given back, or bound.
    pub(crate) fn grant(&mut self, want: u32) -> Option<SlotRun> {
        let slots = self.take(want)?.slots;
        slots.slots().for_each(|slot| self.staging.assign(slot, Use::Granted));
        Some(slots)
    }

    pub(crate) fn end_grant(&mut self, slots: SlotRun) {
        for slot in slots.slots() {
            self.check_granted(slot);
            self.staging.free(slot);
        }
    }

    pub(crate) fn check_granted(&self, slot: Slot) {
        assert_eq!(self.staging.used(slot), Use::Granted, "{slot:?} was not granted");
    }

    // ── frames of pages ──────────────────────────────────────────────────────────────────

    pub(crate) fn bind(&mut self, page: PageNo, slot: Slot) {
        self.staging.assign(slot, Use::Bound(page));
        let before = self.slots_of.insert(page, slot);
        assert!(before.is_none(), "{page} has a slot already: {before:?}");
    }

    pub(crate) fn bind_run(&mut self, run: Run, slots: SlotRun) {
        run.pages().zip(slots.slots()).for_each(|(page, slot)| self.bind(page, slot));
    }

    /// Slots for frames that are about to leave the guest for `run`, from its first page on.
    pub(crate) fn bind_empty(&mut self, run: Run) -> Option<SlotRun> {
        let slots = self.staging.take_empty(run.len)?;
        self.bind_run(run.part(0, slots.len), slots);
        Some(slots)
    }

    /// A slot for a frame that leaves the guest without its page.
    pub(crate) fn orphan_empty(&mut self) -> Option<SlotRun> {
        let slots = self.staging.take_empty(1)?;
        self.staging.assign(slots.start, Use::Orphan);
        Some(slots)
    }

    /// The page does not need its slot any more; the frame in it is free.
    pub(crate) fn unbind(&mut self, page: PageNo) {
        let slot = self.slots_of.remove(&page).expect("the page is in staging");
        self.staging.free(slot);
    }

    /// The page goes another way while the device still works with its frame.
    pub(crate) fn orphan(&mut self, page: PageNo) {
        let slot = self.slots_of.remove(&page).expect("the page is in staging");
        self.staging.assign(slot, Use::Orphan);
    }

    /// The page's frame is in the guest: it went there, or never left.
    pub(crate) fn is_in_guest(&mut self, page: PageNo, slot: Slot) {
        let bound = self.slots_of.remove(&page);
        assert_eq!(bound, Some(slot), "the frame in the guest is that of {page}");
        self.staging.vacate(slot);
    }

    /// Nobody works any more with a frame that has no page.
    pub(crate) fn free_orphan(&mut self, slot: Slot) {
        self.staging.free(slot);
    }

    /// If the frame's page has gone another way: it is free.
    pub(crate) fn free_if_orphan(&mut self, slot: Slot) -> bool {
        let orphan = self.staging.used(slot) == Use::Orphan;
        if orphan {
            self.staging.free(slot);
        }
        orphan
    }

    /// Of a frame that could not come to its slot.
    pub(crate) fn vacate_orphan(&mut self, slot: Slot) {
        self.staging.vacate(slot);
        self.taken -= 1;
    }

    /// The guest's frame of a page goes back to the host.
    pub(crate) fn returned(&mut self) {
        self.taken -= 1;
    }

    /// The slot of a page that is in staging by itself.
    pub(crate) fn slot(&self, page: PageNo) -> Slot {
        self.slots_of[&page]
    }

    /// The same, if it is.
    pub(crate) fn find_slot(&self, page: PageNo) -> Option<Slot> {
        self.slots_of.get(&page).copied()
    }

    /// Pages of the run whose frames are in staging, but for huge pages that are there as a whole.
    pub(crate) fn in_staging(&self, run: Run) -> impl Iterator<Item = PageNo> {
        self.slots_of.keys().copied().filter(move |page| run.contains(*page))
    }

    /// For questions that change nothing.
    pub(crate) fn staging(&self) -> &Staging {
        &self.staging
    }

    #[cfg(test)]
    pub(crate) fn staging_mut(&mut self) -> &mut Staging {
        &mut self.staging
    }

    // ── moves that met a pinned page ─────────────────────────────────────────────────────

    pub(crate) fn refuse(&mut self, run: Run, slots: SlotRun) {
        self.refused.push((run, slots));
    }

    pub(crate) fn any_refused(&self) -> bool {
        !self.refused.is_empty()
    }

    pub(crate) fn take_refused(&mut self) -> Vec<(Run, SlotRun)> {
        std::mem::take(&mut self.refused)
    }

    /// What of such a move still makes sense. The frames of pages that the guest has given back meanwhile are free.
    pub(crate) fn still_bound(&mut self, run: Run, slots: SlotRun) -> Vec<(PageNo, Slot)> {
        let mut again = Vec::with_capacity(run.len as usize);
        for (page, slot) in run.pages().zip(slots.slots()) {
            match self.staging.used(slot) {
                Use::Bound(bound) if bound == page => again.push((page, slot)),
                Use::Orphan if mutant!(LeaksPinnedOrphans) => {}
                Use::Orphan => self.staging.free(slot),
                other => unreachable!("{slot:?} of a pinned move is {other:?}"),
            }
        }
        again
    }

    // ── standby ──────────────────────────────────────────────────────────────────────────

    pub(crate) fn enter_standby(&mut self, slot: Slot) {
        self.staging.standby_push(slot);
    }

    pub(crate) fn leave_standby(&mut self, page: PageNo) {
        self.staging.standby_remove(self.slots_of[&page]);
    }

    /// Whose frame is taken next.
    pub(crate) fn standby_oldest(&self) -> Option<PageNo> {
        let slot = self.staging.standby_oldest()?;
        let Use::Bound(page) = self.staging.used(slot) else { unreachable!("standby slots are bound") };
        Some(page)
    }

    // ── huge pages that are out as samples ───────────────────────────────────────────────

    pub(crate) fn lend(&mut self, block: usize) -> Option<SlotRun> {
        self.staging.lend(block)
    }

    /// All of it is in the guest again.
    pub(crate) fn take_back(&mut self, block: usize) {
        self.staging.take_back(block);
    }

    /// A part of it goes another way.
    pub(crate) fn split(&mut self, block: Run) {
        if let Some(slots) = self.staging.split(block.start.block()) {
            self.slots_of.extend(block.pages().zip(slots.slots()));
        }
    }

    // ── frames that go back to the host ──────────────────────────────────────────────────

    /// Up to so many free ones that lie side by side.
    pub(crate) fn release(&mut self, most: u64) -> Option<SlotRun> {
        let slots = self.staging.take_free(u32::try_from(most).unwrap_or(u32::MAX))?;
        self.return_to_host(slots);
        Some(slots)
    }

    /// Free frames take up slots that victims need: how many there are beyond those that are kept ready, once few slots
    /// are empty.
    pub(crate) fn in_the_way(&self) -> u32 {
        let few = self.staging.empty_slots() < self.staging.slots() / 4;
        if few { self.staging.free_frames().saturating_sub(self.marks.high) } else { 0 }
    }

    /// Gives frames back for the copies that have been made, or could not be: so many that lie side by side, for this
    /// flushes too.
    pub(crate) fn repay_copies(&mut self) -> Option<SlotRun> {
        if self.copies_owed < HEADROOM {
            return None;
        }
        self.copies_owed = 0;
        let slots = self.staging.take_free(HEADROOM.min(self.staging.free_frames() / 2))?;
        if slots.len < HEADROOM_MIN {
            slots.slots().for_each(|slot| self.staging.free(slot));
            return None;
        }
        self.return_to_host(slots);
        Some(slots)
    }

    /// Frames just taken from the free ones.
    fn return_to_host(&mut self, slots: SlotRun) {
        slots.slots().for_each(|slot| {
            self.staging.assign(slot, Use::Orphan);
            self.staging.vacate(slot);
        });
        self.taken -= u64::from(slots.len);
    }

    // ── for checks and figures ───────────────────────────────────────────────────────────

    /// Bytes of the lists, once every page has been touched.
    pub(crate) fn bytes(&self) -> usize {
        // A hash map fills 7/8 of its buckets at most, and needs a byte beside each.
        let buckets = (self.slots_of.capacity() * 8 / 7).next_power_of_two();
        self.staging.bytes() + buckets * (size_of::<(PageNo, Slot)>() + 1)
    }

    /// Panics if the lists disagree, for so many pages in the guest, as many in staging, and these slots that a device
    /// works with.
    pub(crate) fn check(&self, resident: u64, outside: u64, devices: impl Iterator<Item = SlotRun>) {
        let held = u64::from(self.staging.held_frames());
        assert_eq!(resident + held, self.taken, "frames in the guest + in staging = frames taken");
        for (page, slot) in &self.slots_of {
            assert_eq!(self.staging.used(*slot), Use::Bound(*page), "{page} is bound to {slot:?}");
        }
        let lent = self.staging.lent_pages();
        assert_eq!(outside, (self.slots_of.len() + lent) as u64, "every page in staging has one slot");
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
        assert_eq!(bound, self.slots_of.len() + lent, "every bound slot is that of its page");
        let refused = self.refused.iter().map(|(_, slots)| *slots);
        let awaited = devices.chain(refused).flat_map(|slots| slots.slots());
        let awaited = awaited.filter(|slot| self.staging.used(*slot) == Use::Orphan).count();
        assert_eq!(awaited, orphans, "every frame without a page becomes free in the end");
    }
}
