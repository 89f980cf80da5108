//! The seeded simulation: the real core on a simulated kernel, disk and guest (`docs/simulation.md`).
//!
//! ```text
//!   guest ──fault──▶ ┌──────┐ ──move──▶ kernel: refuses, does half of it
//!   operator ──ask─▶ │ core │ ──read, write──▶ disk: delays, fails, tears, loses, misdirects, rots
//!   session ─arrive▶ └──────┘ ◀──done──┘
//!                       ▲ after every step: oracle     trace, coverage
//! ```
//! The same seed gives the same run. `oracle` says what must hold after every step, whatever went wrong.

mod closed;
mod coverage;
mod disk;
mod guest;
mod kernel;
mod operator;
mod oracle;
mod origin;
mod random;
mod receive;
mod trace;
mod trouble;

pub use coverage::{Cause, Coverage, Depth, Fault, OUTCOMES, Outcome};

use crate::core::{Core, CoreConfig, Event, Request, Ticket, WalkStep};
use crate::errno;
use crate::table::PageState;
use crate::units::{BLOCK_PAGES, PageNo, Run, TIERS_MAX, TierId, bytes_of};
use disk::{Disk, Trouble};
use guest::{Access, Guest};
use kernel::{Entry, Kernel};
use operator::Asked;
use oracle::Oracle;
use random::Random;
use receive::Session;
use trace::Trace;

/// Small enough for budgets to matter in a VM of a few hundred pages.
const BUDGET_MIN: u64 = 48;
const BLOCKS: u32 = 2;
/// Of some VMs: every other block is at home at the second one.
const TIERS: usize = 2;
/// So that a walk takes several.
const WALK: WalkStep = WalkStep { table: 100, present: 1, blocks: 1, samples: 2 };
/// Steps in which everything must have come to rest once nothing goes wrong any more.
const SETTLE_MAX: u32 = 20_000;
/// Steps within which a page of a tier that works is served: such that one of which the medium is broken is given up.
const SERVE_MAX: u32 = 4_000;
/// The same for whatever can come to rest while pages are pinned for good.
const PINNED_STEPS: u32 = 400;
/// The same for a full store to give up all copies of pages that are in RAM.
const FULL_STEPS: u32 = 600;
/// Steps without I/O, each of a tick at least, within which whoever waits for a frame in vain is told so.
const QUIET_STEPS: u32 = 20;

/// How often things go wrong: once in so many times, 0 for never. Drawn for each seed, so that each has its own
/// mixture.
#[derive(Clone, Copy, Debug, Default)]
struct Odds {
    read_error: u64,
    misread: u64,
    bad_sector: u64,
    torn: u64,
    lost_write: u64,
    misdirected: u64,
    rot: u64,
    write_error: u64,
    bad_region: u64,
    short: u64,
    again: u64,
    spike: u64,
    pinned: u64,
    late_fault: u64,
    session_gone: u64,
    pinned_for_good: u64,
    outage: u64,
    drop_error: u64,
}

impl Odds {
    fn draw(random: &mut Random) -> Odds {
        if random.one_in(8) {
            return Odds::default();
        }
        let mut draw = |times: u64| if random.one_in(2) { times + random.below(times) } else { 0 };
        Odds {
            read_error: draw(15),
            misread: draw(15),
            bad_sector: draw(1),
            torn: draw(40),
            lost_write: draw(40),
            misdirected: draw(40),
            rot: draw(1),
            write_error: draw(60),
            bad_region: draw(10),
            short: draw(6),
            again: draw(10),
            spike: draw(20),
            pinned: draw(10),
            late_fault: draw(5),
            session_gone: draw(6),
            pinned_for_good: draw(2),
            outage: draw(8),
            drop_error: draw(4),
        }
    }
}

/// What a page with this content has for a checksum.
fn sum_of(page: PageNo, value: u64) -> u64 {
    Random::new(value ^ page.0.rotate_left(32)).next()
}

