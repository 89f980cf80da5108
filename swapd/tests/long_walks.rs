//! Requests that look at all of memory let faults through. Measured is how long faults wait while one such request
//! after the other is made, in a VM of 256 GiB of which little is touched.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Vm, config, started, store_directory};
use swapd::{Engine, EngineHandle, PAGE_SIZE, PageNo, Run};
use testkit::Random;

const GIB: u64 = 1 << 30;
const MEMORY: u64 = 256 * GIB;
/// Of what is touched, this share is in RAM: a fault reads the store.
const IN_RAM: (u64, u64) = (7, 8);
/// A touch that takes less was no fault.
const FAULT_MIN: Duration = Duration::from_micros(15);
/// For each kind of request.
const WINDOW: Duration = Duration::from_secs(2);
/// What is touched anew before each discard or eviction; where frames are scarce, a touch brings so many pages at a time.
const FILLED: u64 = 64 << 20;
const FILL_STEP: usize = 16;
/// What a request may add to the longest wait but one in a thousand.
const ADDED_MAX: Duration = Duration::from_millis(2);
/// In one of so many windows: a request that keeps faults waiting does so in each, a disk that stalls for a moment in
/// one.
const WINDOWS: u32 = 3;

/// One measurement at a time: another VM's engine would take processor time, and be taken for this one's.
fn alone() -> File {
    testkit::alone(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/long_walks.rs"))
}

/// What is touched before: 4 GiB if the environment has `VMEMD_LONG`.
fn touched() -> u64 {
    if std::env::var_os("VMEMD_LONG").is_some() { 4 * GIB } else { 2 * GIB }
}

/// How long a thread has waited for a core: on a machine with two, a third busy one waits a slice of the scheduler
/// now and then, which is not what is measured here.
struct Waits(File);

impl Waits {
    fn of(task: &str) -> Waits {
        Waits(File::open(format!("/proc/self/task/{task}/schedstat")).expect("the thread runs"))
    }

    fn of_engine() -> Waits {
        let tasks = std::fs::read_dir("/proc/self/task").expect("proc is there").flatten();
        let is_engine = |name: &String| {
            let comm = std::fs::read_to_string(format!("/proc/self/task/{name}/comm"));
            comm.is_ok_and(|comm| comm.trim() == "vmemd-engine")
        };
        let mut names = tasks.map(|task| task.file_name().to_string_lossy().into_owned());
        Waits::of(&names.find(is_engine).expect("the engine has a thread"))
    }

    fn so_far(&self) -> Duration {
        let mut text = [0; 64];
        let len = self.0.read_at(&mut text, 0).expect("the thread runs");
        let text = std::str::from_utf8(&text[..len]).expect("figures");
        Duration::from_nanos(
            text.split(' ').nth(1).and_then(|ns| ns.parse().ok()).expect("its second figure"),
        )
    }
}

/// Touches pages at random until told to stop. Returns how long each fault took, without waits for a core, in
/// ascending order.
fn fault(vm: &Vm, stop: &AtomicBool) -> Vec<Duration> {
    let this = std::fs::read_link("/proc/thread-self").expect("proc is there");
    let this = Waits::of(&this.file_name().expect("a number").to_string_lossy());
    let engine = Waits::of_engine();
    let waited = || this.so_far() + engine.so_far();
    let (mut took, mut random) = (Vec::new(), Random(1));
    while !stop.load(Ordering::Relaxed) {
        let page = PageNo(random.below(touched() / PAGE_SIZE as u64));
        let before = waited();
        let since = Instant::now();
        vm.touch(page);
        let elapsed = since.elapsed();
        if elapsed >= FAULT_MIN {
            took.push(elapsed.saturating_sub(waited() - before));
        }
    }
    took.sort_unstable();
    took
}

/// The same while `request` is made again and again; each time it says how long the engine was asked.
fn faults_during(vm: &Vm, what: &str, request: impl Fn(&EngineHandle)) -> Duration {
    let stop = AtomicBool::new(false);
    let (took, asked) = std::thread::scope(|scope| {
        let faults = scope.spawn(|| fault(vm, &stop));
        let (since, mut asked) = (Instant::now(), 0);
        while since.elapsed() < WINDOW {
            request(&vm.handle());
            asked += 1;
        }
        stop.store(true, Ordering::Relaxed);
        (faults.join().expect("faults are served"), asked)
    });
    let late = took[took.len() * 999 / 1000];
    println!(
        "{what}: {asked} times, {} faults, p50 {:?}, p99.9 {late:?}, longest {:?}",
        took.len(),
        took[took.len() / 2],
        took[took.len() - 1]
    );
    late
}

/// No faults come while a VM arrives: how long other requests wait while heat maps are taken over.
#[test]
fn a_heat_map_that_is_taken_over_keeps_no_other_request_waiting() {
    let _alone = alone();
    let mut config = config(MEMORY, GIB, store_directory(), false);
    config.store.overcommit = true;
    let vm = Vm::of(started(Engine::start(config, Box::new(|notice| println!("notice: {notice:?}")))));
    let heat = || vec![1; (MEMORY / PAGE_SIZE as u64) as usize];
    let receive = vm.handle().start_receiving_async(heat());
    receive.blocking_recv().expect("the engine lives").expect("it is empty");
    let this = std::fs::read_link("/proc/thread-self").expect("proc is there");
    let this = Waits::of(&this.file_name().expect("a number").to_string_lossy());
    let engine = Waits::of_engine();
    let waited = || this.so_far() + engine.so_far();
    let waits = |heat: Option<Vec<u8>>| {
        let mut told = heat.map(|heat| vm.handle().update_heat_async(heat));
        let (mut took, since) = (Vec::new(), Instant::now());
        loop {
            let ended = told.as_mut().map_or(since.elapsed() > WINDOW / 4, |told| told.try_recv().is_ok());
            if ended {
                break;
            }
            let (before, asked) = (waited(), Instant::now());
            vm.stats();
            took.push(asked.elapsed().saturating_sub(waited() - before));
        }
        took.sort_unstable();
        println!(
            "{} requests, p99 {:?}, longest {:?}",
            took.len(),
            took[took.len() * 99 / 100],
            took[took.len() - 1]
        );
        took[took.len() * 99 / 100]
    };
    let without = waits(None);
    let windows = (0..WINDOWS).map(|_| waits(Some(heat())));
    let late = windows.min().expect("there are some");
    assert!(late <= without + ADDED_MAX, "{late:?} while heat is taken over, {without:?} otherwise");
}

#[test]
fn what_looks_at_all_of_memory_keeps_no_fault_waiting() {
    let _alone = alone();
    let mut config = config(MEMORY, touched() / IN_RAM.1 * IN_RAM.0, store_directory(), false);
    config.store.overcommit = true;
    config.sampling = false;
    let vm = Vm::of(started(Engine::start(config, Box::new(|notice| println!("notice: {notice:?}")))));
    (0..touched() / PAGE_SIZE as u64).for_each(|page| vm.touch(PageNo(page)));
    let without = faults_during(&vm, "nothing", |_| std::thread::sleep(Duration::from_millis(10)));
    let mut slow = Vec::new();
    let mut measure = |what: &str, request: &dyn Fn(&EngineHandle)| {
        let mut least = Duration::MAX;
        for _ in 0..WINDOWS {
            least = least.min(faults_during(&vm, what, request));
            if least <= without + ADDED_MAX {
                return;
            }
        }
        slow.push(format!("{what}: {least:?}"));
    };
    measure("heat", &|handle| {
        handle.heat_async().blocking_recv().expect("the engine lives").expect("heat is always known");
    });
    measure("pages in RAM", &|handle| drop(handle.resident_map().expect("they are known")));
    measure("pages in the store", &|handle| {
        handle.stored_map_async().blocking_recv().expect("the engine lives").expect("they are known");
    });
    measure("tracking of writes, begun and ended", &|handle| {
        handle.subscribe_dirty().expect("tracking begins");
    });
    let dirty = vm.handle().subscribe_dirty().expect("tracking begins");
    measure("dirty pages", &|_| drop(dirty.collect().expect("writes are tracked")));
    drop(dirty);
    // Of what nobody touches: else faults would wait for their pages, and not for the walk.
    let beyond = |from: u64| Run::new(PageNo(from), (MEMORY / PAGE_SIZE as u64 - from) as u32);
    let untouched = beyond(touched() / PAGE_SIZE as u64);
    measure("evictions", &|handle| handle.evict(untouched).expect("there is nothing to do"));
    measure("discards", &|handle| handle.discard(untouched).expect("there is nothing to do"));
    // With frames behind it that the host takes back.
    let filled = Run::new(untouched.start, (FILLED / PAGE_SIZE as u64) as u32);
    measure("discards of what is in RAM", &|handle| {
        filled.pages().step_by(FILL_STEP).for_each(|page| vm.touch(page));
        handle.discard(untouched).expect("it is the guest's to give back");
    });
    measure("evictions of what is in RAM", &|handle| {
        filled.pages().step_by(FILL_STEP).for_each(|page| vm.touch(page));
        handle.evict(untouched).expect("nothing holds it");
    });
    assert!(slow.is_empty(), "without any, {without:?}; {}", slow.join("; "));
}
