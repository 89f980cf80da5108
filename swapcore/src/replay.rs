//! The real core on a list of touches: what the policies make of it, without a guest, memory or a disk.
//!
//! Time is counted in touches: a hit takes one, and who misses waits for as many as a read takes. So the same touches
//! give the same result everywhere, at millions of touches a second. Content is a version number a page: what the core
//! is told about a page that leaves is the truth about whether it changed. Correctness is the simulation's business
//! (`sim/`): nothing fails here, and nothing but waiting for ever is checked.

use std::collections::VecDeque;

use crate::core::{Action, Core, CoreConfig, DropResult, Event, IoId, PageOut};
use crate::stats::Stats;
use crate::table::PageState;
use crate::units::{BLOCK_PAGES, PageNo, Run, SlotRun};

/// How time passes, in touches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pace {
    /// From a read's or write's start to its end. Any number may be under way at once.
    pub io: u64,
    /// Between two of the core's ticks.
    pub tick: u64,
}

/// What has happened so far. Two of them can be subtracted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Touches of the guest, hits and misses.
    pub touches: u64,
    /// Touches that the engine did not see.
    pub hits: u64,
    /// Faults at the first touch of a page, served without a read.
    pub faults_zero: u64,
    /// Faults served from staging, without a read.
    pub faults_rescue: u64,
    /// Faults that waited for a read.
    pub faults_store: u64,
    /// Pages read because a vCPU waited for them.
    pub read_demand: u64,
    /// Pages read ahead of any touch.
    pub read_prefetch: u64,
    /// Pages written to the store. A page that leaves unchanged is not written.
    pub written: u64,
}

impl Counts {
    /// All pages read, on demand and ahead of it.
    pub fn pages_read(&self) -> u64 {
        self.read_demand + self.read_prefetch
    }

    /// What has happened since `earlier`, which must be an earlier count of the same replay: else the differences
    /// overflow.
    #[must_use]
    pub fn since(&self, earlier: &Counts) -> Counts {
        Counts {
            touches: self.touches - earlier.touches,
            hits: self.hits - earlier.hits,
            faults_zero: self.faults_zero - earlier.faults_zero,
            faults_rescue: self.faults_rescue - earlier.faults_rescue,
            faults_store: self.faults_store - earlier.faults_store,
            read_demand: self.read_demand - earlier.read_demand,
            read_prefetch: self.read_prefetch - earlier.read_prefetch,
            written: self.written - earlier.written,
        }
    }
}

/// How often who misses may be woken in vain.
const ROUNDS_MAX: u32 = 10_000;

/// A read or write under way.
#[derive(Debug)]
struct Flight {
    due: u64,
    io: IoId,
    /// None: a write.
    read: Option<Run>,
}

/// A core, and the world as far as it needs one.
#[derive(Debug)]
pub struct Replay {
    core: Core,
    pace: Pace,
    now: u64,
    next_tick: u64,
    /// In order of their ends, for all take the same time.
    flights: VecDeque<Flight>,
    /// Writes to each page so far: its content. 0 is all zeros.
    versions: Vec<u32>,
    touches: u64,
    hits: u64,
    pages_read: u64,
    pages_written: u64,
    /// Kept between events.
    page_outs: Vec<PageOut>,
    sums: Vec<u64>,
}

impl Replay {
    /// # Panics
    /// As [`Core::new`].
    pub fn new(config: CoreConfig, pace: Pace) -> Self {
        Replay {
            core: Core::new(config),
            pace,
            now: 0,
            next_tick: pace.tick,
            flights: VecDeque::new(),
            versions: vec![0; config.pages as usize],
            touches: 0,
            hits: 0,
            pages_read: 0,
            pages_written: 0,
            page_outs: Vec::new(),
            sums: Vec::new(),
        }
    }

    /// A guest's read or write of a page; the guest stands still until the page is there.
    ///
    /// # Panics
    /// If the page is beyond the memory, or the core leaves it waiting with nothing under way.
    pub fn touch(&mut self, page: PageNo, write: bool) {
        self.now += 1;
        self.touches += 1;
        self.catch_up();
        if self.core.table().state(page) == PageState::Resident {
            self.hits += 1;
        } else {
            self.miss(page);
        }
        self.versions[page.index()] += u32::from(write);
    }

    /// What was counted since the start.
    pub fn counts(&self) -> Counts {
        let stats = self.stats();
        Counts {
            touches: self.touches,
            hits: self.hits,
            faults_zero: stats.faults.zero,
            faults_rescue: stats.faults.rescue,
            faults_store: stats.faults.store,
            read_demand: self.pages_read - stats.prefetch.pages,
            read_prefetch: stats.prefetch.pages,
            written: self.pages_written,
        }
    }

