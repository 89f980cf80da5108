//! QEMU VMs that move, while they run, between real daemons.
//!
//! `VMEMD_MOVES` is how often the long test moves its VM there and back (once without it), `VMEMD_MOVE_MEMORY` how much
//! memory that VM has.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod proxy;
mod qemu;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{Host, Running, freeze, lives, needs_root, signal, wait_for};
use proxy::{HeldUp, hold_up};
use qemu::{BOOT, Guest, Machine, Network, Qemu, checker, field, on_host, qemus};
use serde_json::Value;
use testkit::{OrSkip, Reason, skip};
use vmprocess::size::Size;

/// How long a guest's job of a few seconds may take on a slow, busy machine.
const JOB: Duration = Duration::from_secs(120);
/// Far above what is promised (`docs/qemu.md`), which is measured on a quiet machine.
const DOWNTIME_MAX_MS: f64 = 3000.0;
/// Pace of the lines over a connection, so that the guest's processor is not theirs alone.
const TALK_EVERY: Duration = Duration::from_millis(5);
/// The guest beats and checks its memory as long as it lives.
const JOBS: &str = "checker beat & checker memory 150M 100000";

fn start(host: &Host, qemu: &Qemu, machine: &Machine, more: &[&str]) -> Guest {
    let mut command = host.command(&["run", "--name", "db", "--ram", "128M", "--store", &host.store(), "--"]);
    command.arg(&qemu.binary).args(machine.args()).args(more);
    Guest::start(command)
}

/// A daemon that takes QEMU VMs, and its address.
fn serve(host: &mut Host, listen: &str, ram: &str, rules: &str) -> (Running, String) {
    host.start_qemu_daemon(listen, ram, rules, &[])
}

fn rule(kind: &str, from: &str, to: &str) -> String {
    format!("[[map]]\nkind = \"{kind}\"\nfrom = \"{from}\"\nto = \"{to}\"\n")
}

/// Moves the VM, and returns the report.
fn migrate(from: &Host, to: &str) -> Value {
    migrate_by(from, to, &[])
}

fn migrate_by(from: &Host, to: &str, more: &[&str]) -> Value {
    let said = from.vmemd(&[&["migrate", "db", "--to", to, "--json"], more].concat());
    assert_eq!(said.code, 0, "{said:?}");
    let report = said.json();
    eprintln!(
        "moved to {to}: downtime {:.1} ms, {} rounds, throttle {} %, {:.2} s, {} MiB sent",
        report["downtime_ms"].as_f64().expect("a number"),
        report["rounds"],
        report["throttle_max_percent"],
        report["duration_ms"].as_f64().expect("a number") / 1000.0,
        report["bytes_sent"].as_u64().expect("a number") >> 20,
    );
    assert!(report["downtime_ms"].as_f64() < Some(DOWNTIME_MAX_MS), "{report}");
    assert_eq!((&report["pageins_during"], &report["pageouts_during"]), (&Value::from(0), &Value::from(0)));
    report
}

/// Waits until the guest has printed so many more lines that begin with these words.
fn wait_more(guest: &Guest, words: &str, count: usize) {
    let printed = || guest.lines().iter().filter(|line| line.starts_with(words)).count();
    let goal = printed() + count;
    wait_for(words, || (printed() >= goal).then_some(()));
}

/// Waits for two more rounds of the memory checker, and looks at everything that was printed so far.
fn checks_on(guest: &Guest) {
    wait_more(guest, "checker memory round=", 2);
    let lines = guest.lines();
    for line in lines.iter().filter(|line| line.contains(" mismatched=")) {
        assert_eq!(field::<u64>(line, "mismatched"), 0, "{lines:?}");
    }
    let beats = lines.iter().filter(|line| line.starts_with("checker beat"));
    let numbers: Vec<u64> = beats.map(|line| field(line, "number")).collect();
    assert!(numbers.len() > 3 && numbers.iter().copied().eq(0..numbers.len() as u64), "{numbers:?}");
}

