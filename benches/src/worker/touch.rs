//! A thread that touches memory, and what it records.
//!
//! Between touches a thread allocates nothing, but for marks after the first minute. The time of a touch is from just
//! before its first access to just after its last one; the time of an operation is from its first touch to its last.

use std::time::Duration;

use super::clock::Clock;
use super::content::{Base, Content};
use super::usage::{self, Faults};
use crate::job::{BenchEngine, Job, Length};
use crate::pattern::Pattern;
use crate::sample::Times;

/// Only touches that took longer than this may count as misses: to find out costs a system call.
const SLOW_NS: u64 = 5_000;
/// A touch of the engine's memory counts as a miss if its fault took this long: without the device a fault takes
/// less. The kernel's counts do not help, because it counts each fault that a userfaultfd serves as a minor one.
const MISS_FLOOR_NS: u64 = 25_000;
/// Time between two marks.
const MARK_NS: u64 = 1_000_000;
const MARKS_MAX: u64 = 60_000;
const MARKS_OF_LOOPS: u64 = 10_000;

/// The rule by which a slow touch counts as a miss, that is as one that waited for the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MissRule {
    Never,
    /// It had a major fault.
    MajorFault,
    /// It had a fault of any kind, and took at least [`MISS_FLOOR_NS`].
    LongFault,
}

impl MissRule {
    pub(super) fn of(engine: BenchEngine) -> MissRule {
        match engine {
            BenchEngine::Vmemd => MissRule::LongFault,
            BenchEngine::Swap => MissRule::MajorFault,
            BenchEngine::Mem | BenchEngine::Raw => MissRule::Never,
        }
    }
}

/// A mark: how many touches a thread had made by a certain time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) ticks: u64,
    pub(super) touches: u64,
    pub(super) operations: u64,
}

/// The measurements of one thread.
#[derive(Debug)]
pub(super) struct TouchRecord {
    pub(super) reads: Times,
    pub(super) writes: Times,
    pub(super) misses: Times,
    /// Marks of all phases.
    pub(super) verify_errors: u64,
    pub(super) marks: Vec<Mark>,
    /// Index of the mark with which the measured phase began.
    pub(super) measured_from: usize,
}

impl TouchRecord {
    /// Where the measured phase began and ended.
    pub(super) fn measured(&self) -> (Mark, Mark) {
        let end = self.marks.last().copied().unwrap_or_default();
        (self.marks.get(self.measured_from).copied().unwrap_or_default(), end)
    }
}

/// When to stop.
#[derive(Clone, Copy, Debug)]
struct Until {
    ticks: u64,
    operations: u64,
}

#[derive(Debug)]
pub(super) struct Toucher {
    clock: Clock,
    pattern: Pattern,
    content: Content,
    rule: MissRule,
    length: Length,
    counting: bool,
    faults: Faults,
    at: Mark,
    next_mark: u64,
    pub(super) record: TouchRecord,
}

impl Toucher {
    pub(super) fn new(
        clock: Clock,
        job: &Job,
        pattern: Pattern,
        content: Content,
        rule: MissRule,
    ) -> Toucher {
        let measured_ms = match job.length {
            Length::Millis(ms) => ms,
            Length::Loops(_) => MARKS_OF_LOOPS,
        };
        let mut marks = vec![Mark::default(); (measured_ms + job.ramp_ms).min(MARKS_MAX) as usize + 16];
        // The vectors keep this memory, and it is in RAM from now on.
        marks.clear();
        let record = TouchRecord {
            reads: Times::default(),
            writes: Times::default(),
            misses: Times::default(),
            verify_errors: 0,
            marks,
            measured_from: 0,
        };
        Toucher {
            clock,
            pattern,
            content,
            rule,
            length: job.length,
            counting: false,
            faults: Faults::default(),
            at: Mark::default(),
            next_mark: 0,
            record,
        }
    }

    /// Touches for a while without counting.
    pub(super) fn ramp(&mut self, base: Base, time: Duration) {
        self.faults = usage::thread_faults();
        self.at.ticks = Clock::ticks();
        self.mark();
        if !time.is_zero() {
            let ticks = self.at.ticks + self.clock.ticks_of(time.as_nanos() as u64);
            self.touch_until(base, Until { ticks, operations: u64::MAX });
        }
    }

