//! The reference guest as its owner sees it.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::VmFd;
use vmprocess::size::Size;

use crate::vmm::config::MachineConfig;
use crate::vmm::counters::Counters;
use crate::vmm::counters::GuestCounters;
use crate::vmm::error::VmmError;
use crate::vmm::gate::{Gate, Goal};
use crate::vmm::host::Host;
use crate::vmm::layout::Layout;
use crate::vmm::memory::GuestMemory;
use crate::vmm::pace::Pace;
use crate::vmm::state::MachineState;
use crate::vmm::throttle::Throttle;
use crate::vmm::vcpu::{self, LockedVcpu, Shared};
use crate::vmm::vcpu_state::VcpuState;
use crate::vmm::workload::Pattern;
use crate::vmm::{image, kick, registers};

/// How long pausing waits for page faults that are being served.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Whether a machine runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunState {
    /// vCPUs are in the guest, or throttled.
    Running,
    /// vCPUs are stopped (or not started yet) and can go on.
    Paused,
    /// vCPUs are stopped for good, for this reason.
    Failed(String),
}

/// A reference guest. Dropping it ends its threads; its memory stays with its owner.
#[derive(Debug)]
pub struct ReferenceMachine {
    config: MachineConfig,
    layout: Layout,
    vcpus: Vec<LockedVcpu>,
    threads: Arc<Vec<JoinHandle<()>>>,
    throttle: Throttle,
    shared: Arc<Shared>,
    // Kept open while vCPUs exist; memory slots belong to it.
    _vm: VmFd,
}

impl ReferenceMachine {
    /// Sets up the guest program in memory, with vCPUs ready and not running.
    ///
    /// `memory_base` must be page-aligned and stay mapped, readable and writable, for `config.memory_bytes` while the
    /// machine exists; the memory must be zero. Access to it may block.
    pub fn new(config: MachineConfig, memory_base: *mut u8) -> Result<ReferenceMachine, VmmError> {
        let layout = Layout::new(config.memory_bytes)?;
        let host = Host::open(&config)?;
        layout.split(&config)?;
        let memory = GuestMemory::new(memory_base, config.memory_bytes);
        let vcpus = host.vcpus(&config, &memory)?;
        image::write(&memory, &layout, &config)?;
        for (index, vcpu) in (0..).zip(&vcpus) {
            registers::set_initial(vcpu, index)?;
        }
        let counters = Counters::new(config.vcpus, writes(&config));
        ReferenceMachine::assemble(config, layout, &memory, host.vm, vcpus, counters)
    }

    /// Takes over a guest that [`save`](ReferenceMachine::save) has left, paused. Its memory must hold what it held
    /// then (or provide it when touched; nothing is touched here), and `memory_base` is as for
    /// [`new`](ReferenceMachine::new), with the size that [`saved_config`](crate::vmm::saved_config) tells.
    pub fn restore(state: &[u8], memory_base: *mut u8) -> Result<ReferenceMachine, VmmError> {
        ReferenceMachine::from_state(MachineState::decode(state)?, memory_base)
    }

    /// Does the same if the memory, of that many bytes, has the guest's size, and refuses otherwise.
    pub fn restore_sized(
        state: &[u8],
        memory_base: *mut u8,
        memory_bytes: u64,
    ) -> Result<ReferenceMachine, VmmError> {
        let state = MachineState::decode(state)?;
        let (saved, given) = (Size(state.config.memory_bytes), Size(memory_bytes));
        if saved != given {
            return Err(VmmError::MemorySize { saved, given });
        }
        ReferenceMachine::from_state(state, memory_base)
    }

    fn from_state(state: MachineState, memory_base: *mut u8) -> Result<ReferenceMachine, VmmError> {
        let config = state.config;
        let layout = Layout::new(config.memory_bytes)?;
        layout.split(&config)?;
        let host = Host::open(&config)?;
        let memory = GuestMemory::new(memory_base, config.memory_bytes);
        let vcpus = host.vcpus(&config, &memory)?;
        for (vcpu, saved) in vcpus.iter().zip(&state.vcpus) {
            saved.give(vcpu)?;
        }
        let counters = Counters::from_saved(config.vcpus, writes(&config), &state.counters);
        ReferenceMachine::assemble(config, layout, &memory, host.vm, vcpus, counters)
    }

