//! Stock QEMUs with vmemd's memory: guests that check themselves while their memory comes and goes.
//!
//! `VMEMD_LONG=1` makes every test as long as `docs/qemu.md` says; without it they take the shortest time that can
//! show a fault.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod qemu;

use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::Host;
use qemu::{BOOT, Guest, Machine, Qemu, field, free_port, on_host, qemus};
use testkit::wait_until;
use vmprocess::control::client::{ACTION_TIMEOUT, VmClient};
use vmprocess::control::protocol::Request;
use vmprocess::control::rundir::RunDir;
use vmprocess::size::Size;

/// How long a guest's job may take on a slow, busy machine.
const JOB: Duration = Duration::from_secs(400);
/// Time between two changes of a budget, as a person could make them.
const CHANGE_EVERY: Duration = Duration::from_secs(1);
const MIB: u64 = 1 << 20;

fn long() -> bool {
    std::env::var_os("VMEMD_LONG").is_some()
}

/// `vmemd run` with that QEMU.
fn run(host: &Host, qemu: &Qemu, ram: &str, machine: &Machine, devices: &[&str]) -> Guest {
    let mut command = host.command(&["run", "--name", "vm", "--ram", ram, "--store", &host.store(), "--"]);
    command.arg(&qemu.binary).args(machine.args()).args(devices);
    Guest::start(command)
}

/// Every round of the memory checker was right.
fn assert_rounds(guest: &Guest, rounds: usize) {
    let lines = guest.lines();
    let said: Vec<_> = lines.iter().filter(|line| line.starts_with("checker memory round=")).collect();
    assert_eq!(said.len(), rounds, "{lines:?}");
    for line in said {
        assert_eq!(field::<u64>(line, "mismatched"), 0, "{line}");
    }
}

/// Sets the VM's budget again and again to one after the other of these, waiting `pause` in between, until dropped.
struct Squeezer {
    stop: std::sync::Arc<AtomicBool>,
    changes: std::sync::Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Squeezer {
    fn start(host: &Host, budgets: &[u64], pause: Duration) -> Squeezer {
        let dir = RunDir::open(&host.run_dir()).expect("the run directory");
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let changes = std::sync::Arc::new(AtomicU64::new(0));
        let (stopped, count, budgets) = (stop.clone(), changes.clone(), budgets.to_vec());
        let thread = std::thread::spawn(move || {
            let mut vm = VmClient::connect(&dir, "vm").expect("the VM's control socket");
            for ram_bytes in budgets.iter().copied().cycle() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                vm.ask(&Request::SetRam { ram_bytes }, ACTION_TIMEOUT).expect("a budget that can be");
                count.fetch_add(1, Ordering::SeqCst);
                std::thread::park_timeout(pause);
            }
        });
        Squeezer { stop, changes, thread: Some(thread) }
    }

    /// The number of changes by now.
    fn so_far(&self) -> u64 {
        self.changes.load(Ordering::SeqCst)
    }

    /// Ends the changes, and returns how many there were.
    fn end(mut self) -> u64 {
        self.join();
        self.changes.load(Ordering::SeqCst)
    }

    fn join(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the budget could not be changed");
        }
    }
}

impl Drop for Squeezer {
    fn drop(&mut self) {
        self.join();
    }
}

#[test]
fn memory_is_right_in_a_part_of_its_ram() {
    let versions = qemus();
    for (nth, qemu) in versions.iter().enumerate() {
        // Between them the versions see both sizes; in a long run, each does.
        let rams = if long() { vec!["512M", "256M"] } else { vec![["256M", "512M"][nth % 2]] };
        for ram in rams {
            let host = Host::new("qemu-part");
            let machine = Machine::new("1G").run("checker memory 700M 4; sleep 60");
            let mut guest = run(&host, qemu, ram, &machine, &[]);
            let done = guest.wait_for("checker memory done", BOOT + JOB);
            assert_rounds(&guest, 4);
            let stat = host.stat("vm").expect("its stat");
            eprintln!("QEMU {} with {ram}: {done}; faults {}", qemu.version, stat["faults"]);
            assert_eq!(stat["state"], "running");
            let budget = stat["ram_budget_bytes"].as_u64();
            assert_eq!(budget, Some(ram.parse::<Size>().unwrap().bytes()));
            assert!(stat["resident_bytes"].as_u64() <= budget, "{stat}");
            assert!(stat["faults"]["store"].as_u64() > Some(0), "it never needed the store: {stat}");
            assert_eq!(host.vmemd(&["stop", "vm"]).code, 0);
            guest.wait_end(JOB);
            host.assert_clean();
        }
    }
}

