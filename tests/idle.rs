//! What an idle VM costs: the processor time of its process, by thread; beside that of a thread that does next to nothing as often.

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::{DEADLINE, Host, cannot_run_vms, skipped};

/// How long is measured.
const WINDOW: Duration = Duration::from_secs(12);
/// An idle VM's share of a core: 0.1 %.
const SHARE_MAX: f64 = 0.001;
/// In a row, in which the control takes that much, too: what is measured then is the host.
const DEAR_WINDOWS: u32 = 3;
/// About as often an idle VM's process wakes up: its engine every 1.6 s, its main thread every 2 s.
const CONTROL_EVERY: Duration = Duration::from_millis(850);
/// What a wake-up reads: code, stacks and tables of a few hundred KiB.
const CONTROL_BYTES: usize = 256 << 10;

/// Nanoseconds that each thread of a process has run.
fn ran_ns(pid: u32) -> BTreeMap<String, u64> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the process lives");
    tasks
        .filter_map(|task| {
            let path = task.ok()?.path();
            let name = std::fs::read_to_string(path.join("comm")).ok()?;
            let ran = std::fs::read_to_string(path.join("schedstat")).ok()?;
            Some((name.trim().to_owned(), ran.split(' ').next()?.parse::<u64>().ok()?))
        })
        .collect()
}

/// The share of a core that a thread takes over the window which wakes up as often as an idle VM does, and only looks at some memory.
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

/// The share of a core over the window, and the threads' parts of it.
fn share(pid: u32) -> (f64, String) {
    let (since, before) = (Instant::now(), ran_ns(pid));
    // Time itself is what is measured here.
    std::thread::sleep(WINDOW);
    let (after, window) = (ran_ns(pid), since.elapsed().as_nanos() as f64);
    let parts: Vec<_> = after
        .iter()
        .map(|(name, ran)| (name, (ran.saturating_sub(*before.get(name).unwrap_or(&0))) as f64 / window))
        .collect();
    let words: Vec<_> = parts.iter().map(|(name, share)| format!("{name} {:.4} %", share * 100.0)).collect();
    (parts.iter().map(|(_, share)| share).sum(), words.join(", "))
}

fn measure(name: &str, memory: &str, ram: &str) {
    if cannot_run_vms() {
        return;
    }
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
    // The sampler takes one pass to see that nothing is in use; a host with others on it may take longer to fall silent.
    let deadline = Instant::now() + DEADLINE;
    let mut dear = 0;
    loop {
        let control = std::thread::spawn(control);
        let (share, words) = share(vm.pid());
        let control = control.join().expect("the control");
        println!(
            "{memory} in {ram}: {:.4} % of a core ({words}); control {:.4} %",
            share * 100.0,
            control * 100.0
        );
        if share < SHARE_MAX {
            return;
        }
        dear = if control >= SHARE_MAX { dear + 1 } else { 0 };
        if dear == DEAR_WINDOWS || (Instant::now() >= deadline && control >= SHARE_MAX) {
            // Nothing that wakes up at all can keep to it here.
            return skipped(&"a thread that only wakes up takes more here than an idle VM may");
        }
        assert!(
            Instant::now() < deadline,
            "{memory} in {ram}, idle: {:.4} % of a core: {words}",
            share * 100.0
        );
    }
}

#[test]
fn a_resident_vm_that_does_nothing_costs_nothing() {
    measure("resident", "512M", "512M");
}

#[test]
fn a_vm_in_a_quarter_of_its_memory_that_does_nothing_costs_nothing() {
    measure("quarter", "512M", "128M");
}
