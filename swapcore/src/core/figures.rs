//! What is told of the engine.

use super::Core;
use super::event::TICK_MS;
use crate::stats::{LOST_RUNS_MAX, LostRun, Stats};
use crate::table::PageState;
use crate::units::{TierId, bytes_of, runs_of};

impl Core {
    /// A snapshot of all figures that the core has. Latencies and the age of I/O are the driver's, and stay at their
    /// defaults.
    pub fn stats(&self) -> Stats {
        use PageState::{Arriving, Leaving, Poisoned, Resident, Sampled, Standby, Stored, Untouched};
        let count = |states: &[PageState]| states.iter().map(|state| self.table.count(*state)).sum::<u64>();
        let counts = &self.counts;
        Stats {
            memory_bytes: bytes_of(self.table.pages()),
            ram_budget_bytes: bytes_of(self.frames.budget()),
            frames_bytes: bytes_of(self.frames.taken()),
            resident_bytes: bytes_of(count(&[Resident, Leaving, Standby, Sampled, Arriving])),
            stored_bytes: bytes_of(count(&[Stored])),
            origin_bytes: bytes_of(self.table.origin_pages()),
            untouched_bytes: bytes_of(count(&[Untouched])),
            poisoned_pages: count(&[Poisoned]),
            pinned_bytes: bytes_of(self.table.pinned()),
            starved_ms: self.pins.starved_ms(),
            lost: self.lost_runs(),
            bookkeeping_bytes: self.bookkeeping_bytes(),
            faults: crate::stats::FaultCounts {
                total: counts.zero + counts.rescue + counts.store,
                zero: counts.zero,
                rescue: counts.rescue,
                store: counts.store,
            },
            prefetch: crate::stats::PrefetchCounts {
                pages: counts.prefetched,
                used: counts.prefetch_used,
                wasted: counts.prefetch_wasted,
            },
            evict: crate::stats::EvictCounts {
                written: counts.written,
                dropped: counts.dropped,
                pinned: counts.pinned,
            },
            sampling: crate::stats::SamplingCounts { pages: counts.sampled, touched: counts.samples_touched },
            store: crate::stats::StoreCounts {
                pages_read: counts.pages_read,
                pages_written: counts.written,
                read_errors: counts.read_errors,
                write_errors: counts.write_errors,
                checksum_mismatches: counts.mismatches,
                used_bytes: bytes_of(self.space.count()),
                drop_us: self.space.pace.total_us(),
                failed: self.tiers.failed().map(|error| error.to_string()),
                state: self.tiers.state(TierId::STORE),
                silent_ms: self.tiers.silent_ticks(TierId::STORE) * TICK_MS,
                ..Default::default()
            },
            latency_us: crate::stats::Latencies::default(),
        }
    }

    /// The first of the runs of pages that are lost.
    fn lost_runs(&self) -> Vec<LostRun> {
        let runs = runs_of(self.lost.iter().copied(), u32::MAX).take(LOST_RUNS_MAX);
        runs.map(|run| LostRun { first: run.start.0, pages: u64::from(run.len) }).collect()
    }

    /// Bytes of the core's books once every page has been touched; until then the host gives less.
    fn bookkeeping_bytes(&self) -> u64 {
        let lists = self.frames.bytes() + self.probation.bytes() + self.space.bytes();
        (self.table.bytes() + size_of_val(&self.sums[..]) + lists) as u64
    }
}
