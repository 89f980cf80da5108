//! A QEMU VM with a file system on its disk is killed and restored again and again, while its guest writes files of
//! known content. What the guest has in its memory (its page cache, the file system's own state) and what is on the
//! disk must be of one moment each time: the guest compares both as it goes on, the host looks at the disk.
//!
//! ```text
//!   write, flush, rename, remove ──▶ checkpoint meanwhile ──▶ kill -9 ──▶ --disks-back ──▶ goes on, compares
//!                                        └─▶ the snapshot: its journal is replayed, as after a power failure;
//!                                            the file system is right, and has all that was flushed
//!   at the end: unmounted ──▶ the file system is right without a replay, and has exactly what was written
//! ```
//! `VMEMD_LONG=1` does it twenty times on each QEMU instead of twice.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod qemu;

use std::process::Command;

use common::{Host, Said, kill, wait_for};
use qemu::{BOOT, Guest, Machine, Qemu, checker, field, qemus};
use testkit::{Reason, skip};

/// The file system's, and the disk's.
const DISK: &str = "96M";
const JOBS: &str = "mkdir /files; mount -t ext4 /dev/vda /files || echo checker files failed: no mount; \
    checker memory 40M 100000 & \
    checker files /files; echo 3 > /proc/sys/vm/drop_caches; umount /files && echo unmounted";

fn times() -> usize {
    if std::env::var_os("VMEMD_LONG").is_some_and(|value| value != "0") { 20 } else { 2 }
}

/// Runs a program that is no part of this to its end; the test cannot be without it.
fn tool(program: &str, arguments: &[&str]) -> Said {
    // Where Debian has what only root is thought to need.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$@\"", program]).args(arguments).env("PATH", path);
    let said = Said::by(&mut command);
    if said.code == 127 {
        skip(Reason::Tools, format_args!("no {program} (scripts/setup --qemu)"));
    }
    said
}

fn works(program: &str, arguments: &[&str]) -> String {
    let said = tool(program, arguments);
    assert_eq!(said.code, 0, "{program} {arguments:?}: {said:?}");
    said.out
}

struct Files {
    host: Host,
    disk: String,
    archive: String,
    guest: Guest,
}

impl Files {
    fn start(qemu: &Qemu) -> Files {
        let host = Host::new("qemu-files");
        let path = |name: &str| host.root.join(name).display().to_string();
        let (raw, disk) = (path("disk.raw"), path("disk.qcow2"));
        works("truncate", &["-s", DISK, &raw]);
        works("mkfs.ext4", &["-q", "-F", &raw]);
        works("qemu-img", &["convert", "-O", "qcow2", &raw, &disk]);
        let mut command =
            host.command(&["run", "--name", "db", "--ram", "96M", "--store", &host.store(), "--"]);
        // Writes go past the host's page cache, and a guest's flush is one: no step that the guest was told of is lost.
        let drive = format!("file={disk},format=qcow2,if=virtio,id=data,cache=none");
        command.arg(&qemu.binary).args(Machine::new("160M").run(JOBS).args()).args(["-drive", &drive]);
        let guest = Guest::start(command);
        guest.wait_for("checker files step=", BOOT);
        guest.wait_for("checker memory round=1 ", BOOT);
        let archive = path("archive");
        Files { host, disk, archive, guest }
    }