    fn assemble(
        config: MachineConfig,
        layout: Layout,
        memory: &GuestMemory,
        vm: VmFd,
        vcpus: Vec<kvm_ioctls::VcpuFd>,
        counters: Counters,
    ) -> Result<ReferenceMachine, VmmError> {
        kick::install()?;
        let gate = Arc::new(Gate::new());
        let pace = Pace::new(config.workload.rate);
        let memory_base = memory.base() as usize;
        let shared = Arc::new(Shared { gate: gate.clone(), counters, pace, memory_base });
        let vcpus: Vec<LockedVcpu> = vcpus.into_iter().map(|vcpu| Arc::new(Mutex::new(vcpu))).collect();
        let spawned = (0..).zip(&vcpus).map(|(index, vcpu)| vcpu::spawn(index, vcpu.clone(), shared.clone()));
        let started = spawned.collect::<Result<Vec<_>, _>>().and_then(|threads| {
            let threads = Arc::new(threads);
            Throttle::new(gate, threads.clone()).map(|throttle| (threads, throttle))
        });
        let (threads, throttle) = started.inspect_err(|_| {
            // The threads that did start end by themselves.
            let _ = shared.gate.set_goal(Goal::Ended);
        })?;
        Ok(ReferenceMachine { config, layout, vcpus, threads, throttle, shared, _vm: vm })
    }

    /// Lets the vCPUs run for the first time.
    pub fn start(&mut self) -> Result<(), VmmError> {
        self.resume()
    }

    /// Takes all vCPUs out of the guest and returns when they are out.
    ///
    /// # Errors
    /// [`VmmError::PauseTimeout`] if a page fault of a vCPU is not served in time (they stop as soon as it is).
    pub fn pause(&mut self) -> Result<(), VmmError> {
        self.shared.gate.set_goal(Goal::Paused).map_err(VmmError::Failed)?;
        self.threads.iter().for_each(kick::kick);
        if !self.shared.gate.wait_parked(self.config.vcpus, PAUSE_TIMEOUT) {
            return Err(VmmError::PauseTimeout(PAUSE_TIMEOUT.as_secs()));
        }
        self.shared.gate.failure().map_or(Ok(()), |reason| Err(VmmError::Failed(reason)))
    }

    /// Lets the vCPUs go on.
    pub fn resume(&mut self) -> Result<(), VmmError> {
        self.shared.gate.set_goal(Goal::Running).map_err(VmmError::Failed)
    }

    /// Everything about the paused guest that is not in its memory.
    pub fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        let gate = &self.shared.gate;
        if let Some(reason) = gate.failure() {
            return Err(VmmError::Failed(reason));
        }
        if gate.goal() != Goal::Paused || !gate.wait_parked(self.config.vcpus, PAUSE_TIMEOUT) {
            return Err(VmmError::NotPaused);
        }
        let take = |vcpu: &LockedVcpu| VcpuState::take(&vcpu.lock().unwrap_or_else(PoisonError::into_inner));
        let vcpus = self.vcpus.iter().map(take).collect::<Result<Vec<_>, _>>()?;
        Ok(MachineState { config: self.config, counters: self.shared.counters.save(), vcpus }.encode())
    }

    /// Keeps vCPUs out of the guest for that share of the time, 0 to 99.
    pub fn throttle(&self, percent: u8) {
        self.throttle.set(percent);
    }

    /// What the guest has reported so far.
    pub fn counters(&self) -> GuestCounters {
        self.shared.counters.snapshot()
    }

    /// Whether the machine runs.
    pub fn state(&self) -> RunState {
        match (self.shared.gate.failure(), self.shared.gate.goal()) {
            (Some(reason), _) => RunState::Failed(reason),
            (None, Goal::Running) => RunState::Running,
            (None, _) => RunState::Paused,
        }
    }

    /// What the machine is made of.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// The part of memory, in bytes from its start, that the workload uses; before it are the guest's own structures.
    pub fn data_range(&self) -> std::ops::Range<u64> {
        self.layout.data_range()
    }
}

/// Whether the workload rewrites what it verifies.
fn writes(config: &MachineConfig) -> bool {
    config.workload.pattern != Pattern::Read
}

impl Drop for ReferenceMachine {
    fn drop(&mut self) {
        self.throttle.end();
        // Ending is never refused.
        let _ = self.shared.gate.set_goal(Goal::Ended);
        self.threads.iter().for_each(kick::kick);
        // The throttle's thread has ended, so nobody else holds the handles.
        for thread in Arc::into_inner(std::mem::take(&mut self.threads)).into_iter().flatten() {
            let _ = thread.join();
        }
    }
}
