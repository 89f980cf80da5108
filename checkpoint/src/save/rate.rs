//! A limit on the bytes that are written a second, and how fast pages are dealt with without one: values in, decisions
//! out.

use std::time::Duration;

use crate::outside::Instant;

use migrate::pace::SendRate;

/// So much may be written at once behind a rest: a buffer must not wait for the one before it to the microsecond.
const BURST: Duration = Duration::from_millis(50);

/// When the next bytes may be written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate {
    /// Bytes a second; None: as fast as they come.
    limit: Option<u64>,
    /// What has been let through so far was due by then.
    due: Instant,
}

impl Rate {
    pub(super) fn new(limit: Option<u64>, now: Instant) -> Rate {
        Rate { limit: limit.map(|limit| limit.max(1)), due: now }
    }

    /// How long to wait before more may be written.
    pub(super) fn wait(&self, now: Instant) -> Option<Duration> {
        self.limit?;
        Some(self.due.saturating_duration_since(now).saturating_sub(BURST)).filter(|wait| !wait.is_zero())
    }

    /// So many bytes are being written.
    pub(super) fn writes(&mut self, bytes: u64, now: Instant) {
        if let Some(limit) = self.limit {
            self.due = self.due.max(now) + Duration::from_secs_f64(bytes as f64 / limit as f64);
        }
    }

    /// From now on as fast as they come.
    pub(super) fn lift(&mut self) {
        self.limit = None;
    }
}

/// What was done, up to some moment or in between two.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Work {
    /// Pages with content that were looked at: written, shared, or the same as in the base.
    pub(super) found: u64,
    /// Pages that were written, and for how long any was being written.
    pub(super) written: u64,
    pub(super) busy: Duration,
    /// For how long the limit had something wait.
    pub(super) held_back: Duration,
}

impl Work {
    pub(super) fn since(self, before: Work) -> Work {
        Work {
            found: self.found - before.found,
            written: self.written - before.written,
            busy: self.busy.saturating_sub(before.busy),
            held_back: self.held_back.saturating_sub(before.held_back),
        }
    }
}

/// How fast pages are dealt with while the VM stands still: as fast as they are found, and no faster than the disk
/// takes them. That the base has most of them, or that the store shares them, says nothing of what the guest has
/// just written, of which the last round consists.
///
/// A disk also takes a time of its own for the last of what it is given, however little that is: its latency, or that
/// of a limit on it, which counts in slices of up to 100 ms. Small rounds show it: it is what they take beyond the rate.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PauseRate {
    found: SendRate,
    written: Option<SendRate>,
    latency: Duration,
}

/// A round that writes no more pages than this is a small one: 16 MiB.
const SMALL_ROUND: u64 = 4096;
/// More than this is no latency, but a disk that stood still for a while.
const LATENCY_MOST: Duration = Duration::from_millis(500);

impl PauseRate {
    /// A round has done this work in this time.
    pub(super) fn round(&mut self, work: Work, took: Duration) {
        self.found.round(work.found, took.saturating_sub(work.held_back));
        if work.written > 0 {
            if work.written <= SMALL_ROUND
                && let Some(rate) = self.written.filter(|rate| rate.per_s() > 0.0)
            {
                let expected = Duration::from_secs_f64(work.written as f64 / rate.per_s());
                self.latency = work.busy.saturating_sub(expected).min(LATENCY_MOST);
            }
            self.written.get_or_insert_default().round(work.written, work.busy);
        }
    }

    /// What the disk takes for the last of what it is given, beyond the rate.
    pub(super) fn latency(&self) -> Duration {
        self.latency
    }

    pub(super) fn per_s(&self) -> f64 {
        let found = self.found.per_s();
        self.written.map_or(found, |written| written.per_s().min(found))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_is_as_fast_as_the_disk_and_not_as_the_look_at_pages_that_are_the_same() {
        let mut rate = PauseRate::default();
        let mut work = Work { found: 100_000, written: 1000, busy: SECOND / 2, held_back: Duration::ZERO };
        rate.round(work, SECOND);
        assert!((rate.per_s() - 2000.0).abs() < 1.0, "{}", rate.per_s());
        // The disk would take more than is found.
        let mut rate = PauseRate::default();
        work = Work { found: 1000, written: 1000, busy: SECOND / 100, held_back: Duration::ZERO };
        rate.round(work, SECOND);
        assert!((rate.per_s() - 1000.0).abs() < 1.0, "{}", rate.per_s());
        // Held back for most of the time.
        let mut rate = PauseRate::default();
        work = Work { found: 1000, written: 1000, busy: SECOND / 10, held_back: SECOND * 9 / 10 };
        rate.round(work, SECOND);
        assert!((rate.per_s() - 10_000.0).abs() < 10.0, "{}", rate.per_s());
        // Of a disk to which nothing was written, nothing is known.
        let mut rate = PauseRate::default();
        work = Work { found: 1000, ..Work::default() };
        rate.round(work, SECOND);
        assert!((rate.per_s() - 1000.0).abs() < 1.0, "{}", rate.per_s());
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn small_rounds_show_what_the_disk_takes_for_the_last_pages() {
        let mut rate = PauseRate::default();
        let round = |written, busy| Work { found: written, written, busy, held_back: Duration::ZERO };
        rate.round(round(50_000, 10 * SECOND), 10 * SECOND);
        assert_eq!(rate.latency(), Duration::ZERO, "a large round does not show it");
        rate.round(round(100, SECOND / 10), SECOND / 10);
        assert_eq!(rate.latency(), SECOND / 10 - SECOND / 50);
        rate.round(round(100, SECOND / 100), SECOND / 100);
        assert_eq!(rate.latency(), Duration::ZERO, "it was faster than the rate says");
        rate.round(round(100, 20 * SECOND), 20 * SECOND);
        assert_eq!(rate.latency(), LATENCY_MOST);
    }

    #[test]
    fn no_more_than_the_limit_over_time_and_nothing_saved_up() {
        let start = Instant::now();
        let mut rate = Rate::new(Some(1000), start);
        assert_eq!(rate.wait(start), None);
        rate.writes(2000, start);
        assert_eq!(rate.wait(start), Some(2 * SECOND - BURST));
        assert_eq!(rate.wait(start + 2 * SECOND), None);
        // A long rest earns nothing.
        rate.writes(1000, start + 100 * SECOND);
        assert_eq!(rate.wait(start + 100 * SECOND), Some(SECOND - BURST));
        rate.lift();
        assert_eq!(rate.wait(start), None);
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        let start = Instant::now();
        let mut rate = Rate::new(None, start);
        rate.writes(u64::MAX, start);
        assert_eq!(rate.wait(start), None);
    }
}
