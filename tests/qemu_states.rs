//! vmemd tells what a QEMU's machine does as QEMU does, and says so when a guest ends in the middle of a move.
//!
//! The guests here are QEMU's firmware: what a kernel would ask of the machine, a test writes to its ports by QEMU's
//! monitor.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod proxy;
mod qemu;

use std::process::Command;
use std::time::{Duration, Instant};

use common::{Host, Running, signal, wait_for, wait_said};
use proxy::{After, At, Plan, Proxy, Strike, Word};
use qemu::{BOOT, Guest, Monitor, Qemu, qemus};
use serde_json::{Value, json};

/// Longest time until a guest's shutdown is told: less than any of vmemd's limits, and enough for a busy machine.
const PROMPT: Duration = Duration::from_secs(15);
/// Ports of the machine `pc`: its power management's control, with what is written to it; the keyboard's reset; a
/// paravirtual panic.
const SLEEP: &str = "o/h 0x604 0x2400";
const POWER_OFF: &str = "o/h 0x604 0x2000";
const RESET: &str = "o/b 0x64 0xfe";
const PANIC: &str = "o/b 0x505 1";

impl Monitor {
    /// Writes to a port until the firmware has set up what is behind it.
    fn human_until(&mut self, line: &str, state: &str) {
        wait_for(state, || {
            assert_eq!(self.human(line), "", "{line}");
            (self.ask("query-status", json!({}))["status"] == state).then_some(())
        });
    }

    /// Waits until the firmware has set up the ports that a test writes to.
    fn waits_for_firmware(&mut self) {
        wait_for("the firmware", || self.human("i/h 0x604").contains("= 0x0000").then_some(()));
    }

    /// Has the guest do something that ends QEMU, and returns when QEMU has said that it ends.
    fn ends_by(&mut self, how: &How) {
        match how {
            How::Port(line) => {
                self.says("human-monitor-command", json!({ "command-line": line }));
            }
            How::Command(command) => {
                self.says(command, json!({}));
            }
            How::Signal(number, pid) => return signal(*pid, *number),
        }
        self.hears("SHUTDOWN");
    }
}

#[derive(Clone, Copy, Debug)]
enum How {
    Port(&'static str),
    Command(&'static str),
    Signal(i32, u32),
}

/// A VM with the firmware as its guest.
struct Vm<'a> {
    host: &'a Host,
    guest: Guest,
}

impl Vm<'_> {
    fn command(host: &Host, qemu: &Qemu, verb: &str, more: &[&str]) -> Command {
        let (store, monitor) = (host.store(), host.root.join("monitor"));
        let mut command = host.command(&[verb, "--name", "vm", "--ram", "32M", "--store", &store, "--"]);
        command.arg(&qemu.binary).args([
            "-accel",
            "tcg",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ]);
        command.args(["-machine", "pc", "-m", "64M", "-device", "pvpanic", "-qmp"]);
        command.arg(format!("unix:{},server=on,wait=off", monitor.display())).args(more);
        command
    }

    fn start<'a>(host: &'a Host, qemu: &Qemu, more: &[&str]) -> (Vm<'a>, Monitor) {
        let vm = Vm { host, guest: Guest::start(Vm::command(host, qemu, "run", more)) };
        let monitor = Monitor::connect(&host.root.join("monitor"));
        host.wait_stat("vm", "its set-up", |stat| stat["state"] != "arriving");
        (vm, monitor)
    }

    /// `stat` and `list` say that it does this, for that reason, and what QEMU calls it.
    fn does(&self, state: &str, run_state: &str, reason: Option<&str>) {
        let fits = |stat: &Value| stat["state"] == state && stat["run_state"] == run_state;
        let stat = self.host.wait_stat("vm", state, fits);
        let why = stat["reason"].as_str().unwrap_or_default();
        assert_eq!(why.is_empty(), reason.is_none(), "{stat}");
        assert!(why.contains(reason.unwrap_or_default()), "{stat}");
        let said = self.host.vmemd(&["stat", "vm"]);
        let first = said.out.lines().next().unwrap_or_default();
        let expected = if why.is_empty() { state.to_owned() } else { format!("{state}: {why}") };
        assert!(first.contains(&expected), "{first}");
        assert_eq!(self.host.vmemd(&["list", "--json"]).json()[0]["state"], state);
    }

    fn says(&self, verb: &str, text: &str) {
        let said = self.host.vmemd(&[verb, "vm"]);
        assert!(said.code == 0 && said.out.contains(text), "{text}: {said:?}");
    }

    fn refuses(&self, verb: &[&str], code: i32, says: &[&str]) {
        self.host.vmemd(&[&verb[..1], &["vm"], &verb[1..]].concat()).fails(code, says);
    }

    fn stop(mut self) {
        assert_eq!(self.host.vmemd(&["stop", "vm"]).code, 0);
        self.guest.wait_end(BOOT);
        self.host.assert_clean();
    }
}

