//! `vmemd run` and `vmemd receive`: processes of our own, with the reference guest in them.

use std::path::PathBuf;

use migrate::Registry;
use tracing::info;
use vmprocess::control::protocol::EngineKind;
use vmprocess::control::rundir::RunDir;
use vmprocess::failure::Failure;
use vmprocess::size::Size;
use vmprocess::{Arrival, ArriveSettings, Facts, Machine, Memory, MemorySpec, Owner, Process, host};

use crate::reference::{ReferenceGuest, ReferenceNewcomer};
use crate::sandbox;
use crate::vmm::{MachineConfig, ReferenceMachine, Workload};

/// The settings of `vmemd run` with the reference guest.
#[derive(Clone, Debug)]
pub struct RunSettings {
    pub run_dir: PathBuf,
    pub name: String,
    pub memory: MemorySpec,
    pub vcpus: u32,
    pub workload: Workload,
}

/// Runs the VM until it is stopped or has moved away.
///
/// # Errors
/// Whatever kept it from starting, or made it end other than by being stopped or moved.
pub fn run(settings: &RunSettings) -> Result<(), Failure> {
    let spec = &settings.memory;
    if spec.engine == EngineKind::Vmemd {
        host::need_free_ram(spec.budget_bytes, "this VM")?;
    }
    let dir = RunDir::open(&settings.run_dir)?;
    sandbox::enter(&[dir.path(), &spec.store])?;
    let claimed = dir.claim_name(&settings.name)?;
    let facts = Facts {
        name: settings.name.clone(),
        memory_bytes: spec.memory_bytes,
        budget_bytes: spec.budget_bytes,
        engine: spec.engine,
        daemon: None,
        // All of it is in the guest's state.
        offer: None,
    };
    let process = Process::begin(facts, claimed, Owner::Ours)?;
    let memory = Memory::start(spec, process.notices())?;
    let base = memory.base();
    process.run(memory, || start(settings, base)).result
}

fn start(settings: &RunSettings, base: *mut u8) -> Result<Box<dyn Machine>, Failure> {
    let RunSettings { name, memory: spec, vcpus, workload, .. } = settings;
    let config = MachineConfig { memory_bytes: spec.memory_bytes, vcpus: *vcpus, workload: *workload };
    let mut machine = ReferenceMachine::new(config, base)?;
    machine.start()?;
    info!(vm = %name, memory = %Size(spec.memory_bytes), ram = %Size(spec.budget_bytes), guest = %workload, "running");
    Ok(Box::new(ReferenceGuest(machine)))
}

/// Receives a VM, and lives with it until it is stopped or moves on.
///
/// # Errors
/// If it does not arrive, or ends other than by being stopped or moved.
pub fn receive(settings: &ArriveSettings) -> Result<(), Failure> {
    let spec = &settings.memory;
    let registry = Registry::new(&RunDir::open(&settings.run_dir)?.sessions_dir());
    let registry = registry.map_err(|error| Failure::other(&error))?;
    sandbox::enter(&[&settings.run_dir, &spec.store, registry.decisions()])?;
    let (process, arrival) = Arrival::begin(settings, Owner::Ours)?;
    let memory = match Memory::start(spec, process.notices()) {
        Ok(memory) => memory,
        Err(failure) => {
            arrival.refuse(&failure);
            return Err(failure);
        }
    };
    let newcomer = ReferenceNewcomer { base: memory.base() as usize, memory_bytes: spec.memory_bytes };
    process.receive(arrival, memory, Box::new(newcomer)).result
}
