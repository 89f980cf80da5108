//! Frames ahead of need: victims leave in batches, so that a fault never waits for a write.

use super::event::{Action, Response, Ticket};
use super::state::evictions::{Eviction, Look};
use super::state::ios::Purpose;
use super::{Core, LEAVING_MAX};
use crate::error::CommandError;
use crate::policy::clock::may_leave;
use crate::policy::sampler::Places;
use crate::policy::watermarks::BATCH_MAX;
use crate::table::{Flag, PageState};
use crate::units::{BLOCK_PAGES, PageNo, Run, Slot, runs_of};

/// Pages written in one burst: 2 MiB. A read that meets writes takes twice as long, however few they are; so they come
/// together and leave the device alone for the rest of the time.
const BURST_MAX: u32 = 512;
/// The same while streams and lone faults come side by side: then bursts are long, of whole runs.
const BURST_POLITE_MAX: u32 = 64;
/// Runs moved out after one event: about the time of a read. More would keep faults waiting.
const OUT_RUNS_MAX: usize = 8;
/// Runs moved out by request are cut to this length.
const EVICT_RUN_MAX: u32 = super::IO_PAGES_MAX;

const _: () = assert!(BURST_MAX * 4 <= LEAVING_MAX, "a burst must not be waited for by the next page-out");
const _: () = assert!(BATCH_MAX * 4 <= LEAVING_MAX, "several batches fit under way at once");

impl Core {
    /// After every event: serve who waits for a frame.
    pub(crate) fn balance(&mut self, may_evict: bool) {
        self.serve_deferred();
        if self.receiving.is_some() {
            self.serve_receiving();
        }
        if self.frames.over() > 0 || self.shrinking.is_awaited() {
            self.shrink_to_budget();
        }
        if self.evictions.any() {
            self.free_empty_slots();
            if may_evict {
                self.evictions.wake();
                self.step_evictions();
            }
        }
        if self.tiers.latched().is_some() {
            self.tell_failed();
            self.tell_starved();
        }
    }

    /// To be called when all events at hand are handled and their actions done: frames are made ready ahead of need.
    /// Nobody waits for that, so it comes behind what somebody waits for.
    pub fn make_ready(&mut self) {
        self.pins.look_anew();
        // Before new victims start: what is listed has left for certain, with no move still to be done.
        self.write_behind();
        if self.receiving.is_none() {
            self.step_origin();
            self.make_room();
            self.serve_deferred();
            self.free_empty_slots();
            self.repay_copies();
        } else {
            self.make_way();
        }
    }

    fn make_room(&mut self) {
        let over = u32::try_from(self.frames.over()).unwrap_or(u32::MAX);
        let available = u32::try_from(self.frames.at_hand()).unwrap_or(u32::MAX);
        if available < self.frames.marks().low || over > 0 {
            let free_wanted = self.frames.marks().high.saturating_sub(available)
                + over.saturating_sub(self.frames.staging().free_frames());
            self.reclaim_standby(free_wanted);
        }
        let leaving = self.leaving_soon() as u32;
        // Frames of pages that wait behind a drop come when that ends, and nobody knows when.
        let coming = leaving.saturating_sub(self.space.waiting.len() as u32);
        let outside = (u32::try_from(self.frames.at_hand()).unwrap_or(u32::MAX))
            .saturating_add(self.frames.staging().standby_count())
            .saturating_add(coming);
        let goal = self.frames.marks().goal().saturating_add(over);
        let short = outside + self.frames.marks().batch <= goal && leaving < LEAVING_MAX;
        // A walk's steps are not to wait for page-out, which a VM that stands still in a migration would pay for, as
        // long as there are frames for faults.
        let later = self.walks.any() && available >= self.frames.marks().low / 2 && over == 0;
        if self.tiers.any_open() && short && !later && self.may_find_victims() {
            self.page_out((goal - outside).min(LEAVING_MAX - leaving));
        }
    }

