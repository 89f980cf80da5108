//! `vmemd checkpoint` of the reference guest, which verifies its memory all the while.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::path::{Path, PathBuf};

use common::{Host, Said, needs_vms, wait_for};
use serde_json::Value;

/// Writes for long enough that there is always something to save.
const GUEST: &str = "rewrite:working-set=64M";

struct Place {
    host: Host,
    archive: PathBuf,
}

impl Place {
    fn new(name: &str) -> Place {
        needs_vms();
        let host = Host::new(name);
        let archive = host.root.join("archive");
        Place { host, archive }
    }

    fn to(&self) -> &str {
        self.archive.to_str().expect("a path that is text")
    }

    fn save(&self, name: &str, more: &[&str]) -> Said {
        self.host.vmemd(&[&["checkpoint", name, "--to", self.to(), "--json"], more].concat())
    }

    /// The names in the archive, hidden ones and all.
    fn names(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(&self.archive) else { return Vec::new() };
        let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
        let mut names: Vec<String> = names.filter(|name| name != "archive.lock").collect();
        names.sort();
        names
    }

    /// Every named checkpoint is whole.
    fn verify(&self) {
        let said = self.host.vmemd(&["checkpoint", "verify", self.to()]);
        assert_eq!(said.code, 0, "{said:?}");
    }

    /// The VM runs, and finds in its memory what it has written.
    fn runs_on(&self, name: &str) {
        self.host.wait_rounds(name, 2);
        let stat = self.host.stat(name).expect("it is there");
        assert_eq!(stat["guest"]["mismatched_pages"], 0, "{stat}");
        assert_eq!((&stat["state"], &stat["checkpoint"]), (&"running".into(), &Value::Null), "{stat}");
    }

    fn begins(&self, name: &str) {
        wait_for("a checkpoint to be under way", || {
            let stat = self.host.stat(name)?;
            (stat["checkpoint"]["bytes_written"].as_u64()? > 0).then_some(())
        });
    }
}

fn is_file(directory: &Path, name: &str) -> bool {
    directory.join(name).is_file()
}

#[test]
fn a_guest_that_writes_is_saved_and_runs_on() {
    let mut place = Place::new("save");
    let mut vm = place.host.start_vm("web", GUEST);
    place.host.wait_rounds("web", 2);
    let said = place.save("web", &[]);
    assert_eq!(said.code, 0, "{said:?}");
    let report = said.json();
    println!("{report}");
    place.runs_on("web");
    assert_eq!(place.names(), [report["checkpoint"].as_str().unwrap()]);
    let made = place.archive.join(report["checkpoint"].as_str().unwrap());
    assert!(["manifest", "memory.img", "memory.map", "state"].iter().all(|name| is_file(&made, name)));
    place.verify();
    let stat = place.host.stat("web").unwrap();
    assert_eq!(stat["last_checkpoint"]["name"], report["checkpoint"], "{stat}");
    assert!(stat["last_checkpoint"]["bytes"].as_u64().unwrap() > 32 << 20, "{stat}");
    // Against that one, and only the new one is kept: it gets what it needs of the other.
    let said = place.save("web", &["--base", "latest", "--keep", "1"]);
    assert_eq!(said.code, 0, "{said:?}");
    let second = said.json();
    println!("{second}");
    assert_eq!(second["base"], report["checkpoint"]);
    assert_eq!(place.names(), [second["checkpoint"].as_str().unwrap()]);
    place.verify();
    place.runs_on("web");
    vm.signal(libc::SIGTERM);
    vm.ends_with(130);
}

#[test]
fn a_paused_vm_stays_paused_and_one_that_is_paused_meanwhile_too() {
    let mut place = Place::new("save-paused");
    let _vm = place.host.start_vm("web", GUEST);
    place.host.wait_rounds("web", 1);
    assert_eq!(place.host.vmemd(&["pause", "web"]).code, 0);
    let said = place.save("web", &[]);
    assert_eq!((said.code, said.json()["stood_still"].as_bool()), (0, Some(true)), "{said:?}");
    assert_eq!(place.host.stat("web").unwrap()["state"], "paused");
    assert_eq!(place.host.vmemd(&["resume", "web"]).code, 0);
    // Slowly, so that there is time.
    let slow = ["checkpoint", "web", "--to", place.to(), "--rate", "32M"].map(str::to_owned);
    let mut saving = place.host.start(&slow.each_ref().map(String::as_str));
    place.begins("web");
    assert_eq!(place.host.vmemd(&["set", "web", "--ram", "32M"]).code, 0);
    assert_eq!(place.host.vmemd(&["pause", "web"]).code, 0);
    saving.ends_with(0);
    assert_eq!(place.host.stat("web").unwrap()["state"], "paused");
    assert_eq!(place.host.vmemd(&["resume", "web"]).code, 0);
    place.runs_on("web");
    place.verify();
}

