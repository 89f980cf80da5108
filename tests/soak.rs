//! VMs that work, change their budgets, and move between two hosts, while links are cut, processes killed, a disk
//! fills up and memory is compacted: for as long as `VMEMD_SOAK_MINUTES` says (`scripts/soak`). At the end no page
//! was wrong, no VM is lost that ought to live, and no process has grown. `VMEMD_SEED` is the seed of what happens.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod proxy;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::disk::Disk;
use common::{Host, LOOKS_IN_VAIN, Running, kill, lives, needs_vms, wait_for};
use proxy::{After, At, FAULTS, Fault, Plan, Proxy, Strike, Word};
use serde_json::Value;
use testkit::{Random, Reason, skip};

const MIB: u64 = 1 << 20;
const MEMORY: &str = "48M";
const RAM_MIB: [u64; 4] = [16, 20, 28, 48];
const GUESTS: [&str; 4] = [
    "rewrite:working-set=30M,rate=200M",
    "random:working-set=36M,rate=100M",
    "zipf:working-set=40M,rate=100M",
    "rewrite:working-set=12M,rate=300M",
];
/// A VM that never moves: its process must not grow.
const STAYS: &str = "stays";
/// The divisor of the product's limits on waiting for a peer (`VMEMD_TEST_HASTE`).
const HASTE: u32 = 10;
/// Bytes by which a process may have grown: an allocator keeps some back, a leak takes more.
const GROWTH_MAX: u64 = 4 * MIB;

fn rows(host: &Host) -> Vec<Value> {
    host.vmemd(&["list", "--json"]).json().as_array().expect("a list").clone()
}

fn pid(row: &Value) -> u32 {
    row["pid"].as_u64().and_then(|pid| pid.try_into().ok()).expect("a pid")
}

/// Bytes of a process that are nobody else's and no file's.
fn anonymous_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok()).expect("RssAnon") << 10
}

fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors").count()
}

/// A host, its daemon, and the cable to it.
struct Side {
    host: Host,
    store: String,
    daemon: Running,
    proxy: Proxy,
}

impl Side {
    fn new(store: Option<&Disk>) -> Side {
        let mut host = Host::new("soak");
        host.haste = HASTE;
        let store = store.map_or_else(|| host.store(), Disk::store);
        let (daemon, address) = serve(&mut host, &store);
        Side { host, store, daemon, proxy: Proxy::start(&address) }
    }

    fn restart(&mut self) {
        let (daemon, address) = serve(&mut self.host, &self.store);
        self.daemon = daemon;
        self.proxy.redirect(&address);
    }
}

fn serve(host: &mut Host, store: &str) -> (Running, String) {
    let mut daemon = host.start(&["serve", "--listen", "127.0.0.1:0", "--ram", "1G", "--store", store]);
    let line = daemon.first_line();
    let address = line.strip_prefix("listening on ").unwrap_or_else(|| panic!("{line:?}: {}", daemon.log()));
    (daemon, address.to_owned())
}

struct World {
    sides: [Side; 2],
    /// The store of the first side.
    disk: Option<Disk>,
    random: Random,
    /// Processes that this test started; they end when their VM has moved or been killed.
    started: Vec<Running>,
    counts: BTreeMap<String, u64>,
    verified: u64,
}

impl World {
    fn count(&mut self, what: impl Into<String>) {
        *self.counts.entry(what.into()).or_default() += 1;
    }

    fn start_vm(&mut self, name: &str, guest: &str, at: usize) {
        let side = &mut self.sides[at];
        let args = [
            "run",
            "--name",
            name,
            "--memory",
            MEMORY,
            "--ram",
            "20M",
            "--guest",
            guest,
            "--store",
            &side.store,
        ];
        let running = side.host.start(&args);
        side.host.wait_state(name, "running");
        self.started.retain_mut(|running| lives(running.pid()));
        self.started.push(running);
    }

    /// Where the VM runs, once that is decided: None, if nowhere.
    fn settled(&self, name: &str) -> Option<usize> {
        let open = ["arriving", "migrating", "in_doubt", "moved", "unknown", "stalled"];
        let mut in_vain = 0;
        let found = wait_for("a VM to run, or to be gone", || {
            let mut found = Vec::new();
            for (at, side) in self.sides.iter().enumerate() {
                let rows = rows(&side.host);
                found.extend(rows.into_iter().filter(|row| row["name"] == name).map(|row| (at, row)));
            }
            in_vain += u32::from(found.is_empty());
            if found.is_empty() && in_vain < LOOKS_IN_VAIN {
                return None;
            }
            found
                .iter()
                .all(|(_, row)| !open.contains(&row["state"].as_str().expect("a state")))
                .then_some(found)
        });
        assert!(found.len() <= 1, "{name} runs twice: {found:?}");
        let (at, row) = found.first()?;
        assert_eq!(row["state"], "running", "{row}");
        Some(*at)
    }