    /// Chooses victims and starts them on their way.
    fn page_out(&mut self, want: u32) {
        let mut victims = std::mem::take(&mut self.scratch.runs);
        let (mut started, mut runs, mut passed) = (0, 0, 0);
        // What is under way to the guest must not be taken before it has been used.
        let room = u64::from(2 * self.frames.marks().high);
        let mut full = false;
        while started < want && runs < OUT_RUNS_MAX && !full {
            if !self.find_victims(room, &mut passed, &mut victims) {
                if started == 0 {
                    self.pins.found_none(self.tick);
                }
                break;
            }
            for run in &victims {
                let out = self.start_out(*run, PageState::Leaving);
                self.probation.note_left(*run, self.frames.budget());
                (started, runs) = (started + out, runs + 1);
                full = out < run.len;
                if full {
                    break;
                }
            }
        }
        self.scratch.runs = victims;
    }

    /// The next victims: of pages on probation, or where the clock's hand is, which has `passed` so many pages before.
    /// False, if there are none anywhere; those that were found may all have to stay for now.
    fn find_victims(&mut self, room: u64, passed: &mut u64, victims: &mut Vec<Run>) -> bool {
        let budget = self.frames.budget();
        let found = self.probation.step(&self.table, budget, room, victims)
            || self.clock.step(&mut self.table, passed, victims);
        // What a stream is about to use stays, unless there is nothing else.
        if *passed < self.table.pages() {
            victims.retain(|run| !self.prefetcher.is_ahead(run.start, budget));
        }
        if self.tiers.count() > 1 {
            victims.retain(|run| self.may_leave_now(*run));
        }
        found
    }

    /// Writes what has left, once it is a burst, or if its frames are wanted.
    fn write_behind(&mut self) {
        let most = if self.prefetcher.shares_device() { BURST_POLITE_MAX } else { BURST_MAX };
        let burst = most.min(self.frames.marks().goal() / 4) as usize;
        let scarce = self.frames.at_hand_or_standby() < u64::from(self.frames.marks().low);
        let awaited = self.evictions.any() || self.shrinking.is_awaited();
        // What a VM's frames wait for that arrives: it has no reads that a write could be in the way of.
        let arrives = self.receiving.is_some();
        if self.ios.unwritten_count() > burst || scarce || awaited || arrives {
            self.write_all_behind();
        }
    }

    pub(super) fn write_all_behind(&mut self) {
        if self.tiers.none_writable() || self.ios.unwritten_count() == 0 {
            return;
        }
        let mut unwritten = std::mem::take(self.ios.unwritten());
        let mut later = Vec::new();
        // A page that was rescued or given back meanwhile is not to be written, and one that has left twice is in it
        // twice.
        unwritten.retain(|(page, slot)| {
            let leaves = self.table.state(*page) == PageState::Leaving
                && !self.table.has(*page, Flag::Writing)
                && (self.frames.find_slot(*page) == Some(*slot) || mutant!(WritesFromOldSlot));
            let home = self.table.home(page.block());
            let here = leaves && self.tiers.may_write(home);
            // What a latched tier is to get is found again when that is retried. A retry that is under way has looked
            // already: what it has not found stays in the list, or it would never be written if the retry ends well.
            if leaves && self.tiers.is_retrying(home) {
                later.push((*page, *slot));
            }
            self.table.put(*page, Flag::Writing, here || self.table.has(*page, Flag::Writing));
            here
        });
        let purpose = if self.receiving.is_some() { Purpose::Placement } else { Purpose::PageOut };
        self.write(&unwritten, purpose);
        unwritten.clear();
        unwritten.append(&mut later);
        *self.ios.unwritten() = unwritten;
    }

    /// Moves resident pages to staging. Stops short when there is no empty slot; returns how many pages go.
    pub(super) fn start_out(&mut self, mut run: Run, state: PageState) -> u32 {
        let mut started = 0;
        while run.len > 0 {
            let Some(slots) = self.frames.bind_empty(run) else { break };
            self.table.set_huge(run.start.block(), false);
            let part = run.part(0, slots.len);
            part.pages().for_each(|page| self.table.set(page, state));
            let digest = state == PageState::Leaving;
            self.actions.push_back(Action::MoveOut { run: part, slots, digest });
            started += part.len;
            run = run.part(part.len, run.len - part.len);
        }
        started
    }

