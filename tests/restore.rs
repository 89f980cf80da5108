//! `vmemd restore`: a VM runs at once from a checkpoint, in whatever RAM it is given, and leaves that as it is.

#[macro_use]
extern crate testkit;

testkit::main!();

#[path = "common/checkpoints.rs"]
mod checkpoints;
mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use checkpoint::format::{FirstFaults, Manifest, MemoryMap};
use checkpoints::{FIRST, Guest, make, make_on};
use common::disk::Disk;
use common::{Host, Running, Said, kill, needs_vms, wait_said};
use serde_json::Value;
use testkit::{OrSkip, Reason, wait_for};
use xxhash_rust::xxh3::xxh3_64;

const MIB: u64 = 1 << 20;
const WEB: Guest = Guest {
    name: "web",
    workload: "rewrite",
    memory_bytes: 128 * MIB,
    budget_bytes: 128 * MIB,
    rounds: 1,
    paused: false,
};

/// A host with an archive that has a checkpoint of a guest.
struct Saved {
    host: Host,
    archive: PathBuf,
    checkpoint: PathBuf,
}

impl Saved {
    fn of(test: &str, guest: &Guest) -> Saved {
        needs_vms();
        let host = Host::new(test);
        let archive = host.root.join("archive");
        let checkpoint = make(&archive, FIRST, guest);
        Saved { host, archive, checkpoint }
    }

    fn args<'a>(&'a self, store: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let archive = self.archive.to_str().expect("a path that is text");
        [&["restore", archive, "--store", store], more].concat()
    }

    /// Restores it to a VM that goes on.
    fn restore(&mut self, more: &[&str]) -> Running {
        let store = self.host.store();
        let args: Vec<String> = self.args(&store, more).into_iter().map(str::to_owned).collect();
        self.host.start(&args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Restores it to nothing.
    fn refused(&self, more: &[&str]) -> Said {
        let store = self.host.store();
        self.host.vmemd(&self.args(&store, more))
    }

    fn image(&self) -> PathBuf {
        self.checkpoint.join("memory.img")
    }

    fn image_sum(&self) -> u64 {
        xxh3_64(&fs::read(self.image()).expect("the image"))
    }

    fn stop(&self, name: &str, mut running: Running) {
        let said = self.host.vmemd(&["stop", name]);
        assert_eq!(said.code, 0, "{said:?}");
        running.ends_with(0);
    }
}

fn open_files(pid: u32) -> Vec<PathBuf> {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).expect("a process");
    files.filter_map(|file| fs::read_link(file.ok()?.path()).ok()).collect()
}

fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).expect("a file of the checkpoint");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("a byte");
    file.write_all_at(&[byte[0] ^ 0x40], at).expect("a byte");
}

fn restore_of(stat: &Value) -> &Value {
    &stat["restore"]
}

#[test]
fn a_vm_runs_from_a_checkpoint_in_half_of_its_ram_and_finds_all_of_its_memory() {
    let mut saved = Saved::of("restore-half", &WEB);
    let before = saved.image_sum();
    let mut vm = saved.restore(&["--ram", "64M", "--json"]);
    let told: Value = serde_json::from_str(&vm.first_line()).expect("JSON");
    assert_eq!((&told["name"], &told["state"]), (&Value::from("web"), &Value::from("running")), "{told}");
    let stat = saved.host.wait_state("web", "running");
    assert_eq!(stat["ram_budget_bytes"], 64 * MIB, "{stat}");
    // It has every page verified, twice, in the order in which it writes them.
    saved.host.wait_rounds("web", 2);
    // The phase follows as soon as the work behind the VM has seen that nothing is left.
    let done =
        saved.host.wait_stat("web", "its memory to be its own", |stat| stat["restore"]["phase"] == "done");
    assert_eq!(done["origin_bytes"], 0, "{done}");
    assert_eq!(done["poisoned_pages"], 0, "{done}");
    saved.host.wait_rounds("web", 2);
    saved.stop("web", vm);
    assert_eq!(saved.image_sum(), before);
    saved.host.assert_clean();
}

