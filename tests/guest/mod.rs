//! A reference guest on plain memory, and what tests do with it.

use std::time::{Duration, Instant};

use memmap2::{MmapMut, MmapOptions};
use vmemd::size::Size;
use vmemd::vmm::{GuestCounters, Machine, MachineConfig, RunState, VmmError};

/// No condition takes longer, even on a busy machine.
const DEADLINE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(1);

/// A machine and its memory. Fields drop in order: the machine first.
pub struct Guest {
    pub machine: Machine,
    pub memory: MmapMut,
}

/// Anonymous memory that is backed only where it is touched.
pub fn memory(bytes: u64) -> MmapMut {
    MmapOptions::new().len(bytes as usize).no_reserve_swap().map_anon().unwrap()
}

/// The configuration from texts.
pub fn config(size: &str, vcpus: u32, workload: &str) -> MachineConfig {
    let memory_bytes = size.parse::<Size>().unwrap().bytes();
    MachineConfig { memory_bytes, vcpus, workload: workload.parse().unwrap() }
}

impl Guest {
    /// None, and a word about it, where there is no KVM.
    pub fn new(size: &str, vcpus: u32, workload: &str) -> Option<Guest> {
        let config = config(size, vcpus, workload);
        let mut memory = memory(config.memory_bytes);
        match Machine::new(config, memory.as_mut_ptr()) {
            Ok(machine) => Some(Guest { machine, memory }),
            Err(error @ (VmmError::NoKvm | VmmError::NoPermission)) => {
                eprintln!("skipped: {error}");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Waits until the counters are so; panics with them if the guest fails or takes too long.
    pub fn wait(&self, what: &str, done: impl Fn(&GuestCounters) -> bool) -> GuestCounters {
        let start = Instant::now();
        loop {
            let counters = self.machine.counters();
            if done(&counters) {
                return counters;
            }
            let state = self.machine.state();
            assert_eq!(state, RunState::Running, "waiting for {what}: {counters:?}");
            assert!(start.elapsed() < DEADLINE, "waiting for {what}: {counters:?}");
            std::thread::sleep(POLL);
        }
    }
}
