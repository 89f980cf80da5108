//! One run: a daemon, a VM, its migration, and what it does afterwards.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use migrate::tls::Credentials;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vmprocess::control::client::VmClient;
use vmprocess::control::protocol::{MigrateRequest, Request, Trust, VmStat};
use vmprocess::control::rundir::RunDir;
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::signals;
use vmprocess::size::Size;

use vmemd::pki::{self, PkiSettings};
use vmemd::vmm::{Pattern, Workload};

use super::confined::{Confined, PAGE_TABLE_SHARE, PROCESS_ALLOWANCE_BYTES};
use super::reserve::warm;
use super::site::{self, Dir, Proc, Program, Site};
use super::vmstat::Swapped;

/// A stage may take this long, and beside that the time that all memory takes at this rate.
const STAGE_TIMEOUT: Duration = Duration::from_secs(120);
const SLOWEST_BYTES_PER_SECOND: u64 = 4 << 20;
const POLL: Duration = Duration::from_millis(10);
const NAME: &str = "bench";

/// What a VM is migrated to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Target {
    /// The engine, with R of RAM and a store
    Vmemd,
    /// Plain memory in a memory cgroup of R, with a swap file
    Swap,
    /// Plain memory, enough of it
    Ram,
}

impl Target {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Target::Vmemd => "vmemd",
            Target::Swap => "swap",
            Target::Ram => "ram",
        }
    }
}

/// What to measure.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) memory: Size,
    pub(crate) ram: Size,
    pub(crate) targets: Vec<Target>,
    pub(crate) repeat: u32,
    pub(crate) guest: Option<Workload>,
    pub(crate) tls: bool,
    /// A directory on the disk to measure.
    pub(crate) store: PathBuf,
    pub(crate) json: bool,
}

/// What one run has measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Measured {
    pub(super) migration_s: f64,
    pub(super) downtime_ms: f64,
    pub(super) rewrite_s: f64,
    pub(super) pageins_during: u64,
    pub(super) pageouts_during: u64,
    pub(super) mismatched_pages: u64,
    pub(super) rounds: u64,
    pub(super) bytes_sent: u64,
    pub(super) throttle_max_percent: u64,
}

/// Everything that a run has set up. Fields are dropped in this order: processes, then what they were using.
struct Setup {
    source: Proc,
    daemon: Proc,
    _descendants: Descendants,
    confined: Option<Confined>,
    _dir: Dir,
    source_dir: RunDir,
    target_dir: RunDir,
    listen: String,
    trust: Trust,
}

/// Ends the processes that a daemon has started.
struct Descendants;

impl Drop for Descendants {
    fn drop(&mut self) {
        site::end_descendants();
    }
}

/// Runs the experiment once.
pub(super) fn run(
    site: &Site,
    settings: &Settings,
    target: Target,
    number: u32,
) -> Result<Measured, Failure> {
    let mut setup = Setup::new(site, settings, target, number)?;
    let measured = measure(&mut setup, settings, target);
    measured.map_err(|failure| Confined::explain(setup.confined.as_ref(), failure))
}

fn measure(setup: &mut Setup, settings: &Settings, target: Target) -> Result<Measured, Failure> {
    let memory = settings.memory.bytes();
    let half_pages = swapd::units::pages_in(memory) / 2;
    // Memory is filled, and has been rewritten once.
    setup.wait(&setup.source_dir.clone(), memory, |stat| stat.guest.rounds >= 1)?;
    drop(warm(memory)?);
    let swapped = Swapped::now();
    let report = setup.migrate(settings, target)?;
    let swapped = swapped.until(Swapped::now());
    let target_dir = setup.target_dir.clone();
    let first = setup.wait(&target_dir, memory, |_| true)?;
    let started = Instant::now();
    let goal = first.guest.rewritten_pages + half_pages;
    setup.wait(&target_dir, memory, |stat| stat.guest.rewritten_pages >= goal)?;
    let rewrite_s = started.elapsed().as_secs_f64();
    let last = setup.wait(&target_dir, memory, |stat| stat.guest.rewritten_pages >= goal + half_pages)?;
    let number = |field: &str| report[field].as_u64().unwrap_or(0);
    let float = |field: &str| report[field].as_f64().unwrap_or(f64::NAN);
    let (pageins_during, pageouts_during) = match target {
        Target::Swap => (swapped.ins, swapped.outs),
        _ => (number("pageins_during"), number("pageouts_during")),
    };
    Ok(Measured {
        migration_s: float("duration_ms") / 1000.0,
        downtime_ms: float("downtime_ms"),
        rewrite_s,
        pageins_during,
        pageouts_during,
        mismatched_pages: last.guest.mismatched_pages,
        rounds: number("rounds"),
        bytes_sent: number("bytes_sent"),
        throttle_max_percent: number("throttle_max_percent"),
    })
}