#[test]
fn whoever_stops_a_machine_or_lets_it_go_on_its_state_is_told() {
    for qemu in qemus() {
        let host = Host::new("states-paused");
        let (vm, mut monitor) = Vm::start(&host, &qemu, &["-S"]);
        vm.does("paused", "prelaunch", Some("started with -S"));
        vm.says("pause", "vm is paused already: it was started with -S");
        vm.says("resume", "vm runs\n");
        vm.does("running", "running", None);
        vm.says("resume", "vm runs already");
        // By its own monitor.
        assert_eq!(monitor.human("stop"), "");
        vm.does("paused", "paused", Some("by a monitor of its QEMU"));
        vm.says("pause", "vm is paused already: by a monitor of its QEMU");
        assert_eq!(monitor.human("cont"), "");
        vm.does("running", "running", None);
        // By vmemd, and let go on past it.
        vm.says("pause", "vm is paused\n");
        vm.does("paused", "paused", Some("by `vmemd pause`"));
        vm.says("pause", "vm is paused already: by `vmemd pause`");
        assert_eq!(monitor.human("cont"), "");
        vm.does("running", "running", None);
        assert_eq!(monitor.human("stop"), "");
        vm.says("resume", "vm runs\n");
        vm.does("running", "running", None);
        vm.stop();
    }
}

/// Somebody else adds `-incoming` to what `qemu-args` prints, as libvirt does when it restores a domain.
#[test]
fn a_machine_that_waits_for_its_state_is_not_said_to_run() {
    for qemu in qemus() {
        let host = Host::new("states-incoming");
        let said = Vm::command(&host, &qemu, "qemu-args", &[]).output().expect("vmemd runs");
        let line = String::from_utf8(said.stdout).expect("a line");
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(format!("exec env {} -incoming defer \"$@\"", line.trim())).arg("sh");
        let vm = Vm { host: &host, guest: Guest::start(shell) };
        vm.does("incoming", "inmigrate", Some("waits for an incoming migration"));
        vm.refuses(&["resume"], 4, &["waits for an incoming migration"]);
        vm.does("incoming", "inmigrate", Some("waits for an incoming migration"));
        vm.refuses(&["migrate", "--to", "127.0.0.1:1"], 9, &["cannot move", "incoming migration"]);
        vm.says("pause", "vm stays paused when it has come");
        vm.stop();
    }
}

