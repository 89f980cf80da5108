//! At each step of a QEMU VM's hand-over a process that takes part is killed. The VM runs where it ought to, and
//! nothing is left behind.
//!
//! With `VMEMD_LONG=1`, every step and every process; without it, the steps at which it is decided which side has the
//! VM.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod proxy;
mod qemu;

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Host, LOOKS_IN_VAIN, Running, kill, lives, needs_vms, wait_for};
use proxy::{After, At, Plan, Proxy, Strike, Word};
use qemu::{BOOT, Guest, Machine, Qemu, field};
use serde_json::Value;

const JOBS: &str = "checker beat & checker memory 64M 100000";
/// How long a QEMU may take to end on a slow, busy machine.
const END: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Source,
    Target,
    Daemon,
}

/// The steps: the message that has been sent, and not been heard, when the process is killed.
const STEPS: [(&str, Word, usize); 6] = [
    ("the offer is accepted", Word::Accepted, 1),
    ("memory is copied", Word::Pages, 2),
    ("it stands still", Word::State, 1),
    ("its device state is there", Word::Final, 1),
    ("the commit is sent", Word::Commit, 1),
    ("the commit is answered", Word::Running, 1),
];

fn rows(host: &Host) -> Vec<Value> {
    host.vmemd(&["list", "--json"]).json().as_array().expect("a list").clone()
}

fn pid_of(host: &Host) -> u32 {
    host.wait_state("db", "running")["pid"].as_u64().expect("a number") as u32
}

/// The QEMU that arrives there, if there is one yet.
fn arriving(host: &Host) -> Option<u32> {
    let row = rows(host).into_iter().find(|row| row["state"] == "arriving")?;
    Some(row["pid"].as_u64()? as u32)
}

/// Waits for two more rounds of the memory checker, and looks at everything that was printed so far.
fn checks_on(guest: &Guest) {
    let rounds = |lines: &[String]| {
        lines
            .iter()
            .filter(|line| line.starts_with("checker memory round="))
            .map(|line| field::<u64>(line, "mismatched"))
            .collect::<Vec<_>>()
    };
    let goal = rounds(&guest.lines()).len() + 2;
    wait_for("the guest's memory checker", || (rounds(&guest.lines()).len() >= goal).then_some(()));
    let lines = guest.lines();
    assert!(rounds(&lines).iter().all(|mismatched| *mismatched == 0), "{lines:?}");
    let beats = lines.iter().filter(|line| line.starts_with("checker beat"));
    let numbers: Vec<u64> = beats.map(|line| field(line, "number")).collect();
    assert!(numbers.len() > 3 && numbers.iter().copied().eq(0..numbers.len() as u64), "{numbers:?}");
}

/// Two hosts that take QEMU VMs from each other, and a disk that both see.
struct Pair {
    hosts: [Host; 2],
    daemons: [(Running, String); 2],
    disk: String,
}

impl Pair {
    fn new() -> Pair {
        let mut hosts = ["qkill-a", "qkill-b"].map(Host::new);
        let disk = hosts[0].root.join("disk");
        std::fs::File::create(&disk).and_then(|file| file.set_len(16 << 20)).expect("an image");
        let daemons = [0, 1].map(|side| serve(&mut hosts[side]));
        Pair { hosts, daemons, disk: disk.display().to_string() }
    }

    fn boot(&self, qemu: &Qemu) -> Guest {
        let host = &self.hosts[0];
        let mut command =
            host.command(&["run", "--name", "db", "--ram", "128M", "--store", &host.store(), "--"]);
        let drive = format!("file={},format=raw,if=virtio,cache=none", self.disk);
        command.arg(&qemu.binary).args(Machine::new("256M").run(JOBS).args()).args(["-drive", &drive]);
        let guest = Guest::start(command);
        guest.wait_for("checker memory round=1", BOOT);
        guest
    }

