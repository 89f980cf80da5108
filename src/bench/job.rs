//! A benchmark's jobs, as a job file says them after defaults and inheritance: what to touch, and how.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What holds the memory that is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum BenchEngine {
    /// vmemd's engine
    Vmemd,
    /// Plain memory in a memory cgroup, with a swap file on the same disk
    Swap,
    /// The least device traffic that the same jobs need, and nothing else
    Raw,
    /// Plain memory, no limit
    Mem,
}

impl BenchEngine {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            BenchEngine::Vmemd => "vmemd",
            BenchEngine::Swap => "swap",
            BenchEngine::Raw => "raw",
            BenchEngine::Mem => "mem",
        }
    }
}

/// One job file: one VM, whose jobs run at the same time in memory areas one after the other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scenario {
    /// The file's stem.
    pub name: String,
    pub description: String,
    /// RAM budget of the VM.
    pub ram_bytes: u64,
    pub engines: Vec<BenchEngine>,
    /// From the file; the command line's wins.
    pub store: Option<PathBuf>,
    /// Whether the engine encrypts its store. Results of before have no word about it.
    #[serde(default)]
    pub encrypt: bool,
    pub jobs: Vec<Job>,
}

impl Scenario {
    /// Memory of the VM: all areas, rounded up to 2 MiB as an engine wants it.
    pub fn memory_bytes(&self) -> u64 {
        self.jobs.iter().map(|job| job.size_bytes).sum::<u64>().next_multiple_of(2 << 20)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    Read,
    Write,
    /// Reads and writes, by [`Job::read_percent`].
    Mixed,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Ascending, round and round, with [`Job::stride_pages`].
    Sequential,
    Uniform,
    /// Zipf's law with this exponent; which page has which rank is spread over the whole area.
    Zipf(f64),
}

/// How long the measured phase lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Length {
    Millis(u64),
    /// Passes over the working set (for a random order: as many operations).
    Loops(u64),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    pub name: String,
    /// Area of the job.
    pub size_bytes: u64,
    /// What is touched of it, from its start.
    pub working_set_bytes: u64,
    pub access: Access,
    /// Of mixed operations.
    pub read_percent: u8,
    pub order: Order,
    pub stride_pages: u32,
    /// Bytes an operation covers.
    pub block_bytes: u64,
    pub threads: u32,
    pub length: Length,
    pub ramp_ms: u64,
    /// Write every page once before the ramp.
    pub prefill: bool,
    pub seed: u64,
}

/// One run of one engine, for the worker process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkerRequest {
    pub scenario: Scenario,
    pub engine: BenchEngine,
    /// A directory on the disk to measure, for the engine's store or the raw file.
    pub dir: PathBuf,
    /// Compute the optimum's hit rate after the run.
    pub optimum: bool,
}
