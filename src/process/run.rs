//! `vmemd run`: a new VM, in the foreground.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use tracing::info;

use super::actions::Control;
use super::life::{self, Ended};
use super::memory::{Memory, MemorySpec};
use super::vm::{Event, Facts, Phase, Vm};
use crate::control::protocol::EngineKind;
use crate::control::rundir::RunDir;
use crate::control::server::Server;
use crate::failure::Failure;
use crate::host;
use crate::vmm::{Machine, MachineConfig, Workload};

/// What `vmemd run` shall start.
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
    let (claim, listener) = dir.claim_name(&settings.name)?;
    let facts = Facts {
        name: settings.name.clone(),
        memory_bytes: spec.memory_bytes,
        budget_bytes: spec.budget_bytes,
        engine: spec.engine,
        daemon: None,
    };
    let (events, received) = channel();
    let vm = Arc::new(Vm::new(facts, Phase::Arriving, claim, events));
    life::forward_signals(&vm)?;
    let server = Server::start(listener, Arc::new(Control(vm.clone())))?;
    match set_up(&vm, settings) {
        Ok(memory) => {
            info!(vm = %settings.name, memory = %crate::size::Size(spec.memory_bytes), ram = %crate::size::Size(spec.budget_bytes), guest = %settings.workload, "running");
            let ended = wait_for_end(&vm, &received);
            life::finish(&vm, memory, &server, None, ended)
        }
        Err(failure) => {
            drop(vm.core(|core| core.claim.take()));
            Err(failure)
        }
    }
}

fn set_up(vm: &Arc<Vm>, settings: &RunSettings) -> Result<Memory, Failure> {
    let memory = Memory::start(&settings.memory, vm.events.clone())?;
    let _ = vm.memory.set(memory.view());
    let config = MachineConfig {
        memory_bytes: settings.memory.memory_bytes,
        vcpus: settings.vcpus,
        workload: settings.workload,
    };
    let started =
        Machine::new(config, memory.base()).and_then(|mut machine| machine.start().map(|()| machine));
    match started {
        Ok(machine) => {
            vm.set_machine(machine);
            vm.core(|core| core.phase = Phase::Here);
            Ok(memory)
        }
        Err(error) => {
            memory.stop();
            Err(error.into())
        }
    }
}

fn wait_for_end(vm: &Vm, events: &Receiver<Event>) -> Ended {
    let ended = life::live(vm, events);
    if let Ended::Moved { to } = &ended {
        eprintln!("{} has moved to {to}", vm.facts.name);
    }
    ended
}
