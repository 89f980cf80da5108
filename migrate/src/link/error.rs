//! Why a session ends before its time, on either side.

use std::io;
use std::path::{Path, PathBuf};

use swapd::CommandError;

use crate::wire::WireError;

#[derive(Debug)]
pub(crate) enum SessionError {
    Link {
        during: &'static str,
        source: io::Error,
    },
    /// The peer said what it must not say.
    Peer(String),
    /// The peer gave up and said why.
    GaveUp(String),
    Cancelled,
    Engine(CommandError),
    Memory(io::Error),
    /// The VM's state could not be kept until it can be loaded.
    Spool {
        directory: PathBuf,
        source: io::Error,
    },
    /// This side cannot do what was asked of it.
    Unable(String),
}

impl SessionError {
    pub(crate) fn link(during: &'static str) -> impl Fn(io::Error) -> SessionError {
        move |source| SessionError::Link { during, source }
    }

    /// What the peer is told.
    pub(crate) fn farewell(&self) -> String {
        match self {
            SessionError::Link { during, source } => format!("the link broke while {during}: {source}"),
            SessionError::Peer(text) => format!("rubbish received: {text}"),
            SessionError::GaveUp(text) | SessionError::Unable(text) => text.clone(),
            SessionError::Cancelled => "cancelled".to_string(),
            SessionError::Engine(error) => error.to_string(),
            SessionError::Memory(error) => format!("memory failed: {error}"),
            SessionError::Spool { directory, source } => format!("{}: {source}", no_spool(directory)),
        }
    }
}

/// What is said of a state that could not be kept there.
pub(crate) fn no_spool(directory: &Path) -> String {
    format!("the state of the VM's devices cannot be kept in {} until it is loaded", directory.display())
}

impl From<WireError> for SessionError {
    fn from(error: WireError) -> SessionError {
        SessionError::Peer(error.to_string())
    }
}

impl From<CommandError> for SessionError {
    fn from(error: CommandError) -> SessionError {
        SessionError::Engine(error)
    }
}
