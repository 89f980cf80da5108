//! What is known of a tier that takes no writes, and when it is tried again.

use crate::core::event::Ticket;
use crate::error::IoError;

/// Ticks from a failure to the first retry; then twice as many each time.
const RETRY_FIRST_TICKS: u64 = 10;
const RETRY_MAX_TICKS: u64 = 100;

/// When a tier is tried again.
#[derive(Debug, Default)]
pub(crate) struct Backoff(u64);

impl Backoff {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = (self.0 * 2).clamp(RETRY_FIRST_TICKS, RETRY_MAX_TICKS);
        self.0
    }

    /// The tier works.
    pub(crate) fn reset(&mut self) {
        self.0 = 0;
    }
}

#[derive(Debug)]
pub(crate) struct Latch {
    pub(crate) error: IoError,
    /// Whoever it concerns knows: it is not a full store in which room is being made.
    pub(crate) told: bool,
    pub(crate) retry_tick: u64,
    /// What was refused is being written again, and nothing of it has failed so far.
    pub(crate) retrying: bool,
    /// Who wants to know how the next retry ends.
    pub(crate) waiters: Vec<Ticket>,
}

impl Latch {
    pub(crate) fn error(&self) -> IoError {
        self.error
    }
}
