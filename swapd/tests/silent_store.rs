//! A store that falls silent, or fails at everything, and comes back, on the real kernel and under a VM that reads
//! and writes: no page is lost, none is wrong, and the VM goes on. `VMEMD_LONG=1` has it be away for a minute as
//! well.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
#[path = "../../tests/common/disk.rs"]
#[allow(dead_code, reason = "each test file uses a part")]
mod disk;
#[path = "../../tests/common/slow_disk.rs"]
#[allow(dead_code, reason = "each test file uses a part")]
mod slow_disk;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use common::{Vm, store_directory};
use slow_disk::SlowDisk;
use swapd::{Engine, Notice, PageNo, Run};
use testkit::{OrSkip, Reason, until};

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 64 * MIB;
/// Pages that a thread has come on by if it goes on.
const PROGRESS: u64 = 2000;
/// The engine tells after 5 s, give or take a tick of an idle VM and a busy host.
const TOLD_S: u64 = 8;

/// 64 MiB in 16 MiB, and what its engine has to say.
fn start(disk: &SlowDisk) -> (Vm, Receiver<Notice>) {
    let (sender, notices) = mpsc::channel();
    let notify = Box::new(move |notice| {
        let _ = sender.send(notice);
    });
    let config = common::config(MEMORY, 16 * MIB, disk.device().into(), false);
    (Vm::of(common::started(Engine::start(config, notify))), notices)
}

fn longer(seconds: &[u64]) -> Vec<u64> {
    let long = std::env::var_os("VMEMD_LONG").is_some().then_some(60);
    seconds.iter().copied().chain(long).collect()
}

/// The disk comes back, also when a test fails.
struct Back<'a>(&'a SlowDisk);

impl Drop for Back<'_> {
    fn drop(&mut self) {
        self.0.come_back();
    }
}

/// Ends the threads of a test, also when that fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// One thread reads and verifies the first half of memory, another rewrites the second, round after round, while
/// `meanwhile` runs; then each goes on for a while, and all of memory is looked at.
fn busy(vm: &Vm, meanwhile: impl FnOnce()) {
    vm.write_all(1);
    let half = vm.pages() / 2;
    let (ends, [read, written]) = (AtomicBool::new(false), [(); 2].map(|()| AtomicU64::new(0)));
    let goes_on = |count: &AtomicU64| {
        let then = count.load(Ordering::SeqCst);
        until("it goes on", || count.load(Ordering::SeqCst) > then + PROGRESS);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Every page once, in no order.
            for page in (0..half).cycle().map(|nth| PageNo(nth * 7919 % half)) {
                assert!(vm.is_right(page, 1), "{page} is wrong");
                read.fetch_add(1, Ordering::SeqCst);
                if ends.load(Ordering::SeqCst) {
                    return;
                }
            }
        });
        scope.spawn(|| {
            for round in 2.. {
                (half..vm.pages()).for_each(|page| {
                    vm.write(PageNo(page), round);
                    written.fetch_add(1, Ordering::SeqCst);
                });
                if ends.load(Ordering::SeqCst) {
                    return written.store(round, Ordering::SeqCst);
                }
            }
        });
        let _ends = Ends(&ends);
        goes_on(&read);
        goes_on(&written);
        meanwhile();
        goes_on(&read);
        goes_on(&written);
    });
    let round = written.load(Ordering::SeqCst);
    assert!((0..half).map(PageNo).all(|page| vm.is_right(page, 1)));
    assert!((half..vm.pages()).map(PageNo).all(|page| vm.is_right(page, round)));
    let stats = vm.stats();
    assert_eq!((stats.poisoned_pages, &stats.lost[..], stats.store.checksum_mismatches), (0, &[][..], 0));
    assert_eq!((stats.store.failed, stats.store.silent_ms), (None, 0));
}

/// Waits for one that is meant; hears no page lost on the way.
fn hear(notices: &Receiver<Notice>, meant: impl Fn(&Notice) -> bool) {
    loop {
        let notice = notices.recv_timeout(Duration::from_secs(90)).expect("the engine tells");
        assert!(!matches!(notice, Notice::Poisoned(_)), "{notice:?}");
        if meant(&notice) {
            return;
        }
    }
}

