//! The simulated kernel: frames in the guest and in staging, moves that are refused, faults that come late, twice and
//! in batches.

use super::Sim;
use super::coverage::{Cause, Fault, Outcome};
use crate::api::Copies;
use crate::core::{Action, Event, PageOut, Response};
use crate::errno;
use crate::moves::{self, Moved};
use crate::table::PageState;
use crate::units::{BLOCK_PAGES, PageNo, Run, Slot, SlotRun, runs_of};

/// The end of a pin that has none.
const FOR_GOOD: u64 = u64::MAX;

/// The guest's page table entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Entry {
    Missing,
    /// With its content.
    Frame(u64),
    Poison,
}

#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) guest: Vec<Entry>,
    /// Content of the frame in each slot.
    pub(super) staging: Vec<Option<u64>>,
    /// The device works with the frame.
    busy: Vec<bool>,
    /// Written since it was last protected.
    pub(super) written: Vec<bool>,
    /// Protected for somebody who wants to know of writes: nothing else is to be looked at.
    tracked: Vec<bool>,
    /// Pages that I/O of the guest keeps where they are, and until when.
    pins: Vec<(PageNo, u64)>,
    /// Ticks that the core has been told of, and at how many of them each page was refused as a victim: none may be
    /// tried again before the next.
    pub(super) ticks: u64,
    refused: Vec<Option<u64>>,
    /// Faults that nobody has read.
    pub(super) faults: Vec<PageNo>,
    /// What is being put in huge pages.
    pub(super) collapsing: Option<Run>,
}

impl Kernel {
    pub(super) fn new(pages: usize, slots: usize) -> Self {
        Kernel {
            guest: vec![Entry::Missing; pages],
            staging: vec![None; slots],
            busy: vec![false; slots],
            written: vec![false; pages],
            tracked: vec![false; pages],
            pins: Vec::new(),
            ticks: 0,
            refused: vec![None; pages],
            faults: Vec::new(),
            collapsing: None,
        }
    }

    pub(super) fn set_busy(&mut self, slots: SlotRun, busy: bool) {
        slots.slots().for_each(|slot| self.busy[slot.index()] = busy);
    }

    pub(super) fn is_busy(&self, slot: Slot) -> bool {
        self.busy[slot.index()]
    }

    /// The engine does something to the frame, which must be its own.
    fn claim(&self, slot: Slot, what: &str) {
        assert!(!self.busy[slot.index()], "{slot:?} is {what} while the device works with it");
    }

    /// Until when.
    fn pinned(&self, page: PageNo) -> Option<u64> {
        self.pins.iter().filter(|(pinned, _)| *pinned == page).map(|(_, until)| *until).max()
    }

    pub(super) fn is_anything_pinned_for_good(&self) -> bool {
        self.pins.iter().any(|(_, until)| *until == FOR_GOOD)
    }

    pub(super) fn unpin_all(&mut self) {
        self.pins.clear();
    }

    /// Something else is at the page from now on.
    fn is_new(&mut self, page: PageNo) {
        self.refused[page.index()] = None;
        self.pins.retain(|(pinned, _)| *pinned != page);
    }
}

impl Sim {
    // ── faults ───────────────────────────────────────────────────────────────────────────

    /// Faults are read in any order, late, several at once before anything is done about them, and sometimes twice.
    pub(super) fn deliver_faults(&mut self) {
        if self.kernel.faults.is_empty() {
            return;
        }
        let batch = if self.random.one_in(3) { self.kernel.faults.len() } else { 1 };
        for _ in 0..batch {
            let nth = self.random.below(self.kernel.faults.len() as u64) as usize;
            let page = self.kernel.faults[nth];
            if self.random.one_in(self.odds.late_fault) {
                // It will come again, whatever becomes of the page meanwhile.
                self.coverage.injected(Fault::LateFault);
            } else {
                self.kernel.faults.swap_remove(nth);
            }
            if !matches!(self.kernel.guest[page.index()], Entry::Missing) {
                self.coverage.outcome(Fault::LateFault, Outcome::Served);
            }
            self.trace.page("fault", page, None);
            self.hand(Event::Fault(page));
            if self.kernel.faults.is_empty() {
                break;
            }
        }
        self.finish_event();
    }

