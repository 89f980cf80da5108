//! The VM as a migration's source stops it, saves it and lets it go on.

use std::io::Write;
use std::time::Instant;

use migrate::{Expected, LiveVm, SendError, SessionId, SourceVm, VmError};
use tracing::error;

use crate::failure::{Failure, FailureKind};
use crate::hold::{DID_NOT_GO_ON, Resumer, may_resume};
use crate::live_vm::{RESUME_LIMIT, RESUME_RETRY, stop, vm_error};
use crate::vm::{Vm, VmState};

/// The VM as a migration's source sees it.
pub(crate) struct Leaving<'a> {
    pub(crate) vm: &'a Vm,
    /// It was told to stand still for this: what stood still by itself is not made to run.
    paused: bool,
    /// Its name is given up, for this session.
    unnamed: Option<SessionId>,
    /// From the moment on that the target may start it.
    session: Option<SessionId>,
}

impl<'a> Leaving<'a> {
    pub(crate) fn begin(vm: &'a Vm) -> Leaving<'a> {
        Leaving { vm, paused: false, unnamed: None, session: None }
    }

    /// A VM that stands still, and may have left.
    pub(crate) fn in_doubt(vm: &'a Vm) -> Leaving<'a> {
        Leaving { vm, paused: true, unnamed: None, session: None }
    }

    /// It has not left after all.
    pub(crate) fn come_back(&mut self) -> Result<(), VmError> {
        self.take_name_back();
        self.resume()
    }

    fn failed(&self, failure: Failure) -> VmError {
        match self.vm.ended() {
            Some(_) => VmError::Ended(failure.text),
            None => vm_error(failure),
        }
    }

    /// Why the machine was not stopped. If the reason is that it cannot move as it is, the source says what it would
    /// have said before a byte moved.
    fn not_stopped(&self, failure: Failure) -> VmError {
        self.failed(self.vm.unmovable().map_or(failure, cannot_move))
    }

    /// A bug ended the migration, and the thread that sends has caught it. The VM is never left between here and there.
    pub(crate) fn after_panic(&mut self, to: &str) -> SendError {
        self.throttle(0);
        if let Some(session) = self.session {
            return SendError::InDoubt { session, to: to.to_owned() };
        }
        if self.unnamed.is_some() {
            self.take_name_back();
        }
        let paused = self.paused;
        self.vm.locked(|state| {
            if paused && state.hold.paused().is_none() {
                state.hold.pause_by(DID_NOT_GO_ON);
            }
        });
        SendError::Vm(VmError::Bug)
    }
}

fn cannot_move(why: String) -> Failure {
    Failure::new(FailureKind::CannotMove, format!("cannot move: {why}"))
}

impl LiveVm for Leaving<'_> {
    fn ended(&self) -> Option<String> {
        self.vm.ended().map(|ended| format!("{ended} while it was moving"))
    }

    fn drain(&mut self) -> Result<(), VmError> {
        // Before all of its memory is sent for nothing.
        if let Some(reason) = self.vm.over() {
            return Err(self.failed(cannot_move(reason)));
        }
        self.vm.machine(|machine| machine.drain()).map_err(vm_error)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        let (vm, paused) = (self.vm, &mut self.paused);
        let stopped = vm.machine(|machine| stop(vm, machine, paused));
        stopped.map_err(|failure| self.not_stopped(failure))
    }

    fn stood_still(&self) -> bool {
        self.vm.locked(|state| state.hold.paused().is_some())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        let who = Resumer::Source { stopped_it: self.paused };
        let may = |state: &mut VmState| may_resume(who, &state.whereabouts, &state.hold);
        if !self.vm.locked(may) || self.vm.ended().is_some() {
            return Ok(());
        }
        let deadline = Instant::now() + RESUME_LIMIT;
        loop {
            let Err(failure) = self.vm.machine(|machine| machine.resume()) else { return Ok(()) };
            if Instant::now() >= deadline {
                // Until its user resumes it.
                self.vm.locked(|state| state.hold.pause_by(DID_NOT_GO_ON));
                return Err(vm_error(failure));
            }
            std::thread::sleep(RESUME_RETRY);
        }
    }

    fn save(&mut self, to: &mut dyn Write) -> Result<(), VmError> {
        self.vm.machine(|machine| machine.save(to)).map_err(|failure| self.failed(failure))
    }

    fn expected(&mut self) -> Expected {
        let state = self.vm.machine(|machine| Ok(machine.state_bytes())).ok().flatten();
        Expected { state_bytes: state.unwrap_or(0), ..Expected::default() }
    }

    fn throttle(&mut self, percent: u8) {
        let _ = self.vm.machine(|machine| {
            machine.throttle(percent);
            Ok(())
        });
    }
}

impl SourceVm for Leaving<'_> {
    fn give_up_name(&mut self, session: SessionId) -> Result<(), VmError> {
        self.unnamed = Some(session);
        self.vm.claim(|claim| claim.leave(&session.to_string())).map_err(vm_error)
    }

    fn may_start_there(&mut self) {
        self.session = self.unnamed;
    }

    fn take_name_back(&mut self) {
        (self.unnamed, self.session) = (None, None);
        if let Err(error) = self.vm.claim(|claim| claim.take_name()) {
            error!(vm = %self.vm.facts.name, %error, "the name could not be taken back: the VM runs on as one that is leaving");
        }
    }
}