    /// The core's own figures.
    pub fn stats(&self) -> Stats {
        self.core.stats()
    }

    /// The core that is driven, to look at.
    pub fn core(&self) -> &Core {
        &self.core
    }

    fn miss(&mut self, page: PageNo) {
        let mut rounds = 0;
        while self.core.table().state(page) != PageState::Resident {
            rounds += 1;
            assert!(rounds < ROUNDS_MAX, "{page} leaves again and again before it can be touched");
            // Woken, and the page has left again before the guest could touch it: it faults anew.
            if self.core.faults_waiting() == 0 {
                self.event(Event::Fault(page));
            } else {
                let due = self.flights.front().map(|flight| flight.due);
                let due = due.unwrap_or_else(|| panic!("{page} is waited for, and nothing is under way"));
                self.now = self.now.max(due);
            }
            self.catch_up();
        }
    }

    /// All that is due by now.
    fn catch_up(&mut self) {
        while self.flights.front().is_some_and(|flight| flight.due <= self.now) {
            let flight = self.flights.pop_front().expect("there is one");
            self.io_done(&flight);
        }
        while self.next_tick <= self.now {
            self.next_tick += self.pace.tick;
            self.event(Event::Tick { ticks: 1 });
        }
    }

    fn io_done(&mut self, flight: &Flight) {
        let io = flight.io;
        let Some(run) = flight.read else { return self.event(Event::WriteDone { io, result: Ok(()) }) };
        let mut sums = std::mem::take(&mut self.sums);
        sums.clear();
        sums.extend(run.pages().map(|page| self.sum_of(page)));
        self.event(Event::ReadDone { io, result: Ok(&sums) });
        self.sums = sums;
    }

    /// Nobody changes a page between its way out and its way in: one version is enough for the guest and the store.
    fn sum_of(&self, page: PageNo) -> u64 {
        page.0 << 32 ^ u64::from(self.versions[page.index()])
    }

    fn event(&mut self, event: Event<'_>) {
        self.core.handle(event);
        self.perform();
        self.core.make_ready();
        self.perform();
    }

    /// Does what the core wants, until it wants no more.
    fn perform(&mut self) {
        while let Some(action) = self.core.next_action() {
            match action {
                Action::MoveIn { run, slots } => {
                    self.core.handle(Event::MovedIn { run, slots, moved: run.len });
                }
                Action::CopyIn { page, slot } => {
                    self.core.handle(Event::CopiedIn { page, slot, copied: true });
                }
                Action::MoveOut { run, slots, .. } => self.move_out(run, slots),
                Action::Collapse { run } => {
                    for start in (0..run.len).step_by(BLOCK_PAGES as usize) {
                        let block = run.part(start, BLOCK_PAGES);
                        self.core.handle(Event::Collapsed { block, huge: true });
                    }
                }
                Action::FillBlock { run } => self.core.handle(Event::Filled { run, huge: true }),
                Action::Read { io, run, .. } => {
                    self.pages_read += u64::from(run.len);
                    self.flights.push_back(Flight { due: self.now + self.pace.io, io, read: Some(run) });
                }
                Action::Drop { io, .. } => {
                    self.core.handle(Event::DropDone { io, result: DropResult::Done, took_us: 0 });
                }
                Action::Write { io, run, .. } => {
                    self.pages_written += u64::from(run.len);
                    self.flights.push_back(Flight { due: self.now + self.pace.io, io, read: None });
                }
                // Frames and their contents are not modelled, and nobody asks for anything.
                _ => {}
            }
        }
    }

