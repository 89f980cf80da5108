//! Space comes back: what the guest gives back leaves holes in the store's file, or is discarded on its device, and a
//! full store gives up the copies of pages that are in RAM.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
#[path = "../../tests/common/disk.rs"]
#[allow(dead_code, reason = "each test file uses a part")]
mod disk;

use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Vm, store_directory};
use disk::Disk;
use swapd::{Engine, Notice, PageNo, Run};
use testkit::{OrSkip, Reason, TempDir, wait_for};

const MIB: u64 = 1 << 20;
/// What is given back must have left the store by then, beside what the disk itself takes for it.
const SOON: Duration = Duration::from_secs(5);

/// What is given back: with `VMEMD_LONG` as much as a balloon may.
fn given_back() -> u64 {
    if std::env::var_os("VMEMD_LONG").is_some() { 1024 * MIB } else { 256 * MIB }
}

fn start(memory: u64, budget: u64, store: &Path, notify: impl Fn(Notice) + Send + 'static) -> Vm {
    let mut config = common::config(memory, budget, store.into(), false);
    config.store.overcommit = true;
    Vm::of(common::started(Engine::start(config, Box::new(notify))))
}

fn place(name: &str) -> TempDir {
    testkit::directory_in(store_directory(), name)
}

fn quiet(notice: Notice) {
    println!("{notice:?}");
}

/// Bytes that the file system has given the store's file.
fn file_bytes(directory: &TempDir) -> u64 {
    testkit::open_file_in(directory).metadata().expect("a file").blocks() * 512
}

/// Waits until at least so many bytes have gone since `before`, and says how long it took.
fn until_gone(before: u64, bytes: u64, mut taken: impl FnMut() -> u64) -> Duration {
    let began = Instant::now();
    wait_for("the store is smaller", || (before.saturating_sub(taken()) >= bytes).then_some(()));
    began.elapsed()
}

/// How long the disk of the stores takes by itself to take as much back from a file.
fn until_punched(bytes: u64) -> Duration {
    let file = testkit::directory_in(store_directory(), "punched");
    let file = std::fs::File::create(file.path().join("file")).expect("a file");
    let piece = vec![0x5A; MIB as usize];
    (0..bytes / MIB).for_each(|nth| file.write_all_at(&piece, nth * MIB).expect("room for it"));
    file.sync_all().expect("a file");
    let began = Instant::now();
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    for nth in 0..bytes / MIB {
        // SAFETY: no memory arguments; the file is open.
        let punched = unsafe { libc::fallocate(file.as_raw_fd(), mode, (nth * MIB) as i64, MIB as i64) };
        assert_eq!(punched, 0, "{}", std::io::Error::last_os_error());
    }
    began.elapsed()
}

/// Everything is written and paged out; a part in the middle is given back, its space is free within seconds, and
/// nothing else is harmed.
fn gives_back(vm: &Vm, gone: Run, taken: impl Fn() -> u64) {
    let all = Run::new(PageNo(0), vm.pages() as u32);
    let handle = vm.handle();
    vm.write_all(1);
    handle.evict(all).unwrap();
    let before = taken();
    assert!(before >= all.bytes() as u64, "all of it is stored: {before}");
    assert_eq!(vm.stats().store.used_bytes, all.bytes() as u64);
    handle.discard(gone).unwrap();
    // The file system may keep a block at each end.
    let took = until_gone(before, gone.bytes() as u64 - MIB, &taken);
    println!("{} MiB were free after {took:?}", gone.bytes() as u64 / MIB);
    if took > SOON {
        let disk = until_punched(gone.bytes() as u64);
        assert!(took <= SOON + 2 * disk, "{took:?}; by itself, the disk takes {disk:?}");
    }
    wait_for("it is on record", || {
        (vm.stats().store.used_bytes == (all.len - gone.len) as u64 * 4096).then_some(())
    });
    let kept = |page: &PageNo| !gone.contains(*page);
    assert!(all.pages().filter(kept).all(|page| vm.is_right(page, 1)), "what was kept is harmed");
    assert!(gone.pages().all(|page| vm.is_zero(page)), "what was given back is not zero");
    // Used again, while the next drops are under way: other content in the same places.
    let again = gone.part(0, gone.len / 4);
    for round in 2..=4 {
        again.pages().for_each(|page| vm.write(page, round));
        handle.evict(again).unwrap();
        assert!(again.pages().all(|page| vm.is_right(page, round)), "round {round}");
        if round < 4 {
            handle.evict(again).unwrap();
            handle.discard(again).unwrap();
        }
    }
    assert!(all.pages().filter(kept).all(|page| vm.is_right(page, 1)), "what was kept is harmed");
}

#[test]
fn what_is_given_back_leaves_holes_in_the_file() {
    let directory = place("holes");
    let gone = given_back();
    let vm = start(gone + 128 * MIB, 64 * MIB, directory.path(), quiet);
    gives_back(&vm, Run::new(PageNo(5000), (gone / 4096) as u32), || file_bytes(&directory));
}

#[test]
fn what_is_given_back_is_discarded_on_a_device() {
    let directory = place("discards");
    let gone = given_back();
    let disk = Disk::bare(directory.path(), gone + 128 * MIB).or_skip(Reason::Loop);
    let vm = start(gone + 128 * MIB, 64 * MIB, Path::new(&disk.store()), quiet);
    let image = directory.path().join("disk.img");
    let taken = || std::fs::metadata(&image).expect("the device's image").blocks() * 512;
    gives_back(&vm, Run::new(PageNo(5000), (gone / 4096) as u32), taken);
}

