//! What one run of one engine measured.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::job::BenchEngine;

/// Times above this count as this: one minute.
const LONGEST_NS: u64 = 60_000_000_000;
/// Width of an element of a series.
pub(crate) const SERIES_MS: u64 = 100;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) engine: BenchEngine,
    pub(crate) jobs: Vec<JobSample>,
    /// User and system time of the process in the measured phase.
    pub(crate) cpu_ns: u64,
    /// Pages that the device gave and took in the measured phase.
    pub(crate) pages_read: u64,
    pub(crate) pages_written: u64,
    /// Hit rate of the optimum on the same touches.
    pub(crate) optimum_hit_rate: Option<f64>,
    /// Time from the start of the engine to the first touch.
    pub(crate) start_ns: u64,
    /// Faults that the engine itself counted as waiting for the store.
    pub(crate) engine_store_faults: Option<u64>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct JobSample {
    pub(crate) name: String,
    pub(crate) read: Side,
    pub(crate) write: Side,
    /// Pages touched.
    pub(crate) touches: u64,
    /// Touches that had to wait for the device.
    pub(crate) misses: u64,
    pub(crate) verify_errors: u64,
    /// Length of the measured phase.
    pub(crate) runtime_ns: u64,
    /// How long touches that missed took.
    pub(crate) miss_ns: Times,
    /// Operations in each [`SERIES_MS`] of the measured phase.
    pub(crate) series: Vec<u64>,
}

/// One direction of a job.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Side {
    pub(crate) operations: u64,
    pub(crate) bytes: u64,
    /// How long operations took.
    pub(crate) times_ns: Times,
}

/// A histogram of times in ns, three significant digits; travels as pairs of value and count.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(from = "Vec<(u64, u64)>", into = "Vec<(u64, u64)>")]
pub(crate) struct Times(pub(crate) Histogram<u64>);

impl Default for Times {
    fn default() -> Self {
        Times(Histogram::new_with_bounds(1, LONGEST_NS, 3).expect("constant bounds are valid"))
    }
}

impl From<Vec<(u64, u64)>> for Times {
    fn from(pairs: Vec<(u64, u64)>) -> Self {
        let mut times = Times::default();
        pairs.into_iter().for_each(|(value, count)| times.0.saturating_record_n(value, count));
        times
    }
}

impl From<Times> for Vec<(u64, u64)> {
    fn from(times: Times) -> Self {
        times.0.iter_recorded().map(|step| (step.value_iterated_to(), step.count_at_value())).collect()
    }
}
