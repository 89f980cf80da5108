//! What the engine counts, as `vmemd stat` prints it.

use serde::{Deserialize, Serialize};

/// A snapshot. Fields in bytes end in `_bytes`, times in `_us`; the rest counts pages or events since start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// The VM's memory, each region rounded up to whole blocks of 2 MiB.
    pub memory_bytes: u64,
    /// The RAM budget: how much of the memory may have frames.
    pub ram_budget_bytes: u64,
    /// Frames held now, in the guest and in staging, x page size. Never above the budget, except right after it was
    /// lowered.
    pub frames_bytes: u64,
    /// Pages with a frame in guest memory or within reach of a rescue.
    pub resident_bytes: u64,
    /// Pages that are in the store alone.
    pub stored_bytes: u64,
    /// Pages whose stored content is at the origin, whether they are in RAM as well or not. 0 once the VM needs its
    /// origin no more.
    #[serde(default)]
    pub origin_bytes: u64,
    /// Pages that read as zeros, and have neither a frame nor content in the store.
    pub untouched_bytes: u64,
    /// Pages whose content is lost: a touch of them is a memory error.
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
    /// What the engine itself takes beside the frames, once all memory has been touched: page table, checksums, staging
    /// books, the ring. Of a 1 GiB VM 0.30 to 0.33 %, of a large one 0.25 %; see `docs/engine.md`.
    #[serde(default)]
    pub bookkeeping_bytes: u64,
    /// Faults, by how they were served.
    pub faults: FaultCounts,
    /// What became of pages that were read ahead.
    pub prefetch: PrefetchCounts,
    /// What page-out has done.
    pub evict: EvictCounts,
    /// What samples of resident pages have shown.
    pub sampling: SamplingCounts,
    /// What the store has done, and how it is.
    pub store: StoreCounts,
    /// How long faults took, by how they were served.
    pub latency_us: Latencies,
}

/// Runs of lost pages that are listed.
pub const LOST_RUNS_MAX: usize = 64;

/// Neighbouring pages whose content is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostRun {
    /// Number of the first of the pages.
    pub first: u64,
    /// How many pages from there on.
    pub pages: u64,
}

/// Faults since start, by how they were served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FaultCounts {
    /// All of them: the sum of the others.
    pub total: u64,
    /// First touch of memory that was never written.
    pub zero: u64,
    /// The frame was still in staging.
    pub rescue: u64,
    /// The page had to come, or was already coming, from the store.
    pub store: u64,
}

/// Pages that were read before anybody asked for them. Of some it is not known yet what becomes of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PrefetchCounts {
    /// Pages read ahead.
    pub pages: u64,
    /// Pages read ahead that the guest has reached or touched.
    pub used: u64,
    /// Pages read ahead that left RAM untouched, or whose stream was forgotten.
    pub wasted: u64,
}

/// What became of pages that were to leave the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EvictCounts {
    /// Pages whose content had changed and was written.
    pub written: u64,
    /// Pages dropped because the store had the same content, or because they were all zeros.
    pub dropped: u64,
    /// Pages that could not move because I/O was in flight into them.
    pub pinned: u64,
}

/// Pages taken out of the guest for a while, to see whether they are missed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SamplingCounts {
    /// Pages taken out.
    pub pages: u64,
    /// Pages of samples that came back because one page of the sample was touched.
    pub touched: u64,
}

/// The store: its traffic, its errors, its state.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StoreCounts {
    /// Pages read to bring them in, for a fault or ahead of it. A repeated read does not count.
    pub pages_read: u64,
    /// By page-out.
    pub pages_written: u64,
    /// Reads that failed, the repeated ones among them.
    pub read_errors: u64,
    /// Writes that failed.
    pub write_errors: u64,
    /// Pages that were read and are not what was written. A page that is read once more may count once more.
    pub checksum_mismatches: u64,
    /// Space taken in the store: by pages that are there, by copies of pages in RAM, and by what has not been given
    /// back yet.
    #[serde(default)]
    pub used_bytes: u64,
    /// How long all holes and discards took together, by which space was given back. Whoever read meanwhile may have waited for one.
    #[serde(default)]
    pub drop_us: u64,
    /// The store is latched: nothing is written until it is retried. Holds the reason.
    pub failed: Option<String>,
    /// Age of the oldest operation under way, 0 without one. Seconds of it mean that the device does not answer.
    #[serde(default)]
    pub oldest_ms: u64,
    /// What the store does now.
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
    /// It takes writes, and gives back what it has.
    #[default]
    Working,
    /// It has no room; what it has can be read.
    Full,
    /// It refuses writes.
    Latched,
    /// It does not answer, or fails at everything: that says nothing of what it has.
    Unreachable,
}

/// How long faults took, by how they were served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latencies {
    /// Faults served with zeros.
    pub zero: Percentiles,
    /// Faults served from staging, without I/O.
    pub rescue: Percentiles,
    /// Faults that waited for the store.
    pub store: Percentiles,
}

/// Percentiles in µs, from the engine's receipt of a fault to the wake-up of the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    /// Half of the faults took no longer.
    pub p50: f64,
    /// All but one fault in a hundred took no longer.
    pub p99: f64,
    /// All but one fault in a thousand took no longer.
    pub p999: f64,
    /// The slowest fault.
    pub max: f64,
}
