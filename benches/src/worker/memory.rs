//! The memory under test, of one of three kinds, and the pages that the device has read and written for it.

use std::path::Path;

use migrate::PlainMemory;
use swapd::{Engine, EngineConfig, Notice, StartError, StoreConfig};
use vmemd::cli::terminal::warn;
use vmprocess::failure::{Failure, FailureKind, chain};
use vmprocess::host;

use super::content::Base;
use crate::job::{BenchEngine, WorkerRequest};
use crate::reserve::HOST_RESERVE_BYTES;
use crate::vmstat::Swapped;

/// The memory that a run touches. It is unmapped when dropped; nothing may touch it from then on.
#[derive(Debug)]
pub(super) enum TestedMemory {
    Engine(Engine),
    /// Plain memory with the kernel's swap behind it.
    Swapped(PlainMemory),
    Plain(PlainMemory),
}

/// Pages that the device has read and written since some time before.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct DeviceCounts {
    pub(super) pages_read: u64,
    pub(super) pages_written: u64,
    /// Faults that waited for the store, by the engine's count.
    pub(super) store_faults: Option<u64>,
}

impl DeviceCounts {
    pub(super) fn since(self, before: DeviceCounts) -> DeviceCounts {
        DeviceCounts {
            pages_read: self.pages_read.saturating_sub(before.pages_read),
            pages_written: self.pages_written.saturating_sub(before.pages_written),
            store_faults: self.store_faults.map(|now| now - before.store_faults.unwrap_or(0)),
        }
    }
}

impl TestedMemory {
    pub(super) fn start(request: &WorkerRequest) -> Result<TestedMemory, Failure> {
        let bytes = request.scenario.memory_bytes();
        let ram = request.scenario.ram_bytes.min(bytes);
        let plain = || {
            PlainMemory::new(bytes).map_err(|error| {
                Failure::new(FailureKind::Resources, format!("no address space for {bytes} bytes: {error}"))
            })
        };
        match request.engine {
            BenchEngine::Vmemd => {
                host::need_free_ram(ram, "this job")?;
                start_engine(bytes, ram, &request.dir, request.scenario.encrypt).map(TestedMemory::Engine)
            }
            BenchEngine::Swap => plain().map(TestedMemory::Swapped),
            BenchEngine::Mem => {
                host::need_free_ram(bytes + HOST_RESERVE_BYTES, "this job on plain memory")?;
                plain().map(TestedMemory::Plain)
            }
            BenchEngine::Raw => Err(Failure::new(FailureKind::Usage, "the raw engine has no memory")),
        }
    }

    pub(super) fn base(&self) -> Base {
        match self {
            TestedMemory::Engine(engine) => Base(engine.memory_base()),
            TestedMemory::Swapped(memory) | TestedMemory::Plain(memory) => Base(memory.base()),
        }
    }

    pub(super) fn counts(&self) -> Result<DeviceCounts, Failure> {
        match self {
            TestedMemory::Engine(engine) => {
                let stats = engine.handle().stats()?;
                Ok(DeviceCounts {
                    pages_read: stats.store.pages_read,
                    pages_written: stats.store.pages_written,
                    store_faults: Some(stats.faults.store),
                })
            }
            TestedMemory::Swapped(_) => {
                let Swapped { ins, outs } = Swapped::now();
                Ok(DeviceCounts { pages_read: ins, pages_written: outs, store_faults: None })
            }
            TestedMemory::Plain(_) => Ok(DeviceCounts::default()),
        }
    }
}

fn start_engine(bytes: u64, ram: u64, store: &Path, encrypt: bool) -> Result<Engine, Failure> {
    let config = |lock| EngineConfig {
        memory_bytes: bytes,
        budget_bytes: ram,
        // `bench run` has seen to the room for what the jobs touch, which may be little of the memory.
        store: StoreConfig { path: store.to_owned(), overcommit: true, encrypt },
        origin: None,
        prealloc: false,
        lock,
        sampling: true,
    };
    match Engine::start(config(true), Box::new(end_on_failure)) {
        Err(StartError::Memory(why)) => {
            warn(&format!("without locked memory: {why}"));
            Ok(Engine::start(config(false), Box::new(end_on_failure))?)
        }
        started => Ok(started?),
    }
}

/// Ends this process with the reason when the engine cannot serve its memory any more: threads that touch it would
/// wait for ever, or be killed by a signal.
fn end_on_failure(notice: Notice) {
    let failure = match notice {
        Notice::StoreFailed(reason) => Failure::new(FailureKind::Resources, reason),
        Notice::Poisoned(page) => {
            Failure::new(FailureKind::Vm, format!("{page} is lost: the store gave wrong content"))
        }
        Notice::StoreRecovered
        | Notice::Starved(_)
        | Notice::Relieved
        | Notice::Unreachable(_)
        | Notice::Reachable
        | Notice::Short { .. }
        | Notice::Enough => return,
    };
    warn(&chain(&failure));
    std::process::exit(i32::from(failure.kind.exit_code()));
}
