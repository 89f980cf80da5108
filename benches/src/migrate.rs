//! `vmemd bench migrate`: a VM moves into less RAM and rewrites half of its memory there, three ways.
//!
//! The published experiment (VMemDirect), scaled: (vmemd) this project's engine with R of RAM, (swap) plain memory in a
//! memory cgroup of R with a swap file on the same disk, (ram) plain memory without a limit, the lower bound. Targets
//! take turns within each repetition, so that a change of the machine's mood hits all of them.

use std::io::Write;

use vmemd::cli::terminal::say;
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::{host, signals};

use super::cgroup;
use super::experiment::{self, Settings, Target};
use super::report::{MigrationOutcome, Results};
use super::reserve::HOST_RESERVE_BYTES;
use super::site::Site;

/// Measures and prints. A run that fails is noted, and the others go on.
///
/// # Errors
/// If it cannot begin, is interrupted, or no run succeeded.
pub(crate) fn migrate(settings: &Settings) -> Result<(), Failure> {
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
            let outcome = outcome
                .map_or_else(|failure| MigrationOutcome::Failed(failure.text), MigrationOutcome::Measured);
            say(&format!("[{number}/{total}] {} #{repetition}: {}", target.name(), outcome.line()));
            results.add(*target, outcome);
        }
    }
    drop(site);
    let text = if settings.json { results.json()? } else { results.table(settings) };
    let _ = writeln!(std::io::stdout(), "{text}");
    match results.any_measured() {
        true => Ok(()),
        false => Err(Failure::new(FailureKind::Vm, "no run of the benchmark succeeded")),
    }
}
