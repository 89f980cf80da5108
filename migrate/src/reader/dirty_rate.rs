//! How fast the guest writes.

use std::time::Duration;

/// The rate at which pages are written, from the last few scans.
#[derive(Clone, Debug, Default)]
pub(super) struct DirtyRate {
    scans: [(u64, Duration); DirtyRate::SCANS],
    count: usize,
}

impl DirtyRate {
    const SCANS: usize = 4;

    pub(super) fn scan(&mut self, pages: u64, since_last: Duration) {
        self.scans[self.count % Self::SCANS] = (pages, since_last);
        self.count += 1;
    }

    /// The throttle changed: what was seen before no longer holds.
    pub(super) fn forget(&mut self) {
        *self = DirtyRate::default();
    }

    /// Pages a second; None before the first scan.
    pub(super) fn per_s(&self) -> Option<f64> {
        let known = &self.scans[..self.count.min(Self::SCANS)];
        let (pages, time) =
            known.iter().fold((0, Duration::ZERO), |all, scan| (all.0 + scan.0, all.1 + scan.1));
        (!time.is_zero()).then(|| pages as f64 / time.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_scans_count() {
        let mut rate = DirtyRate::default();
        assert_eq!(rate.per_s(), None);
        (0..9).for_each(|pages| rate.scan(pages, Duration::from_secs(1)));
        assert_eq!(rate.per_s(), Some(6.5));
    }
}
