//! The pages that a guest uses are in RAM after a move, however fast or slowly the guest goes through them, on a slow
//! disk and over a slow link. `VMEMD_LONG=1` moves guests of every kind everywhere, and twice.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod moves;
#[path = "qemu/network.rs"]
mod network;

use common::disk::Disk;
use common::limits::{Group, Limit};
use common::{Host, needs_root, needs_vms};
use moves::{MEMORY, MIB, RAM, SLOW_DISK, Those, Way, moves, slow_link};
use network::Network;
use testkit::{OrSkip, Reason};

/// The rate of the slow link.
const SLOW_LINK: &str = "400mbit";

fn on_one_host(name: &str, slow_disk: bool) {
    needs_vms();
    needs_root("a loop device");
    let [mut here, mut there] = [Host::new(name), Host::new(name)];
    let disk = Disk::ext4(&there.root, MEMORY + MEMORY / 4).or_skip(Reason::Loop);
    let ram = format!("{}M", RAM / MIB);
    let store = disk.store();
    let mut daemon = there.start(&["serve", "--listen", "127.0.0.1:0", "--ram", &ram, "--store", &store]);
    let line = daemon.first_line();
    let to = line.strip_prefix("listening on ").unwrap_or_else(|| panic!("{line:?}")).to_owned();
    let numbers = disk.numbers();
    let limit = Limit::Disk { device: &numbers, bytes_per_s: SLOW_DISK };
    let group =
        slow_disk.then(|| Group::new(&format!("vmemd-{name}"), limit)).transpose().or_skip(Reason::Cgroup);
    // VMs that arrive are started in it.
    group.iter().for_each(|group| group.take(daemon.pid()));
    let those = if slow_disk { Those::Plain } else { Those::Others };
    moves(Way { here: &mut here, there: &mut there, to, plain: false, those }, name);
    drop((daemon, there));
    drop(group);
}

#[test]
fn what_is_used_is_in_ram() {
    on_one_host("placement", false);
}

#[test]
fn what_is_used_is_in_ram_on_a_slow_disk() {
    on_one_host("placement-slow-disk", true);
}

#[test]
fn what_is_used_is_in_ram_over_a_slow_link() {
    needs_vms();
    needs_root("a network namespace");
    let network = slow_link(SLOW_LINK).or_skip(Reason::Netns);
    let [mut here, mut there] = [0, 1].map(|side| Host::within("placement-link", &network.namespaces[side]));
    let ram = format!("{}M", RAM / MIB);
    let listen = format!("{}:0", Network::HOSTS[1]);
    let (_daemon, to) = there.start_daemon(&listen, &ram, &["--plain"]);
    let way = Way { here: &mut here, there: &mut there, to, plain: true, those: Those::Plain };
    moves(way, "placement-slow-link");
}
