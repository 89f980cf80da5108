//! The command, end to end, with small VMs on the real kernel.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod proxy;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::RecvTimeoutError;

use common::{Host, freeze, lives, needs_root, needs_vms, signal, wait_for};
use proxy::{HeldUp, hold_up};
use serde_json::Value;
use testkit::{Reason, skip};

const GUEST: &str = "rewrite:working-set=40M,rate=400M";
/// Bytes of a migration that get through before it is held up.
const BEFORE_HELD_UP: u64 = 4 << 20;

#[test]
fn a_vm_moves_into_half_its_memory_and_runs_on() {
    needs_vms();
    let mut host = Host::new("example");
    let (mut daemon, address) = host.start_daemon("127.0.0.1:0", "64M", &[]);
    let mut run = host.start_vm("web", GUEST);
    // In the first second of its life all that it has filled is as hot as the rest.
    host.wait_rounds("web", 20);
    let moved = host.vmemd(&["migrate", "web", "--to", &address, "--check-placement", "--json"]);
    assert_eq!(moved.code, 0, "{moved:?}\n{}", daemon.log());
    let report = moved.json();
    for field in
        "bytes_total bytes_sent rounds duration_ms downtime_ms pages_ram pages_store pages_zero".split(' ')
    {
        assert!(report[field].is_number(), "{field}: {report}");
    }
    assert_eq!(report["name"], "web");
    assert_eq!(report["bytes_total"], 128 << 20);
    assert_eq!((&report["pageins_during"], &report["pageouts_during"]), (&Value::from(0), &Value::from(0)));
    assert!(report["pages_store"].as_u64() > Some(0), "{report}");
    let placement = |field: &str| report["placement"][field].as_u64().expect("it was checked");
    let (touched, in_ram) = (placement("touched_pages"), placement("touched_in_ram"));
    // Without placement by heat it would be half.
    assert!(touched > 5000 && in_ram * 100 >= touched * 95, "hot pages belong in RAM: {report}");
    run.ends_with(10);
    assert!(run.log().contains(&format!("web has moved to {address}")), "{}", run.log());
    host.wait_rounds("web", 2);
    let stat = host.stat("web").expect("it runs");
    assert_eq!(stat["state"], "running");
    assert_eq!(stat["memory_bytes"], 128 << 20);
    assert_eq!(stat["ram_budget_bytes"], 64 << 20);
    assert!(stat["resident_bytes"].as_u64() <= Some(64 << 20), "{stat}");
    assert_eq!(stat["arrival"]["pages_store"], report["pages_store"]);
    assert_eq!(host.names(), ["web"]);
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
    daemon.signal(libc::SIGTERM);
    daemon.ends_with(0);
    host.assert_clean();
}

