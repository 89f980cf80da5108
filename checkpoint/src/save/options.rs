//! What a checkpoint is written into, against what, and how.

use std::time::Duration;

use crate::format::MemoryMap;
use crate::key::ChainKey;
use crate::outside::File;

/// Where a checkpoint goes: empty files, but for an image that has the base's content.
#[derive(Debug)]
pub struct Files {
    /// Page *n* at byte *n* x 4096. Opened with `O_DIRECT`, if its file system can.
    pub image: File,
    /// Which pages there are.
    pub map: File,
    /// vCPUs and devices.
    pub state: File,
}

/// An earlier checkpoint, whose pages need not be written again.
#[derive(Debug)]
pub struct Base {
    /// Its map.
    pub map: MemoryMap,
    /// The new image begins as a clone of the base's: what is in it need not be written, and is in the new one.
    pub cloned: bool,
}

/// How a VM is saved.
#[derive(Clone, Debug)]
pub struct SaveOptions {
    /// The VM is stopped when it is expected to stand still for no longer than this.
    pub downtime_target: Duration,
    /// After so many rounds it is stopped, whatever is left.
    pub max_rounds: u32,
    /// Highest share of time, in percent, for which the guest may be held back; 0: never.
    pub max_throttle: u8,
    /// Bytes a second that may be written while it runs.
    pub rate: Option<u64>,
    /// It does not go on afterwards.
    pub stop: bool,
    /// All that is written is encrypted with this key.
    pub key: Option<ChainKey>,
    /// It is not kept standing still for longer: a disk that does not answer must not take it along.
    pub pause_limit: Duration,
}

impl Default for SaveOptions {
    /// As `vmemd checkpoint`.
    fn default() -> SaveOptions {
        SaveOptions {
            downtime_target: Duration::from_millis(50),
            max_rounds: 30,
            max_throttle: 99,
            rate: None,
            stop: false,
            key: None,
            pause_limit: Duration::from_secs(60),
        }
    }
}
