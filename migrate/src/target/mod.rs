//! The target's session.

mod accepted;
pub(crate) mod error;
mod handover;
mod intake;
mod ledger;
mod placement;
mod plain;
mod receiving;
mod session;
mod sink;
mod spool;

pub use accepted::{DataStream, TargetLink, TargetMemory};
pub use error::ReceiveError;
pub use plain::PlainMemory;
pub use spool::StateSpool;

use std::rc::Rc;

use handover::Prepared;
use receiving::Receiving;
use session::{Failed, Session};
use spool::Spool;

use crate::hello::{refuse, write_opening};
use crate::limits::CANCEL_POLL;
use crate::link::control::ControlLink;
use crate::link::error::SessionError;
use crate::link::guard::Guard;
use crate::link::state::SessionState;
use crate::outside::{Instant, runtime, yield_to_ring};
use crate::registry::Begun;
use crate::report::Received;
use crate::vm::TargetVm;
use crate::wire::opening::{Answer, MAX_STREAMS, RefuseKind, SessionHello};
use crate::wire::record::Lane;
use crate::wire::{VERSIONS, none_in_common};

/// Receives a VM and runs it. Blocks; returns when it runs (and the placement has been checked, if asked).
///
/// # Errors
/// See [`ReceiveError`]. The engine has its frames back; its memory has parts of a VM in it: stop it.
pub fn receive(
    mut link: TargetLink<'_>,
    memory: TargetMemory,
    vm: &mut dyn TargetVm,
) -> Result<Received, ReceiveError> {
    let started = Instant::now();
    let begun = check(&link.hello, &memory)
        .and_then(|version| Ok((version, link.registry.begin(link.hello.session)?)));
    let (version, begun) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            let kind = match error {
                ReceiveError::Version(_) => RefuseKind::Version,
                _ => RefuseKind::Other,
            };
            refuse(&mut link.control, kind, &error.to_string());
            return Err(error);
        }
    };
    let result = accepted(&mut link, &memory, vm, version, begun);
    if result.is_err() {
        handover::give_up(&link);
    }
    let mut received = result?;
    received.duration_ms = started.elapsed().as_secs_f64() * 1000.0;
    Ok(received)
}

/// What can be known before the first byte of memory: the version that is spoken.
fn check(hello: &SessionHello, memory: &TargetMemory) -> Result<u16, ReceiveError> {
    // Whoever read the hello has found one; it may be another program than this one.
    let version = hello
        .version()
        .ok_or_else(|| ReceiveError::Version(none_in_common(hello.versions.clone(), VERSIONS)))?;
    let bytes = match memory {
        TargetMemory::Engine(handle) => handle.memory_bytes(),
        TargetMemory::Plain(memory) => memory.bytes(),
    };
    if bytes != hello.memory_bytes {
        let asked = hello.memory_bytes;
        return Err(ReceiveError::Setup(format!("the VM has {asked} bytes of memory, here are {bytes}")));
    }
    if hello.streams == 0 || hello.streams > MAX_STREAMS {
        return Err(ReceiveError::Setup(format!(
            "{} data streams are not 1 to {MAX_STREAMS}",
            hello.streams
        )));
    }
    Ok(version)
}

fn accepted(
    link: &mut TargetLink<'_>,
    memory: &TargetMemory,
    vm: &mut dyn TargetVm,
    version: u16,
    begun: Begun,
) -> Result<Received, ReceiveError> {
    let during = "answering it";
    let broken = |source| ReceiveError::Link { during, source };
    link.control.set_nonblocking(false).map_err(broken)?;
    tracing::debug!(version, "taking the VM");
    let accepted = Answer::Accepted { ram_bytes: link.granted_ram_bytes, version };
    write_opening(&mut link.control, &accepted.encode()).map_err(broken)?;
    let streams = data_streams(link)?;
    let runtime = runtime().map_err(|error| ReceiveError::Setup(no_ring(&error)))?;
    let control = link.control.try_clone().map_err(broken)?;
    let session_state = Rc::new(SessionState::default());
    let lanes = [Lane::ToTarget, Lane::ToSource];
    let control = runtime
        .block_on(async { ControlLink::start(control, link.hello.session, lanes, &session_state) })
        .map_err(broken)?;
    let guard = Guard::new(session_state.clone(), link.cancel, control.outbox().clone());
    let mut session = Session { runtime: &runtime, control, guard };

    let result = session.run(link, memory, vm, streams, begun);
    let Session { control, .. } = session;
    let last_word = match &result {
        Ok(_) => None,
        Err(Failed::SessionError) => session_state.farewell(),
        Err(Failed::Said(error)) => Some(error.chain()),
    };
    runtime.block_on(control.close(&session_state, last_word));
    match result {
        Ok(mut received) => {
            received.bytes_received = session_state.bytes_received();
            Ok(received)
        }
        Err(Failed::SessionError) => {
            Err(session_state.take_error().unwrap_or(SessionError::Cancelled).into())
        }
        Err(Failed::Said(error)) => Err(error),
    }
}

/// All of the session's streams, each once.
fn data_streams(link: &mut TargetLink<'_>) -> Result<Vec<DataStream>, ReceiveError> {
    let mut streams: Vec<DataStream> = Vec::new();
    for _ in 0..link.hello.streams {
        let stream = (link.streams)()
            .map_err(|source| ReceiveError::Link { during: "waiting for its streams", source })?;
        let known = streams.iter().any(|known| known.index == stream.index);
        if known || stream.index >= link.hello.streams {
            let text =
                format!("data stream {} of {} twice or out of range", stream.index, link.hello.streams);
            refuse(&mut link.control, RefuseKind::Other, &text);
            return Err(ReceiveError::Peer(text));
        }
        streams.push(stream);
    }
    Ok(streams)
}

pub(crate) fn no_ring(error: &std::io::Error) -> String {
    format!("io_uring is not available ({error}): check /proc/sys/kernel/io_uring_disabled and `ulimit -l`")
}

impl Session<'_> {
    fn run(
        &mut self,
        link: &TargetLink<'_>,
        memory: &TargetMemory,
        vm: &mut dyn TargetVm,
        streams: Vec<DataStream>,
        begun: Begun,
    ) -> Result<Received, Failed> {
        let mut receiving = Receiving::new(&link.hello, memory, streams, link.spool.clone());
        let (control, guard) = (&mut self.control, &self.guard);
        let arrived = self.runtime.block_on(async {
            let arrived = receiving.run(control, guard, link.progress).await;
            let arrived = arrived.map_err(|error| {
                guard.failed(error);
                Failed::SessionError
            });
            receiving.close().await;
            arrived
        })?;
        let began = Instant::now();
        self.load(vm, arrived.state)?;
        let took = [arrived.took, began.elapsed()].map(Into::into);
        handover::run(self, link, memory, vm, Prepared { placed: arrived.placed, took, begun })
    }

    /// Has the VM take its state. The session lives on meanwhile, and may end.
    fn load(&self, vm: &mut dyn TargetVm, state: Spool) -> Result<(), Failed> {
        let mut last = Instant::now();
        let mut lives = || {
            if last.elapsed() < CANCEL_POLL {
                return Ok(());
            }
            last = Instant::now();
            self.runtime.block_on(async {
                yield_to_ring().await;
                self.guard.check("loading the VM's state")
            })
        };
        let mut reader = state.read(&mut lives);
        let loaded = vm.load(&mut reader);
        if let Some(trouble) = reader.into_trouble() {
            self.guard.failed(trouble);
            return Err(Failed::SessionError);
        }
        loaded.map_err(|error| Failed::Said(error.into()))
    }
}
