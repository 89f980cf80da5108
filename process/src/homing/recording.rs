//! The order in which a restored VM first needs its pages, for the next restore: recorded by the first VM that runs
//! from a checkpoint which does not know it yet.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use checkpoint::restore::FirstTouches;
use swapd::FaultKind;
use tracing::info;

use super::{Homing, Stopped};
use crate::control::protocol::State;

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

impl Homing {
    /// Of a VM that runs, and whose checkpoint does not have it yet.
    pub(super) fn begin_recording(&mut self) {
        let runs = self.vm.state().0 == State::Running;
        if !runs || self.options.eager || !self.hold.wants_first_faults() {
            return;
        }
        let Ok(budget) = self.budget_pages() else { return };
        if self.vm.recording.swap(true, Ordering::SeqCst) {
            return;
        }
        let now = Instant::now();
        let order = FirstTouches::new(&self.image, budget);
        self.recording = Some(Recording {
            order,
            began: now,
            first: None,
            looked: now,
            poll: RECORD_POLL,
            look_around: LOOK_AROUND,
        });
    }

    /// Takes what was recorded meanwhile. Ends the recording when it is time.
    pub(super) fn look_at_faults(&mut self) -> Result<(), Stopped> {
        let Some(mut recording) =
            self.recording.take_if(|recording| recording.looked.elapsed() >= recording.poll)
        else {
            return Ok(());
        };
        let looked = self.look(&mut recording);
        let over = recording.order.is_full()
            || recording.first.is_some_and(|first| first.elapsed() >= RECORDED)
            || recording.began.elapsed() >= RECORDED_MAX;
        self.recording = Some(recording);
        looked?;
        if over {
            self.write_order();
        }
        Ok(())
    }

    fn look(&self, recording: &mut Recording) -> Result<(), Stopped> {
        recording.looked = Instant::now();
        let mut saw = false;
        loop {
            let seen = self.engine.record_faults(true).map_err(Stopped::Engine)?;
            for fault in seen.faults.iter().filter(|fault| fault.kind == FaultKind::Store) {
                saw = true;
                recording.order.touched(&self.image, fault.page);
            }
            if seen.left == 0 {
                break;
            }
        }
        recording.poll = if saw { RECORD_POLL } else { (recording.poll * 2).min(RECORD_POLL_MAX) };
        if saw {
            recording.first.get_or_insert(recording.looked);
        }
        // Pages that a prefetch brought along are not waited for, and make no fault.
        if recording.first.is_some_and(|first| first.elapsed() >= recording.look_around) {
            recording.look_around *= 2;
            for run in self.answer(self.engine.resident_map_async())? {
                recording.order.came(&self.image, run);
            }
        }
        Ok(())
    }

    /// Waits for the end of a recording when there is nothing else to do.
    pub(super) fn end_recording(&mut self) -> Result<(), Stopped> {
        while let Some(recording) = &self.recording {
            let poll = recording.poll;
            self.vm.halt.pause(poll)?;
            self.look_at_faults()?;
        }
        Ok(())
    }

    fn write_order(&mut self) {
        self.stop_recording_with(|homing, recording| {
            let runs = recording.order.runs();
            if runs.is_empty() {
                return;
            }
            let name = &homing.vm.facts.name;
            match homing.hold.write_first_faults(homing.image.pages(), runs.to_vec()) {
                Ok(()) => info!(vm = %name, runs = runs.len(), "the checkpoint knows in which order its pages are needed"),
                Err(error) => info!(vm = %name, %error, "the order in which pages are needed is not kept"),
            }
        });
    }

    pub(super) fn stop_recording(&mut self) {
        self.stop_recording_with(|_, _| {});
    }

    fn stop_recording_with(&mut self, keep: impl FnOnce(&mut Homing, &Recording)) {
        let Some(recording) = self.recording.take() else { return };
        let _ = self.engine.record_faults(false);
        self.vm.recording.store(false, Ordering::SeqCst);
        keep(self, &recording);
        self.forget_image();
    }
}
