//! What the engine counts, as `vmemd stat` prints it.

use serde::{Deserialize, Serialize};

/// A snapshot. Fields in bytes end in `_bytes`, times in `_us`; the rest counts pages or events since start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    pub memory_bytes: u64,
    pub ram_budget_bytes: u64,
    /// Frames held now, in the guest and in staging, x page size. Never above the budget, except right after it was lowered.
    pub frames_bytes: u64,
    /// Pages with a frame in guest memory or within reach of a rescue.
    pub resident_bytes: u64,
    pub stored_bytes: u64,
    pub untouched_bytes: u64,
    pub poisoned_pages: u64,
    /// Pages that were to leave RAM and could not when it was last tried: something holds their frames.
    #[serde(default)]
    pub pinned_bytes: u64,
    /// For how long the guest has waited for a frame that nothing gives: all of the budget is held. 0 when it does not.
    #[serde(default)]
    pub starved_ms: u64,
    /// Which these are: the first [`LOST_RUNS_MAX`] runs.
    #[serde(default)]
    pub lost: Vec<LostRun>,
    /// What the engine itself takes beside the frames, once all memory has been touched: page table, checksums, staging books,
    /// the ring. Of a 1 GiB VM 0.30 to 0.33 %, of a large one 0.25 %; see `docs/engine.md`.
    #[serde(default)]
    pub bookkeeping_bytes: u64,
    pub faults: FaultCounts,
    pub prefetch: PrefetchCounts,
    pub evict: EvictCounts,
    pub sampling: SamplingCounts,
    pub store: StoreCounts,
    pub latency_us: Latencies,
}

/// Runs of lost pages that are listed.
pub const LOST_RUNS_MAX: usize = 64;

/// Neighbouring pages whose content is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostRun {
    pub first: u64,
    pub pages: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FaultCounts {
    pub total: u64,
    /// First touch of memory that was never written.
    pub zero: u64,
    /// The frame was still in staging.
    pub rescue: u64,
    /// The page had to come, or was already coming, from the store.
    pub store: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PrefetchCounts {
    pub pages: u64,
    pub used: u64,
    pub wasted: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EvictCounts {
    /// Pages whose content had changed and was written.
    pub written: u64,
    /// Pages dropped because the store had the same content, or because they were all zeros.
    pub dropped: u64,
    /// Pages that could not move because I/O was in flight into them.
    pub pinned: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SamplingCounts {
    pub pages: u64,
    pub touched: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StoreCounts {
    pub pages_read: u64,
    /// By page-out.
    pub pages_written: u64,
    pub read_errors: u64,
    pub write_errors: u64,
    pub checksum_mismatches: u64,
    /// Space taken in the store: by pages that are there, by copies of pages in RAM, and by what has not been given back yet.
    #[serde(default)]
    pub used_bytes: u64,
    /// The store is latched: nothing is written until it is retried. Holds the reason.
    pub failed: Option<String>,
    /// Age of the oldest operation under way, 0 without one. Seconds of it mean that the device does not answer.
    #[serde(default)]
    pub oldest_ms: u64,
    #[serde(default)]
    pub state: TierState,
    /// For how long somebody has waited for the store, and it has given nothing. 0 unless that has been told.
    #[serde(default)]
    pub silent_ms: u64,
}

/// What a tier does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TierState {
    #[default]
    Working,
    /// It has no room; what it has can be read.
    Full,
    /// It refuses writes.
    Latched,
    /// It does not answer, or fails at everything: that says nothing of what it has.
    Unreachable,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latencies {
    pub zero: Percentiles,
    pub rescue: Percentiles,
    pub store: Percentiles,
}

/// Percentiles in µs, from the engine's receipt of a fault to the wake-up of the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}
