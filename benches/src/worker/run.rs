//! A run from its first allocation to its sample: the phases that all threads enter together.

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use swapd::{PAGE_SIZE, Run};
use vmemd::cli::terminal::warn;
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::size::Size;

use super::areas::areas;
use super::clock::Clock;
use super::content::{Base, Content};
use super::memory::{DeviceCounts, TestedMemory};
use super::touch::{MissRule, TouchRecord, Toucher};
use super::{hindsight, raw, usage};
use crate::job::{BenchEngine, Job, Scenario, WorkerRequest};
use crate::pattern::Pattern;
use crate::sample::{JobSample, SERIES_MS, Sample, Side, Times};

/// Bytes of a thread's stack. It only touches pages in a loop, and a larger stack would take of the cgroup's memory.
const STACK_BYTES: usize = 256 << 10;

/// Most pages of all areas together: page numbers have 31 bits here.
const MEMORY_MAX: u64 = 8 << 40;

/// Runs the jobs of the request, and measures.
///
/// # Errors
/// If the host lacks something, the sizes do not fit, or the engine fails.
pub(crate) fn main(request: &WorkerRequest) -> Result<Sample, Failure> {
    check(&request.scenario)?;
    std::fs::create_dir_all(&request.dir)
        .map_err(|error| Failure::io(format!("cannot make {}", request.dir.display()), &error))?;
    match request.engine {
        BenchEngine::Raw => raw::run(request),
        BenchEngine::Vmemd | BenchEngine::Swap | BenchEngine::Mem => touch(request),
    }
}

/// Refuses a request that makes no sense. `vmemd bench run` makes none, but one that was typed by hand may be wrong.
fn check(scenario: &Scenario) -> Result<(), Failure> {
    let usage = |text: String| Err(Failure::new(FailureKind::Usage, text));
    if scenario.jobs.is_empty() {
        return usage("there are no jobs".to_owned());
    }
    for job in &scenario.jobs {
        let sizes =
            [job.size_bytes, job.working_set_bytes, job.block_bytes.next_multiple_of(PAGE_SIZE as u64)];
        if sizes.iter().any(|bytes| *bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE as u64))
            || job.threads == 0
        {
            return usage(format!("job {:?}: sizes are whole pages, and somebody must touch them", job.name));
        }
    }
    let bytes = scenario.jobs.iter().fold(0, |sum: u64, job| sum.saturating_add(job.size_bytes));
    if bytes > MEMORY_MAX {
        return usage(format!("{:#} of memory are more than {:#}", Size(bytes), Size(MEMORY_MAX)));
    }
    Ok(())
}

/// The threads of a job.
struct Team<'a> {
    job: &'a Job,
    content: Content,
    touchers: Vec<Toucher>,
}

