//! `vmemd bench run`: jobs of job files on one engine after the other, in turns.
//!
//! Every run is a process of its own (`vmemd bench worker`), which dies with this one. Engines take turns within each
//! repetition, so that a change of the machine's mood hits all of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use swapd::PAGE_SIZE;
use vmemd::cli::terminal::say;
use vmemd::doctor;
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::size::Size;
use vmprocess::{host, signals};

use super::cgroup;
use super::confined::{Confined, PAGE_TABLE_SHARE, PROCESS_ALLOWANCE_BYTES};
use super::figures::short;
use super::job::{BenchEngine, Job, Length, Scenario, WorkerRequest};
use super::left::SWAP_FILE;
use super::reserve::{HOST_RESERVE_BYTES, warm};
use super::results::{Compared, Figure, OfEngine, Run, RunOutcome};
use super::sample::Sample;
use super::settings::RunSettings;
use super::site::{Dir, Proc, Program, Site};
use super::swapfile::SwapFile;
use super::{jobfile, output};

/// Time that a run may take beside what its touches take at the slowest rates below.
const RUN_TIMEOUT: Duration = Duration::from_secs(300);
const SLOWEST_BYTES_PER_SECOND: u64 = 4 << 20;
const SLOWEST_TOUCHES_PER_SECOND: u64 = 500;
/// The swap file is so many times as large as what may be swapped. When more than half of its swap is in use, the
/// kernel takes a page's slot back as soon as the page is read, and has to write the page again though it did not
/// change.
const SWAP_ROOM: u64 = 2;
/// Bytes of the swap file that is made to see whether this user may have one.
const PROBE_BYTES: u64 = 1 << 20;

/// Runs, and writes what came out. A run that fails is noted, and the others go on. If a file cannot be done to its
/// end, the results of the files before it are written all the same.
///
/// # Errors
/// If a file is wrong or does not fit, if it is interrupted, or if nothing could be measured.
pub(crate) fn run(settings: &RunSettings) -> Result<(), Failure> {
    signals::install()?;
    let scenarios = scenarios(settings)?;
    for scenario in &scenarios {
        need_room(scenario, settings)?;
    }
    if let Some(dir) = &settings.output_dir {
        std::fs::create_dir_all(dir)
            .map_err(|error| Failure::io(format!("cannot make {}", dir.display()), &error))?;
    }
    let runs = scenarios.iter().map(|scenario| scenario.engines.len() as u32 * settings.repeat).sum();
    let mut progress = Progress { done: 0, runs };
    let mut results = Vec::with_capacity(scenarios.len());
    let files = scenarios.len();
    let groups: Vec<Vec<Scenario>> =
        if settings.turns { vec![scenarios] } else { scenarios.into_iter().map(|one| vec![one]).collect() };
    for group in groups {
        match compare(group, settings, &mut progress) {
            Ok(compared) => results.extend(compared),
            Err(failure) if results.is_empty() => return Err(failure),
            Err(failure) => {
                output::write(&results, settings)?;
                say(&format!("{} of {files} files were done: their results are written", results.len()));
                return Err(failure);
            }
        }
    }
    output::write(&results, settings)?;
    verdict(&results)
}

fn scenarios(settings: &RunSettings) -> Result<Vec<Scenario>, Failure> {
    let usage = |text| Failure::new(FailureKind::Usage, text);
    if settings.files.iter().filter(|path| jobfile::is_standard_input(path)).count() > 1 {
        return Err(usage("standard input (`-`) can be read once: leave the others out".to_owned()));
    }
    let mut scenarios: BTreeMap<String, &Path> = BTreeMap::new();
    let read = settings.files.iter().map(|path| {
        let scenario = overridden(jobfile::read(path)?, settings)
            .map_err(|text| usage(format!("{}: {text}", path.display())))?;
        match scenarios.insert(scenario.name.clone(), path) {
            Some(other) => Err(usage(format!(
                "{} and {} have the same name: results could not be told apart",
                other.display(),
                path.display()
            ))),
            None => Ok(scenario),
        }
    });
    read.collect()
}

