//! Troubles that users of a host run into: memory that the host merges, RAM that is promised twice, systemd units
//! that end or start a VM which they must not, and a VM that is stopped in the middle of its move.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod proxy;
mod qemu;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use common::{Host, Running, Said, freeze, lives, needs_root, needs_vms, processes_of, signal, wait_for};
use proxy::{After, At, Plan, Proxy, Strike, Word, hold_up};
use qemu::{BOOT, Guest, Machine, Qemu};
use testkit::{Reason, skip};
use vmprocess::control::rundir::{RunDir, SocketName};

const GUEST: &str = "rewrite:working-set=40M,rate=400M";
/// The exit code of a VM's process when the VM has moved away.
const MOVED: i32 = 10;

// ── memory merging ──────────────────────────────────────────────────────────────────────────

/// The host's KSM, on for as long as this lives. Another test that switches it waits until then.
struct Ksm {
    before: Vec<(&'static str, String)>,
    _alone: File,
}

impl Ksm {
    fn on() -> Option<Ksm> {
        const KSM: &str = "/sys/kernel/mm/ksm";
        let path = |name: &str| format!("{KSM}/{name}");
        let alone = Path::new(KSM).exists().then(|| testkit::alone(KSM))?;
        let settings = [("pages_to_scan", "20000"), ("sleep_millisecs", "5"), ("run", "1")];
        let before = settings.map(|(name, _)| Some((name, fs::read_to_string(path(name)).ok()?)));
        let ksm = Ksm { before: before.into_iter().collect::<Option<_>>()?, _alone: alone };
        settings.iter().all(|(name, value)| fs::write(path(name), value).is_ok()).then_some(ksm)
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        for (name, value) in self.before.iter().rev() {
            let _ = fs::write(format!("/sys/kernel/mm/ksm/{name}"), value.trim());
        }
    }
}

/// Starts the process as a unit with `MemoryKSM=yes` would.
fn merging(command: &mut Command) {
    const PR_SET_MEMORY_MERGE: libc::c_int = 67;
    // SAFETY: between fork and exec only this one async-signal-safe call is made, which touches no memory.
    unsafe {
        command.pre_exec(|| match libc::prctl(PR_SET_MEMORY_MERGE, 1 as libc::c_ulong, 0, 0, 0) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
}

/// KiB of mappings that the host may merge: of guest memory and staging (whose missing pages an engine brings), and
/// of all else.
fn mergeable(pid: u32) -> [u64; 2] {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("the process lives");
    let (mut size, mut served, mut found) = (0, 0, [0; 2]);
    for line in smaps.lines() {
        if let Some(kib) = line.strip_prefix("Size:") {
            size = kib.trim().trim_end_matches(" kB").parse().expect("a number");
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            let has = |wanted: &str| flags.split(' ').any(|flag| flag == wanted);
            served += if has("um") { size } else { 0 };
            found[usize::from(!has("um"))] += if has("mg") { size } else { 0 };
        }
    }
    assert!(served > 64 << 10, "{served} KiB are served by an engine");
    found
}

#[test]
fn a_host_that_merges_memory_leaves_that_of_vms_alone() {
    needs_vms();
    needs_root("to switch KSM on");
    let Some(_ksm) = Ksm::on() else { skip(Reason::Kernel, "this host has no KSM") };
    let host = Host::new("ksm");
    let store = host.store();
    let args = "run --name web --memory 128M --ram 48M --guest rewrite --store";
    let mut command = host.command(&args.split(' ').chain([store.as_str()]).collect::<Vec<_>>());
    merging(&mut command);
    let mut vm = command.stderr(Stdio::null()).spawn().expect("vmemd runs");
    let begun = Instant::now();
    host.wait_rounds("web", 2);
    wait_for("ten seconds to pass", || {
        host.wait_rounds("web", 1);
        (begun.elapsed() > Duration::from_secs(10)).then_some(())
    });
    let [ours, others] = mergeable(vm.id());
    assert!(ours == 0 && others > 0, "{ours} KiB of the VM's memory may be merged, of its process {others}");
    assert_eq!(host.vmemd(&["set", "web", "--ram", "32M"]).code, 0);
    let stat = host.stat("web").expect("it runs");
    assert!(stat["frames_bytes"].as_u64() <= Some(32 << 20) && stat["pinned_bytes"] == 0, "{stat}");
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
    vm.wait().expect("a child");

    for qemu in Qemu::versions() {
        let mut command = host.command(&["run", "--name", "db", "--ram", "96M", "--store", &store, "--"]);
        merging(&mut command);
        let machine = Machine::new("256M").run("checker memory 150M 100000");
        // As it is without a word: QEMU asks for its memory to be merged (`mem-merge=on`).
        command.arg(&qemu.binary).args(machine.args());
        let mut guest = Guest::start(command);
        guest.wait_for("checker memory round=1", BOOT);
        let [ours, others] = mergeable(guest.pid());
        assert!(ours == 0 && others > 0, "QEMU {}: {ours} KiB, of its process {others}", qemu.version);
        guest.wait_for("checker memory round=3", BOOT);
        assert_eq!(host.vmemd(&["set", "db", "--ram", "64M"]).code, 0);
        guest.wait_for("checker memory round=4", BOOT);
        let wrong = |line: &String| line.contains("mismatched=") && !line.contains("mismatched=0");
        assert!(!guest.lines().iter().any(wrong), "{:?}", guest.lines());
        let stat = host.stat("db").expect("it runs");
        assert!(stat["frames_bytes"].as_u64() <= Some(64 << 20) && stat["pinned_bytes"] == 0, "{stat}");
        assert_eq!(host.vmemd(&["stop", "db"]).code, 0);
        guest.wait_end(BOOT);
    }
}

// ── what was granted ────────────────────────────────────────────────────────────────────────

fn move_to(host: &Host, name: &str, address: &str, ram: &str) -> Said {
    host.vmemd(&["migrate", name, "--to", address, "--ram", ram])
}

fn pid_of(host: &Host, name: &str) -> u32 {
    host.wait_state(name, "running")["pid"].as_u64().expect("a number") as u32
}

/// Moves a new VM to the daemon, where it gets so much RAM. Returns its pid there.
fn came(there: &Host, here: &mut Host, name: &str, address: &str, ram: &str) -> u32 {
    let _run = here.start_vm(name, "idle:working-set=16M");
    let moved = move_to(here, name, address, ram);
    assert_eq!(moved.code, 0, "{moved:?}");
    pid_of(there, name)
}

#[test]
fn ram_of_a_vm_that_does_not_answer_is_not_promised_again() {
    needs_vms();
    let (mut here, mut there) = (Host::new("granted"), Host::new("granted-there"));
    let (mut daemon, address) = there.start_daemon("127.0.0.1:0", "160M", &[]);
    let quiet = came(&there, &mut here, "quiet", &address, "100M");
    let _run = here.start_vm("web", "idle:working-set=16M");
    freeze(quiet);
    move_to(&here, "web", &address, "100M").fails(5, &["60M left", "runs on here"]);
    // Nor by a daemon that was restarted and has never seen it answer.
    daemon.signal(libc::SIGTERM);
    daemon.ends_with(0);
    let (_daemon, address) = there.start_daemon(&address, "160M", &[]);
    move_to(&here, "web", &address, "100M").fails(5, &["60M left"]);
    // Nor if its socket is gone, and with it its name.
    fs::remove_file(there.run_dir().join("quiet.sock")).expect("its socket");
    move_to(&here, "web", &address, "100M").fails(5, &["60M left"]);
    assert_eq!(move_to(&here, "web", &address, "60M").code, 0, "what is left is to be had");
    let _run = here.start_vm("more", "idle:working-set=16M");
    move_to(&here, "more", &address, "16M").fails(5, &["0 left"]);
    // What its process had is free when that has ended, however it ends.
    common::kill(quiet);
    assert_eq!(move_to(&here, "more", &address, "100M").code, 0);
}

#[test]
fn a_budget_that_was_raised_counts_and_so_does_that_of_a_vm_on_its_way() {
    needs_vms();
    let (mut here, mut there) = (Host::new("raised"), Host::new("raised-there"));
    let (mut daemon, address) = there.start_daemon("127.0.0.1:0", "192M", &[]);
    let raised = came(&there, &mut here, "raised", &address, "32M");
    assert_eq!(there.vmemd(&["set", "raised", "--ram", "96M"]).code, 0);
    freeze(raised);
    let _run = here.start_vm("web", "idle:working-set=16M");
    move_to(&here, "web", &address, "100M").fails(5, &["96M left"]);

    // One on its way, of which the daemon that let it in knows nothing any more.
    let _coming = here.start_vm("coming", "rewrite");
    here.wait_rounds("coming", 1);
    let cable = hold_up(&address, 4 << 20);
    let mut migrate = here.start(&["migrate", "coming", "--ram", "64M", "--to", cable.address()]);
    cable.wait_until_held();
    let arriving = processes_of(&there.root.display().to_string())
        .into_iter()
        .find(|pid| ![raised, daemon.pid()].contains(pid))
        .expect("the receiving process");
    freeze(arriving);
    cable.go_on();
    daemon.signal(libc::SIGKILL);
    daemon.end();
    let (_daemon, address) = there.start_daemon(&address, "192M", &[]);
    move_to(&here, "web", &address, "33M").fails(5, &["32M left"]);
    signal(arriving, libc::SIGCONT);
    migrate.signal(libc::SIGINT);
    migrate.end();

    // A VM that leaves holds its RAM until its process has ended; then others have it.
    signal(raised, libc::SIGCONT);
    let (_back, back) = here.start_daemon("127.0.0.1:0", "192M", &[]);
    assert_eq!(move_to(&there, "raised", &back, "32M").code, 0);
    wait_for("its process to end", || (!lives(raised)).then_some(()));
    wait_for("the RAM to be free", || (move_to(&here, "web", &address, "100M").code == 0).then_some(()));
}

/// Each look whether a VM lives leaves a connection in its socket's queue. When that queue is full, commands must not
/// hang at it.
#[test]
fn a_vm_that_stands_still_holds_up_nobody() {
    needs_vms();
    let mut host = Host::new("still");
    let run = host.start_vm("web", "idle:working-set=16M");
    let _other = host.start_vm("other", "idle:working-set=16M");
    freeze(run.pid());
    let dir = RunDir::open(&host.run_dir()).expect("the run directory");
    let socket = SocketName::Here("web".to_owned());
    let looks = (0..100_000).take_while(|_| dir.connect(&socket).is_ok()).count();
    println!("its queue holds {looks} connections");
    assert!((1..100_000).contains(&looks), "{looks}");
    let begun = Instant::now();
    let list = host.vmemd(&["list", "--json"]).json();
    let states: BTreeMap<_, _> = list
        .as_array()
        .expect("a list")
        .iter()
        .map(|row| (row["name"].as_str().unwrap_or_default(), row["state"].as_str().unwrap_or_default()))
        .collect();
    assert_eq!(states, BTreeMap::from([("other", "running"), ("web", "unknown")]));
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    host.vmemd(&["stat", "web"]).fails(1, &["does not answer"]);
    signal(run.pid(), libc::SIGCONT);
    host.wait_state("web", "running");
}

// ── units ───────────────────────────────────────────────────────────────────────────────────

fn units() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/systemd")
}

/// The settings of a unit: every value of each.
fn settings(unit: &str) -> BTreeMap<String, Vec<String>> {
    let text = fs::read_to_string(units().join(unit)).expect("the unit");
    let mut found = BTreeMap::<String, Vec<String>>::new();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    for (key, value) in lines.filter_map(|line| line.split_once('=')) {
        found.entry(key.to_owned()).or_default().push(value.to_owned());
    }
    found
}

#[test]
fn units_end_and_start_only_what_they_may() {
    let daemon = settings("vmemd.service");
    assert_eq!(daemon["KillMode"], ["process"], "VMs outlive the daemon");
    assert_eq!(
        (&daemon["Delegate"][..], &daemon["RuntimeDirectoryPreserve"][..]),
        (&["yes".to_owned()][..], &["yes".to_owned()][..])
    );
    let vm = settings("vmemd-vm@.service");
    let codes: Vec<&str> = vm["RestartPreventExitStatus"][0].split(' ').collect();
    assert_eq!(codes, ["8", "10"], "neither what has moved nor what may have");
    assert!(vm["SuccessExitStatus"][0].split(' ').any(|code| code == "10"));
    let limit: u64 = vm["TimeoutStopSec"][0].parse().expect("seconds");
    assert!(limit > 20 + 20, "a migration is cancelled first, and its thread waited for");

    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("units-{}", std::process::id()));
    fs::create_dir_all(&dir).expect("a directory");
    let mut command = Command::new("systemd-analyze");
    command.arg("verify");
    for unit in fs::read_dir(units()).expect("the units") {
        let unit = unit.expect("a unit").file_name().into_string().expect("a name");
        let text = fs::read_to_string(units().join(&unit)).expect("the unit");
        // It looks for the program.
        let text = text.replace("/usr/bin/vmemd", env!("CARGO_BIN_EXE_vmemd"));
        let copy = dir.join(unit.replace('@', "@web"));
        fs::write(&copy, text).expect("a copy");
        command.arg(copy);
    }
    match command.output() {
        Ok(output) => assert!(output.status.success() && output.stderr.is_empty(), "{output:?}"),
        Err(error) => skip(Reason::Tools, format_args!("no systemd-analyze: {error}")),
    }
    fs::remove_dir_all(dir).expect("it can be removed");
}

/// The unit's `ExecStopPost=`, run with a `systemctl` that only writes down how it was called.
#[test]
fn a_vm_that_has_moved_or_may_have_is_not_started_at_the_next_boot() {
    let vm = settings("vmemd-vm@.service");
    assert_eq!(vm["WantedBy"], ["multi-user.target"]);
    let [after] = &vm["ExecStopPost"][..] else { panic!("{vm:?}") };
    // A failure of it is not the VM's, and it is root's to do, whoever the VM's user is.
    let script = after.strip_prefix("-+").expect("two prefixes");
    // As systemd reads it.
    let script = script.replace("$$", "$").replace("%n", "vmemd-vm@db.service");
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("unit-ends-{}", std::process::id()));
    fs::create_dir_all(&dir).expect("a directory");
    let (systemctl, called) = (dir.join("systemctl"), dir.join("called"));
    fs::write(&systemctl, format!("#!/bin/sh\nprintf '%s\\n' \"$*\" >>'{}'\n", called.display()))
        .expect("a script");
    fs::set_permissions(&systemctl, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("a script");
    // In `$EXIT_STATUS`: the code, or the signal's name.
    for (status, disables) in [
        ("0", false),
        ("1", false),
        ("7", false),
        ("8", true),
        ("9", false),
        ("10", true),
        ("18", false),
        ("130", false),
        ("KILL", false),
        ("", false),
    ] {
        let ended = Command::new("/bin/sh")
            .args(["-c", &script])
            .env("EXIT_STATUS", status)
            .env("PATH", format!("{}:/usr/bin:/bin", dir.display()))
            .output()
            .expect("a shell");
        assert!(ended.status.success() && ended.stderr.is_empty(), "{status}: {ended:?}");
        let told = fs::read_to_string(&called).unwrap_or_default();
        let _ = fs::remove_file(&called);
        let wanted = if disables { "--no-reload disable vmemd-vm@db.service\n" } else { "" };
        assert_eq!(told, wanted, "{status}");
    }
    fs::remove_dir_all(dir).expect("it can be removed");
}

/// A control group as systemd makes one for a unit.
struct Group(PathBuf);

impl Group {
    /// In systemd's own hierarchy, or in the only one. Ends the test if there is none or this user may not.
    fn new(name: &str, delegated: bool) -> Group {
        let roots = ["/sys/fs/cgroup/systemd", "/sys/fs/cgroup"].map(Path::new);
        let root = roots.into_iter().find(|root| root.join("cgroup.procs").exists());
        let Some(root) = root else {
            skip(Reason::Cgroup, "no hierarchy of control groups that systemd would use");
        };
        let group = Group(root.join(format!("{name}-{}", std::process::id())));
        if let Err(error) = fs::create_dir(&group.0) {
            skip(Reason::Cgroup, format_args!("cannot make {}: {error}", group.0.display()));
        }
        let path = std::ffi::CString::new(group.0.display().to_string()).expect("a path");
        // SAFETY: two C strings and one byte, all of which outlive the call.
        let marked = unsafe {
            !delegated
                || libc::setxattr(path.as_ptr(), c"trusted.delegate".as_ptr(), c"1".as_ptr().cast(), 1, 0)
                    == 0
        };
        if !marked {
            let error = std::io::Error::last_os_error();
            skip(Reason::Cgroup, format_args!("cannot mark {}: {error}", group.0.display()));
        }
        group
    }

