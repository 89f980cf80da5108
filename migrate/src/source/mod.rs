//! The source's session. Its stages are in `session.rs`, the reading of memory is in [`crate::reader`].

mod connect;
mod copying;
mod discovery;
mod downtime;
mod error;
mod handover;
mod hot_room;
mod options;
mod record;
mod rounds;
mod sender;
mod session;
mod state_sink;
mod steps;
mod streams;

use crate::cancel::CancelFlag;
use crate::outside::{EngineHandle, Instant};
use crate::progress::{Phase, Progress};
use crate::report::Report;
use crate::vm::SourceVm;
use copying::Copying;
use session::Session;

pub use error::SendError;
pub use options::SourceOptions;

/// Moves a running VM. Blocks; `progress` is called on this thread, several times a second.
///
/// # Errors
/// See [`SendError`]. Whatever it is, holds are released, no writes are tracked for it and the throttle is undone.
pub fn send(
    handle: &EngineHandle,
    vm: &mut dyn SourceVm,
    options: &SourceOptions,
    progress: &dyn Fn(Progress),
    cancel: &CancelFlag,
) -> Result<Report, SendError> {
    let started = Instant::now();
    let memory_bytes = handle.memory_bytes();
    let waits = |wait| progress(Progress::waiting(Phase::Connecting, memory_bytes, wait));
    let connected = connect::connect(options, memory_bytes, &waits, cancel)?;
    let session = Session::start(handle, vm, options, progress, cancel, (connected, started))?;
    let committed = Copying::new(session).converge()?.stop()?.prepare()?.commit()?;
    Ok(committed.finish())
}
