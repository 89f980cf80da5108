//! A run of the raw device: each planned thread has reads under way, writes wait behind them, and each job's times
//! and touches are added up. One thread of this process does it all.

use std::time::{Duration, Instant};

use vmprocess::failure::{Failure, FailureKind};
use vmprocess::host;

use super::burst::{Write, WriteBehind};
use super::device::{self, Device, Transfer};
use super::plan::{self, DevicePlan, Operation, PlannedThread};
use crate::job::{Access, BenchEngine, Job, Length, Scenario, WorkerRequest};
use crate::sample::{JobSample, SERIES_MS, Sample, Side, Times};
use crate::worker::areas::areas;
use crate::worker::clock::Clock;
use crate::worker::usage;

/// Most writes under way.
const WRITES: usize = 128;
/// Longest time without any completion; then the run fails. No disk takes so long.
const PATIENCE: Duration = Duration::from_secs(60);

pub(in crate::worker) fn run(request: &WorkerRequest) -> Result<Sample, Failure> {
    let scenario = &request.scenario;
    let Some(plan) = plan::plan(scenario, &areas(scenario)) else {
        return Err(Failure::new(
            FailureKind::Usage,
            "too many touches to find their least traffic: choose fewer loops",
        ));
    };
    if plan.threads.iter().all(|thread| thread.operations.is_empty()) {
        return Err(Failure::new(
            FailureKind::Usage,
            "these jobs need no device: all that they touch fits into their RAM",
        ));
    }
    host::need_free_disk(&request.dir, scenario.memory_bytes(), 0)?;
    let fail = |error| Failure::io(format!("the raw file in {}", request.dir.display()), &error);
    let file = device::make(&request.dir, scenario.memory_bytes()).map_err(fail)?;
    let reads = plan.threads.iter().map(|thread| thread.depth as usize).sum();
    let device = Device::new(file, reads, WRITES).map_err(fail)?;
    let cpu_ns = usage::process_cpu_ns();
    let mut run = RawRun::new(scenario, device, &plan);
    run.finish().map_err(fail)?;
    let cpu_ns = usage::process_cpu_ns() - cpu_ns;
    Ok(run.sample(&plan, cpu_ns))
}

/// How far one thread of a job has come.
struct Progress<'a> {
    planned: &'a PlannedThread,
    next: usize,
    /// Touches of the times that the thread has gone through its list before.
    before: u64,
    /// The time at which the job ends, in ticks.
    deadline: u64,
    reads_under_way: u32,
    touches: u64,
    over: bool,
}

impl Progress<'_> {
    fn operation(&self) -> Option<Operation> {
        (!self.over).then(|| self.planned.operations.get(self.next).copied()).flatten()
    }

    fn advance(&mut self) {
        self.next += 1;
        if self.next < self.planned.operations.len() {
            return;
        }
        self.next = 0;
        self.before += self.planned.touches;
        self.over = !self.planned.cycles;
    }
}

/// The times and touches of one job so far.
struct Tally {
    reads: Times,
    writes: Times,
    touches: u64,
    series: Vec<u64>,
    end: u64,
}

struct RawRun<'a> {
    jobs: &'a [Job],
    clock: Clock,
    device: Device,
    start: u64,
    threads: Vec<Progress<'a>>,
    behind: WriteBehind,
    writes_under_way: usize,
    tallies: Vec<Tally>,
    pages_read: u64,
    pages_written: u64,
}

