//! Where frames come from: the free ones in staging, the host as long as the budget lasts, standby last.

use super::Core;
use super::event::{Action, Response, Ticket};
use crate::error::CommandError;
use crate::policy::watermarks::Watermarks;
use crate::staging::Use;
use crate::table::{Flag, PageState};
use crate::units::{PageNo, Run, Slot, SlotRun, bytes_of, pages_in};

/// Frames given back at a time for pages that are copied to the guest.
const HEADROOM: u32 = 64;
/// Fewer are not worth it.
const HEADROOM_MIN: u32 = 16;

/// Frames and whether they come from the host just now (and read as zeros).
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    pub(super) slots: SlotRun,
    pub(super) fresh: bool,
}

impl Core {
    /// Frames to be had without taking one from a page.
    pub(super) fn frames_at_hand(&self) -> u64 {
        let limit = self.frames_allowed();
        let over = self.taken.saturating_sub(limit);
        u64::from(self.staging.free_frames()).saturating_sub(over) + limit.saturating_sub(self.taken)
    }

    /// Up to `want` contiguous frames, not yet bound.
    pub(super) fn take_frames(&mut self, want: u32) -> Option<Taken> {
        let want = u64::from(want).min(self.frames_at_hand()) as u32;
        match self.staging.take_free(want) {
            Some(slots) => Some(Taken { slots, fresh: false }),
            None => self.take_fresh(want),
        }
    }

    /// The same, from the host alone.
    pub(super) fn take_fresh(&mut self, want: u32) -> Option<Taken> {
        let left = self.frames_allowed().saturating_sub(self.taken) + u64::from(mutant!(OverspendsBudget));
        let want = u64::from(want).min(left) as u32;
        let slots = self.staging.take_empty(want)?;
        self.taken += u64::from(slots.len);
        Some(Taken { slots, fresh: true })
    }

    /// One frame, from standby if need be: for somebody who waits.
    pub(super) fn take_one(&mut self) -> Option<Taken> {
        if self.frames_at_hand() == 0 {
            self.reclaim_standby(1);
        }
        self.take_frames(1)
    }

    pub(super) fn bind(&mut self, page: PageNo, slot: Slot) {
        self.staging.assign(slot, Use::Bound(page));
        let before = self.slots_of.insert(page, slot);
        assert!(before.is_none(), "{page} has a slot already: {before:?}");
    }

    pub(super) fn bind_run(&mut self, run: Run, slots: SlotRun) {
        run.pages().zip(slots.slots()).for_each(|(page, slot)| self.bind(page, slot));
    }

    /// The page does not need its slot any more; the frame in it is free.
    pub(super) fn unbind(&mut self, page: PageNo) {
        let slot = self.slots_of.remove(&page).expect("the page is in staging");
        self.staging.free(slot);
    }

    /// The device reads the page's frame. (A version that arrived anew waits in another one until the older is written.)
    pub(super) fn is_being_written(&self, page: PageNo) -> bool {
        let of_page = |slots: SlotRun| slots.contains(self.slots_of[&page]) || mutant!(LeaksReplacedVersions);
        self.table.has(page, Flag::Writing) && self.ios.slots().any(of_page)
    }

    /// The page goes another way while the device still works with its frame.
    pub(super) fn orphan(&mut self, page: PageNo) {
        let slot = self.slots_of.remove(&page).expect("the page is in staging");
        self.staging.assign(slot, Use::Orphan);
    }

    /// Frees up to `count` frames of pages whose content the store has, oldest first.
    pub(super) fn reclaim_standby(&mut self, count: u32) {
        for _ in 0..count {
            let Some(slot) = self.staging.standby_oldest() else { return };
            let Use::Bound(page) = self.staging.used(slot) else { unreachable!("standby slots are bound") };
            self.leave_standby(page);
            self.table.set(page, PageState::Stored);
            self.unbind(page);
        }
    }

    /// Takes a page off the standby list; its state is the caller's to change.
    pub(super) fn leave_standby(&mut self, page: PageNo) {
        self.staging.standby_remove(self.slots_of[&page]);
        if self.table.has(page, Flag::Prefetched) {
            self.table.put(page, Flag::Prefetched, false);
            self.counts.prefetch_wasted += 1;
            self.prefetcher.judge_neighbour(false);
        }
    }

    pub(super) fn enter_standby(&mut self, page: PageNo, slot: Slot) {
        self.table.set(page, PageState::Standby);
        self.staging.standby_push(slot);
    }

    // ── budget ───────────────────────────────────────────────────────────────────────────

    /// Every page can have a frame: nothing need ever leave.
    pub(super) fn budget_covers_memory(&self) -> bool {
        self.budget >= self.table.memory_pages()
    }

    pub(super) fn set_budget(
        &mut self,
        ticket: Ticket,
        bytes: u64,
    ) -> Option<Result<Response, CommandError>> {
        if self.receiving.is_some() {
            // Nothing is paged out for a lower one, and frames for what is still to come would never be free.
            return Some(Err(CommandError::NotNow(
                "the VM is being received; change its budget once it runs",
            )));
        }
        let frames = pages_in(bytes);
        if frames < self.config.budget_min {
            return Some(Err(CommandError::BudgetTooSmall {
                asked: bytes,
                minimum: bytes_of(self.config.budget_min),
            }));
        }
        let memory = bytes_of(self.table.pages());
        if bytes > memory.max(bytes_of(self.config.budget_min)) {
            return Some(Err(CommandError::BudgetTooLarge { asked: bytes, memory }));
        }
        let covered = self.budget_covers_memory();
        self.budget = frames;
        if self.budget_covers_memory() != covered {
            // While huge pages still find the way back to where they were.
            self.end_sampling();
            self.actions.push_back(Action::HugePages(!covered));
            self.begin_collapse(false);
        }
        self.marks = Watermarks::of(frames, self.table.memory_pages(), self.staging.slots());
        self.budget_waiters.push(ticket);
        self.pins.shrinks(self.taken, self.tick);
        None
    }

