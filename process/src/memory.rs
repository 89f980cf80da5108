//! A VM's memory: held by the swap engine, or (for comparisons) an ordinary mapping.

use std::path::PathBuf;

use migrate::{PlainMemory, TargetMemory};
use swapd::{Engine, EngineConfig, EngineHandle, Notice, Origin, PageNo, Stats, StoreConfig};

use crate::control::protocol::EngineKind;
use crate::failure::{Failure, FailureKind};

/// The memory that a VM shall have.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct MemorySpec {
    /// What is to hold it: the swap engine, or an ordinary mapping.
    pub engine: EngineKind,
    /// The guest's memory: a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// RAM that it may use, at most all of it.
    pub budget_bytes: u64,
    /// A directory or a block device.
    pub store: PathBuf,
    /// The store may have less room than the VM could need.
    pub store_overcommit: bool,
    /// With a key that only the VM's process knows.
    pub store_encrypt: bool,
    /// Take all frames of the budget at the start.
    pub prealloc: bool,
    /// Lock frames against the host's own swap, which would page a second time.
    pub lock: bool,
}

impl MemorySpec {
    /// For an engine of this memory.
    pub fn engine_config(&self) -> EngineConfig {
        EngineConfig {
            memory_bytes: self.memory_bytes,
            budget_bytes: self.budget_bytes,
            store: StoreConfig {
                path: self.store.clone(),
                overcommit: self.store_overcommit,
                encrypt: self.store_encrypt,
            },
            origin: None,
            prealloc: self.prealloc,
            lock: self.lock,
            sampling: true,
        }
    }
}

/// A VM's memory. Ends with the VM, unless it is another's.
#[derive(Debug)]
pub struct Memory(Kept);

#[derive(Debug)]
enum Kept {
    Engine(Engine),
    External(EngineHandle),
    Plain(PlainMemory),
}

impl Memory {
    /// Starts an engine, or maps plain memory. `notify` is called on the engine's thread and must not block: it is
    /// [`Process::notices`](crate::Process::notices).
    ///
    /// # Errors
    /// Whatever the host lacks; nothing is left behind.
    pub fn start(spec: &MemorySpec, notify: impl Fn(Notice) + Send + 'static) -> Result<Memory, Failure> {
        match spec.engine {
            EngineKind::Vmemd => {
                Ok(Memory(Kept::Engine(Engine::start(spec.engine_config(), Box::new(notify))?)))
            }
            EngineKind::Plain => match PlainMemory::new(spec.memory_bytes) {
                Ok(memory) => Ok(Memory(Kept::Plain(memory))),
                Err(error) => {
                    let text = format!("no address space for the VM's memory: {error}");
                    Err(Failure::new(FailureKind::Resources, text))
                }
            },
        }
    }

    /// Starts an engine whose pages may be [adopted](EngineHandle::adopt_async) from files.
    ///
    /// # Errors
    /// As [`Memory::start`]; or if the files do not fit the VM.
    pub fn start_from(
        spec: &MemorySpec,
        origin: Origin,
        notify: impl Fn(Notice) + Send + 'static,
    ) -> Result<Memory, Failure> {
        let config = EngineConfig { origin: Some(origin), ..spec.engine_config() };
        Ok(Memory(Kept::Engine(Engine::start(config, Box::new(notify))?)))
    }

    /// The memory of an engine that another has started and keeps: it serves for as long as the process lives, and is
    /// not stopped here.
    pub fn external(engine: EngineHandle) -> Memory {
        Memory(Kept::External(engine))
    }

    /// Address of guest page 0.
    pub fn base(&self) -> *mut u8 {
        match &self.0 {
            Kept::Engine(engine) => engine.memory_base(),
            Kept::External(engine) => engine.page_address(PageNo(0)),
            Kept::Plain(memory) => memory.base(),
        }
    }

    pub(crate) fn view(&self) -> MemoryView {
        match &self.0 {
            Kept::Engine(engine) => MemoryView::Engine(engine.handle()),
            Kept::External(engine) => MemoryView::Engine(engine.clone()),
            Kept::Plain(memory) => MemoryView::Plain(memory.bytes()),
        }
    }

    pub(crate) fn target(&self) -> TargetMemory {
        match &self.0 {
            Kept::Engine(engine) => TargetMemory::Engine(engine.handle()),
            Kept::External(engine) => TargetMemory::Engine(engine.clone()),
            Kept::Plain(memory) => TargetMemory::Plain(memory.clone()),
        }
    }

    /// Gives it back to the host, if it is ours. Nothing may touch it any more.
    pub(crate) fn stop(self) {
        match self.0 {
            Kept::Engine(engine) => engine.stop(),
            Kept::External(_) | Kept::Plain(_) => {}
        }
    }
}

/// The part of the memory's interface that other threads use.
#[derive(Clone, Debug)]
pub(crate) enum MemoryView {
    Engine(EngineHandle),
    /// Bytes of an ordinary mapping.
    Plain(u64),
}

impl MemoryView {
    pub(crate) fn stats(&self) -> Result<Stats, Failure> {
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
    pub(crate) fn engine(&self) -> Result<&EngineHandle, Failure> {
        match self {
            MemoryView::Engine(handle) => Ok(handle),
            MemoryView::Plain(_) => Err(Failure::new(
                FailureKind::Usage,
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
