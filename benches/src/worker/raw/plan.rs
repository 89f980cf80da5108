//! The least device traffic that jobs need: the reads and writes of Belady's optimum, as a list of operations for
//! each thread of each job.
//!
//! A planned thread is one thread of a job. Planned threads take turns, one operation each. A job of so many passes
//! is planned whole. Of a job that runs for a time, [`TOUCHES`] touches are planned for all threads together, and a
//! thread that comes to the end of its list begins again. The optimum is computed over more touches than are planned:
//! those before them are the job's warm-up, and those after them keep the optimum from evicting everything because it
//! sees the end.

use swapd::{Run, units::pages_in};

use crate::job::{Job, Length, Order, Scenario};
use crate::optimum::{Traffic, optimum};
use crate::pattern::Pattern;
use crate::worker::hindsight::{coded, warm};

/// Touches that stand for a timed run, of all threads together.
const TOUCHES: u64 = 4 << 20;
/// Passes over the working set that the optimum sees before and after the planned touches. With fewer, the pages that
/// it has in RAM would depend on what was filled last, or on where the touches end. It keeps pages that come again
/// within as many touches as name a RAM's worth of different pages; with random touches those are several passes.
const AROUND_SEQUENTIAL: u64 = 1;
const AROUND_RANDOM: u64 = 4;
const TOUCHES_AROUND: u64 = 4 * TOUCHES;
/// Most touches of a job of so many passes: more would take minutes to plan.
const TOUCHES_MAX: u64 = 64 << 20;
/// Pages in one read or write at most: 256 KiB.
pub(super) const JOINED_PAGES: u32 = 64;
/// Most reads that a sequential job has under way, all its threads together. More of them slow each other down: with
/// 16, sequential rewriting is a tenth slower.
const READS_AHEAD: u32 = 4;

/// One read or write of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Operation {
    pub(super) run: Run,
    pub(super) write: bool,
    /// Touches of its thread that are done when this operation is.
    pub(super) touches: u64,
}

/// What one thread of a job asks of the device.
#[derive(Debug)]
pub(super) struct PlannedThread {
    /// Index of the job.
    pub(super) job: usize,
    pub(super) operations: Vec<Operation>,
    /// Touches that all operations stand for.
    pub(super) touches: u64,
    /// Reads under way at a time.
    pub(super) depth: u32,
    /// After its last operation it begins with the first again, until the job's time is over.
    pub(super) cycles: bool,
}

impl PlannedThread {
    /// Pages read, or written.
    fn pages(&self, write: bool) -> u64 {
        let of = self.operations.iter().filter(|operation| operation.write == write);
        of.map(|operation| u64::from(operation.run.len)).sum()
    }
}

/// What all jobs ask of the device.
#[derive(Debug)]
pub(super) struct DevicePlan {
    pub(super) threads: Vec<PlannedThread>,
    /// The optimum's hit rate over the planned touches; none if there are none.
    pub(super) hit_rate: Option<f64>,
}

/// A planned thread before the optimum has been computed: its pattern, and how many operations of it the optimum sees.
struct Draft {
    pattern: Pattern,
    /// Operations before the planned ones, the planned ones, and those after them.
    warm: u64,
    counted: u64,
    behind: u64,
}

impl Draft {
    fn new(job: &Job, area: Run, thread: u32, thread_count: u64) -> Draft {
        let pattern = Pattern::new(job, area, thread);
        let pass = pattern.pass_operations();
        let unit = (job.block_bytes / 4096).max(1);
        let share = |touches: u64| (touches / thread_count / unit).max(1);
        let passes = if job.order == Order::Sequential { AROUND_SEQUENTIAL } else { AROUND_RANDOM };
        let around = (passes * pass).min(share(TOUCHES_AROUND));
        let (warm, counted, behind) = match job.length {
            Length::Millis(_) => (around, share(TOUCHES), around),
            Length::Loops(loops) => (0, loops * pass, 0),
        };
        Draft { pattern, warm, counted, behind }
    }

    fn operations(&self) -> u64 {
        self.warm + self.counted + self.behind
    }
}

