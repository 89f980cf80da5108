//! The least traffic that jobs need: the optimum's reads and writes, cut into lanes of operations.
//!
//! A lane is one thread of a job. Lanes take turns, an operation each, for as long as the job is (passes), or for
//! [`TOUCHES`] in all (a time: the lane then begins again). What a timed job's warm-up needs is not part of it, and touches behind its
//! last one keep the optimum from knowing of an end.

use swapd::{Run, units::pages_in};

use crate::job::{Job, Length, Order, Scenario};
use crate::optimum::{Traffic, optimum};
use crate::pattern::Pattern;
use crate::worker::hindsight::{coded, warm};

/// Touches that stand for a timed run, of all lanes together.
const TOUCHES: u64 = 4 << 20;
/// Before and behind them, in passes: until the optimum's residents depend neither on what was filled last nor on the end. What it
/// keeps is what comes again within as many touches as have a RAM's worth of different pages: several passes, if they are random.
const AROUND_SEQUENTIAL: u64 = 1;
const AROUND_RANDOM: u64 = 4;
const TOUCHES_AROUND: u64 = 4 * TOUCHES;
/// Of a run by passes: beyond that it would take minutes to plan.
const TOUCHES_MAX: u64 = 64 << 20;
/// Pages in one read or write at most: 256 KiB.
pub(super) const JOINED_PAGES: u32 = 64;
/// Reads that a predictable job has under way at most, all its lanes together. More of them only stand in each other's way: with 16,
/// sequential rewriting is a tenth slower.
const READS_AHEAD: u32 = 4;

/// One read or write of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Operation {
    pub(super) run: Run,
    pub(super) write: bool,
    /// Touches of its lane that are done with it.
    pub(super) touches: u64,
}

#[derive(Debug)]
pub(super) struct Lane {
    /// Index of the job.
    pub(super) job: usize,
    pub(super) operations: Vec<Operation>,
    /// Touches that all operations stand for.
    pub(super) touches: u64,
    /// Reads under way at a time.
    pub(super) depth: u32,
    /// Begins again at its end, until time is over.
    pub(super) cycles: bool,
}

impl Lane {
    /// Pages read, or written.
    fn pages(&self, write: bool) -> u64 {
        let of = self.operations.iter().filter(|operation| operation.write == write);
        of.map(|operation| u64::from(operation.run.len)).sum()
    }
}

#[derive(Debug)]
pub(super) struct Plan {
    pub(super) lanes: Vec<Lane>,
    /// The optimum's, of the touches that count.
    pub(super) hit_rate: Option<f64>,
}

/// A lane while its touches are made.
struct Draft {
    pattern: Pattern,
    /// Operations before those that count, of those, and behind them.
    warm: u64,
    counted: u64,
    behind: u64,
}