#[test]
fn two_vms_from_one_checkpoint_side_by_side_do_not_see_each_other_and_leave_it_as_it_is() {
    let mut saved = Saved::of("restore-two", &WEB);
    let before = saved.image_sum();
    let web = saved.restore(&["--ram", "64M", "--keep-origin"]);
    saved.host.wait_state("web", "running");
    saved.refused(&[]).fails(4, &["web", "--as"]);
    let other = saved.restore(&["--as", "other", "--ram", "48M", "--keep-origin"]);
    saved.host.wait_state("other", "running");
    saved.host.wait_rounds("web", 2);
    saved.host.wait_rounds("other", 2);
    saved.host.wait_stat("other", "all that it fetches", |stat| stat["restore"]["phase"] == "kept");
    saved.stop("web", web);
    saved.stop("other", other);
    assert_eq!(saved.image_sum(), before);
}

#[test]
fn a_vm_that_is_killed_is_restored_again() {
    let mut saved = Saved::of("restore-killed", &WEB);
    let vm = saved.restore(&["--ram", "64M"]);
    saved.host.wait_state("web", "running");
    saved.host.wait_rounds("web", 1);
    kill(vm.pid());
    let again = saved.restore(&["--ram", "32M"]);
    saved.host.wait_state("web", "running");
    saved.host.wait_rounds("web", 2);
    saved.stop("web", again);
}

#[test]
fn it_stands_still_if_it_is_to() {
    let mut saved = Saved::of("restore-paused", &Guest { paused: true, ..WEB });
    // As it was when it was saved.
    let vm = saved.restore(&["--json"]);
    let mut vm = vm;
    let told: Value = serde_json::from_str(&vm.first_line()).expect("JSON");
    assert_eq!(told["state"], "paused", "{told}");
    let stat = saved.host.wait_state("web", "paused");
    assert!(stat["reason"].as_str().is_some_and(|why| why.contains("was paused when")), "{stat}");
    let said = saved.host.vmemd(&["resume", "web"]);
    assert_eq!(said.code, 0, "{said:?}");
    saved.host.wait_rounds("web", 2);
    saved.stop("web", vm);
}

#[test]
fn it_stands_still_if_that_is_asked_for() {
    let mut saved = Saved::of("restore-to-pause", &WEB);
    let vm = saved.restore(&["--paused"]);
    let stat = saved.host.wait_state("web", "paused");
    let rounds = stat["guest"]["rounds"].clone();
    // All of its memory comes home all the same, and nothing of it is touched.
    let stat = saved.host.wait_stat("web", "its memory", |stat| stat["origin_bytes"] == 0);
    assert_eq!((&stat["state"], &stat["guest"]["rounds"]), (&Value::from("paused"), &rounds), "{stat}");
    let said = saved.host.vmemd(&["resume", "web"]);
    assert_eq!(said.code, 0, "{said:?}");
    saved.host.wait_rounds("web", 2);
    saved.stop("web", vm);
}

#[test]
fn an_eager_restore_has_all_of_its_memory_when_it_runs() {
    let mut saved = Saved::of("restore-eager", &WEB);
    let mut vm = saved.restore(&["--eager", "--ram", "64M", "--json"]);
    let told: Value = serde_json::from_str(&vm.first_line()).expect("JSON");
    assert_eq!(told["state"], "running", "{told}");
    let stat = saved.host.wait_state("web", "running");
    assert_eq!(stat["origin_bytes"], 0, "{stat}");
    saved.host.wait_rounds("web", 2);
    saved.stop("web", vm);
}

