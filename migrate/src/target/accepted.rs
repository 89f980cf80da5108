//! What the process that receives a VM hands in: connections, memory, and whom to report to.

use super::plain::PlainMemory;
use super::spool::StateSpool;
use crate::cancel::CancelFlag;
use crate::outside::{EngineHandle, StdStream};
use crate::progress::Progress;
use crate::registry::Registry;
use crate::wire::opening::SessionHello;

/// Where the arriving pages go.
#[derive(Clone, Debug)]
pub enum TargetMemory {
    /// Into the RAM and the store of an engine, which must have no VM in it yet.
    Engine(EngineHandle),
    /// An anonymous mapping without an engine: for comparisons with conventional targets.
    Plain(PlainMemory),
}

/// A connection whose [`crate::StreamHello`] has been read and named this session.
#[derive(Debug)]
pub struct DataStream {
    /// Which of the session's streams, as its hello says.
    pub index: u32,
    /// Nothing behind the hello has been read from it.
    pub socket: StdStream,
}

/// One accepted session, and what it needs besides memory and a VM.
#[allow(missing_debug_implementations, reason = "holds borrowed callbacks")]
pub struct TargetLink<'a> {
    /// The connection on which `hello` came, with nothing behind it read, and not answered yet.
    pub control: StdStream,
    /// What the source offers.
    pub hello: SessionHello,
    /// What the source is told that the VM has got here.
    pub granted_ram_bytes: u64,
    /// Waits, for a bounded time, for the session's next data stream. Called `hello.streams` times, once the source has
    /// been told to go on.
    pub streams: &'a mut dyn FnMut() -> std::io::Result<DataStream>,
    /// Where the state of its vCPUs and devices waits until all of its memory is here.
    pub spool: StateSpool,
    /// Where it is decided, and recorded, which side runs the VM.
    pub registry: &'a Registry,
    /// Called on the thread of [`crate::receive`], several times a second while pages arrive.
    pub progress: &'a dyn Fn(Progress),
    /// Set to give the VM up. It has no effect once the commit has arrived.
    pub cancel: &'a CancelFlag,
}