/// The device traffic of these jobs, each in its area. None if they have more than [`TOUCHES_MAX`] touches.
pub(super) fn plan(scenario: &Scenario, areas: &[Run]) -> Option<DevicePlan> {
    let thread_count: u64 = scenario.jobs.iter().map(|job| u64::from(job.threads)).sum();
    let mut drafts = Vec::new();
    let mut threads = Vec::new();
    for (index, (job, area)) in scenario.jobs.iter().zip(areas).enumerate() {
        for thread in 0..job.threads {
            drafts.push(Draft::new(job, *area, thread, thread_count));
            threads.push(PlannedThread {
                job: index,
                operations: Vec::new(),
                touches: 0,
                depth: match job.order {
                    Order::Sequential => (READS_AHEAD / job.threads).max(1),
                    Order::Uniform | Order::Zipf(_) => 1,
                },
                cycles: matches!(job.length, Length::Millis(_)),
            });
        }
    }
    let all: u64 = drafts.iter().map(|draft| draft.operations()).sum();
    if all > TOUCHES_MAX {
        return None;
    }
    let (touches, origins) = merged(&mut drafts);
    let mut builders: Vec<Builder> =
        threads.iter().map(|thread| Builder::new(&scenario.jobs[thread.job])).collect();
    let mut seen = 0;
    // Gives each thread the touches up to this transfer, and the transfer to the thread whose touch caused it. The
    // optimum reports transfers in the order of the touches.
    let mut tell = |traffic: Option<Traffic>| {
        let until = traffic.map_or(origins.len(), |traffic| traffic.at + 1);
        for origin in &origins[seen..until] {
            builders[origin.thread as usize].touches += u64::from(origin.counts);
        }
        seen = until;
        if let Some(Traffic { at, page, write }) = traffic
            && origins[at].counts
        {
            builders[origins[at].thread as usize].add(page, write);
        }
    };
    let frames = pages_in(scenario.ram_bytes) as usize;
    optimum(&touches, &warm(&scenario.jobs, areas), frames, 0, |traffic| tell(Some(traffic)));
    tell(None);
    for (thread, builder) in threads.iter_mut().zip(builders) {
        thread.touches = builder.touches;
        thread.operations = builder.finished();
    }
    let touches: u64 = threads.iter().map(|thread| thread.touches).sum();
    let misses: u64 = threads.iter().map(|thread| thread.pages(false)).sum();
    let hit_rate = (touches > 0).then(|| 1.0 - misses as f64 / touches as f64);
    Some(DevicePlan { threads, hit_rate })
}

/// Where one of the merged touches comes from.
struct Origin {
    thread: u16,
    /// It is one of the planned touches, and neither before nor after them.
    counts: bool,
}

/// The touches of all threads, one operation of each thread in turn, and where each comes from.
fn merged(drafts: &mut [Draft]) -> (Vec<u32>, Vec<Origin>) {
    let (mut touches, mut origins) = (Vec::new(), Vec::new());
    let rounds = drafts.iter().map(Draft::operations).max().unwrap_or(0);
    for round in 0..rounds {
        for (thread, draft) in (0..).zip(drafts.iter_mut()).filter(|(_, draft)| round < draft.operations()) {
            let counts = (draft.warm..draft.warm + draft.counted).contains(&round);
            loop {
                let touch = draft.pattern.next_touch();
                touches.push(coded(touch));
                origins.push(Origin { thread, counts });
                if touch.ends {
                    break;
                }
            }
        }
    }
    (touches, origins)
}

/// A planned thread's operations in the making. Transfers of neighbouring pages are joined into one operation: writes
/// always, reads only of sequential jobs, because nobody could know the next page of a random one ahead.
struct Builder {
    read_pages: u32,
    touches: u64,
    read: Option<Operation>,
    write: Option<Operation>,
    done: Vec<Operation>,
}

impl Builder {
    fn new(job: &Job) -> Builder {
        let read_pages = if job.order == Order::Sequential { JOINED_PAGES } else { 1 };
        Builder { read_pages, touches: 0, read: None, write: None, done: Vec::new() }
    }

    fn add(&mut self, page: u32, write: bool) {
        let page = swapd::PageNo(u64::from(page));
        let (open, most) =
            if write { (&mut self.write, JOINED_PAGES) } else { (&mut self.read, self.read_pages) };
        match open {
            Some(operation) if operation.run.end() == page && operation.run.len < most => {
                operation.run.len += 1;
            }
            _ => {
                // `spread` fills in the touches.
                let new = Operation { run: Run::one(page), write, touches: 0 };
                self.done.extend(open.replace(new));
            }
        }
    }