impl Draft {
    fn new(job: &Job, area: Run, thread: u32, lanes: u64) -> Draft {
        let pattern = Pattern::new(job, area, thread);
        let pass = pattern.pass_operations();
        let unit = (job.block_bytes / 4096).max(1);
        let share = |touches: u64| (touches / lanes / unit).max(1);
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

/// None if the jobs have too many touches to plan.
pub(super) fn plan(scenario: &Scenario, areas: &[Run]) -> Option<Plan> {
    let lanes: u64 = scenario.jobs.iter().map(|job| u64::from(job.threads)).sum();
    let mut drafts = Vec::new();
    let mut plans = Vec::new();
    for (index, (job, area)) in scenario.jobs.iter().zip(areas).enumerate() {
        for thread in 0..job.threads {
            drafts.push(Draft::new(job, *area, thread, lanes));
            plans.push(Lane {
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
        plans.iter().map(|lane| Builder::new(&scenario.jobs[lane.job])).collect();
    let mut seen = 0;
    // How far every lane has come; what is told comes in the order of the touches.
    let mut tell = |traffic: Option<Traffic>| {
        let until = traffic.map_or(origins.len(), |traffic| traffic.at + 1);
        for origin in &origins[seen..until] {
            builders[origin.lane as usize].touches += u64::from(origin.counts);
        }
        seen = until;
        if let Some(Traffic { at, page, write }) = traffic
            && origins[at].counts
        {
            builders[origins[at].lane as usize].add(page, write);
        }
    };
    let frames = pages_in(scenario.ram_bytes) as usize;
    optimum(&touches, &warm(&scenario.jobs, areas), frames, 0, |traffic| tell(Some(traffic)));
    tell(None);
    for (lane, builder) in plans.iter_mut().zip(builders) {
        lane.touches = builder.touches;
        lane.operations = builder.finished();
    }
    let touches: u64 = plans.iter().map(|lane| lane.touches).sum();
    let misses: u64 = plans.iter().map(|lane| lane.pages(false)).sum();
    let hit_rate = (touches > 0).then(|| 1.0 - misses as f64 / touches as f64);
    Some(Plan { lanes: plans, hit_rate })
}

/// Whose touch it is.
struct Origin {
    lane: u16,
    counts: bool,
}

fn merged(drafts: &mut [Draft]) -> (Vec<u32>, Vec<Origin>) {
    let (mut touches, mut origins) = (Vec::new(), Vec::new());
    let rounds = drafts.iter().map(Draft::operations).max().unwrap_or(0);
    for round in 0..rounds {
        for (lane, draft) in (0..).zip(drafts.iter_mut()).filter(|(_, draft)| round < draft.operations()) {
            let counts = (draft.warm..draft.warm + draft.counted).contains(&round);
            loop {
                let touch = draft.pattern.next_touch();
                touches.push(coded(touch));
                origins.push(Origin { lane, counts });
                if touch.ends {
                    break;
                }
            }
        }
    }
    (touches, origins)
}

/// Joins traffic of neighbouring pages: writes always, reads where they can be known ahead.
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
                // Which touches it stands for is told at the end.
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

/// Touches stand evenly behind the traffic. The optimum of a loop misses half a round and hits the other half: a run that ends within
/// a round would otherwise count what it happened to meet.
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

    fn planned(scenario: &Scenario) -> Plan {
        plan(scenario, &[Run::new(PageNo(0), 1024)]).unwrap()
    }

    #[test]
    fn a_loop_reads_what_does_not_fit_in_long_runs() {
        let plan = planned(&scenario(Order::Sequential, 1, Access::Read, Length::Loops(8)));
        let lane = &plan.lanes[0];
        assert_eq!((lane.touches, lane.depth, lane.cycles), (8 * 1024, READS_AHEAD, false));
        // The first pass finds half of it; every frame but one is kept for the next.
        let read = lane.pages(false);
        assert!((8 * 512 - 64..8 * 513 + 64).contains(&read), "{read}");
        let reads = lane.operations.iter().filter(|operation| !operation.write).count() as u64;
        assert!(reads < read / 16, "{reads} reads of {read} pages");
        // Wherever it is stopped, it has done as large a part of the touches as of the traffic.
        let first = &lane.operations[0];
        let part = u64::from(first.run.len) * lane.touches / (read + lane.pages(true));
        assert_eq!(first.touches, part);
        assert!(lane.operations.is_sorted_by_key(|operation| operation.touches));
        assert_eq!(lane.operations.last().map(|operation| operation.touches), Some(lane.touches));
    }

    #[test]
    fn random_reads_are_single_pages_a_lane_at_a_time() {
        let plan = planned(&scenario(Order::Uniform, 4, Access::Write, Length::Loops(16)));
        assert_eq!(plan.lanes.len(), 4);
        for lane in &plan.lanes {
            assert_eq!((lane.touches, lane.depth), (4 * 1024, 1));
            assert!(lane.operations.iter().all(|operation| operation.write || operation.run.len == 1));
            assert!(lane.operations.iter().any(|operation| operation.write));
        }
        let read: u64 = plan.lanes.iter().map(|lane| lane.pages(false)).sum();
        let hit_rate = 1.0 - read as f64 / (16.0 * 1024.0);
        assert!((plan.hit_rate.unwrap() - hit_rate).abs() < 1e-9 && hit_rate > 0.6, "{hit_rate}");
    }

    #[test]
    fn timed_jobs_are_planned_without_their_warm_up() {
        let plan = planned(&scenario(Order::Sequential, 2, Access::Write, Length::Millis(1)));
        for lane in &plan.lanes {
            assert_eq!((lane.touches, lane.cycles, lane.depth), (TOUCHES / 2, true, READS_AHEAD / 2));
            let (read, written) = (lane.pages(false), lane.pages(true));
            assert!(read.abs_diff(lane.touches / 2) < lane.touches / 100, "{read}");
            assert!(read.abs_diff(written) <= lane.touches / 100, "{read} {written}");
        }
    }
}
