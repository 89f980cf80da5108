//! The VM as a checkpoint stops it, saves it and lets it go on.

use std::io::Write;
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use checkpoint::format::Disk;
use migrate::{Expected, LiveVm, VmError};
use tracing::info;

use crate::failure::{Failure, FailureKind};
use crate::hold::{DID_NOT_GO_ON, FOR_ITS_CHECKPOINT, Resumer, may_resume};
use crate::machine::Machine;
use crate::vm::Vm;

/// How long it is tried again to let a VM go on: a QEMU that has given its disks away takes them back, and a target
/// that ends may hold their locks still.
pub(crate) const RESUME_LIMIT: Duration = Duration::from_secs(5);
pub(crate) const RESUME_RETRY: Duration = Duration::from_millis(100);

/// The VM as a checkpoint sees it.
///
/// From the pause to the resume it keeps the machine to itself: a `pause`, a `resume` or a store that works again waits
/// for that long, and finds the VM as if it had never stood still.
pub(crate) struct Saving<'a> {
    pub(crate) vm: &'a Vm,
    kept: Option<MutexGuard<'a, Option<Box<dyn Machine>>>>,
    /// It was told to stand still for this.
    paused: bool,
    /// The name of its disks' snapshots, if they are to have some.
    snapshot: Option<String>,
    /// The disks that have their version of the pause.
    disks: Vec<Disk>,
}

impl<'a> Saving<'a> {
    /// `snapshot`: each of its disks gets a snapshot of this name in the pause.
    pub(crate) fn begin(vm: &'a Vm, snapshot: Option<String>) -> Saving<'a> {
        Saving { vm, kept: None, paused: false, snapshot, disks: Vec::new() }
    }

    /// The disks that have got their version.
    pub(crate) fn disks(&mut self) -> Vec<Disk> {
        std::mem::take(&mut self.disks)
    }

    fn machine<T>(
        &mut self,
        work: impl FnOnce(&mut dyn Machine) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        match self.kept.as_deref_mut() {
            Some(Some(machine)) => work(&mut **machine),
            Some(None) => Err(Failure::new(FailureKind::Name, "its vCPUs are not here")),
            None => self.vm.machine(work),
        }
    }

    fn failed(&self, failure: Failure) -> VmError {
        match self.ended() {
            Some(_) => VmError::Ended(failure.text),
            None => vm_error(failure),
        }
    }

    fn note_stopped(&self, stopped: bool) {
        self.vm.locked(|state| state.checkpoint.iter_mut().for_each(|now| now.stopped = stopped));
    }

    /// It is saved, and does not go on: it is to be stopped.
    pub(crate) fn stays(&mut self) {
        self.vm.locked(|state| {
            if state.hold.paused().is_none() {
                state.hold.pause_by(FOR_ITS_CHECKPOINT);
            }
        });
        self.note_stopped(false);
        self.kept = None;
    }

    /// A bug ended the checkpoint, and the thread has caught it.
    pub(crate) fn after_panic(&mut self) -> Failure {
        self.throttle(0);
        let resumed = self.resume();
        let text = "a bug in vmemd ended the checkpoint: see the panic in its log";
        match resumed {
            Ok(()) => Failure::new(FailureKind::Other, text),
            Err(error) => Failure::new(FailureKind::Vm, format!("{text}; {error}")),
        }
    }
}

/// A failure of the VM's own process, as a session knows it.
pub(crate) fn vm_error(Failure { kind, text }: Failure) -> VmError {
    match kind {
        FailureKind::CannotMove => VmError::CannotMove(text),
        FailureKind::Resources => VmError::Resources(text),
        _ => VmError::Machine(text),
    }
}

/// Stops a VM for a session that lets it go on afterwards, and notes what it was found doing. `paused`: it was told to
/// stand still, so the session must let it go on even if this fails.
pub(crate) fn stop(vm: &Vm, machine: &mut dyn Machine, paused: &mut bool) -> Result<(), Failure> {
    let (runs, tells) = (machine.runs()?, machine.run_state().is_some());
    vm.locked(|state| {
        if !runs {
            state.hold.found_still();
            return;
        }
        state.hold.ran_in_stall();
        if tells {
            state.hold.found_running();
        }
    });
    *paused = true;
    let stopped = machine.pause();
    if stopped.as_ref().is_err_and(|failure| failure.kind == FailureKind::Name) {
        // It sleeps, and was not stopped: it wakes up by itself, and must not be told to go on.
        *paused = false;
    }
    stopped
}

impl LiveVm for Saving<'_> {
    fn ended(&self) -> Option<String> {
        let ended = match self.kept.as_deref() {
            Some(machine) => machine.as_ref().and_then(|machine| machine.ended()),
            None => self.vm.ended(),
        };
        ended.map(|ended| format!("{ended} while it was being saved"))
    }

