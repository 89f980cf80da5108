//! The facts about a VM that are fixed from the moment that its name is claimed.

use crate::control::protocol::EngineKind;

/// The facts of a VM that do not change while it is here.
#[derive(Clone, Debug)]
pub struct Facts {
    /// What the VM is called.
    pub name: String,
    /// The guest's memory.
    pub memory_bytes: u64,
    /// At the start: what `stat` shows until there is memory.
    pub budget_bytes: u64,
    /// What holds its memory.
    pub engine: EngineKind,
    /// Listen address of the daemon that received it.
    pub daemon: Option<String>,
    /// What a target needs to make the same machine, if that is not in the guest's state.
    pub offer: Option<String>,
}