    // ── actions ──────────────────────────────────────────────────────────────────────────

    pub(super) fn perform(&mut self, action: Action) {
        match action {
            Action::MoveIn { run, slots } => self.move_in(run, slots),
            Action::CopyIn { page, slot } => self.copy_in(page, slot),
            Action::MoveOut { run, slots, digest } => self.move_out(run, slots, digest),
            Action::Prepare { slots, fresh } => {
                for slot in slots.slots() {
                    self.kernel.claim(slot, "zeroed");
                    // The other way round may be: a frame taken for a read that failed was never touched.
                    assert!(
                        !fresh || self.kernel.staging[slot.index()].is_none(),
                        "{slot:?} has a frame already"
                    );
                    self.kernel.staging[slot.index()] = Some(0);
                }
            }
            Action::FillBlock { run } => {
                self.trace.add("fill a block", run, None, None);
                for page in run.indices() {
                    let before = std::mem::replace(&mut self.kernel.guest[page], Entry::Frame(0));
                    assert_eq!(before, Entry::Missing, "page {page} is in the guest already");
                    self.kernel.written[page] = true;
                }
                run.pages().for_each(|page| self.kernel.is_new(page));
                self.wake(run);
                let huge = !self.random.one_in(4);
                self.hand(Event::Filled { run, huge });
            }
            Action::Collapse { run } => {
                assert!(
                    run.start.0.is_multiple_of(u64::from(BLOCK_PAGES)) && run.len.is_multiple_of(BLOCK_PAGES)
                );
                for page in run.indices() {
                    let here = matches!(self.kernel.guest[page], Entry::Frame(_));
                    assert!(here, "page {page} is to be part of a huge page, and has no frame");
                }
                assert_eq!(self.kernel.collapsing.replace(run), None, "one at a time");
            }
            Action::Split { page } => {
                let here = matches!(self.kernel.guest[page.index()], Entry::Frame(_));
                assert!(here, "{page} is to be split off, and has no frame");
            }
            Action::HugePages(_) => {}
            Action::Copy { from, to } => {
                self.kernel.claim(to, "copied to");
                let content = self.kernel.staging[from.index()].expect("a frame to copy from");
                self.kernel.staging[to.index()] = Some(content);
            }
            Action::CopyOut { ticket, pages } => {
                for (page, slot) in &pages {
                    let (content, truth) =
                        (self.kernel.staging[slot.index()], self.oracle.truth[page.index()]);
                    self.trace.suspect.set(Some(*page));
                    assert_eq!(content, truth, "the copy of {page} is not what the guest last wrote");
                    self.trace.suspect.set(None);
                }
                let copies =
                    Copies { pages: pages.iter().map(|(page, _)| *page).collect(), bytes: Vec::new() };
                self.answered(ticket, Ok(Response::Copies(copies)));
            }
            Action::Read { io, tier, run, slots } => {
                self.trace.add("read", run, Some(slots), None);
                for slot in slots.slots() {
                    self.kernel.claim(slot, "read to");
                    // The device's pin takes a frame where there is none.
                    self.kernel.staging[slot.index()].get_or_insert(0xBAD);
                }
                self.kernel.set_busy(slots, true);
                self.start_io(io, tier, false, run, slots);
            }
            Action::Write { io, tier, run, slots } => {
                self.trace.add("write", run, Some(slots), None);
                slots.slots().for_each(|slot| self.kernel.claim(slot, "written from"));
                self.kernel.set_busy(slots, true);
                self.start_io(io, tier, true, run, slots);
            }
            Action::Drop { io, tier, run } => {
                self.trace.add("drop", run, None, None);
                self.start_drop(io, tier, run);
            }
            Action::DropGuest { run } => {
                self.trace.add("drop from the guest", run, None, None);
                run.indices().for_each(|page| self.kernel.guest[page] = Entry::Missing);
                run.pages().for_each(|page| self.kernel.is_new(page));
            }
            Action::ReleaseFrames { slots } => {
                for slot in slots.slots() {
                    self.kernel.claim(slot, "released");
                    self.kernel.staging[slot.index()] = None;
                }
            }
            Action::Poison { page } => {
                let entry = &mut self.kernel.guest[page.index()];
                assert!(!matches!(entry, Entry::Frame(_)), "{page} has a frame and is to be poisoned");
                *entry = Entry::Poison;
                self.trace.page("poison", page, None);
                self.wake(Run::one(page));
            }
            Action::PagePoisoned(page) => self.lost(page),
            Action::Wake { page } => {
                self.trace.page("wake", page, None);
                self.wake(Run::one(page));
            }
            Action::Resolved { .. } => {}
            Action::ArmTracking { run } => {
                self.trace.add("protect", run, None, None);
                self.kernel.written[run.indices()].fill(false);
                self.kernel.tracked[run.indices()].fill(true);
            }
            Action::EndTracking { run } => {
                self.trace.add("end tracking", run, None, None);
                self.kernel.written[run.indices()].fill(true);
                self.kernel.tracked[run.indices()].fill(false);
            }
            Action::ScanDirty { run } => {
                let tracked = self.kernel.tracked[run.indices()].iter().all(|tracked| *tracked);
                assert!(tracked, "{run:?} is scanned, and not all of it is tracked");
                self.oracle.scanned(run);
                let found = |page: &PageNo| {
                    let present = matches!(self.kernel.guest[page.index()], Entry::Frame(_));
                    present && std::mem::take(&mut self.kernel.written[page.index()])
                };
                let written: Vec<_> = run.pages().filter(found).collect();
                let dirty: Vec<_> = runs_of(written, 64).collect();
                self.hand(Event::Scanned { run, dirty: &dirty });
            }
            Action::Answer { ticket, answer } => self.answered(ticket, answer),
            Action::StoreFailed(_) => self.trace.note("the store failed", 0),
            Action::Starved(_) => {
                self.trace.note("no frames left", 0);
                assert!(!std::mem::replace(&mut self.oracle.starved, true), "told twice");
                self.guest.paused |= self.random.one_in(2);
            }
            Action::Relieved => {
                self.trace.note("frames again", 0);
                assert!(std::mem::take(&mut self.oracle.starved), "relieved of nothing");
                self.guest.paused = false;
            }
            Action::TierUnreachable(error) => {
                self.trace.note("a tier does not answer", u64::from(error.tier.0));
                let told = &mut self.oracle.silent[error.tier.index()].1;
                assert!(!std::mem::replace(told, true), "told twice");
                self.disk.answered[error.tier.index()] = false;
                self.guest.paused |= self.random.one_in(2);
            }
            Action::TierReachable(tier) => {
                self.check_answers(tier);
                self.trace.note("a tier answers", u64::from(tier.0));
                // It may fall silent again before the next tick: whoever waits then has not waited for long.
                let (_, told) = std::mem::take(&mut self.oracle.silent[tier.index()]);
                assert!(told, "it was not away");
                self.guest.paused &= self.oracle.starved || self.oracle.silent.iter().any(|(_, told)| *told);
            }
            Action::Short { .. } => {
                self.trace.note("all frames are held", 0);
                assert!(!std::mem::replace(&mut self.oracle.short, true), "told twice");
            }
            Action::Enough => {
                self.trace.note("frames again", 0);
                assert!(std::mem::take(&mut self.oracle.short), "enough of nothing");
            }
            Action::StoreRecovered(_) => {
                self.trace.note("the store works again", 0);
                if let Some(fault) = self.disk.failure.take() {
                    self.coverage.outcome(fault, Outcome::Resumed);
                }
            }
        }
    }

