//! The downtime does not depend on the disk. The stores and run directories of both sides are on a disk whose flushes
//! take 50 or 500 ms while another writer is at work on it, or on one that carries 100 MB/s.
//!
//! `VMEMD_LONG=1` moves the VM twenty times in each setting instead of three.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use common::limits::{Group, Limit};
use common::slow_disk::SlowDisk;
use common::{Host, needs_root, needs_vms};
use serde_json::Value;
use testkit::{OrSkip, Reason, skip};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 1 << 30;
/// The default downtime target, and 30 ms by which it may be missed.
const MOST_MS: f64 = 50.0 + 30.0;
/// A guest that writes in all of its working set; half of its memory does not fit in the RAM that it gets.
const GUEST: &str = "rewrite:working-set=40M,rate=100M";
/// A guest whose working set does not fit in its RAM: there are always pages on their way to the disk and from it,
/// also when it is stopped.
const PAGING_GUEST: &str = "rewrite:working-set=96M,rate=20M";

fn is_long() -> bool {
    std::env::var_os("VMEMD_LONG").is_some_and(|value| value != "0")
}

fn moves() -> usize {
    if is_long() { 20 } else { 3 }
}

/// A thread that writes to the disk and flushes it until this is dropped.
struct Load {
    stop: Arc<AtomicBool>,
    writer: Option<JoinHandle<()>>,
}

