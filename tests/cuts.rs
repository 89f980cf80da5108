//! At each message of a migration the link is cut, or one of the processes that take part is killed. Each time
//! exactly one side runs the VM, or no side if the process that had it was killed, or the VM is in doubt and the
//! doubt can be ended. Its memory is right, and nothing is left behind.
//!
//! With `VMEMD_LONG=1` the tests go through every message of the migration and many seeds; without it, through the
//! messages that matter most and few seeds. `VMEMD_SEED` is the first seed.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
#[path = "qemu/network.rs"]
mod network;
mod proxy;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Host, LOOKS_IN_VAIN, Running, Said, freeze, kill, needs_root, needs_vms, signal, wait_for};
use network::Network;
use proxy::{After, At, FAULTS, Fault, Plan, Proxy, Strike, Word};
use serde_json::Value;
use testkit::{OrSkip, Random, Reason, skip};
use vmprocess::host::children_of;

/// A guest that verifies its memory all the time, and never touches some of it.
const GUEST: &str = "rewrite:working-set=12M,rate=300M";
const MEMORY: &str = "32M";
/// Less than the guest's working set: some pages go to the store.
const BUDGET: &str = "16M";
/// The divisor of the product's limits on waiting for a peer (`VMEMD_TEST_HASTE`).
const HASTE: u32 = 10;
/// A smaller divisor where TCP may have to send the first packet again after a second.
const CABLE_HASTE: u32 = 4;

fn long() -> bool {
    std::env::var_os("VMEMD_LONG").is_some_and(|value| value != "0")
}