    fn move_in(&mut self, run: Run, slots: SlotRun) {
        self.trace.add("move in", run, Some(slots), None);
        let Sim { kernel, random, odds, coverage, .. } = self;
        let end = move |done: u32, kernel: &mut Kernel, count: u32| {
            for (page, slot) in run.part(done, count).pages().zip(slots.part(done, count).slots()) {
                kernel.claim(slot, "given to the guest");
                let frame = kernel.staging[slot.index()].take();
                let frame = frame.unwrap_or_else(|| panic!("no frame in {slot:?} for {page}"));
                let before = std::mem::replace(&mut kernel.guest[page.index()], Entry::Frame(frame));
                assert_eq!(before, Entry::Missing, "{page} is in the guest already");
                kernel.written[page.index()] = true;
                kernel.is_new(page);
            }
        };
        // The kernel drops the pin of a read that has just ended a little late, or much later.
        let often = if run.len == BLOCK_PAGES { odds.pinned / 4 } else { odds.pinned * 2 };
        let lasting = random.one_in(often).then(|| random.below(u64::from(run.len)) as u32);
        let moved = moves::carry(run.bytes(), moves::PATIENT, |bytes| {
            let done = crate::units::pages_in(bytes as u64) as u32;
            let mut count = run.len - done;
            let mut errno = 0;
            if random.one_in(odds.pinned * 2) {
                count = random.below(u64::from(count)) as u32;
                errno = if random.one_in(2) { errno::EAGAIN } else { errno::EBUSY };
            }
            if let Some(pinned) = lasting.filter(|pinned| *pinned < done + count) {
                (count, errno) = (pinned - done, errno::EBUSY);
            }
            end(done, kernel, count);
            if errno == errno::EAGAIN {
                coverage.injected(Fault::MoveAgain);
                coverage.outcome(Fault::MoveAgain, Outcome::WentOn);
            }
            (crate::units::bytes_of(u64::from(count)) as usize, errno)
        });
        let moved = match moved.expect("the simulated kernel refuses nothing else") {
            Moved::All => run.len,
            Moved::Pinned(bytes) => {
                self.coverage.injected(Fault::PinnedIn);
                self.coverage.outcome(Fault::PinnedIn, Outcome::WentOn);
                crate::units::pages_in(bytes as u64) as u32
            }
        };
        self.wake(run.part(0, moved));
        self.hand(Event::MovedIn { run, slots, moved });
    }