    fn finished(mut self) -> Vec<Operation> {
        self.done.extend(self.read);
        self.done.extend(self.write);
        spread(&mut self.done, self.touches);
        self.done
    }
}

/// Gives each operation its share of all touches, by its pages. The optimum of a loop misses in one half of a round
/// and hits in the other, so a run that ends in the middle of a round would otherwise count misses alone, or hits
/// alone.
fn spread(operations: &mut [Operation], touches: u64) {
    let all: u64 = operations.iter().map(|operation| u64::from(operation.run.len)).sum();
    let mut pages = 0;
    for operation in operations {
        pages += u64::from(operation.run.len);
        operation.touches = touches * pages / all;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Access;
    use swapd::PageNo;

    fn scenario(order: Order, threads: u32, access: Access, length: Length) -> Scenario {
        let job = Job {
            name: "job".into(),
            size_bytes: 1024 << 12,
            working_set_bytes: 1024 << 12,
            access,
            read_percent: 50,
            order,
            stride_pages: 1,
            block_bytes: 4096,
            threads,
            length,
            ramp_ms: 0,
            prefill: true,
            seed: 1,
        };
        Scenario {
            name: "s".into(),
            description: String::new(),
            ram_bytes: 512 << 12,
            engines: vec![],
            store: None,
            encrypt: false,
            jobs: vec![job],
        }
    }

    fn planned(scenario: &Scenario) -> DevicePlan {
        plan(scenario, &[Run::new(PageNo(0), 1024)]).unwrap()
    }

    #[test]
    fn a_loop_reads_what_does_not_fit_in_long_runs() {
        let plan = planned(&scenario(Order::Sequential, 1, Access::Read, Length::Loops(8)));
        let thread = &plan.threads[0];
        assert_eq!((thread.touches, thread.depth, thread.cycles), (8 * 1024, READS_AHEAD, false));
        // The first pass finds half of it; every frame but one is kept for the next.
        let read = thread.pages(false);
        assert!((8 * 512 - 64..8 * 513 + 64).contains(&read), "{read}");
        let reads = thread.operations.iter().filter(|operation| !operation.write).count() as u64;
        assert!(reads < read / 16, "{reads} reads of {read} pages");
        // Wherever it is stopped, it has done as large a part of the touches as of the traffic.
        let first = &thread.operations[0];
        let part = u64::from(first.run.len) * thread.touches / (read + thread.pages(true));
        assert_eq!(first.touches, part);
        assert!(thread.operations.is_sorted_by_key(|operation| operation.touches));
        assert_eq!(thread.operations.last().map(|operation| operation.touches), Some(thread.touches));
    }

    #[test]
    fn random_reads_are_single_pages_a_lane_at_a_time() {
        let plan = planned(&scenario(Order::Uniform, 4, Access::Write, Length::Loops(16)));
        assert_eq!(plan.threads.len(), 4);
        for thread in &plan.threads {
            assert_eq!((thread.touches, thread.depth), (4 * 1024, 1));
            assert!(thread.operations.iter().all(|operation| operation.write || operation.run.len == 1));
            assert!(thread.operations.iter().any(|operation| operation.write));
        }
        let read: u64 = plan.threads.iter().map(|thread| thread.pages(false)).sum();
        let hit_rate = 1.0 - read as f64 / (16.0 * 1024.0);
        assert!((plan.hit_rate.unwrap() - hit_rate).abs() < 1e-9 && hit_rate > 0.6, "{hit_rate}");
    }

    #[test]
    fn timed_jobs_are_planned_without_their_warm_up() {
        let plan = planned(&scenario(Order::Sequential, 2, Access::Write, Length::Millis(1)));
        for thread in &plan.threads {
            assert_eq!((thread.touches, thread.cycles, thread.depth), (TOUCHES / 2, true, READS_AHEAD / 2));
            let (read, written) = (thread.pages(false), thread.pages(true));
            assert!(read.abs_diff(thread.touches / 2) < thread.touches / 100, "{read}");
            assert!(read.abs_diff(written) <= thread.touches / 100, "{read} {written}");
        }
    }
}
