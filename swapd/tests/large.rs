//! A VM of 1 TiB that touches little of it.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::time::{Duration, Instant};

use common::{Vm, config, started, store_directory};
use swapd::{Engine, PAGE_SIZE, PageNo, StartError, StoreError};
use testkit::{Random, Reason, skip};

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
const BUDGET: u64 = 64 * MIB;
/// Blocks of 2 MiB that are touched, and pages of each.
const BLOCKS: u64 = 512;
const PAGES_A_BLOCK: u64 = 48;
const BLOCK_PAGES: u64 = 512;
/// It takes a few ms. One of so many starts does: a busy machine or a disk that stalls for a moment holds up single
/// ones.
const START_MAX: Duration = Duration::from_secs(3);
const STARTS: usize = 5;

/// The VM, and how long its start took. Ends the test where no engine can run.
fn start(memory: u64) -> (Vm, Duration) {
    let mut config = config(memory, BUDGET, store_directory(), false);
    config.store.overcommit = true;
    let since = Instant::now();
    (
        Vm::of(started(Engine::start(config, Box::new(|notice| println!("notice: {notice:?}"))))),
        since.elapsed(),
    )
}

/// Writes 96 MiB, in blocks `step` pages apart, then touches them at random; the latencies in ns, sorted.
fn touch(vm: &Vm, step: u64) -> Vec<u64> {
    let page = |nth: u64| PageNo(nth / PAGES_A_BLOCK * step + nth % PAGES_A_BLOCK * 4);
    let count = BLOCKS * PAGES_A_BLOCK;
    (0..count).for_each(|nth| vm.write(page(nth), nth));
    let mut random = Random(1);
    let mut latencies: Vec<_> = (0..20_000)
        .map(|_| {
            let nth = random.below(count);
            let since = Instant::now();
            vm.touch(page(nth));
            let took = since.elapsed().as_nanos() as u64;
            assert!(vm.is_right(page(nth), nth), "{:?}", page(nth));
            took
        })
        // What was resident does not count.
        .filter(|ns| *ns > 2000)
        .collect();
    latencies.sort_unstable();
    latencies
}

#[test]
fn a_tebibyte_starts_at_once_and_pages_like_a_gibibyte() {
    let (small, small_start) = start(1 << 30);
    let latencies = touch(&small, BLOCK_PAGES);
    let told = |what: &str, start: Duration, ns: &[u64]| {
        println!(
            "{what}: start {start:?}, {} misses, p50 {} us, p99 {} us",
            ns.len(),
            ns[ns.len() / 2] / 1000,
            ns[ns.len() * 99 / 100] / 1000
        );
    };
    told("1 GiB", small_start, &latencies);
    drop(small);
    let quick = (0..STARTS).map(|_| start(TIB)).find(|(_, took)| *took < START_MAX);
    let (large, start) =
        quick.unwrap_or_else(|| panic!("each of {STARTS} starts took {START_MAX:?} or more"));
    // The same blocks, spread over all of the memory.
    let latencies = touch(&large, TIB / PAGE_SIZE as u64 / BLOCKS);
    told("1 TiB", start, &latencies);
    let stats = large.stats();
    assert!(stats.frames_bytes <= BUDGET && stats.stored_bytes > 16 * MIB, "{stats:?}");
}

#[test]
fn a_store_with_too_little_room_names_the_option() {
    match Engine::start(config(64 * TIB, BUDGET, store_directory(), false), Box::new(|_| {})) {
        Err(StartError::Store(error @ StoreError::NoRoom { .. })) => {
            assert!(error.to_string().contains("--store-overcommit"), "{error}");
        }
        Err(StartError::Host(reason)) => skip(Reason::Uffd, reason),
        other => panic!("{other:?}"),
    }
}
