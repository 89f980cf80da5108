//! `vmemd checkpoint list|show|verify|merge|remove` on archives whose checkpoints this file makes, without any VM.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use checkpoint::archive::{Archive, Entry, IMAGE, Made};
use checkpoint::format::{Disk, DiskVersion, Machine, MapBuilder, PageKind, Save, VmFacts};
use common::vmemd;
use serde_json::Value;
use swapd::digest::page_sum;
use swapd::{PAGE_SIZE, PageNo, Run};
use testkit::{OrSkip, Reason};

const MIB: u64 = 1 << 20;
const PAGES: u64 = 4096;
const MEMORY: u64 = PAGES * PAGE_SIZE as u64;
const NAMES: [&str; 2] = ["1970-01-01T00-01-40Z", "1970-01-01T00-03-20Z"];

fn content(page: u64, version: u64) -> Vec<u8> {
    let words = (0..testkit::pages::WORDS).map(|nth| testkit::pages::word(page, version, nth));
    words.flat_map(u64::to_le_bytes).collect()
}

/// Makes a checkpoint of a VM whose page *n* has the version that `version_of` says (0: zeros), as its process does.
fn save(path: &Path, second: u64, based: bool, version_of: impl Fn(u64) -> u64) -> Entry {
    save_with(path, second, (based, Vec::new()), version_of)
}

/// The same of a VM with disks.
fn save_with(
    path: &Path,
    second: u64,
    (based, disks): (bool, Vec<Disk>),
    version_of: impl Fn(u64) -> u64,
) -> Entry {
    let archive = Archive::create(path).unwrap().lock().unwrap();
    let base = based.then(|| archive.chain(&archive.find(None).unwrap()).unwrap());
    let mut pending = archive.new_checkpoint("web", MEMORY, base.as_ref()).unwrap();
    let shared = base.as_ref().is_some_and(|base| pending.share_base(base).unwrap());
    let below = base.as_ref().map(|base| base.top().map().unwrap());
    // Opened anew: the one at hand may be for direct I/O.
    let image = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(pending.image()));
    let image = File::options().write(true).open(image).unwrap();
    let mut map = MapBuilder::new(PAGES);
    for page in (0..PAGES).map(PageNo) {
        let version = version_of(page.0);
        if version == 0 {
            continue;
        }
        let bytes = content(page.0, version);
        let sum = page_sum(page, &bytes);
        let known = below.as_ref().and_then(|below| below.sum(page)) == Some(sum);
        let kind = if known && !shared { PageKind::Base } else { PageKind::Here };
        map.set_content(Run::one(page), kind, &[sum]);
        if !known {
            image.write_all_at(&bytes, page.offset()).unwrap();
        }
    }
    map.finish(&[]).write(&mut pending.map()).unwrap();
    pending.state().write_all_at(b"state", 0).unwrap();
    let vm = VmFacts {
        name: "web".to_owned(),
        memory_bytes: MEMORY,
        vcpus: 1,
        machine: Machine::Reference,
        offer: None,
        budget_bytes: MEMORY,
        paused: false,
        disks,
        without_disks: Vec::new(),
    };
    let made = Made { made_at_ms: second * 1000, made_by: "a test".to_owned(), vm, save: Save::default() };
    pending.finish(made).unwrap()
}

/// Two checkpoints: of 2048 pages, and of the same but for 10.
fn two(path: &Path) {
    save(path, 100, false, |page| u64::from(page < 2048));
    save(path, 200, true, |page| u64::from(page < 2048) + u64::from(page < 10));
}

fn checkpoint(words: &[&str]) -> Output {
    Command::new(vmemd()).arg("checkpoint").args(words).output().unwrap()
}

