//! The cost of an idle VM.
//!
//! Three things are judged, because each alone can mislead:
//! - *How often its threads wake up*, by the kernel's count of a thread's own switches. It is the same on every host.
//! - *What its engine asks of the kernel each time*: the moves of samples, and nothing that looks at all memory (as a
//!   scan of the page tables does, which may take less time than the wake-up itself). It is the same on every host,
//!   too.
//! - *The processor time of its process*. A wake-up costs 0.1 ms on one host and 2 ms on another (a hypervisor below,
//!   cold caches), so that time alone says as much of the host as of the VM. It is taken beside that of a thread that
//!   does next to nothing as often.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
#[path = "common/trace.rs"]
mod trace;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::{Host, needs_vms, wait_for};
use testkit::{Reason, skip};

/// The longest time between two wake-ups of an idle VM's engine (`swapd`'s sampler, after the VM has touched nothing
/// for a while), and between two looks of its process's main thread.
const ENGINE_SLEEPS: Duration = Duration::from_millis(6400);
const MAIN_SLEEPS: Duration = Duration::from_secs(10);
/// An engine that has slept for so long without a break has reached its longest interval.
const SETTLED: Duration = Duration::from_millis(5500);
/// Length of a measurement: three wake-ups of the engine.
const WINDOW: Duration = ENGINE_SLEEPS.saturating_mul(3);
/// An idle VM's share of a core: 0.1 %.
const SHARE_MAX: f64 = 0.001;
/// The VM's share is the least of so many windows: the host adds to the others.
const WINDOWS: u32 = 3;
/// About as often as this an idle VM's process wakes up, and so does the control thread.
const CONTROL_EVERY: Duration = Duration::from_secs(4);
/// Bytes that the control thread reads at a wake-up, as much as a wake-up of the engine reads of code, stacks and
/// tables.
const CONTROL_BYTES: usize = 256 << 10;
/// So many wake-ups of the engine are traced, and at each it may make so many moves: eight samples out, and as many
/// back.
const TRACED: u32 = 2;
const MOVES_MAX: u32 = 16;
/// `UFFDIO_MOVE`.
const MOVE: u64 = 0xc028_aa05;
/// `PAGEMAP_SCAN`.
const SCAN: u64 = 0xc060_6610;

/// For each thread of a process: the nanoseconds that it has run, and the number of times that it has gone to sleep.
fn threads(pid: u32) -> BTreeMap<(u32, String), (u64, u64)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the process lives");
    tasks
        .filter_map(|task| {
            let path = task.ok()?.path();
            let read = |file| std::fs::read_to_string(path.join(file)).ok();
            let ran = read("schedstat")?.split(' ').next()?.parse().ok()?;
            let status = read("status")?;
            let slept = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
            let tid = path.file_name()?.to_str()?.parse().ok()?;
            Some(((tid, read("comm")?.trim().to_owned()), (ran, slept.trim().parse().ok()?)))
        })
        .collect()
}

fn engine(pid: u32) -> u32 {
    let find = || threads(pid).into_keys().find(|(_, name)| name == "vmemd-engine");
    find().expect("it has an engine").0
}

/// The share of a core that a thread takes over the window which wakes up as often as an idle VM does, and only looks
/// at some memory.
fn control() -> f64 {
    let memory = vec![1_u8; CONTROL_BYTES];
    let ran = || {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("this thread runs");
        text.split(' ').next().and_then(|ran| ran.parse::<u64>().ok()).expect("nanoseconds")
    };
    let (since, before) = (Instant::now(), ran());
    while since.elapsed() < WINDOW {
        std::thread::sleep(CONTROL_EVERY);
        std::hint::black_box(memory.iter().step_by(64).map(|byte| u64::from(*byte)).sum::<u64>());
    }
    (ran() - before) as f64 / since.elapsed().as_nanos() as f64
}

/// A VM's process over a window.
struct Seen {
    share: f64,
    /// The number of times that each thread woke up.
    woken: BTreeMap<String, u64>,
    words: String,
    /// Length of the window: longer than [`WINDOW`] on a busy host.
    window: Duration,
}

