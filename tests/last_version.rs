//! This version and the last one get along: VMs move between them, and the command of each is understood by the
//! other's VMs. The last version is the commit that `.last-version` names, which `scripts/last-version` builds.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod qemu;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Host, lives, needs_vms, wait_for};
use qemu::{BOOT, Guest, Machine, field, qemus};
use testkit::{Reason, skip};

const GUEST: &str = "rewrite:working-set=40M,rate=400M";
const THIS: &str = env!("CARGO_BIN_EXE_vmemd");

/// The last version's `vmemd`. Ends the test where it has not been built, or VMs cannot run.
fn last_version() -> PathBuf {
    needs_vms();
    let dir = std::env::var_os("VMEMD_LAST_VERSION").map(PathBuf::from).unwrap_or_else(|| {
        let top = Path::new(env!("CARGO_MANIFEST_DIR"));
        let commit = std::fs::read_to_string(top.join(".last-version")).expect("the last version's commit");
        top.join("target/last-version").join(commit.trim())
    });
    let program = dir.join("vmemd");
    if !program.is_file() {
        let why = format_args!("none in {}: scripts/last-version builds it", dir.display());
        skip(Reason::LastVersion, why)
    }
    program
}

/// Pid of the process that runs this VM now.
fn pid(host: &Host, vm: &str) -> u32 {
    host.stat(vm).expect("it runs")["pid"].as_u64().expect("a number") as u32
}

fn program_of(pid: u32) -> PathBuf {
    std::fs::read_link(format!("/proc/{pid}/exe")).expect("a living process")
}

#[test]
fn a_vm_moves_from_the_last_version_to_this_one_and_back() {
    let last = last_version();
    let this = PathBuf::from(THIS);
    let (mut old, mut new) = (Host::new("last").of(&last), Host::new("this"));
    let (_old_daemon, old_address) = old.start_daemon("127.0.0.1:0", "64M", &[]);
    let (_new_daemon, new_address) = new.start_daemon("127.0.0.1:0", "64M", &[]);
    let mut run = old.start_vm("web", GUEST);
    old.wait_rounds("web", 1);
    let mut at_old = true;
    // There and back by the command of the host that it leaves, and there and back by the command of the other version.
    for command in [&last, &this, &this, &last] {
        let (from, to, address) = match at_old {
            true => (&old, &new, &new_address),
            false => (&new, &old, &old_address),
        };
        let left = pid(from, "web");
        let rounds = from.stat("web").expect("it runs")["guest"]["rounds"].as_u64();
        let said = from.vmemd_of(command, &["migrate", "web", "--to", address, "--json"]);
        assert_eq!(said.code, 0, "{said:?}");
        let report = said.json();
        assert_eq!(
            (&report["pages_lost"], &report["resolved_later"]),
            (&0.into(), &false.into()),
            "{report}"
        );
        at_old = !at_old;
        to.wait_rounds("web", 2);
        let stat = to.stat("web").expect("it runs");
        assert!(stat["guest"]["rounds"].as_u64() > rounds && stat["ram_budget_bytes"] == 64 << 20, "{stat}");
        assert_eq!(program_of(pid(to, "web")), if at_old { last.as_path() } else { this.as_path() });
        // It holds the RAM with which the VM is to come back.
        wait_for("the former process to be gone", || (!lives(left)).then_some(()));
        assert!(from.names().is_empty());
    }
    // What started it ends when the VM has moved away for the first time.
    run.ends_with(10);
    assert_eq!(old.vmemd(&["stop", "web"]).code, 0);
}