#[test]
fn frames_are_taken_at_the_start_if_that_is_asked_for() {
    let guest = Guest { workload: "rewrite:working-set=16M,fill=working-set", ..WEB };
    for (more, taken) in [(&["--eager"][..], 120), (&[], 110)] {
        let mut saved = Saved::of("restore-prealloc", &guest);
        let vm = saved.restore(&[&["--prealloc", "--paused"], more].concat());
        let stat = saved.host.wait_state("web", "paused");
        let frames = stat["frames_bytes"].as_u64().expect("a number");
        assert!((taken * MIB..=128 * MIB).contains(&frames), "{stat}");
        assert_eq!(saved.host.vmemd(&["resume", "web"]).code, 0);
        saved.host.wait_rounds("web", 2);
        saved.stop("web", vm);
    }
}

/// A file system with so much room, for a store.
fn small_disk(host: &Host, free: u64) -> Disk {
    let disk = Disk::ext4(&host.root, 256 * MIB).or_skip(Reason::Loop);
    disk.leave_free(free);
    disk
}

fn restored_to<'a>(saved: &'a Saved, store: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let archive = saved.archive.to_str().expect("a path that is text");
    [&["restore", archive, "--store", store, "--store-overcommit"], more].concat()
}

#[test]
fn a_store_without_room_for_all_has_it_for_what_the_vm_changes_and_takes_the_rest_when_there_is_more() {
    let guest = Guest { workload: "rewrite:working-set=32M,fill=all", ..WEB };
    let mut saved = Saved::of("restore-no-room", &guest);
    saved.host.haste = 60;
    let disk = small_disk(&saved.host, 40 * MIB);
    let store = disk.store();
    let args: Vec<String> =
        restored_to(&saved, &store, &["--ram", "24M"]).into_iter().map(str::to_owned).collect();
    let vm = saved.host.start(&args.iter().map(String::as_str).collect::<Vec<_>>());
    saved.host.wait_state("web", "running");
    let kept = |stat: &Value| stat["restore"]["phase"] == "kept";
    let stat = saved.host.wait_stat("web", "the end of the taking home", kept);
    assert!(stat["restore"]["waits"].as_str().is_some_and(|why| why.contains("the store has")), "{stat}");
    // What it writes does not fit into its RAM.
    saved.host.wait_rounds("web", 3);
    let stat = saved.host.stat("web").expect("it runs");
    assert_eq!((&stat["state"], &stat["store"]["write_errors"]), (&"running".into(), &0.into()), "{stat}");
    assert!(stat["origin_bytes"].as_u64() >= Some(64 * MIB), "{stat}");
    disk.drop_ballast();
    let done = |stat: &Value| stat["restore"]["phase"] == "done";
    let stat = saved.host.wait_stat("web", "all of it at home", done);
    assert_eq!((&stat["origin_bytes"], &stat["poisoned_pages"]), (&0.into(), &0.into()), "{stat}");
    saved.host.wait_rounds("web", 2);
    saved.stop("web", vm);
}