    /// Moves the VM away from that side, and kills the victim at that step. Returns the side at which the VM runs
    /// then; none if it runs nowhere.
    fn kill_at(
        &mut self,
        from: usize,
        word: Word,
        number: usize,
        victim: Victim,
        guest: &Guest,
    ) -> Option<usize> {
        let to = 1 - from;
        let (daemon, address) = (self.daemons[to].0.pid(), self.daemons[to].1.clone());
        let source = pid_of(&self.hosts[from]);
        let proxy = Proxy::start(&address);
        let (caught, target) = std::sync::mpsc::channel();
        let (goes_on, told) = std::sync::mpsc::channel::<()>();
        // The proxy holds everything up until the victim is dead.
        let then = move || {
            let _ = caught.send(());
            let _ = told.recv();
        };
        let at = At::Word(word, number);
        proxy.plan(Plan { at, strike: Strike::Kill, after: After::Open, then: Box::new(then) });
        let hosts = &self.hosts;
        let said = std::thread::scope(|scope| {
            let args = ["migrate", "db", "--to", &proxy.address, "--json"];
            let migrating = scope.spawn(move || hosts[from].vmemd(&args));
            target.recv_timeout(common::DEADLINE).expect("it comes to that step");
            match victim {
                Victim::Source => kill(source),
                Victim::Daemon => kill(daemon),
                Victim::Target => kill(arriving_or_running(&hosts[to])),
            }
            drop(goes_on);
            migrating.join().expect("it ends")
        });
        let committed = match victim {
            Victim::Target => proxy.delivered_before(Word::Commit),
            _ => proxy.delivered(Word::Commit),
        };
        let expected = match victim {
            Victim::Source => committed.then_some(to),
            Victim::Target => (!committed).then_some(from),
            Victim::Daemon if said.code == 0 => Some(to),
            Victim::Daemon => Some(from),
        };
        let open = ["arriving", "migrating", "in_doubt", "moved", "unknown"];
        let mut in_vain = 0;
        let found = wait_for("an end of the hand-over", || {
            let found: Vec<(usize, Value)> = [0, 1]
                .into_iter()
                .flat_map(|side| rows(&hosts[side]).into_iter().map(move |row| (side, row)))
                .collect();
            in_vain += u32::from(found.is_empty());
            if found.is_empty() && in_vain < LOOKS_IN_VAIN {
                return None;
            }
            found
                .iter()
                .all(|(_, row)| !open.contains(&row["state"].as_str().expect("a state")))
                .then_some(found)
        });
        let places: Vec<usize> = found.iter().map(|(side, _)| *side).collect();
        assert_eq!(places, Vec::from_iter(expected), "{found:?} {said:?}");
        if let Some(side) = expected {
            assert_eq!(found[0].1["state"], "running", "{found:?}");
            checks_on(guest);
            pid_of(&hosts[side]);
        }
        if victim == Victim::Daemon {
            self.daemons[to] = serve(&mut self.hosts[to]);
        }
        // Both hosts see the disk, so each host's QEMU looks as if it were the other's as well.
        let daemons = self.daemons.each_ref().map(|(daemon, _)| daemon.pid());
        let runs = expected.map(|side| pid_of(&self.hosts[side]));
        for (side, host) in self.hosts.iter().enumerate() {
            let sockets = usize::from(expected == Some(side));
            wait_for("its sockets to go", || (host.sockets().len() == sockets).then_some(()));
            wait_for("processes to end", || {
                host.processes().iter().all(|pid| daemons.contains(pid) || Some(*pid) == runs).then_some(())
            });
        }
        expected
    }
}

fn arriving_or_running(host: &Host) -> u32 {
    // Under neither name for a moment, when it takes its own.
    wait_for("its process", || {
        arriving(host).or_else(|| Some(rows(host).first()?["pid"].as_u64().expect("a number") as u32))
    })
}

fn serve(host: &mut Host) -> (Running, String) {
    host.start_qemu_daemon("127.0.0.1:0", "192M", "", &[])
}

