//! `vmemd bench migrate`: a VM moves into less RAM and rewrites half of its memory there, three ways.
//!
//! The published experiment (VMemDirect), scaled: (vmemd) this project's engine with R of RAM, (swap) plain memory in a
//! memory cgroup of R with a swap file on the same disk, (ram) plain memory without a limit, the lower bound. Targets
//! take turns within each repetition, so that a change of the machine's mood hits all of them.

pub mod cgroup;
mod compare;
mod costs;
mod demands;
mod experiment;
mod fio;
mod foreign;
mod html;
pub(crate) mod ini;
pub mod job;
pub(crate) mod jobfile;
pub mod optimum;
mod output;
pub(crate) mod pattern;
mod report;
mod results;
pub mod sample;
mod site;
pub mod swapfile;
pub(crate) mod trace;
pub(crate) mod worker;

use std::io::Write;
use std::path::PathBuf;

use vmprocess::failure::{Failure, Kind};
use vmprocess::size::Size;
use vmprocess::{host, signals};

use crate::vmm::Workload;
pub use compare::{RunSettings, Style, run};
pub use output::{ReportSettings, report as jobs_report};
use report::{Outcome, Results};
use site::Site;

/// Memory that first touches may take without being seen as full.
const HOST_RESERVE_BYTES: u64 = 256 << 20;

/// What a VM is migrated to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Target {
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
pub struct Settings {
    pub memory: Size,
    pub ram: Size,
    pub targets: Vec<Target>,
    pub repeat: u32,
    pub guest: Option<Workload>,
    pub tls: bool,
    /// A directory on the disk to measure.
    pub store: PathBuf,
    pub json: bool,
}

/// Measures and prints. A run that fails is noted, and the others go on.
///
/// # Errors
/// If it cannot begin, is interrupted, or no run succeeded.
pub fn migrate(settings: &Settings) -> Result<(), Failure> {
    signals::install()?;
    let mut targets: Vec<Target> = Vec::new();
    for target in &settings.targets {
        if !targets.contains(target) {
            targets.push(*target);
        }
    }
    let left_out = |target: &Target| match target {
        Target::Swap => cgroup::available().err().map(|failure| failure.text),
        _ => None,
    };
    let mut results = Results::new(targets.iter().map(|target| (*target, left_out(target))).collect());
    let at_target = if targets.contains(&Target::Ram) { settings.memory } else { settings.ram };
    host::need_free_ram(settings.memory.bytes() + at_target.bytes() + HOST_RESERVE_BYTES, "this benchmark")?;
    let on_disk = settings.memory.bytes() + settings.memory.bytes().saturating_sub(settings.ram.bytes());
    let site = Site::open(&settings.store)?;
    host::need_free_disk(site.path(), on_disk, 0)?;
    let total = settings.repeat * targets.len() as u32;
    let mut number = 0;
    for repetition in 1..=settings.repeat {
        for target in &targets {
            number += 1;
            signals::check()?;
            if results.is_left_out(*target) {
                continue;
            }
            let outcome = experiment::run(&site, settings, *target, number);
            signals::check()?;
            let outcome = outcome.map_or_else(|failure| Outcome::Failed(failure.text), Outcome::Measured);
            say(&format!("[{number}/{total}] {} #{repetition}: {}", target.name(), outcome.line()));
            results.add(*target, outcome);
        }
    }
    drop(site);
    let text = if settings.json { results.json()? } else { results.table(settings) };
    let _ = writeln!(std::io::stdout(), "{text}");
    match results.any_measured() {
        true => Ok(()),
        false => Err(Failure::new(Kind::Vm, "no run of the benchmark succeeded")),
    }
}

fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Memory that is in use just before a target takes it: the first touch of memory that a hypervisor below this host has taken
/// back is ten to fifty times as slow as the next, and would hit the targets unevenly. In huge pages and in single frames, because a
/// host finds the two in different places. Dropped when the migration, or the run, begins.
fn warm(bytes: u64) -> Result<[memmap2::MmapMut; 2], Failure> {
    const STEP: usize = 64 << 20;
    let free = host::available_ram()?.saturating_sub(HOST_RESERVE_BYTES);
    let bytes = bytes.min(free / 2) as usize;
    let fail = |error| Failure::io("cannot warm the host's memory", &error);
    let map = || memmap2::MmapMut::map_anon(bytes.max(4096)).map_err(fail);
    let mut kinds = [map()?, map()?];
    // A kernel without huge pages refuses both, and has single frames for both.
    let _ = kinds[0].advise(memmap2::Advice::HugePage);
    let _ = kinds[1].advise(memmap2::Advice::NoHugePage);
    for step in kinds.iter_mut().flat_map(|memory| memory.chunks_mut(STEP)) {
        signals::check()?;
        for page in step.chunks_mut(swapd::PAGE_SIZE) {
            page[0] = 1;
        }
    }
    Ok(kinds)
}
