//! A vCPU touched a page that is not in the guest.

use super::Core;
use super::event::{Action, Response};
use super::state::ios::Landing;
use crate::api::FaultKind;
use crate::policy::prefetch::{Plan, Surroundings};
use crate::policy::probation::HEAT_FAULT;
use crate::stats::TierState;
use crate::table::{Flag, PageState};
use crate::units::{BLOCK_PAGES, PageNo, Run, Slot, runs_of};

/// Never-touched pages filled at once before the vCPU goes on; the rest of the 2 MiB block follows behind it.
const FILL_FIRST: u32 = 64;
/// Filled at once when frames must be taken from other pages.
const FILL_SCARCE: u32 = 16;
/// Heat that a page gains when it is rescued: it was in use when the hand took it.
const HEAT_RESCUE: u8 = 8;
/// Heat of a page that was missed while it was sampled.
const HEAT_SAMPLED: u8 = 32;
/// Heat of the other pages of a block of which a sample was missed.
const HEAT_BESIDE_SAMPLE: u8 = 4;

impl Core {
    pub(super) fn fault(&mut self, page: PageNo) {
        let state = self.table.state(page);
        let kind = match state {
            // Served while this fault was in the queue.
            PageState::Resident => return self.actions.push_back(Action::Wake { page }),
            PageState::Poisoned => return self.actions.push_back(Action::Poison { page }),
            PageState::Untouched => FaultKind::Zero,
            PageState::Leaving | PageState::Standby | PageState::Sampled => FaultKind::Rescue,
            PageState::Stored | PageState::Arriving => FaultKind::Store,
        };
        if !self.waiters.wait(page, kind) {
            return;
        }
        match kind {
            FaultKind::Zero => self.counts.zero += 1,
            FaultKind::Rescue => self.counts.rescue += 1,
            FaultKind::Store => self.counts.store += 1,
        }
        match state {
            PageState::Untouched => {
                if !self.fill(page) {
                    self.waiters.defer(page);
                }
            }
            PageState::Sampled => self.rescue_sample(page),
            PageState::Leaving if self.is_under_write(page) => self.rescue_by_copy(page),
            PageState::Leaving => self.rescue(page),
            PageState::Standby => {
                self.rescue(page);
                self.prefetch_after(page);
            }
            PageState::Stored => {
                if !self.page_in(page) {
                    return self.waiters.defer(page);
                }
                self.prefetch_after(page);
            }
            PageState::Arriving => self.prefetch_after(page),
            PageState::Resident | PageState::Poisoned => unreachable!("returned above"),
        }
    }

    /// Serves who waits for a frame, as far as there are frames.
    pub(super) fn serve_deferred(&mut self) {
        while let Some(page) = self.waiters.first_deferred() {
            let state = self.table.state(page);
            // Else it has come with others, or been given back, meanwhile: it needs no frame, and must not look as if
            // it did.
            let needs_one = matches!(state, PageState::Stored | PageState::Untouched);
            if needs_one && self.waiters.wait_for(page) {
                if self.frames.at_hand_or_standby() == 0 {
                    return;
                }
                let served = if state == PageState::Stored { self.page_in(page) } else { self.fill(page) };
                if !served && !mutant!(ForgetsDeferredFault) {
                    return;
                }
            }
            self.waiters.end_first_deferred();
        }
    }

    /// False when there is no frame for it.
    pub(super) fn page_in(&mut self, page: PageNo) -> bool {
        let Some(taken) = self.take_one() else { return false };
        if self.table.heat(page) == 0 {
            self.probation.admit_lone(page);
        }
        self.table.warm(page, HEAT_FAULT);
        self.read(Run::one(page), taken.slots, Landing::Guest { marker: None });
        true
    }

    // ── rescue ───────────────────────────────────────────────────────────────────────────