/// Its JSON, and its exit code.
fn json(words: &[&str]) -> (Value, Option<i32>) {
    let output = checkpoint(&[words, &["--json"]].concat());
    (serde_json::from_slice(&output.stdout).unwrap_or_default(), output.status.code())
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn place() -> (testkit::TempDir, PathBuf) {
    let dir = testkit::directory("archive");
    let path = dir.path().join("web");
    (dir, path)
}

#[test]
fn only_snapshots_that_no_checkpoint_has_any_more_are_to_go() {
    let (_dir, path) = place();
    let archive = path.to_str().unwrap();
    let disk = |snapshot: &str| Disk {
        name: snapshot.to_owned(),
        file: "/nowhere/disk.qcow2".to_owned(),
        format: "qcow2".to_owned(),
        version: DiskVersion::Snapshot(snapshot.to_owned()),
    };
    let one = |page: u64| u64::from(page == 0);
    // One that the next checkpoint has as well, one of its own, and one that vmemd has not made.
    save_with(&path, 100, (false, ["vmemd-1", "vmemd-2", "mine"].map(disk).to_vec()), one);
    save_with(&path, 200, (false, vec![disk("vmemd-1")]), one);
    if Command::new("qemu-img").arg("--version").output().is_ok() {
        let (verified, code) = json(&["verify", archive]);
        assert_eq!((verified["damage"].as_array().unwrap().len(), code), (3, Some(13)), "{verified}");
    }
    let (verified, code) = json(&["verify", archive, "--without-disks"]);
    assert_eq!((&verified["disks_not_looked_at"][0]["file"], code), (&"/nowhere/disk.qcow2".into(), Some(0)));
    let (removed, code) = json(&["remove", archive, NAMES[0]]);
    assert_eq!((&removed["snapshots"]["deleted"], code), (&serde_json::json!([]), Some(0)));
    let left = removed["snapshots"]["left"].as_array().unwrap();
    let named: Vec<&str> = left.iter().map(|left| left["snapshot"].as_str().unwrap()).collect();
    assert_eq!(named, ["vmemd-2"]);
    assert_eq!(left[0]["why"], "the file is not on this host");
    let (removed, _) = json(&["remove", archive, NAMES[1], "--leave-snapshots"]);
    assert_eq!(removed["snapshots"], Value::Null);
}

#[test]
fn an_archive_is_listed_verified_merged_and_emptied() {
    let (_dir, path) = place();
    two(&path);
    let archive = path.to_str().unwrap();
    let (list, code) = json(&["list", archive]);
    let rows = list["checkpoints"].as_array().unwrap();
    assert_eq!((rows.len(), code), (2, Some(0)));
    let fields = |row: &Value| (row["image_bytes"].as_u64(), row["base_bytes"].as_u64());
    assert_eq!(rows[0]["name"], NAMES[1]);
    assert_eq!(rows[0]["base"], NAMES[0]);
    assert_eq!(fields(&rows[0]), (Some(10 << 12), Some(2038 << 12)));
    assert_eq!(fields(&rows[1]), (Some(2048 << 12), Some(0)));
    let table = said(&checkpoint(&["list", archive]));
    assert!(table.lines().count() == 3 && table.contains(NAMES[1]), "{table}");
    let shown = said(&checkpoint(&["show", archive]));
    assert!(shown.contains("web, the reference guest") && shown.contains(NAMES[0]), "{shown}");
    assert_eq!(json(&["show", archive]).0["manifest"]["base"]["name"], NAMES[0]);

    let (all, code) = json(&["verify", archive]);
    assert_eq!((all["pages"].as_u64(), all["checkpoints"].as_u64(), code), (Some(2058), Some(2), Some(0)));
    let (one, code) = json(&["verify", archive, NAMES[1]]);
    assert_eq!((one["pages"].as_u64(), one["checkpoints"].as_u64(), code), (Some(2048), Some(1), Some(0)));

    let needed = checkpoint(&["remove", archive, NAMES[0]]);
    assert_eq!(needed.status.code(), Some(4), "{}", said(&needed));
    assert!(said(&needed).contains("is the base of"), "{}", said(&needed));
    let (merged, code) = json(&["merge", archive, NAMES[1]]);
    let bytes = |field: &str| merged[field].as_u64().unwrap();
    assert_eq!((bytes("copied_bytes") + bytes("shared_bytes"), code), (2038 << 12, Some(0)));
    assert_eq!(checkpoint(&["remove", archive, NAMES[0]]).status.code(), Some(0));
    let (one, code) = json(&["verify", archive]);
    assert_eq!((one["pages"].as_u64(), code), (Some(2048), Some(0)));

    // What a VM reads from is not removed.
    let entry = Archive::open(&path).unwrap().find(None).unwrap();
    let image = entry.image(true).unwrap();
    let used = checkpoint(&["remove", archive, NAMES[1]]);
    assert_eq!(used.status.code(), Some(4), "{}", said(&used));
    assert!(said(&used).contains("in use"), "{}", said(&used));
    drop(image);
    let lock = Archive::open(&path).unwrap().lock().unwrap();
    assert_eq!(checkpoint(&["remove", archive, NAMES[1]]).status.code(), Some(4));
    drop(lock);
    assert_eq!(checkpoint(&["remove", archive, NAMES[1]]).status.code(), Some(0));
    let (list, code) = json(&["list", archive]);
    assert_eq!((list["checkpoints"].as_array().map(Vec::len), code), (Some(0), Some(0)));
    for command in ["show", "verify"] {
        assert_eq!(checkpoint(&[command, archive]).status.code(), Some(4), "{command}");
    }
}

#[test]
fn damage_has_an_exit_code_and_names_the_pages() {
    let (_dir, path) = place();
    two(&path);
    let archive = path.to_str().unwrap();
    let image = File::options().write(true).open(path.join(NAMES[0]).join(IMAGE)).unwrap();
    for page in 100..130 {
        image.write_all_at(b"else", PageNo(page).offset() + 4000).unwrap();
    }
    let output = checkpoint(&["verify", archive, NAMES[1]]);
    assert_eq!(output.status.code(), Some(13));
    let text = said(&output);
    assert!(
        text.contains(&format!("{}: page 100 is not", NAMES[0])) && text.contains("14 pages more"),
        "{text}"
    );
    let (all, code) = json(&["verify", archive]);
    assert_eq!((all["damaged_pages"].as_u64(), code), (Some(30), Some(13)));
    assert_eq!(checkpoint(&["merge", archive, NAMES[1]]).status.code(), Some(13));

    // A manifest that is cut off, and one of a later vmemd.
    let manifest = path.join(NAMES[1]).join("manifest");
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, &text[..text.len() - 9]).unwrap();
    let (list, code) = json(&["list", archive]);
    assert_eq!((list["unreadable"][0]["name"].as_str(), code), (Some(NAMES[1]), Some(0)));
    assert_eq!(checkpoint(&["verify", archive]).status.code(), Some(13));
    assert_eq!(checkpoint(&["show", archive, NAMES[1]]).status.code(), Some(13));
    let json = text.rsplit_once("xxh3").unwrap().0.replace("\"version\": 1", "\"version\": 7");
    let sum = xxhash_rust::xxh3::xxh3_64(json.as_bytes());
    std::fs::write(&manifest, format!("{json}xxh3 {sum:016x}\n")).unwrap();
    let output = checkpoint(&["show", archive, NAMES[1]]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("version 7"), "{}", said(&output));
}