#[test]
fn a_store_that_falls_silent_and_comes_back_loses_nothing() {
    let directory = testkit::directory_in(store_directory(), "silent");
    let disk = SlowDisk::bare(directory.path(), MEMORY).or_skip(Reason::Loop);
    let (vm, notices) = start(&disk);
    for seconds in longer(&[2, 10]) {
        busy(&vm, || {
            let _back = Back(&disk);
            let began = Instant::now();
            disk.fall_silent();
            if seconds > TOLD_S {
                hear(&notices, |notice| matches!(notice, Notice::Unreachable(_)));
                assert!(vm.stats().store.silent_ms >= 5000);
            }
            std::thread::sleep(Duration::from_secs(seconds).saturating_sub(began.elapsed()));
            disk.come_back();
            if seconds > TOLD_S {
                hear(&notices, |notice| matches!(notice, Notice::Reachable));
            }
        });
    }
    assert!(!notices.try_iter().any(|notice| matches!(notice, Notice::Poisoned(_))));
}

/// Longer than a page that is broken is waited for: what all pages do says nothing of one.
#[test]
fn a_store_that_fails_at_everything_and_comes_back_loses_nothing() {
    let directory = testkit::directory_in(store_directory(), "failing");
    let disk = SlowDisk::bare(directory.path(), MEMORY).or_skip(Reason::Loop);
    let (vm, notices) = start(&disk);
    for seconds in longer(&[3, 14]) {
        busy(&vm, || {
            let _back = Back(&disk);
            disk.fail(libc::EIO);
            // A write that fails, or nobody writes because both threads wait for pages.
            hear(&notices, |notice| matches!(notice, Notice::StoreFailed(_) | Notice::Unreachable(_)));
            std::thread::sleep(Duration::from_secs(seconds));
            disk.come_back();
            until("the store works", || vm.stats().store.failed.is_none());
        });
    }
    assert!(!notices.try_iter().any(|notice| matches!(notice, Notice::Poisoned(_))));
    assert!(vm.stats().store.read_errors > 0);
}

/// A device that keeps a discard to itself: whoever waits for a frame behind it is told of, as with a read or a write
/// that does not end.
#[test]
fn a_store_that_ends_no_discard_and_does_after_all_loses_nothing() {
    let directory = testkit::directory_in(store_directory(), "discards");
    let disk = SlowDisk::bare(directory.path(), MEMORY).or_skip(Reason::Loop);
    let (vm, notices) = start(&disk);
    let given_back = Run::new(PageNo(vm.pages() / 2), (vm.pages() / 2) as u32);
    vm.write_all(1);
    vm.handle().evict(Run::new(PageNo(0), vm.pages() as u32)).unwrap();
    for seconds in longer(&[2, 12]) {
        let _back = Back(&disk);
        let before = vm.stats().store.used_bytes;
        disk.keep_discards();
        vm.handle().discard(given_back).unwrap();
        until("a drop is under way", || vm.stats().store.used_bytes < before);
        let began = Instant::now();
        std::thread::scope(|scope| {
            // What has been given back is used again: more than there are frames.
            let writes = scope.spawn(|| given_back.pages().for_each(|page| vm.write(page, 2)));
            if seconds > TOLD_S {
                hear(&notices, |notice| matches!(notice, Notice::Unreachable(_)));
                assert!(vm.stats().store.silent_ms >= 5000);
                assert!(vm.stats().store.oldest_ms >= 5000);
                assert!(!writes.is_finished());
            }
            std::thread::sleep(Duration::from_secs(seconds).saturating_sub(began.elapsed()));
            disk.come_back();
            if seconds > TOLD_S {
                hear(&notices, |notice| matches!(notice, Notice::Reachable));
            }
        });
        assert!(given_back.pages().all(|page| vm.is_right(page, 2)));
        assert!((0..vm.pages() / 2).map(PageNo).all(|page| vm.is_right(page, 1)));
        vm.handle().evict(given_back).unwrap();
    }
    assert!(!notices.try_iter().any(|notice| matches!(notice, Notice::Poisoned(_))));
}
