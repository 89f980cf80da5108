//! The parts of a session that the receiving and the hand-over share.

use super::error::ReceiveError;
use crate::link::control::ControlLink;
use crate::link::guard::Guard;
use crate::outside::Runtime;

/// How a session fails: on the wire, or with an error of this side's VM or registry.
pub(super) enum Failed {
    /// The session's `SessionState` has it.
    SessionError,
    Said(ReceiveError),
}

pub(super) struct Session<'a> {
    pub(super) runtime: &'a Runtime,
    pub(super) control: ControlLink,
    pub(super) guard: Guard<'a>,
}