#[test]
fn what_is_no_archive_or_no_checkpoint_is_said() {
    let (dir, path) = place();
    for command in ["list", "show", "verify"] {
        for place in [path.to_str().unwrap(), dir.path().to_str().unwrap(), "/dev/null"] {
            let output = checkpoint(&[command, place]);
            assert_eq!(output.status.code(), Some(4), "{command} {place}: {}", said(&output));
            assert!(said(&output).contains("no archive"), "{}", said(&output));
        }
    }
    two(&path);
    let archive = path.to_str().unwrap();
    for command in ["show", "verify", "merge", "remove"] {
        assert_eq!(
            checkpoint(&[command, archive, "2000-01-01T00-00-00Z"]).status.code(),
            Some(4),
            "{command}"
        );
        assert_eq!(checkpoint(&[command, archive, "../web"]).status.code(), Some(2), "{command}");
    }
    for command in ["merge", "remove"] {
        assert_eq!(checkpoint(&[command, archive]).status.code(), Some(2), "{command} wants a name");
    }
}

#[test]
fn where_files_share_blocks_nothing_is_copied() {
    let dir = testkit::directory_in(env!("CARGO_TARGET_TMPDIR"), "archive");
    let disk = common::disk::Disk::xfs(dir.path(), 512 * MIB).or_skip(Reason::Loop);
    let path = PathBuf::from(disk.store()).join("web");
    two(&path);
    let archive = Archive::open(&path).unwrap();
    // The second has all pages itself, and no base.
    let second = archive.find(None).unwrap();
    assert_eq!((second.manifest().base.clone(), second.manifest().pages.here), (None, 2048));
    let verified = archive.verify(&archive.list().unwrap().entries, &|_| true).unwrap();
    assert!(verified.damage.is_empty() && verified.pages == 4096, "{verified:?}");
    let locked = archive.lock().unwrap();
    locked.remove(NAMES[0]).unwrap();
    let verified = archive.verify(&[archive.find(None).unwrap()], &|_| true).unwrap();
    assert!(verified.damage.is_empty() && verified.pages == 2048, "{verified:?}");
}

