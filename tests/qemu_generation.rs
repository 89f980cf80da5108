//! The VM generation id of a QEMU: a VM that moves keeps it, each life from a checkpoint has a new one.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod qemu;

use std::path::Path;

use common::{Host, kill};
use qemu::{BOOT, Guest, Machine, Monitor, qemus};
use serde_json::json;

const OTHER: &str = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87";

fn id(monitor: &Path) -> String {
    let told = Monitor::connect(monitor).ask("query-vm-generation-id", json!({}));
    told["guid"].as_str().expect("an id").to_owned()
}

fn pid(host: &Host) -> u32 {
    host.stat("db").expect("it runs")["pid"].as_u64().expect("a number") as u32
}

#[test]
fn an_id_moves_with_its_vm_and_is_new_in_each_life() {
    for qemu in qemus() {
        eprintln!("QEMU {}", qemu.version);
        let (here, mut there) = (Host::new("gen-here"), Host::new("gen-there"));
        let monitors = [&here, &there].map(|host| host.root.join("monitor"));
        let rules =
            format!("[[map]]\nfrom = \"{}\"\nto = \"{}\"\n", monitors[0].display(), monitors[1].display());
        let (_daemon, address) = there.start_qemu_daemon("127.0.0.1:0", "192M", &rules, &[]);
        let monitor = |at: usize| format!("unix:{},server=on,wait=off", monitors[at].display());
        let machine = Machine::new("192M").run("checker memory 60M 100000").args();
        let mut command =
            here.command(&["run", "--name", "db", "--ram", "128M", "--store", &here.store(), "--"]);
        command.arg(&qemu.binary).args(&machine).args(["-qmp", &monitor(0), "-device", "vmgenid,id=gen"]);
        let guest = Guest::start(command);
        guest.wait_for("checker memory round=1 ", BOOT);
        let first = id(&monitors[0]);
        let said = here.vmemd(&["migrate", "db", "--to", &address]);
        assert_eq!(said.code, 0, "{said:?}");
        there.wait_state("db", "running");
        assert_eq!(id(&monitors[1]), first);

        let archive = there.root.join("archive").display().to_string();
        let save = |there: &Host| {
            let said = there.vmemd(&["checkpoint", "db", "--to", &archive]);
            assert_eq!(said.code, 0, "{said:?}");
            let shown = there.vmemd(&["checkpoint", "show", &archive, "--json"]).json();
            let offer = shown["manifest"]["vm"]["offer"].as_str().expect("an offer").to_owned();
            kill(pid(there));
            offer
        };
        let offer = save(&there);
        assert!(offer.contains(&first), "{offer}");
        let store = there.store();
        let restore = ["restore", archive.as_str(), "--store", &store];
        let life = there.start(&restore);
        there.wait_state("db", "running");
        let second = id(&monitors[1]);
        assert_ne!(second, first);
        assert!(save(&there).contains(&second));
        drop(life);

        // A command line of the user's own, which says that no time has gone by.
        let binary = qemu.binary.display().to_string();
        let given = |id: &str| -> Vec<String> {
            let device = format!("vmgenid,id=gen,guid={id}");
            let words = ["--", &binary].map(str::to_owned).into_iter();
            let more = ["-qmp", &monitor(1), "-device", &device].map(str::to_owned);
            words.chain(machine.clone()).chain(more).chain(guest.console().args()).collect()
        };
        let same = given(&second);
        let same: Vec<&str> = same.iter().map(String::as_str).collect();
        let said = there.vmemd(&[&restore[..], &["--as", "db2"], &same].concat());
        said.fails(2, &[&second, "guid=auto"]);
        let mut life = there.start(&[&restore[..], &same].concat());
        there.wait_state("db", "running");
        assert_eq!(id(&monitors[1]), second);
        assert!(life.log().contains("cannot see that time has gone back"), "{}", life.log());
        assert_eq!(there.vmemd(&["stop", "db"]).code, 0);
        life.end();
        let other = given(OTHER);
        let other: Vec<&str> = other.iter().map(String::as_str).collect();
        let mut life = there.start(&[&restore[..], &other].concat());
        there.wait_state("db", "running");
        assert_eq!(id(&monitors[1]), OTHER);
        assert!(!life.log().contains("time has gone back"), "{}", life.log());
        assert_eq!(there.vmemd(&["stop", "db"]).code, 0);
        life.end();
    }
}
