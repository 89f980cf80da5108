//! The target's session.

mod arrival;
mod handover;
mod intake;
mod ledger;
mod plain;
mod sink;

pub use plain::PlainMemory;

use std::rc::Rc;

use swapd::CommandError;

use arrival::Arrival;
use handover::Prepared;

use crate::cancel::CancelFlag;
use crate::hello::{RefuseKind, SessionHello, refuse, write_opening};
use crate::link::control::ControlLink;
use crate::link::life::Life;
use crate::link::trouble::Trouble;
use crate::link::watch::Watch;
use crate::outside::{EngineHandle, Instant, Runtime, StdStream, runtime};
use crate::progress::Progress;
use crate::registry::{Begun, Registry, RegistryError};
use crate::report::Received;
use crate::versions::NoneInCommon;
use crate::vm::{TargetVm, VmError};
use crate::wire::opening::{Answer, MAX_STREAMS};
use crate::wire::record::Lane as WireLane;
use crate::wire::{VERSIONS, none_in_common};

/// Where the arriving pages go.
#[derive(Clone, Debug)]
pub enum TargetMemory {
    Engine(EngineHandle),
    /// An anonymous mapping without an engine: for comparisons with conventional targets.
    Plain(PlainMemory),
}

/// A connection whose [`crate::StreamHello`] has been read and named this session.
#[derive(Debug)]
pub struct DataStream {
    pub index: u32,
    pub socket: StdStream,
}

/// One accepted session, and what it needs besides memory and a VM.
#[allow(missing_debug_implementations, reason = "holds borrowed callbacks")]
pub struct TargetLink<'a> {
    pub control: StdStream,
    pub hello: SessionHello,
    /// What the source is told that the VM has got here.
    pub granted_ram_bytes: u64,
    /// Waits, bounded in time, for the session's next data stream. Called `hello.streams` times, after the source was told to go on.
    pub streams: &'a mut dyn FnMut() -> std::io::Result<DataStream>,
    pub registry: &'a Registry,
    pub progress: &'a dyn Fn(Progress),
    pub cancel: &'a CancelFlag,
}

/// Why a VM did not arrive. It does not run here and never will; the source has been told if it could be.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    #[error("the link to the source broke while {during}")]
    Link { during: &'static str, source: std::io::Error },
    /// The peer said something that it must not say.
    #[error("the peer sent rubbish: {0}")]
    Peer(String),
    #[error(transparent)]
    Version(NoneInCommon),
    #[error("the source gave up: {0}")]
    GaveUp(String),
    #[error("cancelled")]
    Cancelled,
    #[error("{0}")]
    Setup(String),
    #[error("the VM failed")]
    Vm(#[from] VmError),
    #[error("the engine failed")]
    Engine(#[from] CommandError),
    #[error("the hand-over could not be recorded")]
    Registry(#[from] RegistryError),
}

impl ReceiveError {
    /// With its causes, for the source: it has no other account of what went wrong here.
    fn chain(&self) -> String {
        let causes = std::iter::successors(std::error::Error::source(self), |error| error.source());
        causes.fold(self.to_string(), |text, cause| format!("{text}: {cause}"))
    }
}

impl From<Trouble> for ReceiveError {
    fn from(trouble: Trouble) -> ReceiveError {
        match trouble {
            Trouble::Link { during, source } => ReceiveError::Link { during, source },
            Trouble::Peer(text) => ReceiveError::Peer(text),
            Trouble::GaveUp(text) => ReceiveError::GaveUp(text),
            Trouble::Cancelled => ReceiveError::Cancelled,
            Trouble::Engine(error) => ReceiveError::Engine(error),
            Trouble::Memory(error) => ReceiveError::Setup(format!("the VM's memory failed: {error}")),
            Trouble::Unable(text) => ReceiveError::Setup(text),
        }
    }
}

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
    let life = Rc::new(Life::default());
    let lanes = [WireLane::ToTarget, WireLane::ToSource];
    let control = runtime
        .block_on(async { ControlLink::start(control, link.hello.session, lanes, &life) })
        .map_err(broken)?;
    let watch = Watch::new(life.clone(), link.cancel, control.outbox().clone());
    let mut session = Session { runtime: &runtime, control, watch };

    let result = session.run(link, memory, vm, streams, begun);
    let Session { control, .. } = session;
    let last_word = match &result {
        Ok(_) => None,
        Err(Failed::Trouble) => life.farewell(),
        Err(Failed::Said(error)) => Some(error.chain()),
    };
    runtime.block_on(control.close(&life, last_word));
    match result {
        Ok(mut received) => {
            received.bytes_received = life.bytes_received();
            Ok(received)
        }
        Err(Failed::Trouble) => Err(life.take_trouble().unwrap_or(Trouble::Cancelled).into()),
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

/// How a session fails: on the wire, or with an error of this side's VM or registry.
enum Failed {
    /// The session's `Life` has it.
    Trouble,
    Said(ReceiveError),
}

struct Session<'a> {
    runtime: &'a Runtime,
    control: ControlLink,
    watch: Watch<'a>,
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
        let mut arrival = Arrival::new(&link.hello, memory, streams);
        let (control, watch) = (&mut self.control, &self.watch);
        let arrived = self.runtime.block_on(async {
            let arrived = arrival.run(control, watch, link.progress).await;
            let arrived = arrived.map_err(|trouble| {
                watch.failed(trouble);
                Failed::Trouble
            });
            arrival.close().await;
            arrived
        })?;
        let began = Instant::now();
        vm.load(&arrived.state).map_err(|error| Failed::Said(error.into()))?;
        let took = [arrived.took, began.elapsed()].map(Into::into);
        handover::run(self, link, memory, vm, Prepared { placed: arrived.placed, took, begun })
    }
}
