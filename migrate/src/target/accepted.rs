//! What whoever receives a VM hands in: connections, memory, and who is told.

use super::plain::PlainMemory;
use crate::cancel::CancelFlag;
use crate::outside::{EngineHandle, StdStream};
use crate::progress::Progress;
use crate::registry::Registry;
use crate::wire::opening::SessionHello;

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