/// The same on a host where the VM runs.
fn runs_on(host: &Host, guest: &Guest) -> u32 {
    let stat = host.wait_state("db", "running");
    checks_on(guest);
    let now = host.stat("db").expect("it runs");
    assert_eq!((&now["state"], &now["pid"]), (&stat["state"], &stat["pid"]));
    now["pid"].as_u64().expect("a number") as u32
}

/// The QEMU that a VM has left ends when the next one runs.
fn gone(pid: u32) {
    wait_for("the QEMU that it left to end", || (!lives(pid)).then_some(()));
}

fn stop(host: &Host) {
    let said = host.vmemd(&["stop", "db"]);
    assert_eq!(said.code, 0, "{said:?}");
}

/// A disk image with that content. Both hosts see it, as on storage that they share.
fn image(host: &Host, name: &str, bytes: &[u8]) -> String {
    let path = host.root.join(name);
    let mut file = std::fs::File::create(&path).expect("an image");
    file.write_all(bytes).expect("an image");
    file.set_len(16 << 20).expect("an image");
    path.display().to_string()
}

#[test]
fn a_vm_moves_to_another_daemon_and_back() {
    for qemu in qemus() {
        let (mut here, mut there) = (Host::new("qhere"), Host::new("qthere"));
        let (there_daemon, there_address) = serve(&mut there, "127.0.0.1:0", "192M", "");
        let (here_daemon, here_address) = serve(&mut here, "127.0.0.1:0", "192M", "");
        let drive = format!("file={},format=raw,if=virtio,cache=none", image(&here, "disk", b""));
        let machine = Machine::new("256M").cpus(2).run(JOBS);
        let mut guest = start(&here, &qemu, &machine, &["-drive", &drive]);
        guest.wait_for("checker memory round=1", BOOT);
        let report = migrate(&here, &there_address);
        assert_eq!(report["bytes_total"], 256 << 20);
        assert_eq!(guest.wait_end(JOB).code(), Some(10), "{}", guest.log());
        let pid = runs_on(&there, &guest);
        let stat = there.stat("db").expect("it runs");
        assert_eq!(stat["arrival"]["pageins_during"], 0, "{stat}");
        assert_eq!(stat["arrival"]["pages_store"], report["pages_store"]);
        assert!(report["pages_store"].as_u64() > Some(0), "{report}");
        assert_eq!(stat["daemon"], there_address.as_str());
        assert_eq!((&stat["vcpus"], &stat["workload"]), (&Value::from(2), &"qemu-system-x86_64".into()));
        assert!(stat["resident_bytes"].as_u64() <= Some(192 << 20), "{stat}");

        migrate(&there, &here_address);
        gone(pid);
        there.assert_clean_but(&[there_daemon.pid()]);
        runs_on(&here, &guest);
        stop(&here);
        here.assert_clean_but(&[here_daemon.pid()]);
    }
}

/// Huge pages of anonymous memory that a process has mapped, in MiB.
fn huge_mib(pid: u32) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = smaps.lines().find_map(|line| line.strip_prefix("AnonHugePages:")).unwrap_or("0 kB");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") / 1024
}

#[test]
fn a_vm_that_fits_has_huge_pages_again_when_it_has_arrived() {
    if swapd::huge_page_mode().is_none_or(|mode| mode == "never") {
        skip(Reason::Huge, "no transparent huge pages");
    }
    let qemu = qemus().remove(0);
    let (here, mut there) = (Host::new("qhuge"), Host::new("qhuge-there"));
    let (_daemon, address) = serve(&mut there, "127.0.0.1:0", "256M", "");
    let mut guest = start(&here, &qemu, &Machine::new("256M").run("checker memory 150M 1000000"), &[]);
    guest.wait_for("checker memory round=1", BOOT);
    migrate(&here, &address);
    assert_eq!(guest.wait_end(JOB).code(), Some(10), "{}", guest.log());
    let stat = there.wait_state("db", "running");
    let pid = stat["pid"].as_u64().expect("a number") as u32;
    // The rest has holes, or pages in the store.
    wait_for("huge pages", || (huge_mib(pid) >= 130).then_some(()));
    wait_more(&guest, "checker memory round=", 2);
    let rounds = guest.lines().into_iter().filter(|line| line.starts_with("checker memory round="));
    assert!(rounds.into_iter().all(|line| field::<u64>(&line, "mismatched") == 0));
    stop(&there);
}

