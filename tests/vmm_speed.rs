//! How fast the reference guest is: throttled (the one test here that is run by default, so that no other test's VM
//! runs beside it), and what a page, a pause, a save and a restore cost.

#[macro_use]
extern crate testkit;

testkit::main!();

mod guest;

use std::time::{Duration, Instant};

use guest::Guest;
use vmemd::vmm::RunState;

/// What a page costs: `cargo test --release --test vmm_speed -- --ignored --nocapture`, on a quiet machine.
#[test]
#[ignore = "a measurement, not a check"]
fn speed() {
    for (size, workload) in [
        ("512M", "rewrite:working-set=4M"),
        ("512M", "rewrite"),
        ("512M", "read"),
        ("512M", "random"),
        ("512M", "zipf"),
    ] {
        let mut guest = Guest::new(size, 1, workload);
        let start = Instant::now();
        guest.machine.start().unwrap();
        let filled = guest.wait("a round", |counters| counters.rounds >= 1);
        let fill = start.elapsed();
        let start = Instant::now();
        let rounds = if workload.contains("4M") { 200 } else { 4 };
        let end = guest.wait("rounds", |counters| counters.rounds > filled.rounds + rounds);
        let pages = end.verified_pages - filled.verified_pages;
        let page_us = start.elapsed().as_secs_f64() * 1e6 / pages as f64;
        println!("{workload} in {size}: {page_us:.3} us a page (fill and first round {fill:.2?})");
    }
    for vcpus in [1, 4] {
        let mut guest = Guest::new("512M", vcpus, "rewrite:working-set=64M");
        guest.machine.start().unwrap();
        guest.wait("a round", |counters| counters.rounds >= 1);
        let start = Instant::now();
        guest.machine.pause().unwrap();
        let paused = start.elapsed();
        let state = guest.machine.save().unwrap();
        let saved = start.elapsed() - paused;
        let copy = guest.copy_memory();
        let start = Instant::now();
        let restored = Guest::restored(&state, copy);
        let took = start.elapsed();
        println!(
            "{vcpus} vCPUs: pause {paused:.2?}, save {saved:.2?} ({} bytes), restore {took:.2?}",
            state.len()
        );
        assert_eq!(restored.machine.state(), RunState::Paused);
    }
}

#[test]
fn throttling_slows_the_guest() {
    let mut guest = Guest::new("32M", 2, "rewrite:working-set=4M");
    guest.machine.start().unwrap();
    guest.wait("a round", |counters| counters.rounds >= 1);
    let pages_per_s = |percent| {
        guest.machine.throttle(percent);
        let (start, before) = (Instant::now(), guest.machine.counters().verified_pages);
        // On a busy host the throttle's thread wakes late, and holds vCPUs the longer: as long as many such turns.
        let window = Duration::from_secs(2);
        let after = guest.wait("the window's end", |_| start.elapsed() >= window);
        (after.verified_pages - before) as f64 / start.elapsed().as_secs_f64()
    };
    let (free, most, free_again) = (pages_per_s(0), pages_per_s(90), pages_per_s(0));
    assert!(most < free * 0.4 && most < free_again * 0.4, "{free:.0}, {most:.0}, {free_again:.0} pages/s");
}
