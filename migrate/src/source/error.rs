//! Why a VM does not move.

use swapd::CommandError;

use crate::link::error::SessionError;
use crate::session::SessionId;
use crate::tls::TlsError;
use crate::vm::VmError;

/// Why a VM did not move. Except for [`SendError::InDoubt`], it runs on at the source.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// There is no connection to the target's daemon.
    #[error("cannot reach {to}: is `vmemd serve` running there?")]
    Unreachable {
        /// `HOST:PORT` of the target, as given.
        to: String,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// It is not known to be the right one, or cannot be told in secret.
    #[error("{to} gets nothing")]
    Insecure {
        /// `HOST:PORT` of the target, as given.
        to: String,
        /// Why the connection is not secure.
        source: TlsError,
    },
    /// The source cannot do what was asked of it, such as so many streams, or lacks something for it. The text says
    /// what.
    #[error("{0}")]
    Options(String),
    /// The two sides know no protocol version in common. The text says which one to update.
    #[error("no version in common: {0}")]
    Version(String),
    /// The target does not take the VM, for the reason in its words.
    #[error("the target refused: {0}")]
    Refused(String),
    /// The target lacks RAM or store for the VM.
    #[error("the target has no room: {0}")]
    NoRoom(String),
    /// Another VM has the name at the target's host.
    #[error("the name is taken at the target: {0}")]
    NameTaken(String),
    /// The connection broke, or the target was silent for too long.
    #[error("the link to the target broke while {during}")]
    Link {
        /// What the source was doing, for the message.
        during: &'static str,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// The target said something that it must not say.
    #[error("the target sent rubbish: {0}")]
    Peer(String),
    /// The target gave up, and says why.
    #[error("the target gave up: {0}")]
    GaveUp(String),
    /// The [`CancelFlag`](crate::CancelFlag) was set before the commit.
    #[error("cancelled")]
    Cancelled,
    /// It would stand still, or did, for longer than it may.
    #[error("{0}")]
    Downtime(String),
    /// The VM did not do what the move needs of it: drain, pause, save its state, or give up its name.
    #[error("the VM failed")]
    Vm(#[from] VmError),
    /// The engine refused a request of the move, or has ended.
    #[error("the engine failed")]
    Engine(#[from] CommandError),
    /// The commit was sent and nothing is known of what became of it: the VM stays paused here, because it may
    /// run there. [`crate::resolve`] finds out.
    #[error(
        "the link broke during the hand-over and {to} does not answer: the VM stays paused here until \
             it is known whether it runs there (session {session})"
    )]
    InDoubt {
        /// The session to ask about.
        session: SessionId,
        /// The target to ask, `HOST:PORT`.
        to: String,
    },
}

impl SendError {
    /// Whether the VM runs on at the source. False: it is paused there, and may run at the target.
    pub fn still_here(&self) -> bool {
        !matches!(self, SendError::InDoubt { .. })
    }
}

impl From<SessionError> for SendError {
    fn from(error: SessionError) -> SendError {
        match error {
            SessionError::Link { during, source } => SendError::Link { during, source },
            SessionError::Peer(text) => SendError::Peer(text),
            SessionError::GaveUp(text) => SendError::GaveUp(text),
            SessionError::Cancelled => SendError::Cancelled,
            SessionError::Engine(error) => SendError::Engine(error),
            SessionError::Memory(source) => SendError::Link { during: "opening the store", source },
            SessionError::Spool { .. } => unreachable!("only a target keeps a state"),
            SessionError::Unable(text) => SendError::Options(text),
        }
    }
}
