//! Why a VM does not arrive.

use std::path::PathBuf;

use swapd::CommandError;

use crate::link::error::{SessionError, no_spool};
use crate::registry::RegistryError;
use crate::versions::NoneInCommon;
use crate::vm::VmError;

/// Why a VM did not arrive. It does not run here and never will; the source has been told if it could be.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The connection broke, or the source was silent for too long.
    #[error("the link to the source broke while {during}")]
    Link {
        /// What the target was doing, for the message.
        during: &'static str,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// The peer said something that it must not say.
    #[error("the peer sent rubbish: {0}")]
    Peer(String),
    /// The two sides know no protocol version in common.
    #[error(transparent)]
    Version(NoneInCommon),
    /// The source ended the session, for the reason in its words.
    #[error("the source gave up: {0}")]
    GaveUp(String),
    /// The [`CancelFlag`](crate::CancelFlag) was set before the commit.
    #[error("cancelled")]
    Cancelled,
    /// This side cannot receive such a VM, or lacks something for it. The text says what.
    #[error("{0}")]
    Setup(String),
    /// The state of its vCPUs and devices could not be kept until its memory was complete: a full disk, mostly.
    #[error("{}", no_spool(.directory))]
    Spool {
        /// Where it was to be kept.
        directory: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// The VM did not take its state, or did not start.
    #[error("the VM failed")]
    Vm(#[from] VmError),
    /// The engine refused a request of the move, or has ended.
    #[error("the engine failed")]
    Engine(#[from] CommandError),
    /// The session could not be begun or committed on record, so the VM was not started.
    #[error("the hand-over could not be recorded")]
    Registry(#[from] RegistryError),
}

impl ReceiveError {
    /// With its causes, for the source: it has no other account of what went wrong here.
    pub(super) fn chain(&self) -> String {
        let causes = std::iter::successors(std::error::Error::source(self), |error| error.source());
        causes.fold(self.to_string(), |text, cause| format!("{text}: {cause}"))
    }
}

impl From<SessionError> for ReceiveError {
    fn from(error: SessionError) -> ReceiveError {
        match error {
            SessionError::Link { during, source } => ReceiveError::Link { during, source },
            SessionError::Peer(text) => ReceiveError::Peer(text),
            SessionError::GaveUp(text) => ReceiveError::GaveUp(text),
            SessionError::Cancelled => ReceiveError::Cancelled,
            SessionError::Engine(error) => ReceiveError::Engine(error),
            SessionError::Memory(error) => ReceiveError::Setup(format!("the VM's memory failed: {error}")),
            SessionError::Spool { directory, source } => ReceiveError::Spool { directory, source },
            SessionError::Unable(text) => ReceiveError::Setup(text),
        }
    }
}
