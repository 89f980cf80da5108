//! Frames that cannot move because something holds them: buffers registered with io_uring, and pages that the host
//! would merge (KSM).

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::fs::{self, File};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use common::{Vm, config, started, store_directory};
use io_uring::IoUring;
use swapd::{CommandError, Engine, Notice, PAGE_SIZE, PageNo, Run};
use testkit::wait::DEADLINE;
use testkit::{Reason, skip, wait_for};

const MIB: u64 = 1 << 20;

fn pages(bytes: u64) -> u64 {
    bytes / PAGE_SIZE as u64
}

fn start(memory: u64, budget: u64) -> (Vm, Receiver<Notice>) {
    let (notices, told) = channel();
    let notify = Box::new(move |notice| drop(notices.send(notice)));
    (Vm::of(started(Engine::start(config(memory, budget, store_directory(), false), notify))), told)
}

/// Registers the first bytes of the VM's memory as buffers of a ring: they stay where they are for as long as it
/// lives. Ends the test where this user may not.
fn pin(vm: &Vm, bytes: u64) -> IoUring {
    let ring = IoUring::new(2).expect("a ring, as the engine has one");
    let at = vm.addresses().start as *mut libc::c_void;
    let buffer = libc::iovec { iov_base: at, iov_len: bytes as usize };
    // SAFETY: within the VM's memory, which outlives the ring in every test; no operation ever uses the buffer.
    match unsafe { ring.submitter().register_buffers(&[buffer]) } {
        Ok(()) => ring,
        Err(error) => skip(Reason::Root, format_args!("cannot register buffers: {error}")),
    }
}

#[test]
fn what_is_pinned_is_given_up_and_other_pages_leave_in_its_place() {
    let (vm, told) = start(96 * MIB, 32 * MIB);
    let ring = pin(&vm, 20 * MIB);
    for round in 1..=3 {
        let start = Instant::now();
        vm.write_all(round);
        assert_eq!(vm.mismatches(round), 0, "round {round}");
        // It stood still when a tick was needed for each few victims.
        println!("round {round}: {} ms", start.elapsed().as_millis());
    }
    let stats = vm.stats();
    assert!(stats.frames_bytes <= 32 * MIB && stats.starved_ms == 0, "{stats:?}");
    // Those that may be tried again at this moment count as free.
    let seen = wait_for("pinned pages show", || {
        (0..vm.pages()).for_each(|page| vm.touch(PageNo(page)));
        let pinned = vm.stats().pinned_bytes;
        (pinned > 0).then_some(pinned)
    });
    assert!(seen <= 20 * MIB, "{seen}");
    let tries = stats.evict.pinned;
    assert!(tries >= pages(20 * MIB), "all of them were tried: {tries}");
    drop(ring);
    // What comes free leaves like any other page: in the end none of it has a frame.
    let handle = vm.handle();
    handle.evict(Run::new(PageNo(0), pages(20 * MIB) as u32)).expect("nothing holds it any more");
    assert_eq!(vm.mismatches(3), 0);
    assert!(told.try_iter().all(|notice| matches!(notice, Notice::Short { .. } | Notice::Enough)));
}

#[test]
fn a_budget_below_what_is_pinned_is_answered_with_figures_and_starving_is_told() {
    let (vm, told) = start(64 * MIB, 40 * MIB);
    vm.write_all(1);
    let ring = pin(&vm, 24 * MIB);
    let handle = vm.handle();
    let asked = Instant::now();
    let error = handle.set_budget(16 * MIB).unwrap_err();
    let CommandError::StillAbove { budget, held, pinned } = error else { panic!("{error}") };
    assert!(asked.elapsed() < DEADLINE, "{:?}", asked.elapsed());
    assert_eq!(budget, 16 * MIB);
    assert!((24 * MIB..25 * MIB).contains(&held), "all but what is pinned has left: {held}");
    assert!(pinned > 0 && pinned <= held, "{pinned} of {held}");
    let error = handle.evict(Run::new(PageNo(0), 100)).unwrap_err();
    assert!(matches!(error, CommandError::Pinned { pages: 100 }), "{error}");

    std::thread::scope(|scope| {
        // A page that is not in RAM, and none can leave for it.
        let waiter = scope.spawn(|| assert!(vm.is_right(PageNo(vm.pages() - 1), 1)));
        let notice = told.recv_timeout(DEADLINE).expect("it is told");
        assert!(matches!(notice, Notice::Short { pinned_bytes } if pinned_bytes > 8 * MIB), "{notice:?}");
        assert!(!waiter.is_finished());
        let starved = vm.stats().starved_ms;
        wait_for("the figure grows", || (vm.stats().starved_ms > starved).then_some(()));
        // Pages that are in RAM are there for the guest.
        assert!((0..pages(24 * MIB)).all(|page| vm.is_right(PageNo(page), 1)));
        drop(ring);
        waiter.join().expect("it goes on");
    });
    assert!(matches!(told.recv_timeout(DEADLINE), Ok(Notice::Enough)));
    // What was asked for still holds.
    wait_for("the budget is kept", || (vm.stats().frames_bytes <= 16 * MIB).then_some(()));
    assert_eq!(vm.stats().starved_ms, 0);
    assert_eq!(vm.mismatches(1), 0);
    handle.set_budget(20 * MIB).expect("it can be kept");
}