fn look(pid: u32) -> Seen {
    let (since, before) = (Instant::now(), threads(pid));
    // Time itself is what is measured here.
    std::thread::sleep(WINDOW);
    let (after, window) = (threads(pid), since.elapsed());
    let mut seen = Seen { share: 0.0, woken: BTreeMap::new(), words: String::new(), window };
    let window = window.as_nanos() as f64;
    for (thread, (ran, slept)) in after {
        let (ran_before, slept_before) = before.get(&thread).copied().unwrap_or_default();
        let (share, woken) = (ran.saturating_sub(ran_before) as f64 / window, slept - slept_before);
        seen.share += share;
        *seen.woken.entry(thread.1.clone()).or_default() += woken;
        if woken > 0 {
            seen.words += &format!("; {}: {:.4} %, {woken} times", thread.1, share * 100.0);
        }
    }
    seen
}

fn measure(name: &str, memory: &str, ram: &str) {
    needs_vms();
    let mut host = Host::new("idle");
    let store = host.store();
    let args = [
        "run",
        "--name",
        name,
        "--memory",
        memory,
        "--ram",
        ram,
        "--guest",
        "idle:fill=all",
        "--store",
        &store,
    ];
    let vm = host.start(&args);
    let pages = host.wait_state(name, "running")["memory_bytes"].as_u64().unwrap() / 4096;
    host.wait_stat(name, "the fill", |stat| {
        stat["guest"]["filled_pages"].as_u64().is_some_and(|filled| filled + pages / 64 >= pages)
    });
    // The sampler takes one pass to see that nothing is in use, and then looks less and less often. Each `stat` wakes
    // the engine.
    let engine = engine(vm.pid());
    let sleeps =
        |pid| threads(pid).into_iter().find(|((tid, _), _)| *tid == engine).map(|(_, (_, slept))| slept);
    let mut last = (sleeps(vm.pid()), Instant::now());
    wait_for("the engine to sleep for long", || {
        let now = sleeps(vm.pid());
        if now != last.0 {
            last = (now, Instant::now());
        }
        (last.1.elapsed() >= SETTLED).then_some(())
    });
    wakes_up_for_samples_alone(engine);

    let (mut least, mut dear) = (f64::MAX, 0);
    for _ in 0..WINDOWS {
        let control = std::thread::spawn(control);
        let Seen { share, woken, words, window } = look(vm.pid());
        let control = control.join().expect("the control");
        println!(
            "{memory} in {ram}: {:.4} % of a core{words}; control {:.4} %",
            share * 100.0,
            control * 100.0
        );
        for (thread, sleeps) in [("vmemd-engine", ENGINE_SLEEPS), ("vmemd", MAIN_SLEEPS)] {
            // Two more than there is time for: the window begins and ends anywhere. Twice as many are too many.
            let most = window.as_millis().div_ceil(sleeps.as_millis()) as u64 + 2;
            let times = woken.get(thread).copied().unwrap_or_default();
            assert!(
                times <= most,
                "{memory} in {ram}, idle: {thread} woke up {times} times in {window:?}{words}"
            );
        }
        if share < SHARE_MAX {
            return;
        }
        least = least.min(share);
        dear += u32::from(control >= SHARE_MAX);
    }
    if dear == WINDOWS {
        // Nothing that wakes up at all can keep to it here.
        skip(Reason::Slow, "a thread that only wakes up takes more here than an idle VM may");
    }
    panic!("{memory} in {ram}, idle: {:.4} % of a core", least * 100.0);
}

/// At each wake-up the engine makes the same few moves, and no other system call.
fn wakes_up_for_samples_alone(engine: u32) {
    let (mut woken, mut moves, mut looks) = (0, 0, 0);
    trace::system_calls(engine, |number, arguments| {
        match number {
            libc::SYS_io_uring_enter => woken += 1,
            libc::SYS_ioctl if arguments[1] == MOVE => moves += 1,
            // A huge page is looked at before it is moved: that part of the page tables and no more.
            libc::SYS_ioctl if arguments[1] == SCAN => looks += 1,
            other => panic!("an idle VM's engine makes system call {other}, with {arguments:x?}"),
        }
        woken <= TRACED
    });
    println!("{moves} moves, {looks} looks at {TRACED} wake-ups");
    assert!(moves <= MOVES_MAX * TRACED, "{moves} moves at {TRACED} wake-ups");
    assert!(looks <= moves, "{looks} looks at page tables for {moves} moves at {TRACED} wake-ups");
}

#[test]
fn a_resident_vm_that_does_nothing_costs_nothing() {
    measure("resident", "512M", "512M");
}

#[test]
fn a_vm_in_a_quarter_of_its_memory_that_does_nothing_costs_nothing() {
    measure("quarter", "512M", "128M");
}
