//! A user without privileges who has been given access to `/dev/userfaultfd`, and nothing else, runs a QEMU.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::process::Command;

use common::{Host, needs_root};
use testkit::{Reason, skip};

/// `nobody`.
const USER: u32 = 65534;
const MIB: u64 = 1 << 20;
const QEMU: &str = "qemu-system-x86_64";

/// Mounts the device node in `$1` over the host's for what follows alone, and becomes it, with at most `$2` of locked
/// memory.
const AS_USER: &str = "mount --bind \"$1\" /dev/userfaultfd && limit=$2 && shift 2 && \
    exec prlimit --memlock=\"$limit\" setpriv --reuid=65534 --regid=65534 --clear-groups \"$@\"";

/// A host whose processes are those of another user, who may lock so much memory (soft and hard limit). Ends the test
/// where that cannot be.
fn host_of_user(name: &str, memlock: &str) -> Host {
    needs_root("becoming another user");
    let Ok(device) = fs::metadata("/dev/userfaultfd") else {
        skip(Reason::Uffd, "there is no /dev/userfaultfd");
    };
    let host = Host::new(name);
    for dir in ["run", "store"] {
        fs::create_dir_all(host.root.join(dir)).expect("a directory");
        chown(host.root.join(dir), Some(USER), Some(USER)).expect("a directory of that user");
    }
    fs::set_permissions(host.run_dir(), fs::Permissions::from_mode(0o700)).expect("a directory of that user");
    let node = host.root.join("userfaultfd").display().to_string();
    let (major, minor) = (libc::major(device.rdev()).to_string(), libc::minor(device.rdev()).to_string());
    let made = Command::new("mknod").args(["-m", "666", &node, "c", &major, &minor]).status();
    assert!(made.is_ok_and(|status| status.success()), "no device node");
    let host = host.started_by([
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        AS_USER,
        "sh",
        &node,
        memlock,
    ]);
    // Directories above the build that are root's alone, a file system without devices, a limit that root may not
    // raise here.
    let said = host.vmemd(&["--version"]);
    if said.code != 0 {
        let why = said.err.trim();
        skip(Reason::Users, format_args!("that user cannot run vmemd with memlock={memlock} here: {why}"));
    }
    let opens = Command::new(QEMU).arg("--version").output().is_ok();
    if !opens {
        skip(Reason::Qemu, format_args!("no {QEMU}"));
    }
    host
}

fn run<'a>(store: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["run", "--name", "plain", "--ram", "64M", "--store", store];
    args.extend(more);
    args.extend([
        "--",
        QEMU,
        "-nodefaults",
        "-display",
        "none",
        "-machine",
        "q35",
        "-accel",
        "tcg",
        "-m",
        "128M",
    ]);
    args
}

#[test]
fn without_the_right_to_lock_memory_it_is_said_what_to_do() {
    let mut host = host_of_user("unprivileged", "8388608:8388608");
    let store = host.store();
    let doctor = host.vmemd(&["doctor", "--store", &store]);
    let line =
        |name: &str| doctor.out.lines().find(|line| line.contains(name)).unwrap_or_default().to_owned();
    assert!(line("userfaultfd ").starts_with("found"), "{doctor:?}");
    assert!(line("memory-lock limit").contains("8M"), "{doctor:?}");
    let refused = host.vmemd(&run(&store, &[]));
    refused.fails(3, &["may lock 8388608", "ulimit -l", "LimitMEMLOCK=infinity", "--no-lock"]);

    let mut vm = host.start(&run(&store, &["--no-lock"]));
    host.wait_state("plain", "running");
    assert_eq!(fs::metadata(format!("/proc/{}", vm.pid())).map(|process| process.uid()).ok(), Some(USER));
    assert_eq!(host.vmemd(&["set", "plain", "--ram", "32M"]).code, 0);
    assert_eq!(host.vmemd(&["stop", "plain"]).code, 0, "{}", vm.log());
    vm.ends_with(0);
    host.assert_clean();
}

#[test]
fn with_the_right_to_lock_memory_it_is_locked() {
    let mut host = host_of_user("unprivileged-lock", "8388608:1073741824");
    let vm = host.start(&run(&host.store(), &[]));
    host.wait_state("plain", "running");
    let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).expect("it runs");
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")).expect("a line of every kernel");
    let kib: u64 = locked.trim().trim_end_matches("kB").trim().parse().expect("a number");
    assert!(kib << 10 > 128 * MIB, "{locked}");
    assert_eq!(host.vmemd(&["stop", "plain"]).code, 0, "{}", vm.log());
}
