//! Stores that fail in earnest, on the real kernel, under VMs that check their memory: file systems that fill up,
//! devices that give errors or hardly answer, memory that is short. Nothing is lost but what the device has lost; the
//! VM stands still when it must, says why, and goes on by itself.
//!
//! `VMEMD_LONG=1` makes each fault come and go ten times instead of once.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod qemu;

use std::time::{Duration, Instant};

use common::disk::Disk;
use common::limits::{Group, Limit};
use common::slow_disk::SlowDisk;
use common::{Host, Running, needs_root, needs_vms, wait_for};
use qemu::{BOOT, Guest, Machine, Qemu, field};
use serde_json::Value;
use testkit::{OrSkip, Reason};

const MIB: u64 = 1 << 20;
/// A question that the process can answer by itself is answered in this time, however slow the device is.
const PROMPTLY: Duration = Duration::from_secs(2);
/// One of so many tries must be prompt. Others may keep the machine busy for a moment, but an answer that waits for
/// the device is late each time.
const TRIES: usize = 5;
const PAGE: u64 = 4096;

fn times() -> u32 {
    if std::env::var_os("VMEMD_LONG").is_some() { 10 } else { 1 }
}

fn needs_disks() {
    needs_vms();
    needs_root("a loop device");
}

/// A file system of 256M. Ends the test where that cannot be.
fn file_system(host: &Host) -> Disk {
    Disk::ext4(&host.root, 256 * MIB).or_skip(Reason::Loop)
}