    fn copy_in(&mut self, page: PageNo, slot: Slot) {
        self.trace.add("copy in", Run::one(page), Some(SlotRun::new(slot, 1)), None);
        let copied = !self.random.one_in(self.odds.pinned * 2);
        if copied {
            self.kernel.claim(slot, "copied from");
            let content = self.kernel.staging[slot.index()]
                .unwrap_or_else(|| panic!("no frame in {slot:?} for {page}"));
            let before = std::mem::replace(&mut self.kernel.guest[page.index()], Entry::Frame(content));
            assert_eq!(before, Entry::Missing, "{page} is in the guest already");
            self.kernel.written[page.index()] = true;
            self.kernel.is_new(page);
            self.wake(Run::one(page));
        } else {
            self.coverage.injected(Fault::NoFrame);
            self.coverage.outcome(Fault::NoFrame, Outcome::WentOn);
        }
        self.hand(Event::CopiedIn { page, slot, copied });
    }

    fn move_out(&mut self, run: Run, slots: SlotRun, digest: bool) {
        self.trace.add("move out", run, Some(slots), None);
        let (table, fits) = (self.core.table(), self.core.budget_frames() >= self.memory.len() as u64);
        let spoilt = self.kernel.collapsing.is_some_and(|at| fits && at.contains(run.start));
        let sampled = table.state(run.start) == PageState::Sampled;
        assert!(!(spoilt && sampled), "{run:?} is sampled while it is put together");
        let mut out = Vec::with_capacity(run.len as usize);
        // Were each page of a huge one as likely to be pinned as any other, none would ever leave.
        let whole = run.len == BLOCK_PAGES;
        let one = run.start.plus(self.random.below(u64::from(run.len)) as u32);
        for (page, slot) in run.pages().zip(slots.slots()) {
            if !whole || page == one {
                self.pin_at_random(page);
            }
            if let Some(until) = self.kernel.pinned(page) {
                let fault = if until == FOR_GOOD { Fault::PinnedForGood } else { Fault::PinnedOut };
                if fault == Fault::PinnedOut {
                    self.coverage.injected(fault);
                }
                self.coverage.outcome(fault, Outcome::StayedInGuest);
                if self.core.table().state(page) == PageState::Leaving {
                    let before = self.kernel.refused[page.index()].replace(self.kernel.ticks);
                    self.trace.suspect.set(Some(page));
                    assert_ne!(
                        before,
                        Some(self.kernel.ticks),
                        "{page} is tried again, and cannot have come free"
                    );
                    self.trace.suspect.set(None);
                }
                out.push(PageOut::Pinned);
                continue;
            }
            self.kernel.claim(slot, "moved to");
            let entry = std::mem::replace(&mut self.kernel.guest[page.index()], Entry::Missing);
            let Entry::Frame(frame) = entry else {
                panic!("{page} is to leave the guest, and is {entry:?} there")
            };
            let before = self.kernel.staging[slot.index()].replace(frame);
            assert!(before.is_none(), "{slot:?} has a frame already");
            let (sum, zero) = if digest { (super::sum_of(page, frame), frame == 0) } else { (0, false) };
            out.push(PageOut::Moved { sum, zero });
        }
        self.hand(Event::MovedOut { run, slots, pages: &out });
    }