#[test]
fn a_merge_without_room_changes_nothing_that_is_seen() {
    let dir = testkit::directory_in(env!("CARGO_TARGET_TMPDIR"), "archive");
    let disk = common::disk::Disk::ext4(dir.path(), 64 * MIB).or_skip(Reason::Loop);
    let path = PathBuf::from(disk.store()).join("web");
    two(&path);
    disk.fill(2 * MIB);
    let archive = path.to_str().unwrap();
    let full = checkpoint(&["merge", archive, NAMES[1]]);
    assert_eq!(full.status.code(), Some(5), "{}", said(&full));
    let (list, _) = json(&["list", archive]);
    assert_eq!(list["checkpoints"][0]["base"], NAMES[0]);
    assert!(list["checkpoints"][0]["disk_bytes"].as_u64() < Some(MIB), "{list}");
    assert_eq!(json(&["verify", archive]).1, Some(0));
    disk.drop_ballast();
    assert_eq!(json(&["merge", archive, NAMES[1]]).1, Some(0));
    assert_eq!(json(&["verify", archive]).1, Some(0));
}

#[test]
fn what_is_missing_is_damage_and_names_the_way_on() {
    for file in ["manifest", "memory.img", "memory.map", "state"] {
        let (_dir, path) = place();
        two(&path);
        let archive = path.to_str().unwrap();
        std::fs::remove_file(path.join(NAMES[1]).join(file)).unwrap();
        let restored =
            Command::new(vmemd()).args(["restore", archive, "--run-dir"]).arg(&path).output().unwrap();
        for (command, output) in [
            ("verify", checkpoint(&["verify", archive])),
            ("one", checkpoint(&["verify", archive, NAMES[1]])),
            ("restore", restored),
        ] {
            assert_eq!(output.status.code(), Some(13), "{command} without {file}: {}", said(&output));
            assert!(said(&output).contains(NAMES[1]), "{command} without {file}: {}", said(&output));
        }
        let exported = checkpoint(&["export", archive, "-"]);
        assert_eq!(exported.status.code(), Some(13), "{file}: {}", said(&exported));
        if file == "manifest" {
            let shown = checkpoint(&["show", archive]);
            assert_eq!(shown.status.code(), Some(13), "{}", said(&shown));
            assert!(said(&shown).contains("name an older one"), "{}", said(&shown));
            let (list, code) = json(&["list", archive]);
            assert_eq!((list["unreadable"][0]["name"].as_str(), code), (Some(NAMES[1]), Some(0)));
        }
    }
}

#[test]
fn a_checkpoint_in_the_place_of_an_archive_is_told() {
    let (_dir, path) = place();
    two(&path);
    let inner = path.join(NAMES[1]);
    for command in ["list", "show", "verify"] {
        let output = checkpoint(&[command, inner.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(2), "{command}: {}", said(&output));
        let both = format!("{} {}", path.canonicalize().unwrap().display(), NAMES[1]);
        assert!(said(&output).contains(&both), "{command}: {}", said(&output));
    }
}

#[test]
fn a_merge_that_has_no_room_does_not_begin() {
    let dir = testkit::directory_in(env!("CARGO_TARGET_TMPDIR"), "archive");
    let disk = common::disk::Disk::ext4(dir.path(), 64 * MIB).or_skip(Reason::Loop);
    let path = PathBuf::from(disk.store()).join("web");
    two(&path);
    let archive = path.to_str().unwrap();
    disk.fill(6 * MIB);
    let full = checkpoint(&["merge", archive, NAMES[1]]);
    assert_eq!(full.status.code(), Some(5), "{}", said(&full));
    assert!(said(&full).contains("no room") && said(&full).contains("free"), "{}", said(&full));
    assert!(!path.join(NAMES[1]).join("merge.new").exists());
}