    /// A victim's frame is in staging: drop it, keep it, or write it.
    pub(super) fn left_guest(&mut self, page: PageNo, slot: Slot, sum: u64, zero: bool) {
        if zero {
            self.counts.dropped += 1;
            self.table.set(page, PageState::Untouched);
            self.table.unstore(page);
            self.note_dead(page);
            self.frames.unbind(page);
        } else if self.receiving.is_none() && self.is_unchanged(page, sum) {
            self.counts.dropped += 1;
            self.enter_standby(page, slot);
        } else {
            self.sums[page.index()] = sum;
            // The sum is not that of what the store has, until it is written.
            if mutant!(KeepsStoredBit) {
                self.table.put(page, Flag::InStore, true);
            } else if !(mutant!(KeepsOldAtOrigin) && self.table.has(page, Flag::Origin)) {
                self.table.unstore(page);
            }
            if self.receiving.is_none() || !mutant!(ForgetsWhatGaveWay) {
                self.ios.add_unwritten(page, slot);
            }
        }
    }

    fn is_unchanged(&self, page: PageNo, sum: u64) -> bool {
        self.table.has(page, Flag::InStore) && (self.sums[page.index()] == sum || mutant!(DropsChangedPages))
    }

    /// Its home takes what leaves.
    fn may_leave_now(&self, run: Run) -> bool {
        let open = self.tiers.is_open(self.home_of(run.start)) || mutant!(CountsOnStalledTier);
        open && self.room_to_leave(run.start) >= run.len
    }

    /// Pages that may start on their way to the tier of this one: what a tier does not take must not fill staging.
    pub(super) fn room_to_leave(&self, page: PageNo) -> u32 {
        let most = LEAVING_MAX / self.tiers.count() as u32;
        most.saturating_sub(self.table.leaving_to(self.home_of(page)) as u32)
    }

    /// A tier that has a part of the run takes no writes.
    fn evict_error(&self, run: Run) -> Option<CommandError> {
        self.store_error().and_then(|_| run.blocks().find_map(|part| self.tier_error(part.start)))
    }

    // ── by request ───────────────────────────────────────────────────────────────────────

    pub(super) fn evict_on_request(
        &mut self,
        ticket: Ticket,
        run: Run,
    ) -> Option<Result<Response, CommandError>> {
        if let Err(error) = self.checked(run) {
            return Some(Err(error));
        }
        self.evictions.ask(ticket, run, self.tick);
        None
    }

    /// Looks at the next part of each run that somebody wants out of RAM. New victims are chosen there, so this is only
    /// for events behind which that may be: see [`Core::apply`]. All of them, so that each sees what was refused before
    /// the next tick forgets it.
    pub(super) fn step_evictions(&mut self) {
        for _ in 0..self.evictions.due() {
            self.step_eviction();
        }
    }

    fn step_eviction(&mut self) {
        let Some(mut eviction) = self.evictions.take_due() else { return };
        let part = eviction.part(self.config.walk.table);
        let answer = match self.evict_error(part) {
            Some(error) => Err(error),
            None => match self.evict(&mut eviction, part) {
                Look::Done => Ok(Response::Done),
                Look::Held if self.has_waited_long(eviction.since()) => {
                    match self.resident_in(eviction.run()) {
                        // What was held has been given back meanwhile.
                        0 => return self.evictions.put(eviction),
                        // Those that are tried at this moment, as victims or as samples, or are on their way back from
                        // that, are in RAM as well: most of them will turn out to be pinned.
                        pages => {
                            let tried = |page: &PageNo| match self.table.state(*page) {
                                PageState::Leaving => !self.table.has(*page, Flag::Writing),
                                state => matches!(state, PageState::Sampled | PageState::Arriving),
                            };
                            let tried = self.frames.in_staging(eviction.run()).filter(tried).count();
                            Err(CommandError::Pinned { pages: pages + tried as u64 })
                        }
                    }
                }
                Look::Held | Look::Goes => return self.evictions.put(eviction),
            },
        };
        self.actions.push_back(Action::Answer { ticket: eviction.ticket(), answer });
    }

