//! The first message of a connection, and the answer to it.

use std::net::TcpStream;

use serde::{Deserialize, Serialize};

use crate::session::SessionId;
use crate::target::ReceiveError;

/// What a connection is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hello {
    /// A VM wants to move here. Answered by [`crate::receive`], or by [`refuse`].
    Session(SessionHello),
    /// One more data stream of a session: give it to that session's `streams` callback.
    Stream(StreamHello),
    /// What became of a session? Answered by [`crate::answer_resolve`].
    Resolve { session: SessionId },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionHello {
    pub session: SessionId,
    pub name: String,
    pub memory_bytes: u64,
    /// RAM that the source wishes for the VM; None: as the target likes.
    pub ram_bytes: Option<u64>,
    pub streams: u32,
    pub check_placement: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamHello {
    pub session: SessionId,
    /// Which of the session's streams, from 0.
    pub index: u32,
}

/// Why a target does not take a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefuseKind {
    Version,
    NameTaken,
    NoRoom,
    Other,
}

/// Reads what a fresh connection is for, within [`crate::limits::HELLO_LIMIT`]. A peer of another version is told so.
///
/// # Errors
/// Rubbish, another version, silence, a broken link.
pub fn read_hello(_stream: &mut TcpStream) -> Result<Hello, ReceiveError> {
    todo!()
}

/// Answers a [`Hello::Session`] (or a stream of an unknown session) with a refusal. Best effort.
pub fn refuse(_stream: &mut TcpStream, _kind: RefuseKind, _text: &str) {
    todo!()
}