    /// Gives frames above the budget back to the host, and tells who waits for that, or why he waits in vain.
    pub(super) fn shrink_to_budget(&mut self) {
        let over = self.taken.saturating_sub(self.budget);
        if !mutant!(KeepsFramesAboveBudget) {
            self.release_free(u32::try_from(over).unwrap_or(u32::MAX));
        }
        if self.taken > self.budget && !self.tiers.all_failed() && !mutant!(AnswersBudgetEarly) {
            return;
        }
        for ticket in std::mem::take(&mut self.budget_waiters) {
            let answer = match self.store_error() {
                // What is changed cannot leave.
                Some(error) if self.taken > self.budget => Err(error),
                _ => Ok(Response::Done),
            };
            self.actions.push_back(Action::Answer { ticket, answer });
        }
    }

    /// Free frames take up slots that victims need: those that are more than is kept ready go back to the host.
    pub(super) fn free_empty_slots(&mut self) {
        if self.staging.empty_slots() < self.staging.slots() / 4 {
            self.release_free(self.staging.free_frames().saturating_sub(self.marks.high));
        }
    }

    /// Gives frames back for the copies that have been made, or could not be: so many that lie side by side, for this flushes too.
    pub(super) fn repay_copies(&mut self) {
        if self.copies_owed < HEADROOM {
            return;
        }
        self.copies_owed = 0;
        let Some(slots) = self.staging.take_free(HEADROOM.min(self.staging.free_frames() / 2)) else {
            return;
        };
        if slots.len >= HEADROOM_MIN {
            self.return_to_host(slots);
        } else {
            slots.slots().for_each(|slot| self.staging.free(slot));
        }
    }

    fn release_free(&mut self, mut count: u32) {
        while count > 0 {
            let Some(slots) = self.staging.take_free(count) else { return };
            self.return_to_host(slots);
            count -= slots.len;
        }
    }

    /// Frames just taken from the free ones go to the host.
    fn return_to_host(&mut self, slots: SlotRun) {
        slots.slots().for_each(|slot| {
            self.staging.assign(slot, Use::Orphan);
            self.staging.vacate(slot);
        });
        self.taken -= u64::from(slots.len);
        self.actions.push_back(Action::ReleaseFrames { slots });
    }

    // ── memory that the guest gave back ──────────────────────────────────────────────────

    pub(super) fn discard(&mut self, run: Run) -> Response {
        let mut dropped: Option<Run> = None;
        for page in run.pages() {
            if !mutant!(DiscardUnseenByTracking) {
                self.dirty.left(page);
            }
            let block = self.table.block_of(page);
            if self.table.is_huge(page.block())
                && self.table.state(page) == PageState::Resident
                && !(run.contains(block.start) && run.contains(PageNo(block.end().0 - 1)))
            {
                self.actions.push_back(Action::Split { page });
            }
            let in_guest = self.forget(page);
            match &mut dropped {
                Some(run) if in_guest && run.end() == page => run.len += 1,
                _ if in_guest => {
                    self.drop_guest(dropped.replace(Run::one(page)));
                }
                _ => {}
            }
        }
        self.drop_guest(dropped);
        Response::Done
    }

    fn drop_guest(&mut self, run: Option<Run>) {
        self.actions.extend(run.map(|run| Action::DropGuest { run }));
    }

    /// Makes the page untouched, wherever its content was. Says whether the guest's page tables have an entry for it,
    /// which the caller must remove.
    pub(super) fn forget(&mut self, page: PageNo) -> bool {
        let state = self.table.state(page);
        match state {
            PageState::Untouched => return false,
            PageState::Resident => self.taken -= u64::from(!mutant!(MiscountsDiscards)),
            PageState::Poisoned => {
                self.lost.remove(&page);
            }
            PageState::Stored => {}
            PageState::Standby => {
                self.leave_standby(page);
                self.unbind(page);
            }
            PageState::Leaving if self.is_being_written(page) && !mutant!(FreesFrameUnderWrite) => {
                self.orphan(page);
            }
            PageState::Leaving | PageState::Sampled => {
                if !mutant!(ForgetsSplits) {
                    self.split_sample(page);
                }
                self.unbind(page);
            }
            PageState::Arriving if mutant!(FreesFrameUnderRead) => self.unbind(page),
            PageState::Arriving => self.orphan(page),
        }
        self.table.set(page, PageState::Untouched);
        if !mutant!(DiscardKeepsStoredBit) {
            self.table.put(page, Flag::Stored, false);
        }
        self.note_dead(page);
        if !self.bad_reads.is_empty() {
            self.bad_reads.remove(&page);
        }
        if self.waiting.remove(&page).is_some() && !mutant!(ForgetsWakeOnDiscard) {
            // Who waited for the old content touches again and gets zeros.
            self.actions.push_back(Action::Wake { page });
        }
        matches!(state, PageState::Resident | PageState::Poisoned)
    }
}
