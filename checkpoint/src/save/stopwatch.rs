//! For how long at least one of several things was going on.

use std::cell::Cell;
use std::time::Duration;

use crate::outside::Instant;

#[derive(Debug)]
pub(super) struct Stopwatch {
    under_way: Cell<u32>,
    /// Since when one is under way, and for how long one was before that.
    since: Cell<Instant>,
    before: Cell<Duration>,
}

impl Stopwatch {
    pub(super) fn new() -> Stopwatch {
        Stopwatch { under_way: 0.into(), since: Instant::now().into(), before: Duration::ZERO.into() }
    }

    /// One begins, and ends with what is returned.
    pub(super) fn begins(&self) -> Running<'_> {
        self.begin();
        Running(self)
    }

    pub(super) fn begin(&self) {
        if self.under_way.get() == 0 {
            self.since.set(Instant::now());
        }
        self.under_way.set(self.under_way.get() + 1);
    }

    pub(super) fn end(&self) {
        self.under_way.set(self.under_way.get() - 1);
        if self.under_way.get() == 0 {
            self.before.set(self.before.get() + Instant::now().saturating_duration_since(self.since.get()));
        }
    }

    /// How many are under way.
    pub(super) fn count(&self) -> u32 {
        self.under_way.get()
    }

    pub(super) fn total(&self) -> Duration {
        let now = if self.under_way.get() > 0 {
            Instant::now().saturating_duration_since(self.since.get())
        } else {
            Duration::ZERO
        };
        self.before.get() + now
    }
}

/// Ends when it is dropped, also in a future that is dropped half-way.
pub(super) struct Running<'a>(&'a Stopwatch);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_at_once_count_once() {
        let watch = Stopwatch::new();
        assert_eq!((watch.count(), watch.total()), (0, Duration::ZERO));
        let first = watch.begins();
        let second = watch.begins();
        assert_eq!(watch.count(), 2);
        drop(first);
        assert_eq!(watch.count(), 1);
        let running = watch.total();
        drop(second);
        let total = watch.total();
        assert!(total >= running && watch.count() == 0);
        assert_eq!(watch.total(), total, "it goes on with nothing under way");
    }
}
