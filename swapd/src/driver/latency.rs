//! Latencies of faults, from the engine's receipt of a fault to the wake-up of the thread that waited.

use std::time::Instant;

use hdrhistogram::Histogram;

use swapcore::api::FaultKind;
use swapcore::core::PageMap;
use swapcore::stats::{Latencies, Percentiles};
use swapcore::units::PageNo;

/// Longer faults count as this long: one minute, in ns.
const LONGEST_NS: u64 = 60_000_000_000;

#[derive(Debug)]
pub(super) struct LatencyBook {
    since: PageMap<Instant>,
    zero: Histogram<u64>,
    rescue: Histogram<u64>,
    store: Histogram<u64>,
}

impl LatencyBook {
    pub(super) fn new() -> Self {
        // Two significant digits: an error of 1 % is less than the noise, and the tables stay small.
        let histogram = || Histogram::new_with_bounds(100, LONGEST_NS, 2).expect("constant bounds are valid");
        LatencyBook { since: PageMap::default(), zero: histogram(), rescue: histogram(), store: histogram() }
    }

    pub(super) fn fault(&mut self, page: PageNo, now: Instant) {
        self.since.entry(page).or_insert(now);
    }

    pub(super) fn resolved(&mut self, page: PageNo, kind: FaultKind) {
        let Some(since) = self.since.remove(&page) else { return };
        let histogram = match kind {
            FaultKind::Zero => &mut self.zero,
            FaultKind::Rescue => &mut self.rescue,
            FaultKind::Store => &mut self.store,
        };
        histogram.saturating_record(since.elapsed().as_nanos() as u64);
    }

    /// The fault ended without a page: it was spurious, or the page is poisoned or given back.
    pub(super) fn forget(&mut self, page: PageNo) {
        self.since.remove(&page);
    }

    pub(super) fn figures(&self) -> Latencies {
        let [zero, rescue, store] = [&self.zero, &self.rescue, &self.store].map(percentiles);
        Latencies { zero, rescue, store }
    }
}

fn percentiles(histogram_ns: &Histogram<u64>) -> Percentiles {
    let at = |quantile| histogram_ns.value_at_quantile(quantile) as f64 / 1000.0;
    Percentiles { p50: at(0.5), p99: at(0.99), p999: at(0.999), max: histogram_ns.max() as f64 / 1000.0 }
}