#[test]
fn what_is_not_there_at_the_target_is_told_before_a_byte_moves() {
    let qemu = qemus().remove(0);
    let (here, mut there) = (Host::new("qlack"), Host::new("qlack-there"));
    let disk = image(&here, "disk", b"");
    let drive = format!("file={disk},format=raw,if=virtio");
    let guest = start(&here, &qemu, &Machine::new("256M").run(JOBS), &["-drive", &drive]);
    guest.wait_for("checker memory round=1", BOOT);
    let refused = |to: &str, words: &[&str]| {
        here.vmemd(&["migrate", "db", "--to", to]).fails(6, &[words, &["\"db\" runs on here"]].concat());
    };
    let (_plain, address) = there.start_daemon("127.0.0.1:0", "192M", &[]);
    refused(&address, &["this daemon takes none", "--qemu-rules FILE"]);
    let (_daemon, address) = serve(&mut there, "127.0.0.1:0", "192M", &rule("path", &disk, "/nowhere/disk"));
    refused(&address, &["disk /nowhere/disk is missing here: make it, or map its name by a rule"]);
    assert!(there.names().is_empty(), "nothing was started for it");
    runs_on(&here, &guest);
    assert_eq!(here.stat("db").expect("it runs")["migration"], Value::Null);
}

/// What QEMU finds out only when it is started, when it has the guest's state, or when the guest is to run.
#[test]
fn a_qemu_that_cannot_take_the_vm_says_why_and_the_vm_runs_on() {
    for qemu in qemus() {
        let (here, mut there) = (Host::new("qfail"), Host::new("qfail-there"));
        let (disk, rom) = (image(&here, "disk", b""), image(&here, "rom", b""));
        std::fs::File::options().write(true).open(&rom).expect("a file").set_len(64 << 10).expect("a file");
        let drive = format!("file={disk},format=raw,if=virtio");
        let device = format!("virtio-net-pci,romfile={rom}");
        let machine = Machine::new("256M").run(JOBS);
        let guest = start(&here, &qemu, &machine, &["-drive", &drive, "-device", &device]);
        guest.wait_for("checker memory round=1", BOOT);

        // Too small to be a disk that QEMU takes; a ROM of another size; a disk that somebody else writes to.
        let (small, larger) = (there.root.join("small"), image(&there, "larger", b""));
        std::fs::create_dir(&small).expect("a directory");
        let busy = image(&there, "busy", b"");
        let mut other = std::process::Command::new(&qemu.binary)
            .args(["-nodefaults", "-display", "none", "-S", "-drive"])
            .arg(format!("file={busy},format=raw,if=virtio"))
            .spawn()
            .expect("a QEMU");
        let locked = || std::fs::read_to_string("/proc/locks").unwrap_or_default();
        let inode = format!(":{} ", std::fs::metadata(&busy).expect("an image").ino());
        wait_for("the other QEMU to lock its disk", || locked().contains(&inode).then_some(()));
        for (from, to, says) in [
            (&disk, small.display().to_string(), "QEMU ended before the VM had come"),
            (&rom, larger, "QEMU ended before the VM had come"),
            (&disk, busy, "lock"),
        ] {
            let (mut daemon, address) = serve(&mut there, "127.0.0.1:0", "192M", &rule("path", from, &to));
            let said = here.vmemd(&["migrate", "db", "--to", &address]);
            eprintln!("{}", said.err.lines().last().unwrap_or_default());
            said.fails(6, &[says, "\"db\" runs on here"]);
            runs_on(&here, &guest);
            there.assert_clean_but(&[daemon.pid(), other.id()]);
            daemon.signal(libc::SIGTERM);
            daemon.ends_with(0);
        }
        other.kill().expect("a child");
        other.wait().expect("a child");
        // And it can move all the same.
        let (_daemon, address) = serve(&mut there, "127.0.0.1:0", "192M", "");
        migrate(&here, &address);
        runs_on(&there, &guest);
    }
}

