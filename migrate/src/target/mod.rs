//! The target's session.

mod plain;

pub use plain::PlainMemory;

use std::net::TcpStream;

use swapd::{CommandError, EngineHandle};

use crate::cancel::CancelFlag;
use crate::hello::SessionHello;
use crate::progress::Progress;
use crate::registry::{Registry, RegistryError};
use crate::report::Received;
use crate::vm::{TargetVm, VmError};

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
    pub socket: TcpStream,
}

/// One accepted session, and what it needs besides memory and a VM.
#[expect(missing_debug_implementations, reason = "holds borrowed callbacks")]
pub struct TargetLink<'a> {
    pub control: TcpStream,
    pub hello: SessionHello,
    /// What the source is told that the VM has got here.
    pub granted_ram_bytes: u64,
    /// Waits, bounded in time, for the session's next data stream. Called `hello.streams` times, after the source was told to go on.
    pub streams: &'a mut dyn FnMut() -> std::io::Result<DataStream>,
    pub registry: &'a dyn Registry,
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
    #[error("the peer speaks version {theirs}, this is version {ours}")]
    Version { theirs: u16, ours: u16 },
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

/// Receives a VM and runs it. Blocks; returns when it runs (and the placement has been checked, if asked).
///
/// # Errors
/// See [`ReceiveError`]. The engine has its frames back; its memory has parts of a VM in it: stop it.
pub fn receive(
    _link: TargetLink<'_>,
    _memory: TargetMemory,
    _vm: &mut dyn TargetVm,
) -> Result<Received, ReceiveError> {
    todo!()
}
