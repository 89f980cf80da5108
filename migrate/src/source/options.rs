//! What whoever moves a VM may choose.

use std::time::Duration;

use crate::tls::Security;

/// Where a VM is to move, and how. An option outside its limits ends the move before it begins
/// ([`SendError::Options`](crate::SendError::Options)).
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// The name that the VM has at the target: see [`is_name`](crate::wire::opening::is_name).
    pub name: String,
    /// `HOST:PORT` of the target's daemon.
    pub to: String,
    /// What the target must prove before it gets anything.
    pub security: Security,
    /// RAM that the VM shall have there; None: as the target likes.
    pub ram_bytes: Option<u64>,
    /// Connections that carry pages, 1 to [`MAX_STREAMS`](crate::wire::opening::MAX_STREAMS).
    pub streams: u32,
    /// The VM is stopped when it is expected to stand still for no longer than this.
    pub downtime_target: Duration,
    /// The VM is not stopped for longer: the migration gives up instead, as long as it may.
    pub max_downtime: Option<Duration>,
    /// After so many rounds the VM is stopped even if that misses the downtime target; if it would miss `max_downtime`,
    /// the move ends instead.
    pub max_rounds: u32,
    /// 0: never throttle.
    pub max_throttle: u8,
    /// Have the target measure how much of what the VM touches in the first second is in RAM.
    pub check_placement: bool,
    /// What the target needs to make the VM's machine, if that is not in its state.
    pub offer: Option<String>,
}

impl SourceOptions {
    /// With the defaults of `vmemd migrate`.
    pub fn new(name: impl Into<String>, to: impl Into<String>) -> SourceOptions {
        SourceOptions {
            name: name.into(),
            to: to.into(),
            security: Security::default(),
            ram_bytes: None,
            streams: 2,
            downtime_target: Duration::from_millis(50),
            max_downtime: None,
            max_rounds: 30,
            max_throttle: 99,
            check_placement: false,
            offer: None,
        }
    }
}