/// A monitor of the VM's user, beside vmemd's.
fn tell_monitor(path: &str, command: &str) {
    let mut monitor = BufReader::new(UnixStream::connect(path).expect("QEMU's monitor"));
    for command in ["qmp_capabilities", command] {
        writeln!(monitor.get_mut(), "{{\"execute\":\"{command}\"}}").expect("QEMU's monitor");
    }
    let mut line = String::new();
    // The greeting, and an answer each; events come between.
    let mut answers = 0;
    while answers < 2 {
        line.clear();
        monitor.read_line(&mut line).expect("QEMU's monitor");
        assert!(!line.contains("\"error\""), "{line}");
        answers += u32::from(line.contains("\"return\""));
    }
}

/// How many lines a guest that stands still has printed: what it printed just before may be in the console's socket
/// still.
fn printed_at_rest(guest: &Guest) -> usize {
    wait_for("all that it has printed", || guest.console().all_lines()).len()
}

#[test]
fn a_paused_vm_arrives_paused() {
    let qemu = qemus().remove(0);
    let (mut here, mut there) = (Host::new("qpause"), Host::new("qpause-there"));
    let [ours, theirs] = ["monitor", "monitor-there"].map(|name| here.root.join(name).display().to_string());
    let (_there, there_address) = serve(&mut there, "127.0.0.1:0", "192M", &rule("path", &ours, &theirs));
    let (_here, here_address) = serve(&mut here, "127.0.0.1:0", "192M", &rule("path", &theirs, &ours));
    let monitor = format!("unix:{ours},server=on,wait=off");
    let drive = format!("file={},format=raw,if=virtio", image(&here, "disk", b""));
    let mut guest =
        start(&here, &qemu, &Machine::new("256M").run(JOBS), &["-qmp", &monitor, "-drive", &drive]);
    guest.wait_for("checker memory round=1", BOOT);
    // By its user, with vmemd; then by a monitor that vmemd has no part in.
    assert_eq!(here.vmemd(&["pause", "db"]).code, 0);
    for (from, to, address, back) in
        [(&here, &there, &there_address, &here_address), (&there, &here, &here_address, &there_address)]
    {
        let printed = printed_at_rest(&guest);
        migrate(from, address);
        let left = if std::ptr::eq(from, &here) { &ours } else { &theirs };
        assert!(UnixStream::connect(left).is_err(), "what it held here is free for its return");
        assert_eq!(guest.wait_end(JOB).code(), Some(10), "{}", guest.log());
        to.wait_state("db", "paused");
        assert_eq!(printed_at_rest(&guest), printed, "it ran");
        // Its disks become its own when it runs.
        let onward = to.vmemd(&["migrate", "db", "--to", back]);
        onward.fails(9, &["it has not run since it arrived", "\"db\" stays paused here"]);
        to.wait_state("db", "paused");
        assert_eq!(to.vmemd(&["resume", "db"]).code, 0);
        runs_on(to, &guest);
        tell_monitor(if std::ptr::eq(to, &here) { &ours } else { &theirs }, "stop");
    }
}

/// Begins a migration, and stops the receiving QEMU while it copies: a cable holds the rest back until that QEMU
/// stands still, for a migration may be over sooner than a busy machine stops it. Returns that QEMU as well, and the
/// cable, which is to live on.
fn frozen_migration(here: &mut Host, there: &Host, address: &str) -> (Running, u32, HeldUp) {
    let cable = hold_up(address, 4 << 20);
    let migrate = here.start(&["migrate", "db", "--to", cable.address()]);
    cable.wait_until_held();
    let arriving = wait_for("the VM to arrive", || {
        let list = there.vmemd(&["list", "--json"]).json();
        let row = list.as_array()?.iter().find(|row| row["state"] == "arriving")?.clone();
        Some(row["pid"].as_u64()? as u32)
    });
    freeze(arriving);
    here.wait_state("db", "migrating");
    cable.go_on();
    (migrate, arriving, cable)
}

