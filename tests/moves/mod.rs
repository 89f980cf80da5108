//! Guests of every kind, moves of them, and what they miss where they arrive.
//!
//! Judged by the guest's first whole round there: what it uses and is not in RAM has to be read from the store. Pages
//! that are only read count as well.
#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;

use crate::common::{Host, wait_for};
use crate::network::Network;

pub(crate) const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// The promise: so many of a hundred pages that the guest uses are in RAM.
const SHARE_MIN: f64 = 98.0;
/// Shortest time from the beginning of the guest's second round to the move.
const LIFE_MS: u64 = 10_000;
/// The default downtime target, and 30 ms by which it may be missed.
const DOWNTIME_MAX_MS: f64 = 50.0 + 30.0;
/// Bytes a second of the slow disk, each way.
pub(crate) const SLOW_DISK: u64 = 100_000_000;

const PAGING: &str = "reading-paging";

/// Of each VM.
pub(crate) const MEMORY: u64 = 512 * MIB;
pub(crate) const RAM: u64 = 256 * MIB;

fn is_long() -> bool {
    std::env::var_os("VMEMD_LONG").is_some_and(|value| value != "0")
}

/// Guests that use so much, each with its name. The slow ones take 15 s for a round, whatever the size. Those that
/// are scattered use every other page of twice as much, which is more than the RAM. [`PAGING`] has no more RAM where
/// it comes from.
fn guests(working_set: u64) -> [(&'static str, String); 6] {
    let [set, scattered] =
        [format!("{}M", working_set / MIB), format!("{}M,scatter=2", working_set / MIB * 2)];
    let slow = format!("rate={}K", working_set / 15 / 1024);
    [
        ("slow", format!("rewrite:working-set={set},{slow}")),
        ("fast", format!("rewrite:working-set={set},rate=400M")),
        ("reading", format!("read:working-set={set},rate=100M")),
        (PAGING, format!("read:working-set={set},rate=100M")),
        ("slow-scattered", format!("rewrite:working-set={scattered},{slow}")),
        ("fast-scattered", format!("rewrite:working-set={scattered},rate=400M")),
    ]
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Hosts between which VMs move, and where to.
pub(crate) struct Way<'a> {
    pub(crate) here: &'a mut Host,
    pub(crate) there: &'a mut Host,
    pub(crate) to: String,
    pub(crate) plain: bool,
    /// Which guests move, and when.
    pub(crate) those: Those,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Those {
    /// If there is little time those that are simply slow or fast, else all; some time after each has begun its
    /// second round.
    Plain,
    /// The same, with the others if there is little time.
    Others,
    /// Those that are through their working set more than once so soon, that long after they were started.
    Young,
}

/// Moves VMs of each kind, and looks what they miss.
pub(crate) fn moves(way: Way<'_>, what: &str) {
    // 3/4 of the RAM.
    let working_set = RAM / 4 * 3;
    let wanted = working_set / PAGE;
    let [memory, ram] = [MEMORY, RAM].map(|bytes| format!("{}M", bytes / MIB));
    let mut shares: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for _ in 0..if is_long() { 2 } else { 1 } {
        let store = way.here.store();
        let mut guests = guests(working_set).to_vec();
        guests.retain(|(name, _)| match way.those {
            Those::Young => ["fast", "reading", "fast-scattered"].contains(name),
            those => is_long() || ["slow", "fast"].contains(name) == (those == Those::Plain),
        });
        let mut start = |name, guest: &str| {
            let args = ["run", "--name", name, "--memory", &memory, "--guest", guest, "--store", &store];
            let budget = if name == PAGING { &["--ram", &ram][..] } else { &[] };
            way.here.start(&[&args[..], budget].concat())
        };
        let mut runs: Vec<_> = guests.iter().map(|(name, guest)| start(name, guest)).collect();
        for ((name, _), run) in guests.iter().zip(&mut runs) {
            let second = |stat: &Value| stat["guest"]["rounds"].as_u64() >= Some(1);
            let began = match way.those {
                Those::Young => 0,
                _ => number(&way.here.wait_stat(name, "second round", second)["uptime_ms"]),
            };
            way.here.wait_stat(name, "life", |stat| number(&stat["uptime_ms"]) >= began + LIFE_MS);
            let mut args = vec!["migrate", name, "--to", &way.to, "--ram", &ram, "--json"];
            args.push("--check-placement");
            args.extend(way.plain.then_some("--plain"));
            let said = way.here.vmemd(&args);
            assert_eq!(said.code, 0, "{said:?}\n{}", run.log());
            run.ends_with(10);
            let moved = said.json();
            assert_eq!((&moved["pageins_during"], &moved["pageouts_during"]), (&0.into(), &0.into()));
            // The round under way began before the move.
            let goal = number(&way.there.wait_state(name, "running")["guest"]["rounds"]) + 2;
            let gone = |stat: &Value| stat["guest"]["rounds"].as_u64() >= Some(goal);
            let stat = way.there.wait_stat(name, "a whole round", gone);
            assert_eq!(stat["guest"]["mismatched_pages"], 0, "{stat}");
            let read = number(&stat["store"]["pages_read"]);
            let share = 100.0 - read as f64 * 100.0 / wanted as f64;
            let (placement, downtime) = (&moved["placement"], &moved["downtime_ms"]);
            eprintln!(
                "{what}, {name}: {read} of {wanted} pages read, {share:.2} % in RAM; {placement}; downtime \
                     {downtime} ms"
            );
            if way.those == Those::Young {
                assert!(downtime.as_f64() <= Some(DOWNTIME_MAX_MS), "{moved}");
            }
            if share < SHARE_MIN {
                eprintln!("{what}, {name}: {moved}");
            }
            shares.entry(name).or_default().push(share);
            assert_eq!(way.there.vmemd(&["stop", name]).code, 0);
            wait_for("its end", || way.there.stat(name).is_none().then_some(()));
        }
    }
    for (name, shares) in &mut shares {
        shares.sort_by(f64::total_cmp);
        eprintln!("{what}, {name}: median {:.2} %, worst {:.2} %", shares[shares.len() / 2], shares[0]);
    }
    assert!(shares.values().flatten().all(|share| *share >= SHARE_MIN), "{what}: {shares:?}");
}

/// A network whose cable carries no more than that, from the first host to the second.
pub(crate) fn slow_link(rate: &str) -> Result<Network, String> {
    let network = Network::new()?;
    let tc = format!(
        "-n {} qdisc add dev cable root tbf rate {rate} burst 1mb latency 50ms",
        network.namespaces[0]
    );
    let slowed = Command::new("tc").args(tc.split(' ')).output();
    match slowed {
        Ok(said) if said.status.success() => Ok(network),
        slowed => Err(format!("no limit of a link's speed: {slowed:?}")),
    }
}
