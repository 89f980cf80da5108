//! What is known of a VM's checkpoints: the one under way, and the last one.

use std::time::UNIX_EPOCH;

use crate::control::protocol::{CheckpointStat, LastCheckpointStat};

/// A checkpoint under way.
#[derive(Clone, Debug, Default)]
pub(crate) struct Checkpointing {
    pub(crate) stat: CheckpointStat,
    /// The VM has been told to stand still for it, and goes on behind it.
    pub(crate) stopped: bool,
    /// The files are written; the client makes them durable.
    pub(crate) saved: bool,
}

/// The last one that became durable.
#[derive(Clone, Debug)]
pub(crate) struct LastCheckpoint {
    name: String,
    made_at_ms: u64,
    bytes: u64,
}

impl LastCheckpoint {
    pub(crate) fn new(name: String, made_at_ms: u64, bytes: u64) -> LastCheckpoint {
        LastCheckpoint { name, made_at_ms, bytes }
    }

    pub(crate) fn stat(&self) -> LastCheckpointStat {
        let now_ms = UNIX_EPOCH.elapsed().unwrap_or_default().as_millis() as u64;
        LastCheckpointStat {
            name: self.name.clone(),
            age_ms: now_ms.saturating_sub(self.made_at_ms),
            bytes: self.bytes,
        }
    }
}
