//! The cost of vmemd to a QEMU guest whose memory all fits in its RAM, and its gain for one whose memory does not.
//!
//! Measurements, not run by default: `scripts/bench-qemu`. Both sides take turns; medians and ranges are printed with
//! the verdict.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
#[path = "../../tests/qemu/mod.rs"]
mod qemu;

use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Host, needs_root};
use qemu::{BOOT, Guest, Machine, Qemu, field, qemus};
use vmemd_bench::cgroup::MemoryCgroup;
use vmemd_bench::swapfile::SwapFile;

const JOB: Duration = Duration::from_secs(600);
/// Turns of each side.
const TURNS: usize = 5;

/// One figure of several turns.
struct Figure(Vec<f64>);

impl Figure {
    fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    }

    fn shown(&self) -> String {
        let (low, high) =
            self.0.iter().fold((f64::MAX, f64::MIN), |(low, high), x| (low.min(*x), high.max(*x)));
        format!("{:.2} ({low:.2}-{high:.2})", self.median())
    }
}

fn plain(qemu: &Qemu, machine: &Machine) -> Command {
    let mut command = Command::new(&qemu.binary);
    command.args(machine.args());
    command
}

fn managed(host: &Host, qemu: &Qemu, ram: &str, machine: &Machine) -> Command {
    let mut command = host.command(&["run", "--name", "vm", "--ram", ram, "--store", &host.store(), "--"]);
    command.arg(&qemu.binary).args(machine.args());
    command
}

fn verdict(what: &str, demand: &str, met: bool) {
    eprintln!("{what}: demanded {demand}: {}", if met { "met" } else { "MISSED" });
}

/// Everything fits: the guest's own speed, and the time to its shell.
#[test]
#[ignore = "a measurement: scripts/bench-qemu"]
fn cost_when_everything_fits() {
    for qemu in qemus() {
        let machine = Machine::new("512M").run("checker bench 8");
        let [mut boots, mut scores] = [[Vec::new(), Vec::new()], [Vec::new(), Vec::new()]];
        for _ in 0..TURNS {
            for side in 0..2 {
                let host = Host::new("qemu-cost");
                let command =
                    if side == 0 { plain(&qemu, &machine) } else { managed(&host, &qemu, "512M", &machine) };
                let started = Instant::now();
                let guest = Guest::start(command);
                guest.wait_for("init ready", BOOT);
                boots[side].push(started.elapsed().as_secs_f64());
                let line = guest.wait_for("checker bench done", BOOT + JOB);
                scores[side].push(field::<f64>(&line, "score"));
            }
        }
        let [boots, scores] = [boots.map(Figure), scores.map(Figure)];
        eprintln!("QEMU {}, {TURNS} turns: median (range)", qemu.version);
        eprintln!("  score, plain {}, vmemd {}", scores[0].shown(), scores[1].shown());
        eprintln!("  boot to shell, s, plain {}, vmemd {}", boots[0].shown(), boots[1].shown());
        let slower = scores[0].median() / scores[1].median() - 1.0;
        let later = boots[1].median() / boots[0].median() - 1.0;
        verdict(&format!("  slower by {:.1} %", slower * 100.0), "at most 3 %", slower <= 0.03);
        verdict(&format!("  boots later by {:.1} %", later * 100.0), "at most 5 %", later <= 0.05);
    }
}

/// The same of a guest that has arrived by migration, with RAM for all of its memory.
#[test]
#[ignore = "a measurement: scripts/bench-qemu"]
fn cost_after_a_move_when_everything_fits() {
    for qemu in qemus() {
        let machine = Machine::new("512M").run("checker memory 200M 40; checker bench 8");
        let mut scores = [Vec::new(), Vec::new()];
        for _ in 0..TURNS {
            for (side, scores) in scores.iter_mut().enumerate() {
                let (host, mut there) = (Host::new("qemu-moves"), Host::new("qemu-moved"));
                let rules = there.root.join("rules.toml").display().to_string();
                std::fs::write(&rules, "").expect("a file of rules");
                let daemon = there.start_daemon("127.0.0.1:0", "512M", &["--qemu-rules", &rules]);
                let command =
                    if side == 0 { plain(&qemu, &machine) } else { managed(&host, &qemu, "512M", &machine) };
                let guest = Guest::start(command);
                guest.wait_for("checker memory round=1", BOOT);
                if side == 1 {
                    let said = host.vmemd(&["migrate", "vm", "--to", &daemon.1]);
                    assert_eq!(said.code, 0, "{said:?}");
                }
                let line = guest.wait_for("checker bench done", BOOT + JOB);
                scores.push(field::<f64>(&line, "score"));
                if side == 1 {
                    assert_eq!(there.vmemd(&["stop", "vm"]).code, 0);
                }
            }
        }
        let scores = scores.map(Figure);
        eprintln!("QEMU {} behind a move, {TURNS} turns: median (range)", qemu.version);
        eprintln!("  score, plain {}, vmemd {}", scores[0].shown(), scores[1].shown());
        let slower = scores[0].median() / scores[1].median() - 1.0;
        verdict(&format!("  slower by {:.1} %", slower * 100.0), "at most 3 %", slower <= 0.03);
    }
}

/// In half of its memory: vmemd against a memory cgroup with a swap file on the same disk.
#[test]
#[ignore = "a measurement: scripts/bench-qemu"]
fn gain_against_swap_when_half_fits() {
    needs_root("a swap file");
    for qemu in qemus() {
        let machine = Machine::new("1G").run("checker memory 700M 5");
        let [mut swapped, mut managed_us] = [Vec::new(), Vec::new()];
        for _ in 0..TURNS.div_ceil(2) {
            let host = Host::new("qemu-gain");
            let swap_path = host.root.join("store/swap");
            let swap = SwapFile::create(&swap_path, 2 << 30).expect("a swap file");
            let group = MemoryCgroup::create("vmemd-qemu-cost", 512 << 20).expect("a memory cgroup");
            let entrance = group.entrance().expect("a memory cgroup");
            let mut command = plain(&qemu, &machine);
            let fd = entrance.as_raw_fd();
            // SAFETY: between fork and exec only this one async-signal-safe call is made; its buffer is a constant.
            unsafe {
                command.pre_exec(move || match libc::write(fd, c"0".as_ptr().cast(), 1) {
                    1 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                });
            }
            swapped.push(rounds_us(command));
            drop(group);
            drop(swap);
            managed_us.push(rounds_us(managed(&host, &qemu, "512M", &machine)));
        }
        let (swapped, managed_us) = (Figure(swapped), Figure(managed_us));
        eprintln!("QEMU {}: a round over 700M in 512M, s: median (range)", qemu.version);
        eprintln!("  swap {}, vmemd {}", swapped.shown(), managed_us.shown());
        let faster = swapped.median() / managed_us.median();
        verdict(&format!("  {faster:.2} x faster"), "at least 3 x", faster >= 3.0);
    }
}

/// Seconds a round, after the one that touches memory for the first time.
fn rounds_us(command: Command) -> f64 {
    let guest = Guest::start(command);
    let done = guest.wait_for("checker memory done", BOOT + JOB);
    assert_eq!(field::<u64>(&done, "mismatched"), 0, "{done}");
    let lines = guest.lines();
    let rounds = lines.iter().filter(|line| line.starts_with("checker memory round="));
    let us: Vec<f64> = rounds.map(|line| field::<f64>(line, "us")).collect();
    us.iter().sum::<f64>() / us.len() as f64 / 1e6
}