#[test]
fn memory_is_right_while_its_ram_changes() {
    let versions = qemus();
    let (changes, versions) =
        if long() { (60, &versions[..]) } else { (8, &versions[..versions.len().min(1)]) };
    for qemu in versions {
        let host = Host::new("qemu-change");
        let job = "checker memory 400M 1000000";
        let guest = run(&host, qemu, "512M", &Machine::new("640M").run(job), &[]);
        guest.wait_for("checker memory", BOOT);
        let squeezer =
            Squeezer::start(&host, &[128 * MIB, 512 * MIB, 64 * MIB, 256 * MIB, 640 * MIB], CHANGE_EVERY);
        // Each takes as long as its pages need to leave, however slow the store is.
        wait_until(
            JOB,
            || format!("{changes} changes of its RAM"),
            || (squeezer.so_far() >= changes).then_some(()),
        );
        let rounds = || {
            let lines = guest.lines().into_iter().filter(|line| line.starts_with("checker memory round="));
            lines.inspect(|line| assert_eq!(field::<u64>(line, "mismatched"), 0, "{line}")).count()
        };
        // The round under way began before the last change.
        let goal = rounds() + 2;
        wait_until(JOB, || "whole rounds", || (rounds() >= goal).then_some(()));
        eprintln!("QEMU {}: {goal} rounds; {} changes of its RAM", qemu.version, squeezer.end());
    }
}

/// A device that reads into memory while every page of it leaves as fast as it can.
#[test]
fn what_a_disk_reads_is_right_while_memory_leaves() {
    let versions = qemus();
    let pieces = if long() { 200 } else { 12 };
    let directory = qemu::directory("evicted");
    let image = directory.join("image").display().to_string();
    on_host(&["image", &image, "256M"]);
    for (nth, aio) in ["threads", "native", "io_uring"].into_iter().enumerate() {
        let chosen =
            if long() { &versions[..] } else { std::slice::from_ref(&versions[nth % versions.len()]) };
        for qemu in chosen {
            let host = Host::new("qemu-disk");
            let drive = format!("file={image},format=raw,if=none,id=disk,cache=none,aio={aio}");
            let machine = Machine::new("256M").run(&format!("checker disk /dev/vda {pieces}"));
            let devices = ["-drive", &drive, "-device", "virtio-blk-pci,drive=disk"];
            let guest = run(&host, qemu, "256M", &machine, &devices);
            guest.wait_for("init ready", BOOT);
            let squeezer = Squeezer::start(&host, &[16 * MIB, 256 * MIB], Duration::ZERO);
            let done = guest.wait_for("checker disk done", BOOT + JOB);
            let evict = host.stat("vm").expect("it runs")["evict"].clone();
            eprintln!(
                "QEMU {}, aio={aio}: {done}; {} changes, evicted {evict}",
                qemu.version,
                squeezer.end()
            );
            let found = (field::<u64>(&done, "pieces"), field::<u64>(&done, "mismatched"));
            assert_eq!(found, (pieces, 0), "{done}");
            assert!(evict["written"].as_u64() > Some(0), "no memory left: {evict}");
        }
    }
    std::fs::remove_dir_all(&directory).expect("the test's directory");
}

