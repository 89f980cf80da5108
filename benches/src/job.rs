//! A benchmark's jobs, as a job file says them after defaults and inheritance: what to touch, and how.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What holds the memory that is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum BenchEngine {
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
pub(crate) struct Scenario {
    /// The file's stem.
    pub(crate) name: String,
    pub(crate) description: String,
    /// RAM budget of the VM.
    pub(crate) ram_bytes: u64,
    pub(crate) engines: Vec<BenchEngine>,
    /// The store that the file names; one on the command line comes before it.
    pub(crate) store: Option<PathBuf>,
    /// Whether the engine encrypts its store. Older results have no such field.
    #[serde(default)]
    pub(crate) encrypt: bool,
    pub(crate) jobs: Vec<Job>,
}

impl Scenario {
    /// Memory of the VM: all areas, rounded up to 2 MiB as an engine wants it.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.jobs.iter().map(|job| job.size_bytes).sum::<u64>().next_multiple_of(2 << 20)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Access {
    Read,
    Write,
    /// Reads and writes, by [`Job::read_percent`].
    Mixed,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Order {
    /// Ascending, round and round, with [`Job::stride_pages`].
    Sequential,
    Uniform,
    /// Zipf's law with this exponent; which page has which rank is spread over the whole area.
    Zipf(f64),
}

/// How long the measured phase lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Length {
    Millis(u64),
    /// Passes over the working set (for a random order: as many operations).
    Loops(u64),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) name: String,
    /// Area of the job.
    pub(crate) size_bytes: u64,
    /// How much of the area is touched, from its start.
    pub(crate) working_set_bytes: u64,
    pub(crate) access: Access,
    /// Percentage of reads among mixed operations.
    pub(crate) read_percent: u8,
    pub(crate) order: Order,
    pub(crate) stride_pages: u32,
    /// Bytes an operation covers.
    pub(crate) block_bytes: u64,
    pub(crate) threads: u32,
    pub(crate) length: Length,
    pub(crate) ramp_ms: u64,
    /// Write every page once before the ramp.
    pub(crate) prefill: bool,
    pub(crate) seed: u64,
}

/// One run of one engine, for the worker process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct WorkerRequest {
    pub(crate) scenario: Scenario,
    pub(crate) engine: BenchEngine,
    /// A directory on the disk to measure, for the engine's store or the raw file.
    pub(crate) dir: PathBuf,
    /// Compute the optimum's hit rate after the run.
    pub(crate) optimum: bool,
}
