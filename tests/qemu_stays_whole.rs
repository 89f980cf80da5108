//! A move loses nothing that the VM's user has changed, saved or begun through a monitor of his own.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod proxy;
mod qemu;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Host, Running};
use proxy::hold_up;
use qemu::{BOOT, Guest, Machine, Monitor, Qemu, field, qemus};
use serde_json::{Value, json};

/// How long a guest's job of a few seconds may take on a slow, busy machine.
const JOB: Duration = Duration::from_secs(120);
/// Between two looks at what QEMU is doing.
const POLL: Duration = Duration::from_millis(20);
/// The guest counts, and checks its memory, as long as it lives.
const JOBS: &str = "checker beat & checker memory 100M 100000";
/// The memory that the guest's job has filled is in a snapshot of it.
const SNAPSHOT_MIN: u64 = 100 << 20;

fn settings(monitor: &mut Monitor) -> [Value; 2] {
    ["query-migrate-capabilities", "query-migrate-parameters"].map(|query| monitor.ask(query, json!({})))
}

/// A host with a monitor's path that means the same at both ends of a move.
struct Place {
    host: Host,
    monitor: String,
}

impl Place {
    fn new(name: &str) -> Place {
        let host = Host::new(name);
        let monitor = host.root.join("monitor").display().to_string();
        Place { host, monitor }
    }

    /// A daemon that takes VMs of the other place, with more rules, and its address.
    fn serve(&mut self, other: &Place, more: &str) -> (Running, String) {
        let map =
            |from: &str, to: &str| format!("[[map]]\nkind = \"path\"\nfrom = \"{from}\"\nto = \"{to}\"\n");
        let rules = map(&other.monitor, &self.monitor) + more;
        self.host.start_qemu_daemon("127.0.0.1:0", "192M", &rules, &[])
    }

    fn start(&self, qemu: &Qemu, machine: &Machine, more: &[&str]) -> Guest {
        let store = self.host.store();
        let mut command =
            self.host.command(&["run", "--name", "db", "--ram", "128M", "--store", &store, "--"]);
        command.arg(&qemu.binary).args(machine.args());
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", self.monitor)]).args(more);
        Guest::start(command)
    }

    fn migrate(&self, to: &str) {
        let said = self.host.vmemd(&["migrate", "db", "--to", to, "--json"]);
        assert_eq!(said.code, 0, "{said:?}");
    }

    fn monitor(&self) -> Monitor {
        Monitor::connect(Path::new(&self.monitor))
    }
}

/// An empty raw image.
fn image(host: &Host, name: &str) -> String {
    let path = host.root.join(name);
    std::fs::File::create(&path).expect("an image").set_len(64 << 20).expect("an image");
    path.display().to_string()
}