    fn drain(&mut self) -> Result<(), VmError> {
        self.machine(|machine| machine.drain()).map_err(|failure| self.failed(failure))
    }

    fn pause(&mut self) -> Result<(), VmError> {
        // First: whoever would wait for the machine from now on must know that it is kept.
        self.note_stopped(true);
        self.kept = Some(self.vm.keep_machine());
        let (vm, mut paused) = (self.vm, false);
        let stopped = self.machine(|machine| stop(vm, machine, &mut paused));
        self.paused = paused;
        stopped.map_err(|failure| self.failed(failure))
    }

    fn stood_still(&self) -> bool {
        self.vm.locked(|state| state.hold.paused().is_some())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        let who = Resumer::Checkpoint { stopped_it: std::mem::take(&mut self.paused) };
        let may = self.vm.locked(|state| may_resume(who, &state.whereabouts, &state.hold));
        let resumed = if may && self.ended().is_none() { self.try_to_resume() } else { Ok(()) };
        // A stall that came meanwhile has left the pausing to this.
        let stalled = self.vm.locked(|state| {
            state.checkpoint.iter_mut().for_each(|now| now.stopped = false);
            state.hold.is_stalled()
        });
        if stalled && let Err(error) = self.machine(|machine| machine.pause()) {
            info!(vm = %self.vm.facts.name, %error, "while pausing the VM");
        }
        self.kept = None;
        // What has been relieved meanwhile, too.
        self.vm.go_on();
        resumed
    }

    fn save(&mut self, to: &mut dyn Write) -> Result<(), VmError> {
        // The disks first: a machine that is saved has given them away.
        if let Some(snapshot) = self.snapshot.take() {
            let taken = self.machine(|machine| machine.snapshot_disks(&snapshot));
            self.disks = taken.map_err(|failure| self.failed(failure))?;
        }
        self.machine(|machine| machine.save(to)).map_err(|failure| self.failed(failure))
    }

    fn expected(&mut self) -> Expected {
        let state = self.machine(|machine| Ok(machine.state_bytes())).ok().flatten();
        Expected { state_bytes: state.unwrap_or(0), ..Expected::default() }
    }

    fn throttle(&mut self, percent: u8) {
        let _ = self.machine(|machine| {
            machine.throttle(percent);
            Ok(())
        });
    }
}

impl Saving<'_> {
    fn try_to_resume(&mut self) -> Result<(), VmError> {
        let deadline = Instant::now() + RESUME_LIMIT;
        loop {
            let Err(failure) = self.machine(|machine| machine.resume()) else { return Ok(()) };
            if Instant::now() >= deadline {
                // Until its user resumes it.
                self.vm.locked(|state| state.hold.pause_by(DID_NOT_GO_ON));
                return Err(vm_error(failure));
            }
            std::thread::sleep(RESUME_RETRY);
        }
    }
}

#[cfg(test)]
#[path = "live_vm_tests.rs"]
mod tests;