    /// Buffers are registered: pages that are in the guest stay there; or those that were are let go of.
    pub(super) fn pin_for_good(&mut self) {
        if self.random.one_in(3) {
            return self.kernel.pins.retain(|(_, until)| *until != FOR_GOOD);
        }
        let run = self.random_run(self.pages);
        self.trace.add("pinned for good", run, None, None);
        self.coverage.injected(Fault::PinnedForGood);
        let here = run.pages().filter(|page| matches!(self.kernel.guest[page.index()], Entry::Frame(_)));
        self.kernel.pins.extend(here.map(|page| (page, FOR_GOOD)));
    }

    /// I/O of the guest's devices into the page begins or ends.
    fn pin_at_random(&mut self, page: PageNo) {
        let now = self.trace.now;
        self.kernel.pins.retain(|(_, until)| *until > now);
        if self.random.one_in(self.odds.pinned) {
            let until = now + self.random.below(50);
            self.kernel.pins.push((page, until.max(now + 1)));
        }
    }

    // ── the core ─────────────────────────────────────────────────────────────────────────

    /// One event, and what the core wants done about it.
    pub(super) fn event(&mut self, event: Event<'_>) {
        self.hand(event);
        self.finish_event();
    }

    pub(super) fn hand(&mut self, event: Event<'_>) {
        let cause = Cause::of(&event);
        self.changed = true;
        let may_evict = self.core.apply(event);
        self.coverage.note(cause, self.core.transitions());
        self.core.balance(may_evict);
        self.coverage.note(Cause::Balance, self.core.transitions());
    }

    pub(super) fn finish_event(&mut self) {
        self.perform_all();
        // Several events may be at hand at once.
        if !self.random.one_in(3) {
            self.changed = true;
            self.core.make_ready();
            self.coverage.note(Cause::MakeReady, self.core.transitions());
            self.perform_all();
        }
    }

    fn perform_all(&mut self) {
        while let Some(action) = self.core.next_action() {
            self.perform(action);
        }
    }

    /// The core says that the page is lost. It may be so only if the disk lost it.
    fn lost(&mut self, page: PageNo) {
        self.trace.page("lost", page, None);
        assert_eq!(self.core.table().state(page), PageState::Poisoned, "{page} is said to be lost");
        let place = self.disk.place(self.disk.read_last, page);
        let Some(fault) = self.disk.damage[place] else {
            self.trace.suspect.set(Some(page));
            panic!("{page} is given up though the disk has it");
        };
        self.coverage.outcome(fault, Outcome::Poisoned);
        self.disk.damage[place] = None;
        self.oracle.truth[page.index()] = None;
        self.oracle.is_not_as_held(page);
    }
}
