//! What a session needs of the VM on its side. The VM's owner implements it.

use std::io::{self, Read, Write};
use std::time::Duration;

use crate::session::SessionId;

/// Why a VM did not do what it was asked. Made where it arises; each text stands for itself.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// Its machine (vCPUs, devices, the program that they are in) refused, or failed.
    #[error("{0}")]
    Machine(String),
    /// There is no machine any more.
    #[error("{0}")]
    Ended(String),
    /// It is one, or has come into a state, that cannot move.
    #[error("{0}")]
    CannotMove(String),
    /// This host has too little of something for it: RAM, disk space.
    #[error("{0}")]
    Resources(String),
    /// It has more state than this target takes.
    #[error(
        "its vCPUs and devices have {bytes} bytes of state, and vmemd at the target takes at most {most}: \
         update vmemd there"
    )]
    TooMuchState {
        /// Bytes of state that it has, or has written so far.
        bytes: u64,
        /// The most that the target's version of the protocol allows.
        most: u64,
    },
    /// A read or a write of its owner's failed.
    #[error("{doing}")]
    Io {
        /// What was being done, for the message.
        doing: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
    /// It stands still, and did not go on when it was told to.
    #[error("it could not be resumed")]
    NotResumed(#[source] Box<VmError>),
    /// A panic of vmemd's own.
    #[error("a bug in vmemd ended the migration: see the panic in its log")]
    Bug,
}

impl VmError {
    /// With its causes, for the other side: it has no other account of what went wrong here.
    pub(crate) fn chain(&self) -> String {
        let causes = std::iter::successors(std::error::Error::source(self), |error| error.source());
        causes.fold(self.to_string(), |text, cause| format!("{text}: {cause}"))
    }
}

/// What a VM's stop and start are expected to cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Expected {
    /// To stop it, and to start it; and what saving and loading its state take however small that is.
    pub time: Duration,
    /// Of the state that is sent, and loaded, while it stands still.
    pub state_bytes: u64,
}

impl Default for Expected {
    /// A VM without much of a state.
    fn default() -> Expected {
        Expected { time: Duration::from_millis(10), state_bytes: 0 }
    }
}

/// A VM that runs while its memory is read: for a migration, or into the image of a checkpoint. Called on the thread
/// that reads, never from inside its async runtime, so an implementation may block (shortly: while the VM is paused,
/// all of it counts as downtime).
pub trait LiveVm {
    /// Why there is no VM any more, if it ended meanwhile. The target of a migration is told.
    fn ended(&self) -> Option<String> {
        None
    }
    /// Returns when the I/O has ended that was under way at the call and of which devices write to memory by
    /// themselves (disks without a page cache in between): the end of such I/O leaves no trace in the page tables. The
    /// VM runs on, and new I/O may have begun.
    fn drain(&mut self) -> Result<(), VmError>;
    /// Returns when no vCPU runs in the guest, no device writes to memory, and none will until
    /// [`resume`](Self::resume).
    fn pause(&mut self) -> Result<(), VmError>;
    /// Whether it stood still by its user's will before it was paused here: wherever it then is, it stays paused.
    fn stood_still(&self) -> bool;
    /// Undoes [`pause`](Self::pause): it runs again, unless it [stood still](Self::stood_still) before.
    fn resume(&mut self) -> Result<(), VmError>;
    /// Writes the state of vCPUs and devices, while paused. What is written goes over the wire, or into a file, while
    /// the rest is still being made: a write waits when the link carries less, and fails when the session has ended.
    /// Whoever gets such an error gives up at once.
    fn save(&mut self, to: &mut dyn Write) -> Result<(), VmError>;
    /// Keeps the vCPUs out of the guest for this share of time (0: not at all).
    fn throttle(&mut self, percent: u8);
    /// What of the downtime is due to the VM itself, as far as that is known before it is stopped. May take its time.
    fn expected(&mut self) -> Expected {
        Expected::default()
    }
}

/// The VM at the source of a migration, on the thread that called [`crate::send`].
pub trait SourceVm: LiveVm {
    /// Frees the VM's name, so that the target may take it (both can be on one host). While the VM runs: it may take
    /// its time.
    fn give_up_name(&mut self, session: SessionId) -> Result<(), VmError>;
    /// The target may start the VM from now on: whoever does not hear how this ends asks it what became of the
    /// session. Part of the downtime: must wait for no disk.
    fn may_start_there(&mut self) {}
    /// The hand-over did not happen after all, and the VM goes on already: undo [`give_up_name`](Self::give_up_name).
    fn take_name_back(&mut self);
}

/// The VM at the target. Called on the thread that called [`crate::receive`], outside of its async runtime.
pub trait TargetVm {
    /// Takes the state from [`LiveVm::save`], to its end. Memory already has its final content. Must not run the
    /// guest. A read fails when the session has ended, or the state cannot be read back from where it was kept.
    fn load(&mut self, state: &mut dyn Read) -> Result<(), VmError>;
    /// The hand-over is decided: run, or stay `paused`. If this fails, no vCPU may have entered the guest. Part of the
    /// downtime: must wait for no disk.
    fn start(&mut self, paused: bool) -> Result<(), VmError>;
    /// It has started, and its source has been told: take the name. This may take its time.
    fn take_name(&mut self) {}
}
