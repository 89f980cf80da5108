//! Why a session ends before its time, on either side.

use std::io;

use swapd::CommandError;

use crate::wire::WireError;

#[derive(Debug)]
pub(crate) enum Trouble {
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
    /// This side cannot do what was asked of it.
    Unable(String),
}

impl Trouble {
    pub(crate) fn link(during: &'static str) -> impl Fn(io::Error) -> Trouble {
        move |source| Trouble::Link { during, source }
    }

    /// What the peer is told.
    pub(crate) fn farewell(&self) -> String {
        match self {
            Trouble::Link { during, source } => format!("the link broke while {during}: {source}"),
            Trouble::Peer(text) => format!("rubbish received: {text}"),
            Trouble::GaveUp(text) | Trouble::Unable(text) => text.clone(),
            Trouble::Cancelled => "cancelled".to_string(),
            Trouble::Engine(error) => error.to_string(),
            Trouble::Memory(error) => format!("memory failed: {error}"),
        }
    }
}

impl From<WireError> for Trouble {
    fn from(error: WireError) -> Trouble {
        Trouble::Peer(error.to_string())
    }
}

impl From<CommandError> for Trouble {
    fn from(error: CommandError) -> Trouble {
        Trouble::Engine(error)
    }
}