/// The file system has room for what is outside of RAM, and not for all of memory.
#[test]
fn a_store_as_large_as_what_is_outside_of_ram_is_enough() {
    const MEMORY: u64 = 128 * MIB;
    const BUDGET: u64 = 32 * MIB;
    let directory = place("tight");
    let disk = Disk::ext4(directory.path(), 256 * MIB).or_skip(Reason::Loop);
    disk.leave_free(MEMORY - BUDGET + 12 * MIB);
    static STARVED: AtomicBool = AtomicBool::new(false);
    let notify = |notice| {
        STARVED.fetch_or(matches!(notice, Notice::Starved(_)), Ordering::SeqCst);
        quiet(notice);
    };
    let vm = start(MEMORY, BUDGET, Path::new(&disk.store()), notify);
    for round in 1..=4 {
        vm.write_all(round);
        assert_eq!(vm.mismatches(round), 0, "round {round}");
    }
    let stats = vm.stats();
    assert!(stats.store.write_errors > 0, "it was never full: {stats:?}");
    println!("{} writes refused", stats.store.write_errors);
    assert!(!STARVED.load(Ordering::SeqCst), "the VM would have been paused");
    wait_for("the store works", || vm.stats().store.failed.is_none().then_some(()));
}

/// Rounds of what is measured, without holes and beside them. The best of each counts, for others use this machine too.
const ROUNDS: u64 = 2;
/// What is given back in each, at least: less is gone within the first ticks, each of which may take its share at once.
const BESIDE: u64 = 512 * MIB;
/// What is given back while the VM reads all the time has left the store by then, 1 GiB as well: unless holes take so long by themselves
/// (a slow disk, a busy machine) that their eighth is longer.
const SOON_BESIDE: Duration = Duration::from_secs(4);
/// Of the time from the first hole to the last, the store works on holes for an eighth, in each round: reads wait for it meanwhile. By the
/// engine's own clock, so that it holds on a busy machine as well. And a part more: what the first tick and the last may
/// take, and the hole that goes beyond it.
const HOLES_TIMES: u32 = 8;
const HOLES_MORE: Duration = Duration::from_millis(2 * 13 + 14);
/// Of 1000 faults, all but one wait at most so much longer beside holes: they may have met one, and a busy machine.
const P999_MORE: Duration = Duration::from_millis(6);

/// How long touches took, in ascending order.
struct Waits(Vec<Duration>);

impl Waits {
    fn at(&self, share: f64) -> Duration {
        self.0[(self.0.len() as f64 * share) as usize]
    }

    fn tell(&self, what: &str) {
        let [p50, p90, p99, p999] = [0.5, 0.9, 0.99, 0.999].map(|share| self.at(share).as_micros());
        let (n, max) = (self.0.len(), self.0[self.0.len() - 1].as_micros());
        println!("{what}: {n} touches, p50 {p50} p90 {p90} p99 {p99} p99.9 {p999} max {max} us");
    }
}

/// Space comes back soon although the VM reads all the time, and its faults hardly notice. The figures are those of
/// `docs/engine.md`.
#[test]
fn faults_go_on_beside_holes() {
    let directory = place("beside");
    let gone = given_back().max(BESIDE);
    let vm = start(ROUNDS * gone + 256 * MIB, 64 * MIB, directory.path(), quiet);
    let all = Run::new(PageNo(0), vm.pages() as u32);
    let handle = vm.handle();
    vm.write_all(1);
    handle.evict(all).unwrap();
    handle.set_prefetch_async(false).blocking_recv().unwrap().unwrap();
    let used = || vm.stats().store.used_bytes;
    // Pages of the last 256 MiB at random, until it ends.
    let touched = all.part(all.len - (256 * MIB / 4096) as u32, (256 * MIB / 4096) as u32);
    let mut x = 1u64;
    let mut touch = |goes_on: &mut dyn FnMut() -> bool| {
        let mut waits = Vec::new();
        while goes_on() {
            for _ in 0..64 {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let page = PageNo(touched.start.0 + (x >> 33) % u64::from(touched.len));
                let began = Instant::now();
                vm.touch(page);
                waits.push(began.elapsed());
            }
        }
        waits.sort_unstable();
        Waits(waits)
    };
    let [mut without, mut with, mut soonest] = [Duration::MAX; 3];
    let on_holes = || Duration::from_micros(vm.stats().store.drop_us);
    for round in 0..ROUNDS {
        let until = Instant::now() + Duration::from_secs(2);
        let before = touch(&mut || Instant::now() < until);
        before.tell("before");
        let (stored, pages, spent) = (used(), (gone / 4096) as u32, on_holes());
        handle.discard(all.part(round as u32 * pages, pages)).unwrap();
        let began = Instant::now();
        // The last look that found none.
        let mut first = began;
        touch(&mut || {
            let look = Instant::now();
            let none = used() == stored;
            first = if none { look } else { first };
            none
        });
        let beside = touch(&mut || stored.saturating_sub(used()) < gone);
        let (took, time, spent) = (began.elapsed(), first.elapsed(), on_holes() - spent);
        beside.tell("beside holes");
        println!("{} MiB in {took:?}: {spent:?} of holes within {time:?}", gone / MIB);
        assert!(spent <= time / HOLES_TIMES + HOLES_MORE, "holes take {spent:?} of {time:?}");
        (without, with) = (without.min(before.at(0.999)), with.min(beside.at(0.999)));
        soonest = soonest.min(took.saturating_sub((spent * HOLES_TIMES).saturating_sub(SOON_BESIDE)));
    }
    let more = with.saturating_sub(without);
    println!("best of {ROUNDS}: p99.9 {with:?} instead of {without:?}, in {soonest:?}");
    assert!(more <= P999_MORE, "faults wait for holes: p99.9 {with:?} instead of {without:?}");
    assert!(soonest <= SOON_BESIDE, "{soonest:?}");
    assert!(touched.pages().all(|page| vm.is_right(page, 1)));
}