#[test]
fn whoever_dies_what_ought_to_run_runs() {
    let qemu = qemus().remove(0);
    let (mut here, mut there) = (Host::new("qkill"), Host::new("qkill-there"));
    let (mut daemon, address) = serve(&mut there, "127.0.0.1:0", "192M", "");
    let machine = Machine::new("256M").run(JOBS);
    let guest = start(&here, &qemu, &machine, &[]);
    guest.wait_for("checker memory round=1", BOOT);

    // Ctrl-C.
    let (mut migrate, arriving, _cable) = frozen_migration(&mut here, &there, &address);
    migrate.signal(libc::SIGINT);
    migrate.ends_with(130);
    signal(arriving, libc::SIGCONT);
    wait_for("the target to give up", || (!lives(arriving)).then_some(()));
    runs_on(&here, &guest);
    there.assert_clean_but(&[daemon.pid()]);

    // The QEMU that receives.
    let (mut migrate, arriving, _cable) = frozen_migration(&mut here, &there, &address);
    signal(arriving, libc::SIGKILL);
    migrate.ends_with(6);
    assert!(migrate.log().contains("runs on here"), "{}", migrate.log());
    runs_on(&here, &guest);
    there.assert_clean_but(&[daemon.pid()]);

    // The daemon: the receiving QEMU no longer needs it.
    let (mut migrate, arriving, _cable) = frozen_migration(&mut here, &there, &address);
    daemon.signal(libc::SIGKILL);
    daemon.end();
    signal(arriving, libc::SIGCONT);
    migrate.ends_with(0);
    assert_eq!(runs_on(&there, &guest), arriving);
    here.assert_clean();

    // The QEMU that sends.
    let (mut daemon, address) = serve(&mut here, "127.0.0.1:0", "192M", "");
    let (mut migrate, receiving, _cable) = frozen_migration(&mut there, &here, &address);
    signal(arriving, libc::SIGKILL);
    migrate.ends_with(7);
    signal(receiving, libc::SIGCONT);
    wait_for("the target to give up", || (!lives(receiving)).then_some(()));
    // Sockets of the dead go when somebody looks.
    assert!(here.names().is_empty() && there.names().is_empty());
    here.assert_clean_but(&[daemon.pid()]);
    there.assert_clean();
    daemon.signal(libc::SIGTERM);
    daemon.ends_with(0);
}

/// A connection into the guest over which numbered lines go, and come back, until it is ended.
struct Chat {
    over: Arc<AtomicBool>,
    talking: JoinHandle<(u64, Duration)>,
}

impl Chat {
    fn start(mut stream: TcpStream) -> Chat {
        let over = Arc::new(AtomicBool::new(false));
        let ends = over.clone();
        stream.set_read_timeout(Some(JOB)).expect("a connection");
        stream.set_nodelay(true).expect("a connection");
        let talking = std::thread::spawn(move || {
            let (mut number, mut longest) = (0, Duration::ZERO);
            while !ends.load(Ordering::Relaxed) {
                let (line, asked) = (format!("line {number}\n").into_bytes(), Instant::now());
                stream.write_all(&line).expect("the connection lives");
                let mut answer = vec![0; line.len()];
                stream.read_exact(&mut answer).expect("the connection lives");
                assert_eq!(answer, line);
                longest = longest.max(asked.elapsed());
                number += 1;
                std::thread::sleep(TALK_EVERY);
            }
            (number, longest)
        });
        Chat { over, talking }
    }

    /// Lines that came back, and how long the longest took.
    fn end(self) -> (u64, Duration) {
        self.over.store(true, Ordering::Relaxed);
        self.talking.join().expect("no line was lost")
    }
}

/// A stream into the guest, which checks it, until it is ended.
struct Stream(Child);