    /// Back into the guest, from staging, without I/O.
    pub(super) fn rescue(&mut self, page: PageNo) {
        if !self.table.has(page, Flag::Prefetched) {
            self.table.warm(page, HEAT_RESCUE);
        }
        let want = self.prefetcher.rescues_at(page);
        let mut rescued = std::mem::take(&mut self.scratch.pages);
        let mut behind = page;
        loop {
            rescued.push((behind, self.start_rescue(behind)));
            behind = behind.plus(1);
            let more = behind.0 < page.0 + u64::from(want) && behind.0 < self.table.pages();
            if !more || !self.is_at_hand(behind) {
                break;
            }
        }
        self.prefetcher.rescued(behind, want);
        self.move_in(rescued.drain(..));
        self.scratch.pages = rescued;
    }

    /// In staging, and nobody reads its frame at this moment.
    fn is_at_hand(&self, page: PageNo) -> bool {
        match self.table.state(page) {
            PageState::Standby => true,
            PageState::Leaving => !self.table.has(page, Flag::Writing) || mutant!(RescuesRowUnderWrite),
            _ => false,
        }
    }

    fn start_rescue(&mut self, page: PageNo) -> Slot {
        if self.table.has(page, Flag::Prefetched) {
            self.table.put(page, Flag::Prefetched, false);
            self.counts.prefetch_used += 1;
            self.prefetcher.judge_neighbour(true);
        }
        if self.table.state(page) == PageState::Standby {
            self.leave_standby(page);
        }
        self.probation.note_back(Run::one(page), self.frames.budget());
        self.table.set(page, PageState::Arriving);
        self.frames.slot(page)
    }

    fn is_under_write(&self, page: PageNo) -> bool {
        self.is_being_written(page) && !mutant!(RescuesUnderWrite)
    }

    /// The device reads the frame at this moment: the guest must not change it. It gets a copy, or waits for the write.
    fn rescue_by_copy(&mut self, page: PageNo) {
        self.table.warm(page, HEAT_RESCUE);
        self.probation.note_back(Run::one(page), self.frames.budget());
        let from = self.frames.slot(page);
        let Some(taken) = self.frames.take(1) else { return };
        self.frames.orphan(page);
        let to = taken.slots.start;
        self.frames.bind(page, to);
        self.table.set(page, PageState::Arriving);
        if !mutant!(RescuesWithoutCopy) {
            self.actions.push_back(Action::Copy { from, to });
        }
        self.move_in([(page, to)]);
    }

    /// A page whose frame the device reads, for which somebody waits.
    pub(super) fn is_awaited_under_write(&self, page: PageNo) -> bool {
        let leaves = self.table.state(page) == PageState::Leaving && self.waiters.wait_for(page);
        leaves && self.is_under_write(page)
    }

    /// Gives those a copy for which there was no frame, and is one now: the write that they wait for may not end for a
    /// long time.
    pub(super) fn copy_what_is_awaited(&mut self) {
        if !self.waiters.any() || self.ios.writes() == 0 || self.frames.at_hand() == 0 {
            return;
        }
        let pages = self.waiters.pages().filter(|page| self.is_awaited_under_write(*page));
        let mut pages: Vec<_> = pages.collect();
        pages.sort_unstable();
        pages.into_iter().for_each(|page| self.rescue_by_copy(page));
    }

    fn rescue_sample(&mut self, page: PageNo) {
        let run = self.sampler.touched(page).unwrap_or(Run::one(page));
        for other in self.table.block_of(page).pages() {
            self.table.warm(other, if run.contains(other) { HEAT_SAMPLED } else { HEAT_BESIDE_SAMPLE });
        }
        self.put_sample_back(run);
        self.counts.samples_touched += u64::from(run.len);
    }