impl Load {
    fn on(directory: &Path) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let (told, path) = (stop.clone(), directory.join("load"));
        let writer = std::thread::spawn(move || {
            let file = File::create(path).expect("a file");
            let block = vec![0xA5; MIB as usize];
            for round in 0.. {
                if told.load(Ordering::SeqCst) {
                    return;
                }
                file.write_all_at(&block, round % 64 * MIB).expect("room on the disk");
                if round % 8 == 7 {
                    file.sync_all().expect("a flush");
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        Load { stop, writer: Some(writer) }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let ended = self.writer.take().expect("once").join();
        assert!(ended.is_ok() || std::thread::panicking(), "the load failed");
    }
}

/// A host whose store and run directory are on that disk.
fn host_on(disk: &SlowDisk) -> Host {
    let mut host = Host::new("downtime");
    host.root = disk.mount().join("host");
    std::fs::create_dir_all(host.root.join("store")).expect("a directory on the disk");
    host
}

/// Moves a VM to and fro between two daemons. Returns the reports.
fn move_about(host: &mut Host, group: Option<&Group>, guest: &str) -> Vec<Value> {
    let daemons: Vec<_> = (0..2).map(|_| host.start_daemon("127.0.0.1:0", "64M", &[])).collect();
    let mut run = host.start_vm("web", guest);
    if let Some(group) = group {
        daemons.iter().for_each(|(daemon, _)| group.take(daemon.pid()));
        group.take(run.pid());
    }
    host.wait_rounds("web", 1);
    let mut reports = Vec::new();
    for number in 0..moves() {
        let said = host.vmemd(&["migrate", "web", "--to", &daemons[number % 2].1, "--json"]);
        assert_eq!(said.code, 0, "{said:?}");
        reports.push(said.json());
        if number == 0 {
            run.ends_with(10);
        }
        host.wait_rounds("web", 1);
    }
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
    reports
}

fn check(what: &str, reports: &[Value]) {
    let mut all: Vec<f64> =
        reports.iter().map(|report| report["downtime_ms"].as_f64().expect("a number")).collect();
    all.sort_by(f64::total_cmp);
    let (median, worst) = (all[all.len() / 2], all[all.len() - 1]);
    let _ = writeln!(
        std::io::stderr(),
        "{what}: {} moves, downtime {median:.1} ms (median), {worst:.1} ms (worst)",
        all.len()
    );
    for report in reports {
        let downtime = report["downtime_ms"].as_f64().expect("a number");
        assert!(downtime <= MOST_MS, "{what}: {report}");
        let parts = report["downtime_parts"].as_object().expect("parts");
        let sum: f64 = parts.values().map(|part| part.as_f64().expect("a number")).sum();
        assert!((sum - downtime).abs() <= 2.0, "{what}: the parts are {sum} ms: {report}");
        assert_eq!(report["downtime_missed"].is_string(), downtime > 50.0, "{report}");
    }
}

fn with_flushes_of(delay: Duration) {
    needs_vms();
    needs_root("a slow disk");
    let place = Host::new("slow-disk");
    let disk = SlowDisk::new(&place.root, DISK_BYTES).or_skip(Reason::Loop);
    disk.delay_flushes(delay);
    let load = Load::on(&disk.mount());
    let mut host = host_on(&disk);
    let before = disk.flushes();
    let reports = move_about(&mut host, None, GUEST);
    assert!(disk.flushes() >= before + reports.len() as u64, "the disk was flushed too seldom to be slow");
    drop(load);
    drop(host);
    check(&format!("flushes of {} ms", delay.as_millis()), &reports);
}

#[test]
fn flushes_of_50_ms_are_not_waited_for() {
    with_flushes_of(Duration::from_millis(50));
}

#[test]
fn flushes_of_500_ms_are_not_waited_for() {
    with_flushes_of(Duration::from_millis(500));
}

fn with_100_mb_a_second(what: &str, guest: &str) {
    needs_vms();
    needs_root("a slow disk");
    let place = Host::new("slow-disk");
    let disk = SlowDisk::new(&place.root, DISK_BYTES).or_skip(Reason::Loop);
    let group = slow_group(&disk).or_skip(Reason::Cgroup);
    let mut host = host_on(&disk);
    let reports = move_about(&mut host, Some(&group), guest);
    drop(host);
    check(what, &reports);
}

/// Processes to which the disk gives 100 MB/s.
fn slow_group(disk: &SlowDisk) -> Result<Group, String> {
    // Each disk has its own group: tests run side by side.
    let name = format!("vmemd-downtime-{}", disk.numbers().replace(':', "-"));
    Group::new(&name, Limit::Disk { device: &disk.numbers(), bytes_per_s: 100 * 1000 * 1000 })
}

#[test]
fn a_disk_of_100_mb_a_second_is_not_waited_for() {
    with_100_mb_a_second("100 MB/s", GUEST);
}

#[test]
fn pages_on_their_way_to_the_sources_disk_are_not_waited_for() {
    with_100_mb_a_second("100 MB/s, a source that pages", PAGING_GUEST);
}

#[test]
fn a_vm_that_would_stand_still_for_too_long_stays() {
    needs_vms();
    let mut host = Host::new("max-downtime");
    let (_daemon, address) = host.start_daemon("127.0.0.1:0", "128M", &[]);
    let run = host.start_vm("web", "rewrite:working-set=100M");
    host.wait_rounds("web", 1);
    // It writes as fast as it can, is not held back, and there is no time for another round.
    let fast = ["migrate", "web", "--to", &address, "--no-throttle", "--max-rounds", "1"];
    let said = host.vmemd(&[&fast[..], &["--max-downtime", "2ms"]].concat());
    said.fails(12, &["--max-downtime allows 2 ms", "MB/s", "runs on here"]);
    assert_eq!(host.wait_state("web", "running")["pid"], run.pid());
    host.wait_rounds("web", 1);
    common::wait_for("the name to be back", || (host.sockets() == ["web.sock"]).then_some(()));
    // Without a limit it is stopped all the same, and told why that took so long.
    let said = host.vmemd(&[&fast[..], &["--downtime-target", "2ms", "--json"]].concat());
    assert_eq!(said.code, 0, "{said:?}");
    let report = said.json();
    let why = report["downtime_missed"].as_str().expect("a reason");
    assert!(
        why.contains("--max-rounds") && why.contains("--no-throttle") && why.contains("MB/s"),
        "{report}"
    );
    assert_eq!(report["downtime_target_ms"], 2.0);
    host.wait_rounds("web", 1);
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
}

/// `scripts/demo` on such a disk, some times in a row; `scripts/demo --site` on one's own does the same.
#[test]
fn the_demo_keeps_its_promise_on_a_slow_disk() {
    let times = match std::env::var("VMEMD_SLOW_DEMO").ok().and_then(|value| value.parse().ok()) {
        Some(times) => times,
        None if is_long() => 10,
        None => skip(Reason::Long, "ten demos take some minutes: VMEMD_LONG=1, or VMEMD_SLOW_DEMO=2 for two"),
    };
    needs_vms();
    needs_root("a slow disk");
    let place = Host::new("slow-demo");
    let disk = SlowDisk::new(&place.root, 4 * DISK_BYTES).or_skip(Reason::Loop);
    disk.delay_flushes(Duration::from_millis(50));
    let group = slow_group(&disk).or_skip(Reason::Cgroup);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/demo");
    let (mut downtimes, mut shares) = (Vec::new(), Vec::new());
    for _ in 0..times {
        let figures = place.root.join("figures");
        // The shell enters the group before it becomes the demo, so that all of it is in there.
        let entered = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", group.path());
        let mut demo = std::process::Command::new("sh");
        demo.args(["-c", &entered, "sh", script, "--json"]).arg(&figures).arg("--site").arg(disk.mount());
        let said = demo.output().expect("sh runs");
        let _ = std::io::stderr().write_all(&[&said.stdout[..], &said.stderr].concat());
        assert_eq!(said.status.code(), Some(0), "the demo has failed");
        let text = std::fs::read_to_string(&figures).expect("the demo's figures");
        let figures: Value = serde_json::from_str(&text).expect("figures");
        let placement = &figures["migrate"]["placement"];
        let count = |name: &str| placement[name].as_f64().expect("a number");
        shares.push(100.0 * count("touched_in_ram") / count("touched_pages"));
        downtimes.push(figures["migrate"]["downtime_ms"].as_f64().expect("a number"));
        let written = figures["disk"]["write_mb_per_s"].as_f64().expect("a number");
        assert!((50.0..150.0).contains(&written), "the disk writes {written} MB/s");
    }
    downtimes.sort_by(f64::total_cmp);
    shares.sort_by(f64::total_cmp);
    let _ = writeln!(
        std::io::stderr(),
        "{times} demos at 100 MB/s, flushes of 50 ms: downtime {:.1} ms (median), {:.1} ms (worst); hot pages in RAM \
         {:.1} % (median), {:.1} % (worst)",
        downtimes[times / 2],
        downtimes[times - 1],
        shares[times / 2],
        shares[0]
    );
}
