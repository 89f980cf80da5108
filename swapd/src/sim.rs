//! The seeded simulation: the real core on a simulated kernel, disk and guest.
//!
//! The kernel refuses moves (pinned pages), the disk delays, reorders, fails, tears and rots; the guest reads, writes, gives
//! memory back; an operator changes the budget; a migration holds pages and tracks writes, or the VM itself is one that
//! arrives. After every step each page's newest content must be in exactly one place, frames within the budget, and
//! nobody may wait in vain. The same seed gives the same run.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::core::{
    Action, Core, CoreConfig, Event, IoError, IoId, Mutant, PageOut, Request, Response, Ticket,
};
use crate::handle::{Arrival, Place};
use crate::table::{PageState, STATES};
use crate::units::{BLOCK_PAGES, PageNo, Run, Slot, SlotRun, bytes_of};

/// SplitMix64 (Steele, Lea, Flood 2014): small, and the same everywhere.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform enough in `0..bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, times: u64) -> bool {
        times > 0 && self.below(times) == 0
    }
}

/// How often things go wrong: once in so many times, 0 for never.
#[derive(Clone, Copy, Debug)]
struct Odds {
    pinned: u64,
    read_error: u64,
    bit_flip: u64,
    rot: u64,
    write_error: u64,
}

#[derive(Clone, Copy, Debug)]
enum Access {
    Read,
    Write(u64),
}

#[derive(Debug)]
struct Flight {
    io: IoId,
    write: bool,
    run: Run,
    slots: SlotRun,
}

impl Flight {
    fn slot_of(&self, page: PageNo) -> Option<Slot> {
        self.run.contains(page).then(|| self.slots.start.plus((page.0 - self.run.start.0) as u32))
    }
}

/// What a run did, for the coverage table.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    pub transitions: [[u64; STATES]; STATES],
    pub poisoned: u64,
    pub store_failures: u64,
}

const VCPUS: usize = 4;

/// One simulated VM.
#[derive(Debug)]
pub struct Sim {
    random: Random,
    odds: Odds,
    core: Core,
    pages: u64,
    slots: u32,
    guest: Vec<Option<u64>>,
    staging: Vec<Option<u64>>,
    disk: Vec<u64>,
    /// What the guest last wrote. None: lost, and said to be.
    truth: Vec<Option<u64>>,
    /// Pages that the disk lost, so that they may be poisoned.
    rotten: BTreeSet<u64>,
    /// The kernel's write tracking.
    kernel_written: Vec<bool>,
    /// Written since the last collection.
    guest_written: BTreeSet<u64>,
    tracking: bool,
    vcpus: [Option<(PageNo, Access)>; VCPUS],
    awake: [bool; VCPUS],
    faults: VecDeque<PageNo>,
    flights: Vec<Flight>,
    held: Vec<(Run, BTreeMap<u64, Place>)>,
    asked: BTreeMap<u64, Asked>,
    next_ticket: u64,
    next_value: u64,
    budget_lowered: bool,
    store_failures: u64,
    poisoned: u64,
    hot_page: u64,
    granted: Vec<SlotRun>,
    placed: bool,
}

#[derive(Debug)]
enum Asked {
    Hold(Run),
    Collect(BTreeSet<u64>),
    Budget,
    Frames,
    Placed,
    Other,
}

fn sum_of(page: PageNo, value: u64) -> u64 {
    Random(value ^ page.0.rotate_left(32)).next()
}