/// The same with a QEMU: the preload, the offer of its machine, and the process that a daemon starts for it.
#[test]
fn a_qemu_moves_from_the_last_version_to_this_one_and_back() {
    const JOB: Duration = Duration::from_secs(120);
    let (last, qemu) = (last_version(), qemus().swap_remove(0));
    let (mut old, mut new) = (Host::new("qlast").of(&last), Host::new("qthis"));
    let (_old_daemon, old_address) = old.start_qemu_daemon("127.0.0.1:0", "192M", "", &[]);
    let (_new_daemon, new_address) = new.start_qemu_daemon("127.0.0.1:0", "192M", "", &[]);
    let mut command = old.command(&["run", "--name", "db", "--ram", "128M", "--store", &old.store(), "--"]);
    command.arg(&qemu.binary).args(Machine::new("256M").run("checker memory 150M 100000").args());
    let mut guest = Guest::start(command);
    let rounds = |guest: &Guest| {
        let lines = guest.lines().into_iter().filter(|line| line.starts_with("checker memory round="));
        lines.inspect(|line| assert_eq!(field::<u64>(line, "mismatched"), 0, "{line}")).count()
    };
    guest.wait_for("checker memory round=1", BOOT);
    for (from, to, address) in [(&old, &new, &new_address), (&new, &old, &old_address)] {
        let left = pid(from, "db");
        let said = from.vmemd(&["migrate", "db", "--to", address, "--json"]);
        assert_eq!(said.code, 0, "{said:?}");
        to.wait_state("db", "running");
        let before = rounds(&guest);
        wait_for("the guest to check its memory", || (rounds(&guest) >= before + 2).then_some(()));
        wait_for("the former process to be gone", || (!lives(left)).then_some(()));
    }
    assert_eq!(guest.wait_end(JOB).code(), Some(10), "{}", guest.log());
    assert_eq!(old.vmemd(&["stop", "db"]).code, 0);
}

/// What the command of one version says to a VM of the other.
fn understands(program: &Path, command: &Path) {
    let mut host = Host::new("asked").of(program);
    let mut run = host.start_vm("web", GUEST);
    assert_eq!(program_of(run.pid()), program);
    let said = |args: &[&str]| {
        let said = host.vmemd_of(command, args);
        assert_eq!(said.code, 0, "{args:?}: {said:?}");
        said
    };
    let stat = || said(&["stat", "web", "--json"]).json();
    let facts = stat();
    assert!(facts["state"] == "running" && facts["memory_bytes"] == 128 << 20, "{facts}");
    // The same as its own command shows, but for what this version alone knows.
    let own = host.stat("web").expect("it runs");
    let names = |value: &serde_json::Value| {
        value.as_object().expect("facts").keys().cloned().collect::<BTreeSet<_>>()
    };
    let [last, this] = if command == Path::new(THIS) { [&own, &facts] } else { [&facts, &own] }.map(names);
    let gone: Vec<_> = last.difference(&this).collect();
    assert!(gone.is_empty(), "the last version shows {gone:?}, and this one does not");
    let list = said(&["list", "--json"]).json();
    assert!(list[0]["name"] == "web" && list[0]["state"] == "running", "{list}");
    said(&["set", "web", "--ram", "48M"]);
    assert_eq!(stat()["ram_budget_bytes"], 48 << 20);
    said(&["pause", "web"]);
    assert_eq!(stat()["state"], "paused");
    said(&["resume", "web"]);
    assert_eq!(stat()["state"], "running");
    host.wait_rounds("web", 1);
    said(&["resolve", "web"]);
    // Refusals are understood too.
    let refused = host.vmemd_of(command, &["set", "web", "--ram", "1M"]);
    refused.fails(2, &["budget"]);
    let nobody = host.vmemd_of(command, &["migrate", "web", "--to", "127.0.0.1:1"]);
    nobody.fails(6, &["127.0.0.1:1", "runs on here"]);
    host.wait_rounds("web", 1);
    said(&["stop", "web"]);
    run.ends_with(0);
    host.assert_clean();
}

#[test]
fn this_versions_command_is_understood_by_the_last_versions_vms() {
    let last = last_version();
    understands(&last, Path::new(THIS));
}

#[test]
fn the_last_versions_command_is_understood_by_this_versions_vms() {
    let last = last_version();
    understands(Path::new(THIS), &last);
}

/// Ctrl-C while a VM of one version is moved by the command of the other.
#[test]
fn a_migration_is_cancelled_across_versions() {
    let last = last_version();
    for (program, command) in [(last.as_path(), Path::new(THIS)), (Path::new(THIS), last.as_path())] {
        let mut host = Host::new("cancelled").of(program);
        let _run = host.start_vm("web", GUEST);
        host.wait_rounds("web", 1);
        // Somebody who takes the connection and says nothing: the migration waits for its answer.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a socket");
        let address = silent.local_addr().expect("an address").to_string();
        let mut migrate = host.command_of(command, &["migrate", "web", "--to", &address]);
        let migrate = migrate.stderr(std::process::Stdio::piped()).stdout(std::process::Stdio::null());
        let child = migrate.spawn().expect("vmemd runs");
        let _held = silent.accept().expect("the VM's process asks");
        common::signal(child.id(), libc::SIGINT);
        let output = child.wait_with_output().expect("it ends");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(130), "{:?}: {text}", output.status);
        host.wait_rounds("web", 1);
        assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
    }
}