#[test]
fn an_eager_restore_to_a_store_without_room_runs_all_the_same() {
    let guest = Guest { workload: "rewrite:working-set=32M,fill=all", ..WEB };
    let mut saved = Saved::of("restore-eager-no-room", &guest);
    let disk = small_disk(&saved.host, 40 * MIB);
    let store = disk.store();
    let args: Vec<String> =
        restored_to(&saved, &store, &["--ram", "48M", "--eager"]).into_iter().map(str::to_owned).collect();
    let vm = saved.host.start(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let stat = saved.host.wait_state("web", "running");
    assert!(stat["origin_bytes"].as_u64() > Some(0), "{stat}");
    wait_said("in the checkpoint still", || vm.log());
    saved.host.wait_rounds("web", 2);
    saved.stop("web", vm);
}

#[test]
fn a_checkpoint_that_is_damaged_or_not_there_is_told_before_anything_runs() {
    let saved = Saved::of("restore-refused", &WEB);
    let elsewhere = saved.host.root.join("elsewhere").display().to_string();
    let said = saved.host.vmemd(&["restore", &elsewhere]);
    assert_ne!(said.code, 0, "{said:?}");
    saved.refused(&["2020-01-01T00-00-00Z"]).fails(4, &["2020-01-01T00-00-00Z"]);
    saved.refused(&["--ram", "1G"]).fails(2, &["--ram 1G"]);
    saved.refused(&["--as", "a/b"]).fails(2, &["a/b"]);
    saved.refused(&["--rate", "0"]).fails(2, &["--rate"]);
    saved.refused(&["--", "qemu-system-x86_64"]).fails(2, &["not of a QEMU VM"]);
    for (file, at) in [("memory.map", 60), ("state", 100), ("manifest", 40)] {
        let path = saved.checkpoint.join(file);
        flip(&path, at);
        saved.refused(&[]).fails(13, &[file]);
        flip(&path, at);
    }
    for file in ["memory.map", "state", "memory.img", "manifest"] {
        let path = saved.checkpoint.join(file);
        let whole = fs::read(&path).expect("a file of the checkpoint");
        fs::write(&path, &whole[..whole.len() / 2]).expect("half of it");
        saved.refused(&[]).fails(13, &[file]);
        fs::remove_file(&path).expect("it is there");
        assert_ne!(saved.refused(&[]).code, 0);
        fs::write(&path, &whole).expect("all of it");
    }
    // One of a newer vmemd.
    let path = saved.checkpoint.join("manifest");
    let whole = fs::read_to_string(&path).expect("a manifest");
    let (body, _) = whole.trim_end().rsplit_once('\n').expect("a last line");
    let newer = body.replace("\"version\": 1", "\"version\": 99") + "\n";
    fs::write(&path, format!("{newer}xxh3 {:016x}\n", xxh3_64(newer.as_bytes()))).expect("a manifest");
    saved.refused(&[]).fails(1, &["99"]);
    // It says that it is of a QEMU, and not of which.
    let mut manifest = Manifest::decode(whole.as_bytes()).expect("a manifest");
    manifest.vm.machine = checkpoint::format::Machine::Qemu;
    fs::write(&path, manifest.encode()).expect("a manifest");
    assert_ne!(saved.refused(&[]).code, 0);
    saved.host.assert_clean();
}

#[test]
fn a_page_that_is_damaged_in_the_image_is_a_memory_error_there_alone_and_stat_names_it() {
    let mut saved = Saved::of("restore-damaged-page", &WEB);
    let page = 128 * MIB / 4096 - 100;
    flip(&saved.image(), page * 4096 + 5);
    let mut vm = saved.restore(&["--ram", "64M"]);
    let stat = saved.host.wait_stat("web", "the lost page", |stat| stat["poisoned_pages"] == 1);
    assert_eq!((&stat["lost"][0]["first"], &stat["lost"][0]["pages"]), (&page.into(), &1.into()), "{stat}");
    let stat = saved.host.wait_state("web", "failed");
    assert_eq!(stat["guest"]["mismatched_pages"], 0, "{stat}");
    assert_eq!(saved.host.vmemd(&["stop", "web"]).code, 0);
    vm.ends_with(7);
}

#[test]
fn a_page_that_is_damaged_and_that_nobody_touches_harms_nobody_and_stat_tells_of_it() {
    // Nobody touches what is behind the working set.
    let guest = Guest { workload: "rewrite:working-set=32M,fill=all", ..WEB };
    let mut saved = Saved::of("restore-damaged-cold-page", &guest);
    flip(&saved.image(), (128 * MIB / 4096 - 100) * 4096 + 5);
    let vm = saved.restore(&["--ram", "64M"]);
    let stat = saved.host.wait_stat("web", "what is left", |stat| {
        stat["restore"]["waits"].as_str().is_some_and(|why| why.starts_with("1 pages cannot be read"))
    });
    assert_eq!((&stat["origin_bytes"], &stat["poisoned_pages"]), (&4096.into(), &0.into()), "{stat}");
    saved.host.wait_rounds("web", 2);
    saved.stop("web", vm);
}

#[test]
fn the_order_of_the_first_faults_is_kept_for_the_next_restore() {
    let guest = Guest { workload: "read:working-set=16M,fill=all", ..WEB };
    let mut saved = Saved::of("restore-order", &guest);
    let first_faults = saved.checkpoint.join("first-faults");
    let known = || FirstFaults::decode(&fs::read(&first_faults).ok()?).ok();
    let manifest = fs::read(saved.checkpoint.join("manifest")).expect("a manifest");
    let vm = saved.restore(&["--keep-origin"]);
    let order = wait_for("the order of first faults", known);
    let pages: u64 = order.runs().iter().map(|run| u64::from(run.len)).sum();
    assert!((16 * MIB / 4096..64 * MIB / 4096).contains(&pages), "{pages} pages");
    saved.stop("web", vm);
    let before = fs::read(&first_faults).expect("it was written");
    let vm = saved.restore(&["--keep-origin", "--paused"]);
    // Told to stand still, so that nothing but the order brings pages.
    let stat = saved.host.wait_stat("web", "its working set", |stat| {
        stat["restore"]["fetched_bytes"].as_u64() >= Some(16 * MIB)
    });
    assert_eq!((&stat["state"], &stat["faults"]["store"]), (&"paused".into(), &0.into()), "{stat}");
    assert!(stat["resident_bytes"].as_u64() >= Some(16 * MIB), "{stat}");
    assert_eq!(saved.host.vmemd(&["resume", "web"]).code, 0);
    saved.host.wait_rounds("web", 1);
    saved.stop("web", vm);
    assert_eq!(fs::read(&first_faults).expect("it is there"), before);
    assert_eq!(fs::read(saved.checkpoint.join("manifest")).expect("a manifest"), manifest);
}

#[test]
fn a_restored_vm_moves_on_while_its_pages_are_in_the_checkpoint() {
    let mut saved = Saved::of("restore-moves", &WEB);
    let (_daemon, to) = saved.host.start_daemon("127.0.0.1:0", "128M", &[]);
    let mut vm = saved.restore(&["--ram", "64M", "--keep-origin"]);
    saved.host.wait_state("web", "running");
    let said = saved.host.vmemd(&["migrate", "web", "--to", &to, "--ram", "64M"]);
    assert_eq!(said.code, 0, "{said:?}");
    vm.ends_with(10);
    saved.host.wait_state("web", "running");
    saved.host.wait_rounds("web", 2);
    let said = saved.host.vmemd(&["stop", "web"]);
    assert_eq!(said.code, 0, "{said:?}");
}

#[test]
fn a_rate_is_kept_and_stat_says_so() {
    let mut saved =
        Saved::of("restore-rate", &Guest { workload: "read:working-set=1M,rate=4M,fill=all", ..WEB });
    let began = Instant::now();
    let vm = saved.restore(&["--rate", "32M"]);
    let stat = saved.host.wait_stat("web", "its rate", |stat| stat["restore"]["phase"] == "taking_home");
    assert_eq!(restore_of(&stat)["rate_bytes"], 32 * MIB, "{stat}");
    assert!(stat["origin_bytes"].as_u64() > Some(0), "{stat}");
    let text = saved.host.vmemd(&["stat", "web"]).out;
    assert!(text.contains("restored") && text.contains("still there"), "{text}");
    saved.host.wait_stat("web", "its memory", |stat| stat["origin_bytes"] == 0);
    assert!(began.elapsed() > Duration::from_millis(1500), "{:?}", began.elapsed());
    saved.stop("web", vm);
}

#[test]
fn lost_pages_stay_lost_and_are_told() {
    let saved = Saved::of("restore-lost", &Guest { workload: "rewrite:working-set=32M", ..WEB });
    // A page that nobody touches was lost before it was saved.
    let path = saved.checkpoint.join("memory.map");
    let map = MemoryMap::decode(&fs::read(&path).expect("a map")).expect("a map");
    let lost = 128 * MIB / 4096 - 7;
    checkpoints::lose(&saved.checkpoint, &map, lost);
    let mut saved = saved;
    let vm = saved.restore(&[]);
    saved.host.wait_state("web", "running");
    let stat = saved.host.wait_stat("web", "the lost page", |stat| stat["poisoned_pages"] == 1);
    assert_eq!(stat["lost"][0]["first"], lost, "{stat}");
    wait_said("lost before they were saved", || vm.log());
    saved.host.wait_rounds("web", 1);
    saved.stop("web", vm);
}

#[test]
fn a_checkpoint_is_read_with_its_base_and_needs_it() {
    let mut saved = Saved::of("restore-base", &WEB);
    make_on(&saved.checkpoint, "2026-11-29T23-20-01Z");
    // The latest.
    let vm = saved.restore(&["--ram", "64M"]);
    saved.host.wait_state("web", "running");
    saved.host.wait_rounds("web", 2);
    saved.stop("web", vm);
    // What is the base's own is damaged by now.
    fs::rename(&saved.checkpoint, saved.archive.join("elsewhere")).expect("a rename");
    saved.refused(&[]).fails(13, &[FIRST, "not in the archive"]);
}

#[test]
fn a_checkpoint_in_use_is_not_removed_and_one_that_is_needed_no_more_is() {
    let mut saved = Saved::of("restore-in-use", &WEB);
    let archive = saved.archive.display().to_string();
    let vm = saved.restore(&["--ram", "64M", "--keep-origin"]);
    saved.host.wait_state("web", "running");
    let remove = ["checkpoint", "remove", &archive, FIRST];
    saved.host.vmemd(&remove).fails(4, &[FIRST, "in use"]);
    saved.host.wait_rounds("web", 1);
    saved.stop("web", vm);
    let vm = saved.restore(&["--ram", "64M"]);
    saved.host.wait_stat("web", "its memory", |stat| {
        stat["origin_bytes"] == 0 && stat["restore"]["phase"] == "done"
    });
    let open = open_files(vm.pid());
    assert!(!open.iter().any(|path| path.ends_with("memory.img")), "{open:?}");
    let said = saved.host.vmemd(&remove);
    assert_eq!(said.code, 0, "{said:?}");
    saved.host.wait_rounds("web", 2);
    saved.stop("web", vm);
}

#[test]
fn a_vm_is_saved_while_it_writes_killed_restored_saved_again_and_restored_twice() {
    needs_vms();
    let mut host = Host::new("restore-demo");
    let archive = host.root.join("archive").display().to_string();
    let store = host.store();
    let vm = host.start_vm("web", "rewrite:working-set=64M,fill=all");
    host.wait_rounds("web", 1);
    let save = |host: &Host, name: &str| {
        let said = host.vmemd(&["checkpoint", name, "--to", &archive]);
        assert_eq!(said.code, 0, "{said:?}");
        host.wait_rounds(name, 1);
    };
    save(&host, "web");
    kill(vm.pid());
    let restore = ["restore", &archive, "--store", &store, "--ram", "64M", "--keep-origin"];
    let vm = host.start(&restore);
    host.wait_state("web", "running");
    host.wait_rounds("web", 2);
    // What does not change is in the first checkpoint still.
    let stat = host.stat("web").expect("it runs");
    assert!(stat["origin_bytes"].as_u64() > Some(16 * MIB), "{stat}");
    save(&host, "web");
    kill(vm.pid());
    let (_web, _other) = (host.start(&restore), host.start(&[&restore[..], &["--as", "other"]].concat()));
    for name in ["web", "other"] {
        host.wait_state(name, "running");
        host.wait_rounds(name, 2);
        assert_eq!(host.vmemd(&["stop", name]).code, 0);
    }
    let said = host.vmemd(&["checkpoint", "verify", &archive]);
    assert_eq!(said.code, 0, "{said:?}");
}

#[test]
fn the_hottest_pages_come_first_when_no_order_is_known() {
    needs_vms();
    let mut host = Host::new("restore-heat");
    let archive = host.root.join("archive").display().to_string();
    let store = host.store();
    let vm = host.start_vm("web", "rewrite:working-set=32M,rate=256M,fill=all");
    host.wait_rounds("web", 4);
    let said = host.vmemd(&["checkpoint", "web", "--to", &archive]);
    assert_eq!(said.code, 0, "{said:?}");
    kill(vm.pid());
    let vm = host.start(&["restore", &archive, "--store", &store, "--keep-origin", "--paused"]);
    let stat = host.wait_stat("web", "its hot pages", |stat| stat["restore"]["phase"] == "kept");
    let fetched = stat["restore"]["fetched_bytes"].as_u64().expect("a number");
    assert!((8 * MIB..100 * MIB).contains(&fetched), "{stat}");
    assert_eq!(stat["faults"]["store"], 0, "{stat}");
    drop(vm);
}

/// Microseconds, the median first, then all of them.
fn figures(mut times: Vec<u64>) -> String {
    times.sort_unstable();
    format!("{:>8.1} ms ({:?})", times[times.len() / 2] as f64 / 1000.0, times)
}

#[test]
#[ignore = "figures, for a machine that does nothing else"]
fn how_long_it_takes_until_the_first_instruction() {
    const GIB: u64 = 1 << 30;
    let sizes = [
        ("4 GiB, dense", 4 * GIB, "read:working-set=64M,fill=all"),
        ("64 GiB, sparse", 64 * GIB, "read:working-set=64M,fill=working-set"),
    ];
    for (what, memory_bytes, workload) in sizes {
        let guest = Guest { workload, memory_bytes, budget_bytes: GIB, ..WEB };
        let mut saved = Saved::of("restore-figures", &guest);
        let parts = ["from outside", "command_us", "open_us", "engine_us", "adopt_us", "load_us"];
        let mut times: Vec<Vec<u64>> = vec![Vec::new(); parts.len()];
        for _ in 0..5 {
            let began = Instant::now();
            let mut vm = saved.restore(&["--json", "--store-overcommit", "--keep-origin"]);
            let told: Value = serde_json::from_str(&vm.first_line()).expect("JSON");
            times[0].push(began.elapsed().as_micros() as u64);
            for (times, part) in times.iter_mut().zip(parts).skip(1) {
                times.push(told[part].as_u64().expect("a time"));
            }
            saved.stop("web", vm);
        }
        println!("{what}");
        for (part, times) in parts.iter().zip(times) {
            println!("  {part:<14} {}", figures(times));
        }
    }
}

#[test]
#[ignore = "figures, for a machine that does nothing else"]
fn how_long_it_takes_until_the_working_set_has_been_rewritten() {
    const GIB: u64 = 1 << 30;
    for workload in ["rewrite:working-set=512M,fill=all", "random:working-set=512M,fill=all"] {
        let guest = Guest { workload, memory_bytes: 4 * GIB, budget_bytes: 4 * GIB, ..WEB };
        let mut saved = Saved::of("restore-working-set", &guest);
        let first_faults = saved.checkpoint.join("first-faults");
        let round = |saved: &mut Saved, more: &[&str]| {
            let began = Instant::now();
            let vm = saved.restore(&[&["--store-overcommit", "--keep-origin", "--json"], more].concat());
            let mut vm = vm;
            vm.first_line();
            let before = saved.host.wait_state("web", "running")["guest"]["verified_pages"].clone();
            let pages = 512 * MIB / 4096;
            let goal = before.as_u64().expect("a number") + pages;
            saved
                .host
                .wait_stat("web", "a round", |stat| stat["guest"]["verified_pages"].as_u64() >= Some(goal));
            (began.elapsed().as_micros() as u64, vm)
        };
        println!("{workload}");
        let (first, vm) = round(&mut saved, &[]);
        wait_for("the order", || FirstFaults::decode(&fs::read(&first_faults).ok()?).ok());
        saved.stop("web", vm);
        println!("  the first     {:>8.1} ms", first as f64 / 1000.0);
        for (what, more) in [("order known", &[][..]), ("eager", &["--eager"][..])] {
            let times = (0..3).map(|_| {
                let (time, vm) = round(&mut saved, more);
                saved.stop("web", vm);
                time
            });
            println!("  {what:<13} {}", figures(times.collect()));
        }
    }
}
