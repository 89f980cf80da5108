//! The engine's memory beside the VM's frames is at most 0.35 % of the VM's memory. This is the only test of its
//! process, because it measures the memory of the whole process.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

const MEMORY: u64 = 1 << 30;
/// 0.35 %.
const BOOKS_MAX: u64 = MEMORY / 10_000 * 35;

fn rss_anon_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("proc is there");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("a line of every kernel");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number") * 1024
}

#[test]
fn a_gibibyte_touched_and_paged_costs_at_most_its_share() {
    let before = rss_anon_bytes();
    let vm = common::start(MEMORY, MEMORY / 4);
    // Twice, so that every page has been stored and many read.
    (1..=2).for_each(|round| vm.write_all(round));
    let stats = vm.stats();
    // Frames come and go meanwhile (up to the budget, and back): what stays is the engine's.
    let taken = rss_anon_bytes() - before;
    let measured = taken.saturating_sub(stats.frames_bytes);
    let percent = |bytes: u64| bytes as f64 * 100.0 / MEMORY as f64;
    println!(
        "said {} bytes ({:.3} %), measured {measured} bytes ({:.3} %)",
        stats.bookkeeping_bytes,
        percent(stats.bookkeeping_bytes),
        percent(measured)
    );
    assert!(stats.bookkeeping_bytes <= BOOKS_MAX, "{} of {BOOKS_MAX}", stats.bookkeeping_bytes);
    assert!(measured <= BOOKS_MAX, "{measured} of {BOOKS_MAX}");
}
