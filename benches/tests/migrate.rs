//! `vmemd bench migrate`: a short run of it, one that is interrupted, and one that is killed. No time is asserted.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use common::{Bench, Host, lives, needs_root, needs_vms, signal, wait_for};
use testkit::{Reason, skip};

#[test]
fn an_interrupted_bench_leaves_nothing() {
    needs_vms();
    needs_root("a swap file");
    let mut host = Host::new("bench");
    let store = host.store();
    let args = ["migrate", "--memory", "128M", "--ram", "64M", "--targets", "swap,vmemd", "--store", &store];
    let mut bench = host.start_bench(&args);
    let pid = bench.pid();
    let site = host.root.join(format!("store/vmemd-bench-{pid}"));
    let swap_file = site.join("1-swap/swapfile").display().to_string();
    let swaps = || std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    wait_for("the swap file, or the end", || (swaps().contains(&swap_file) || !lives(pid)).then_some(()));
    if !lives(pid) {
        skip(Reason::Swap, format_args!("no swap file here: {}", bench.log()));
    }
    wait_for("the VM", || site.join("1-swap/source/bench.sock").exists().then_some(()));
    bench.signal(libc::SIGINT);
    bench.ends_with(130);
    assert!(!swaps().contains(&swap_file), "{}", swaps());
    for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/memory"] {
        let name = format!("vmemd-bench-{pid}");
        let entries = std::fs::read_dir(root).into_iter().flatten().flatten();
        let left: Vec<_> =
            entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&name)).collect();
        assert!(left.is_empty(), "{left:?}");
    }
    host.assert_clean();
}

#[test]
fn a_bench_measures_what_it_says() {
    needs_vms();
    let host = Host::new("bench-run");
    let store = host.store();
    let args = "migrate --memory 128M --ram 64M --targets vmemd,ram --repeat 1 --json --store";
    let mut args: Vec<&str> = args.split(' ').collect();
    args.push(&store);
    let said = host.bench(&args);
    assert_eq!(said.code, 0, "{said:?}");
    let list = said.json();
    for (at, target) in ["vmemd", "ram"].iter().enumerate() {
        let of = &list[at];
        assert_eq!(of["target"], *target, "{of}");
        for field in ["migration_s", "downtime_ms", "rewrite_s", "pageins_during", "pageouts_during"] {
            assert!(of[field].is_number(), "{field}: {of}\n{}", said.err);
        }
        assert_eq!(of["mismatched_pages"], 0);
    }
    host.assert_clean();
}

#[test]
fn a_bench_that_was_killed_is_cleaned_up_by_the_next() {
    needs_vms();
    let mut host = Host::new("bench-left");
    let store = host.store();
    let args = ["migrate", "--memory", "128M", "--ram", "64M", "--targets", "vmemd", "--store", &store];
    let mut bench = host.start_bench(&args);
    let site = host.root.join(format!("store/vmemd-bench-{}", bench.pid()));
    wait_for("the VM", || site.join("1-vmemd/source/bench.sock").exists().then_some(()));
    bench.signal(libc::SIGKILL);
    bench.end();
    wait_for("its processes to die with it", || host.processes().is_empty().then_some(()));
    assert!(site.exists());
    let mut next = host.start_bench(&args);
    wait_for("what was left to go", || (!site.exists()).then_some(()));
    signal(next.pid(), libc::SIGINT);
    next.ends_with(130);
    host.assert_clean();
}