/// Anonymous memory of the process that receives on this host, in bytes.
fn rss_of_receiver(host: &Host) -> Option<u64> {
    let receiver = host.processes().into_iter().find(|pid| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command.split(|byte| *byte == 0).any(|word| word == b"receive")
    })?;
    let status = std::fs::read_to_string(format!("/proc/{receiver}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib * 1024)
}

#[test]
fn an_arriving_vm_never_has_more_ram_than_its_budget() {
    /// Buffers, tables and queues of the receiving process.
    const BESIDE: u64 = 8 << 20;
    const SAMPLE_EVERY: std::time::Duration = std::time::Duration::from_millis(10);
    /// So many samples, at least, while it moves and runs there.
    const SAMPLES: u32 = 6;
    needs_vms();
    let mut host = Host::new("budget");
    let (mut daemon, address) = host.start_daemon("127.0.0.1:0", "64M", &[]);
    let mut run = host.start_vm("web", "rewrite");
    host.wait_rounds("web", 1);
    let (done, is_done) = std::sync::mpsc::channel::<()>();
    let samples = AtomicU32::new(0);
    let highest = std::thread::scope(|scope| {
        let (host, samples) = (&host, &samples);
        let sampler = scope.spawn(move || {
            let mut highest = 0;
            // The end of the channel is the end of the move.
            while is_done.recv_timeout(SAMPLE_EVERY) == Err(RecvTimeoutError::Timeout) {
                let rss = rss_of_receiver(host);
                highest = highest.max(rss.unwrap_or(0));
                samples.fetch_add(u32::from(rss.is_some()), Ordering::Relaxed);
            }
            highest
        });
        let moved = host.vmemd(&["migrate", "web", "--to", &address, "--json"]);
        if moved.code == 0 {
            host.wait_rounds("web", 2);
            // On a busy machine the sampler may have had no turn until now.
            wait_for("samples", || (samples.load(Ordering::Relaxed) >= SAMPLES).then_some(()));
        }
        drop(done);
        assert_eq!(moved.code, 0, "{moved:?}");
        sampler.join().expect("the sampler ends")
    });
    let samples = samples.into_inner();
    println!("64 MiB: at most {:.1} MiB in {samples} samples", highest as f64 / (1 << 20) as f64);
    assert!(highest > 48 << 20, "{samples} samples, at most {highest} bytes");
    assert!(highest <= (64 << 20) + BESIDE, "{highest} bytes in use");
    run.ends_with(10);
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
    daemon.signal(libc::SIGTERM);
    daemon.ends_with(0);
    host.assert_clean();
}

#[test]
fn stat_has_the_documented_fields_and_commands_do_what_they_say() {
    needs_vms();
    let mut host = Host::new("commands");
    let mut run = host.start_vm("web", GUEST);
    let stat = host.stat("web").expect("it runs");
    for path in "memory_bytes ram_budget_bytes resident_bytes stored_bytes untouched_bytes faults/total faults/zero \
                 faults/rescue faults/store prefetch/pages prefetch/used prefetch/wasted evict/written evict/dropped \
                 latency_us/store/p50 latency_us/store/p99 latency_us/store/p999 guest/rounds guest/verified_pages \
                 guest/mismatched_pages"
        .split_whitespace()
    {
        assert!(stat.pointer(&format!("/{path}")).is_some_and(Value::is_number), "{path}: {stat}");
    }
    let table = host.vmemd(&["stat", "web"]);
    assert!(table.out.contains("resident") && table.out.contains("prefetch"), "{table:?}");

    assert_eq!(host.vmemd(&["pause", "web"]).code, 0);
    let paused = host.wait_state("web", "paused");
    let again = host.stat("web").expect("it is there");
    assert_eq!(paused["guest"]["verified_pages"], again["guest"]["verified_pages"]);
    host.vmemd(&["migrate", "web", "--to", "127.0.0.1:1"]).fails(6, &["cannot reach", "stays paused here"]);
    assert_eq!(host.vmemd(&["resume", "web"]).code, 0);
    host.wait_rounds("web", 1);

    let set = host.vmemd(&["set", "web", "--ram", "48M", "--json"]);
    assert_eq!(set.json()["ram_budget_bytes"], 48 << 20);
    host.wait_rounds("web", 2);
    assert!(host.stat("web").expect("it runs")["resident_bytes"].as_u64() <= Some(48 << 20));
    assert_eq!(host.vmemd(&["set", "web", "--ram", "128M"]).code, 0);

    let mut watch = host.start(&["stat", "web", "--watch", "--json"]);
    let first: Value = serde_json::from_str(&watch.first_line()).expect("one JSON line a second");
    assert_eq!(first["name"], "web");
    assert_eq!(host.vmemd(&["stop", "web", "--json"]).json()["state"], "stopped");
    watch.ends_with(0);
    run.ends_with(0);
    host.assert_clean();
}

#[test]
fn ctrl_c_of_run_leaves_nothing() {
    needs_vms();
    for number in [libc::SIGINT, libc::SIGTERM] {
        let mut host = Host::new("interrupt");
        let mut run = host.start_vm("web", GUEST);
        run.signal(number);
        run.ends_with(130);
        host.assert_clean();
    }
}

#[test]
fn ctrl_c_of_migrate_or_its_death_leaves_the_vm_where_it_was() {
    needs_vms();
    let mut host = Host::new("cancel");
    let (daemon, address) = host.start_daemon("127.0.0.1:0", "64M", &[]);
    let _run = host.start_vm("web", GUEST);
    for number in [libc::SIGINT, libc::SIGKILL] {
        // A target that accepts and then says nothing.
        freeze(daemon.pid());
        let mut migrate = host.start(&["migrate", "web", "--to", &address]);
        host.wait_state("web", "migrating");
        migrate.signal(number);
        let status = migrate.end();
        if number == libc::SIGINT {
            assert_eq!(status.code(), Some(130), "{}", migrate.log());
            assert!(migrate.log().contains("runs on here"), "{}", migrate.log());
        }
        host.wait_state("web", "running");
        daemon.signal(libc::SIGCONT);
        host.wait_rounds("web", 1);
    }
    // And what was cancelled can be done again.
    let moved = wait_for("the name to be free again", || {
        let said = host.vmemd(&["migrate", "web", "--to", &address, "--json"]);
        assert!(said.code == 0 || said.code == 4, "{said:?}");
        (said.code == 0).then_some(said)
    });
    assert_eq!(moved.json()["name"], "web");
    host.wait_rounds("web", 1);
}

/// Begins a migration, and stops the receiving process while it copies: a cable holds the rest back until that
/// process stands still, for a migration may be over sooner than a busy machine stops it. Returns that process as
/// well, and the cable, which is to live on.
fn start_frozen_migration(host: &mut Host, address: &str) -> (common::Running, u32, HeldUp) {
    // Until it has filled its memory there may be less to send than the cable lets through.
    host.wait_rounds("web", 1);
    let cable = hold_up(address, BEFORE_HELD_UP);
    let migrate = host.start(&["migrate", "web", "--to", cable.address()]);
    cable.wait_until_held();
    let arriving = wait_for("the VM to arrive", || arriving_pid(host));
    freeze(arriving);
    host.wait_state("web", "migrating");
    cable.go_on();
    (migrate, arriving, cable)
}

fn arriving_pid(host: &Host) -> Option<u32> {
    let list = host.vmemd(&["list", "--json"]).json();
    let row = list.as_array()?.iter().find(|row| row["state"] == "arriving")?;
    Some(row["pid"].as_u64()? as u32)
}

#[test]
fn what_is_left_of_a_try_is_not_in_the_way_of_the_next() {
    needs_vms();
    let mut host = Host::new("again");
    let (_daemon, address) = host.start_daemon("127.0.0.1:0", "64M", &[]);
    let _run = host.start_vm("web", "rewrite");
    let (mut migrate, arriving, _cable) = start_frozen_migration(&mut host, &address);
    migrate.signal(libc::SIGINT);
    migrate.ends_with(130);
    // The process of the first try has not heard of its end yet.
    let mut migrate = host.start(&["migrate", "web", "--to", &address]);
    host.wait_state("web", "migrating");
    signal(arriving, libc::SIGCONT);
    migrate.ends_with(0);
    host.wait_rounds("web", 1);
}

#[test]
fn whoever_dies_in_the_middle_the_rest_is_cleaned_up() {
    needs_vms();
    let mut host = Host::new("middle");
    let (mut daemon, address) = host.start_daemon("127.0.0.1:0", "64M", &[]);
    let mut run = host.start_vm("web", "rewrite");
    host.wait_rounds("web", 1);

    // Ctrl-C.
    let (mut migrate, arriving, _cable) = start_frozen_migration(&mut host, &address);
    migrate.signal(libc::SIGINT);
    migrate.ends_with(130);
    signal(arriving, libc::SIGCONT);
    wait_for("the target to give up", || (!lives(arriving)).then_some(()));
    host.wait_rounds("web", 1);

    // The receiving process.
    let (mut migrate, arriving, _cable) = start_frozen_migration(&mut host, &address);
    signal(arriving, libc::SIGKILL);
    migrate.ends_with(6);
    assert!(migrate.log().contains("runs on here"), "{}", migrate.log());
    wait_for("its socket to go", || (host.sockets() == ["web.sock"]).then_some(()));
    host.wait_rounds("web", 1);

    // The VM is stopped: that cancels first.
    let (mut migrate, arriving, _cable) = start_frozen_migration(&mut host, &address);
    let stop = host.vmemd(&["stop", "web"]);
    assert_eq!(stop.code, 0, "{stop:?}");
    run.ends_with(0);
    assert_ne!(migrate.end().code(), Some(0));
    signal(arriving, libc::SIGCONT);
    host.assert_clean_but(&[daemon.pid()]);

    // The source.
    let mut run = host.start_vm("web", "rewrite");
    let (mut migrate, arriving, _cable) = start_frozen_migration(&mut host, &address);
    run.signal(libc::SIGKILL);
    run.end();
    migrate.ends_with(7);
    signal(arriving, libc::SIGCONT);
    wait_for("the target to give up", || (!lives(arriving)).then_some(()));
    assert!(host.names().is_empty());
    host.assert_clean_but(&[daemon.pid()]);

    // The daemon: the receiving process no longer needs it.
    let _run = host.start_vm("web", "rewrite");
    let (mut migrate, arriving, _cable) = start_frozen_migration(&mut host, &address);
    daemon.signal(libc::SIGKILL);
    daemon.end();
    signal(arriving, libc::SIGCONT);
    migrate.ends_with(0);
    host.wait_rounds("web", 1);
    assert_eq!(host.stat("web").expect("it runs")["pid"], arriving);
}

#[test]
fn a_killed_daemon_harms_no_vm_and_a_new_one_finds_them() {
    needs_vms();
    let mut host = Host::new("daemon");
    let (mut daemon, address) = host.start_daemon("127.0.0.1:0", "64M", &[]);
    let _web = host.start_vm("web", GUEST);
    let _other = host.start_vm("other", GUEST);
    let moved = host.vmemd(&["migrate", "web", "--to", &address]);
    assert_eq!(moved.code, 0, "{moved:?}");
    daemon.signal(libc::SIGKILL);
    daemon.end();
    host.wait_rounds("web", 2);
    let (_daemon, _) = host.start_daemon(&address, "64M", &[]);
    // web holds all of its RAM.
    host.vmemd(&["migrate", "other", "--to", &address]).fails(5, &["other", "runs on here"]);
    host.wait_rounds("other", 1);
    let pid = host.stat("web").expect("it runs")["pid"].as_u64().expect("a number") as u32;
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
    wait_for("the VM's process to end", || (!lives(pid)).then_some(()));
    assert_eq!(host.vmemd(&["migrate", "other", "--to", &address]).code, 0);
    host.wait_rounds("other", 1);
}

#[test]
fn a_vm_moves_on_from_host_to_host_and_to_plain_memory() {
    needs_vms();
    let mut host = Host::new("onward");
    let (_first, first) = host.start_daemon("127.0.0.1:0", "64M", &[]);
    let (_second, second) = host.start_daemon("127.0.0.1:0", "96M", &[]);
    let (_plain, plain) = host.start_daemon("127.0.0.1:0", "128M", &["--engine", "plain"]);
    let _run = host.start_vm("web", GUEST);
    for (to, ram) in [(&first, 64 << 20), (&second, 96 << 20), (&first, 64 << 20), (&plain, 128 << 20)] {
        let moved = wait_for("the former process to be gone", || {
            let said = host.vmemd(&["migrate", "web", "--to", to]);
            // The process that it has left holds its RAM until it has ended.
            assert!(said.code == 0 || said.code == 5, "{said:?}");
            (said.code == 0).then_some(said)
        });
        assert_eq!(moved.code, 0);
        host.wait_rounds("web", 1);
        assert_eq!(host.stat("web").expect("it runs")["ram_budget_bytes"], ram);
    }
    host.vmemd(&["migrate", "web", "--to", &first]).fails(2, &["plain"]);
}

#[test]
fn a_full_store_stalls_the_vm_until_there_is_room() {
    needs_vms();
    needs_root("mounting a small file system");
    let mut host = Host::new("stall");
    let small = SmallFs::mount(&host.root.join("small"), "40M");
    let store = host.root.join("small").display().to_string();
    let args = ["run", "--name", "web", "--memory", "128M", "--guest", "rewrite", "--store", &store];
    host.vmemd(&args).fails(2, &["in this host's RAM (tmpfs)", "--store-in-ram"]);
    let mut run = host.start(&[&args[..], &["--store-in-ram"]].concat());
    host.wait_rounds("web", 1);
    // 112M do not fit 40M.
    let mut set = host.start(&["set", "web", "--ram", "16M"]);
    let stat = host.wait_state("web", "stalled");
    assert!(stat["reason"].is_string(), "{stat}");
    small.resize("200M");
    let resumed = host.vmemd(&["resume", "web"]);
    assert_eq!(resumed.code, 0, "{resumed:?}");
    host.wait_rounds("web", 1);
    set.end();
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
    run.ends_with(0);
}

/// A tmpfs of a test.
struct SmallFs(std::path::PathBuf);

impl SmallFs {
    fn mount(path: &std::path::Path, size: &str) -> SmallFs {
        std::fs::create_dir(path).expect("a mount point");
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
            .arg(path)
            .output();
        if !mounted.is_ok_and(|output| output.status.success()) {
            skip(Reason::Root, "no tmpfs can be mounted here");
        }
        let fs = SmallFs(path.to_owned());
        let direct = std::os::unix::fs::OpenOptionsExt::custom_flags(
            std::fs::File::options().read(true).write(true).create(true).truncate(true),
            libc::O_DIRECT,
        )
        .open(path.join("probe"));
        let _ = std::fs::remove_file(path.join("probe"));
        if direct.is_err() {
            skip(Reason::Kernel, "tmpfs has no O_DIRECT on this kernel");
        }
        fs
    }

    fn resize(&self, size: &str) {
        let remounted = std::process::Command::new("mount")
            .args(["-o", &format!("remount,size={size}")])
            .arg(&self.0)
            .status();
        assert!(remounted.is_ok_and(|status| status.success()));
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn bench_is_a_program_of_its_own() {
    let host = Host::new("bench-elsewhere");
    let vmemd = host.root.join("vmemd");
    std::fs::hard_link(common::vmemd(), &vmemd).expect("a name of the command's own");
    let said = |args: &[&str]| {
        let mut command = host.command_of(&vmemd, args);
        common::Said::by(command.env("PATH", host.root.join("nowhere")))
    };
    let root = host.root.display().to_string();
    for args in [&["bench"][..], &["bench", "--help"], &["bench", "run", "x.fio"]] {
        said(args).fails(3, &["vmemd-bench is neither in", &root, "nor in PATH", "cargo build --release"]);
    }
    // Whatever is there takes the command's place, with its arguments and its exit code.
    let bench = host.root.join("vmemd-bench");
    std::os::unix::fs::symlink("/bin/sh", &bench).expect("a symlink");
    let shell = said(&["bench", "-c", "echo \"$0 $*\"; exit 7", "--help", "--run-dir", "a", "--", "-V"]);
    assert_eq!((shell.code, shell.out.as_str()), (7, "--help --run-dir a -- -V\n"), "{shell:?}");
    std::fs::remove_file(&bench).expect("the symlink");
    std::os::unix::fs::symlink("/bin/echo", &bench).expect("a symlink");
    for args in [&["--run-dir", "a", "bench", "run", "-x"], &["bench", "--run-dir", "a", "run", "-x"]] {
        let echo = said(args);
        assert_eq!((echo.code, echo.out.as_str()), (0, "--run-dir a run -x\n"), "{echo:?}");
    }
}

#[test]
fn help_has_each_exit_code_of_the_manual() {
    let manual = include_str!("../docs/operating.md");
    let (_, table) = manual.split_once("## Exit codes\n").expect("the manual has them");
    let rows = table.lines().skip_while(|line| !line.starts_with("|---")).skip(1);
    let codes = rows.map_while(|line| line.strip_prefix("| ")?.split_once(" |")?.0.parse::<u8>().ok());
    let codes: Vec<_> = codes.filter(|code| *code != 0).collect();
    assert!(codes.len() > 10, "{codes:?}");
    let help = Host::new("help").vmemd(&["--help"]).out;
    let (_, told) = help.split_once("Exit codes: ").expect("help has them");
    let told: Vec<u8> = told.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    for code in &codes {
        assert!(told.contains(code), "{code} is not in {told:?}");
    }
    assert_eq!(told.len(), codes.len(), "{told:?} {codes:?}");
}
