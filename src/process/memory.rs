//! What holds a VM's memory: the swap engine, or (for comparisons) an ordinary mapping.

use std::path::PathBuf;
use std::sync::mpsc::Sender;

use migrate::{PlainMemory, TargetMemory};
use swapd::{Engine, EngineConfig, EngineHandle, Notice, Stats, StoreConfig};

use super::vm::Event;
use crate::control::protocol::EngineKind;
use crate::failure::{Failure, Kind};

/// What memory a VM shall have.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct MemorySpec {
    pub engine: EngineKind,
    pub memory_bytes: u64,
    pub budget_bytes: u64,
    /// A directory or a block device.
    pub store: PathBuf,
    /// The store may have less room than the VM could need.
    pub store_overcommit: bool,
    pub prealloc: bool,
    pub lock: bool,
}

/// A VM's memory. Stop it only when nothing touches it any more.
#[derive(Debug)]
pub(super) enum Memory {
    Engine(Engine),
    Plain(PlainMemory),
}

impl Memory {
    pub(super) fn start(spec: &MemorySpec, events: Sender<Event>) -> Result<Memory, Failure> {
        match spec.engine {
            EngineKind::Vmemd => {
                let config = EngineConfig {
                    memory_bytes: spec.memory_bytes,
                    budget_bytes: spec.budget_bytes,
                    store: StoreConfig { path: spec.store.clone(), overcommit: spec.store_overcommit },
                    prealloc: spec.prealloc,
                    lock: spec.lock,
                    sampling: true,
                };
                let notify = move |notice: Notice| {
                    // The receiver is gone only when the process is ending.
                    let _ = events.send(Event::Notice(notice));
                };
                Ok(Memory::Engine(Engine::start(config, Box::new(notify))?))
            }
            EngineKind::Plain => PlainMemory::new(spec.memory_bytes).map(Memory::Plain).map_err(|error| {
                Failure::new(Kind::Resources, format!("no address space for the VM's memory: {error}"))
            }),
        }
    }

    /// Address of guest page 0.
    pub(super) fn base(&self) -> *mut u8 {
        match self {
            Memory::Engine(engine) => engine.memory_base(),
            Memory::Plain(memory) => memory.base(),
        }
    }

    pub(super) fn view(&self) -> MemoryView {
        match self {
            Memory::Engine(engine) => MemoryView::Engine(engine.handle()),
            Memory::Plain(memory) => MemoryView::Plain(memory.bytes()),
        }
    }

    pub(super) fn target(&self) -> TargetMemory {
        match self {
            Memory::Engine(engine) => TargetMemory::Engine(engine.handle()),
            Memory::Plain(memory) => TargetMemory::Plain(memory.clone()),
        }
    }

    pub(super) fn stop(self) {
        if let Memory::Engine(engine) = self {
            engine.stop();
        }
    }
}

/// What other threads need of the memory.
#[derive(Clone, Debug)]
pub(super) enum MemoryView {
    Engine(EngineHandle),
    /// Bytes of an ordinary mapping.
    Plain(u64),
}

impl MemoryView {
    pub(super) fn stats(&self) -> Result<Stats, Failure> {
        match self {
            MemoryView::Engine(handle) => Ok(handle.stats()?),
            MemoryView::Plain(bytes) => Ok(Stats {
                memory_bytes: *bytes,
                ram_budget_bytes: *bytes,
                resident_bytes: own_resident_bytes().min(*bytes),
                ..Stats::default()
            }),
        }
    }

    /// The engine, or why there is none.
    pub(super) fn engine(&self) -> Result<&EngineHandle, Failure> {
        match self {
            MemoryView::Engine(handle) => Ok(handle),
            MemoryView::Plain(_) => Err(Failure::new(
                Kind::Usage,
                "this VM has plain memory (--engine plain): it can neither move nor change its budget",
            )),
        }
    }
}

/// The process's resident set: of a plain VM, nearly all of it is guest memory.
fn own_resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    swapd::units::bytes_of(pages)
}