#[test]
fn a_guest_that_sleeps_has_shut_down_or_failed_is_told_as_such() {
    for qemu in qemus() {
        let host = Host::new("states-guest");
        let disk = "driver=blkdebug,node-name=disk,image.driver=null-co,image.size=1048576,\
                    inject-error.0.event=none,inject-error.0.iotype=read";
        let device = "virtio-blk-pci,drive=disk,rerror=stop";
        let (vm, _monitor) = Vm::start(&host, &qemu, &["-blockdev", disk, "-device", device]);
        // The firmware reads the disk, to start from it.
        vm.does("failed", "io-error", Some("a disk of the guest failed"));
        vm.refuses(&["migrate", "--to", "127.0.0.1:1"], 9, &["cannot move", "a disk of the guest failed"]);
        // It tries again, and fails again.
        vm.refuses(&["resume"], 7, &["a disk of the guest failed"]);
        vm.does("failed", "io-error", Some("a disk of the guest failed"));
        vm.stop();

        let (vm, mut monitor) = Vm::start(&host, &qemu, &[]);
        monitor.human_until(SLEEP, "suspended");
        vm.does("suspended", "suspended", Some("sleeps"));
        for verb in ["pause", "resume"] {
            vm.refuses(&[verb], 4, &["sleeps (suspend to RAM)", "system_wakeup"]);
        }
        vm.refuses(&["migrate", "--to", "127.0.0.1:1"], 9, &["cannot move", "sleeps (suspend to RAM)"]);
        monitor.ask("system_wakeup", json!({}));
        vm.does("running", "running", None);
        vm.stop();

        let (vm, mut monitor) = Vm::start(&host, &qemu, &["-no-shutdown"]);
        monitor.human_until(POWER_OFF, "shutdown");
        vm.does("shutdown", "shutdown", Some("has shut down"));
        vm.refuses(&["resume"], 4, &["has shut down"]);
        vm.refuses(&["migrate", "--to", "127.0.0.1:1"], 9, &["cannot move", "has shut down"]);
        vm.stop();

        let (vm, mut monitor) = Vm::start(&host, &qemu, &["-action", "panic=pause"]);
        assert_eq!(monitor.human(PANIC), "");
        vm.does("failed", "guest-panicked", Some("the guest panicked"));
        vm.refuses(&["resume"], 4, &["the guest panicked"]);
        vm.refuses(&["pause"], 7, &["the guest panicked"]);
        vm.refuses(&["migrate", "--to", "127.0.0.1:1"], 9, &["cannot move", "the guest panicked"]);
        vm.stop();
    }
}

/// A daemon that takes that host's VMs, and its address.
fn serve(host: &mut Host, from: &Host) -> (Running, String) {
    let [theirs, ours] = [from, &*host].map(|host| host.root.join("monitor").display().to_string());
    let rule = format!("[[map]]\nkind = \"path\"\nfrom = \"{theirs}\"\nto = \"{ours}\"\n");
    host.start_qemu_daemon("127.0.0.1:0", "192M", &rule, &[])
}

/// Moves the VM, and calls `then` when that message is on its way. Returns what `migrate` said, the time that it took
/// from then on, and the cable.
fn moved_while(
    host: &Host,
    address: &str,
    word: Word,
    then: impl FnOnce() + Send + 'static,
) -> (common::Said, Duration, Proxy) {
    let proxy = Proxy::start(address);
    let (struck, when) = std::sync::mpsc::channel();
    let (ended, end) = std::sync::mpsc::channel::<()>();
    let mut then = Some(then);
    let strike = move || {
        let _ = struck.send(Instant::now());
        if let Some(then) = then.take() {
            then();
        }
        // A VM that stands still is complete at the target in a moment: the source must know by then that it has ended.
        if matches!(word, Word::State | Word::Prepared) {
            let _ = end.recv_timeout(PROMPT);
        }
    };
    proxy.plan(Plan {
        at: At::Word(word, 1),
        strike: Strike::Kill,
        after: After::Open,
        then: Box::new(strike),
    });
    let said = host.vmemd(&["migrate", "vm", "--to", &proxy.address]);
    let began = when.try_recv().unwrap_or_else(|_| panic!("{word:?} was not sent: {said:?}"));
    drop(ended);
    (said, began.elapsed(), proxy)
}

