//! What a session tells its owner while it goes on.

use serde::{Deserialize, Serialize};

use crate::wait::Wait;

/// What a migration is doing, in this order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The target is asked to take the VM, and the data streams are opened. No page has been sent.
    Connecting,
    /// The first round: every page once, except those that are being written.
    Copying,
    /// Rounds over pages that were written meanwhile.
    Converging,
    /// The VM is paused; the last pages and its state are on their way.
    Stopped,
    /// Both sides decide who runs the VM.
    HandOver,
    /// The VM runs at the target, which looks at what it touches.
    Checking,
}

/// A moment of a migration.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Progress {
    /// The step that is under way.
    pub phase: Phase,
    /// 1 is the first; 0 before it.
    pub round: u32,
    /// The VM's memory.
    pub bytes_total: u64,
    /// Memory bytes of this migration that need no more sending unless they are written again.
    pub bytes_done: u64,
    /// On all connections, since the start.
    pub bytes_sent: u64,
    /// What this round has still to look at.
    pub bytes_left: u64,
    /// Page content sent a second, as estimated from the rounds that have ended; it says little before the first has.
    pub bytes_per_second: u64,
    /// Share of the time for which the vCPUs are kept out of the guest now, 0 to 99 percent.
    pub throttle_percent: u8,
    /// What it waits for, if it can do nothing else.
    pub waiting: Option<Wait>,
}

impl Progress {
    /// Nothing is known of the pages: none has been sent yet, or all have.
    pub(crate) fn waiting(phase: Phase, bytes_total: u64, waiting: Wait) -> Progress {
        Progress {
            phase,
            round: 0,
            bytes_total,
            bytes_done: if phase == Phase::Connecting { 0 } else { bytes_total },
            bytes_sent: 0,
            bytes_left: if phase == Phase::Connecting { bytes_total } else { 0 },
            bytes_per_second: 0,
            throttle_percent: 0,
            waiting: Some(waiting),
        }
    }
}
