//! The command line as it is typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use vmemd::cli::values::JsonArg;
use vmemd::vmm::Workload;
use vmprocess::size::Size;

use super::jobs::{ReportArgs, RunJobsArgs};
use super::traces::{RecordArgs, ReplayArgs};
use crate::experiment::Target;

/// Measure
#[derive(Debug, Parser)]
#[command(
    name = "vmemd-bench",
    bin_name = "vmemd bench",
    version,
    propagate_version = true,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub(super) struct Cli {
    /// Directory of the VMs' control sockets [default: $VMEMD_RUN_DIR, /run/vmemd, or $XDG_RUNTIME_DIR/vmemd]
    #[arg(long, global = true, value_name = "DIR")]
    pub(super) run_dir: Option<PathBuf>,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Migrate a VM into less RAM, and have it rewrite half of its memory there: vmemd, kernel swap, enough RAM
    #[command(after_help = "Example:
  vmemd bench migrate --memory 4G --ram 2G --targets vmemd,swap,ram
The swap target needs root: it makes a memory cgroup and a swap file, and removes them.")]
    Migrate(MigrateArgs),
    /// Play touches on the engine's policies and on others, without a VM: who reads and writes how many pages
    #[command(after_help = "Example:
  vmemd bench replay --synthetic zipf:0.99 --memory 4G --ram 2G --policy vmemd,s3-fifo,optimum")]
    Replay(ReplayArgs),
    /// Run jobs of fio-style files on several engines in turns, and compare: vmemd, kernel swap, the raw device,
    /// plain memory
    #[command(after_help = "Example:
  vmemd bench run benches/jobs/randrw8.fio --engine vmemd,swap,raw --repeat 5
The keys of job files are in docs/jobs.md.
swap needs root: it makes a memory cgroup and a swap file, and removes them.")]
    Run(RunJobsArgs),
    /// Judge results of `bench run`, and make a report of them: one HTML file with plots
    #[command(after_help = "Example:
  vmemd bench run benches/jobs/*.fio --output-format json --output results.json
  vmemd bench report results.json --output report.html")]
    Report(ReportArgs),
    /// Touch memory, and print what that took as JSON (started by `vmemd bench run`)
    #[command(hide = true)]
    Worker { request: String },
    /// Record which pages are touched, as a trace file for `replay`
    #[command(after_help = "Examples:
  vmemd bench record benches/jobs/zipf.fio --touches 20M -o zipf.trace
  vmemd bench record --vm web --seconds 30 -o web.trace")]
    Record(RecordArgs),
}

#[derive(Debug, Args)]
pub(super) struct MigrateArgs {
    /// Memory of the VM
    #[arg(long, value_name = "SIZE")]
    pub(super) memory: Size,
    /// RAM at the target
    #[arg(long, value_name = "SIZE")]
    pub(super) ram: Size,
    /// What to compare, in this order
    #[arg(long, value_delimiter = ',', default_value = "vmemd,swap,ram", value_enum)]
    pub(super) targets: Vec<Target>,
    /// Repetitions; medians of them are shown
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(super) repeat: u32,
    /// What the guest does [default: rewrite all of its memory, again and again]
    #[arg(long, value_name = "WORKLOAD")]
    pub(super) guest: Option<Workload>,
    /// Migrate by TLS, with certificates made for it
    #[arg(long)]
    pub(super) tls: bool,
    /// Directory on the disk to measure: store and swap file are made in it [default: that of `vmemd run`]
    #[arg(long, value_name = "DIR")]
    pub(super) store: Option<PathBuf>,
    #[command(flatten)]
    pub(super) json: JsonArg,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example() {
        for command in Cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "{}", command.get_name());
        }
    }
}
