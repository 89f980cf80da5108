//! Checkpoints and restores on machines whose archive is on a slow disk: one that carries 20 MB/s each way, and whose
//! flushes take half a second. A guest's pause, `stat`, and Ctrl-C do not wait for it.

#[macro_use]
extern crate testkit;

testkit::main!();

#[path = "common/checkpoints.rs"]
#[allow(dead_code, reason = "restores use more of it")]
mod checkpoints;
mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use checkpoints::{FIRST, Guest, make};
use common::limits::{Group, Limit};
use common::slow_disk::SlowDisk;
use common::{Host, Running, needs_root, needs_vms, vmemd};
use serde_json::Value;
use testkit::{OrSkip, Reason, wait_for};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 1 << 30;
const FLUSH: Duration = Duration::from_millis(500);
/// The default downtime target, and by how much the pause may miss it: as of a migration.
const MOST_MS: f64 = 50.0 + 30.0;
/// How long `stat` may take on a machine that is busy with other tests. A disk that is waited for takes far longer.
const STAT_LIMIT: Duration = Duration::from_secs(2);

/// Processes to which the disk gives so many bytes a second, each way.
fn slow_group(disk: &SlowDisk, what: &str, bytes_per_s: u64) -> Result<Group, String> {
    // Each disk has its own group: tests run side by side.
    let name = format!("vmemd-{what}-{}", disk.numbers().replace(':', "-"));
    Group::new(&name, Limit::Disk { device: &disk.numbers(), bytes_per_s })
}

/// The longest that `stat` took until it was as it should be.
fn worst_stat(host: &Host, name: &str, mut until: impl FnMut(&Value) -> bool) -> Duration {
    let mut worst = Duration::ZERO;
    wait_for("what was waited for", || {
        let began = Instant::now();
        let stat = host.stat(name)?;
        worst = worst.max(began.elapsed());
        until(&stat).then_some(())
    });
    worst
}

/// The JSON that a command has printed, over several lines, by its end.
fn report_of(command: &mut Running) -> Value {
    let mut text = String::new();
    loop {
        let line = command.first_line();
        assert!(!line.is_empty(), "no JSON: {text}");
        text += &line;
        if let Ok(report) = serde_json::from_str(&text) {
            return report;
        }
    }
}

#[test]
fn a_checkpoint_on_a_slow_disk_keeps_its_pause_and_can_be_cancelled() {
    needs_vms();
    needs_root("a slow disk");
    let mut host = Host::new("slow-save");
    let disk = SlowDisk::new(&host.root, DISK_BYTES).or_skip(Reason::Loop);
    let group = slow_group(&disk, "save", 20_000_000).or_skip(Reason::Cgroup);
    let vm = host.start_vm("web", "rewrite:working-set=24M,rate=8M");
    host.wait_rounds("web", 1);
    group.take(vm.pid());
    disk.delay_flushes(FLUSH);
    let archive = disk.mount().join("archive");
    let to = archive.to_str().expect("a path that is text");
    let save = ["checkpoint", "web", "--to", to, "--json"];
    let mut pauses = Vec::new();
    for turn in 0..3 {
        // The first one has all pages, the others what is not as it was.
        let base = if turn == 0 { "none" } else { "latest" };
        let before = host.stat("web").expect("it is there")["last_checkpoint"]["name"].clone();
        let mut saving = host.start(&[&save[..], &["--base", base]].concat());
        let worst = worst_stat(&host, "web", |stat| stat["last_checkpoint"]["name"] != before);
        saving.ends_with(0);
        let report = report_of(&mut saving);
        println!("stat took {worst:.1?} at most; {report}");
        assert!(worst < STAT_LIMIT, "stat took {worst:?}");
        pauses.push(report["pause_ms"].as_f64().expect("a time"));
    }
    println!("pauses on 20 MB/s with flushes of {FLUSH:?}: {pauses:.1?} ms");
    assert!(pauses.iter().all(|pause| *pause <= MOST_MS), "{pauses:?}");

    let mut saving = host.start(&save);
    wait_for("a checkpoint to be under way", || {
        (host.stat("web")?["checkpoint"]["bytes_written"].as_u64()? > 0).then_some(())
    });
    let began = Instant::now();
    saving.signal(libc::SIGINT);
    saving.ends_with(130);
    println!("cancelled in {:.1?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    host.wait_rounds("web", 1);
    let stat = host.stat("web").expect("it is there");
    assert_eq!(
        (&stat["state"], &stat["guest"]["mismatched_pages"]),
        (&"running".into(), &0.into()),
        "{stat}"
    );
    let verified = host.vmemd(&["checkpoint", "verify", to]);
    assert_eq!(verified.code, 0, "{verified:?}");
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
    drop(vm);
}

#[test]
fn a_vm_runs_at_once_from_an_archive_on_a_slow_disk() {
    needs_vms();
    needs_root("a slow disk");
    let guest = Guest {
        name: "web",
        workload: "rewrite:working-set=32M,rate=4M",
        memory_bytes: 64 * MIB,
        budget_bytes: 64 * MIB,
        rounds: 1,
        paused: false,
    };
    for bytes_per_s in [20_000_000, 5_000_000] {
        let mut host = Host::new("slow-restore");
        let disk = SlowDisk::new(&host.root, DISK_BYTES).or_skip(Reason::Loop);
        let archive = disk.mount().join("archive");
        make(&archive, FIRST, &guest);
        let group = slow_group(&disk, "restore", bytes_per_s).or_skip(Reason::Cgroup);
        disk.delay_flushes(FLUSH);
        let store = host.store();
        let archive = archive.to_str().expect("a path that is text");
        let args = ["restore", archive, "--store", &store, "--ram", "32M", "--rate", "2M", "--json"];
        let began = Instant::now();
        // The shell is in the group, and becomes vmemd.
        let enter = format!("echo $$ > {}/cgroup.procs; exec \"$@\"", group.path());
        let vmemd = vmemd();
        let words = [&["-c", &enter, "sh", vmemd.to_str().expect("a path that is text")], &args[..]].concat();
        let command = host.command_of(Path::new("sh"), &words);
        let mut vm = host.start_command(command);
        let told: Value = serde_json::from_str(&vm.first_line()).expect("JSON");
        let running = began.elapsed();
        println!("{bytes_per_s} bytes/s: it ran after {running:.1?}: {told}");
        assert!(running < Duration::from_secs(10), "{running:?}");
        let mut stalled = false;
        let homing = Instant::now();
        let worst = worst_stat(&host, "web", |stat| {
            stalled |= stat["state"] == "stalled";
            stat["guest"]["rounds"].as_u64() >= Some(2)
        });
        let (stat, took) = (host.stat("web").expect("it is there"), homing.elapsed());
        println!("stat took {worst:.1?} at most, a round {took:.1?}; waits {}", stat["latency_us"]["store"]);
        assert!(!stalled, "{stat}");
        assert!(worst < STAT_LIMIT, "stat took {worst:?}");
        assert_eq!(
            (&stat["guest"]["mismatched_pages"], &stat["poisoned_pages"]),
            (&0.into(), &0.into()),
            "{stat}"
        );
        assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
        vm.ends_with(0);
    }
}
