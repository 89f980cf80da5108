//! A VM on the move, as the rounds and the hand-over share it.

use super::error::SendError;
use super::options::SourceOptions;
use super::pace::Standing;
use super::rounds::Rounds;
use crate::link::error::SessionError;
use crate::outside::{Instant, Runtime};
use crate::session::SessionId;
use crate::vm::{Expected, SourceVm, VmError};

/// How a session fails: with a trouble that its `SessionState` has, or with something that is said as it is.
pub(super) enum Failed {
    SessionError,
    Said(SendError),
}

/// A VM on the move, while it runs here.
pub(super) struct Moving<'a, 'b> {
    pub(super) runtime: &'a Runtime,
    pub(super) rounds: Rounds<'a>,
    pub(super) vm: &'b mut dyn SourceVm,
    pub(super) options: &'a SourceOptions,
    pub(super) session: SessionId,
    /// Most bytes of state that the target takes.
    pub(super) state_most: Option<u64>,
    pub(super) started: Instant,
    pub(super) throttle: u8,
    pub(super) throttle_max: u8,
    /// The VM's name is given up, though it runs here still.
    pub(super) unnamed: bool,
    /// Of the VM itself, at the last look. Looked at before a round: pages are written meanwhile that nobody has counted.
    pub(super) expected: Expected,
}

impl Moving<'_, '_> {
    pub(super) fn standing(&self) -> Standing {
        Standing {
            rounds: self.rounds.round as u32,
            left_pages: self.rounds.left_pages(),
            sent_per_s: self.rounds.send_rate.per_s(),
            written_per_s: self.rounds.write_rate.per_s().unwrap_or(0.0),
            throttle: self.throttle,
            vm_cost: self.expected.time,
            state_bytes: self.expected.state_bytes,
            link_cost: self.rounds.link_cost(),
        }
    }

    pub(super) fn set_throttle(&mut self, percent: u8) {
        if percent != self.throttle {
            self.vm.throttle(percent);
            self.throttle = percent;
            self.throttle_max = self.throttle_max.max(percent);
        }
    }

    /// Tells the session's `SessionState` of a trouble before anything else can.
    pub(super) fn checked<T>(&self, result: Result<T, SessionError>) -> Result<T, Failed> {
        result.map_err(|trouble| {
            self.rounds.guard.failed(trouble);
            Failed::SessionError
        })
    }
}

/// The VM failed: the target hears of it as well.
pub(super) fn said(moving: &Moving<'_, '_>, error: VmError) -> Failed {
    moving.rounds.guard.failed(SessionError::GaveUp(format!("the VM failed: {}", error.chain())));
    Failed::Said(error.into())
}