impl Stream {
    fn start(network: &Network, port: &str) -> Stream {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &network.namespaces[0]]).arg(checker());
        command.args(["send", Network::GUEST, port]).stdin(Stdio::piped()).stdout(Stdio::piped());
        Stream(command.spawn().expect("the checker runs"))
    }

    /// The sender's last line. All that it sent was received, and right.
    fn end(mut self) -> String {
        drop(self.0.stdin.take());
        let mut said = String::new();
        self.0.stdout.take().expect("a pipe").read_to_string(&mut said).expect("the checker's words");
        assert!(self.0.wait().expect("a child").success(), "{said}");
        said.trim().to_owned()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The guest checks its memory, a disk without a page cache, and a stream; it counts, and answers.
#[test]
fn between_two_networks_connections_and_consoles_survive() {
    let qemus = qemus();
    needs_root("a network namespace");
    let network = Network::new().or_skip(Reason::Netns);
    let moves: u32 = std::env::var("VMEMD_MOVES").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let memory = std::env::var("VMEMD_MOVE_MEMORY").unwrap_or("256M".to_owned());
    let checked = memory.parse::<Size>().expect("a size").bytes() / 4;
    for (qemu, aio) in qemus.into_iter().zip(["native", "io_uring"]) {
        let [mut here, mut there] =
            [0, 1].map(|side| Host::within(["qnet-a", "qnet-b"][side], &network.namespaces[side]));
        let [a, b] = Network::TAPS;
        let listen = Network::HOSTS.map(|host| format!("{host}:0"));
        let certificates = here.pki("pki", &Network::HOSTS);
        let tls = [0, 1].map(|side| ["--tls", certificates[side].as_str()]);
        let (_here_daemon, here_address) =
            here.start_qemu_daemon(&listen[0], &memory, &rule("tap", b, a), &tls[0]);
        let (_there_daemon, there_address) =
            there.start_qemu_daemon(&listen[1], &memory, &rule("tap", a, b), &tls[1]);
        let netdev = format!("tap,id=net,ifname={a},script=no,downscript=no");
        let machine = Machine::new(&memory).ip(&format!("{}/24", Network::GUEST)).run(&format!(
            "checker echo 7001 & checker stream 7002 & checker disk /dev/vda 1000000 & checker beat & \
                 checker memory {checked} 100000"
        ));
        let image = here.root.join("image").display().to_string();
        on_host(&["image", &image, "80M"]);
        let drive = format!("file={image},format=raw,if=none,id=disk,cache=none,aio={aio}");
        let net = ["-netdev", &netdev, "-device", "virtio-net-pci,netdev=net,romfile="];
        let disk = ["-drive", &drive, "-device", "virtio-blk-pci,drive=disk"];
        let guest = start(&here, &qemu, &machine, &[net, disk].concat());
        guest.wait_for("checker echo listening", BOOT);
        guest.wait_for("checker stream listening", BOOT);
        let chat = Chat::start(network.connect(&format!("{}:7001", Network::GUEST)));
        let stream = Stream::start(&network, "7002");
        guest.wait_for("checker memory round=1", BOOT);
        for _ in 0..moves {
            let pid = here.stat("db").expect("it runs")["pid"].as_u64().expect("a number") as u32;
            migrate_by(&here, &there_address, &tls[0]);
            let left = runs_on(&there, &guest);
            gone(pid);
            migrate_by(&there, &here_address, &tls[1]);
            runs_on(&here, &guest);
            gone(left);
        }
        for job in ["checker disk pieces=", "checker stream bytes="] {
            wait_more(&guest, job, 1);
        }
        let (lines, longest) = chat.end();
        eprintln!("QEMU {}: {lines} lines over one connection, the longest took {longest:?}", qemu.version);
        eprintln!("{}", stream.end());
        checks_on(&guest);
        let last = |words: &str| guest.lines().into_iter().rfind(|line| line.starts_with(words));
        eprintln!("{}", last("checker disk pieces=").unwrap_or_default());
        assert!(lines > 10 * u64::from(moves), "{lines} lines");
        let stat = here.stat("db").expect("it runs");
        assert_eq!(stat["arrival"]["pageins_during"], 0, "{stat}");
        stop(&here);
        wait_for("the VM to end", || here.sockets().is_empty().then_some(()));
    }
}