/// Its name, QEMU's further words, when and how it ends; the exit code, and what is said.
type Case = (&'static str, &'static [&'static str], Word, How, i32, &'static str);

#[test]
fn a_guest_that_ends_in_the_middle_of_a_move_is_told_as_such() {
    for qemu in qemus() {
        let (host, mut there) = (Host::new("states-end"), Host::new("states-end-there"));
        let (daemon, address) = serve(&mut there, &host);
        let name = |case: &str| format!("QEMU {}, {case}", qemu.version);
        let cases: [Case; 9] = [
            ("connecting", &[], Word::Session, How::Port(POWER_OFF), 4, "the guest shut down"),
            ("copying", &[], Word::RoundEnd, How::Port(POWER_OFF), 4, "the guest shut down"),
            (
                "reboot",
                &["-no-reboot"],
                Word::RoundEnd,
                How::Port(RESET),
                4,
                "the guest rebooted, and its QEMU has -no-reboot",
            ),
            ("panic", &[], Word::RoundEnd, How::Port(PANIC), 7, "the guest panicked"),
            ("quit", &[], Word::RoundEnd, How::Command("quit"), 4, "its QEMU was told to quit"),
            ("quit, standing still", &[], Word::State, How::Command("quit"), 4, "its QEMU was told to quit"),
            (
                "quit, complete there",
                &[],
                Word::Prepared,
                How::Command("quit"),
                4,
                "its QEMU was told to quit",
            ),
            ("SIGTERM", &[], Word::RoundEnd, How::Signal(libc::SIGTERM, 0), 4, "a signal ended its QEMU"),
            (
                "SIGABRT",
                &[],
                Word::RoundEnd,
                How::Signal(libc::SIGABRT, 0),
                7,
                "ended while it was moving (it was killed, or crashed",
            ),
        ];
        for (case, more, word, how, code, says) in cases {
            let (mut vm, mut monitor) = Vm::start(&host, &qemu, more);
            monitor.waits_for_firmware();
            let pid = vm.guest.pid();
            let how = match how {
                How::Signal(number, _) => How::Signal(number, pid),
                how => how,
            };
            // The source's last word is on its way still: the cable stays until it has come.
            let (said, took, cable) = moved_while(&host, &address, word, move || {
                monitor.ends_by(&how);
                if let How::Signal(..) = how {
                    // The monitor's end is QEMU's.
                    let mut rest = Vec::new();
                    let _ = std::io::Read::read_to_end(&mut monitor.0, &mut rest);
                }
            });
            eprintln!("{}: {took:?}: {}", name(case), said.err.trim());
            said.fails(code, &[says]);
            let told = if code == 7 && case == "SIGABRT" {
                "nothing is left to move"
            } else {
                "while it was moving; nothing is left to move"
            };
            assert!(said.err.contains(told), "{}: {said:?}", name(case));
            assert!(took < PROMPT, "{}: it took {took:?}", name(case));
            vm.guest.wait_end(BOOT);
            if case != "SIGABRT" {
                wait_said(&format!("{says} while it was moving"), || vm.guest.log());
            }
            drop(vm);
            // Nothing of it is left on either side, and the target knows why.
            assert!(host.names().is_empty(), "{}", name(case));
            wait_for("the target to give up", || there.names().is_empty().then_some(()));
            drop(cable);
            host.assert_clean();
            there.assert_clean_but(&[daemon.pid()]);
            let log = there.root.join("vm.log");
            if !matches!(word, Word::Session) {
                // Of a process that was killed there is no last word.
                let told = match case {
                    "SIGABRT" => "the link to the source broke".to_owned(),
                    _ => format!("the source gave up: {says} while it was moving"),
                };
                eprintln!("{}: the target is to say {told:?}", name(case));
                let target = || std::fs::read_to_string(&log).unwrap_or_default();
                // The words are in one line.
                let target = wait_said(&told, target);
                assert!(target.contains("\"vm\" did not arrive"), "{}: {target}", name(case));
            }
            let _ = std::fs::remove_file(&log);
        }
    }
}

/// From the commit on the target has the VM: the end of the source's QEMU is no loss any more.
#[test]
fn a_qemu_that_ends_when_its_vm_has_been_handed_over_is_no_failure() {
    for qemu in qemus() {
        let (host, mut there) = (Host::new("states-late"), Host::new("states-late-there"));
        let (daemon, address) = serve(&mut there, &host);
        let (mut vm, mut monitor) = Vm::start(&host, &qemu, &[]);
        let (said, _, _cable) =
            moved_while(&host, &address, Word::Commit, move || monitor.ends_by(&How::Command("quit")));
        assert!(said.code == 0 && said.out.contains("vm moved to"), "{said:?}");
        vm.guest.wait_end(BOOT);
        there.wait_state("vm", "running");
        assert_eq!(there.vmemd(&["stop", "vm"]).code, 0);
        host.assert_clean();
        there.assert_clean_but(&[daemon.pid()]);
    }
}

/// A guest that reboots moves on. One that has failed, has shut down or sleeps stays, with the exit code that it has
/// before a byte moves (what has failed is told in the middle, not at the end).
#[test]
fn a_guest_that_reboots_moves_and_one_that_can_not_as_it_is_stays() {
    for qemu in qemus() {
        let (host, mut there) = (Host::new("states-stay"), Host::new("states-stay-there"));
        let (daemon, address) = serve(&mut there, &host);
        let (mut vm, mut monitor) = Vm::start(&host, &qemu, &[]);
        let (said, _, _cable) = moved_while(&host, &address, Word::RoundEnd, move || {
            monitor.ask("system_reset", json!({}));
            monitor.hears("RESET");
        });
        assert!(said.code == 0 && said.out.contains("vm moved to"), "{said:?}");
        vm.guest.wait_end(BOOT);
        there.wait_state("vm", "running");
        assert_eq!(there.vmemd(&["stop", "vm"]).code, 0);
        there.assert_clean_but(&[daemon.pid()]);

        for (more, port, event, says) in [
            (&["-action", "panic=pause"][..], PANIC, "STOP", ["the guest panicked", "stays here, failed"]),
            (&["-no-shutdown"], POWER_OFF, "STOP", ["the guest has shut down", "stays here, shut down"]),
            (&[], SLEEP, "SUSPEND", ["sleeps (suspend to RAM)", "runs on here"]),
        ] {
            let (vm, mut monitor) = Vm::start(&host, &qemu, more);
            monitor.waits_for_firmware();
            let (said, took, _cable) = moved_while(&host, &address, Word::RoundEnd, move || {
                monitor.says("human-monitor-command", json!({ "command-line": port }));
                monitor.hears(event);
            });
            said.fails(9, &["cannot move: ", says[0], &format!("\"vm\" {}", says[1])]);
            assert!(took < PROMPT, "it took {took:?}");
            there.assert_clean_but(&[daemon.pid()]);
            vm.stop();
        }
    }
}

/// A machine arrives running or paused, as vmemd, its monitor or its command line had left it.
#[test]
fn a_machine_arrives_as_it_was_left_by_whoever_had_it() {
    for qemu in qemus() {
        let (host, mut there) = (Host::new("states-was"), Host::new("states-was-there"));
        let (daemon, address) = serve(&mut there, &host);
        for (case, more, reason) in [
            ("never started", &["-S"][..], Some("started with -S and has not run yet")),
            ("stopped in the middle", &[], Some("it was paused when it came")),
            ("paused, and let go on past vmemd", &[], None),
        ] {
            let (mut vm, mut monitor) = Vm::start(&host, &qemu, more);
            let mut in_the_middle = None;
            match case {
                "stopped in the middle" => in_the_middle = Some("stop"),
                "paused, and let go on past vmemd" => {
                    vm.says("pause", "vm is paused\n");
                    assert_eq!(monitor.human("cont"), "");
                }
                _ => {}
            }
            let (said, _, _cable) = moved_while(&host, &address, Word::RoundEnd, move || {
                in_the_middle.into_iter().for_each(|line| assert_eq!(monitor.human(line), ""));
            });
            assert_eq!(said.code, 0, "{case}: {said:?}");
            vm.guest.wait_end(BOOT);
            let stat = there.wait_state("vm", if reason.is_some() { "paused" } else { "running" });
            let why = stat["reason"].as_str();
            assert_eq!(why.is_some(), reason.is_some(), "{case}: {stat}");
            assert!(why.unwrap_or_default().contains(reason.unwrap_or_default()), "{case}: {stat}");
            let resumed = there.vmemd(&["resume", "vm"]);
            let says = if reason.is_some() { "vm runs\n" } else { "vm runs already" };
            assert!(resumed.code == 0 && resumed.out.contains(says), "{case}: {resumed:?}");
            there.wait_state("vm", "running");
            assert_eq!(there.vmemd(&["stop", "vm"]).code, 0);
            there.assert_clean_but(&[daemon.pid()]);
            host.assert_clean();
        }
    }
}
