//! How results are shown, as text and as HTML alike: which figures, of which run, and how many digits of them.

use super::results::{Figure, OfEngine};
use super::sample::Sample;

/// The figures of a job that are shown, in this order.
pub(super) const ROWS: [(&str, Figure); 10] = [
    ("touches/s", Figure::TouchesPerSecond),
    ("misses/s", Figure::MissesPerSecond),
    ("miss p50, us", Figure::Miss(500)),
    ("miss p99, us", Figure::Miss(990)),
    ("miss p99.9, us", Figure::Miss(999)),
    ("CPU a miss, us", Figure::CpuPerMiss),
    ("CPU a touch, us", Figure::CpuPerTouch),
    ("hit rate, %", Figure::HitRate),
    ("optimum's, %", Figure::OptimumHitRate),
    ("start, ms", Figure::StartMillis),
];

/// The run with the middle throughput, counted from one.
pub(super) fn middle(of: &OfEngine, job: usize) -> Option<(usize, &Sample)> {
    let rate =
        |sample: &Sample| sample.jobs[job].touches as f64 / (sample.jobs[job].runtime_ns.max(1)) as f64;
    let mut runs: Vec<_> = of.samples().enumerate().map(|(number, sample)| (number + 1, sample)).collect();
    runs.sort_by(|one, other| rate(one.1).total_cmp(&rate(other.1)));
    runs.get(runs.len().checked_sub(1)? / 2).copied()
}

/// Three digits, with a unit as fio has it: `154k`.
pub(super) fn short(value: f64) -> String {
    let (scaled, unit) = match value {
        v if v >= 999.5e6 => (v / 1e9, "G"),
        v if v >= 999.5e3 => (v / 1e6, "M"),
        v if v >= 9999.5 => (v / 1e3, "k"),
        v => (v, ""),
    };
    match scaled {
        v if v > 0.0 && v < 0.0995 => format!("{v:.4}"),
        v if unit.is_empty() && v >= 99.95 => format!("{v:.0}"),
        v if v >= 99.95 => format!("{v:.0}{unit}"),
        v if v >= 9.995 => format!("{v:.1}{unit}"),
        v => format!("{v:.2}{unit}"),
    }
}

/// A time in µs.
pub(super) fn usec(ns: u64) -> String {
    let us = ns as f64 / 1000.0;
    if us < 10.0 { format!("{us:.2}") } else { format!("{us:.0}") }
}

/// Median and spread.
pub(super) fn cell(of: &OfEngine, job: usize, figure: Figure) -> Option<String> {
    let spread = of.spread(job, figure)?;
    Some(format!("{} ({}-{})", short(spread.median), short(spread.min), short(spread.max)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0.00"),
            (0.0123, "0.0123"),
            (9.876, "9.88"),
            (99.96, "100"),
            (8712.0, "8712"),
            (15_444.0, "15.4k"),
            (154_444.0, "154k"),
            (999_600.0, "1.00M"),
            (1.5e9, "1.50G"),
        ] {
            assert_eq!(short(value), text);
        }
    }
}
