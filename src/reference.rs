//! The reference guest as its process drives it.

use std::io::{Read, Write};

use vmprocess::control::protocol::GuestStat;
use vmprocess::failure::{Failure, FailureKind, chain};
use vmprocess::{GuestView, Machine, Newcomer};

use crate::vmm::{ReferenceMachine, RunState, VmmError};

/// Far above what the most vCPUs have, and all of a state that is believed before it is looked at.
const STATE_BYTES_MAX: u64 = 16 << 20;

/// A machine in this very process.
#[derive(Debug)]
pub(crate) struct ReferenceGuest(pub(crate) ReferenceMachine);

impl Machine for ReferenceGuest {
    fn drain(&mut self) -> Result<(), Failure> {
        // It has no such devices.
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Failure> {
        Ok(self.0.pause()?)
    }

    fn runs(&mut self) -> Result<bool, Failure> {
        match self.0.state() {
            RunState::Running => Ok(true),
            RunState::Paused => Ok(false),
            RunState::Failed(reason) => {
                Err(Failure::new(FailureKind::Vm, format!("the guest failed: {reason}")))
            }
        }
    }

    fn resume(&mut self) -> Result<(), Failure> {
        Ok(self.0.resume()?)
    }

    fn save(&mut self, to: &mut dyn Write) -> Result<(), Failure> {
        // Small, and made at once.
        let state = self.0.save()?;
        to.write_all(&state).map_err(|error| Failure::io("the guest's state is not taken", &error))
    }

    fn throttle(&mut self, percent: u8) {
        self.0.throttle(percent);
    }

    fn view(&self) -> GuestView {
        let (config, counters) = (self.0.config(), self.0.counters());
        GuestView {
            vcpus: config.vcpus,
            workload: config.workload.to_string(),
            guest: GuestStat {
                rounds: counters.rounds,
                verified_pages: counters.verified_pages,
                mismatched_pages: counters.mismatched_pages,
                filled_pages: counters.filled_pages,
                rewritten_pages: counters.rewritten_pages,
                first_mismatch: counters.first_mismatch,
            },
            failed: match self.0.state() {
                RunState::Failed(reason) => Some(reason),
                RunState::Running | RunState::Paused => None,
            },
        }
    }

    fn quit(self: Box<Self>) -> Result<(), Failure> {
        // Dropping the machine ends its threads and waits for them.
        drop(self);
        Ok(())
    }
}

/// Memory of this process that a machine is to come into.
#[derive(Debug)]
pub(crate) struct ReferenceNewcomer {
    /// Address of guest page 0.
    pub(crate) base: usize,
    pub(crate) memory_bytes: u64,
}

impl Newcomer for ReferenceNewcomer {
    fn load(self: Box<Self>, state: &mut dyn Read) -> Result<Box<dyn Machine>, Failure> {
        let mut whole = Vec::new();
        let read = state.take(STATE_BYTES_MAX + 1).read_to_end(&mut whole);
        read.map_err(|error| Failure::io("the guest's state does not come", &error))?;
        if whole.len() as u64 > STATE_BYTES_MAX {
            let text = format!("a state of more than {STATE_BYTES_MAX} bytes is not a reference guest's");
            return Err(Failure::new(FailureKind::Link, text));
        }
        let machine = ReferenceMachine::restore_sized(&whole, self.base as *mut u8, self.memory_bytes)?;
        Ok(Box::new(ReferenceGuest(machine)))
    }
}

impl From<VmmError> for Failure {
    fn from(error: VmmError) -> Failure {
        use VmmError as E;
        let kind = match &error {
            E::NoKvm | E::NoPermission | E::Kvm { .. } | E::Register(_) => FailureKind::Host,
            E::Thread { .. } => FailureKind::Other,
            E::PauseTimeout(_) | E::Failed(_) => FailureKind::Vm,
            E::NotPaused => FailureKind::Name,
            E::StateVersion { .. } | E::BadState(_) | E::MemorySize { .. } => FailureKind::Link,
            _ => FailureKind::Usage,
        };
        Failure::new(kind, chain(&error))
    }
}
