//! What a finished migration was like, on each side.

use serde::{Deserialize, Serialize};
use swapd::Placed;

use crate::session::SessionId;

/// The source's account: the JSON of `vmemd migrate`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The VM that has moved; it has the same name on both sides.
    pub name: String,
    /// The attempt, as the target has recorded it.
    pub session: SessionId,
    /// The VM's memory.
    pub bytes_total: u64,
    /// On all connections, all told.
    pub bytes_sent: u64,
    /// Including the one in which the VM stood still.
    pub rounds: u32,
    /// From the call of [`crate::send`] to the end of all that is reported here.
    pub duration_ms: f64,
    /// From the request to pause to the target's word that the VM runs.
    pub downtime_ms: f64,
    /// What it was asked to be at most.
    #[serde(default)]
    pub downtime_target_ms: f64,
    /// What it consisted of; not known if the link broke meanwhile.
    #[serde(default)]
    pub downtime_parts: Option<DowntimeParts>,
    /// Why it was more than the target, if it was.
    #[serde(default)]
    pub downtime_missed: Option<String>,
    /// Pages that the target has placed in RAM. 0 if `resolved_later`, as all counts of the target are.
    pub pages_ram: u64,
    /// Pages that the target has in its store alone.
    pub pages_store: u64,
    /// Pages that read as zeros at the target, with neither a frame nor room in its store.
    pub pages_zero: u64,
    /// That the store here did not give back: a touch there is a memory error.
    #[serde(default)]
    pub pages_lost: u64,
    /// Page-ins of the VM's own paging at the target while it was received.
    pub pageins_during: u64,
    /// Page-outs of the VM's own paging at the target while it was received.
    pub pageouts_during: u64,
    /// Highest share of the time for which the vCPUs were kept out of the guest, 0 to 99 percent.
    pub throttle_max_percent: u8,
    /// The link broke after the hand-over was decided; that the VM runs there is known by asking again, so
    /// the target's page counts and `placement` are missing.
    pub resolved_later: bool,
    /// How good the placement was; None if that was not asked for, or was not told in time.
    pub placement: Option<Placement>,
}

/// What a downtime consisted of, in the order of events. If the target does not tell its own times (an older version),
/// they are in `link_ms`.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct DowntimeParts {
    /// Until the VM stood still.
    pub stop_ms: f64,
    /// vCPU and device state was saved.
    pub state_ms: f64,
    /// The state and the last pages were sent.
    pub pages_ms: f64,
    /// The target had them in their places.
    pub place_ms: f64,
    /// It loaded the state.
    pub load_ms: f64,
    /// It recorded that the VM is its own.
    pub record_ms: f64,
    /// The VM ran there.
    pub start_ms: f64,
    /// Two questions and their answers on their way.
    pub link_ms: f64,
}

impl DowntimeParts {
    /// Each with its name, in the order of events.
    pub fn named(&self) -> [(&'static str, f64); 8] {
        [
            ("stop", self.stop_ms),
            ("state", self.state_ms),
            ("last pages", self.pages_ms),
            ("placing", self.place_ms),
            ("load", self.load_ms),
            ("record", self.record_ms),
            ("start", self.start_ms),
            ("link", self.link_ms),
        ]
    }
}

/// How good the placement was, measured over the first second after the move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Placement {
    /// Distinct pages that the VM touched, without those that were neither in RAM nor in the store when it started:
    /// nobody had to place them.
    pub touched_pages: u64,
    /// Those of them that were in RAM when the VM started.
    pub touched_in_ram: u64,
}

/// The target's account. The VM runs here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Received {
    /// The VM that has come, by its source's name for it.
    pub name: String,
    /// The attempt, as in the source's [`Report`].
    pub session: SessionId,
    /// Bytes that came on all connections.
    pub bytes_received: u64,
    /// From the call of [`crate::receive`] to its return.
    pub duration_ms: f64,
    /// Pages that were placed in RAM.
    pub pages_ram: u64,
    /// Pages that are in the store alone.
    pub pages_store: u64,
    /// Pages that read as zeros, with neither a frame nor room in the store.
    pub pages_zero: u64,
    /// Page-ins of the VM's own paging while it was received.
    pub pageins_during: u64,
    /// Page-outs of the VM's own paging while it was received.
    pub pageouts_during: u64,
    /// How good the placement was; None if the source did not ask, or it could not be checked.
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
