//! Where frames come from: the free ones in staging, the host as long as the budget lasts, standby last.

use super::Core;
use super::event::{Action, Response, Ticket};
use super::state::frames::Taken;
use super::state::walks::{Task, WalkStep};
use super::walk::kernel_part;
use crate::error::CommandError;
use crate::table::{Flag, PageState};
use crate::units::{PageNo, Run, Slot, bytes_of, pages_in};

impl Core {
    /// One frame, from standby if need be: for somebody who waits.
    pub(super) fn take_one(&mut self) -> Option<Taken> {
        if self.frames.at_hand() == 0 {
            self.reclaim_standby(1);
        }
        self.frames.take(1)
    }

    /// The device reads the page's frame. (A version that arrived anew waits in another one until the older is
    /// written.)
    pub(super) fn is_being_written(&self, page: PageNo) -> bool {
        self.table.has(page, Flag::Writing)
            && (self.ios.work_with(self.frames.slot(page)) || mutant!(LeaksReplacedVersions))
    }

    /// Frees up to `count` frames of pages whose content the store has, oldest first.
    pub(super) fn reclaim_standby(&mut self, count: u32) {
        for _ in 0..count {
            let Some(page) = self.frames.standby_oldest() else { return };
            self.leave_standby(page);
            self.table.set(page, PageState::Stored);
            self.frames.unbind(page);
        }
    }

    /// Takes a page off the standby list; its state is the caller's to change.
    pub(super) fn leave_standby(&mut self, page: PageNo) {
        self.frames.leave_standby(page);
        if self.table.has(page, Flag::Prefetched) {
            self.table.put(page, Flag::Prefetched, false);
            self.counts.prefetch_wasted += 1;
            self.prefetcher.judge_neighbour(false);
        }
    }

    pub(super) fn enter_standby(&mut self, page: PageNo, slot: Slot) {
        self.table.set(page, PageState::Standby);
        self.frames.enter_standby(slot);
    }

    // ── budget ───────────────────────────────────────────────────────────────────────────

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
        let covered = self.frames.cover_memory();
        self.frames.set_budget(frames);
        if self.frames.cover_memory() != covered {
            self.collapse.flip(!covered);
            self.end_sampling();
            self.begin_collapse(false);
        }
        self.shrinking.wait(ticket, self.frames.taken(), self.tick);
        None
    }

    /// Gives frames above the budget back to the host, and tells who waits for that, or why he waits in vain.
    pub(super) fn shrink_to_budget(&mut self) {
        if !mutant!(KeepsFramesAboveBudget) {
            self.release_free(self.frames.over());
        }
        let is_over = self.frames.over() > 0;
        if is_over && !self.tiers.all_failed() && !mutant!(AnswersBudgetEarly) {
            return;
        }
        for ticket in self.shrinking.take() {
            let answer = match self.store_error() {
                // What is changed cannot leave.
                Some(error) if is_over => Err(error),
                _ => Ok(Response::Done),
            };
            self.actions.push_back(Action::Answer { ticket, answer });
        }
    }

    /// Free frames that take up slots which victims need go back to the host.
    pub(super) fn free_empty_slots(&mut self) {
        self.release_free(self.frames.in_the_way().into());
    }

    pub(super) fn repay_copies(&mut self) {
        self.actions.extend(self.frames.repay_copies().map(|slots| Action::ReleaseFrames { slots }));
    }

    fn release_free(&mut self, mut count: u64) {
        while count > 0
            && let Some(slots) = self.frames.release(count)
        {
            self.actions.push_back(Action::ReleaseFrames { slots });
            count -= u64::from(slots.len);
        }
    }

    // ── memory that the guest gave back ──────────────────────────────────────────────────

    /// Of a discard: what of the run is dropped in one go.
    pub fn discard_part(&self, run: Run) -> Run {
        // Dearer than a look: the host takes the frames back one by one.
        let most = self.config.walk;
        let most = WalkStep { present: most.present.div_ceil(4), ..most };
        let part = kernel_part(&self.table, run.start, most).len.min(most.table.div_ceil(4) as u32);
        run.part(0, part.min(run.len))
    }

    /// At once what can be dropped in one go; the rest in steps.
    pub(super) fn discard_on_request(
        &mut self,
        ticket: Ticket,
        run: Run,
    ) -> Option<Result<Response, CommandError>> {
        if let Err(error) = self.checked(run) {
            return Some(Err(error));
        }
        let part = self.discard_part(run);
        self.discard(part);
        if part.len < run.len {
            self.walks.begin_next(ticket, Task::Discard, part.end(), run.end());
            if !mutant!(AnswersDiscardEarly) {
                return None;
            }
        }
        Some(Ok(Response::Done))
    }

    pub(super) fn discard(&mut self, run: Run) {
        let mut dropped: Option<Run> = None;
        for page in run.pages() {
            if mutant!(DiscardLeavesWhatIsAwaited) && self.waiters.wait_for(page) {
                continue;
            }
            if !mutant!(DiscardUnseenByTracking) {
                self.dirty.departed(page);
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
            PageState::Resident if mutant!(MiscountsDiscards) => {}
            PageState::Resident => self.frames.returned(),
            PageState::Poisoned => {
                self.lost.remove(&page);
            }
            PageState::Stored => {}
            PageState::Standby => {
                self.leave_standby(page);
                self.frames.unbind(page);
            }
            PageState::Leaving if self.is_being_written(page) && !mutant!(FreesFrameUnderWrite) => {
                self.frames.orphan(page);
            }
            PageState::Leaving | PageState::Sampled => {
                if !mutant!(ForgetsSplits) {
                    self.split_sample(page);
                }
                self.frames.unbind(page);
            }
            PageState::Arriving if mutant!(FreesFrameUnderRead) => self.frames.unbind(page),
            PageState::Arriving => self.frames.orphan(page),
        }
        self.table.set(page, PageState::Untouched);
        let at_origin = mutant!(DiscardKeepsOrigin) && self.table.has(page, Flag::Origin);
        if !mutant!(DiscardKeepsStoredBit) && !at_origin {
            self.table.unstore(page);
        }
        self.note_dead(page);
        if !self.bad_reads.is_empty() {
            self.bad_reads.remove(&page);
        }
        if self.waiters.end(page).is_some() && !mutant!(ForgetsWakeOnDiscard) {
            // Who waited for the old content touches again and gets zeros.
            self.actions.push_back(Action::Wake { page });
        }
        matches!(state, PageState::Resident | PageState::Poisoned)
    }
}