/// A content that is neither of the two, nor that of any other page.
fn mixed(old: u64, new: u64) -> u64 {
    Random::new(old.rotate_left(17) ^ new).next() | 1 << 63
}

/// One simulated VM.
#[derive(Debug)]
pub struct Sim {
    seed: u64,
    random: Random,
    /// For what is tracked.
    tracking: Random,
    odds: Odds,
    /// Hardly anybody but the guest wants anything.
    calm: bool,
    core: Core,
    /// With those that fill up blocks that are not whole: they are nobody's.
    pages: u64,
    tiers: u8,
    /// Some of its pages may be at an origin.
    has_origin: bool,
    /// All pages that are memory, in ascending order.
    memory: Vec<PageNo>,
    kernel: Kernel,
    disk: Disk,
    guest: Guest,
    oracle: Oracle,
    /// The migration by which the VM comes, until it runs.
    session: Option<Session>,
    asked: Vec<(Ticket, Asked)>,
    next_ticket: u64,
    /// Something has happened that the oracle has not looked at.
    changed: bool,
    trace: Trace,
    coverage: Coverage,
}

impl Sim {
    /// A VM as the seed draws it: its size, its budget, its tiers, and how often each thing goes wrong.
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let odds = Odds::draw(&mut random);
        // Now and then enough for all of it, in huge pages as far as they go.
        let covered = random.one_in(8);
        let pages =
            if covered || random.one_in(10) { 500 + random.below(700) } else { 130 + random.below(400) };
        // Drawn apart as well.
        let apart = &mut Random::new(seed.rotate_left(32));
        let tiers = if apart.one_in(4) { TIERS as u8 } else { 1 };
        let has_origin = Random::new(seed.rotate_left(8)).one_in(3);
        let pages = if tiers > 1 { pages.max(600 + apart.below(600)) } else { pages };
        let most = if random.one_in(8) { pages } else { pages / 3 };
        // Huge pages stay whole as long as nobody interferes.
        let calm = covered && random.one_in(2);
        let part = BUDGET_MIN + random.below(most.max(BUDGET_MIN + 1) - BUDGET_MIN);
        let budget_frames = if covered { pages } else { part };
        let room = if random.one_in(4) { random.below(pages) } else { u64::from(u32::MAX) };
        let sampling = random.one_in(2);
        let keeps_all = random.one_in(16);
        // Twice the frames that are kept free at the largest budget, as a real staging area has at least.
        let slots = if pages < 500 { 128 } else { 256 };
        let (budget_min, blocks) = (BUDGET_MIN, BLOCKS);
        let mut config = CoreConfig { pages, budget_frames, budget_min, slots, blocks, sampling, walk: WALK };
        let short = Self::short_blocks(seed, &mut config);
        let home = |block: usize| TierId(block as u8 % tiers);
        let core = Core::new(config).with_short_blocks(short).with_homes(tiers, home);
        let core = if has_origin { core.with_origin() } else { core };
        let (pages, count) = (config.pages, config.pages as usize);
        let is_memory = |page: &PageNo| core.table().first_of_nobody(Run::one(*page)).is_none();
        let memory = (0..pages).map(PageNo).filter(is_memory).collect();
        Sim {
            seed,
            odds,
            calm,
            core,
            tiers,
            has_origin,
            pages,
            memory,
            kernel: Kernel::new(count, slots as usize + (BLOCKS * BLOCK_PAGES) as usize),
            disk: Disk::new(count, room, keeps_all),
            guest: Guest::new(),
            oracle: Oracle::new(count),
            session: None,
            asked: Vec::new(),
            next_ticket: 0,
            changed: true,
            trace: Trace::default(),
            coverage: Coverage::default(),
            random,
            tracking: Random::new(seed.rotate_left(32)),
        }
    }

    /// One VM in three has regions that are not whole blocks: the last one, and in half of them one more before all
    /// others. Drawn apart, so that all other seeds are as they would be without.
    fn short_blocks(seed: u64, config: &mut CoreConfig) -> Vec<Run> {
        let random = &mut Random::new(!seed);
        let block = u64::from(BLOCK_PAGES);
        let (last, tail) = (config.pages / block, config.pages % block);
        if tail == 0 || !random.one_in(3) {
            return Vec::new();
        }
        config.pages += block - tail;
        let mut short = vec![Run::new(PageNo(last * block), tail as u32)];
        if random.one_in(2) {
            // Often so few pages that none of them need be in RAM.
            let most = if random.one_in(2) { 4 } else { block - 1 };
            config.pages += block;
            short[0].start = PageNo((last + 1) * block);
            short.insert(0, Run::new(PageNo(0), 1 + random.below(most) as u32));
        }
        short
    }

    /// Runs `steps` random steps, then lets everything come to rest and reads all of memory.
    ///
    /// # Panics
    /// If anything is not as it must be; [`Sim::tell`] then says how it came to that.
    pub fn run(&mut self, steps: u32) -> Coverage {
        if self.random.one_in(4) {
            self.start_receiving();
        } else if self.has_origin {
            self.begin_at_origin();
        }
        for _ in 0..steps {
            self.trace.now += 1;
            self.coverage.steps += 1;
            if self.session.is_some() {
                self.step_receiving()
            } else {
                self.step()
            }
            self.walk();
            self.check();
        }
        self.settle();
        self.check();
        self.check_space();
        if self.tiers > 1 {
            self.lose_a_tier();
        }
        if self.has_origin {
            self.end_at_origin();
        }
        self.make_trouble();
        self.read_everything();
        for page in (0..self.pages).map(PageNo) {
            for tier in [TierId::STORE, TierId::ORIGIN] {
                self.forget_damage(self.disk.place(tier, page), Outcome::NeverNeeded);
            }
        }
        std::mem::take(&mut self.coverage)
    }

    /// How it came to a failure: to be called after [`Sim::run`] has panicked with `message`.
    pub fn tell(&self, message: &str) -> String {
        let Sim { seed, pages, .. } = self;
        let (budget, taken) = (self.core.budget_frames(), self.core.frames_taken());
        let trace = self.trace.tell(message);
        format!("seed {seed}: {message}\n{pages} pages, a budget of {budget} frames, {taken} taken; {trace}")
    }

    /// The same for the same seed.
    pub fn digest(&self) -> u64 {
        self.trace.digest()
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..55 => self.run_guest(),
            55..68 => self.deliver_faults(),
            68..91 => self.complete_io(),
            91..94 => self.tick(),
            94 => self.decay(),
            96 if self.random.one_in(self.odds.pinned_for_good) => self.pin_for_good(),
            97 if self.random.one_in(self.odds.outage) => self.begin_trouble(),
            95 if self.random.one_in(self.odds.bad_region) => {
                self.disk.bad_writes = Some(self.random_run(self.pages / 4));
            }
            _ if self.calm && !self.random.one_in(8) => self.run_guest(),
            _ => self.operate(),
        }
    }

    /// One step of what looks at all of memory.
    fn walk(&mut self) {
        if self.core.is_walking() {
            self.step_discard();
            self.event(Event::Step);
        }
    }

    fn tick(&mut self) {
        if let Some(run) = self.kernel.collapsing.take_if(|_| self.random.one_in(2)) {
            for start in (0..run.len).step_by(BLOCK_PAGES as usize) {
                let block = run.part(start, BLOCK_PAGES);
                let there = |page| matches!(self.kernel.guest[page], Entry::Frame(_));
                let huge = block.indices().all(there) && self.random.one_in(2);
                self.event(Event::Collapsed { block, huge });
            }
        }
        let ticks = 1 + self.random.below(20);
        self.kernel.ticks += ticks;
        self.check_silence(ticks);
        self.tick_closed(ticks);
        self.event(Event::Tick { ticks });
    }

    /// One tier is away for good: every page of the other is served as if nothing were, as long as there are frames
    /// that can be had.
    fn lose_a_tier(&mut self) {
        let frames = self.pages / 2;
        self.ask(Request::SetBudget(bytes_of(frames)), Asked::Budget);
        let away = TierId(self.random.below(u64::from(self.tiers)) as u8);
        let trouble = if self.random.one_in(2) { Trouble::Silence } else { Trouble::Outage(errno::EIO) };
        let home = |sim: &Sim, page: PageNo| sim.core.table().home(page.block());
        let (lost, good): (Vec<_>, Vec<_>) = self.memory.iter().partition(|page| home(self, **page) == away);
        self.guest.vcpus = [None; guest::VCPUS];
        // Some are changed, and cannot leave: more than the core aims to have ready. Then one is waited for.
        for page in lost.iter().take(frames as usize / 4) {
            self.serve(*page);
        }
        self.set_trouble(away, trouble, u64::MAX);
        let stored = |page: &PageNo| self.core.table().state(*page) == PageState::Stored;
        if let Some(page) = lost.into_iter().find(stored) {
            self.access(1, page, Access::Read);
        }
        let mut served = 0;
        let good_tier = good.first().map(|page| home(self, *page));
        'pages: for page in good {
            while !self.serve(page) {
                // If that does not pass, all frames are of the other's pages.
                (0..QUIET_STEPS).for_each(|_| self.go_on());
                if self.oracle.starved {
                    good_tier.into_iter().for_each(|tier| self.check_starved(tier));
                    break 'pages;
                }
            }
            served += 1;
        }
        self.trace.note("pages served while a tier was away", served);
        self.settle();
        self.check();
    }

    /// A vCPU writes to the page. False if there is no frame for it, and that has been told.
    fn serve(&mut self, page: PageNo) -> bool {
        self.serve_unless(page, |_| false)
    }

    /// The same, or until `ends` says so.
    fn serve_unless(&mut self, page: PageNo, ends: impl Fn(&Sim) -> bool) -> bool {
        let access = Access::Write(self.guest.new_value());
        for _ in 0..SERVE_MAX {
            if self.guest.awake[0] && self.access(0, page, access) {
                self.guest.vcpus[0] = None;
                return true;
            }
            self.trace.now += 1;
            self.deliver_faults();
            self.complete_io();
            if self.random.one_in(8) {
                self.tick();
                self.give_up_hopeless();
            }
            self.check();
            if self.oracle.starved || ends(self) {
                return false;
            }
        }
        self.trace.suspect.set(Some(page));
        panic!("{page} is held up by a tier that is not its own");
    }

    /// No more trouble: everything asked is answered, every vCPU goes on, every page is where it can stay.
    fn settle(&mut self) {
        self.odds = Odds::default();
        self.disk.bad_writes = None;
        self.disk.trouble = [None; TIERS_MAX];
        self.guest.paused = false;
        self.settle_full();
        self.disk.room = u64::from(u32::MAX);
        if self.random.one_in(2) {
            // Otherwise it is tried again in its own time.
            self.ask(Request::RetryStore, Asked::Other);
        }
        if self.session.is_some() {
            self.settle_receiving();
        }
        while !self.oracle.held.is_empty() {
            self.release();
        }
        self.settle_pinned();
        for _ in 0..SETTLE_MAX {
            if self.is_at_rest() {
                return self.settle_budget();
            }
            self.go_on();
        }
        let stuck = |page: &PageNo| {
            matches!(self.core.table().state(*page), PageState::Leaving | PageState::Arriving)
        };
        self.trace.suspect.set((0..self.pages).map(PageNo).find(stuck));
        panic!(
            "not at rest: awake {:?} at {:?}, starved {}, {} operations in flight, asked {:?}, {:?}",
            self.guest.awake,
            self.guest.vcpus,
            self.oracle.starved,
            self.disk.flights.len(),
            self.asked,
            self.core.table(),
        );
    }

    /// A store stays full only if all room that there is has what is needed.
    fn settle_full(&mut self) {
        if self.session.is_some() || !self.is_any_full() || self.disk.keeps_all {
            return;
        }
        while !self.oracle.held.is_empty() {
            self.release();
        }
        for _ in 0..FULL_STEPS {
            self.go_on();
        }
        if self.is_any_full() {
            self.check_copies();
        }
    }

    /// Those that pages are read from.
    fn all_tiers(&self) -> impl Iterator<Item = TierId> + use<> {
        (0..self.tiers).map(TierId).chain(self.has_origin.then_some(TierId::ORIGIN))
    }

    fn is_any_full(&self) -> bool {
        (0..self.tiers).any(|tier| self.core.is_full(TierId(tier)))
    }

    fn go_on(&mut self) {
        self.trace.now += 1;
        self.deliver_faults();
        self.complete_io();
        self.walk();
        self.tick();
        self.give_up_hopeless();
    }

    /// A page that nobody can tell to be lost is waited for until the guest gives it back.
    fn give_up_hopeless(&mut self) {
        let waits = |(vcpu, awake): (Option<(PageNo, Access)>, bool)| Some(vcpu?.0).filter(|_| !awake);
        let waiting: Vec<_> = self.guest.vcpus.into_iter().zip(self.guest.awake).filter_map(waits).collect();
        if let Some(page) = waiting.into_iter().find(|page| self.is_hopeless(*page)) {
            self.given_back(Run::one(page));
        }
    }

    /// While pages are pinned for good: whoever asked something has an answer, and a guest that waits for a frame in
    /// vain is told of.
    fn settle_pinned(&mut self) {
        if !self.kernel.is_anything_pinned_for_good() {
            return;
        }
        // A late write may end at the very last of them: from then on it takes the core some ticks to see that nothing
        // leaves.
        let (mut steps, mut quiet) = (0, 0);
        while steps < PINNED_STEPS || (1..QUIET_STEPS).contains(&quiet) {
            self.go_on();
            steps += 1;
            quiet = if self.disk.flights.is_empty() { quiet + 1 } else { 0 };
        }
        let waits = self.core.faults_waiting() > 0 && self.disk.flights.is_empty();
        assert!(!waits || self.oracle.short, "the guest waits for a frame, and nobody has been told");
        let asked = &self.asked;
        assert!(asked.is_empty() || !self.disk.flights.is_empty(), "pinned pages keep {asked:?} waiting");
        self.trace.note("all pins end", 0);
        self.kernel.unpin_all();
    }

    /// What was pinned leaves after all.
    fn settle_budget(&mut self) {
        self.ask(Request::SetBudget(bytes_of(BUDGET_MIN)), Asked::Budget);
        for _ in 0..SETTLE_MAX {
            if self.core.frames_taken() <= BUDGET_MIN && self.is_at_rest() {
                return;
            }
            self.go_on();
        }
        panic!("{} frames instead of {BUDGET_MIN}, and nothing is pinned", self.core.frames_taken());
    }

    fn is_at_rest(&self) -> bool {
        let moving = [PageState::Leaving, PageState::Arriving].map(|state| self.core.table().count(state));
        moving == [0, 0]
            && self.guest.awake.iter().all(|awake| *awake)
            && self.core.faults_waiting() == 0
            && !self.oracle.starved
            && !self.oracle.short
            && self.oracle.silent.iter().all(|(_, told)| !told)
            && self.disk.flights.is_empty()
            && !self.core.has_dead_places()
            && self.kernel.faults.is_empty()
            && self.asked.is_empty()
    }

    /// Every page is as the guest left it, or lost for a reason.
    fn read_everything(&mut self) {
        self.guest.vcpus = [None; guest::VCPUS];
        for page in self.memory.clone() {
            for _ in 0..SETTLE_MAX {
                if self.guest.awake[0] && self.access(0, page, Access::Read) {
                    break;
                }
                self.trace.now += 1;
                self.deliver_faults();
                self.complete_io();
                if self.random.one_in(8) {
                    self.tick();
                    self.give_up_hopeless();
                }
            }
            self.guest.vcpus[0] = None;
            self.trace.suspect.set(Some(page));
            assert!(self.guest.awake[0], "{page} is waited for without end");
            self.trace.suspect.set(None);
        }
        self.check();
    }
}
