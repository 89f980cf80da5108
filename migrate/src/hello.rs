//! The first message of a connection and the answer to it, read and written by blocking calls of bounded time.

use std::io::{self, Read, Write};
use std::time::Duration;

use crate::limits::{CANCEL_POLL, HELLO_LIMIT};
use crate::outside::{Instant, StdStream};
use crate::target::error::ReceiveError;
use crate::wire::opening::{Answer, Hello, PREAMBLE_BYTES, Preamble, RefuseKind};
use crate::wire::{VERSION, WireError};

/// Reads what a fresh connection is for, within [`HELLO_LIMIT`]. A peer of another version is told so.
///
/// # Errors
/// Rubbish, another version, silence, a broken link.
pub fn read_hello(stream: &mut StdStream) -> Result<Hello, ReceiveError> {
    const DURING: &str = "it was to say what it wants";
    stream.set_nonblocking(false).map_err(|source| ReceiveError::Link { during: DURING, source })?;
    let hello = read_opening(stream, HELLO_LIMIT, || false)
        .and_then(|(preamble, body)| Hello::decode(&preamble, &body).map_err(OpeningError::Wire));
    hello.map_err(|error| match error {
        OpeningError::Io(source) => ReceiveError::Link { during: DURING, source },
        OpeningError::Wire(WireError::Version(theirs)) => {
            let text = format!("this host speaks version {VERSION} of the protocol, not {theirs}");
            refuse(stream, RefuseKind::Version, &text);
            ReceiveError::Version { theirs, ours: VERSION }
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
    let opened = Preamble::open(&preamble).map_err(OpeningError::Wire)?;
    let mut body = vec![0; opened.body_bytes()];
    read_until(stream, &mut body, deadline, &cancelled)?;
    Ok((preamble, body))
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
