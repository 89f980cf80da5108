//! RAM for a VM's pages never exceeds its budget: sampled every 10 ms through a run, from the process's own
//! accounting. One test in a process of its own, so that nothing else is counted.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use swapd::{Engine, EngineConfig, StoreConfig};
use testkit::{OrSkip, Reason};
use vmemd::vmm::{MachineConfig, ReferenceMachine, RunState};

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 512 * MIB;
const SAMPLE_EVERY: Duration = Duration::from_millis(10);
/// The engine's tables and queues for 512 MiB, and what the test itself allocates meanwhile.
const BESIDE: u64 = 4 * MIB;

fn rss_anon_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("proc is mounted");
    let line =
        status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("the kernel counts RssAnon");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

/// The highest use above `before` until `done`, and how many samples were taken.
fn watch(before: u64, done: impl Fn() -> bool) -> (u64, u64) {
    let (mut highest, mut samples) = (0, 0);
    let mut next = Instant::now();
    while !done() {
        highest = highest.max(rss_anon_bytes().saturating_sub(before));
        samples += 1;
        next += SAMPLE_EVERY;
        // Samples are taken by the clock: this waits for nothing.
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    (highest, samples)
}

#[test]
fn ram_stays_within_the_budget_at_every_moment() {
    let before = rss_anon_bytes();
    let config = EngineConfig {
        memory_bytes: MEMORY,
        budget_bytes: 128 * MIB,
        store: StoreConfig {
            path: PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
            overcommit: false,
            encrypt: false,
        },
        origin: None,
        prealloc: false,
        lock: true,
        sampling: true,
    };
    let engine = Engine::start(config, Box::new(|_| {})).or_skip(Reason::Uffd);
    let workload = "rewrite".parse().expect("a workload");
    let config = MachineConfig { memory_bytes: MEMORY, vcpus: 2, workload };
    let mut machine = ReferenceMachine::new(config, engine.memory_base()).or_skip(Reason::Kvm);
    machine.start().expect("the machine starts");
    let deadline = Instant::now() + Duration::from_secs(120);
    for (budget, rounds) in [(128, 2), (64, 1), (256, 2)] {
        let settled = AtomicBool::new(false);
        let handle = engine.handle();
        let budget = budget * MIB;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                handle.set_budget(budget).expect("the budget is legal");
                settled.store(true, Ordering::Release);
            });
            // While it is being lowered more may be in use.
            watch(before, || settled.load(Ordering::Acquire));
        });
        let target = machine.counters().rounds + rounds;
        let (highest, samples) = watch(before, || {
            assert!(Instant::now() < deadline, "the guest makes no progress: {:?}", machine.counters());
            machine.counters().rounds >= target
        });
        println!(
            "budget {} MiB: at most {:.1} MiB beside what the process had, {samples} samples",
            budget / MIB,
            highest as f64 / MIB as f64
        );
        assert!(highest <= budget + BESIDE, "{highest} bytes in use, the budget is {budget}");
    }
    assert!(matches!(machine.state(), RunState::Running));
    assert_eq!(machine.counters().mismatched_pages, 0);
    drop(machine);
    engine.stop();
}