    /// Those of the run that are still out. None may be: what is out now and then has been given back, filled anew and
    /// taken once more, and is on its way back already.
    pub(super) fn put_sample_back(&mut self, run: Run) {
        if self.table.state(run.start) == PageState::Sampled
            && let Some(slots) = self.frames.staging().lent_to(run.start.block())
            && run.len == slots.len
        {
            run.pages().for_each(|page| self.table.set(page, PageState::Arriving));
            self.actions.push_back(Action::MoveIn { run, slots });
            return;
        }
        self.split_sample(run.start);
        let back: Vec<_> = run
            .pages()
            .filter(|page| self.table.state(*page) == PageState::Sampled)
            .map(|page| (page, self.frames.slot(page)))
            .collect();
        back.iter().for_each(|(page, _)| self.table.set(*page, PageState::Arriving));
        self.move_in(back);
    }

    /// A part of a huge page that is out as a whole goes another way.
    pub(super) fn split_sample(&mut self, page: PageNo) {
        self.frames.split(self.table.block_of(page));
    }

    // ── first touch ──────────────────────────────────────────────────────────────────────

    /// Zeros for a page that was never touched, and for its neighbours. False when there is no frame for it.
    ///
    /// In an order that matters when frames run out on the way: first the page itself and what is behind it in its
    /// chunk, for a guest goes up more often than down and the page must have a frame though nothing else does; then
    /// what is before it in the chunk. With plenty of frames, the rest of the block behind the chunk and before it.
    fn fill(&mut self, page: PageNo) -> bool {
        let block = self.table.run_around(page, PageState::Untouched, self.table.block_of(page));
        self.table.set_fresh(page.block());
        if self.may_fill_whole(block) {
            self.fill_whole(block);
            return true;
        }
        let plenty = self.frames.left() > u64::from(self.frames.marks().goal());
        let chunk = match plenty {
            true => FILL_FIRST,
            false if self.tiers.latched().is_some() => 1,
            false => FILL_SCARCE,
        };
        let start = PageNo(page.0 - page.0 % u64::from(chunk)).max(block.start);
        let end = PageNo(start.0 - start.0 % u64::from(chunk) + u64::from(chunk)).min(block.end());
        if self.frames.at_hand() == 0 {
            self.reclaim_standby(1);
        }
        let after = Run::new(page, (end.0 - page.0) as u32);
        let before = Run::new(start, (page.0 - start.0) as u32);
        self.fill_run(after);
        self.fill_run(before);
        if plenty {
            self.fill_run(Run::new(end, (block.end().0 - end.0) as u32));
            self.fill_run(Run::new(block.start, (start.0 - block.start.0) as u32));
        }
        self.table.state(page) != PageState::Untouched
    }

    /// The untouched pages of the run, while the budget has more than the engine keeps free.
    pub(super) fn fill_ahead(&mut self, run: Run) -> Response {
        let spare = self.frames.at_hand().saturating_sub(u64::from(self.frames.marks().goal()));
        let pages = run.pages().filter(|page| self.table.state(*page) == PageState::Untouched);
        let runs: Vec<_> = runs_of(pages.take(spare as usize), run.len).collect();
        for run in runs {
            if self.may_fill_whole(run) { self.fill_whole(run) } else { self.fill_run(run) }
        }
        Response::Done
    }

    /// Huge pages are for memory that need not be paged: to take a part out of one costs as much as some hundred moves.
    fn may_fill_whole(&self, run: Run) -> bool {
        let whole = run.len == BLOCK_PAGES && run == self.table.block_of(run.start);
        whole && self.frames.cover_memory() && self.frames.left() >= u64::from(BLOCK_PAGES)
    }

    fn fill_whole(&mut self, run: Run) {
        run.pages().for_each(|page| self.table.set(page, PageState::Arriving));
        self.frames.fill(run.len);
        self.actions.push_back(Action::FillBlock { run });
    }

    fn fill_run(&mut self, mut run: Run) {
        while run.len > 0 {
            let Some(taken) = self.frames.take_fresh(run.len).or_else(|| self.frames.take(run.len)) else {
                return;
            };
            let (part, slots) = (run.part(0, taken.slots.len), taken.slots);
            part.pages().for_each(|page| self.table.set(page, PageState::Arriving));
            self.frames.bind_run(part, slots);
            self.actions.push_back(Action::Prepare { slots, fresh: taken.fresh });
            self.actions.push_back(Action::MoveIn { run: part, slots });
            run = run.part(part.len, run.len - part.len);
        }
    }

