//! `vmemd checkpoint` of a QEMU, whose guest checks its memory all the while.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod qemu;

use std::time::Duration;

use common::Host;
use qemu::{BOOT, Guest, Machine, Qemu, field, qemus};

/// How long a guest's job of a few seconds may take on a slow, busy machine.
const JOB: Duration = Duration::from_secs(120);

fn start(host: &Host, qemu: &Qemu, more: &[&str]) -> Guest {
    let machine = Machine::new("256M").run("checker memory 150M 100000");
    let mut command = host.command(&["run", "--name", "db", "--ram", "128M", "--store", &host.store(), "--"]);
    command.arg(&qemu.binary).args(machine.args()).args(more);
    Guest::start(command)
}

/// Waits until the guest has found all of its memory right twice more.
fn checks_on(guest: &Guest) {
    let rounds = || {
        let lines = guest.lines();
        let said = lines.iter().filter(|line| line.starts_with("checker memory round="));
        let said: Vec<u64> = said.map(|line| field(line, "mismatched")).collect();
        assert!(said.iter().all(|mismatched| *mismatched == 0), "{lines:?}");
        said.len()
    };
    let before = rounds();
    testkit::wait_until(
        JOB,
        || "the guest to check its memory".to_owned(),
        || (rounds() >= before + 2).then_some(()),
    );
}

#[test]
fn a_qemu_is_saved_while_its_guest_checks_its_memory() {
    for qemu in qemus() {
        let host = Host::new("qemu-save");
        let archive = host.root.join("archive");
        let to = archive.to_str().expect("a path that is text");
        let guest = start(&host, &qemu, &[]);
        guest.wait_for("checker memory round=", BOOT);
        for base in ["none", "latest"] {
            let said = host.vmemd(&["checkpoint", "db", "--to", to, "--base", base, "--json"]);
            assert_eq!(said.code, 0, "{said:?}\n{}", guest.log());
            eprintln!("{}: {}", qemu.version, said.out);
            checks_on(&guest);
        }
        let said = host.vmemd(&["checkpoint", "verify", to]);
        assert_eq!(said.code, 0, "{said:?}");
        let shown = host.vmemd(&["checkpoint", "show", to, "--json"]).json();
        assert_eq!(shown["manifest"]["vm"]["machine"], "qemu", "{shown}");
        assert!(shown["manifest"]["vm"]["offer"].is_string(), "{shown}");
    }
}

#[test]
fn a_disk_is_left_out_only_if_that_is_asked_for() {
    let qemu = qemus().remove(0);
    let host = Host::new("qemu-disk");
    let (archive, disk) = (host.root.join("archive"), host.root.join("disk.img"));
    let to = archive.to_str().expect("a path that is text");
    std::fs::File::create(&disk).unwrap().set_len(16 << 20).unwrap();
    let drive = format!("file={},format=raw,if=virtio,cache=none", disk.display());
    let guest = start(&host, &qemu, &["-drive", &drive]);
    guest.wait_for("checker memory round=", BOOT);
    let said = host.vmemd(&["checkpoint", "db", "--to", to]);
    said.fails(9, &["the format raw keeps no earlier version", "disk.img", "--without-disks"]);
    let said = host.vmemd(&["checkpoint", "db", "--to", to, "--without-disks"]);
    assert!(said.code == 0 && said.out.contains("disk.img"), "{said:?}");
    checks_on(&guest);
    let shown = host.vmemd(&["checkpoint", "show", to, "--json"]).json();
    assert!(shown["manifest"]["vm"]["without_disks"][0].as_str().unwrap().contains("disk.img"), "{shown}");
}
