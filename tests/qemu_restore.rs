//! Checkpoints of QEMU VMs with disks: memory and disks come back as they were at one moment.
//!
//! The guest writes a number to its disk, past its page cache, and keeps it in memory; before it writes the next one,
//! it compares both. So a disk of another moment is seen at its next step.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod qemu;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Host, Running, kill, wait_for};
use qemu::{BOOT, Console, Guest, Machine, Qemu, field, qemus};
use serde_json::Value;
use testkit::{Reason, skip};
use vmprocess::control::client::VmClient;
use vmprocess::control::protocol::CheckpointRequest;
use vmprocess::control::rundir::RunDir;

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

    /// Every whole line of each life so far.
    fn lines(&self) -> Vec<String> {
        self.guest.console().lines_of_each()
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
        goes_on(|| saved.lines(), 3);
        kill(saved.guest.pid());
        wait_for("the last of the console", || saved.guest.console().is_over().then_some(()));
        let before = steps(&saved.lines());

        saved.refused(&[], 2, &["data: ", "--disk-copies DIR", "--disks-back", "--disks-as-they-are"]);
        for _ in 0..2 {
            // From the same checkpoint as often as is wanted.
            let mut running = saved.restore(&["--disks-back"]);
            saved.host.wait_state("db", "running");
            goes_on(|| saved.lines(), 3);
            let after = steps(&saved.lines());
            let first = after[before.len()];
            assert!(
                first < *before.last().expect("steps"),
                "it went on where it was killed: {before:?} {after:?}"
            );
            saved.stop("db");
            running.end();
        }
        let snapshots = qemu_img(&["snapshot", "-l", &saved.disk]);
        assert!(snapshots.contains(&snapshot), "{snapshots}");
        // What was there before it was put back, each time.
        assert_eq!(snapshots.matches("vmemd-before-").count(), 2, "{snapshots}");
        let shown = saved.host.vmemd(&["checkpoint", "show", &saved.archive]);
        assert!(shown.out.contains(&format!("data: snapshot {snapshot} in {}", saved.disk)), "{shown:?}");
        let verified = saved.host.vmemd(&["checkpoint", "verify", &saved.archive]);
        assert!(verified.code == 0 && verified.err.contains("of the disks' content nothing"), "{verified:?}");
        is_whole(&saved.disk);
        saved.host.assert_clean();
    }
}

/// Flips a bit of a file.
fn damage(file: &Path) {
    let mut bytes = std::fs::read(file).expect("a file");
    bytes[7] ^= 4;
    std::fs::write(file, bytes).expect("a file");
}

#[test]
fn a_disk_is_put_back_only_for_a_checkpoint_that_is_whole() {
    let qemu = qemus().remove(0);
    let saved = Saved::start("qemu-damaged", &qemu, "qcow2");
    let report = saved.checkpoint();
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let (name, snapshot) = (text(&report["checkpoint"]), text(&report["disks"][0]["version"]["snapshot"]));
    kill(saved.guest.pid());
    let copies = saved.host.root.join("copies");
    std::fs::create_dir(&copies).expect("a directory");
    let copies = copies.display().to_string();
    let untouched = || {
        let snapshots = qemu_img(&["snapshot", "-l", &saved.disk]);
        assert!(!snapshots.contains("vmemd-before-"), "{snapshots}");
        assert_eq!(std::fs::read_dir(&copies).expect("a directory").count(), 0);
    };
    for file in ["state", "memory.map"] {
        let file = Path::new(&saved.archive).join(&name).join(file);
        damage(&file);
        saved.refused(&["--disks-back"], 13, &[]);
        saved.refused(&["--disk-copies", &copies], 13, &[]);
        untouched();
        damage(&file);
    }
    qemu_img(&["snapshot", "-d", &snapshot, &saved.disk]);
    saved.refused(&["--disks-back"], 13, &["has no snapshot", &snapshot]);
    saved.refused(&["--disk-copies", &copies], 13, &["has no snapshot", &snapshot]);
    untouched();
}

