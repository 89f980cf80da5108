//! `vmemd bench run` and `vmemd bench report`: arguments and settings.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use vmemd::cli::values::{JsonArg, default_store, parse_duration};
use vmprocess::size::Size;

use crate::job::BenchEngine;
use crate::settings::{ReportSettings, RunSettings, Style};

#[derive(Debug, Args)]
pub(super) struct RunJobsArgs {
    /// Job files; - is standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// What holds the memory, in turns [default: as the files say]
    #[arg(long, value_delimiter = ',', value_enum)]
    engine: Vec<BenchEngine>,
    /// Repetitions; medians of them are shown
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    repeat: u32,
    /// Files take turns as well, each repetition through all of them: for comparisons between files
    #[arg(long)]
    turns: bool,
    /// Text that reads like fio's, or JSON with fio's field names
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "normal")]
    output_format: Style,
    /// Write to this file instead of stdout
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write a JSON file of fio's form for every run: SCENARIO-ENGINE-N.json
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Directory on the disk to measure [default: as the file says, else that of `vmemd run`]
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// RAM budget, instead of the files'
    #[arg(long, value_name = "SIZE")]
    ram: Option<Size>,
    /// How long jobs run that run for a time
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    runtime: Option<Duration>,
    /// Longest time before anything is measured
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    ramp_time: Option<Duration>,
    /// Divide all sizes and the budget, to try a file: 1/64
    #[arg(long, value_name = "1/N", default_value = "1/1", value_parser = parse_scale)]
    scale: u64,
}

impl RunJobsArgs {
    pub(super) fn settings(self) -> RunSettings {
        RunSettings {
            files: self.files,
            engines: self.engine,
            repeat: self.repeat,
            turns: self.turns,
            store: self.store,
            default_store: default_store(),
            ram: self.ram,
            runtime: self.runtime,
            ramp_time: self.ramp_time,
            shrink: self.scale,
            style: self.output_format,
            output: self.output,
            output_dir: self.output_dir,
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct ReportArgs {
    /// What `bench run --output-format json` has written; of a job file that is there twice, the later counts
    #[arg(required = true, value_name = "RESULTS")]
    results: Vec<PathBuf>,
    /// What an idle VM and the engine's books cost, as `scripts/bench` has measured it
    #[arg(long, value_name = "FILE")]
    costs: Option<PathBuf>,
    /// The HTML file to write
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    json: JsonArg,
}

impl ReportArgs {
    pub(super) fn settings(self) -> ReportSettings {
        let ReportArgs { results, costs, output, json } = self;
        ReportSettings { results, costs, output, json: json.json }
    }
}

fn parse_scale(text: &str) -> Result<u64, String> {
    let divisor = text.strip_prefix("1/").and_then(|divisor| divisor.parse().ok());
    divisor
        .filter(|divisor| (1..=65536).contains(divisor))
        .ok_or_else(|| "write 1/N, with N up to 65536".to_owned())
}
