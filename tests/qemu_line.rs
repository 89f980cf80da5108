//! Command lines as people write them, with real QEMUs: sizes, names, sockets. These tests show what
//! `src/qemu/golden_tests.rs` cannot, because that runs no QEMU.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod qemu;

use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use common::{Host, Running, lives, wait_for};
use qemu::{BOOT, Guest, Machine, Monitor, Qemu, field, qemus};
use serde_json::{Value, json};
use testkit::{Reason, skip};

/// The guest beats and checks its memory as long as it lives.
const JOBS: &str = "checker beat & checker memory 120M 100000";
/// What a QEMU needs to have a monitor and nothing else.
const BARE: &str = "-nodefaults -no-user-config -display none -S";

/// A process that does not outlive its test.
struct Process(Child);

impl Process {
    fn start(mut command: Command) -> Process {
        Process(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("it starts"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// `vmemd run` of a QEMU by that name.
fn run(host: &Host, name: &str, ram: Option<&str>) -> Command {
    let mut command = host.command(&["run", "--name", "db", "--store", &host.store()]);
    command.args(ram.into_iter().flat_map(|ram| ["--ram", ram])).args(["--", name]);
    command
}

fn start(host: &Host, qemu: &Qemu, machine: &Machine, more: &[&str]) -> Guest {
    let mut command = run(host, &qemu.binary.display().to_string(), Some("96M"));
    command.args(machine.args()).args(more);
    Guest::start(command)
}

fn serve(host: &mut Host, ram: &str, rules: &str) -> (Running, String) {
    host.start_qemu_daemon("127.0.0.1:0", ram, rules, &[])
}

fn rule(from: &Path, to: &Path) -> String {
    format!("[[map]]\nfrom = \"{}\"\nto = \"{}\"\n", from.display(), to.display())
}

fn migrate(from: &Host, to: &str) {
    let said = from.vmemd(&["migrate", "db", "--to", to]);
    assert_eq!(said.code, 0, "{said:?}");
}

/// Waits for two more rounds of the memory checker, and looks at all of them.
fn checks_on(guest: &Guest) {
    let rounds = || guest.lines().into_iter().filter(|line| line.starts_with("checker memory round="));
    let goal = rounds().count() + 2;
    wait_for("two more rounds", || (rounds().count() >= goal).then_some(()));
    rounds().for_each(|line| assert_eq!(field::<u64>(&line, "mismatched"), 0, "{line}"));
}

fn stop(host: &Host) {
    let said = host.vmemd(&["stop", "db"]);
    assert_eq!(said.code, 0, "{said:?}");
    wait_for("the VM to end", || host.sockets().is_empty().then_some(()));
}

/// What a guest has of RAM, and where, as QEMU says.
fn memory_of(command: Command, monitor: &Path) -> (Value, Vec<String>) {
    let _process = Process::start(command);
    let mut monitor = Monitor::connect(monitor);
    let size = monitor.ask("query-memory-size-summary", json!({}));
    let map = monitor.human("info mtree -f").replace("vmemd-ram0", "pc.ram");
    let ranges = map.lines().filter(|line| line.contains("pc.ram")).map(|line| line.trim().to_owned());
    let mut ranges: Vec<_> = ranges.collect();
    ranges.dedup();
    monitor.ask("quit", json!({}));
    (size, ranges)
}

#[test]
fn a_guest_has_the_memory_that_plain_qemu_gives_it_to_the_byte() {
    for qemu in qemus() {
        let host = Host::new("line-size");
        let path = host.root.join("monitor");
        for memory in [
            "-m 255",
            "-m 2042471k",
            "-m size=100001k",
            "",
            "-m 0",
            "-m 0.2G",
            "-m size=1G,slots=2,maxmem=4G",
        ] {
            let line = format!("{BARE} {memory} -qmp unix:{},server=on,wait=off", path.display());
            let mut plain = Command::new(&qemu.binary);
            plain.args(words(&line));
            let (size, ranges) = memory_of(plain, &path);
            let mut ours = run(&host, &qemu.binary.display().to_string(), None);
            ours.args(words(&line));
            assert_eq!(
                memory_of(ours, &path),
                (size.clone(), ranges.clone()),
                "QEMU {} {memory}",
                qemu.version
            );
            assert!(!ranges.is_empty(), "{ranges:?}");
            eprintln!("QEMU {} {memory}: {size}", qemu.version);
            wait_for("its name to be free", || host.names().is_empty().then_some(()));
        }
        host.assert_clean();
    }
}

#[test]
fn memory_of_an_odd_size_is_kept_and_moves() {
    let numa = "-object memory-backend-ram,id=a,size=101M -numa node,memdev=a -object \
                memory-backend-ram,id=b,size=154M -numa node,memdev=b";
    for qemu in qemus() {
        // The second node begins with a block of its own: 102M, and 154M.
        for (nodes, managed) in [("", 256), (numa, 256)] {
            let (here, mut there) = (Host::new("line-odd"), Host::new("line-odd-there"));
            let (daemon, address) = serve(&mut there, "96M", "");
            let nodes: Vec<_> = nodes.split_whitespace().collect();
            let mut guest = start(&here, &qemu, &Machine::new("255").run(JOBS), &nodes);
            guest.wait_for("checker memory round=1", BOOT);
            checks_on(&guest);
            let stat = here.wait_state("db", "running");
            assert_eq!(stat["memory_bytes"], managed << 20u64, "{stat}");
            assert!(stat["resident_bytes"].as_u64() <= Some(96 << 20), "{stat}");
            migrate(&here, &address);
            assert_eq!(guest.wait_end(BOOT).code(), Some(10), "{}", guest.log());
            there.wait_state("db", "running");
            checks_on(&guest);
            stop(&there);
            there.assert_clean_but(&[daemon.pid()]);
        }
    }
}

#[test]
fn a_machine_smaller_than_the_least_budget_moves_with_that() {
    for qemu in qemus() {
        let (here, mut there) = (Host::new("line-tiny"), Host::new("line-tiny-there"));
        let (daemon, address) = serve(&mut there, "64M", "");
        let mut command = run(&here, &qemu.binary.display().to_string(), None);
        command.args(words(&format!("{BARE} -m 8M")));
        let _process = Process::start(command);
        here.wait_stat("db", "its set-up", |stat| stat["state"] == "paused");
        let with = |ram| here.vmemd(&["migrate", "db", "--to", &address, "--ram", ram]);
        with("17M").fails(2, &["a RAM budget of 17M is above the VM's memory of 8M", "give 16M"]);
        with("15M").fails(6, &["a RAM budget of 15M is below the minimum of 16M"]);
        let said = with("16M");
        assert_eq!(said.code, 0, "{said:?}");
        let stat = there.wait_state("db", "paused");
        assert_eq!(
            (&stat["memory_bytes"], &stat["ram_budget_bytes"]),
            (&json!(8 << 20), &json!(16 << 20)),
            "{stat}"
        );
        stop(&there);
        there.assert_clean_but(&[daemon.pid()]);
    }
}

#[test]
fn a_qemu_that_is_called_kvm_uses_kvm_on_both_hosts() {
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        skip(Reason::Kvm, "KVM is not to be had here");
    }
    for qemu in qemus() {
        let (here, mut there) = (Host::new("line-kvm"), Host::new("line-kvm-there"));
        let link = here.root.join("qemu-kvm");
        let binary = if qemu.binary.is_absolute() {
            qemu.binary.clone()
        } else {
            PathBuf::from("/usr/bin").join(&qemu.binary)
        };
        symlink(&binary, &link).expect("a link");
        let (ours, theirs) = (here.root.join("monitor"), there.root.join("monitor"));
        let line = format!(
            "{BARE} -m 64M -cpu host,-arch-capabilities -qmp unix:{},server=on,wait=off",
            ours.display()
        );
        let is_kvm = |path: &Path| Monitor::connect(path).ask("query-kvm", json!({}))["enabled"] == true;
        let mut plain = Command::new(&link);
        plain.args(words(&line));
        {
            let _plain = Process::start(plain);
            assert!(is_kvm(&ours), "plain QEMU takes KVM by this name");
        }
        let mut command = run(&here, &link.display().to_string(), None);
        command.args(words(&line));
        let process = Process::start(command);
        assert!(is_kvm(&ours), "QEMU {}: emulation instead of KVM", qemu.version);
        let shown = |pid: u64| {
            let all = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).expect("it runs");
            all.split('\0').map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(shown(u64::from(process.0.id()))[0], link.display().to_string());

        let (_daemon, address) = serve(&mut there, "64M", &rule(&ours, &theirs));
        here.wait_stat("db", "a VM", |_| true);
        migrate(&here, &address);
        assert!(is_kvm(&theirs), "at the target");
        let pid = there.wait_stat("db", "its arrival", |stat| stat["state"] != "arriving")["pid"]
            .as_u64()
            .expect("a number");
        let args = shown(pid);
        assert_eq!(args[0], link.display().to_string());
        assert!(
            args.windows(2).any(|pair| pair == ["-accel", "kvm"]),
            "said, not left to its name: {args:?}"
        );
        stop(&there);
        // By its real name it is emulation, as without vmemd; and others are told the name that was given.
        let said = here.vmemd(&[
            "qemu-args",
            "--name",
            "x",
            "--store",
            &here.store(),
            "--",
            &link.display().to_string(),
        ]);
        assert!(said.out.contains(&format!(" {} ", link.display())), "{said:?}");
    }
}

/// A directory with a name so long that no socket in it can be named from the root.
fn long_directory(host: &Host) -> PathBuf {
    let path = host.root.join("a".repeat(100));
    std::fs::create_dir(&path).expect("a directory");
    path
}

#[test]
fn relative_names_stay_where_the_vm_starts_and_are_absolute_elsewhere() {
    for qemu in qemus() {
        let (here, mut there) = (Host::new("line-rel"), Host::new("line-rel-there"));
        let directory = long_directory(&here);
        for name in ["a.img", "b.img", "c.img"] {
            let file = std::fs::File::create(directory.join(name)).expect("an image");
            file.set_len(16 << 20).expect("an image");
        }
        let mut command = run(&here, &qemu.binary.display().to_string(), Some("96M"));
        command.current_dir(&directory).args(Machine::new("256M").run(JOBS).args()).args([
            "-chardev",
            "socket,id=s,path=sock,server=on,wait=off",
            "-blockdev",
            "{'driver':'file','filename':'a.img','node-name':'a'}",
            "-device",
            "{'driver':'virtio-blk-pci','drive':'a'}",
            "-drive",
            "file=json:{'driver':'raw',,'file':{'driver':'file',,'filename':'b.img'}},if=virtio",
            "-drive",
            "file=json:{\"driver\":\"raw\",,\"file.driver\":\"file\",,\"file.filename\":\"c.img\"},if=virtio",
        ]);
        // A daemon's directory is another one.
        let guest = Guest::start(command);
        guest.wait_for("checker memory round=1", BOOT);
        assert!(directory.join("sock").exists());
        let (mut daemon, address) = serve(&mut there, "96M", "");
        let said = here.vmemd(&["migrate", "db", "--to", &address]);
        said.fails(
            6,
            &["is too long for a socket's path", "map it to a shorter name by a rule", "runs on here"],
        );
        daemon.signal(libc::SIGTERM);
        daemon.ends_with(0);
        let near = there.root.join("near");
        std::fs::create_dir(&near).expect("a directory");
        let rules = rule(&directory.join("sock"), &near.join("sock"));
        let (_daemon, address) = serve(&mut there, "96M", &rules);
        migrate(&here, &address);
        there.wait_state("db", "running");
        checks_on(&guest);
        assert!(near.join("sock").exists());
        let pid = there.stat("db").expect("it runs")["pid"].as_u64().expect("a number");
        let open: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .expect("it runs")
            .filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok())
            .collect();
        for name in ["a.img", "b.img", "c.img"] {
            assert!(open.contains(&directory.join(name)), "{name}: {open:?}");
        }
        stop(&there);
    }
}

#[test]
fn descriptors_are_no_names_for_another_host() {
    for qemu in qemus() {
        let (here, mut there) = (Host::new("line-fd"), Host::new("line-fd-there"));
        let image = |name: &str| {
            let path = here.root.join(name);
            let file = std::fs::File::options().read(true).write(true).create_new(true).open(path);
            let file = file.expect("an image");
            file.set_len(16 << 20).expect("an image");
            file
        };
        let (first, second) = (image("first"), image("second"));
        let link = here.root.join("disk.img");
        symlink("/dev/fd/101", &link).expect("a link");
        let mut command = run(&here, &qemu.binary.display().to_string(), Some("96M"));
        command.args(Machine::new("256M").run(JOBS).args()).args([
            "-drive",
            "file=/dev/fd/100,format=raw,if=virtio,file.locking=off",
            "-drive",
            &format!("file={},format=raw,if=virtio,file.locking=off", link.display()),
            "-chardev",
            "file,id=out,path=/dev/stdout",
            "-fw_cfg",
            "name=opt/x,file=/proc/self/fd/100",
        ]);
        let numbers = [(first.as_raw_fd(), 100), (second.as_raw_fd(), 101)];
        // SAFETY: between fork and exec only async-signal-safe calls are made, which touch no memory.
        unsafe {
            command.pre_exec(move || {
                for (from, to) in numbers {
                    if libc::dup2(from, to) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let guest = Guest::start(command);
        guest.wait_for("checker memory round=1", BOOT);
        let (_daemon, address) = serve(&mut there, "96M", "");
        let said = here.vmemd(&["migrate", "db", "--to", &address]);
        eprintln!("{}", said.err);
        let told = ["/dev/fd/100", "/dev/fd/101", "/dev/stdout", "/proc/self/fd/100"]
            .map(|name| format!("descriptor {name} was given to QEMU by the process that started it"));
        let told: Vec<&str> = told.iter().map(String::as_str).collect();
        said.fails(6, &[&told[..], &["\"db\" runs on here"]].concat());
        assert!(there.names().is_empty(), "nothing was started for it");
        assert_eq!(here.stat("db").expect("it runs")["migration"], Value::Null);
        checks_on(&guest);
    }
}

#[test]
fn a_client_that_connects_again_moves_without_its_server() {
    for qemu in qemus() {
        let (here, mut there) = (Host::new("line-again"), Host::new("line-again-there"));
        let socket = here.root.join("server").display().to_string();
        let old = qemu.version.starts_with('7');
        let again = if old { "reconnect=1" } else { "reconnect-ms=500" };
        let chardev = format!("socket,id=c,path={socket},{again}");
        let serial = format!("unix:{socket},reconnect=1");
        let netdev = format!("stream,id=n,server=off,addr.type=unix,addr.path={socket},reconnect=1");
        let mut more = vec!["-chardev", &chardev, "-monitor", &serial];
        if !old {
            more.extend(["-netdev", &netdev]);
        }
        let guest = start(&here, &qemu, &Machine::new("256M").run(JOBS), &more);
        guest.wait_for("checker memory round=1", BOOT);
        let (_daemon, address) = serve(&mut there, "96M", "");
        migrate(&here, &address);
        there.wait_state("db", "running");
        checks_on(&guest);
        stop(&there);
    }
}

#[test]
fn a_server_waits_for_its_client_where_the_vm_starts_and_not_where_it_arrives() {
    for qemu in qemus() {
        let (here, mut there) = (Host::new("line-wait"), Host::new("line-wait-there"));
        // The first is made before QEMU has memory, the second after.
        let [first, second] = ["first", "second"].map(|name| here.root.join(name));
        let [first_there, second_there] = ["first", "second"].map(|name| there.root.join(name));
        let chardev = format!("socket,id=c,path={},server=on", first.display());
        let monitor = format!("unix:{},server", second.display());
        let guest = start(
            &here,
            &qemu,
            &Machine::new("256M").run(JOBS),
            &["-chardev", &chardev, "-parallel", &monitor],
        );
        let _first = wait_for("the first socket", || UnixStream::connect(&first).ok());
        let _second = wait_for("the second socket", || UnixStream::connect(&second).ok());
        common::wait_said("QEMU waits for a client there", || guest.log());
        guest.wait_for("checker memory round=1", BOOT);
        let rules = rule(&first, &first_there) + &rule(&second, &second_there);
        let (_daemon, address) = serve(&mut there, "96M", &rules);
        migrate(&here, &address);
        there.wait_state("db", "running");
        checks_on(&guest);
        for path in [&first_there, &second_there] {
            UnixStream::connect(path).expect("it takes clients");
        }
        stop(&there);
    }
}

#[test]
fn a_qemu_that_does_not_come_up_is_ended_and_the_reason_told() {
    for qemu in qemus() {
        let (here, mut there) = (Host::new("line-hang"), Host::new("line-hang-there"));
        let out = here.root.join("out");
        let fifo = there.root.join("fifo");
        let made = Command::new("mkfifo").arg(&fifo).status().expect("mkfifo");
        assert!(made.success());
        there.haste = 10;
        // The one hangs before QEMU asks for its memory, the other behind that and before its monitor answers.
        let path = out.display().to_string();
        let guests = [["-chardev", "file,id=f,path="], ["-parallel", "file:"]].map(|[option, value]| {
            let host = Host::new("line-hang-source");
            let guest =
                start(&host, &qemu, &Machine::new("256M").run(JOBS), &[option, &format!("{value}{path}")]);
            (host, guest)
        });
        for (host, guest) in &guests {
            guest.wait_for("checker memory round=1", BOOT);
            let (mut daemon, address) = serve(&mut there, "96M", &rule(&out, &fifo));
            let asked = Instant::now();
            let said = host.vmemd(&["migrate", "db", "--to", &address]);
            eprintln!(
                "QEMU {}: {:?}: {}",
                qemu.version,
                asked.elapsed(),
                said.err.lines().last().unwrap_or_default()
            );
            said.fails(6, &["did not come up within 4.5s, and was ended", "\"db\" runs on here"]);
            wait_for("nothing to be left there", || (there.processes() == [daemon.pid()]).then_some(()));
            there.assert_clean_but(&[daemon.pid()]);
            checks_on(guest);
            // With a reader it would have come: the FIFO was the cause.
            let reader = std::fs::File::options()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&fifo)
                .expect("the FIFO");
            daemon.signal(libc::SIGTERM);
            daemon.ends_with(0);
            there.haste = 1;
            let (_daemon, address) = serve(&mut there, "96M", &rule(&out, &fifo));
            migrate(host, &address);
            let pid = there.wait_state("db", "running")["pid"].as_u64().expect("a number");
            stop(&there);
            wait_for("it to end", || (!lives(pid as u32)).then_some(()));
            drop(reader);
            there.haste = 10;
        }
        drop(here);
    }
}