    fn procs(&self) -> Vec<u32> {
        let text = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    fn inner(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        dirs.map(|entry| entry.file_name().display().to_string()).collect()
    }

    /// Starts a daemon in the group, as its unit's main process.
    fn serve(&self, host: &mut Host, listen: &str) -> (Running, String) {
        let enter = format!("echo $$ >{}/cgroup.procs && exec \"$@\"", self.0.display());
        let within = std::mem::replace(host, Host::new("unused")).started_by(["sh", "-c", &enter, "sh"]);
        *host = within;
        host.start_daemon(listen, "192M", &[])
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for inner in self.inner() {
            let _ = fs::remove_dir(self.0.join(inner));
        }
        let _ = fs::remove_dir(&self.0);
    }
}

fn groups_of(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default()
}

#[test]
fn vms_live_on_when_all_of_the_daemons_own_group_is_ended() {
    needs_vms();
    needs_root("to make control groups");
    let group = Group::new("vmemd-unit", true);
    let (mut here, mut there) = (Host::new("unit"), Host::new("unit-there"));
    let (mut daemon, address) = group.serve(&mut there, "127.0.0.1:0");
    assert_eq!(group.procs(), [daemon.pid()]);
    let web = came(&there, &mut here, "web", &address, "64M");
    assert_eq!(group.procs(), [daemon.pid()], "the VM is not beside the daemon");
    let inner = group.inner();
    assert!(inner.len() == 1 && inner[0].starts_with("vmemd-web-"), "{inner:?}");
    assert!(groups_of(web).contains(&inner[0]), "{}", groups_of(web));
    // As the end of a unit is: all that is in its group.
    group.procs().into_iter().for_each(|pid| signal(pid, libc::SIGKILL));
    daemon.end();
    assert!(lives(web));
    there.wait_rounds("web", 0);
    // The next one finds it, counts its RAM, and leaves its group alone.
    let (mut daemon, address) = group.serve(&mut there, &address);
    let _run = here.start_vm("more", "idle:working-set=16M");
    move_to(&here, "more", &address, "128M").fails(0, &[]);
    let _run = here.start_vm("third", "idle:working-set=16M");
    move_to(&here, "third", &address, "16M").fails(5, &["0 left"]);
    assert_eq!(group.inner().len(), 2);
    assert_eq!(there.vmemd(&["stop", "more"]).code, 0);
    wait_for("its group to go", || (group.inner() == inner).then_some(()));
    // That of a VM whose daemon is gone goes with the next one.
    daemon.signal(libc::SIGTERM);
    daemon.ends_with(0);
    assert_eq!(there.vmemd(&["stop", "web"]).code, 0);
    // A process that nobody has waited for is in its group still.
    wait_for("the VM's process to go", || (!Path::new(&format!("/proc/{web}")).exists()).then_some(()));
    let (mut daemon, _) = group.serve(&mut there, "127.0.0.1:0");
    assert!(group.inner().is_empty(), "{:?}", group.inner());
    daemon.signal(libc::SIGTERM);
    daemon.ends_with(0);
    wait_for("the group to be empty", || group.procs().is_empty().then_some(()));
}

/// Where the VM is in the daemon's own group, only `KillMode=process` keeps systemd from ending it with the daemon.
#[test]
fn without_a_group_of_its_own_a_vm_needs_a_unit_that_ends_the_daemon_alone() {
    needs_vms();
    needs_root("to make control groups");
    let group = Group::new("vmemd-plain-unit", false);
    let (mut here, mut there) = (Host::new("plain-unit"), Host::new("plain-unit-there"));
    let (mut daemon, address) = group.serve(&mut there, "127.0.0.1:0");
    let web = came(&there, &mut here, "web", &address, "64M");
    assert!(group.inner().is_empty(), "nobody has left this group to the daemon");
    assert!(group.procs().contains(&web));
    daemon.signal(libc::SIGTERM);
    daemon.ends_with(0);
    assert!(lives(web));
    there.wait_rounds("web", 0);
    assert_eq!(there.vmemd(&["stop", "web"]).code, 0);
    wait_for("the group to be empty", || group.procs().is_empty().then_some(()));
}

// ── stopped in the middle of a move ─────────────────────────────────────────────────────────

/// A VM that moves by a cable, and is stopped while a message is on its way, which then gets through.
struct Stopped {
    host: Host,
    there: Host,
    run: Running,
    daemon: Running,
    migrate: Running,
    stop: Option<Running>,
}

/// At the first message of that kind `stop` is called, with the host and the VM's pid.
fn stop_at(word: Word, stop: impl Fn(&mut Host, u32) -> Option<Running>) -> Stopped {
    stop_and_then(word, stop, |_, _| {})
}

/// As [`stop_at`]. `then_do` is called with the pids of the VM and of `vmemd migrate` when the VM has heard of its
/// end, and before the message goes on.
fn stop_and_then(
    word: Word,
    stop: impl Fn(&mut Host, u32) -> Option<Running>,
    then_do: impl Fn(u32, u32),
) -> Stopped {
    needs_vms();
    let (mut host, mut there) = (Host::new("stop"), Host::new("stop-there"));
    let (daemon, address) = there.start_daemon("127.0.0.1:0", "64M", &[]);
    let run = host.start_vm("web", GUEST);
    host.wait_rounds("web", 1);
    let proxy = Proxy::start(&address);
    let (holds, held) = channel();
    let (go_on, gone_on) = channel::<()>();
    let then = Box::new(move || {
        let _ = holds.send(());
        let _ = gone_on.recv_timeout(common::DEADLINE);
    });
    proxy.plan(Plan { at: At::Word(word, 1), strike: Strike::Kill, after: After::Open, then });
    let migrate = host.start(&["migrate", "web", "--to", &proxy.address]);
    let came = held.recv_timeout(common::DEADLINE);
    assert!(came.is_ok(), "{word:?} never came: {}", migrate.log());
    let stop = stop(&mut host, run.pid());
    wait_for("the VM's process to hear that", || run.log().contains("it is to end here").then_some(()));
    then_do(run.pid(), migrate.pid());
    drop(go_on);
    let mut stopped = Stopped { host, there, run, daemon, migrate, stop };
    stopped.migrate.end();
    stopped
}

const WORDS: [Word; 9] = [
    Word::Session,
    Word::Accepted,
    Word::Stream,
    Word::Pages,
    Word::RoundDone,
    Word::State,
    Word::Prepared,
    Word::Commit,
    Word::Running,
];

fn by_command(host: &mut Host, _: u32) -> Option<Running> {
    Some(host.start(&["stop", "web"]))
}

/// The VM has moved or it has not: `stop`, `migrate` and the VM's process all say the same, and it is true.
#[test]
fn a_vm_that_is_stopped_in_the_middle_of_its_move_is_where_everybody_says() {
    let mut seen = BTreeMap::<i32, Vec<Word>>::new();
    for word in WORDS {
        let stopped = stop_at(word, by_command);
        let Stopped { host, there, mut run, daemon, mut migrate, stop } = stopped;
        let mut stop = stop.expect("the command");
        let code = stop.end().code().expect("a code");
        let (migrated, ended) = (migrate.end().code(), run.end().code());
        let told = format!("{word:?}: stop: {}\nmigrate: {}\nrun: {}", stop.log(), migrate.log(), run.log());
        println!("{word:?}: stop {code}, migrate {migrated:?}, run {ended:?}");
        seen.entry(code).or_default().push(word);
        match code {
            0 => {
                assert_eq!((migrated, ended), (Some(130), Some(0)), "{told}");
                for says in ["by `vmemd stop`", "has not moved, and ends here"] {
                    assert!(migrate.log().contains(says), "{told}");
                }
                host.assert_clean();
                there.assert_clean_but(&[daemon.pid()]);
            }
            MOVED => {
                assert_eq!((migrated, ended), (Some(0), Some(MOVED)), "{told}");
                assert!(stop.log().contains("was not stopped: it had moved to"), "{told}");
                host.assert_clean();
                there.wait_rounds("web", 1);
            }
            code => panic!("{code}: {told}"),
        }
    }
    assert!(seen[&0].contains(&Word::Pages) && seen[&MOVED].contains(&Word::Running), "{seen:?}");
}

/// The commit is sent and the link falls silent. The VM's process is stopped before it can learn what became of the
/// commit, and says that.
#[test]
fn a_vm_that_is_stopped_in_the_middle_of_its_hand_over_may_have_moved_and_that_is_said() {
    needs_vms();
    let (mut host, mut there) = (Host::new("unknown"), Host::new("unknown-there"));
    let (_daemon, address) = there.start_daemon("127.0.0.1:0", "64M", &[]);
    let mut run = host.start_vm("web", GUEST);
    host.wait_rounds("web", 1);
    let proxy = Proxy::start(&address);
    let then = Box::new(|| {});
    proxy.plan(Plan { at: At::Word(Word::Running, 1), strike: Strike::Silence, after: After::Closed, then });
    let mut migrate = host.start(&["migrate", "web", "--to", &proxy.address]);
    assert!(proxy.wait_for_strike(common::DEADLINE), "{}", migrate.log());
    // It asks the target for a minute, and its end waits 20 s for that.
    let stopped = host.vmemd(&["stop", "web"]);
    stopped.fails(8, &["was stopped here", &proxy.address]);
    run.ends_with(8);
    assert_ne!(migrate.end().code(), Some(0));
    there.wait_rounds("web", 1);
}

#[test]
fn a_signal_in_the_middle_of_a_move_ends_the_vm_and_is_named() {
    for word in [Word::Pages, Word::Running] {
        let by_signal = |_: &mut Host, vm: u32| {
            signal(vm, libc::SIGTERM);
            None
        };
        let stopped = stop_at(word, by_signal);
        let Stopped { host, there, mut run, daemon, mut migrate, .. } = stopped;
        let (migrated, ended) = (migrate.end().code(), run.end().code());
        if word == Word::Running {
            assert_eq!((migrated, ended), (Some(0), Some(MOVED)), "{}{}", migrate.log(), run.log());
            host.assert_clean();
            there.wait_rounds("web", 1);
        } else {
            assert_eq!((migrated, ended), (Some(130), Some(130)), "{}{}", migrate.log(), run.log());
            assert!(
                migrate.log().contains("cancelled by SIGTERM: \"web\" has not moved"),
                "{}",
                migrate.log()
            );
            host.assert_clean_but(&[daemon.pid()]);
        }
    }
}

/// `migrate` once said "too late to cancel: it has moved", because the VM's process was gone.
#[test]
fn ctrl_c_of_a_migration_whose_vm_is_stopped_says_that_it_was() {
    // Behind the stop, which is heard by then: a Ctrl-C that comes first ends a migration of a VM that runs on.
    let stopped = stop_and_then(Word::Pages, by_command, |_, migrate| signal(migrate, libc::SIGINT));
    let Stopped { host, there, mut run, daemon, mut migrate, stop } = stopped;
    stop.expect("the command").ends_with(0);
    run.ends_with(0);
    migrate.ends_with(130);
    let said = migrate.log();
    assert!(said.contains("has not moved, and ends here") && !said.contains("runs on"), "{said}");
    host.assert_clean();
    there.assert_clean_but(&[daemon.pid()]);
}

#[test]
fn what_else_is_asked_of_a_vm_that_moves_is_refused_with_the_reason() {
    needs_vms();
    let mut host = Host::new("asked");
    let (_daemon, address) = host.start_daemon("127.0.0.1:0", "64M", &[]);
    let mut run = host.start_vm("web", GUEST);
    host.wait_rounds("web", 1);
    for (word, moves) in [(Word::Accepted, false), (Word::Pages, false), (Word::Prepared, true)] {
        let proxy = Proxy::start(&address);
        let (holds, held) = channel();
        let (go_on, gone_on) = channel::<()>();
        let then = Box::new(move || {
            let _ = holds.send(());
            let _ = gone_on.recv_timeout(common::DEADLINE);
        });
        proxy.plan(Plan { at: At::Word(word, 1), strike: Strike::Kill, after: After::Open, then });
        let mut migrate = host.start(&["migrate", "web", "--to", &proxy.address]);
        held.recv_timeout(common::DEADLINE).expect("the message comes");
        for asked in [&["pause", "web"][..], &["resume", "web"], &["set", "web", "--ram", "64M"]] {
            host.vmemd(asked).fails(4, &["it is migrating; cancel that first"]);
        }
        if !moves {
            // The answer to that is the migration's own. The message is held until then, or the VM might have moved
            // sooner.
            migrate.signal(libc::SIGINT);
            migrate.ends_with(130);
        }
        drop(go_on);
        migrate.ends_with(if moves { 0 } else { 130 });
        assert!(moves || migrate.log().contains("cancelled; \"web\" runs on here"), "{}", migrate.log());
        wait_for("what is left there to go", || (host.sockets() == ["web.sock"]).then_some(()));
        host.wait_rounds("web", 1);
    }
    run.ends_with(MOVED);
}

/// The VM's process is killed before it can answer a `stop`. After the commit the VM runs elsewhere, so `stop` must
/// not say that it is stopped.
#[test]
fn a_vm_that_is_killed_while_it_is_stopped_in_its_move_is_not_said_to_be_stopped() {
    for (word, runs_there) in [(Word::Running, true), (Word::Pages, false)] {
        let stopped = stop_and_then(word, by_command, |vm, _| common::kill(vm));
        let Stopped { host, there, run: _, daemon, mut migrate, stop } = stopped;
        let mut stop = stop.expect("the command");
        let code = stop.end().code();
        assert_eq!(code, Some(8), "{word:?}: {}", stop.log());
        for says in ["it was killed, or crashed", "or nowhere; see `vmemd list` there"] {
            assert!(stop.log().contains(says), "{word:?}: {}", stop.log());
        }
        assert!(!stop.log().contains("is stopped"), "{word:?}: {}", stop.log());
        assert_ne!(migrate.end().code(), Some(0), "{word:?}");
        if runs_there {
            there.wait_rounds("web", 1);
        } else {
            wait_for("the target to give it up", || there.names().is_empty().then_some(()));
            there.assert_clean_but(&[daemon.pid()]);
        }
        assert!(host.names().is_empty(), "{word:?}");
    }
}
