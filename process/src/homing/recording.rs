//! The order in which a restored VM first needs its pages, for the next restore: recorded by the first VM that runs
//! from a checkpoint which does not know it yet.

use std::time::{Duration, Instant};

use checkpoint::restore::{FirstTouches, Image};
use swapd::{FaultKind, FaultsSeen, Run};

/// The first faults are those within this time from the first of them.
const RECORDED: Duration = Duration::from_secs(10);
/// A guest that touches nothing has no first faults.
const RECORDED_MAX: Duration = Duration::from_secs(60);
/// Between two looks at what was recorded: the engine keeps some 60 000 faults in between.
const RECORD_POLL: Duration = Duration::from_millis(20);
/// From the first fault until it is looked what came with those that were waited for. Each next look is as late again:
/// in the beginning, when it matters most, the order is finest.
const LOOK_AROUND: Duration = Duration::from_millis(50);
/// The same of a guest that touches nothing, at most: it is looked at half as often each time.
const RECORD_POLL_MAX: Duration = Duration::from_secs(1);

/// A recording of the first faults that is under way.
#[derive(Debug)]
pub(super) struct Recording {
    order: FirstTouches,
    began: Instant,
    /// When the first fault was seen.
    first: Option<Instant>,
    looked: Instant,
    poll: Duration,
    /// When it is looked what else has come, from the first fault on.
    look_around: Duration,
}

impl Recording {
    /// Of a VM whose budget has so many pages: more than these make no order.
    pub(super) fn begin(image: &Image, budget: u64) -> Recording {
        let now = Instant::now();
        Recording {
            order: FirstTouches::new(image, budget),
            began: now,
            first: None,
            looked: now,
            poll: RECORD_POLL,
            look_around: LOOK_AROUND,
        }
    }

    /// Until it is to be looked at again.
    pub(super) fn poll(&self) -> Duration {
        self.poll
    }

    pub(super) fn is_due(&self) -> bool {
        self.looked.elapsed() >= self.poll
    }

    pub(super) fn is_over(&self) -> bool {
        self.order.is_full()
            || self.first.is_some_and(|first| first.elapsed() >= RECORDED)
            || self.began.elapsed() >= RECORDED_MAX
    }

    /// These pages came in ahead of any touch.
    pub(super) fn came(&mut self, image: &Image, run: Run) {
        self.order.came(image, run);
    }

    /// The order as far as it is known.
    pub(super) fn runs(&self) -> &[Run] {
        self.order.runs()
    }

    /// Takes the faults that were recorded meanwhile, and looks now and then at what else is in RAM.
    pub(super) fn look<E>(
        &mut self,
        image: &Image,
        mut faults: impl FnMut() -> Result<FaultsSeen, E>,
        resident: impl FnOnce() -> Result<Vec<Run>, E>,
    ) -> Result<(), E> {
        self.looked = Instant::now();
        let mut saw = false;
        loop {
            let seen = faults()?;
            for fault in seen.faults.iter().filter(|fault| fault.kind == FaultKind::Store) {
                saw = true;
                self.order.touched(image, fault.page);
            }
            if seen.left == 0 {
                break;
            }
        }
        self.poll = if saw { RECORD_POLL } else { (self.poll * 2).min(RECORD_POLL_MAX) };
        if saw {
            self.first.get_or_insert(self.looked);
        }
        // Pages that a prefetch brought along are not waited for, and make no fault.
        if self.first.is_some_and(|first| first.elapsed() >= self.look_around) {
            self.look_around *= 2;
            for run in resident()? {
                self.order.came(image, run);
            }
        }
        Ok(())
    }
}