    pub(super) fn filled(&mut self, run: Run, huge: bool) {
        run.pages().for_each(|page| self.now_resident(page));
        self.table.set_huge(run.start.block(), huge);
    }

    // ── prefetch ─────────────────────────────────────────────────────────────────────────

    pub(super) fn set_prefetch(&mut self, on: bool) -> Response {
        self.prefetcher.turn(on);
        Response::Done
    }

    fn prefetch_after(&mut self, page: PageNo) {
        // With a store that takes nothing, frames are for those who wait; and one that gives nothing is not asked for
        // more.
        let tier = self.tiers.state(self.tier_of(page));
        if !self.prefetcher.is_on() || self.tiers.latched().is_some() || tier != TierState::Working {
            return;
        }
        let mut plans = std::mem::take(&mut self.scratch.plans);
        let table = &self.table;
        let stored = |page| table.state(page) == PageState::Stored;
        // With a frame for every page, only the window's own limit counts.
        let frames = if self.frames.marks().high == 0 { u32::MAX } else { self.frames.marks().high };
        let proof = self.prefetcher.on_fault(page, Surroundings { stored: &stored, frames }, &mut plans);
        self.counts.prefetch_used += u64::from(proof.used);
        self.counts.prefetch_wasted += u64::from(proof.wasted);
        self.probation.note_passed(proof.passed, self.frames.budget());
        plans.drain(..).for_each(|plan| self.prefetch_plan(plan));
        self.scratch.plans = plans;
    }

    /// Brings in what of the plan is stored, as long as frames are plentiful.
    fn prefetch_plan(&mut self, plan: Plan) {
        let landing = match plan.marker {
            Some(_) => Landing::Guest { marker: plan.marker },
            None => Landing::Staging,
        };
        let mut next = plan.run.start;
        while next < plan.run.end() {
            let left = Run::new(next, if plan.step == 1 { (plan.run.end().0 - next.0) as u32 } else { 1 });
            let state = self.table.state(next);
            let same = self.table.run_around(next, state, left);
            match state {
                PageState::Stored => {
                    let read = self.prefetch_read(same, landing);
                    if read < same.len {
                        return self.prefetcher.withdraw(&plan, next.plus(read));
                    }
                }
                // A stream that is proven takes its pages out of standby on the way.
                PageState::Standby | PageState::Leaving
                    if plan.marker.is_some() && same.pages().all(|page| self.is_at_hand(page)) =>
                {
                    let mut rescued = std::mem::take(&mut self.scratch.pages);
                    let pages = same.pages().filter(|page| plan.marker != Some(*page));
                    rescued.extend(pages.map(|page| (page, self.start_rescue(page))));
                    self.move_in(rescued.drain(..));
                    self.scratch.pages = rescued;
                }
                _ => {}
            }
            next = same.end().plus(plan.step - 1);
        }
    }

    /// Returns how many pages of the run there were frames for.
    fn prefetch_read(&mut self, run: Run, landing: Landing) -> u32 {
        let whole = run.len;
        let mut run = run;
        while run.len > 0 {
            let floor = u64::from(self.frames.marks().low / 2);
            if self.frames.at_hand() < floor + u64::from(run.len.min(super::IO_PAGES_MAX)) {
                self.reclaim_standby(self.frames.marks().low);
            }
            let spare = self.frames.at_hand().saturating_sub(floor);
            let want = u64::from(run.len.min(super::IO_PAGES_MAX)).min(spare) as u32;
            let Some(taken) = self.frames.take(want) else { break };
            let part = run.part(0, taken.slots.len);
            self.counts.prefetched += u64::from(part.len);
            self.read(part, taken.slots, landing);
            run = run.part(part.len, run.len - part.len);
        }
        whole - run.len
    }
}
