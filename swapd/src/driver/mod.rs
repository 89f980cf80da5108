//! The real driver (under construction): the public surface that other crates build on.

use std::path::PathBuf;

use crate::handle::{Command, EngineHandle};

/// Where a VM's store is.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// A directory (the store is a nameless sparse file in it) or a block device.
    pub path: PathBuf,
}

#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The VM's memory; a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// RAM budget, at least [`Engine::MIN_BUDGET_BYTES`], at most the memory.
    pub budget_bytes: u64,
    pub store: StoreConfig,
    /// Take all frames at start.
    pub prealloc: bool,
    /// Lock frames against the host's own swap.
    pub lock: bool,
    /// Sample which resident pages are in use while there is no memory pressure.
    pub sampling: bool,
}

/// What the engine tells its owner unasked. Called on the engine's thread: must not block.
#[derive(Clone, Debug)]
pub enum Notice {
    /// A write failed: the VM stands still as soon as it needs a frame. Pause it and say why.
    StoreFailed(String),
    /// The store works again after a retry.
    StoreRecovered,
    /// The guest sees a memory error when it touches this page.
    Poisoned(crate::PageNo),
}

/// Why an engine could not start. Each text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{0}")]
    Budget(String),
    /// No permission, or no such feature in this kernel.
    #[error("{0}")]
    Host(String),
    #[error("{0}")]
    Store(String),
    #[error("{0}")]
    Memory(String),
}

#[derive(Debug)]
pub(crate) struct Mailbox;

impl Mailbox {
    pub(crate) fn send(&self, _command: Command) {
        todo!()
    }
}

/// A VM's memory and the thread that serves it.
#[derive(Debug)]
pub struct Engine {
    handle: EngineHandle,
}

impl Engine {
    /// The smallest RAM budget.
    pub const MIN_BUDGET_BYTES: u64 = 16 << 20;

    pub fn start(_config: EngineConfig, _notify: Box<dyn Fn(Notice) + Send>) -> Result<Engine, StartError> {
        todo!()
    }

    pub fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }

    /// Address of guest page 0.
    pub fn memory_base(&self) -> *mut u8 {
        todo!()
    }

    /// Ends the thread, unmaps the memory and gives everything back. Nothing may touch the memory any more.
    pub fn stop(self) {
        todo!()
    }
}