    /// Its memory is right.
    fn verify(&mut self, name: &str, at: usize) {
        self.sides[at].host.wait_rounds(name, 1);
        self.verified += 1;
    }

    fn set_ram(&mut self, name: &str, at: usize) {
        let ram = format!("{}M", self.random.of(&RAM_MIB));
        let said = self.sides[at].host.vmemd(&["set", name, "--ram", &ram]);
        assert_eq!(said.code, 0, "{said:?}");
        self.count("budget changed");
    }

    fn pause(&mut self, name: &str, at: usize) {
        for command in ["pause", "resume"] {
            let said = self.sides[at].host.vmemd(&[command, name]);
            assert_eq!(said.code, 0, "{said:?}");
        }
        self.count("paused and resumed");
    }

    /// Migrates, perhaps with a fault. Returns where the VM is then.
    fn migrate(&mut self, name: &str, from: usize, fault: Option<Fault>) -> Option<usize> {
        let to = 1 - from;
        let row =
            rows(&self.sides[from].host).into_iter().find(|row| row["name"] == name).expect("it is there");
        let (source, daemon) = (pid(&row), self.sides[to].daemon.pid());
        let settled: Vec<u32> = rows(&self.sides[to].host).iter().map(pid).collect();
        let arriving = self.sides[to].host.processes();
        let bystanders: Vec<u32> = [arriving, settled, vec![daemon]].concat();
        let root = self.sides[to].host.root.display().to_string();
        let then = move || match fault {
            Some(Fault::KillSource) => kill(source),
            Some(Fault::KillTarget) => {
                common::processes_of(&root)
                    .into_iter()
                    .filter(|pid| !bystanders.contains(pid))
                    .for_each(kill);
            }
            Some(Fault::KillDaemon) => kill(daemon),
            _ => {}
        };
        let strike = fault.map_or(Strike::Kill, Fault::strike);
        let at = match fault {
            None => At::Byte(u64::MAX),
            // Half of them in the hand-over, where it matters most.
            Some(_) if self.random.below(2) == 0 => At::Word(
                self.random.of(&[Word::State, Word::Final, Word::Prepared, Word::Commit, Word::Running]),
                1,
            ),
            Some(_) => At::Byte(self.random.below(50 * MIB)),
        };
        let proxy = &self.sides[to].proxy;
        proxy.plan(Plan { at, strike, after: After::Open, then: Box::new(then) });
        let address = proxy.address.clone();
        let said = self.sides[from].host.vmemd(&["migrate", name, "--to", &address]);
        let struck = self.sides[to].proxy.struck();
        if !lives(daemon) {
            self.sides[to].restart();
        }
        let place = self.settled(name);
        let proxy = &self.sides[to].proxy;
        let (committed, before) = (proxy.delivered(Word::Commit), proxy.delivered_before(Word::Commit));
        let may_be_lost = struck.is_some()
            && match fault {
                Some(Fault::KillSource) => !committed,
                Some(Fault::KillTarget) => before,
                _ => false,
            };
        assert!(place.is_some() || may_be_lost, "{name} is lost: {fault:?} at {at:?} {struck:?}: {said:?}");
        if fault.is_none() {
            assert!(place == Some(to) || self.disk.is_some(), "{said:?}");
        }
        let how = match (fault, struck) {
            (None, _) | (_, None) => "migrated".to_owned(),
            (Some(fault), _) => format!("migration with {fault:?}"),
        };
        let end = if place.is_none() {
            "killed with who had it"
        } else if place == Some(to) {
            "there"
        } else {
            "here"
        };
        self.count(format!("{how}: {end}"));
        place
    }

    /// The first side's disk is full for a while.
    fn fill_disk(&mut self) {
        let Some(disk) = &self.disk else { return };
        disk.fill(MIB);
        let mut stalled = 0;
        // Until somebody stands still for it, or nobody needs the disk.
        let deadline = Instant::now() + Duration::from_secs(5);
        while stalled == 0 && Instant::now() < deadline {
            stalled = rows(&self.sides[0].host).iter().filter(|row| row["state"] == "stalled").count();
        }
        disk.drop_ballast();
        self.count(if stalled > 0 { "disk full: VMs stood still" } else { "disk full: nobody noticed" });
    }

