//! What a finished migration was like, on each side.

use serde::{Deserialize, Serialize};
use swapd::Placed;

use crate::session::SessionId;

/// The source's account: the JSON of `vmemd migrate`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub name: String,
    pub session: SessionId,
    /// The VM's memory.
    pub bytes_total: u64,
    /// On all connections, all told.
    pub bytes_sent: u64,
    /// Including the one in which the VM stood still.
    pub rounds: u32,
    pub duration_ms: f64,
    /// From the request to pause to the target's word that the VM runs.
    pub downtime_ms: f64,
    pub pages_ram: u64,
    pub pages_store: u64,
    pub pages_zero: u64,
    /// That the store here did not give back: a touch there is a memory error.
    #[serde(default)]
    pub pages_lost: u64,
    pub pageins_during: u64,
    pub pageouts_during: u64,
    pub throttle_max_percent: u8,
    /// The link broke after the hand-over was decided; that the VM runs there is known by asking again, so
    /// the target's page counts and `placement` are missing.
    pub resolved_later: bool,
    pub placement: Option<Placement>,
}

/// How good the placement was, measured over the first second after the move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Placement {
    pub touched_pages: u64,
    /// Those of them that were in RAM when the VM started.
    pub touched_in_ram: u64,
}

/// The target's account. The VM runs here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Received {
    pub name: String,
    pub session: SessionId,
    pub bytes_received: u64,
    pub duration_ms: f64,
    pub pages_ram: u64,
    pub pages_store: u64,
    pub pages_zero: u64,
    pub pageins_during: u64,
    pub pageouts_during: u64,
    pub placement: Option<Placement>,
}

impl Received {
    pub(crate) fn new(name: String, session: SessionId, placed: Placed) -> Received {
        Received {
            name,
            session,
            bytes_received: 0,
            duration_ms: 0.0,
            pages_ram: placed.pages_ram,
            pages_store: placed.pages_store,
            pages_zero: placed.pages_zero,
            pageins_during: placed.pageins,
            pageouts_during: placed.pageouts,
            placement: None,
        }
    }
}