    /// Touches for as long as the job says, from `start` on, and counts.
    pub(super) fn measure(&mut self, base: Base, start: u64) {
        self.counting = true;
        self.at.ticks = start;
        self.mark();
        self.record.measured_from = self.record.marks.len() - 1;
        let until = match self.length {
            Length::Millis(ms) => {
                Until { ticks: start + self.clock.ticks_of(ms * 1_000_000), operations: u64::MAX }
            }
            Length::Loops(loops) => {
                let operations = self.at.operations + loops * self.pattern.pass_operations();
                Until { ticks: u64::MAX, operations }
            }
        };
        self.touch_until(base, until);
    }

    fn mark(&mut self) {
        self.record.marks.push(self.at);
        self.next_mark = self.at.ticks + self.clock.ticks_of(MARK_NS);
    }

    fn touch_until(&mut self, base: Base, until: Until) {
        let slow = self.clock.ticks_of(SLOW_NS);
        let mut operation_began = None;
        while self.at.operations < until.operations {
            let touch = self.pattern.next_touch();
            let began = Clock::ticks();
            let right = self.content.touch(base, touch, began);
            let ended = Clock::ticks();
            self.at.ticks = ended;
            self.at.touches += 1;
            self.record.verify_errors += u64::from(!right);
            if ended - began > slow {
                self.was_slow(ended - began);
            }
            let first_began = *operation_began.get_or_insert(began);
            if !touch.ends {
                continue;
            }
            operation_began = None;
            self.at.operations += 1;
            if self.counting {
                let times = if touch.write { &mut self.record.writes } else { &mut self.record.reads };
                times.0.saturating_record(self.clock.ns(ended - first_began));
            }
            if ended >= self.next_mark {
                self.mark();
            }
            if ended >= until.ticks {
                break;
            }
        }
        self.mark();
    }

    #[cold]
    fn was_slow(&mut self, ticks: u64) {
        if self.rule == MissRule::Never {
            return;
        }
        let now = usage::thread_faults();
        let before = std::mem::replace(&mut self.faults, now);
        let ns = self.clock.ns(ticks);
        let missed = match self.rule {
            MissRule::Never => false,
            MissRule::MajorFault => now.major > before.major,
            MissRule::LongFault => ns >= MISS_FLOOR_NS && now.minor + now.major > before.minor + before.major,
        };
        if missed && self.counting {
            self.record.misses.0.saturating_record(ns);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{Access, Order};
    use migrate::PlainMemory;
    use swapd::{PageNo, Run};

    #[test]
    fn a_wrong_page_is_counted_at_every_touch() {
        let pages = 64;
        let job = Job {
            name: "job".into(),
            size_bytes: pages * 4096,
            working_set_bytes: pages * 4096,
            access: Access::Mixed,
            read_percent: 50,
            order: Order::Sequential,
            stride_pages: 3,
            block_bytes: 8192,
            threads: 1,
            length: Length::Loops(5),
            ramp_ms: 0,
            prefill: true,
            seed: 3,
        };
        let memory = PlainMemory::new(job.size_bytes).unwrap();
        let base = Base(memory.base());
        let area = Run::new(PageNo(0), pages as u32);
        let content = Content::filled(area, job.seed);
        content.fill(base);
        let pattern = Pattern::new(&job, area, 0);
        let mut toucher = Toucher::new(Clock::calibrated(), &job, pattern, content, MissRule::Never);
        toucher.ramp(base, Duration::ZERO);
        toucher.measure(base, Clock::ticks());
        assert_eq!(toucher.record.verify_errors, 0);
        // SAFETY: the first word of page 7 of the mapping.
        unsafe { memory.base().add(7 * 4096).cast::<u64>().write_volatile(1) };
        toucher.measure(base, Clock::ticks());
        assert_eq!(toucher.record.verify_errors, 5);
        let (start, end) = toucher.record.measured();
        assert_eq!((end.touches - start.touches, end.operations - start.operations), (5 * 64, 5 * 32));
        assert_eq!(toucher.record.reads.0.len() + toucher.record.writes.0.len(), 2 * 5 * 32);
    }
}
