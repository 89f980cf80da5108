//! What a session tells while it goes on, and at its end.

use serde::{Deserialize, Serialize};

use crate::format::PageCounts;

/// What a checkpoint is doing, in this order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The first round: every page once, except those that are being written.
    #[default]
    Copying,
    /// Rounds over pages that were written meanwhile.
    Converging,
    /// The VM is paused; the last pages and its state are being written.
    Stopped,
    /// The VM goes on (or stays paused, if it stood still before); the map is being written.
    Finishing,
}

/// A moment of a checkpoint.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Progress {
    /// The step that is under way.
    pub phase: Phase,
    /// From 1.
    pub round: u32,
    /// The VM's memory.
    pub bytes_total: u64,
    /// Memory bytes that need no more work unless they are written again.
    pub bytes_done: u64,
    /// What this round has still to look at.
    pub bytes_left: u64,
    /// Into the image, since the start.
    pub bytes_written: u64,
    /// Share of the time for which the vCPUs are kept out of the guest now, 0 to 99 percent.
    pub throttle_percent: u8,
}

/// What a pause consisted of, in milliseconds.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct PauseParts {
    /// Until no vCPU was in the guest and no device wrote to its memory.
    pub stop_ms: f64,
    /// The last look for written pages.
    pub scan_ms: f64,
    /// The last pages, as far as they were read and on their way to the disk.
    pub pages_ms: f64,
    /// The state of vCPUs and devices.
    pub state_ms: f64,
    /// The last pages, until the disk had them.
    pub disk_ms: f64,
    /// Until the VM went on.
    pub resume_ms: f64,
}

impl PauseParts {
    /// Each part with its name, in their order.
    pub fn named(&self) -> [(&'static str, f64); 6] {
        [
            ("stop", self.stop_ms),
            ("scan", self.scan_ms),
            ("pages", self.pages_ms),
            ("state", self.state_ms),
            ("disk", self.disk_ms),
            ("resume", self.resume_ms),
        ]
    }
}

/// How a VM was saved.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Saved {
    /// When the VM stood still for it: milliseconds since 1970, UTC. Its memory and its state are of this moment.
    pub made_at_ms: u64,
    /// From the request to pause until it went on. Of a VM that stood still before, what it would have been.
    pub pause_ms: f64,
    /// What that consisted of.
    pub pause_parts: PauseParts,
    /// As asked.
    pub downtime_target_ms: f64,
    /// It stood still by its user's will before.
    pub stood_still: bool,
    /// Rounds over the memory, the one in which the VM stood still among them.
    pub rounds: u32,
    /// Until the map was written.
    pub duration_ms: f64,
    /// The VM's memory.
    pub bytes_total: u64,
    /// Into the image. A page that was written twice counts twice; one that shares a block does not.
    pub bytes_written: u64,
    /// How many pages of each kind the checkpoint has.
    pub pages: PageCounts,
    /// Pages that the image shares with the VM's store.
    pub pages_shared: u64,
    /// How much the guest was held back at most, in percent.
    pub throttle_max_percent: u8,
    /// Of the state's file.
    pub state_bytes: u64,
    /// Of the map's file.
    pub map_bytes: u64,
}
