//! The steps of a source's session, and how long they took: values in, values out.

use std::time::Duration;

use crate::progress::Phase;
use crate::report::DowntimeParts;

/// What a source does, in this order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// The first round.
    Copy,
    /// A later one. There may be many.
    Converge,
    /// The VM's name is freed for the target.
    GiveUpName,
    // The downtime begins.
    /// The VM is stopped.
    Stop,
    /// vCPU and device state is saved.
    SaveState,
    /// The state and the last pages are sent.
    LastPages,
    /// The target has them in their places, and loads the state.
    Prepare,
    /// The target records that the VM is its own, and starts it.
    Commit,
    // The downtime has ended.
    /// The target's host is asked what became of a commit.
    Resolve,
    /// The target looks at what the VM touches.
    CheckPlacement,
}

impl Step {
    const COUNT: usize = Step::CheckPlacement as usize + 1;

    /// What the owner is told that the migration does. None: the same as before.
    pub(super) fn phase(self) -> Option<Phase> {
        match self {
            Step::Copy => Some(Phase::Copying),
            Step::Converge => Some(Phase::Converging),
            Step::LastPages => Some(Phase::Stopped),
            Step::Commit => Some(Phase::HandOver),
            Step::CheckPlacement => Some(Phase::Checking),
            Step::GiveUpName | Step::Stop | Step::SaveState | Step::Prepare | Step::Resolve => None,
        }
    }
}

/// How long each step took so far; of those that were taken several times, all together.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Times([Duration; Step::COUNT]);

/// What the target tells of its part of the downtime.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct TargetTimes {
    /// For the last pages to come to their places.
    pub(super) place: Duration,
    /// To load the state.
    pub(super) load: Duration,
    /// To record the commit.
    pub(super) record: Duration,
    /// To start the VM.
    pub(super) start: Duration,
}

impl Times {
    pub(super) fn note(&mut self, step: Step, took: Duration) {
        self.0[step as usize] += took;
    }

    fn of(&self, step: Step) -> Duration {
        self.0[step as usize]
    }

    /// What the downtime consisted of. Of the steps in which the target works, what it does not account for is the
    /// link's.
    pub(super) fn downtime_parts(&self, target: &TargetTimes) -> DowntimeParts {
        let link = self.of(Step::Prepare).saturating_sub(target.place + target.load)
            + self.of(Step::Commit).saturating_sub(target.record + target.start);
        DowntimeParts {
            stop_ms: milliseconds(self.of(Step::Stop)),
            state_ms: milliseconds(self.of(Step::SaveState)),
            pages_ms: milliseconds(self.of(Step::LastPages)),
            place_ms: milliseconds(target.place),
            load_ms: milliseconds(target.load),
            record_ms: milliseconds(target.record),
            start_ms: milliseconds(target.start),
            link_ms: milliseconds(link),
        }
    }
}

pub(super) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_are_all_of_the_downtime() {
        const MS: Duration = Duration::from_millis(1);
        let mut times = Times::default();
        for (step, ms) in [
            (Step::Copy, 1000),
            (Step::Converge, 100),
            (Step::Converge, 10),
            (Step::Stop, 1),
            (Step::SaveState, 2),
            (Step::LastPages, 3),
            (Step::Prepare, 10),
            (Step::Commit, 5),
            (Step::CheckPlacement, 1000),
        ] {
            times.note(step, MS * ms);
        }
        let target = TargetTimes { place: MS * 4, load: MS * 2, record: MS, start: MS * 3 };
        let parts = times.downtime_parts(&target);
        assert_eq!(parts.named().map(|(_, ms)| ms), [1.0, 2.0, 3.0, 4.0, 2.0, 1.0, 3.0, 5.0]);
        assert_eq!(parts.named().iter().map(|(_, ms)| ms).sum::<f64>(), 21.0);
        assert_eq!(times.of(Step::Converge), MS * 110);
        // A target whose clock says more than was waited for.
        let slow = TargetTimes { place: MS * 40, ..target };
        assert_eq!(times.downtime_parts(&slow).link_ms, 1.0);
    }
}
