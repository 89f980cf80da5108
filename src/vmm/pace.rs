//! The workload's rate limit: a token bucket that all vCPUs share.
//!
//! Kept as the time at which the pages touched so far would be due at the exact rate; who is ahead of it sleeps.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmprocess::size::Size;

use crate::vmm::layout::PAGE;

/// How much unused time may be made up for.
const BURST: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_s: Option<u64>,
    due: Mutex<Option<Instant>>,
}

impl Pace {
    pub(super) fn new(rate: Option<Size>) -> Pace {
        Pace { bytes_per_s: rate.map(|rate| rate.0), due: Mutex::new(None) }
    }

    /// Until when the vCPU that has just touched that many pages must wait.
    pub(super) fn charge(&self, pages: u64) -> Option<Instant> {
        let rate = self.bytes_per_s?;
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        let next = due_after(*due, Instant::now(), pages, rate);
        *due = Some(next);
        Some(next)
    }
}

fn due_after(due: Option<Instant>, now: Instant, pages: u64, bytes_per_s: u64) -> Instant {
    let floor = now.checked_sub(BURST).unwrap_or(now);
    let cost = Duration::from_secs_f64(pages as f64 * PAGE as f64 / bytes_per_s as f64);
    due.unwrap_or(now).max(floor) + cost
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_cost_time() {
        let start = Instant::now();
        let mut due = None;
        for _ in 0..100 {
            due = Some(due_after(due, start, 256, 100 << 20));
        }
        assert_eq!(due.unwrap() - start, Duration::from_secs(1));
    }

    #[test]
    fn idle_time_is_made_up_for_only_so_far() {
        let start = Instant::now();
        let late = start + Duration::from_secs(5);
        let due = due_after(Some(start), late, 1, PAGE);
        assert_eq!(due, late - BURST + Duration::from_secs(1));
    }
}
