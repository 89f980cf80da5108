//! What `vmemd bench run` is asked to do.

use std::path::PathBuf;
use std::time::Duration;

use vmprocess::size::Size;

use super::job::BenchEngine;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Style {
    Normal,
    Json,
}

/// The files to run, and what the command line says in the place of what they say.
#[derive(Clone, Debug)]
pub(crate) struct RunSettings {
    pub(crate) files: Vec<PathBuf>,
    pub(crate) engines: Vec<BenchEngine>,
    pub(crate) repeat: u32,
    /// Files take turns too: for comparisons between files.
    pub(crate) turns: bool,
    pub(crate) store: Option<PathBuf>,
    /// Used if neither this nor the file names a store.
    pub(crate) default_store: PathBuf,
    pub(crate) ram: Option<Size>,
    /// How long jobs run that run for a time.
    pub(crate) runtime: Option<Duration>,
    pub(crate) ramp_time: Option<Duration>,
    /// Sizes and budget are divided by this.
    pub(crate) shrink: u64,
    pub(crate) style: Style,
    pub(crate) output: Option<PathBuf>,
    pub(crate) output_dir: Option<PathBuf>,
}

/// The results to judge, and what to write.
#[derive(Clone, Debug)]
pub(crate) struct ReportSettings {
    pub(crate) results: Vec<PathBuf>,
    /// The file of costs that `scripts/bench` has measured beside the jobs.
    pub(crate) costs: Option<PathBuf>,
    /// The HTML file.
    pub(crate) output: Option<PathBuf>,
    pub(crate) json: bool,
}