fn first_seed() -> u64 {
    std::env::var("VMEMD_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

/// A VM on one host, a daemon on another (or the same), and a cable between them.
struct Site {
    hosts: Vec<Host>,
    source: Running,
    daemon: Running,
    address: String,
    proxy: Proxy,
}

impl Site {
    fn new(hosts: usize, haste: u32) -> Site {
        let mut hosts: Vec<Host> = (0..hosts).map(|_| Host::new("cuts")).collect();
        hosts.iter_mut().for_each(|host| host.haste = haste);
        let (daemon, address) = hosts.last_mut().expect("a host").start_daemon("127.0.0.1:0", BUDGET, &[]);
        let source = start_vm(&mut hosts[0]);
        let proxy = Proxy::start(&address);
        Site { hosts, source, daemon, address, proxy }
    }

    fn here(&self) -> &Host {
        &self.hosts[0]
    }

    fn there(&self) -> &Host {
        self.hosts.last().expect("a host")
    }

    /// Migrates, with a fault at that moment.
    fn migrate(&self, at: At, fault: Fault, after: After) -> Said {
        let (source, daemon) = (self.source.pid(), self.daemon.pid());
        let then = move || match fault {
            Fault::CutThis | Fault::CutAll | Fault::Silence => {}
            Fault::KillSource => kill(source),
            Fault::KillTarget => children_of(daemon).into_iter().for_each(kill),
            Fault::KillDaemon => kill(daemon),
        };
        let strike = fault.strike();
        self.proxy.plan(Plan { at, strike, after, then: Box::new(then) });
        self.here().vmemd(&["migrate", "web", "--to", &self.proxy.address, "--json"])
    }

    /// Waits until it is decided where the VM runs, and says whether it runs here and whether it runs there. Its
    /// memory must be right.
    fn settled(&self) -> [bool; 2] {
        let all = || self.hosts.iter().flat_map(rows).collect::<Vec<_>>();
        // Unknown: it ends just now.
        let open = ["arriving", "migrating", "in_doubt", "moved", "unknown"];
        let mut in_vain = 0;
        let rows = wait_for("an end of the hand-over", || {
            let rows = all();
            in_vain += u32::from(rows.is_empty());
            if rows.is_empty() && in_vain < LOOKS_IN_VAIN {
                return None;
            }
            rows.iter().all(|row| !open.contains(&row["state"].as_str().expect("a state"))).then_some(rows)
        });
        assert!(rows.len() <= 1, "it runs twice: {rows:?}");
        let Some(row) = rows.first() else { return [false; 2] };
        assert_eq!(row["state"], "running", "{row}");
        let here = row["pid"] == self.source.pid();
        let host = if here { self.here() } else { self.there() };
        host.wait_rounds("web", 1);
        [here, !here]
    }

    /// Stops the VM and the daemon, and checks that nothing is left behind.
    fn close(mut self) {
        wait_for("every session to be decided", || {
            let records = std::fs::read_dir(self.there().run_dir().join(".sessions"));
            let mut records = records.into_iter().flatten().flatten();
            let decided = [b"COMMIT \n", b"BURNED \n"];
            records
                .all(|record| {
                    decided
                        .iter()
                        .any(|mark| std::fs::read(record.path()).is_ok_and(|is| is.starts_with(*mark)))
                })
                .then_some(())
        });
        for host in &self.hosts {
            for row in rows(host) {
                assert_eq!(host.vmemd(&["stop", "web"]).code, 0, "{row}");
            }
        }
        self.daemon.signal(libc::SIGTERM);
        self.daemon.end();
        self.source.end();
        for host in &self.hosts {
            // Sockets of the dead go when somebody looks.
            assert!(host.names().is_empty());
            host.assert_clean();
        }
    }
}

fn start_vm(host: &mut Host) -> Running {
    let store = host.store();
    let args = ["run", "--name", "web", "--memory", MEMORY, "--guest", GUEST, "--store", &store];
    let running = host.start(&args);
    host.wait_rounds("web", 1);
    running
}

fn rows(host: &Host) -> Vec<Value> {
    host.vmemd(&["list", "--json"]).json().as_array().expect("a list").clone()
}

/// One migration with one fault. Returns the message at which it struck; none, if there was no such moment.
fn try_one(at: At, fault: Fault) -> Option<Word> {
    let began = Instant::now();
    let site = Site::new(2, HASTE);
    let said = site.migrate(at, fault, After::Open);
    let struck = site.proxy.struck();
    let [here, there] = site.settled();
    let place = format!("here {here}, there {there}, after {at:?} {fault:?} at {struck:?}: {said:?}");
    let (committed, committed_before) =
        (site.proxy.delivered(Word::Commit), site.proxy.delivered_before(Word::Commit));
    let expected = match fault {
        // Nothing happened: there was no such moment, or nobody yet who could be killed.
        _ if struck.is_none() => [false, true],
        Fault::KillTarget if struck == Some(Word::Session) => [false, true],
        Fault::KillSource => [false, committed],
        // What is delivered to the dead is not heard.
        Fault::KillTarget => [!committed_before, false],
        // The target's process goes on without it, once it has the connections.
        Fault::KillDaemon => [said.code != 0, said.code == 0],
        Fault::CutThis | Fault::CutAll | Fault::Silence => [!committed, committed],
    };
    assert_eq!([here, there], expected, "{place}");
    if here && struck.is_some() {
        assert!(said.code == 6 && said.err.contains("\"web\" runs on here"), "{place}");
    }
    println!(
        "{fault:?} at {at:?} ({struck:?}): here {here}, there {there}, {:.1} s",
        began.elapsed().as_secs_f64()
    );
    site.close();
    struck
}

#[test]
fn at_the_moments_that_matter_one_side_runs_the_vm() {
    use Fault::{CutAll, CutThis, KillDaemon, KillSource, KillTarget, Silence};
    needs_vms();
    let moments = [
        (Word::Accepted, 1, &[KillDaemon, KillTarget][..]),
        (Word::Stream, 2, &[KillDaemon]),
        (Word::Pages, 2, &[CutThis, KillTarget]),
        (Word::State, 1, &[CutAll, KillTarget]),
        (Word::Prepared, 1, &[CutAll, KillSource, KillTarget]),
        (Word::Commit, 1, &[CutThis, Silence, KillSource, KillTarget, KillDaemon]),
        (Word::Running, 1, &[CutAll, Silence, KillSource, KillTarget]),
    ];
    for (word, number, faults) in moments {
        for fault in faults {
            assert_eq!(try_one(At::Word(word, number), *fault), Some(word), "it never struck");
        }
    }
}

#[test]
fn in_the_middle_of_a_message_one_side_runs_the_vm() {
    needs_vms();
    let first = first_seed();
    for seed in first..first + if long() { 60 } else { 3 } {
        let mut random = Random(seed);
        let fault = FAULTS[random.below(FAULTS.len() as u64) as usize];
        // All of its memory, and what the guest rewrites meanwhile.
        let at = At::Byte(random.below(40 << 20));
        println!("seed {seed}");
        try_one(at, fault);
    }
}

/// Every message of the migration, with every fault. The number of messages differs from run to run, so message
/// numbers go up until a migration has none of that number.
#[test]
fn at_every_message_one_side_runs_the_vm() {
    needs_vms();
    if !long() {
        skip(Reason::Long, "takes some minutes: VMEMD_LONG=1");
    }
    let (tried, began) = (AtomicUsize::new(0), Instant::now());
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let (message, fault) = (number / FAULTS.len() + 1, FAULTS[number % FAULTS.len()]);
                    if try_one(At::Message(message), fault).is_none() {
                        return;
                    }
                    tried.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let tried = tried.into_inner();
    println!("{tried} faults at {} messages, {:?}", tried / FAULTS.len(), began.elapsed());
    assert!(tried > 20 * FAULTS.len(), "{tried}");
}

/// Brings a VM into doubt: its hand-over breaks off at that message, and the target cannot be asked.
fn in_doubt(hosts: usize, at: Word, fault: Fault) -> Site {
    needs_vms();
    let site = Site::new(hosts, 2 * HASTE);
    let said = site.migrate(At::Word(at, 1), fault, After::Closed);
    said.fails(8, &["paused"]);
    let list = rows(site.here());
    let row = list.iter().find(|row| row["pid"] == site.source.pid()).expect("it is here");
    assert_eq!(row["state"], "in_doubt");
    site
}

#[test]
fn a_doubt_says_what_it_is_and_ends_by_itself() {
    let site = in_doubt(2, Word::Commit, Fault::CutAll);
    let stat = site.here().stat("web").expect("it is here");
    assert_eq!(stat["waiting"]["limit"], "ASK_AGAIN_EVERY", "{stat}");
    let session = stat["reason"].as_str().expect("a reason");
    assert!(session.contains("vmemd resolve") && session.contains(&site.proxy.address), "{stat}");
    let to = site.proxy.address.clone();
    for _ in 0..2 {
        let said = site.here().vmemd(&["resolve", "web"]);
        said.fails(
            8,
            &["in doubt", &to, "the commit was sent", "could not ask", "--force run-here", "--force gone"],
        );
    }
    let said = site.here().vmemd(&["resolve", "web", "--json"]);
    assert_eq!((said.code, said.json()["state"].as_str()), (8, Some("in_doubt")), "{said:?}");
    assert!(said.json()["in_doubt_ms"].is_number() && said.json()["session"].is_string(), "{said:?}");
    site.here().vmemd(&["pause", "web"]).fails(4, &["vmemd resolve web"]);
    site.proxy.heal();
    // The link is back, and nobody need be there.
    assert_eq!(site.settled(), [true, false]);
    assert_eq!(site.here().stat("web").expect("it runs")["waiting"], Value::Null);
    let said = site.here().vmemd(&["resolve", "web"]);
    assert!(said.code == 0 && said.out.contains("not in doubt: it is running"), "{said:?}");
    site.here().vmemd(&["resolve", "web", "--force", "gone"]).fails(4, &["not in doubt"]);
    site.close();
}

/// Source and target are on one host, and the target's process has the VM's name by now. The source's process, which
/// is in doubt, is found all the same.
#[test]
fn what_the_target_says_ends_a_doubt_whatever_is_forced() {
    let site = in_doubt(1, Word::Running, Fault::CutAll);
    assert_eq!(site.here().wait_state("web", "running")["pid"], children_of(site.daemon.pid())[0]);
    let refused = site.here().vmemd(&["resolve", "web", "--force", "run-here"]);
    refused.fails(4, &["warning: if the VM runs at the target", "a VM of that name runs on this host"]);
    site.proxy.heal();
    let said = site.here().vmemd(&["resolve", "web", "--force", "run-here", "--json"]);
    // Or it has asked by itself in that moment, and the name is the other's alone.
    let ended = said.code == 0 && said.json()["state"] == "moved";
    assert!(ended || said.code == 4, "{said:?}");
    assert_eq!(site.settled(), [false, true]);
    site.close();
}

#[test]
fn a_vm_whose_target_is_dead_is_told_to_run_here() {
    let site = in_doubt(2, Word::Commit, Fault::KillTarget);
    kill(site.daemon.pid());
    site.proxy.heal();
    site.here().vmemd(&["resume", "web"]).fails(8, &["could not ask", "vmemd resolve web"]);
    let said = site.here().vmemd(&["resolve", "web", "--force", "run-here"]);
    assert!(said.code == 0 && said.err.contains("it runs twice") && said.out.contains("running"), "{said:?}");
    assert_eq!(site.settled(), [true, false]);
    // Nobody is left who could decide.
    std::fs::remove_dir_all(site.there().run_dir().join(".sessions")).expect("its records");
    site.close();
}

#[test]
fn a_vm_that_runs_at_the_target_is_told_to_be_gone() {
    let mut site = in_doubt(2, Word::Running, Fault::CutAll);
    let said = site.here().vmemd(&["resolve", "web", "--force", "gone", "--json"]);
    assert!(said.code == 0 && said.json()["state"] == "moved" && said.err.contains("it is lost"), "{said:?}");
    site.source.ends_with(10);
    assert_eq!(site.settled(), [false, true]);
    site.close();
}

/// A target whose records are gone (its host was started anew, say) has no answer: the VM stays in doubt.
#[test]
fn a_target_that_has_lost_its_records_ends_no_doubt() {
    let mut site = in_doubt(2, Word::Running, Fault::CutAll);
    std::fs::remove_dir_all(site.there().run_dir().join(".sessions")).expect("its records");
    kill(site.daemon.pid());
    let address = site.address.clone();
    (site.daemon, _) = site.hosts[1].start_daemon(&address, BUDGET, &[]);
    site.proxy.heal();
    for _ in 0..2 {
        site.here().vmemd(&["resolve", "web"]).fails(8, &["cannot say", "has no record here"]);
    }
    assert_eq!(site.here().vmemd(&["resolve", "web", "--force", "gone"]).code, 0);
    assert_eq!(site.settled(), [false, true]);
    site.close();
}

#[test]
fn what_waits_says_so_and_names_its_limit() {
    needs_vms();
    // The limits themselves: nothing ends here but what is let go on.
    let site = Site::new(2, 1);
    let (daemon, here) = (site.daemon.pid(), site.here());
    let waits = |host: &Host, limit: &str| {
        let stat = host.wait_stat("web", limit, |stat| stat["waiting"]["limit"] == limit);
        assert!(stat["waiting"]["for"].is_string() && stat["waiting"]["elapsed_ms"].is_number(), "{stat}");
        assert!(stat["waiting"]["limit_ms"].as_u64() >= Some(10_000), "{stat}");
        assert!(host.vmemd(&["stat", "web"]).out.contains(limit));
    };
    std::thread::scope(|scope| {
        freeze(daemon);
        let migrating = scope.spawn(|| here.vmemd(&["migrate", "web", "--to", &site.address, "--json"]));
        waits(here, "ACCEPT_LIMIT");
        signal(daemon, libc::SIGCONT);
        assert_eq!(migrating.join().expect("it ends").code, 0);
    });
    assert_eq!(site.settled(), [false, true]);
    site.close();

    // The source's host hangs between `Prepared` and the commit, and then the target's before its answer.
    let site = Site::new(2, 1);
    let (source, daemon) = (site.source.pid(), site.daemon.pid());
    let there = site.there();
    std::thread::scope(|scope| {
        let stop = move || freeze(source);
        let plan = Plan {
            at: At::Word(Word::Prepared, 1),
            strike: Strike::Kill,
            after: After::Open,
            then: Box::new(stop),
        };
        site.proxy.plan(plan);
        let to = &site.proxy.address;
        let migrating = scope.spawn(|| site.here().vmemd(&["migrate", "web", "--to", to, "--json"]));
        assert!(site.proxy.wait_for_strike(common::DEADLINE));
        waits(there, "COMMIT_LIMIT");
        let target = children_of(daemon)[0];
        freeze(target);
        signal(source, libc::SIGCONT);
        waits(site.here(), "RUNNING_LIMIT");
        signal(target, libc::SIGCONT);
        assert_eq!(migrating.join().expect("it ends").code, 0);
    });
    assert_eq!(site.settled(), [false, true]);
    site.close();
}

#[test]
fn a_cable_that_is_pulled_and_put_back_leaves_one_vm() {
    needs_vms();
    needs_root("a network namespace");
    let network = Network::new().or_skip(Reason::Netns);
    let first = first_seed();
    let mut usual = Duration::from_secs(1);
    for seed in (0..).take(1).chain(first..first + if long() { 60 } else { 2 }) {
        let [mut here, mut there] =
            [0, 1].map(|side| Host::within(["cable-a", "cable-b"][side], &network.namespaces[side]));
        (here.haste, there.haste) = (CABLE_HASTE, CABLE_HASTE);
        let (daemon, to) = there.start_daemon(&format!("{}:0", Network::HOSTS[1]), BUDGET, &["--plain"]);
        let source = start_vm(&mut here);
        let mut random = Random(seed);
        let began = Instant::now();
        let said = std::thread::scope(|scope| {
            let migrating = scope.spawn(|| here.vmemd(&["migrate", "web", "--to", &to, "--plain", "--json"]));
            // The first goes undisturbed, to see how long it takes.
            while seed != 0 && !migrating.is_finished() {
                std::thread::sleep(Duration::from_millis(random.below(usual.as_millis() as u64 * 5 / 4)));
                network.cable("down");
                // Short enough to be borne, or not.
                let longest = [500, 6000][random.below(2) as usize];
                std::thread::sleep(Duration::from_millis(random.below(longest)));
                network.cable("up");
            }
            migrating.join().expect("it ends")
        });
        if seed == 0 {
            usual = began.elapsed();
            assert_eq!(said.code, 0, "{said:?}");
        }
        let hosts = vec![here, there];
        let proxy = Proxy::start(&to);
        // From here on as everywhere; the proxy has nothing to do.
        let site = Site { hosts, source, daemon, address: to, proxy };
        let [here, there] = site.settled();
        println!(
            "seed {seed}: here {here}, there {there}, exit {}, {:.1} s",
            said.code,
            began.elapsed().as_secs_f64()
        );
        assert_ne!(here, there, "seed {seed}: {said:?}");
        site.close();
    }
}
