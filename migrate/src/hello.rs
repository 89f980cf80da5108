//! The first message of a connection and the answer to it, read and written by blocking calls of bounded time.

use std::io::{self, Read, Write};
use std::time::Duration;

use crate::limits::{CANCEL_POLL, HELLO_LIMIT};
use crate::outside::{Instant, StdStream};
use crate::target::error::ReceiveError;
use crate::wire::opening::{Answer, Hello, MAX_SESSION_BODY, PREAMBLE_BYTES, Preamble, RefuseKind};
use crate::wire::{VERSIONS, WireError, none_in_common};

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