    /// The host puts pages of the VMs elsewhere.
    fn compact(&mut self) {
        if std::fs::write("/proc/sys/vm/compact_memory", "1").is_ok() {
            self.count("the host compacted its memory");
        }
    }

    /// The memory and files of each process that stays: the daemons, and the VM that never moves, less its guest's
    /// frames.
    fn footprint(&self) -> Vec<(String, u64, usize)> {
        let mut all: Vec<_> = (0..2)
            .map(|at| {
                let pid = self.sides[at].daemon.pid();
                (format!("daemon {at}"), anonymous_bytes(pid), open_files(pid))
            })
            .collect();
        let stat = self.sides[1].host.stat(STAYS).expect("it stays");
        let frames = stat["frames_bytes"].as_u64().expect("its frames");
        all.push((
            STAYS.to_owned(),
            anonymous_bytes(pid(&stat)).saturating_sub(frames),
            open_files(pid(&stat)),
        ));
        all
    }
}

#[test]
fn nothing_is_lost_for_as_long_as_it_takes() {
    let minutes = std::env::var("VMEMD_SOAK_MINUTES").ok().and_then(|minutes| minutes.parse::<u64>().ok());
    let Some(minutes) = minutes else {
        skip(Reason::Long, "runs for as long as VMEMD_SOAK_MINUTES says: scripts/soak");
    };
    needs_vms();
    let seed = std::env::var("VMEMD_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let place = Host::new("soak-disk");
    let disk = Disk::ext4(&place.root, 400 * MIB);
    if let Err(why) = &disk {
        println!("without a disk that fills up: {why}");
    }
    let disk = disk.ok();
    let sides = [Side::new(disk.as_ref()), Side::new(None)];
    let mut world = World {
        sides,
        disk,
        random: Random(seed),
        started: Vec::new(),
        counts: BTreeMap::new(),
        verified: 0,
    };
    let names: Vec<String> = (0..GUESTS.len()).map(|number| format!("vm{number}")).collect();
    let mut at: Vec<usize> = (0..GUESTS.len()).map(|number| number % 2).collect();
    for (number, name) in names.iter().enumerate() {
        world.start_vm(name, GUESTS[number], at[number]);
    }
    world.start_vm(STAYS, GUESTS[0], 1);
    let (began, whole) = (Instant::now(), Duration::from_secs(60 * minutes));
    let mut first = None;
    let mut said = began;
    while began.elapsed() < whole {
        world.compact();
        let number = world.random.below(names.len() as u64) as usize;
        let name = &names[number];
        match world.random.below(10) {
            0..3 => world.set_ram(name, at[number]),
            3 => world.pause(name, at[number]),
            4 => world.fill_disk(),
            5..7 => at[number] = world.migrate(name, at[number], None).expect("nobody was killed"),
            _ => {
                let fault = world.random.of(&FAULTS);
                match world.migrate(name, at[number], Some(fault)) {
                    Some(place) => at[number] = place,
                    None => world.start_vm(name, GUESTS[number], at[number]),
                }
            }
        }
        for (name, at) in names.iter().zip(&at) {
            assert_eq!(world.settled(name), Some(*at), "{name}");
            world.verify(name, *at);
        }
        let stays = world.settled(STAYS).expect("it stays");
        world.set_ram(STAYS, stays);
        world.verify(STAYS, stays);
        // Buffers and pools have been needed by then.
        if first.is_none() && began.elapsed() > whole / 5 {
            first = Some(world.footprint());
        }
        if said.elapsed() > Duration::from_secs(60) {
            said = Instant::now();
            println!("{:4} s: {} times verified", began.elapsed().as_secs(), world.verified);
        }
    }
    println!("seed {seed}, {minutes} minutes, {} times verified, 0 mismatched pages", world.verified);
    world.counts.iter().for_each(|(what, times)| println!("{times:6} x {what}"));
    for (before, after) in first.expect("more than a moment").iter().zip(world.footprint()) {
        println!(
            "{}: {} KiB, {} files, then {} KiB, {} files",
            before.0,
            before.1 >> 10,
            before.2,
            after.1 >> 10,
            after.2
        );
        assert!(after.1 < before.1 + GROWTH_MAX, "{} has grown", before.0);
        assert!(after.2 <= before.2 + 4, "{} keeps files open", before.0);
    }
    for (name, at) in names.iter().map(String::as_str).zip(at).chain([(STAYS, 1)]) {
        assert_eq!(world.sides[at].host.vmemd(&["stop", name]).code, 0);
    }
    for side in &mut world.sides {
        side.daemon.signal(libc::SIGTERM);
        side.daemon.end();
        assert!(side.host.names().is_empty());
        side.host.assert_clean();
    }
}
