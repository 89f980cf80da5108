//! The first message of a connection and the answer to it, read and written by blocking calls of bounded time.

use std::io::{self, Read, Write};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::limits::{CANCEL_POLL, HELLO_LIMIT};
use crate::outside::{Instant, StdStream};
use crate::session::SessionId;
use crate::target::ReceiveError;
use crate::versions::{Versions, highest_common};
use crate::wire::opening::{Answer, MAX_SESSION_BODY, PREAMBLE_BYTES, Preamble};
use crate::wire::{VERSIONS, WireError, none_in_common};

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
    /// Versions of the protocol that the source knows.
    #[serde(default = "unsaid_versions")]
    pub versions: Versions,
    pub session: SessionId,
    pub name: String,
    pub memory_bytes: u64,
    /// RAM that the source wishes for the VM; None: as the target likes.
    pub ram_bytes: Option<u64>,
    pub streams: u32,
    pub check_placement: bool,
    /// What the target needs to make the VM's machine, in the words of whoever runs it; None: it comes in the VM's state.
    pub offer: Option<String>,
}

/// Of a hello that another program of this host has handed on which knows of one version only.
fn unsaid_versions() -> Versions {
    2..=2
}

impl SessionHello {
    /// What is spoken in this session: the highest version that both sides know.
    #[must_use]
    pub fn version(&self) -> Option<u16> {
        highest_common(&VERSIONS, &self.versions)
    }
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

/// Reads what a fresh connection is for, within [`HELLO_LIMIT`]. A peer that knows none of our versions is told so.
///
/// # Errors
/// Rubbish, no version in common, silence, a broken link.
pub fn read_hello(stream: &mut StdStream) -> Result<Hello, ReceiveError> {
    const DURING: &str = "it was to say what it wants";
    stream.set_nonblocking(false).map_err(|source| ReceiveError::Link { during: DURING, source })?;
    let hello = read_opening(stream, HELLO_LIMIT, || false)
        .and_then(|(preamble, body)| Hello::decode(&preamble, &body).map_err(OpeningError::Wire));
    hello.map_err(|error| match error {
        OpeningError::Io(source) => ReceiveError::Link { during: DURING, source },
        OpeningError::Wire(WireError::Version(theirs)) => {
            let none = none_in_common(theirs, VERSIONS);
            refuse(stream, RefuseKind::Version, &none.to_string());
            ReceiveError::Version(none)
        }
        OpeningError::Wire(error) => {
            refuse(stream, RefuseKind::Other, &error.to_string());
            ReceiveError::Peer(error.to_string())
        }
        OpeningError::Cancelled => ReceiveError::Cancelled,
    })
}

/// Answers a [`Hello::Session`] (or anything else that is not wanted) with a refusal. Best effort.
pub fn refuse(stream: &mut StdStream, kind: RefuseKind, text: &str) {
    let answer = Answer::Refused { kind, text: text.to_string() };
    if let Err(error) = write_opening(stream, &answer.encode()) {
        tracing::debug!(%error, "a refusal could not be delivered");
    }
}

/// What can go wrong while an opening, or its answer, is read.
#[derive(Debug)]
pub(crate) enum OpeningError {
    Io(io::Error),
    Wire(WireError),
    Cancelled,
}

/// Writes an opening or an answer, which is small enough for the socket's buffer.
pub(crate) fn write_opening(stream: &mut StdStream, bytes: &[u8]) -> io::Result<()> {
    stream.set_write_timeout(Some(HELLO_LIMIT))?;
    stream.write_all(bytes)
}

/// Reads an opening or an answer, and nothing behind it.
pub(crate) fn read_opening(
    stream: &mut StdStream,
    limit: Duration,
    cancelled: impl Fn() -> bool,
) -> Result<([u8; PREAMBLE_BYTES], Vec<u8>), OpeningError> {
    let deadline = Instant::now() + limit;
    let mut preamble = [0; PREAMBLE_BYTES];
    read_until(stream, &mut preamble, deadline, &cancelled)?;
    let opened = match Preamble::open(&preamble) {
        Err(error @ WireError::Version(_)) => {
            // A connection that is closed with something unread in it may lose the answer on its way.
            let mut rest = vec![0; unread(&preamble)];
            let _ = read_until(stream, &mut rest, deadline, &cancelled);
            return Err(OpeningError::Wire(error));
        }
        opened => opened.map_err(OpeningError::Wire)?,
    };
    let mut body = vec![0; opened.body_bytes()];
    read_until(stream, &mut body, deadline, &cancelled)?;
    Ok((preamble, body))
}

/// What follows a preamble of a version that we do not know, as far as it may be read.
fn unread(preamble: &[u8; PREAMBLE_BYTES]) -> usize {
    let [.., a, b, c, d] = *preamble;
    (u32::from_le_bytes([a, b, c, d]) as usize).min(MAX_SESSION_BODY)
}

/// A slow peer cannot make it longer than `deadline` by sending a byte now and then.
fn read_until(
    stream: &mut StdStream,
    into: &mut [u8],
    deadline: Instant,
    cancelled: &impl Fn() -> bool,
) -> Result<(), OpeningError> {
    let mut filled = 0;
    while filled < into.len() {
        if cancelled() {
            return Err(OpeningError::Cancelled);
        }
        if Instant::now() >= deadline {
            return Err(OpeningError::Io(io::ErrorKind::TimedOut.into()));
        }
        stream.set_read_timeout(Some(CANCEL_POLL)).map_err(OpeningError::Io)?;
        match stream.read(&mut into[filled..]) {
            Ok(0) => return Err(OpeningError::Io(io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => filled += count,
            Err(error) if is_retry(&error) => {}
            Err(error) => return Err(OpeningError::Io(error)),
        }
    }
    Ok(())
}

fn is_retry(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), Interrupted | TimedOut | WouldBlock)
}