impl<'a> RawRun<'a> {
    fn new(scenario: &'a Scenario, device: Device, plan: &'a DevicePlan) -> RawRun<'a> {
        let clock = Clock::calibrated();
        let start = Clock::ticks();
        let progress = |planned: &'a PlannedThread| Progress {
            planned,
            next: 0,
            before: 0,
            deadline: match scenario.jobs[planned.job].length {
                Length::Millis(ms) => start + clock.ticks_of(ms * 1_000_000),
                Length::Loops(_) => u64::MAX,
            },
            reads_under_way: 0,
            touches: 0,
            over: planned.operations.is_empty(),
        };
        let tally = |_| Tally {
            reads: Times::default(),
            writes: Times::default(),
            touches: 0,
            series: Vec::new(),
            end: start,
        };
        RawRun {
            jobs: &scenario.jobs,
            clock,
            device,
            start,
            threads: plan.threads.iter().map(progress).collect(),
            behind: WriteBehind::default(),
            writes_under_way: 0,
            tallies: scenario.jobs.iter().map(tally).collect(),
            pages_read: 0,
            pages_written: 0,
        }
    }

    fn finish(&mut self) -> std::io::Result<()> {
        let mut done = Vec::new();
        loop {
            let now = Clock::ticks();
            for thread in 0..self.threads.len() {
                self.issue(thread, now);
            }
            self.issue_writes(now, false);
            // At the end the writes that wait make no burst, and are started all the same.
            if self.device.in_flight() == 0 {
                self.issue_writes(now, true);
            }
            if self.device.in_flight() == 0 {
                return Ok(());
            }
            let waiting = Instant::now();
            self.device.wait(PATIENCE, |transfer| done.push(transfer))?;
            if done.is_empty() && waiting.elapsed() >= PATIENCE {
                return Err(std::io::ErrorKind::TimedOut.into());
            }
            let now = Clock::ticks();
            for transfer in done.drain(..) {
                self.completed(transfer, now);
            }
        }
    }

    /// Starts operations of the thread until it may have no more under way.
    fn issue(&mut self, index: usize, now: u64) {
        let thread = &mut self.threads[index];
        thread.over |= now >= thread.deadline;
        while let Some(operation) = thread.operation() {
            let touches = thread.before + operation.touches;
            if operation.write {
                if self.behind.is_full() {
                    return;
                }
                self.behind.add(Write { thread: index, run: operation.run, touches });
            } else {
                if thread.reads_under_way >= thread.planned.depth {
                    return;
                }
                thread.reads_under_way += 1;
                let run = operation.run;
                self.device.start(Transfer { thread: index, run, write: false, touches, began: now });
            }
            thread.advance();
        }
    }

    fn issue_writes(&mut self, now: u64, all: bool) {
        while self.writes_under_way < WRITES {
            let Some(Write { thread, run, touches }) = self.behind.next(all) else { return };
            self.writes_under_way += 1;
            self.device.start(Transfer { thread, run, write: true, touches, began: now });
        }
    }

    fn completed(&mut self, transfer: Transfer, now: u64) {
        let thread = &mut self.threads[transfer.thread];
        let tally = &mut self.tallies[thread.planned.job];
        let ns = self.clock.ns(now - transfer.began);
        if transfer.write {
            self.writes_under_way -= 1;
        } else {
            thread.reads_under_way -= 1;
        }
        // A transfer that ends after the job's time does not count.
        if now > thread.deadline {
            tally.end = tally.end.max(thread.deadline);
            return;
        }
        if transfer.write {
            self.pages_written += u64::from(transfer.run.len);
            tally.writes.0.saturating_record(ns);
        } else {
            self.pages_read += u64::from(transfer.run.len);
            tally.reads.0.saturating_record(ns);
        }
        // A thread at the end of its list has made all its touches, those after its last transfer included.
        let reached =
            if thread.over && !thread.planned.cycles { thread.planned.touches } else { transfer.touches };
        let more = reached.saturating_sub(thread.touches);
        thread.touches += more;
        tally.touches += more;
        tally.end = now;
        let element = (self.clock.ns(now - self.start) / (SERIES_MS * 1_000_000)) as usize;
        if tally.series.len() <= element {
            tally.series.resize(element + 1, 0);
        }
        tally.series[element] += more;
    }

    fn sample(self, plan: &DevicePlan, cpu_ns: u64) -> Sample {
        let jobs = self.jobs.iter().zip(self.tallies);
        let jobs = jobs.map(|(job, tally)| job_sample(self.clock.ns(tally.end - self.start), job, tally));
        Sample {
            engine: BenchEngine::Raw,
            jobs: jobs.collect(),
            cpu_ns,
            pages_read: self.pages_read,
            pages_written: self.pages_written,
            optimum_hit_rate: plan.hit_rate,
            start_ns: 0,
            engine_store_faults: None,
        }
    }
}

fn job_sample(runtime_ns: u64, job: &Job, tally: Tally) -> JobSample {
    let operation_touches = (job.block_bytes / swapd::PAGE_SIZE as u64).max(1);
    let operations = tally.touches / operation_touches;
    let reads = match job.access {
        Access::Read => operations,
        Access::Write => 0,
        Access::Mixed => operations * u64::from(job.read_percent) / 100,
    };
    let side =
        |operations: u64, times_ns: Times| Side { operations, bytes: operations * job.block_bytes, times_ns };
    JobSample {
        name: job.name.clone(),
        touches: tally.touches,
        misses: tally.reads.0.len(),
        verify_errors: 0,
        runtime_ns,
        miss_ns: tally.reads.clone(),
        series: tally.series.iter().map(|touches| touches / operation_touches).collect(),
        read: side(reads, tally.reads),
        write: side(operations - reads, tally.writes),
    }
}