#[test]
fn more_ram_is_given_to_a_vm_that_starves() {
    let (vm, told) = start(64 * MIB, 40 * MIB);
    vm.write_all(1);
    let ring = pin(&vm, 24 * MIB);
    let handle = vm.handle();
    handle.set_budget(16 * MIB).unwrap_err();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| assert!(vm.is_right(PageNo(vm.pages() - 1), 1)));
        told.recv_timeout(DEADLINE).expect("it is told");
        handle.set_budget(40 * MIB).expect("more is always possible");
        waiter.join().expect("it goes on");
    });
    assert_eq!(vm.mismatches(1), 0);
    drop(ring);
}

/// The host's KSM as this test needs it, put back at the end. Another test that switches it waits until then.
struct Ksm {
    before: Vec<(&'static str, String)>,
    _alone: File,
}

impl Ksm {
    const SETTINGS: [(&str, &str); 3] = [("pages_to_scan", "20000"), ("sleep_millisecs", "5"), ("run", "1")];

    fn read(name: &str) -> Option<String> {
        Some(fs::read_to_string(format!("/sys/kernel/mm/ksm/{name}")).ok()?.trim().to_owned())
    }

    fn on() -> Option<Ksm> {
        Self::read("run")?;
        let alone = testkit::alone("/sys/kernel/mm/ksm");
        let before: Option<Vec<_>> =
            Self::SETTINGS.iter().map(|(name, _)| Some((*name, Self::read(name)?))).collect();
        let ksm = Ksm { before: before?, _alone: alone };
        for (name, value) in Self::SETTINGS {
            fs::write(format!("/sys/kernel/mm/ksm/{name}"), value).ok()?;
        }
        Some(ksm)
    }

    fn number(name: &str) -> u64 {
        Self::read(name).and_then(|text| text.parse().ok()).expect("a number")
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        for (name, value) in self.before.iter().rev() {
            let _ = fs::write(format!("/sys/kernel/mm/ksm/{name}"), value);
        }
    }
}

/// As a process started by systemd with `MemoryKSM=yes` has it, and all that it starts.
fn merge_all(on: bool) -> bool {
    const PR_SET_MEMORY_MERGE: libc::c_int = 67;
    // SAFETY: no memory arguments.
    unsafe { libc::prctl(PR_SET_MEMORY_MERGE, libc::c_ulong::from(on), 0, 0, 0) == 0 }
}

#[test]
fn a_host_that_merges_equal_pages_leaves_those_of_a_vm_alone() {
    let Some(_ksm) = Ksm::on() else { skip(Reason::Kernel, "KSM cannot be switched on") };
    if !merge_all(true) {
        skip(Reason::Kernel, "memory merging cannot be switched on for a process");
    }
    let (vm, told) = start(96 * MIB, 32 * MIB);
    // Proof that the host does merge: the same pages in this process's other memory.
    let mut other = memmap2::MmapMut::map_anon(8 * MIB as usize).expect("memory");
    other.fill(0x5A);
    let fill = |seed: u8| {
        for page in 0..vm.pages() {
            let at = vm.addresses().start + page as usize * PAGE_SIZE;
            // SAFETY: within the VM's memory, which this thread alone works on.
            unsafe { std::ptr::write_bytes(at as *mut u8, seed, PAGE_SIZE) };
        }
    };
    fill(0x5A);
    let scans = Ksm::number("full_scans");
    wait_for("the host has been over all memory twice, and merged", || {
        // The guest goes on meanwhile, in pages that are all equal.
        fill(0x5A);
        (Ksm::number("full_scans") >= scans + 3 && merged() > 0).then_some(())
    });
    for seed in 1..4 {
        fill(seed);
    }
    let stats = vm.stats();
    assert_eq!(stats.pinned_bytes, 0, "{stats:?}");
    assert!(stats.frames_bytes <= 32 * MIB, "{stats:?}");
    assert!(told.try_iter().next().is_none());
    vm.handle().set_budget(16 * MIB).expect("pages leave");
    merge_all(false);
    assert_eq!(other[4096], 0x5A);
}

/// Pages of this process that the host has merged.
fn merged() -> u64 {
    let text = fs::read_to_string("/proc/self/ksm_merging_pages").expect("a kernel with KSM tells");
    text.trim().parse().expect("a number")
}
