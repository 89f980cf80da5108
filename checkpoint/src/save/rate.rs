//! A limit on the bytes that are written a second: values in, decisions out.

use std::time::{Duration, Instant};

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

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

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