/// Has the VM saved into files, up to where it waits to hear what became of them. Returns its snapshots' name, too.
fn until_saved(host: &Host) -> (VmClient, String) {
    let dir = RunDir::open(&host.run_dir()).expect("a run directory");
    let mut client = VmClient::connect(&dir, "db").expect("the VM");
    let place = host.root.join("files");
    std::fs::create_dir_all(&place).expect("a directory");
    let files = ["image", "map", "state"].map(|name| {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(true).open(place.join(name)).expect("a file")
    });
    files[0].set_len(192 << 20).expect("a size");
    let request = CheckpointRequest {
        downtime_target_ms: 100,
        max_rounds: 10,
        max_throttle: 0,
        rate: None,
        base: None,
        stop: false,
        without_disks: false,
        plain: false,
        encrypted: false,
    };
    let report = client.checkpoint(&request, &files.each_ref(), &mut |_| {}).expect("it is saved");
    let snapshot = report["vm"]["disks"][0]["version"]["snapshot"].as_str().expect("a snapshot").to_owned();
    (client, snapshot)
}

#[test]
fn snapshots_go_only_when_there_is_no_checkpoint_and_the_disk_is_the_vms_own() {
    for qemu in qemus() {
        eprintln!("QEMU {}", qemu.version);
        let saved = Saved::start("qemu-forgets", &qemu, "qcow2");
        let has = |snapshot: &str| qemu_img(&["snapshot", "-U", "-l", &saved.disk]).contains(snapshot);
        let ended = || {
            wait_for("the checkpoint to end", || {
                saved.host.stat("db")?["checkpoint"].is_null().then_some(())
            });
        };
        let patience = std::time::Duration::from_secs(20);

        // There may be a checkpoint of that name.
        let (client, snapshot) = until_saved(&saved.host);
        drop(client);
        ended();
        assert!(has(&snapshot));
        goes_on(|| saved.lines(), 2);

        let (mut client, snapshot) = until_saved(&saved.host);
        client.cancel(patience).expect_err("there is no checkpoint");
        assert!(!has(&snapshot));
        goes_on(|| saved.lines(), 2);

        // A QEMU that stands still has given its disks away.
        assert_eq!(saved.host.vmemd(&["pause", "db"]).code, 0);
        let (mut client, snapshot) = until_saved(&saved.host);
        client.cancel(patience).expect_err("there is no checkpoint");
        saved.host.wait_state("db", "paused");
        assert!(has(&snapshot));
        assert_eq!(saved.host.vmemd(&["resume", "db"]).code, 0);
        goes_on(|| saved.lines(), 2);
        assert!(saved.guest.log().contains(&format!("snapshot {snapshot} stays")), "{}", saved.guest.log());
    }
}