/// A scenario with what the command line says in the place of what its file says.
fn overridden(mut scenario: Scenario, settings: &RunSettings) -> Result<Scenario, String> {
    const PAGE: u64 = PAGE_SIZE as u64;
    let least = swapd::Engine::MIN_BUDGET_BYTES;
    let smaller = |bytes: u64| (bytes / settings.shrink / PAGE * PAGE).max(PAGE);
    scenario.ram_bytes = smaller(scenario.ram_bytes).max(least);
    if let Some(ram) = settings.ram {
        scenario.ram_bytes = ram.bytes();
    }
    if scenario.ram_bytes < least {
        return Err(format!("--ram {} is below the minimum of {}", Size(scenario.ram_bytes), Size(least)));
    }
    if !settings.engines.is_empty() {
        scenario.engines.clear();
        for engine in &settings.engines {
            if !scenario.engines.contains(engine) {
                scenario.engines.push(*engine);
            }
        }
    }
    for job in &mut scenario.jobs {
        if settings.shrink > 1 {
            job.size_bytes = smaller(job.size_bytes);
            job.working_set_bytes = smaller(job.working_set_bytes);
        }
        if let (Length::Millis(_), Some(runtime)) = (job.length, settings.runtime) {
            job.length = Length::Millis((runtime.as_millis() as u64).max(1));
        }
        if let Some(ramp) = settings.ramp_time {
            job.ramp_ms = job.ramp_ms.min(ramp.as_millis() as u64);
        }
        jobfile::check(job)
            .map_err(|(key, text)| format!("with --scale, job [{}], {key}: {text}", job.name))?;
    }
    let memory = scenario.memory_bytes();
    if memory < least && scenario.engines.contains(&BenchEngine::Vmemd) {
        return Err(format!(
            "all areas together are {}, less than the least RAM budget of vmemd, {}: they need a larger `size` or \
                 --scale",
            Size(memory),
            Size(least)
        ));
    }
    Ok(scenario)
}

fn store<'a>(scenario: &'a Scenario, settings: &'a RunSettings) -> &'a Path {
    settings.store.as_deref().or(scenario.store.as_deref()).unwrap_or(&settings.default_store)
}

/// Memory that will have been touched in the end.
fn touched_bytes(scenario: &Scenario) -> u64 {
    let touched = |job: &Job| if job.prefill { job.size_bytes } else { job.working_set_bytes };
    scenario.jobs.iter().map(touched).sum()
}

/// What the swap engine's cgroup may use beside the budget: the worker's own pages and the page tables.
fn allowance(scenario: &Scenario) -> u64 {
    PROCESS_ALLOWANCE_BYTES + touched_bytes(scenario) / PAGE_TABLE_SHARE
}

/// Bytes of the worker's own pages that the swap file must have room for: they may be swapped as well.
fn swap_bytes(scenario: &Scenario) -> u64 {
    SWAP_ROOM * (touched_bytes(scenario).next_multiple_of(PAGE_SIZE as u64) + PROCESS_ALLOWANCE_BYTES)
}

/// Fails unless the largest of the engines fits this host.
fn need_room(scenario: &Scenario, settings: &RunSettings) -> Result<(), Failure> {
    let touched = touched_bytes(scenario);
    let budget = scenario.ram_bytes.min(touched) + allowance(scenario);
    let ram = |engine: &BenchEngine| match engine {
        BenchEngine::Mem => touched + allowance(scenario),
        BenchEngine::Raw => PROCESS_ALLOWANCE_BYTES,
        BenchEngine::Vmemd | BenchEngine::Swap => budget,
    };
    let most = scenario.engines.iter().map(ram).max().unwrap_or(0);
    let named = |failure: Failure| Failure::new(failure.kind, format!("{}: {}", scenario.name, failure.text));
    host::need_free_ram(most + HOST_RESERVE_BYTES, "this benchmark").map_err(named)?;
    let disk = |engine: &BenchEngine| match engine {
        BenchEngine::Mem => 0,
        BenchEngine::Swap => swap_bytes(scenario),
        BenchEngine::Vmemd | BenchEngine::Raw => touched,
    };
    let on_disk = scenario.engines.iter().map(disk).max().unwrap_or(0);
    let store = store(scenario, settings);
    let existing = store.ancestors().find(|path| path.exists()).unwrap_or(Path::new("."));
    let existing = if existing.as_os_str().is_empty() { Path::new(".") } else { existing };
    host::need_free_disk(existing, on_disk, 0).map_err(named)
}