    fn move_out(&mut self, run: Run, slots: SlotRun) {
        let mut pages = std::mem::take(&mut self.page_outs);
        pages.clear();
        pages.extend(
            run.pages().map(|page| PageOut::Moved {
                sum: self.sum_of(page),
                zero: self.versions[page.index()] == 0,
            }),
        );
        self.core.handle(Event::MovedOut { run, slots, pages: &pages });
        self.page_outs = pages;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::WalkStep;
    use proptest::prelude::*;

    fn replay(pages: u64, frames: u64, io: u64) -> Replay {
        let config = CoreConfig {
            pages,
            budget_frames: frames,
            budget_min: 48,
            slots: 128,
            blocks: 2,
            sampling: true,
            walk: WalkStep::default(),
        };
        Replay::new(config, Pace { io, tick: 1000 })
    }

    #[test]
    fn within_the_budget_nothing_is_read_or_written() {
        let mut replay = replay(1000, 1000, 0);
        (0..10).for_each(|_| (0..1000).for_each(|page| replay.touch(PageNo(page), true)));
        let counts = replay.counts();
        assert_eq!((counts.touches, counts.pages_read(), counts.written), (10_000, 0, 0));
        assert_eq!(counts.touches, counts.hits + counts.faults_zero + counts.faults_rescue);
    }

    #[test]
    fn clean_pages_are_not_written_again() {
        let mut replay = replay(1000, 500, 0);
        (0..1000).for_each(|page| replay.touch(PageNo(page), true));
        for _ in 0..3 {
            (0..1000).for_each(|page| replay.touch(PageNo(page), false));
        }
        let counts = replay.counts();
        assert!((500..=1000).contains(&counts.written), "{counts:?}");
        assert!(counts.pages_read() >= 3 * 500, "{counts:?}");
    }

    #[test]
    fn the_same_touches_give_the_same_counts() {
        let run = || {
            let mut replay = replay(1000, 400, 30);
            (0..50_000u64).for_each(|n| replay.touch(PageNo(n * n % 1000), n % 3 == 0));
            replay.counts()
        };
        assert_eq!(run(), run());
    }

    /// Touches at random.
    fn touch_any(replay: &mut Replay, random: &mut u64, pages: u64, touches: u64) -> Counts {
        let before = replay.counts();
        for _ in 0..touches {
            *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            replay.touch(PageNo((*random >> 33) % pages), false);
        }
        replay.counts().since(&before)
    }

    /// A working set that fits takes the place of pages that nobody touches any more: after memory has been filled, and
    /// after the guest was all over it, when what had left did not pay.
    #[test]
    fn a_working_set_that_changes_is_soon_in_ram() {
        let (pages, frames) = (1 << 15, 3 << 13);
        let config = CoreConfig {
            pages,
            budget_frames: frames,
            budget_min: 4096,
            slots: crate::core::staging_slots(pages),
            blocks: 2,
            sampling: true,
            walk: WalkStep::default(),
        };
        // 10 877 and 3705 waits; 14 402 and 5754 if what has not proved itself always leaves.
        for (before, waits_most) in [(0, 12_500), (8 * pages, 4700)] {
            let mut replay = Replay::new(config, Pace { io: 0, tick: 4000 });
            (0..pages).for_each(|page| replay.touch(PageNo(page), true));
            let mut random = 7;
            touch_any(&mut replay, &mut random, pages, before);
            // Half of the memory, two thirds of the budget.
            let set = pages / 2;
            let new = touch_any(&mut replay, &mut random, set, 4 * set);
            let settled = touch_any(&mut replay, &mut random, set, set);
            assert!(new.faults_store < waits_most, "{before}: {new:?}");
            assert!(settled.faults_store < set / 100, "{before}: {settled:?}");
        }
    }

    /// Walks and random touches in the smallest budget that a VM can have.
    #[test]
    fn a_small_vm_is_served() {
        let slots = crate::core::staging_slots(12_000);
        let config = CoreConfig {
            pages: 12_000,
            budget_frames: 4096,
            budget_min: 4096,
            slots,
            blocks: 2,
            sampling: true,
            walk: WalkStep::default(),
        };
        for io in [0, 7, 300] {
            let mut replay = Replay::new(config, Pace { io, tick: 1000 });
            let mut random = 1u64;
            for step in 0..400_000u64 {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let page = match step % 4 {
                    0 => step / 4 % 12_000,
                    1 => 11_999 - step / 4 % 12_000,
                    2 => step * 3 % 12_000,
                    _ => (random >> 33) % 12_000,
                };
                replay.touch(PageNo(page), random & 1 == 0);
            }
            replay.core().check();
        }
    }

    proptest! {
        /// Whatever is touched, and however long the disk takes, everybody gets his page and the books agree.
        #[test]
        fn everybody_is_served(
            touches in prop::collection::vec((0u64..600, any::<bool>()), 1..3000), io in 0u64..300, frames in 64u64..300
        ) {
            let mut replay = replay(600, frames, io);
            for (page, write) in &touches {
                replay.touch(PageNo(*page), *write);
                prop_assert_eq!(replay.core().table().state(PageNo(*page)), PageState::Resident);
            }
            replay.core().check();
            let counts = replay.counts();
            prop_assert_eq!(counts.touches, touches.len() as u64);
            prop_assert!(replay.core().frames_taken() <= frames);
            prop_assert_eq!(replay.stats().store.checksum_mismatches, 0);
        }
    }
}