#[test]
fn snapshots_go_with_their_checkpoint_and_are_looked_at_with_it() {
    for qemu in qemus() {
        eprintln!("QEMU {}", qemu.version);
        let saved = Saved::start("qemu-remove", &qemu, "qcow2");
        let archive = saved.archive.as_str();
        let has = |snapshot: &str| qemu_img(&["snapshot", "-U", "-l", &saved.disk]).contains(snapshot);
        let of = |report: &Value| {
            let name = report["checkpoint"].as_str().expect("a name").to_owned();
            (name, report["disks"][0]["version"]["snapshot"].as_str().expect("a snapshot").to_owned())
        };
        let verify = |more: &[&str]| saved.host.vmemd(&[&["checkpoint", "verify", archive], more].concat());
        let [first, second, third] = [(); 3].map(|()| of(&saved.checkpoint()));
        goes_on(|| saved.lines(), 2);

        // A QEMU has the file open: it is asked. What others need stays.
        let said = saved.host.vmemd(&["checkpoint", "remove", archive, &first.0, "--json"]);
        assert_eq!(said.code, 0, "{said:?}");
        assert_eq!(said.json()["snapshots"]["deleted"][0]["snapshot"], Value::from(first.1.clone()));
        assert!(!has(&first.1) && has(&second.1) && has(&third.1));
        goes_on(|| saved.lines(), 2);
        let verified = verify(&[]);
        assert!(
            verified.code == 0 && verified.err.contains("whether it is whole was not looked at"),
            "{verified:?}"
        );

        // A QEMU that was saved while it stands still has given its disks away: they cannot be changed.
        assert_eq!(saved.host.vmemd(&["pause", "db"]).code, 0);
        let said = saved.host.vmemd(&["checkpoint", "db", "--to", archive, "--keep", "2", "--json"]);
        assert_eq!(said.code, 0, "{said:?}");
        let fourth = of(&said.json());
        let left = said.json()["kept"]["snapshots"]["left"][0].clone();
        assert_eq!(left["snapshot"], Value::from(second.1.clone()), "{said:?}");
        let command = format!("qemu-img snapshot -d {} {}", second.1, saved.disk);
        assert!(said.err.contains(&command) && has(&second.1), "{said:?}");
        assert_eq!(saved.host.vmemd(&["resume", "db"]).code, 0);
        goes_on(|| saved.lines(), 2);

        // What is merged into the newest goes, and the newest keeps its own.
        let args = ["checkpoint", "db", "--to", archive, "--base", "latest", "--keep", "1", "--json"];
        let said = saved.host.vmemd(&args);
        assert_eq!(said.code, 0, "{said:?}");
        let (report, fifth) = (said.json(), of(&said.json()));
        assert_eq!(report["kept"]["merged"][0], Value::from(fifth.0.clone()), "{report}");
        assert_eq!(report["kept"]["snapshots"]["deleted"].as_array().map(Vec::len), Some(2), "{report}");
        assert!(!has(&third.1) && !has(&fourth.1) && has(&fifth.1));
        goes_on(|| saved.lines(), 2);
        let args = ["checkpoint", "db", "--to", archive, "--keep", "1", "--leave-snapshots", "--json"];
        let said = saved.host.vmemd(&args);
        assert!(said.code == 0 && has(&fifth.1), "{said:?}");
        let sixth = of(&said.json());
        let seventh = of(&saved.checkpoint());
        kill(saved.guest.pid());

        // Nobody has it open.
        qemu_img(&["snapshot", "-c", "vmemd-mine", &saved.disk]);
        let verified = verify(&[]);
        assert!(verified.code == 0 && !verified.err.contains("was not looked at"), "{verified:?}");
        let said = saved.host.vmemd(&["checkpoint", "remove", archive, &sixth.0]);
        assert!(said.code == 0 && said.out.contains(&sixth.1), "{said:?}");
        assert!(!has(&sixth.1) && has(&seventh.1) && has(&fifth.1) && has("vmemd-mine"));
        qemu_img(&["snapshot", "-d", &seventh.1, &saved.disk]);
        let gone = format!("{}: its disk {} has no snapshot {}", seventh.0, saved.disk, seventh.1);
        verify(&[]).fails(13, &[&gone]);
        assert_eq!(verify(&["--without-disks"]).code, 0);
        std::fs::rename(&saved.disk, format!("{}.away", saved.disk)).expect("a disk");
        verify(&[]).fails(13, &["disk.qcow2 is not there"]);
        let said = saved.host.vmemd(&["checkpoint", "remove", archive, &seventh.0]);
        assert!(said.code == 0 && said.err.contains("is not on this host"), "{said:?}");
        std::fs::rename(format!("{}.away", saved.disk), &saved.disk).expect("a disk");
        assert!(has(&fifth.1) && has("vmemd-mine"));
        is_whole(&saved.disk);
    }
}

#[test]
fn a_disk_whose_tables_do_not_fit_is_told() {
    let qemu = qemus().remove(0);
    let saved = Saved::start("qemu-tables", &qemu, "qcow2");
    saved.checkpoint();
    kill(saved.guest.pid());
    let verify = || saved.host.vmemd(&["checkpoint", "verify", &saved.archive]);
    assert_eq!(verify().code, 0);
    // The first entry of the table of reference counts, whose place the header says: every cluster of it has none.
    let mut bytes = std::fs::read(&saved.disk).expect("a disk");
    let table = u64::from_be_bytes(bytes[48..56].try_into().expect("eight bytes")) as usize;
    bytes[table..table + 8].fill(0);
    std::fs::write(&saved.disk, bytes).expect("a disk");
    verify().fails(13, &["its disk", "disk.qcow2 is damaged: "]);
}

#[test]
fn a_second_life_beside_the_first_has_disks_of_its_own() {
    for qemu in qemus() {
        eprintln!("QEMU {}", qemu.version);
        let mut saved = Saved::start("qemu-second", &qemu, "qcow2");
        saved.checkpoint();
        goes_on(|| saved.lines(), 2);
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
        goes_on(|| saved.lines(), 2);
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
    goes_on(|| saved.lines(), 1);
    let said = saved.host.vmemd(&[&args[..], &["--without-disks"]].concat());
    assert_eq!(said.code, 0, "{said:?}");
    goes_on(|| saved.lines(), 1);
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
    goes_on(|| saved.lines(), 3);
    saved.stop("db");
    running.end();
}