/// The reason why an engine cannot run these jobs on this host; none if it can.
fn lacks(engine: BenchEngine, scenario: &Scenario, site: &Site) -> Option<String> {
    let probe = || -> Result<(), Failure> {
        cgroup::available()?;
        let dir = Dir(site.fresh("probe")?);
        SwapFile::create(&dir.0.join(SWAP_FILE), PROBE_BYTES).map(drop)
    };
    match engine {
        BenchEngine::Vmemd => doctor::lacks(
            site.path(),
            &["kernel", "userfaultfd", "UFFDIO_MOVE", "io_uring", "O_DIRECT of the store"],
        ),
        BenchEngine::Raw if touched_bytes(scenario) <= scenario.ram_bytes => {
            Some("these jobs need no device: all that they touch fits into their RAM".to_owned())
        }
        BenchEngine::Raw => doctor::lacks(site.path(), &["io_uring", "O_DIRECT of the store"]),
        BenchEngine::Swap => probe().err().map(|failure| failure.text),
        BenchEngine::Mem => None,
    }
}

/// The runs of all scenarios on their engines, in turns.
fn compare(
    scenarios: Vec<Scenario>,
    settings: &RunSettings,
    progress: &mut Progress,
) -> Result<Vec<Compared>, Failure> {
    let mut sites: BTreeMap<PathBuf, Rc<Site>> = BTreeMap::new();
    let mut all = Vec::with_capacity(scenarios.len());
    for scenario in scenarios {
        let store = store(&scenario, settings);
        let site = match sites.get(store) {
            Some(site) => site.clone(),
            None => Rc::new(Site::open(store)?),
        };
        sites.insert(store.to_owned(), site.clone());
        let of = |engine: &BenchEngine| {
            let left_out = lacks(*engine, &scenario, &site);
            if let Some(reason) = &left_out {
                say(&format!("{}: {} is left out: {reason}", scenario.name, engine.name()));
            }
            OfEngine { engine: *engine, left_out, outcomes: Vec::new() }
        };
        let engines = scenario.engines.iter().map(of).collect();
        all.push((site, Compared { scenario, engines }));
    }
    for repetition in 1..=settings.repeat {
        for (site, Compared { scenario, engines }) in &mut all {
            for of in engines {
                signals::check()?;
                progress.done += 1;
                if of.left_out.is_some() {
                    continue;
                }
                let label = format!("{} {} #{repetition}", scenario.name, of.engine.name());
                let shown = progress.begin(&label);
                let outcome = one(site, scenario, of.engine, progress.done);
                shown.finish_and_clear();
                signals::check()?;
                let outcome = outcome.map_or_else(
                    |failure| RunOutcome::Failed(failure.text),
                    |sample| RunOutcome::Measured(Box::new(sample)),
                );
                say(&format!("[{}/{}] {label}: {}", progress.done, progress.runs, line(&outcome)));
                of.outcomes.push(outcome);
            }
        }
    }
    Ok(all.into_iter().map(|(_, compared)| compared).collect())
}

struct Progress {
    done: u32,
    runs: u32,
}

impl Progress {
    /// Shows which run is under way, if stderr is a terminal.
    fn begin(&self, label: &str) -> ProgressBar {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
            bar.set_style(style);
        }
        bar.set_message(format!("[{}/{}] {label}", self.done, self.runs));
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }
}

/// Everything that a run has set up. Fields are dropped in this order: the process, then what it was using.
struct Setup {
    worker: Proc,
    confined: Option<Confined>,
    _dir: Dir,
}

