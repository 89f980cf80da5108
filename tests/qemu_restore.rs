//! Checkpoints of QEMU VMs with disks: memory and disks come back as they were at one moment.
//!
//! The guest writes a number to its disk, past its page cache, and keeps it in memory; before it writes the next one,
//! it compares both. So a disk of another moment is seen at its next step.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod qemu;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Host, Running, kill, wait_for};
use qemu::{BOOT, Console, Guest, Machine, Qemu, field, qemus};
use serde_json::Value;
use testkit::{Reason, skip};

const JOBS: &str = "n=0; echo 0 > /dev/vda; sync; checker memory 60M 100000 & \
    while true; do echo 3 > /proc/sys/vm/drop_caches; read was < /dev/vda; \
    test x$was = x$n || echo differ n=$n was=$was; \
    n=$((n+1)); echo $n > /dev/vda; sync; echo step n=$n; done";

fn qemu_img(arguments: &[&str]) -> String {
    let Ok(ran) = Command::new("qemu-img").args(arguments).output() else {
        skip(Reason::Qemu, "no qemu-img (scripts/setup --qemu)");
    };
    assert!(ran.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8_lossy(&ran.stdout).into_owned()
}

/// A disk's file has no error but clusters that nobody uses: a QEMU that is killed leaves some (exit code 3).
fn is_whole(disk: &str) {
    let ran = Command::new("qemu-img").args(["check", "-q", disk]).output().expect("qemu-img runs");
    assert!(matches!(ran.status.code(), Some(0 | 3)), "{}", String::from_utf8_lossy(&ran.stderr));
}

/// A VM with a disk that it writes to, on a host with an archive.
struct Saved {
    host: Host,
    disk: String,
    guest: Guest,
    archive: String,
}

impl Saved {
    fn start(test: &str, qemu: &Qemu, format: &str) -> Saved {
        let host = Host::new(test);
        let disk = host.root.join(format!("disk.{format}")).display().to_string();
        qemu_img(&["create", "-q", "-f", format, &disk, "64M"]);
        let mut command =
            host.command(&["run", "--name", "db", "--ram", "128M", "--store", &host.store(), "--"]);
        command.arg(&qemu.binary).args(line(&disk, format));
        let guest = Guest::start(command);
        guest.wait_for("step n=3", BOOT);
        guest.wait_for("checker memory round=1 ", BOOT);
        let archive = host.root.join("archive").display().to_string();
        Saved { host, disk, guest, archive }
    }

    fn checkpoint(&self) -> Value {
        let said = self.host.vmemd(&["checkpoint", "db", "--to", &self.archive, "--json"]);
        assert_eq!(said.code, 0, "{said:?}");
        let report = said.json();
        eprintln!("paused {} ms: {}; {}", report["pause_ms"], report["pause_parts"], report["disks"]);
        report
    }

    fn restore(&mut self, more: &[&str]) -> Running {
        let store = self.host.store();
        let args = [&["restore", self.archive.as_str(), "--store", &store, "--ram", "96M"], more].concat();
        self.host.start(&args)
    }

    fn refused(&self, more: &[&str], code: i32, words: &[&str]) {
        let store = self.host.store();
        let args = [&["restore", self.archive.as_str(), "--store", &store], more].concat();
        self.host.vmemd(&args).fails(code, words);
    }

    fn stop(&self, name: &str) {
        let said = self.host.vmemd(&["stop", name]);
        assert_eq!(said.code, 0, "{said:?}");
    }
}

/// QEMU's arguments, without the console.
fn line(disk: &str, format: &str) -> Vec<String> {
    let drive = ["-drive".to_owned(), format!("file={disk},format={format},if=virtio,id=data")];
    Machine::new("192M").run(JOBS).args().into_iter().chain(drive).collect()
}

/// The numbers that were written, in the order in which they were told.
fn steps(lines: &[String]) -> Vec<u64> {
    lines.iter().filter(|line| line.starts_with("step n=")).map(|line| field(line, "n")).collect()
}

/// Waits for so many more steps, and looks at all that the guest has found.
fn goes_on(lines: impl Fn() -> Vec<String>, more: usize) {
    let goal = steps(&lines()).len() + more;
    wait_for("steps of the guest", || (steps(&lines()).len() >= goal).then_some(()));
    let rounds = || lines().iter().filter(|line| line.starts_with("checker memory round=")).count();
    let goal = rounds() + 2;
    wait_for("rounds of the checker", || (rounds() >= goal).then_some(()));
    for line in lines() {
        assert!(!line.starts_with("differ"), "{line}");
        if line.contains(" mismatched=") {
            assert_eq!(field::<u64>(&line, "mismatched"), 0, "{line}");
        }
    }
}

fn rule(from: &Path, to: &Path) -> String {
    format!("[[map]]\nfrom = \"{}\"\nto = \"{}\"\n", from.display(), to.display())
}

#[test]
fn a_killed_vm_comes_back_with_the_disk_of_that_moment() {
    for qemu in qemus() {
        eprintln!("QEMU {}", qemu.version);
        let mut saved = Saved::start("qemu-checkpoint", &qemu, "qcow2");
        let report = saved.checkpoint();
        let snapshot = report["disks"][0]["version"]["snapshot"].as_str().expect("a snapshot").to_owned();
        assert_eq!(report["disks"][0]["file"], Value::from(saved.disk.clone()));
        // The VM goes on with its disk, in the file that its command line names.
        goes_on(|| saved.guest.lines(), 3);
        kill(saved.guest.pid());
        let before = steps(&saved.guest.lines());

        saved.refused(&[], 2, &["data: ", "--disk-copies DIR", "--disks-back", "--disks-as-they-are"]);
        for _ in 0..2 {
            // From the same checkpoint as often as is wanted.
            let mut running = saved.restore(&["--disks-back"]);
            saved.host.wait_state("db", "running");
            goes_on(|| saved.guest.lines(), 3);
            let after = steps(&saved.guest.lines());
            let first = after[before.len()];
            assert!(
                first < *before.last().expect("steps"),
                "it went on where it was killed: {before:?} {after:?}"
            );
            saved.stop("db");
            running.end();
        }
        assert!(qemu_img(&["snapshot", "-l", &saved.disk]).contains(&snapshot));
        is_whole(&saved.disk);
        saved.host.assert_clean();
    }
}

#[test]
fn a_second_life_beside_the_first_has_disks_of_its_own() {
    for qemu in qemus() {
        eprintln!("QEMU {}", qemu.version);
        let mut saved = Saved::start("qemu-second", &qemu, "qcow2");
        saved.checkpoint();
        goes_on(|| saved.guest.lines(), 2);
        // The first one has its disk: nothing of it is put back under its hands.
        saved.refused(&["--disks-back"], 4, &["--as"]);
        saved.refused(&["--as", "db2", "--disks-back"], 3, &["the disks are not as they were", "lock"]);
        let (copies, console) = (saved.host.root.join("copies"), saved.host.root.join("console"));
        std::fs::create_dir(&copies).expect("a directory");
        let second = Console::listen(&console);
        let args = saved.guest.console().args();
        let path = args[1].split("path=").nth(1).and_then(|rest| rest.split(',').next()).expect("a path");
        let rules = saved.host.root.join("rules");
        std::fs::write(&rules, rule(Path::new(path), &console)).expect("a file of rules");
        let (copies, rules) = (copies.display().to_string(), rules.display().to_string());
        let more = ["--as", "db2", "--disk-copies", &copies, "--qemu-rules", &rules];
        let _second_vm = saved.restore(&more);
        saved.host.wait_state("db2", "running");
        goes_on(|| second.lines(), 3);
        goes_on(|| saved.guest.lines(), 2);
        let copy = PathBuf::from(&copies).join("db2-data.qcow2").display().to_string();
        assert!(!qemu_img(&["snapshot", "-U", "-l", &copy]).contains("vmemd-"));
        let taken = ["--as", "db2", "--disk-copies", &copies, "--qemu-rules", &rules];
        saved.refused(&taken, 4, &["db2"]);
        saved.stop("db2");
        saved.stop("db");
        is_whole(&copy);
        is_whole(&saved.disk);
    }
}

#[test]
fn a_disk_that_keeps_no_version_is_left_out_only_by_its_users_will() {
    let qemu = qemus().remove(0);
    let mut saved = Saved::start("qemu-raw", &qemu, "raw");
    let args = ["checkpoint", "db", "--to", &saved.archive];
    let words = ["disk data is in ", "the format raw keeps no earlier version", "--without-disks"];
    saved.host.vmemd(&args).fails(9, &words);
    goes_on(|| saved.guest.lines(), 1);
    let said = saved.host.vmemd(&[&args[..], &["--without-disks"]].concat());
    assert_eq!(said.code, 0, "{said:?}");
    goes_on(|| saved.guest.lines(), 1);
    kill(saved.guest.pid());
    saved.refused(&["--disks-back"], 2, &["made without disks: nobody has data"]);
    saved.refused(&[], 2, &["data: "]);
    let mut running = saved.restore(&["--disks-as-they-are", "--paused"]);
    saved.host.wait_state("db", "paused");
    saved.stop("db");
    running.end();
    saved.host.assert_clean();
}

#[test]
fn a_command_line_is_taken_if_it_makes_the_same_machine() {
    let qemu = qemus().remove(0);
    let mut saved = Saved::start("qemu-other", &qemu, "qcow2");
    saved.checkpoint();
    kill(saved.guest.pid());
    let binary = qemu.binary.display().to_string();
    let other = |line: &[&str]| -> Vec<String> {
        let words = [&["--disks-back", "--", binary.as_str()], line].concat();
        words.into_iter().map(str::to_owned).collect()
    };
    let wrong = other(&["-machine", "pc", "-accel", "tcg", "-m", "128M", "-smp", "2"]);
    let words =
        ["-m is 128M, and was 192M", "-smp is 2, and was 1", "the machine is pc-i440fx", "-accel is tcg"];
    saved.refused(&wrong.iter().map(String::as_str).collect::<Vec<_>>(), 2, &words);
    // The disk is missing: told before anything is loaded, and before it is put back.
    std::fs::rename(&saved.disk, format!("{}.away", saved.disk)).expect("a disk");
    saved.refused(&["--disks-back"], 3, &["disk.qcow2 is missing here"]);
    std::fs::rename(format!("{}.away", saved.disk), &saved.disk).expect("a disk");
    saved.refused(&["--disks-back", "--json"], 2, &["vmemd stat --json"]);
    let same = [other(&[]), line(&saved.disk, "qcow2"), saved.guest.console().args().to_vec()].concat();
    let mut running = saved.restore(&same.iter().map(String::as_str).collect::<Vec<_>>());
    saved.host.wait_state("db", "running");
    goes_on(|| saved.guest.lines(), 3);
    saved.stop("db");
    running.end();
}