#[test]
fn what_the_network_brings_is_right_while_memory_leaves() {
    let seconds = if long() { "60" } else { "4" };
    for qemu in qemus().iter().take(if long() { 2 } else { 1 }) {
        let host = Host::new("qemu-net");
        let port = free_port();
        let netdev = format!("user,id=net,hostfwd=tcp:127.0.0.1:{port}-:7000");
        let devices = ["-netdev", &netdev, "-device", "virtio-net-pci,netdev=net,romfile="];
        let machine = Machine::new("256M").ip("10.0.2.15/24").run("checker stream 7000");
        let guest = run(&host, qemu, "256M", &machine, &devices);
        guest.wait_for("checker stream listening", BOOT);
        let squeezer = Squeezer::start(&host, &[16 * MIB, 256 * MIB], Duration::ZERO);
        let sent = on_host(&["send", "127.0.0.1", &port.to_string(), seconds]);
        let done = guest.wait_for("checker stream done", JOB);
        eprintln!("QEMU {}: {done}; {} changes of its RAM", qemu.version, squeezer.end());
        assert_eq!(field::<u64>(&done, "bytes"), field::<u64>(&sent, "bytes"), "{done}, {sent}");
        assert_eq!(field::<u64>(&done, "mismatched"), 0, "{done}");
    }
}

/// A tool that starts QEMU itself gets the same by `qemu-args`.
#[test]
fn arguments_for_others_start_the_same_vm() {
    for qemu in qemus().iter().take(1) {
        let host = Host::new("qemu-args");
        let binary = qemu.binary.display().to_string();
        let machine = Machine::new("256M").run("checker memory 150M 2");
        let args = machine.args();
        let store = host.store();
        let mut words = vec!["qemu-args", "--name", "vm", "--ram", "64M", "--store", &store, "--", &binary];
        words.extend(args.iter().map(String::as_str));
        let said = host.vmemd(&words);
        assert_eq!(said.code, 0, "{said:?}");
        let mut shell = Command::new("/bin/sh");
        // The console that the harness adds comes behind QEMU's arguments.
        shell.arg("-c").arg(format!("exec env {} \"$@\"", said.out.trim())).arg("sh");
        let guest = Guest::start(shell);
        let done = guest.wait_for("checker memory done", BOOT + JOB);
        assert_eq!(field::<u64>(&done, "mismatched"), 0, "{done}");
        guest.wait_for("init done", JOB);
    }
}

#[test]
fn what_cannot_work_is_refused_before_qemu_starts() {
    for qemu in qemus().iter().take(1) {
        let host = Host::new("qemu-refused");
        let binary = qemu.binary.display().to_string();
        let store = host.store();
        let refused = |words: &[&str], code, says: &[&str]| {
            let mut args = vec!["run", "--name", "vm", "--ram", "64M", "--store", &store, "--", &binary];
            args.extend_from_slice(words);
            let started = Instant::now();
            host.vmemd(&args).fails(code, says);
            assert!(started.elapsed() < BOOT, "refused late");
        };
        refused(&["-m", "256M", "-daemonize"], 2, &["-daemonize"]);
        refused(&["-m", "256M", "-device", "vfio-pci,host=1:0.0"], 2, &["vfio-pci"]);
        refused(&["-m", "256M", "-overcommit", "mem-lock=on"], 2, &["mem-lock"]);
        refused(&["-m", "lots"], 2, &["\"lots\" is not a size"]);
        refused(&["-m", "32M"], 2, &["--ram 64M is more than the VM's memory of 32M"]);
        refused(&["-m", "256M", "-incoming", "tcp:0:1"], 2, &["-incoming"]);
        host.vmemd(&["run", "--name", "vm", "--store", &store, "--", "no-such-qemu"])
            .fails(3, &["no-such-qemu", "install QEMU"]);
        host.vmemd(&["run", "--name", "vm", "--memory", "1G", "--", &binary]).fails(2, &["--memory"]);
        host.assert_clean();
    }
}

/// `vmemd run` becomes QEMU, so a kill of its process is one of QEMU, and nothing is left of it.
#[test]
fn a_killed_qemu_leaves_nothing_behind() {
    for qemu in qemus().iter().take(1) {
        let host = Host::new("qemu-killed");
        let guest = run(&host, qemu, "64M", &Machine::new("256M"), &[]);
        guest.wait_for("init ready", BOOT);
        let stat = host.wait_state("vm", "running");
        assert_eq!(stat["pid"].as_u64(), Some(u64::from(guest.pid())), "`vmemd run` became QEMU");
        common::signal(guest.pid(), libc::SIGKILL);
        common::wait_for("its name to be free", || host.names().is_empty().then_some(()));
        host.assert_clean();
    }
}