/// An image that takes snapshots, made by QEMU.
fn qcow2(host: &Host, qemu: &Qemu, name: &str) -> String {
    let (base, path) = (image(host, &format!("{name}.base")), host.root.join(name).display().to_string());
    let mut child = Command::new(&qemu.binary)
        .args(["-nodefaults", "-display", "none", "-S", "-monitor", "stdio", "-drive"])
        .arg(format!("if=none,id=d,format=raw,file={base}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("a QEMU");
    writeln!(child.stdin.take().expect("a pipe"), "snapshot_blkdev d {path} qcow2\nquit")
        .expect("its monitor");
    assert!(child.wait().expect("a child").success() && Path::new(&path).exists());
    path
}

/// Puts what the snapshot has got back into the first image, and goes on with that alone.
fn merge(monitor: &mut Monitor) {
    monitor.ask("block-commit", json!({ "device": "d0", "job-id": "merge" }));
    let jobs = |monitor: &mut Monitor| monitor.ask("query-block-jobs", json!({}));
    wait("the job to be ready", || jobs(monitor)[0]["ready"] == true);
    monitor.ask("block-job-complete", json!({ "device": "merge" }));
    wait("the job to end", || jobs(monitor) == json!([]));
}

fn beats(guest: &Guest) -> Vec<u64> {
    let lines = guest.lines();
    lines
        .iter()
        .filter(|line| line.starts_with("checker beat number="))
        .map(|line| field(line, "number"))
        .collect()
}

/// Waits for something that the guest prints.
fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + JOB;
    while !done() {
        assert!(Instant::now() < deadline, "waited {JOB:?} for {what}");
        std::thread::sleep(POLL);
    }
}

fn memory_is_right(guest: &Guest) {
    let rounds = |guest: &Guest| {
        let lines = guest.lines();
        let rounds = lines.iter().filter(|line| line.starts_with("checker memory round="));
        rounds.map(|line| field::<u64>(line, "mismatched")).collect::<Vec<_>>()
    };
    let before = rounds(guest).len();
    wait("two rounds of the memory checker", || rounds(guest).len() >= before + 2);
    assert!(rounds(guest).iter().all(|mismatched| *mismatched == 0), "{:?}", guest.lines());
}

/// Saves the whole VM in its disk, lets it go on, and goes back: the guest counts on from there.
fn saves_and_goes_back(monitor: &mut Monitor, guest: &Guest, name: &str) {
    assert_eq!(monitor.human(&format!("savevm {name}")), "");
    // What it has said so far may still be on its way, so this is at most what it knew when it was saved, or shortly
    // after.
    let known = beats(guest).last().copied().expect("it counts");
    let disks = monitor.ask("query-block", json!({}));
    let snapshots = disks[0]["inserted"]["image"]["snapshots"].as_array().expect("snapshots").clone();
    let saved = snapshots.iter().find(|snapshot| snapshot["name"] == name).expect("the snapshot");
    let bytes = saved["vm-state-size"].as_u64().expect("a number");
    eprintln!("savevm {name}: {} MiB", bytes >> 20);
    assert!(bytes > SNAPSHOT_MIN, "{bytes} bytes: memory is not in it");
    wait("more beats", || beats(guest).last() > Some(&(known + 30)));
    let printed = beats(guest).len();
    assert_eq!(monitor.human(&format!("loadvm {name}")), "");
    wait("beats that begin again", || {
        beats(guest)[printed..].windows(2).any(|pair| pair[1] < pair[0])
            || beats(guest)[printed - 1..].windows(2).any(|pair| pair[1] < pair[0])
    });
    let again = beats(guest);
    let back = again.windows(2).rfind(|pair| pair[1] < pair[0]).expect("it went back");
    assert!(back[1] <= known + 10, "from {} to {}, saved at {known}", back[0], back[1]);
    memory_is_right(guest);
}

#[test]
fn snapshots_hold_memory_after_a_move_and_after_one_that_failed() {
    for qemu in qemus() {
        let (here, mut there) = (Place::new("wsave"), Place::new("wsave-there"));
        let disk = qcow2(&here.host, &qemu, "disk");
        let [rom, larger] = ["rom", "larger"].map(|name| image(&here.host, name));
        std::fs::File::options().write(true).open(&rom).expect("a file").set_len(64 << 10).expect("a file");
        std::fs::File::options().write(true).open(&larger).expect("a file").set_len(1 << 20).expect("a file");
        let (drive, device) =
            (format!("file={disk},format=qcow2,if=virtio"), format!("virtio-net-pci,romfile={rom}"));
        let guest =
            here.start(&qemu, &Machine::new("192M").run(JOBS), &["-drive", &drive, "-device", &device]);
        guest.wait_for("checker memory round=1", BOOT);
        let mut monitor = here.monitor();
        // As somebody has left it who saved to a file.
        let multifd = |state: bool| json!({ "capabilities": [{ "capability": "multifd", "state": state }] });
        monitor.ask("migrate-set-capabilities", multifd(true));
        let before = settings(&mut monitor);

        // A ROM of another size: the target's QEMU finds that out when it has the guest's state.
        let rule = format!("[[map]]\nkind = \"path\"\nfrom = \"{rom}\"\nto = \"{larger}\"\n");
        let (mut daemon, address) = there.serve(&here, &rule);
        here.host.vmemd(&["migrate", "db", "--to", &address]).fails(6, &["\"db\" runs on here"]);
        assert_eq!(settings(&mut monitor), before);
        // QEMU's own snapshots do not go with it.
        monitor.ask("migrate-set-capabilities", multifd(false));
        saves_and_goes_back(&mut monitor, &guest, "here");
        daemon.signal(libc::SIGTERM);
        daemon.ends_with(0);

        let (_daemon, address) = there.serve(&here, "");
        monitor.ask("migrate-set-capabilities", multifd(true));
        here.migrate(&address);
        let mut monitor = there.monitor();
        saves_and_goes_back(&mut monitor, &guest, "there");
        assert_eq!(there.host.vmemd(&["stop", "db"]).code, 0);
    }
}

#[test]
fn a_disk_that_was_changed_since_the_start_is_told_before_a_byte_moves() {
    for qemu in qemus() {
        let (mut here, mut there) = (Place::new("wdisk"), Place::new("wdisk-there"));
        let (there_daemon, address) = there.serve(&here, "");
        let (_here_daemon, back) = here.serve(&there, "");
        let disk = image(&here.host, "disk");
        let drive = format!("file={disk},format=raw,if=none,id=d0");
        let more = ["-drive", &drive, "-device", "virtio-blk-pci,drive=d0"];
        let guest = here.start(&qemu, &Machine::new("192M").run(JOBS), &more);
        guest.wait_for("checker memory round=1", BOOT);
        let snapshot = here.host.root.join("snap.qcow2").display().to_string();
        let says =
            format!("disk d0 is now {snapshot} (qcow2) on {disk} (raw), it was started with {disk} (raw)");
        let mut monitor = here.monitor();
        monitor.human(&format!("snapshot_blkdev d0 {snapshot} qcow2"));
        let refused = here.host.vmemd(&["migrate", "db", "--to", &address]);
        refused.fails(9, &["cannot move: ", &says, "\"db\" runs on here"]);
        assert!(there.host.names().is_empty(), "nothing was started for it");
        there.host.assert_clean_but(&[there_daemon.pid()]);
        memory_is_right(&guest);

        // As it was: it moves. There it is a machine of its own start.
        merge(&mut monitor);
        here.migrate(&address);
        let mut monitor = there.monitor();
        std::fs::remove_file(&snapshot).expect("an image");
        monitor.human(&format!("snapshot_blkdev d0 {snapshot} qcow2"));
        there.host.vmemd(&["migrate", "db", "--to", &back]).fails(9, &[&says, "\"db\" runs on here"]);
        merge(&mut monitor);
        there.migrate(&back);
        memory_is_right(&guest);
        assert_eq!(here.host.vmemd(&["stop", "db"]).code, 0);
    }
}

#[test]
fn what_begins_while_memory_goes_is_found_when_it_stands_still() {
    let qemu = qemus().remove(0);
    let (mut here, mut there) = (Place::new("wlate"), Place::new("wlate-there"));
    let (_daemon, address) = there.serve(&here, "");
    let disk = image(&here.host, "disk");
    let drive = format!("file={disk},format=raw,if=none,id=d0");
    let more = ["-drive", &drive, "-device", "virtio-blk-pci,drive=d0"];
    let guest = here.start(&qemu, &Machine::new("192M").run(JOBS), &more);
    guest.wait_for("checker memory round=1", BOOT);
    // A cable holds memory up until the disk has changed.
    let cable = hold_up(&address, 4 << 20);
    let mut migrate = here.host.start(&["migrate", "db", "--to", cable.address()]);
    cable.wait_until_held();
    let snapshot = here.host.root.join("snap.qcow2").display().to_string();
    here.monitor().human(&format!("snapshot_blkdev d0 {snapshot} qcow2"));
    cable.go_on();
    migrate.ends_with(9);
    let said = migrate.log();
    assert!(said.contains(&format!("disk d0 is now {snapshot} (qcow2) on")), "{said}");
    assert!(said.contains("\"db\" runs on here") && !said.contains("the VM failed"), "{said}");
    memory_is_right(&guest);
    assert_eq!(here.host.vmemd(&["stop", "db"]).code, 0);
}

#[test]
fn a_migration_of_the_users_own_goes_on() {
    for qemu in qemus() {
        let (here, mut there) = (Place::new("wown"), Place::new("wown-there"));
        let (_daemon, address) = there.serve(&here, "");
        let guest = here.start(&qemu, &Machine::new("192M").run(JOBS), &[]);
        guest.wait_for("checker memory round=1", BOOT);
        let mut monitor = here.monitor();
        monitor.ask("migrate-set-parameters", json!({ "max-bandwidth": 4096 }));
        monitor.ask("migrate", json!({ "uri": "exec:cat > /dev/null" }));
        // QEMU answers before it has begun.
        wait("its begin", || monitor.ask("query-migrate", json!({}))["status"] == "active");
        let begun = Instant::now();
        let refused = here.host.vmemd(&["migrate", "db", "--to", &address]);
        refused.fails(9, &["QEMU is at a migration that vmemd did not start", "\"db\" runs on here"]);
        assert!(begun.elapsed() < Duration::from_secs(10), "late");
        assert_eq!(monitor.ask("query-migrate", json!({}))["status"], "active");
        monitor.ask("migrate_cancel", json!({}));
        wait("its end", || monitor.ask("query-migrate", json!({}))["status"] == "cancelled");
        here.migrate(&address);
        memory_is_right(&guest);
        assert_eq!(there.host.vmemd(&["stop", "db"]).code, 0);
    }
}

#[test]
fn what_qemu_cannot_migrate_is_told_before_a_byte_moves() {
    for qemu in qemus() {
        let (here, mut there) = (Place::new("wblock"), Place::new("wblock-there"));
        let (daemon, address) = there.serve(&here, "");
        let shared = here.host.root.join("shared");
        std::fs::create_dir(&shared).expect("a directory");
        let drive = format!("file=fat:rw:{},format=raw,if=virtio", shared.display());
        let guest = here.start(&qemu, &Machine::new("192M").run(JOBS), &["-drive", &drive]);
        guest.wait_for("checker memory round=1", BOOT);
        let refused = here.host.vmemd(&["migrate", "db", "--to", &address]);
        refused.fails(9, &["cannot move: ", "vvfat", "\"db\" runs on here"]);
        there.host.assert_clean_but(&[daemon.pid()]);
        memory_is_right(&guest);
        assert_eq!(here.host.vmemd(&["stop", "db"]).code, 0);
    }
}

#[test]
fn what_the_command_line_says_does_not_move_is_known_at_the_source() {
    let qemu = qemus().remove(0);
    let (here, mut there) = (Place::new("wline"), Place::new("wline-there"));
    let (daemon, address) = there.serve(&here, "");
    let drive = format!("file={},format=raw,if=virtio", image(&here.host, "disk"));
    let guest = here.start(&qemu, &Machine::new("192M").run(JOBS), &["-drive", &drive, "-snapshot"]);
    guest.wait_for("checker memory round=1", BOOT);
    let refused = here.host.vmemd(&["migrate", "db", "--to", &address]);
    refused.fails(9, &["this VM cannot be moved: `-snapshot`", "\"db\" runs on here"]);
    there.host.assert_clean_but(&[daemon.pid()]);
    assert_eq!(here.host.vmemd(&["stop", "db"]).code, 0);
}

/// Writes that to a stretch of a QEMU's physical memory, by its test socket.
fn fill(socket: &str, address: u64, bytes: u64, byte: u8) {
    let mut door = BufReader::new(UnixStream::connect(socket).expect("QEMU's test socket"));
    writeln!(door.get_mut(), "memset {address:#x} {bytes:#x} {byte:#x}").expect("QEMU's test socket");
    let mut line = String::new();
    door.read_line(&mut line).expect("QEMU's test socket");
    assert_eq!(line, "OK\n");
}

#[test]
fn a_full_frame_buffer_moves_too() {
    const FRAME_BUFFER: u64 = 256 << 20;
    for qemu in qemus() {
        let (here, mut there) = (Place::new("wvga"), Place::new("wvga-there"));
        let [socket, other] =
            [&here, &there].map(|place| place.host.root.join("qtest").display().to_string());
        let (_daemon, address) =
            there.serve(&here, &format!("\n[[map]]\nfrom = {socket:?}\nto = {other:?}\n"));
        let door = format!("unix:{socket},server=on,wait=off");
        let more = ["-device", "VGA,vgamem_mb=256,id=frames", "-qtest", &door];
        let guest = here.start(&qemu, &Machine::new("192M").run(JOBS), &more);
        guest.wait_for("checker memory round=1", BOOT);
        let mut monitor = here.monitor();
        let buses = monitor.ask("query-pci", json!({}));
        let devices = buses[0]["devices"].as_array().expect("devices");
        let frames = devices.iter().find(|device| device["qdev_id"] == "frames").expect("the VGA");
        let start = frames["regions"][0]["address"].as_u64().expect("an address");
        fill(&socket, start, FRAME_BUFFER, 0x41);
        // What it takes to send and to load is known before the machine is stopped.
        let short = here.host.vmemd(&["migrate", "db", "--to", &address, "--max-downtime", "100ms"]);
        short.fails(12, &["it would stand still for about", "--max-downtime allows 100 ms"]);
        let said = here.host.vmemd(&["migrate", "db", "--to", &address, "--json"]);
        assert_eq!(said.code, 0, "{said:?}");
        let report = said.json();
        eprintln!(
            "QEMU {}: {} ms of downtime with 256 MiB of frame buffer",
            qemu.version, report["downtime_ms"]
        );
        assert!(report["bytes_sent"].as_u64() > Some(FRAME_BUFFER), "{report}");
        memory_is_right(&guest);
        let mut monitor = there.monitor();
        for at in [0, 1 << 20, FRAME_BUFFER - 4] {
            let shown = monitor.human(&format!("xp /1xw {:#x}", start + at));
            assert!(shown.ends_with(": 0x41414141"), "{shown}");
        }
        assert_eq!(there.host.vmemd(&["stop", "db"]).code, 0);
    }
}

/// What `vmemd qemu-args` prints for these words.
fn printed(place: &Place, format: &str, qemu: &Qemu, words: &[String]) -> String {
    let store = place.host.store();
    let mut command = place.host.command(&["qemu-args", "--name", "db", "--ram", "128M", "--store", &store]);
    let output = command.args(["--format", format, "--"]).arg(&qemu.binary).args(words).output();
    let output = output.expect("vmemd runs");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// Between single quotes of XML.
fn unescaped(text: &str) -> String {
    let marks = [("&apos;", "'"), ("&quot;", "\""), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")];
    marks.iter().fold(text.to_owned(), |text, (mark, is)| text.replace(mark, is))
}

/// A QEMU that somebody else has started, with just these words; killed when this is dropped.
struct Started(Child);

impl Started {
    fn new(mut command: Command) -> Started {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Started(command.spawn().expect("it can be started"))
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Somebody else starts QEMU, with a path changed, a device added, or libvirt's own words: the target would start it
/// with what was printed, on another disk.
#[test]
fn a_qemu_that_was_started_with_other_words_than_were_printed_stays() {
    for qemu in qemus() {
        let (here, mut there) = (Place::new("wwords"), Place::new("wwords-there"));
        let (daemon, address) = there.serve(&here, "");
        let [disk, other] = ["disk", "other"].map(|name| image(&here.host, name));
        let drive = format!("file={disk},format=raw,if=virtio");
        let mut words = Machine::new("192M").args();
        words.extend(["-drive".to_owned(), drive]);
        let stays = |command: Command, says: &[&str]| {
            let mut guest = Started::new(command);
            here.host.wait_state("db", "running");
            let refused = here.host.vmemd(&["migrate", "db", "--to", &address]);
            refused.fails(9, says);
            refused.fails(9, &["\"db\" runs on here"]);
            assert!(there.host.names().is_empty(), "nothing was started for it");
            there.host.assert_clean_but(&[daemon.pid()]);
            assert_eq!(here.host.vmemd(&["stop", "db"]).code, 0);
            guest.0.wait().expect("a child");
        };
        let shell = |line: &str| {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", &format!("exec env {line}")]);
            command
        };

        let line = printed(&here, "shell", &qemu, &words);
        // Only in QEMU's own words: the settings are those that were printed.
        let (settings, own) = line.trim().split_once(" -nodefaults ").expect("QEMU's first word");
        let with = |own: &str| shell(&format!("{settings} -nodefaults {own}"));
        let says = format!("it has \"file={other},format=raw,if=virtio\" in the place of \"file={disk},");
        stays(with(&own.replace(&disk, &other)), &["was not started with what", &says]);
        stays(with(&format!("{own} -device virtio-rng-pci")), &["\"-device\" was added"]);

        let made: Value = serde_json::from_str(&printed(&here, "json", &qemu, &words)).expect("JSON");
        let text = |value: &Value| value.as_str().expect("a text").to_owned();
        let args: Vec<String> = made["args"].as_array().expect("a list").iter().map(text).collect();
        let of = |args: &[String]| {
            let mut command = Command::new(text(&made["binary"]));
            let environment = made["env"].as_object().expect("an object");
            command.args(args).envs(environment.iter().map(|(name, value)| (name, text(value))));
            command
        };
        let less: Vec<String> = args.iter().filter(|arg| *arg != "-no-reboot").cloned().collect();
        assert_eq!(less.len() + 1, args.len(), "{args:?}");
        stays(of(&less), &["in the place of \"-no-reboot\""]);

        // The recipe of `docs/qemu.md`: of libvirt's words only the memory is told.
        let xml = printed(&here, "libvirt", &qemu, &["-m".to_owned(), "192M".to_owned()]);
        let values = |tag: &str| {
            let lines = xml.lines().filter_map(|line| line.trim().strip_prefix(&format!("<qemu:{tag} ")));
            let values = lines.map(|line| line.trim_end_matches("'/>").to_owned());
            values.collect::<Vec<_>>()
        };
        let mut domain = Command::new(&qemu.binary);
        domain.args(&words);
        for arg in values("arg") {
            domain.arg(unescaped(arg.strip_prefix("value='").expect("a value")));
        }
        for env in values("env") {
            let (name, value) = env.split_once("' value='").expect("a name and a value");
            domain.env(name.strip_prefix("name='").expect("a name"), unescaped(value));
        }
        stays(domain, &["libvirt made most of its command line", "`vmemd run`"]);

        // With just what was printed it moves.
        for command in [shell(line.trim()), of(&args)] {
            let mut guest = Started::new(command);
            here.host.wait_state("db", "running");
            here.migrate(&address);
            guest.0.wait().expect("a child");
            there.host.wait_state("db", "running");
            assert_eq!(there.host.vmemd(&["stop", "db"]).code, 0);
            there.host.assert_clean_but(&[daemon.pid()]);
        }
        here.host.assert_clean();
    }
}

/// A monitor that is heard before vmemd's: what it changes then is not the command line's either.
#[test]
fn a_disk_that_is_changed_as_qemu_starts_is_told_before_a_byte_moves() {
    for qemu in qemus() {
        let (here, mut there) = (Place::new("wfirst"), Place::new("wfirst-there"));
        let (daemon, address) = there.serve(&here, "");
        let disk = image(&here.host, "disk");
        let link = here.host.root.join("link").display().to_string();
        std::os::unix::fs::symlink(&disk, &link).expect("a link");
        let snapshot = here.host.root.join("snap.qcow2").display().to_string();
        for (named, says) in [(Some(&snapshot), 9), (None, 0)] {
            let store = here.host.store();
            let mut command =
                here.host.command(&["run", "--name", "db", "--ram", "128M", "--store", &store, "--"]);
            // Under other names of the same file, as people write them.
            let drives =
                ["-drive", "file=./link,format=raw,if=none,id=d0", "-device", "virtio-blk-pci,drive=d0"];
            command
                .current_dir(&here.host.root)
                .arg(&qemu.binary)
                .args(Machine::new("192M").args())
                .args(drives);
            command.args(["-S", "-monitor", "stdio"]).stdout(Stdio::null()).stdin(Stdio::piped());
            let mut started = Started(command.stderr(Stdio::null()).spawn().expect("it can be started"));
            let mut monitor = started.0.stdin.take().expect("a pipe");
            if let Some(snapshot) = named {
                writeln!(monitor, "snapshot_blkdev d0 {snapshot} qcow2").expect("its monitor");
            }
            here.host.wait_state("db", "paused");
            wait("the snapshot", || named.is_none_or(|snapshot| Path::new(snapshot).exists()));
            let moved = here.host.vmemd(&["migrate", "db", "--to", &address]);
            if says == 0 {
                assert_eq!(moved.code, 0, "{moved:?}");
                assert_eq!(there.host.vmemd(&["stop", "db"]).code, 0);
                started.0.wait().expect("a child");
                continue;
            }
            moved.fails(9, &[&snapshot, "\"db\" stays paused here"]);
            // Which of both monitors was heard first is QEMU's affair.
            let first = format!(
                "disk d0 is in {snapshot}, and its command line names {}",
                here.host.root.join("./link").display()
            );
            let later = format!("disk d0 is now {snapshot} (qcow2)");
            assert!(moved.err.contains(&first) || moved.err.contains(&later), "{moved:?}");
            println!(
                "QEMU {}: {}",
                qemu.version,
                if moved.err.contains(&first) { "before" } else { "behind" }
            );
            assert!(there.host.names().is_empty(), "nothing was started for it");
            there.host.assert_clean_but(&[daemon.pid()]);
            assert_eq!(here.host.vmemd(&["stop", "db"]).code, 0);
            started.0.wait().expect("a child");
        }
    }
}
