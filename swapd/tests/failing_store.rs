//! A store that fails while the VM runs, on the real kernel: its file system fills up, or its device does not give
//! back what it was given.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
#[path = "../../tests/common/disk.rs"]
#[allow(dead_code, reason = "each test file uses a part")]
mod disk;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};

use common::{Vm, store_directory};
use disk::Disk;
use swapd::{Engine, Notice, PageNo, Run};
use testkit::{OrSkip, Reason, wait_for};

const MIB: u64 = 1 << 20;

/// 128 MiB in 16 MiB, and what its engine has to say.
fn start(disk: &Disk) -> (Vm, Receiver<Notice>) {
    let (sender, notices) = mpsc::channel();
    let notify = Box::new(move |notice| {
        // The test may have heard enough.
        let _ = sender.send(notice);
    });
    let mut config = common::config(128 * MIB, 16 * MIB, disk.store().into(), false);
    config.store.overcommit = true;
    let engine = common::started(Engine::start(config, notify));
    (common::Vm::of(engine), notices)
}

#[test]
fn a_full_disk_stops_the_vm_and_loses_nothing() {
    let directory = testkit::directory_in(store_directory(), "full");
    let disk = Disk::ext4(directory.path(), 256 * MIB).or_skip(Reason::Loop);
    disk.leave_free(32 * MIB);
    let (vm, notices) = start(&disk);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| vm.write_all(1));
        let said = |what: &str| match (what, notices.recv().expect("the engine tells")) {
            ("failed", Notice::StoreFailed(reason)) | ("starved", Notice::Starved(reason)) => {
                assert!(reason.contains("No space left"), "{reason}");
            }
            ("recovered", Notice::StoreRecovered) | ("relieved", Notice::Relieved) => {}
            (what, other) => panic!("{other:?} instead of {what}"),
        };
        said("failed");
        said("starved");
        // It stands still and keeps what it has.
        let stats = vm.stats();
        assert!(!writer.is_finished() && stats.store.failed.is_some());
        assert!(stats.frames_bytes <= stats.ram_budget_bytes);
        assert!(vm.handle().retry_store().unwrap_err().to_string().contains("No space left"));
        // With room it goes on, by itself.
        disk.drop_ballast();
        said("recovered");
        said("relieved");
    });
    assert_eq!(vm.mismatches(1), 0);
    assert!(vm.stats().store.failed.is_none());
}

#[test]
fn bad_sectors_lose_their_pages_alone() {
    const BAD: u64 = 96 * MIB;
    let directory = testkit::directory_in(store_directory(), "bad");
    let disk = Disk::bare(directory.path(), 128 * MIB).or_skip(Reason::Loop);
    let (vm, _notices) = start(&disk);
    vm.write_all(1);
    vm.handle().evict(Run::new(PageNo(0), vm.pages() as u32)).unwrap();
    disk.lose_behind(BAD);
    let bad = PageNo(BAD >> 12);
    let first = Run::new(bad, 3);
    // The kernel refuses to copy from a poisoned page, instead of ending this process by a signal.
    assert!(first.pages().all(|page| vm.is_unreadable(page)));
    assert!((0..bad.0).map(PageNo).all(|page| vm.is_right(page, 1)));
    let stats = vm.stats();
    assert_eq!(stats.poisoned_pages, 3);
    assert_eq!(stats.lost.iter().map(|run| (run.first, run.pages)).collect::<Vec<_>>(), [(bad.0, 3)]);
    assert!(stats.store.read_errors > 0 && stats.store.checksum_mismatches == 0, "{stats:?}");
    // What the guest gives back is lost no more.
    vm.handle().discard(first).unwrap();
    assert!(first.pages().all(|page| !vm.is_unreadable(page)));
    assert!(vm.stats().lost.is_empty());
}

/// A processor that cannot be stopped in the middle of an access gets the frames that it needs to come to its end,
/// from a reserve within the budget.
#[test]
fn a_reserve_is_let_go_of_when_nothing_can_be_written() {
    let directory = testkit::directory_in(store_directory(), "reserve");
    let disk = Disk::bare(directory.path(), 128 * MIB).or_skip(Reason::Loop);
    let (vm, notices) = start(&disk);
    vm.write_all(1);
    disk.set_writable(false);
    let written = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for page in 0..vm.pages() {
                vm.write(PageNo(page), 2);
                written.store(page, Ordering::SeqCst);
            }
        });
        while !matches!(notices.recv().expect("the engine tells"), Notice::Starved(_)) {}
        let then = written.load(Ordering::SeqCst);
        wait_for("the reserve is used", || (written.load(Ordering::SeqCst) >= then + 32).then_some(()));
        let stats = vm.stats();
        assert!(stats.frames_bytes <= stats.ram_budget_bytes && !writer.is_finished(), "{stats:?}");
        disk.set_writable(true);
        while !matches!(notices.recv().expect("the engine tells"), Notice::Relieved) {}
    });
    assert_eq!(vm.mismatches(2), 0);
}