/// A VM of 128M in 32M.
fn run(host: &mut Host, store: &str, guest: &str) -> Running {
    let args = "run --name web --memory 128M --ram 32M --store-overcommit --guest";
    let mut args: Vec<&str> = args.split(' ').collect();
    args.extend([guest, "--store", store]);
    host.start(&args)
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Calls `work` until one call is done within the limit, and returns what that one gave.
fn promptly<T>(what: &str, limit: Duration, mut work: impl FnMut() -> T) -> T {
    let mut fastest = Duration::MAX;
    for _ in 0..TRIES {
        let asked = Instant::now();
        let done = work();
        fastest = fastest.min(asked.elapsed());
        if fastest < limit {
            return done;
        }
    }
    panic!("{what} took {fastest:?} at least");
}

/// Asks for the VM's `stat`, which must come promptly, and returns the reason in it.
fn reason(host: &Host, name: &str) -> String {
    let stat = promptly("`stat`", PROMPTLY, || host.stat(name).expect("its stat"));
    stat["reason"].as_str().unwrap_or_default().to_owned()
}

/// The VM is really paused, and not just waiting for pages: its guest reports nothing new while time passes.
fn assert_still(host: &Host, name: &str) {
    let before = host.stat(name).expect("its stat");
    let log = |stat: &Value| (number(&stat["uptime_ms"]), stat["guest"].clone());
    let (then, guest) = log(&before);
    let (_, later) = log(&host.wait_stat(name, "time", |stat| number(&stat["uptime_ms"]) > then + 300));
    assert_eq!(guest, later, "a VM that stands still has done something");
}

#[test]
fn a_vm_on_a_full_disk_is_paused_and_goes_on_by_itself() {
    needs_disks();
    let mut host = Host::new("full");
    let disk = file_system(&host);
    disk.leave_free(40 * MIB);
    let mut vm = run(&mut host, &disk.store(), "rewrite");
    for time in 0..times() {
        let stat = host.wait_state("web", "stalled");
        assert!(number(&stat["frames_bytes"]) <= 32 * MIB, "{stat}");
        let why = reason(&host, "web");
        assert!(why.contains("the store is full: No space left"), "{why}");
        common::wait_said("the VM is paused", || vm.log());
        assert_still(&host, "web");
        host.vmemd(&["resume", "web"]).fails(5, &["No space left", "by itself"]);
        // Less is refused for now, more lets it go on, for all of its memory fits then.
        host.vmemd(&["set", "web", "--ram", "16M"]).fails(5, &["No space left"]);
        assert_eq!(host.vmemd(&["set", "web", "--ram", "128M"]).code, 0);
        host.wait_state("web", "running");
        host.wait_rounds("web", 1);
        disk.drop_ballast();
        let stat = host.wait_stat("web", "a store that works", |stat| stat["store"]["failed"].is_null());
        assert!(number(&stat["store"]["write_errors"]) > 0, "{stat}");
        assert_eq!(host.vmemd(&["set", "web", "--ram", "32M"]).code, 0);
        host.wait_rounds("web", 1);
        if time + 1 < times() {
            // The file has all of its blocks by now: only a new one can run out of them.
            assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
            vm.ends_with(0);
            disk.leave_free(40 * MIB);
            vm = run(&mut host, &disk.store(), "rewrite");
        }
    }
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
    vm.ends_with(0);
}

/// A full disk gets room again, and that alone lets the VM go on.
#[test]
fn a_disk_that_gets_room_is_enough() {
    needs_disks();
    let mut host = Host::new("room");
    let disk = file_system(&host);
    disk.leave_free(40 * MIB);
    let mut vm = run(&mut host, &disk.store(), "zipf");
    host.wait_state("web", "stalled");
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
    vm.ends_with(0);
    disk.drop_ballast();
    for _ in 0..times() {
        disk.leave_free(40 * MIB);
        let mut vm = run(&mut host, &disk.store(), "zipf");
        host.wait_state("web", "stalled");
        // Paused by its user as well, it stays so when the disk has room.
        assert_eq!(host.vmemd(&["pause", "web"]).code, 0);
        disk.drop_ballast();
        host.wait_state("web", "paused");
        assert_still(&host, "web");
        assert_eq!(host.vmemd(&["resume", "web"]).code, 0);
        host.wait_rounds("web", 1);
        assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
        vm.ends_with(0);
    }
}

#[test]
fn a_vm_on_a_full_disk_can_be_moved_away() {
    needs_disks();
    let mut host = Host::new("rescue");
    let disk = file_system(&host);
    let (_daemon, address) = host.start_daemon("127.0.0.1:0", "256M", &[]);
    for _ in 0..times() {
        disk.leave_free(40 * MIB);
        let mut vm = run(&mut host, &disk.store(), "rewrite");
        host.wait_state("web", "stalled");
        // To nowhere first: it stays as it is.
        let failed = host.vmemd(&["migrate", "web", "--to", "127.0.0.1:1"]);
        failed.fails(6, &["stalled"]);
        host.wait_state("web", "stalled");
        // More streams than there are frames for all of them at once.
        let args = "migrate web --ram 16M --streams 8 --json --to";
        let said = host.vmemd(&args.split(' ').chain([&*address]).collect::<Vec<_>>());
        assert_eq!(said.code, 0, "{said:?}");
        vm.ends_with(10);
        // It stood still for its store alone: there it runs.
        host.wait_state("web", "running");
        host.wait_rounds("web", 2);
        assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
        wait_for("its end", || host.stat("web").is_none().then_some(()));
        disk.drop_ballast();
    }
}

/// Writes into a part of the disk fail with EIO, until it is mended.
#[test]
fn a_disk_that_cannot_be_written_loses_nothing() {
    needs_disks();
    let mut host = Host::new("write-errors");
    let disk = file_system(&host);
    for _ in 0..times() {
        // What the VM's store gets of the disk begins before the cut and goes on behind it.
        disk.leave_free(130 * MIB);
        disk.cut(170 * MIB);
        let mut vm = run(&mut host, &disk.store(), "rewrite");
        host.wait_state("web", "stalled");
        let why = reason(&host, "web");
        assert!(why.contains("cannot be written: Input/output error"), "{why}");
        assert_still(&host, "web");
        disk.mend(256 * MIB);
        host.wait_state("web", "running");
        host.wait_rounds("web", 2);
        let stat = host.stat("web").expect("its stat");
        assert_eq!((number(&stat["poisoned_pages"]), &stat["lost"]), (0, &serde_json::json!([])));
        assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
        vm.ends_with(0);
        disk.drop_ballast();
    }
}

/// Half of the device loses what was written to it. A VM that does not touch the lost pages goes on, here and after a
/// move, which reports exactly these pages as lost. A VM that touches one sees a memory error.
#[test]
fn bad_sectors_cost_what_was_on_them_and_no_more() {
    const BAD: u64 = 96 * MIB;
    needs_disks();
    let mut host = Host::new("bad-sectors");
    let disk = Disk::bare(&host.root, 128 * MIB).or_skip(Reason::Loop);
    let (_daemon, address) = host.start_daemon("127.0.0.1:0", "256M", &[]);
    for _ in 0..times() {
        let mut vm = run(&mut host, &disk.store(), "rewrite:working-set=64M,fill=all");
        host.wait_rounds("web", 2);
        // A write behind its end would make the image as long again, with zeros in it.
        assert_eq!(host.vmemd(&["pause", "web"]).code, 0);
        assert_still(&host, "web");
        disk.lose_behind(BAD);
        let said = host.vmemd(&["migrate", "web", "--to", &address, "--ram", "32M", "--json"]);
        assert_eq!(said.code, 0, "{said:?}");
        vm.ends_with(10);
        assert!(vm.log().contains("Input/output error"), "no real EIO: {}", vm.log());
        assert_eq!(host.vmemd(&["resume", "web"]).code, 0);
        host.wait_rounds("web", 2);
        let stat = host.stat("web").expect("its stat");
        let lost = stat["lost"].as_array().expect("a list");
        let pages = lost.iter().map(|run| number(&run["pages"])).sum::<u64>();
        assert!(pages > 0 && pages == number(&stat["poisoned_pages"]), "{stat}");
        assert_eq!(number(&said.json()["pages_lost"]), pages, "{said:?}");
        let first = lost.iter().map(|run| number(&run["first"])).min();
        assert!(first >= Some(BAD / PAGE), "a page that was not on bad sectors is lost: {stat}");
        assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
        wait_for("its end", || host.stat("web").is_none().then_some(()));
    }
    let mut vm = run(&mut host, &disk.store(), "rewrite");
    host.wait_rounds("web", 1);
    disk.lose_behind(BAD);
    let stat = host.wait_state("web", "failed");
    let lost = &stat["lost"][0];
    assert!(number(&lost["first"]) >= BAD / PAGE, "{stat}");
    let page = format!("page {} ", lost["first"]);
    assert!(reason(&host, "web").contains(&page), "{stat}");
    assert!(host.vmemd(&["stat", "web"]).out.contains("lost"));
    assert_eq!(stat["guest"]["mismatched_pages"], 0, "{stat}");
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
    vm.ends_with(7);
}

/// A disk that answers nothing, or nothing but errors, says nothing about the pages that it has: the VM is paused,
/// goes on by itself, and cannot be moved away meanwhile, for these pages would be lost on the way.
#[test]
fn a_vm_whose_disk_is_away_waits_for_it_and_stays() {
    needs_disks();
    let mut host = Host::new("away");
    let disk = SlowDisk::bare(&host.root, 128 * MIB).or_skip(Reason::Loop);
    let (_daemon, address) = host.start_daemon("127.0.0.1:0", "256M", &[]);
    let device = disk.device().display().to_string();
    let mut vm = run(&mut host, &device, "rewrite");
    for _ in 0..times() {
        host.wait_rounds("web", 1);
        disk.fall_silent();
        host.wait_state("web", "stalled");
        let why = reason(&host, "web");
        assert!(why.contains("cannot be reached") && why.contains("nothing is lost"), "{why}");
        disk.come_back();
        host.wait_state("web", "running");
        host.wait_rounds("web", 1);
        disk.fail(libc::EIO);
        host.wait_state("web", "stalled");
        let moved = host.vmemd(&["migrate", "web", "--to", &address]);
        assert!(moved.code != 0 && moved.err.contains("the store cannot be read"), "{moved:?}");
        disk.come_back();
        host.wait_state("web", "running");
        host.wait_rounds("web", 1);
        let stat = host.stat("web").expect("its stat");
        assert_eq!((number(&stat["poisoned_pages"]), &stat["lost"]), (0, &serde_json::json!([])), "{stat}");
        assert_eq!(stat["store"]["state"], "working", "{stat}");
    }
    let said = host.vmemd(&["migrate", "web", "--to", &address, "--ram", "32M", "--json"]);
    assert_eq!((said.code, number(&said.json()["pages_lost"])), (0, 0), "{said:?}");
    vm.ends_with(10);
    host.wait_rounds("web", 1);
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
    wait_for("its end", || host.stat("web").is_none().then_some(()));
}

/// The disk carries 4 MiB a second, each way.
#[test]
fn a_slow_disk_makes_a_slow_vm_and_nothing_worse() {
    needs_disks();
    let mut host = Host::new("slow");
    let disk = file_system(&host);
    let limit = Limit::Disk { device: &disk.numbers(), bytes_per_s: 4 * MIB };
    let group = Group::new("vmemd-slow", limit).or_skip(Reason::Cgroup);
    let (_daemon, address) = host.start_daemon("127.0.0.1:0", "256M", &[]);
    let mut vm = run(&mut host, &disk.store(), "rewrite:working-set=40M,fill=working-set");
    host.wait_rounds("web", 1);
    group.take(vm.pid());
    for _ in 0..times() {
        let before = host.stat("web").expect("its stat");
        let verified = |stat: &Value| number(&stat["guest"]["verified_pages"]);
        let began = Instant::now();
        let goal = verified(&before) + 2000;
        while verified(&host.stat("web").expect("its stat")) < goal {
            reason(&host, "web");
        }
        let stat = host.stat("web").expect("its stat");
        let moved =
            |stat: &Value| number(&stat["store"]["pages_read"]) + number(&stat["store"]["pages_written"]);
        let rate = (moved(&stat) - moved(&before)) as f64 * PAGE as f64 / began.elapsed().as_secs_f64();
        assert!(rate < 16.0 * MIB as f64, "the disk is not slow: {rate} bytes/s");
        // Another size each time: a budget that is set already would be no work.
        let mut sizes = ["48M", "40M", "44M", "52M", "56M"].into_iter().cycle();
        promptly("set, pause and resume", 3 * PROMPTLY, || {
            let size = sizes.next().expect("a cycle has no end");
            assert_eq!(host.vmemd(&["set", "web", "--ram", size]).code, 0);
            assert_eq!(host.vmemd(&["pause", "web"]).code, 0);
            assert_eq!(host.vmemd(&["resume", "web"]).code, 0);
        });
        assert_eq!(host.vmemd(&["set", "web", "--ram", "32M"]).code, 0);
    }
    let said = host.vmemd(&["migrate", "web", "--to", &address, "--ram", "32M", "--json"]);
    assert_eq!(said.code, 0, "{said:?}");
    vm.ends_with(10);
    host.wait_rounds("web", 1);
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
    wait_for("its end", || host.stat("web").is_none().then_some(()));
    drop(group);
}

/// The VM shares a memory limit with somebody who fills the page cache, its RAM locked or not.
#[test]
fn a_vm_in_short_memory_is_right() {
    needs_disks();
    let mut host = Host::new("pressure");
    let group = Group::new("vmemd-pressure", Limit::Memory(96 * MIB)).or_skip(Reason::Cgroup);
    for lock in [true, false] {
        let store = host.store();
        let args = "run --name web --memory 128M --ram 48M --guest rewrite --store";
        let mut args: Vec<&str> = args.split(' ').collect();
        args.push(&store);
        args.extend((!lock).then_some("--no-lock"));
        let mut vm = host.start(&args);
        group.take(vm.pid());
        host.wait_state("web", "running");
        let hog = host.root.join("hog");
        for _ in 0..times() {
            let before = group.pressure();
            let command = format!(
                "echo $$ > {}/cgroup.procs; exec dd if=/dev/zero of={} bs=1M count=192 status=none",
                group.path(),
                hog.display()
            );
            let mut dd = std::process::Command::new("sh").args(["-c", &command]).spawn().expect("a shell");
            host.wait_rounds("web", 2);
            assert!(dd.wait().expect("dd").success());
            assert!(group.pressure() > before, "memory was not short");
        }
        host.wait_rounds("web", 1);
        assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
        vm.ends_with(0);
    }
}

/// An emulated processor (TCG) stops only after the access that it is at. On a full disk it gets the few frames that
/// it needs for that, so its QEMU can be paused, resumed and moved.
#[test]
fn a_qemu_on_a_full_disk_is_paused_goes_on_and_moves() {
    needs_disks();
    let qemus = Qemu::versions();
    let qemu = &qemus[0];
    let mut host = Host::new("qemu-full");
    let disk = file_system(&host);
    let rules = host.root.join("rules.toml").display().to_string();
    std::fs::write(&rules, "").expect("a file of rules");
    let (_daemon, address) = host.start_daemon("127.0.0.1:0", "256M", &["--qemu-rules", &rules]);
    for _ in 0..times() {
        disk.leave_free(30 * MIB);
        let machine = Machine::new("384M").cpus(2).run("checker memory 250M 100000");
        let store = disk.store();
        let args = ["run", "--name", "vm", "--ram", "64M", "--store-overcommit", "--store", &store, "--"];
        let mut command = host.command(&args);
        command.arg(&qemu.binary).args(machine.args());
        let mut guest = Guest::start(command);
        // What is given is used up soon, and it stands still again.
        for _ in 0..3 {
            let stat = host.wait_state("vm", "stalled");
            assert!(reason(&host, "vm").contains("No space left"), "{stat}");
            assert!(!guest.log().contains("while pausing"), "it hung: {}", guest.log());
            let written = number(&stat["evict"]["written"]);
            disk.give(20 * MIB);
            host.wait_stat("vm", "what it writes", |stat| number(&stat["evict"]["written"]) > written + 2560);
        }
        host.wait_state("vm", "stalled");
        let said = host.vmemd(&["migrate", "vm", "--to", &address, "--ram", "128M", "--json"]);
        assert_eq!(said.code, 0, "{said:?}");
        let end = guest.wait_end(BOOT);
        assert_eq!(end.code(), Some(10), "{end}: {}", guest.log());
        host.wait_state("vm", "running");
        let rounds = || guest.lines().into_iter().filter(|line| line.starts_with("checker memory round="));
        wait_for("two rounds of the guest's checker", || (rounds().count() >= 2).then_some(()));
        assert!(rounds().all(|line| field::<u64>(&line, "mismatched") == 0), "{:?}", guest.lines());
        assert_eq!(host.vmemd(&["stop", "vm"]).code, 0);
        wait_for("its end", || host.stat("vm").is_none().then_some(()));
        disk.drop_ballast();
    }
}