impl Sim {
    pub fn new(seed: u64, mutant: Option<Mutant>) -> Self {
        let mut random = Random::new(seed);
        let pages = 256 + random.below(700);
        // Now and then enough for all of it, in huge pages as far as they go.
        let budget = if random.one_in(4) { pages } else { 64 + random.below(pages / 3) };
        let (slots, blocks) = (128, 1);
        let trouble = !random.one_in(3);
        let odds = |random: &mut Random, times: u64| if trouble { times + random.below(times) } else { 0 };
        let odds = Odds {
            pinned: odds(&mut random, 10),
            read_error: odds(&mut random, 20),
            bit_flip: odds(&mut random, 40),
            rot: odds(&mut random, 200),
            write_error: odds(&mut random, 60),
        };
        let sampling = random.one_in(2);
        let config = CoreConfig { pages, budget_frames: budget, budget_min: 48, slots, blocks, sampling };
        let mut core = Core::new(config);
        core.mutant = mutant;
        let count = pages as usize;
        Sim {
            odds,
            core,
            pages,
            slots,
            guest: vec![None; count],
            staging: vec![None; (slots + blocks * BLOCK_PAGES) as usize],
            disk: vec![0xDEAD; count],
            truth: vec![Some(0); count],
            rotten: BTreeSet::new(),
            kernel_written: vec![false; count],
            guest_written: BTreeSet::new(),
            tracking: false,
            vcpus: [None; VCPUS],
            awake: [true; VCPUS],
            faults: VecDeque::new(),
            flights: Vec::new(),
            held: Vec::new(),
            asked: BTreeMap::new(),
            next_ticket: 0,
            next_value: 1,
            budget_lowered: false,
            store_failures: 0,
            poisoned: 0,
            hot_page: 0,
            granted: Vec::new(),
            placed: false,
            random,
        }
    }