impl<'a> Team<'a> {
    fn new(clock: Clock, job: &'a Job, area: Run, rule: MissRule) -> Team<'a> {
        let content =
            if job.prefill { Content::filled(area, job.seed) } else { Content::untouched(area, job.seed) };
        let toucher =
            |thread| Toucher::new(clock, job, Pattern::new(job, area, thread), content.clone(), rule);
        let touchers = (0..job.threads).map(toucher).collect();
        Team { job, content, touchers }
    }
}

/// Counters of the process and the engine, read at the beginning and at the end of the measured phase.
struct Moment {
    cpu_ns: u64,
    device: DeviceCounts,
}

impl Moment {
    fn now(memory: &TestedMemory) -> Result<Moment, Failure> {
        Ok(Moment { device: memory.counts()?, cpu_ns: usage::process_cpu_ns() })
    }
}

fn touch(request: &WorkerRequest) -> Result<Sample, Failure> {
    let scenario = &request.scenario;
    let clock = Clock::calibrated();
    let rule = MissRule::of(request.engine);
    let areas = areas(scenario);
    let mut teams: Vec<Team<'_>> =
        scenario.jobs.iter().zip(&areas).map(|(job, area)| Team::new(clock, job, *area, rule)).collect();
    usage::lock_what_is_mapped();
    let started = Instant::now();
    let memory = TestedMemory::start(request)?;
    let start_ns = started.elapsed().as_nanos() as u64;
    let base = memory.base();
    for team in teams.iter().filter(|team| team.job.prefill) {
        team.content.fill(base);
    }
    let (before, after) = run_phases(&mut teams, base, &memory)?;
    // The threads have ended. The memory is freed now, because the optimum below may need its room.
    drop(memory);
    let device = after.device.since(before.device);
    let records: Vec<Vec<TouchRecord>> = teams
        .into_iter()
        .map(|team| team.touchers.into_iter().map(|toucher| toucher.record).collect())
        .collect();
    // A swap engine's cgroup has no room for the optimum.
    let wanted = request.optimum && request.engine == BenchEngine::Vmemd;
    let optimum_hit_rate = wanted.then(|| hindsight::hit_rate(scenario, &areas, &records)).flatten();
    let job_sample = |(job, records): (&Job, &Vec<TouchRecord>)| job_sample(clock, job, records);
    Ok(Sample {
        engine: request.engine,
        jobs: scenario.jobs.iter().zip(&records).map(job_sample).collect(),
        cpu_ns: after.cpu_ns.saturating_sub(before.cpu_ns),
        pages_read: device.pages_read,
        pages_written: device.pages_written,
        optimum_hit_rate,
        start_ns,
        engine_store_faults: device.store_faults,
    })
}

/// Runs the ramp and the measured phase. Returns the counters from before and after the measured phase.
fn run_phases(
    teams: &mut [Team<'_>],
    base: Base,
    memory: &TestedMemory,
) -> Result<(Moment, Moment), Failure> {
    let ramp = Duration::from_millis(teams.iter().map(|team| team.job.ramp_ms).max().unwrap_or(0));
    let threads: usize = teams.iter().map(|team| team.touchers.len()).sum();
    let gate = Barrier::new(threads + 1);
    let start = AtomicU64::new(0);
    let (gate, start) = (&gate, &start);
    std::thread::scope(|scope| {
        for toucher in teams.iter_mut().flat_map(|team| &mut team.touchers) {
            let work = move || {
                gate.wait();
                toucher.ramp(base, ramp);
                gate.wait();
                gate.wait();
                toucher.measure(base, start.load(Ordering::Acquire));
                gate.wait();
            };
            let spawned = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, work);
            if let Err(error) = spawned {
                // The other threads wait at the barrier for one that could not be started: only the end of the
                // process ends that.
                warn(&format!("cannot start {threads} threads: {error}"));
                std::process::exit(i32::from(FailureKind::Resources.exit_code()));
            }
        }
        gate.wait();
        gate.wait();
        let before = Moment::now(memory);
        start.store(Clock::ticks(), Ordering::Release);
        gate.wait();
        gate.wait();
        Ok((before?, Moment::now(memory)?))
    })
}

fn job_sample(clock: Clock, job: &Job, records: &[TouchRecord]) -> JobSample {
    let side = |of: fn(&TouchRecord) -> &Times| {
        let times_ns = sum(records.iter().map(of));
        Side { operations: times_ns.0.len(), bytes: times_ns.0.len() * job.block_bytes, times_ns }
    };
    let ends: Vec<_> = records.iter().map(TouchRecord::measured).collect();
    let start = ends.iter().map(|(start, _)| start.ticks).min().unwrap_or(0);
    let end = ends.iter().map(|(_, end)| end.ticks).max().unwrap_or(start);
    let runtime_ns = clock.ns(end - start);
    let mut series = vec![0; runtime_ns.div_ceil(SERIES_MS * 1_000_000) as usize];
    for record in records {
        for marks in record.marks[record.measured_from..].windows(2) {
            let element = clock.ns(marks[1].ticks - start) / (SERIES_MS * 1_000_000);
            // The last mark may lie on the border.
            let last = series.len() - 1;
            if let Some(element) = series.get_mut((element as usize).min(last)) {
                *element += marks[1].operations - marks[0].operations;
            }
        }
    }
    let miss_ns = sum(records.iter().map(|record| &record.misses));
    JobSample {
        name: job.name.clone(),
        read: side(|record| &record.reads),
        write: side(|record| &record.writes),
        touches: ends.iter().map(|(start, end)| end.touches - start.touches).sum(),
        misses: miss_ns.0.len(),
        verify_errors: records.iter().map(|record| record.verify_errors).sum(),
        runtime_ns,
        miss_ns,
        series,
    }
}

fn sum<'a>(all: impl Iterator<Item = &'a Times>) -> Times {
    let mut total = Times::default();
    for times in all {
        // Both have the same bounds.
        total.0 += &times.0;
    }
    total
}