impl Setup {
    fn new(site: &Site, scenario: &Scenario, engine: BenchEngine, number: u32) -> Result<Setup, Failure> {
        let label = format!("{number}-{}", engine.name());
        let dir = Dir(site.fresh(&label)?);
        let confined = match engine {
            BenchEngine::Swap => {
                let limit = scenario.ram_bytes + allowance(scenario);
                Some(Confined::new(&dir.0, &label, swap_bytes(scenario), limit)?)
            }
            BenchEngine::Vmemd | BenchEngine::Raw | BenchEngine::Mem => None,
        };
        let request = WorkerRequest {
            scenario: scenario.clone(),
            engine,
            dir: dir.0.clone(),
            // The optimum depends on the touches alone, so one engine computes it for all.
            optimum: engine == BenchEngine::Vmemd,
        };
        let request = serde_json::to_string(&request)
            .map_err(|error| Failure::new(FailureKind::Other, error.to_string()))?;
        let entrance = confined.as_ref().map(Confined::entrance).transpose()?;
        let args = ["worker", &request].map(str::to_owned);
        let worker = Proc::start(Program::Worker, &args, &dir.0.join("log"), entrance.as_ref())?;
        Ok(Setup { worker, confined, _dir: dir })
    }
}

fn one(site: &Site, scenario: &Scenario, engine: BenchEngine, number: u32) -> Result<Sample, Failure> {
    // First touches are measured: the host's memory must be as warm for one engine as for the next.
    if scenario.jobs.iter().any(|job| !job.prefill) {
        drop(warm(touched_bytes(scenario))?);
    }
    let mut setup = Setup::new(site, scenario, engine, number)?;
    let said = setup.worker.output(Instant::now() + time_allowed(scenario));
    let said = said.map_err(|failure| Confined::explain(setup.confined.as_ref(), failure))?;
    let sample: Sample = serde_json::from_str(&said).map_err(|error| {
        Failure::new(FailureKind::Vm, format!("the worker said something else than a sample: {error}"))
    })?;
    match sample.jobs.len() == scenario.jobs.len() {
        true => Ok(sample),
        false => Err(Failure::new(FailureKind::Vm, "the worker did not measure all jobs")),
    }
}

fn time_allowed(scenario: &Scenario) -> Duration {
    let of = |job: &Job| match job.length {
        Length::Millis(millis) => 2 * (millis + job.ramp_ms),
        Length::Loops(loops) => {
            let touches = loops.saturating_mul(job.working_set_bytes / PAGE_SIZE as u64);
            (touches / SLOWEST_TOUCHES_PER_SECOND).saturating_mul(1000).saturating_add(2 * job.ramp_ms)
        }
    };
    let jobs = scenario.jobs.iter().map(of).max().unwrap_or(0);
    let fill = touched_bytes(scenario) / SLOWEST_BYTES_PER_SECOND * 1000;
    RUN_TIMEOUT + Duration::from_millis(jobs.saturating_add(fill).min(u64::from(u32::MAX)))
}

/// A run in one line.
fn line(outcome: &RunOutcome) -> String {
    let sample = match outcome {
        RunOutcome::Measured(sample) => sample,
        RunOutcome::Failed(text) => return format!("failed: {text}"),
    };
    let of = |job| {
        let run = Run { sample, job };
        let figure = |figure: Figure| figure.of(&run).map_or_else(|| "-".to_owned(), short);
        format!(
            "{}: {} touches/s, {} misses/s, p50 of a miss {} us",
            job.name,
            figure(Figure::TouchesPerSecond),
            figure(Figure::MissesPerSecond),
            figure(Figure::Miss(500))
        )
    };
    sample.jobs.iter().map(of).collect::<Vec<_>>().join("; ")
}

/// Whether what was measured stands: something was, and every touch found what belonged there.
fn verdict(results: &[Compared]) -> Result<(), Failure> {
    for compared in results {
        let samples = compared.engines.iter().flat_map(OfEngine::samples);
        let wrong: u64 = samples.flat_map(|sample| &sample.jobs).map(|job| job.verify_errors).sum();
        if wrong > 0 {
            let text = format!("{}: {wrong} touches found the wrong content", compared.scenario.name);
            return Err(Failure::new(FailureKind::Vm, text));
        }
    }
    if let Some(none) = results.iter().find(|compared| !compared.any_measured()) {
        let left_out = none.engines.iter().all(|of| of.left_out.is_some());
        return Err(match left_out {
            true => {
                Failure::new(FailureKind::Host, format!("{}: every engine was left out", none.scenario.name))
            }
            false => Failure::new(FailureKind::Vm, format!("{}: no run succeeded", none.scenario.name)),
        });
    }
    Ok(())
}
