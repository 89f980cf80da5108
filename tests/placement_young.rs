//! Guests that were started a moment ago, on machines on which all is slow: what they use is in RAM after a move, and
//! the downtime is what was promised. `VMEMD_LONG=1` moves each twice.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod moves;
#[path = "qemu/network.rs"]
mod network;

use std::time::Duration;

use common::limits::{Group, Limit};
use common::slow_disk::SlowDisk;
use common::{Host, needs_root, needs_vms};
use moves::{MEMORY, MIB, RAM, SLOW_DISK, Those, Way, moves, slow_link};
use network::Network;
use testkit::{OrSkip, Reason};

/// All that is slow at once: stores and run directories on a disk of 100 MB/s whose flushes take half a second, a
/// link of 1 Gbit/s, and guests that were started ten seconds ago.
#[test]
fn a_young_guest_moves_on_slow_machines() {
    needs_vms();
    needs_root("a slow disk");
    let network = slow_link("1gbit").or_skip(Reason::Netns);
    let place = Host::new("placement-young");
    let disk = SlowDisk::new(&place.root, 4 * MEMORY).or_skip(Reason::Loop);
    disk.delay_flushes(Duration::from_millis(500));
    let numbers = disk.numbers();
    let limit = Limit::Disk { device: &numbers, bytes_per_s: SLOW_DISK };
    let group = Group::new("vmemd-placement-young", limit).or_skip(Reason::Cgroup);
    let [mut here, mut there] = [0, 1].map(|side| {
        let mut host = Host::within("placement-young", &network.namespaces[side]);
        host.root = disk.mount().join(format!("host-{side}"));
        std::fs::create_dir_all(host.root.join("store")).expect("a directory on the disk");
        host
    });
    let ram = format!("{}M", RAM / MIB);
    let listen = format!("{}:0", Network::HOSTS[1]);
    let (daemon, to) = there.start_daemon(&listen, &ram, &["--plain"]);
    group.take(daemon.pid());
    let way = Way { here: &mut here, there: &mut there, to, plain: true, those: Those::Young };
    moves(way, "placement-young");
    drop((daemon, here, there));
    drop(group);
}