    /// Every whole line of each life so far, none of which tells of anything wrong.
    fn lines(&self) -> Vec<String> {
        let lines = self.guest.console().lines_of_each();
        for line in &lines {
            let wrong = line.contains(" mismatch ")
                || line.contains(" failed: ")
                || line.contains("EXT4-fs error")
                || (line.contains(" mismatched=") && field::<u64>(line, "mismatched") != 0);
            assert!(!wrong, "{line}\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
        }
        lines
    }

    /// The numbers of steps, in the order in which they were told.
    fn steps(&self) -> Vec<u64> {
        let lines = self.lines();
        let told = lines.iter().filter(|line| line.starts_with("checker files step="));
        told.map(|line| field(line, "step")).collect()
    }

    fn goes_on(&self) {
        let said = |words: &str| self.lines().iter().filter(|line| line.starts_with(words)).count();
        for (words, more) in [("checker files step=", 8), ("checker memory round=", 2)] {
            let goal = said(words) + more;
            wait_for("the guest to go on", || (said(words) >= goal).then_some(()));
        }
    }

    /// The content of a disk, or of its snapshot, as a raw file.
    fn raw(&self, snapshot: Option<&str>, name: &str) -> String {
        let raw = self.host.root.join(name).display().to_string();
        let which = snapshot.map(|name| ["-l".to_owned(), format!("snapshot.name={name}")]);
        let words: Vec<&str> = which.iter().flatten().map(String::as_str).collect();
        let all = [&["convert", "-O", "raw"], &words[..], &[&self.disk, &raw]].concat();
        works("qemu-img", &all);
        raw
    }

    /// The files on a file system that nobody has mounted are those of a step from `first` to `last`.
    fn has(&self, raw: &str, first: u64, last: u64) {
        let clean = tool("e2fsck", &["-fn", raw]);
        assert_eq!(clean.code, 0, "{clean:?}");
        let files = self.host.root.join("tree").display().to_string();
        std::fs::create_dir(&files).expect("a directory");
        works("debugfs", &["-R", &format!("rdump / {files}"), raw]);
        let said = works(
            checker().to_str().expect("a path that is text"),
            &["tree", &files, &first.to_string(), &last.to_string()],
        );
        assert!(said.trim_end().ends_with(" mismatched=0"), "{said}");
        assert!(field::<u64>(said.lines().last().expect("a line"), "files") > 4, "{said}");
        std::fs::remove_dir_all(&files).expect("a directory");
        std::fs::remove_file(raw).expect("a file");
    }
}

/// The disk's file has no error but clusters that nobody uses: a QEMU that is killed leaves some (exit code 3).
fn is_whole(disk: &str) {
    let said = tool("qemu-img", &["check", "-q", disk]);
    assert!(matches!(said.code, 0 | 3), "{said:?}");
}

#[test]
fn a_killed_vms_files_are_those_that_its_memory_knows() {
    for qemu in qemus() {
        let mut files = Files::start(&qemu);
        let mut life = None;
        let mut pauses = Vec::new();
        let mut lost = Vec::new();
        for turn in 1..=times() {
            files.goes_on();
            // Flushed before the pause, whenever that is.
            let first = *files.steps().last().expect("steps");
            let said = files.host.vmemd(&["checkpoint", "db", "--to", &files.archive, "--json"]);
            assert_eq!(said.code, 0, "{said:?}");
            let report = said.json();
            let snapshot = report["disks"][0]["version"]["snapshot"].as_str().expect("a snapshot").to_owned();
            pauses.push(report["pause_ms"].as_f64().expect("a number"));
            files.goes_on();
            kill(life.as_ref().map_or(files.guest.pid(), common::Running::pid));
            wait_for("the last of the console", || files.guest.console().is_over().then_some(()));
            let before = files.steps();

            // As after a power failure at the moment of the checkpoint. -p replays the journal, corrects the sums of free
            // blocks and inodes, which the journal does not have, and nothing that would be wrong.
            let last = *before.last().expect("steps");
            let raw = files.raw(Some(&snapshot), "then.raw");
            let replayed = tool("e2fsck", &["-fp", &raw]);
            assert!(matches!(replayed.code, 0 | 1), "{replayed:?}");
            files.has(&raw, first, last);
            is_whole(&files.disk);

            let store = files.host.store();
            let args = ["restore", &files.archive, "--store", &store, "--ram", "80M", "--disks-back"];
            life = Some(files.host.start(&args));
            files.host.wait_state("db", "running");
            files.goes_on();
            let next = files.steps()[before.len()];
            assert!(first < next && next <= last, "step {next} after {first} to {last}");
            lost.push(last - next + 1);
            eprintln!("QEMU {}, turn {turn}: steps {first}..{next} of {last}", qemu.version);
        }
        files.guest.console().type_line("end");
        wait_for("the guest to unmount", || {
            files.lines().iter().any(|line| line == "unmounted").then_some(())
        });
        let mut life = life.expect("a life");
        wait_for("its QEMU to end", || (!common::lives(life.pid())).then_some(()));
        assert!(life.end().success(), "{}", life.log());
        let lines = files.lines();
        let done = lines.iter().rfind(|line| line.starts_with("checker files done")).expect("its last line");
        let steps = field(done, "step");
        let raw = files.raw(None, "now.raw");
        let state = works("dumpe2fs", &["-h", &raw]);
        let clean =
            state.lines().any(|line| line.starts_with("Filesystem state:") && line.ends_with(" clean"));
        assert!(clean && !state.contains("needs_recovery"), "{state}");
        files.has(&raw, steps, steps);
        is_whole(&files.disk);
        pauses.sort_by(f64::total_cmp);
        eprintln!(
            "QEMU {}: {} times; {steps} steps at the end; paused {:.0} ms, at most {:.0} ms; steps undone {lost:?}",
            qemu.version,
            times(),
            pauses[pauses.len() / 2],
            pauses[pauses.len() - 1],
        );
        files.host.assert_clean();
    }
}
