//! The source's session.

use std::time::Duration;

use swapd::{CommandError, EngineHandle};

use crate::cancel::CancelFlag;
use crate::progress::Progress;
use crate::report::Report;
use crate::session::SessionId;
use crate::vm::{SourceVm, VmError};

#[derive(Clone, Debug)]
pub struct SourceOptions {
    pub name: String,
    /// `HOST:PORT` of the target's daemon.
    pub to: String,
    /// RAM that the VM shall have there; None: as the target likes.
    pub ram_bytes: Option<u64>,
    pub streams: u32,
    pub downtime_target: Duration,
    pub max_rounds: u32,
    /// 0: never throttle.
    pub max_throttle: u8,
    /// Have the target measure how much of what the VM touches in the first second is in RAM.
    pub check_placement: bool,
}

impl SourceOptions {
    /// With the defaults of `vmemd migrate`.
    pub fn new(name: impl Into<String>, to: impl Into<String>) -> SourceOptions {
        SourceOptions {
            name: name.into(),
            to: to.into(),
            ram_bytes: None,
            streams: 2,
            downtime_target: Duration::from_millis(50),
            max_rounds: 30,
            max_throttle: 99,
            check_placement: false,
        }
    }
}

/// Why a VM did not move. Except for [`SendError::InDoubt`], it runs on at the source.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    #[error("cannot reach {to}: is `vmemd serve` running there?")]
    Unreachable { to: String, source: std::io::Error },
    #[error("{0}")]
    Options(String),
    #[error("the target speaks another version: {0}")]
    Version(String),
    #[error("the target refused: {0}")]
    Refused(String),
    #[error("the target has no room: {0}")]
    NoRoom(String),
    #[error("the name is taken at the target: {0}")]
    NameTaken(String),
    #[error("the link to the target broke while {during}")]
    Link { during: &'static str, source: std::io::Error },
    /// The target said something that it must not say.
    #[error("the target sent rubbish: {0}")]
    Peer(String),
    /// The target gave up, and says why.
    #[error("the target gave up: {0}")]
    GaveUp(String),
    #[error("cancelled")]
    Cancelled,
    #[error("the VM failed")]
    Vm(#[from] VmError),
    #[error("the engine failed")]
    Engine(#[from] CommandError),
    /// The commit was sent and nothing is known of what became of it: the VM stays paused here, because it may
    /// run there. [`crate::resolve`] finds out.
    #[error(
        "the link broke during the hand-over and {to} does not answer: the VM stays paused here until \
             it is known whether it runs there (session {session})"
    )]
    InDoubt { session: SessionId, to: String },
}

impl SendError {
    /// Whether the VM runs on at the source. False: it is paused there, and may run at the target.
    pub fn still_here(&self) -> bool {
        !matches!(self, SendError::InDoubt { .. })
    }
}

/// Moves a running VM. Blocks; `progress` is called on this thread, several times a second.
///
/// # Errors
/// See [`SendError`]. Whatever it is, holds are released, write tracking is off and the throttle is undone.
pub fn send(
    _handle: &EngineHandle,
    _vm: &mut dyn SourceVm,
    _options: &SourceOptions,
    _progress: &dyn Fn(Progress),
    _cancel: &CancelFlag,
) -> Result<Report, SendError> {
    todo!()
}