#[test]
fn whoever_is_killed_at_whatever_step_what_ought_to_run_runs() {
    let qemu = Qemu::versions().remove(0);
    needs_vms();
    let long = std::env::var_os("VMEMD_LONG").is_some_and(|value| value != "0");
    let mut pair = Pair::new();
    // The VM that lives, and where.
    let mut living: Option<(Guest, usize)> = None;
    for (step, word, number) in STEPS {
        for victim in [Victim::Daemon, Victim::Target, Victim::Source] {
            // Those after which it is somewhere else than it would be with a mistake.
            let decides = matches!(
                (word, victim),
                (Word::Commit, Victim::Target | Victim::Daemon) | (Word::Running, Victim::Source)
            );
            if !long && !decides {
                continue;
            }
            let (mut guest, from) = living.take().unwrap_or_else(|| (pair.boot(&qemu), 0));
            let place = pair.kill_at(from, word, number, victim, &guest);
            println!("{step}, and the {victim:?} is killed: from {from}, runs at {place:?}");
            match place {
                Some(side) => living = Some((guest, side)),
                None => drop(guest.wait_end(END)),
            }
        }
    }
    if let Some((_guest, side)) = &living {
        assert_eq!(pair.hosts[*side].vmemd(&["stop", "db"]).code, 0);
    }
    for side in [0, 1] {
        let (daemon, _) = &mut pair.daemons[side];
        daemon.signal(libc::SIGTERM);
        daemon.ends_with(0);
        assert!(pair.hosts[side].names().is_empty());
        drop(living.take_if(|_| side == 0));
        pair.hosts[side].assert_clean();
    }
}

/// A VM lives on when the shell in which `vmemd run` was typed is killed, with the process that read its output.
#[test]
fn a_vm_survives_the_shell_that_started_it() {
    let qemu = Qemu::versions().remove(0);
    needs_vms();
    let (here, mut there) = (Host::new("qshell"), Host::new("qshell-there"));
    let (daemon, address) = serve(&mut there);
    let console = qemu::directory("shell").join("console");
    let console = qemu::Console::listen(&console);
    let run = {
        let mut command =
            here.command(&["run", "--name", "db", "--ram", "128M", "--store", &here.store(), "--"]);
        command.arg(&qemu.binary).args(Machine::new("256M").run(JOBS).args()).args(console.args());
        command
    };
    let quoted = |word: &std::ffi::OsStr| format!("'{}'", word.to_string_lossy().replace('\'', "'\\''"));
    let line: Vec<String> = std::iter::once(run.get_program()).chain(run.get_args()).map(quoted).collect();
    let mut shell = Command::new("sh")
        .args(["-c", &format!("{} 2>&1 | cat & wait", line.join(" "))])
        .env("VMEMD_RUN_DIR", here.run_dir())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .expect("a shell");
    let found = console.find(|line| line.starts_with("checker memory round=1"), BOOT);
    assert!(found.is_some(), "{:?}", console.lines());
    let pid = pid_of(&here);
    // The shell and `cat`; what they started stays.
    for other in here.processes().into_iter().filter(|other| *other != pid) {
        kill(other);
    }
    drop(shell.stdout.take());
    kill(shell.id());
    let _ = shell.wait();
    let said = here.vmemd(&["migrate", "db", "--to", &address, "--json"]);
    assert_eq!(said.code, 0, "{said:?}");
    wait_for("the QEMU that it left to end", || (!lives(pid)).then_some(()));
    here.assert_clean();
    pid_of(&there);
    let rounds = |line: &str| line.starts_with("checker memory round=");
    let before = console.lines().iter().filter(|line| rounds(line)).count();
    wait_for("the guest's memory checker", || {
        (console.lines().iter().filter(|line| rounds(line)).count() >= before + 2).then_some(())
    });
    assert!(
        console.lines().iter().filter(|line| rounds(line)).all(|line| field::<u64>(line, "mismatched") == 0)
    );
    assert_eq!(there.vmemd(&["stop", "db"]).code, 0);
    there.assert_clean_but(&[daemon.pid()]);
}