#[test]
fn cancelled_or_killed_nothing_is_left_and_the_vm_runs_on() {
    let mut place = Place::new("save-cancel");
    let _vm = place.host.start_vm("web", GUEST);
    place.host.wait_rounds("web", 1);
    let slow = ["checkpoint", "web", "--to", place.to(), "--rate", "16M"].map(str::to_owned);
    for end in [libc::SIGINT, libc::SIGKILL] {
        let mut saving = place.host.start(&slow.each_ref().map(String::as_str));
        place.begins("web");
        // Beside it there is no other one, and no migration.
        place.save("web", &[]).fails(4, &["another command"]);
        let other = place.host.root.join("other");
        let other = ["checkpoint", "web", "--to", other.to_str().unwrap()];
        place.host.vmemd(&other).fails(4, &["a checkpoint of it is being made already"]);
        let away = place.host.vmemd(&["migrate", "web", "--to", "127.0.0.1:9"]);
        away.fails(4, &["a checkpoint of it is being made"]);
        saving.signal(end);
        if end == libc::SIGINT {
            saving.ends_with(130);
            assert_eq!(place.names(), [] as [&str; 0], "{}", saving.log());
            assert!(saving.log().contains("runs on here"), "{}", saving.log());
        } else {
            saving.end();
            wait_for("the checkpoint to end", || {
                place.host.stat("web")?["checkpoint"].is_null().then_some(())
            });
            assert!(place.names().iter().all(|name| name.starts_with('.')), "{:?}", place.names());
        }
        place.runs_on("web");
    }
    // The next one removes what is left.
    assert_eq!(place.save("web", &[]).code, 0);
    assert_eq!(place.names().len(), 1, "{:?}", place.names());
    place.verify();
}

#[test]
fn a_vm_that_ends_meanwhile_leaves_nothing_named() {
    for stop in [true, false] {
        let mut place = Place::new("save-ends");
        let mut vm = place.host.start_vm("web", GUEST);
        place.host.wait_rounds("web", 1);
        let slow = ["checkpoint", "web", "--to", place.to(), "--rate", "16M"].map(str::to_owned);
        let mut saving = place.host.start(&slow.each_ref().map(String::as_str));
        place.begins("web");
        if stop {
            assert_eq!(place.host.vmemd(&["stop", "web"]).code, 0);
            saving.end();
            assert!(saving.log().contains("by `vmemd stop`"), "{}", saving.log());
        } else {
            common::kill(vm.pid());
            saving.ends_with(7);
        }
        vm.end();
        assert_eq!(place.names(), [] as [&str; 0], "{}", saving.log());
    }
}

#[test]
fn with_stop_the_vm_ends_when_it_is_saved() {
    let mut place = Place::new("save-stop");
    let mut vm = place.host.start_vm("web", GUEST);
    place.host.wait_rounds("web", 1);
    let said = place.save("web", &["--stop"]);
    assert_eq!(said.code, 0, "{said:?}");
    vm.ends_with(0);
    assert_eq!(place.names().len(), 1);
    place.verify();
}

/// What fails behind a checkpoint that is whole has a code of its own, and the checkpoint is named.
#[test]
fn older_ones_that_cannot_be_removed_do_not_make_the_new_one_a_failure() {
    let mut place = Place::new("save-keep");
    let _vm = place.host.start_vm("web", GUEST);
    place.host.wait_rounds("web", 1);
    let first = place.save("web", &[]).json()["checkpoint"].as_str().unwrap().to_owned();
    std::fs::remove_file(place.archive.join(&first).join("manifest")).unwrap();
    let said = place.save("web", &["--keep", "1"]);
    // The one whose base is not known goes with nobody's word; the new one has nothing beside it that could go.
    assert_eq!(said.code, 0, "{said:?}");
    let said = place.save("web", &["--keep", "1"]);
    let made = said.json()["checkpoint"].as_str().unwrap().to_owned();
    said.fails(14, &["the new checkpoint", &made, "is whole", &first]);
    let verified = place.host.vmemd(&["checkpoint", "verify", place.to(), &made]);
    assert_eq!(verified.code, 0, "{verified:?}");
    // In the place of the latest, nothing older is taken for a base.
    std::fs::remove_file(place.archive.join(&made).join("manifest")).unwrap();
    place.save("web", &["--base", "latest"]).fails(13, &[&made, "name an older one"]);
    place.runs_on("web");
}

#[test]
fn what_cannot_be_is_refused_before_it_begins() {
    let mut place = Place::new("save-bad");
    let _vm = place.host.start_vm("web", GUEST);
    place.save("db", &[]).fails(4, &["db"]);
    place.save("web", &["--base", "2026-11-29T23-20-00Z"]).fails(4, &["there is no checkpoint"]);
    std::fs::write(place.host.root.join("file"), "").unwrap();
    let not = place.host.root.join("file");
    let said = place.host.vmemd(&["checkpoint", "web", "--to", not.to_str().unwrap()]);
    said.fails(2, &["not a directory"]);
    assert_eq!(place.names(), [] as [&str; 0]);
    place.runs_on("web");
}