    /// Starts what can leave of the part, and drops the frames of what has left.
    fn evict(&mut self, eviction: &mut Eviction, part: Run) -> Look {
        let mut ready = Vec::new();
        for page in part.pages() {
            match self.table.state(page) {
                PageState::Standby => {
                    self.leave_standby(page);
                    self.table.set(page, PageState::Stored);
                    self.frames.unbind(page);
                }
                PageState::Leaving => eviction.leaves(page),
                PageState::Resident if may_leave(&self.table, page) => match eviction.looks_back() {
                    true => eviction.leaves(page),
                    false => ready.push(page),
                },
                PageState::Resident if self.table.has(page, Flag::Pinned) => eviction.is_pinned(page),
                _ => {}
            }
        }
        for run in runs_of(ready, EVICT_RUN_MAX) {
            let room = !eviction.is_full() && self.room_to_leave(run.start) > 0;
            let out = if room { self.start_out(run, PageState::Leaving) } else { 0 };
            if out > 0 {
                eviction.started(run.part(0, out));
            }
            if out < run.len {
                eviction.stop(run.start.plus(out));
                break;
            }
        }
        eviction.looked(part.end())
    }

    fn resident_in(&self, run: Run) -> u64 {
        let count = |part: Run| match self.table.block_of(part.start) == part {
            true => u64::from(self.table.resident_in_block(part.start.block())),
            false => {
                part.pages().filter(|page| self.table.state(*page) == PageState::Resident).count() as u64
            }
        };
        run.blocks().map(count).sum()
    }

    // ── sampling ─────────────────────────────────────────────────────────────────────────

    pub(super) fn may_sample(&self) -> bool {
        self.config.sampling
            && !self.dirty.is_on()
            && self.receiving.is_none()
            && self.tiers.latched().is_none()
            // A block of which a part is out stays as it is.
            && !self.is_collapsing()
    }

    pub(super) fn sample(&mut self) {
        let scarce = self.sampler.note_victims(self.counts.victims);
        if scarce || !self.may_sample() {
            return self.end_sampling();
        }
        if self.sampler.is_ending() {
            return;
        }
        // Most slots are for pages that leave, should that begin.
        let single = self.frames.staging().slots() / 4;
        while let Some(run) = self.sampler.overdue(self.tick, single, false) {
            self.put_sample_back(run);
        }
        let mut samples = std::mem::take(&mut self.scratch.runs);
        samples.clear();
        // While all of memory has frames. Else huge pages fall to pieces anyway.
        let has_place = |block| self.frames.staging().has_place(block);
        let huge = self.frames.cover_memory().then_some(&has_place as &dyn Fn(usize) -> bool);
        self.sampler.choose(&mut self.table, self.tick, Places { huge, single }, &mut samples);
        for run in samples.drain(..) {
            let out = if run.len == BLOCK_PAGES {
                self.lend_out(run)
            } else {
                self.start_out(run, PageState::Sampled)
            };
            self.counts.sampled += u64::from(out);
            if out == 0 {
                self.sampler.refused(run);
            }
        }
        self.scratch.runs = samples;
    }

    /// A huge page goes to its place, if that is still empty: one chosen with it may have the same, and it must not go
    /// to pieces for that.
    fn lend_out(&mut self, run: Run) -> u32 {
        let Some(slots) = self.frames.lend(run.start.block()) else { return 0 };
        run.pages().for_each(|page| self.table.set(page, PageState::Sampled));
        self.actions.push_back(Action::MoveOut { run, slots, digest: false });
        run.len
    }

    /// Puts every sample back: memory is scarce, or written pages are being tracked. Not in the same event as
    /// new samples: a move that is not done yet may still find its page pinned.
    pub(super) fn end_sampling(&mut self) {
        self.sampler.end();
        self.put_samples_back();
    }

    /// The next ones of all that go back: the rest waits for the next step, for there may be thousands. False, if no
    /// more are out.
    pub(super) fn put_samples_back(&mut self) -> bool {
        for _ in 0..self.config.walk.samples {
            let Some(run) = self.sampler.overdue(self.tick, 0, true) else {
                self.sampler.ended();
                self.tell_huge_pages();
                return false;
            };
            self.put_sample_back(run);
        }
        true
    }

    /// Writes what is `Leaving` for `purpose`, for a page that became so without a move.
    pub(super) fn place_in_store(&mut self, pages: &[(PageNo, Slot)]) {
        self.write(pages, Purpose::Placement);
    }
}
