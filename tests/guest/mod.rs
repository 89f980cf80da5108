//! A reference guest on plain memory, with the operations that tests need.

#![allow(dead_code, reason = "each test program uses its own part of this")]

pub(crate) mod uffd;

use std::ops::Range;
use std::time::{Duration, Instant};

use memmap2::{MmapMut, MmapOptions};
use testkit::{Reason, skip};
use vmemd::vmm::{
    GuestCounters, MachineConfig, PAGE_BYTES, PAGE_WORDS, ReferenceMachine, RunState, VmmError, page_content,
};
use vmprocess::size::Size;

/// No condition takes longer, even on a busy machine.
const DEADLINE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(1);

/// A machine and its memory. Fields drop in order: the machine first.
pub(crate) struct Guest {
    pub(crate) machine: ReferenceMachine,
    pub(crate) memory: MmapMut,
}

/// Anonymous memory that is backed only where it is touched.
pub(crate) fn memory(bytes: u64) -> MmapMut {
    MmapOptions::new().len(bytes as usize).no_reserve_swap().map_anon().unwrap()
}

/// The configuration from texts.
pub(crate) fn config(size: &str, vcpus: u32, workload: &str) -> MachineConfig {
    let memory_bytes = size.parse::<Size>().unwrap().bytes();
    MachineConfig { memory_bytes, vcpus, workload: workload.parse().unwrap() }
}

impl Guest {
    /// Ends the test where there is no KVM.
    pub(crate) fn new(size: &str, vcpus: u32, workload: &str) -> Guest {
        let config = config(size, vcpus, workload);
        Guest::on(memory(config.memory_bytes), config)
    }

    /// A guest on memory that the caller has made.
    pub(crate) fn on(mut memory: MmapMut, config: MachineConfig) -> Guest {
        match ReferenceMachine::new(config, memory.as_mut_ptr()) {
            Ok(machine) => Guest { machine, memory },
            Err(error @ (VmmError::NoKvm | VmmError::NoPermission)) => skip(Reason::Kvm, error),
            Err(error) => panic!("{error}"),
        }
    }

    /// Waits until the counters are so; panics with them if the guest fails or takes too long.
    pub(crate) fn wait(&self, what: &str, done: impl Fn(&GuestCounters) -> bool) -> GuestCounters {
        self.look(what, |counters| {
            if done(&counters) {
                return Some(counters);
            }
            assert_eq!(self.machine.state(), RunState::Running, "waiting for {what}: {counters:?}");
            None
        })
    }

    /// A guest gives no sign of how far it is: its counters are looked at again and again.
    fn look<T>(&self, what: &str, mut look: impl FnMut(GuestCounters) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            let counters = self.machine.counters();
            assert!(start.elapsed() < DEADLINE, "waiting for {what}: {counters:?}");
            if let Some(found) = look(counters) {
                return found;
            }
            std::thread::sleep(POLL);
        }
    }
}

/// Offsets that `docs/guest.md` fixes.
const HEADER: usize = 0x1000;
const HEADER_LEDGER: usize = 0x20;

impl Guest {
    /// A guest on memory that the caller has prepared.
    pub(crate) fn restored(state: &[u8], memory: MmapMut) -> Guest {
        let mut memory = memory;
        let machine =
            ReferenceMachine::restore_sized(state, memory.as_mut_ptr(), memory.len() as u64).unwrap();
        Guest { machine, memory }
    }

    /// Waits until the guest has failed, and gives the reason.
    pub(crate) fn wait_failure(&self) -> String {
        self.look("its failure", |_| match self.machine.state() {
            RunState::Failed(reason) => Some(reason),
            _ => None,
        })
    }

    /// Where a page is in this process. The guest must be paused for what is read there to stand still.
    fn page_ptr(&mut self, page: u64) -> *mut [u64; PAGE_WORDS] {
        let offset = page as usize * PAGE_BYTES;
        assert!(offset < self.memory.len());
        self.memory.as_mut_ptr().wrapping_add(offset).cast()
    }

    pub(crate) fn page(&mut self, page: u64) -> [u64; PAGE_WORDS] {
        // SAFETY: within the mapping (asserted), aligned to a page; the guest is paused.
        unsafe { self.page_ptr(page).read_volatile() }
    }

    pub(crate) fn set_page(&mut self, page: u64, words: [u64; PAGE_WORDS]) {
        // SAFETY: as above.
        unsafe { self.page_ptr(page).write_volatile(words) }
    }

    /// The generation of a page by the guest's ledger.
    pub(crate) fn generation(&mut self, page: u64) -> u32 {
        let base = self.memory.as_ptr();
        // SAFETY: the header and the ledger that it names lie within the mapping; the guest is paused.
        unsafe {
            let ledger = base.add(HEADER + HEADER_LEDGER).cast::<u64>().read_volatile() as usize;
            base.add(ledger).cast::<u32>().add(page as usize).read_volatile()
        }
    }

    /// Page numbers of the data.
    pub(crate) fn data_pages(&self) -> Range<u64> {
        let range = self.machine.data_range();
        range.start / PAGE_BYTES as u64..range.end / PAGE_BYTES as u64
    }

    /// Asserts from the host that a page has the content of its generation, and gives that. A page whose rewriting
    /// was interrupted is torn, rightly: its ledger entry comes last.
    pub(crate) fn intact(&mut self, page: u64) -> Option<u32> {
        let generation = self.generation(page);
        let found = self.page(page);
        (found == page_content(page as u32, generation)).then_some(generation)
    }

    /// A copy of the memory of the paused guest.
    pub(crate) fn copy_memory(&self) -> MmapMut {
        let mut copy = memory(self.memory.len() as u64);
        copy.copy_from_slice(&self.memory);
        copy
    }
}