impl Setup {
    fn new(site: &Site, settings: &Settings, target: Target, number: u32) -> Result<Setup, Failure> {
        let label = format!("{number}-{}", target.name());
        let dir = Dir(site.fresh(&label)?);
        let confined = match target {
            Target::Swap => {
                let limit = settings.ram.bytes() + settings.allowance().bytes();
                Some(Confined::new(&dir.0, &label, settings.memory.bytes(), limit)?)
            }
            Target::Vmemd | Target::Ram => None,
        };
        let (source_path, target_path) = (dir.0.join("source"), dir.0.join("target"));
        let (source_dir, target_dir) = (RunDir::open(&source_path)?, RunDir::open(&target_path)?);
        let entrance = confined.as_ref().map(Confined::entrance).transpose()?;
        let credentials = settings.tls.then(|| certificates(&dir.0)).transpose()?;
        let mut serve = serve_args(settings, target, &dir.0);
        let mut trust = Trust::default();
        if let Some(path) = credentials {
            trust.tls = Some(Credentials::read(&path)?);
            serve.extend(["--tls".to_owned(), path.display().to_string()]);
        }
        let mut daemon = Proc::start(Program::Vmemd, &serve, &dir.0.join("serve.log"), entrance.as_ref())?;
        let line = daemon.first_line()?;
        let listen = line.rsplit(' ').next().unwrap_or_default().to_owned();
        let source = Proc::start(Program::Vmemd, &run_args(settings, &dir.0), &dir.0.join("run.log"), None)?;
        Ok(Setup {
            source,
            daemon,
            _descendants: Descendants,
            confined,
            _dir: dir,
            source_dir,
            target_dir,
            listen,
            trust,
        })
    }

    /// Waits until the VM's facts are as wished, and returns them.
    fn wait(
        &mut self,
        dir: &RunDir,
        work_bytes: u64,
        done: impl Fn(&VmStat) -> bool,
    ) -> Result<VmStat, Failure> {
        let deadline =
            Instant::now() + STAGE_TIMEOUT + Duration::from_secs(4 * work_bytes / SLOWEST_BYTES_PER_SECOND);
        let mut vm: Option<VmClient> = None;
        loop {
            signals::check()?;
            self.daemon.check()?;
            let mut client = match vm.take() {
                Some(client) => Ok(client),
                None => VmClient::connect(dir, NAME),
            };
            let stat = client.as_mut().map_err(|failure| failure.clone()).and_then(VmClient::stat);
            match stat {
                Ok(stat) if stat.reason.is_some() => {
                    return Err(Failure::new(FailureKind::Vm, stat.reason.unwrap_or_default()));
                }
                Ok(stat) if done(&stat) => return Ok(stat),
                Ok(_) => vm = client.ok(),
                // Right after its start there is no VM yet. Later, a VM that is gone ends the run.
                Err(failure) if failure.kind == FailureKind::Name && dir.path() == self.source_dir.path() => {
                    self.source.check()?
                }
                Err(failure) if failure.kind == FailureKind::Other && Instant::now() < deadline => {}
                Err(failure) => return Err(failure),
            }
            if Instant::now() >= deadline {
                return Err(Failure::new(FailureKind::Vm, "the VM made no progress within the time allowed"));
            }
            std::thread::sleep(POLL);
        }
    }

    fn migrate(&mut self, settings: &Settings, target: Target) -> Result<Value, Failure> {
        let request = Request::Migrate(MigrateRequest {
            to: self.listen.clone(),
            ram_bytes: (target == Target::Vmemd).then(|| settings.ram.bytes()),
            downtime_target_ms: 50,
            max_downtime_ms: None,
            streams: 2,
            max_rounds: 30,
            max_throttle: 99,
            check_placement: false,
            trust: self.trust.clone(),
        });
        VmClient::connect(&self.source_dir, NAME)?.ask_long(&request, &mut |_| {})
    }
}

/// Certificates for the address at which the daemon listens.
fn certificates(dir: &Path) -> Result<PathBuf, Failure> {
    const HOST: &str = "127.0.0.1";
    let dir = dir.join("pki");
    pki::init(&PkiSettings { dir: dir.clone(), hosts: vec![HOST.to_owned()], days: 1 })?;
    Ok(dir.join(HOST))
}

fn serve_args(settings: &Settings, target: Target, dir: &Path) -> Vec<String> {
    let (engine, ram) = match target {
        Target::Vmemd => ("vmemd", settings.ram),
        Target::Swap | Target::Ram => ("plain", settings.memory),
    };
    let store = dir.join("store").display().to_string();
    let run_dir = dir.join("target").display().to_string();
    [
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--ram",
        &ram.to_string(),
        "--store",
        &store,
        "--engine",
        engine,
        "--run-dir",
        &run_dir,
    ]
    .map(str::to_owned)
    .to_vec()
}

fn run_args(settings: &Settings, dir: &Path) -> Vec<String> {
    let memory = settings.memory.to_string();
    let guest = settings.guest().to_string();
    let store = dir.join("store-source").display().to_string();
    let run_dir = dir.join("source").display().to_string();
    ["run", "--name", NAME, "--memory", &memory, "--guest", &guest, "--store", &store, "--run-dir", &run_dir]
        .map(str::to_owned)
        .to_vec()
}

impl Settings {
    /// Memory that the swap target's cgroup may use beside the budget, so that the guest has all of the budget.
    pub(super) fn allowance(&self) -> Size {
        Size(PROCESS_ALLOWANCE_BYTES + self.memory.bytes() / PAGE_TABLE_SHARE)
    }

    /// The guest's workload. Unless another was asked for, it fills all of its memory and rewrites it again and
    /// again.
    pub(super) fn guest(&self) -> Workload {
        self.guest.unwrap_or_else(|| Workload::new(Pattern::Rewrite))
    }
}
