//! Reaches the target, offers the VM, and opens the data streams.

use std::io;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use super::error::SendError;
use super::options::SourceOptions;
use crate::cancel::{CancelFlag, is_cancelled};
use crate::hello::{OpeningError, read_opening, write_opening};
use crate::limits::{ACCEPT_LIMIT, CANCEL_POLL, CONNECT_LIMIT, scaled_for_tests};
use crate::outside::{Instant, StdStream, on_own_thread};
use crate::resolve::{self, ReachError};
use crate::session::SessionId;
use crate::versions::highest_common;
use crate::wait::Wait;
use crate::wire::opening::{
    Answer, Hello, MAX_MEMORY_BYTES, MAX_OFFER, MAX_STREAMS, NAME_MAX, Preamble, RefuseKind, SessionHello,
    StreamHello, is_name,
};
use crate::wire::{VERSIONS, WireError, none_in_common};

/// A target that has accepted the VM.
#[derive(Debug)]
pub(crate) struct Connected {
    pub(crate) session: SessionId,
    /// RAM that the VM gets there.
    pub(crate) ram_bytes: u64,
    /// What is spoken.
    pub(crate) version: u16,
    pub(crate) control: StdStream,
    pub(crate) streams: Vec<StdStream>,
}

fn check(options: &SourceOptions, memory_bytes: u64) -> Result<(), SendError> {
    let wrong = |text: String| Err(SendError::Options(text));
    if !is_name(&options.name) {
        return wrong(format!(
            "{:?} is no name of a VM: 1 to {NAME_MAX} letters, digits, '.', '_' or '-', not a dot first",
            options.name
        ));
    }
    if memory_bytes > MAX_MEMORY_BYTES {
        return wrong(format!("{memory_bytes} bytes of memory are more than {MAX_MEMORY_BYTES}"));
    }
    if options.streams == 0 || options.streams > MAX_STREAMS {
        return wrong(format!("{} data streams are not 1 to {MAX_STREAMS}", options.streams));
    }
    let offer_bytes = options.offer.as_ref().map_or(0, String::len);
    if offer_bytes > MAX_OFFER {
        return wrong(format!(
            "its command line of {offer_bytes} bytes is too long to be sent (at most {MAX_OFFER}): shorten it"
        ));
    }
    if options.max_throttle > 99 {
        return wrong(format!("a throttle of {} % would stop the VM: at most 99", options.max_throttle));
    }
    Ok(())
}

pub(crate) fn connect(
    options: &SourceOptions,
    memory_bytes: u64,
    waits: &dyn Fn(Wait),
    cancel: &CancelFlag,
) -> Result<Connected, SendError> {
    check(options, memory_bytes)?;
    let link = |during| move |source| SendError::Link { during, source };
    let session = SessionId::random().map_err(link("choosing a session"))?;
    waits(Wait::Connect);
    let mut control = reach(options, scaled_for_tests(CONNECT_LIMIT), cancel)?;
    let hello = Hello::Session(SessionHello {
        versions: VERSIONS,
        session,
        name: options.name.clone(),
        memory_bytes,
        ram_bytes: options.ram_bytes,
        streams: options.streams,
        check_placement: options.check_placement,
        offer: options.offer.clone(),
    });
    write_opening(&mut control, &hello.encode()).map_err(link("offering the VM"))?;
    waits(Wait::Accept);
    let (ram_bytes, version) = accepted(&mut control, cancel)?;
    waits(Wait::Connect);
    let mut streams = Vec::new();
    for index in 0..options.streams {
        let mut stream = reach(options, scaled_for_tests(CONNECT_LIMIT), cancel)?;
        let hello = Hello::Stream(StreamHello { session, index });
        write_opening(&mut stream, &hello.encode()).map_err(link("opening the streams"))?;
        streams.push(stream);
    }
    Ok(Connected { session, ram_bytes, version, control, streams })
}

/// Waits for the target's answer: the RAM that the VM gets, and the version that is spoken.
fn accepted(control: &mut StdStream, cancel: &CancelFlag) -> Result<(u64, u16), SendError> {
    let opened = read_opening(control, scaled_for_tests(ACCEPT_LIMIT), || is_cancelled(cancel));
    let answer = opened.and_then(|(preamble, body)| {
        let theirs = Preamble::open(&preamble).map_err(OpeningError::Wire)?.versions().clone();
        Ok((Answer::decode(&preamble, &body).map_err(OpeningError::Wire)?, theirs))
    });
    let other_version = |theirs| SendError::Version(none_in_common(VERSIONS, theirs).to_string());
    match answer {
        Ok((Answer::Accepted { ram_bytes, version }, _)) => {
            tracing::debug!(version, "the target takes the VM");
            Ok((ram_bytes, version))
        }
        Ok((Answer::Refused { kind, text }, theirs)) => Err(match kind {
            // Every refusal carries its sender's versions. A target of one exact version does not name ours in its
            // text.
            RefuseKind::Version if highest_common(&VERSIONS, &theirs).is_none() => other_version(theirs),
            RefuseKind::Version => SendError::Version(text),
            RefuseKind::NameTaken => SendError::NameTaken(text),
            RefuseKind::NoRoom => SendError::NoRoom(text),
            RefuseKind::Other => SendError::Refused(text),
        }),
        Ok((Answer::Resolved(_), _)) => Err(SendError::Peer("an answer to another question".to_string())),
        Err(OpeningError::Cancelled) => Err(SendError::Cancelled),
        Err(OpeningError::Wire(WireError::Version(theirs))) => Err(other_version(theirs)),
        Err(OpeningError::Wire(error)) => Err(SendError::Peer(error.to_string())),
        Err(OpeningError::Io(source)) => {
            Err(SendError::Link { during: "waiting for it to accept the VM", source })
        }
    }
}

/// Connects on another thread, because neither a name look-up nor a connect can be cancelled. It ends by itself.
fn reach(options: &SourceOptions, limit: Duration, cancel: &CancelFlag) -> Result<StdStream, SendError> {
    let unreachable = |source| SendError::Unreachable { to: options.to.clone(), source };
    let failed = |error| match error {
        ReachError::Link(source) => unreachable(source),
        ReachError::Insecure(source) => SendError::Insecure { to: options.to.clone(), source },
    };
    let (to, security) = (options.to.clone(), options.security.clone());
    // If nobody waits any more, the connection is closed at once.
    let result = on_own_thread("vmemd-connect", move || resolve::connect(&to, &security, limit))
        .map_err(unreachable)?;
    let deadline = Instant::now() + limit;
    loop {
        match result.wait(CANCEL_POLL) {
            Ok(connected) => return connected.map_err(failed),
            Err(RecvTimeoutError::Disconnected) => return Err(unreachable(io::ErrorKind::Other.into())),
            Err(RecvTimeoutError::Timeout) if is_cancelled(cancel) => return Err(SendError::Cancelled),
            Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline => {
                return Err(unreachable(io::ErrorKind::TimedOut.into()));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}