    /// Runs `steps` random steps, then lets everything come to rest.
    pub fn run(&mut self, steps: u32) -> Coverage {
        if self.random.one_in(4) {
            self.receive();
        }
        for step in 0..steps {
            self.step();
            self.core.check();
            self.check_frames();
            if step % 16 == 0 {
                self.check_contents();
            }
        }
        self.settle();
        self.check_contents();
        Coverage {
            transitions: *self.core.transitions(),
            poisoned: self.poisoned,
            store_failures: self.store_failures,
        }
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..55 => self.schedule(),
            55..70 => self.deliver_fault(),
            70..93 => self.complete_io(),
            93..96 => {
                let ticks = 1 + self.random.below(20);
                self.event(Event::Tick { ticks });
            }
            _ => self.operate(),
        }
    }

    // ── the guest ────────────────────────────────────────────────────────────────────────

    fn schedule(&mut self) {
        let vcpu = self.random.below(VCPUS as u64) as usize;
        if !self.awake[vcpu] {
            return;
        }
        let (page, access) = self.vcpus[vcpu].take().unwrap_or_else(|| self.next_access());
        let Some(content) = self.guest[page.index()] else {
            if self.core.table().state(page) == PageState::Poisoned {
                assert!(self.truth[page.index()].is_none(), "{page} is poisoned though it was not lost");
                return;
            }
            self.vcpus[vcpu] = Some((page, access));
            self.awake[vcpu] = false;
            self.faults.push_back(page);
            return;
        };
        assert_eq!(Some(content), self.truth[page.index()], "the guest reads wrong content of {page}");
        if let Access::Write(value) = access {
            self.guest[page.index()] = Some(value);
            self.truth[page.index()] = Some(value);
            self.kernel_written[page.index()] = true;
            if self.tracking {
                self.guest_written.insert(page.0);
            }
        }
    }

    fn next_access(&mut self) -> (PageNo, Access) {
        let page = match self.random.below(4) {
            0 => self.random.below(self.pages),
            1 => self.random.below(self.pages.min(40)),
            _ => {
                self.hot_page = if self.random.one_in(50) {
                    self.random.below(self.pages)
                } else {
                    (self.hot_page + 1) % self.pages
                };
                self.hot_page
            }
        };
        let access = match self.random.below(5) {
            0 | 1 => Access::Read,
            2 if self.random.one_in(3) => Access::Write(0),
            _ => {
                self.next_value += 1;
                Access::Write(self.next_value)
            }
        };
        (PageNo(page), access)
    }

    fn wake(&mut self, run: Run) {
        for (vcpu, awake) in self.vcpus.iter().zip(&mut self.awake) {
            *awake |= vcpu.is_some_and(|(page, _)| run.contains(page));
        }
    }

    // ── the kernel ───────────────────────────────────────────────────────────────────────

    /// Faults are read in batches, in any order, and sometimes late or twice.
    fn deliver_fault(&mut self) {
        if self.faults.is_empty() {
            return;
        }
        let nth = self.random.below(self.faults.len() as u64) as usize;
        let page = self.faults[nth];
        if !self.random.one_in(10) {
            self.faults.remove(nth);
        }
        self.event(Event::Fault(page));
    }

    fn event(&mut self, event: Event<'_>) {
        self.core.handle(event);
        self.perform_all();
        // Several events may be at hand at once.
        if !self.random.one_in(3) {
            self.core.make_ready();
            self.perform_all();
        }
    }

    fn perform_all(&mut self) {
        while let Some(action) = self.core.next_action() {
            self.perform(action);
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::MoveIn { run, slots } => self.perform_move_in(run, slots),
            Action::MoveOut { run, slots, digest } => self.perform_move_out(run, slots, digest),
            Action::Prepare { slots, fresh } => {
                for slot in slots.slots() {
                    // The other way round may be: a frame taken for a read that failed was never touched.
                    assert!(!fresh || self.staging[slot.index()].is_none(), "{slot:?} has a frame already");
                    self.staging[slot.index()] = Some(0);
                }
            }
            Action::FillBlock { run } => {
                for page in run.indices() {
                    assert!(self.guest[page].replace(0).is_none(), "page {page} has a frame already");
                    self.kernel_written[page] = true;
                }
                self.wake(run);
                let huge = !self.random.one_in(4);
                self.core.handle(Event::Filled { run, huge });
            }
            Action::Split { page } => assert!(self.guest[page.index()].is_some(), "{page} has no frame"),
            Action::Copy { from, to } => {
                self.staging[to.index()] = Some(self.staging[from.index()].expect("a frame to copy from"));
            }
            Action::Read { io, run, slots } => self.flights.push(Flight { io, write: false, run, slots }),
            Action::Write { io, run, slots } => {
                let overlap = self.flights.iter().any(|flight| {
                    flight.write && flight.run.start < run.end() && run.start < flight.run.end()
                });
                assert!(!overlap, "two writes of the same page at once: {run:?}");
                self.flights.push(Flight { io, write: true, run, slots });
            }
            Action::DropGuest { run } => run.indices().for_each(|page| self.guest[page] = None),
            Action::ReleaseFrames { slots } => {
                for slot in slots.slots() {
                    // A frame taken for a read that failed may never have been touched.
                    self.staging[slot.index()] = None;
                }
            }
            Action::Poison { page } => {
                self.guest[page.index()] = None;
                self.wake(Run::one(page));
            }
            Action::PagePoisoned(page) => {
                assert!(self.rotten.contains(&page.0), "{page} is poisoned though the disk has it");
                self.truth[page.index()] = None;
                self.poisoned += 1;
            }
            Action::Wake { page } => self.wake(Run::one(page)),
            Action::Resolved { .. } | Action::StoreRecovered | Action::HugePages(_) => {}
            Action::ArmTracking => self.kernel_written.fill(false),
            Action::ScanWritten { ticket } => {
                let written: Vec<_> = (0..self.pages)
                    .map(PageNo)
                    .filter(|page| {
                        self.guest[page.index()].is_some()
                            && std::mem::take(&mut self.kernel_written[page.index()])
                    })
                    .collect();
                let runs: Vec<_> = crate::units::runs_of(written, 64).collect();
                self.core.handle(Event::Written { ticket, runs: &runs });
            }
            Action::Answer { ticket, answer } => self.answered(ticket, answer),
            Action::StoreFailed(_) => self.store_failures += 1,
        }
    }

    fn perform_move_in(&mut self, run: Run, slots: SlotRun) {
        let mut moved = 0;
        for (page, slot) in run.pages().zip(slots.slots()) {
            if self.random.one_in(self.odds.pinned) {
                break;
            }
            let busy = self
                .flights
                .iter()
                .any(|flight| flight.slots.start <= slot && slot < flight.slots.start.plus(flight.slots.len));
            assert!(!busy, "{slot:?} is given to the guest while the device works with it");
            let frame = self.staging[slot.index()].take();
            assert!(frame.is_some(), "no frame in {slot:?} for {page}");
            assert!(self.guest[page.index()].is_none(), "{page} has a frame already");
            self.guest[page.index()] = frame;
            self.kernel_written[page.index()] = true;
            moved += 1;
        }
        self.wake(run.part(0, moved));
        self.core.handle(Event::MovedIn { run, slots, moved });
    }

    fn perform_move_out(&mut self, run: Run, slots: SlotRun, digest: bool) {
        let mut out = Vec::new();
        for (page, slot) in run.pages().zip(slots.slots()) {
            // Nothing is pinned in a VM that does not run yet.
            if self.placed && self.random.one_in(self.odds.pinned) {
                out.push(PageOut::Pinned);
                continue;
            }
            let frame = self.guest[page.index()].take().expect("a resident page has a frame");
            assert!(self.staging[slot.index()].replace(frame).is_none(), "{slot:?} has a frame already");
            let (sum, zero) = if digest { (sum_of(page, frame), frame == 0) } else { (0, false) };
            out.push(PageOut::Moved { sum, zero });
        }
        self.core.handle(Event::MovedOut { run, slots, pages: &out });
    }

    // ── the disk ─────────────────────────────────────────────────────────────────────────

    fn complete_io(&mut self) {
        if self.flights.is_empty() {
            return;
        }
        let nth = self.random.below(self.flights.len() as u64) as usize;
        let flight = self.flights.swap_remove(nth);
        if flight.write { self.complete_write(&flight) } else { self.complete_read(&flight) }
    }

    fn complete_read(&mut self, flight: &Flight) {
        let io = flight.io;
        let rotten = flight.run.pages().any(|page| self.rotten.contains(&page.0));
        if self.random.one_in(self.odds.read_error) {
            // An error that lasts is a lost page; one that passes is not. Three in a row last.
            let retried = flight.run.len == 1;
            if !retried || rotten {
                return self.event(Event::ReadDone { io, result: Err(IoError("simulated EIO".into())) });
            }
        }
        let flip = flight.run.len > 1 && self.random.one_in(self.odds.bit_flip);
        let mut sums = Vec::new();
        for (page, slot) in flight.run.pages().zip(flight.slots.slots()) {
            let value = self.disk[page.index()];
            self.staging[slot.index()] = Some(value);
            sums.push(sum_of(page, value) ^ u64::from(flip && page == flight.run.start));
        }
        self.event(Event::ReadDone { io, result: Ok(&sums) });
    }

    fn complete_write(&mut self, flight: &Flight) {
        let fails = self.random.one_in(self.odds.write_error);
        for (page, slot) in flight.run.pages().zip(flight.slots.slots()) {
            let value = self.staging[slot.index()].expect("the device reads a frame that is there");
            let torn = fails && self.random.one_in(2);
            self.disk[page.index()] = if torn { !value } else { value };
            self.rotten.remove(&page.0);
            if !fails && self.random.one_in(self.odds.rot) {
                self.disk[page.index()] = !value;
                self.rotten.insert(page.0);
            }
        }
        let result = if fails { Err(IoError("simulated ENOSPC".into())) } else { Ok(()) };
        self.event(Event::WriteDone { io: flight.io, result });
    }

    // ── operators and migrations ─────────────────────────────────────────────────────────

    fn ask(&mut self, request: Request, asked: Asked) {
        self.next_ticket += 1;
        self.asked.insert(self.next_ticket, asked);
        self.event(Event::Request { ticket: Ticket(self.next_ticket), request });
    }

    fn random_run(&mut self, longest: u64) -> Run {
        let start = self.random.below(self.pages);
        let len = 1 + self.random.below(longest.min(self.pages - start));
        Run::new(PageNo(start), len as u32)
    }

    fn operate(&mut self) {
        match self.random.below(9) {
            0 => {
                let frames =
                    if self.random.one_in(4) { self.pages } else { 48 + self.random.below(self.pages / 2) };
                self.budget_lowered = true;
                self.ask(Request::SetBudget(bytes_of(frames)), Asked::Budget);
            }
            1 => {
                let run = self.random_run(20);
                for page in run.pages() {
                    self.truth[page.index()] = Some(0);
                    self.rotten.remove(&page.0);
                    if self.tracking {
                        self.guest_written.insert(page.0);
                    }
                }
                self.ask(Request::Discard(run), Asked::Other);
            }
            2 if self.held.len() < 3 => {
                let run = self.random_run(30);
                let free = |(held, _): &(Run, _)| held.end() <= run.start || run.end() <= held.start;
                if self.held.iter().all(free) {
                    self.ask(Request::Hold(run), Asked::Hold(run));
                }
            }
            2 | 3 => self.release(),
            4 => {
                self.tracking = !self.tracking;
                self.guest_written.clear();
                self.ask(Request::TrackWrites(self.tracking), Asked::Other);
            }
            5 if self.tracking => {
                let written = std::mem::take(&mut self.guest_written);
                self.ask(Request::CollectWritten, Asked::Collect(written));
            }
            6 => self.ask(Request::RetryStore, Asked::Other),
            7 => {
                let run = self.random_run(40);
                self.ask(Request::Evict(run), Asked::Other);
            }
            _ => self.ask(Request::Stats, Asked::Other),
        }
    }

    /// Reads what is held as a migration would, then lets it go.
    fn release(&mut self) {
        let Some((run, places)) = self.held.pop() else { return };
        for page in run.pages() {
            let index = page.index();
            match places[&page.0] {
                Place::Memory if self.guest[index].is_none() => {
                    assert_eq!(self.truth[index], Some(0), "{page} left the guest while it was held");
                }
                Place::Stored if self.core.table().state(page) == PageState::Stored => {
                    let good = Some(self.disk[index]) == self.truth[index] || self.rotten.contains(&page.0);
                    assert!(good, "the store has an old version of {page}, held and stored");
                }
                _ => {}
            }
        }
        self.ask(Request::Release(run), Asked::Other);
    }

    fn answered(&mut self, ticket: Ticket, answer: Result<Response, crate::CommandError>) {
        let asked = self.asked.remove(&ticket.0).expect("each request is answered once");
        match (asked, answer) {
            (Asked::Hold(run), Ok(Response::Pieces(pieces))) => {
                let places =
                    pieces.iter().flat_map(|piece| piece.run.pages().map(|page| (page.0, piece.place)));
                self.held.push((run, places.collect()));
            }
            (Asked::Collect(expected), Ok(Response::Runs(runs))) => {
                let named: BTreeSet<_> = runs.iter().flat_map(|run| run.pages().map(|page| page.0)).collect();
                let missed: Vec<_> = expected.difference(&named).collect();
                assert!(missed.is_empty(), "written pages not reported: {missed:?}");
            }
            (Asked::Budget, Ok(_)) => self.budget_lowered = false,
            (Asked::Frames, Ok(Response::Frames(slots))) => self.granted.push(slots),
            (Asked::Placed, Ok(Response::Placed(placed))) => {
                assert_eq!((placed.pageins, placed.pageouts), (0, 0), "paging while receiving");
                self.placed = true;
            }
            (_, Err(crate::CommandError::Store(_) | crate::CommandError::NotNow(_)))
            | (Asked::Other, Ok(_)) => {}
            (asked, answer) => panic!("{asked:?} was answered with {answer:?}"),
        }
    }

    /// The VM comes from elsewhere: pages arrive, some of them again, then it runs.
    fn receive(&mut self) {
        let errors = std::mem::take(&mut self.odds.write_error);
        let heat: Vec<u8> =
            (0..self.pages).map(|_| self.random.below(4).saturating_sub(1) as u8 * 40).collect();
        self.ask(Request::StartReceiving(heat), Asked::Other);
        let mut came = BTreeSet::new();
        for _ in 0..self.pages / 4 {
            let run = self.random_run(24);
            match self.random.below(8) {
                0 => {
                    run.pages().for_each(|page| self.truth[page.index()] = Some(0));
                    self.ask(Request::ArriveZero(run), Asked::Other);
                }
                1 if self.random.one_in(4) => {
                    run.pages().for_each(|page| self.truth[page.index()] = None);
                    self.ask(Request::ArrivePoisoned(run), Asked::Other);
                }
                _ => self.receive_run(run, &came),
            }
            came.extend(run.pages().map(|page| page.0));
            if self.random.one_in(2) {
                self.complete_io();
            }
            self.core.check();
            self.check_frames();
        }
        for slots in std::mem::take(&mut self.granted) {
            self.ask(Request::ReturnFrames(slots), Asked::Other);
        }
        self.ask(Request::FinishReceiving, Asked::Placed);
        while !self.placed {
            self.complete_io();
            self.event(Event::Tick { ticks: 1 });
        }
        self.check_contents();
        self.odds.write_error = errors;
    }

    fn receive_run(&mut self, run: Run, came: &BTreeSet<u64>) {
        self.ask(Request::GrantFrames(run.len), Asked::Frames);
        while self.granted.is_empty() {
            self.complete_io();
            self.event(Event::Tick { ticks: 1 });
        }
        let granted = self.granted.pop().expect("there is one");
        let run = run.part(0, granted.len.min(run.len));
        let mut sums = Vec::new();
        for (page, slot) in run.pages().zip(granted.slots()) {
            self.next_value += 1;
            self.truth[page.index()] = Some(self.next_value);
            self.staging[slot.index()] = Some(self.next_value);
            sums.push(sum_of(page, self.next_value));
        }
        let again = run.pages().any(|page| came.contains(&page.0));
        self.ask(Request::Arrive(Arrival { run, slots: granted, sums, again }), Asked::Other);
    }

    // ── checks ───────────────────────────────────────────────────────────────────────────

    fn check_frames(&mut self) {
        let frames = self.guest.iter().chain(&self.staging).filter(|frame| frame.is_some()).count() as u64;
        assert!(
            frames <= self.core.frames_taken(),
            "{frames} frames, {} on record",
            self.core.frames_taken()
        );
        if !self.budget_lowered {
            let budget = self.core.budget_frames();
            assert!(self.core.frames_taken() <= budget, "frames above the budget of {budget}");
        }
    }

    /// Each page's newest content is where the table says, and nowhere is an older one taken for it.
    fn check_contents(&self) {
        for page in (0..self.pages).map(PageNo) {
            let Some(truth) = self.truth[page.index()] else { continue };
            let rotten = self.rotten.contains(&page.0);
            let in_slot = |slot: Option<Slot>| slot.and_then(|slot| self.staging[slot.index()]);
            let reading = self.flights.iter().any(|flight| {
                !flight.write
                    && flight.slot_of(page).is_some()
                    && flight.slot_of(page) == self.core.slot_of(page)
            });
            let state = self.core.table().state(page);
            let found = match state {
                PageState::Untouched => Some(0),
                PageState::Resident => self.guest[page.index()],
                PageState::Stored => Some(self.disk[page.index()]),
                PageState::Arriving if reading => Some(self.disk[page.index()]),
                PageState::Leaving | PageState::Standby | PageState::Sampled | PageState::Arriving => {
                    in_slot(self.core.slot_of(page))
                }
                PageState::Poisoned => panic!("{page} is poisoned and not said to be lost"),
            };
            assert!(
                found == Some(truth) || rotten,
                "{page} ({state:?}) has {found:?}, the guest wrote {truth}"
            );
        }
    }

    /// No more trouble: everything asked is answered, every vCPU goes on.
    fn settle(&mut self) {
        self.odds = Odds { pinned: 0, read_error: 0, bit_flip: 0, rot: 0, write_error: 0 };
        self.ask(Request::RetryStore, Asked::Other);
        while !self.held.is_empty() {
            self.release();
        }
        for _ in 0..100_000 {
            let waiting = self.awake.iter().any(|awake| !awake);
            if !waiting && self.flights.is_empty() && self.asked.is_empty() && self.faults.is_empty() {
                assert_eq!(self.core.faults_waiting(), 0);
                return;
            }
            self.deliver_fault();
            self.complete_io();
            self.event(Event::Tick { ticks: 1 });
            self.core.check();
        }
        panic!(
            "not settled: awake {:?} at {:?}, {} in flight, asked {:?}, {} of {} slots free",
            self.awake,
            self.vcpus,
            self.flights.len(),
            self.asked,
            self.staging.iter().filter(|slot| slot.is_none()).count(),
            self.slots
        );
    }
}
