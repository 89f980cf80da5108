//! Encrypted checkpoints: of a VM whose store is encrypted, with a key that the user names.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod qemu;

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use common::{Host, Running, Said, kill, needs_vms, wait_for};
use qemu::{BOOT, Guest, Machine, field, qemus};
use testkit::random::Random;

const GUEST: &str = "rewrite:working-set=64M";
const PAGE: usize = 4096;
/// What of a page is looked for.
const PART: usize = 16;

struct Place {
    host: Host,
    archive: PathBuf,
    key: PathBuf,
}

impl Place {
    fn new(name: &str) -> Place {
        let host = Host::new(name);
        let (archive, key) = (host.root.join("archive"), host.root.join("key"));
        write_key(&key, 7, 0o600);
        Place { host, archive, key }
    }

    /// A VM with an encrypted store, and with pages there.
    fn start(&mut self) -> Running {
        needs_vms();
        let store = self.host.store();
        let memory = ["run", "--name", "web", "--memory", "128M", "--ram", "48M", "--guest", GUEST];
        let vm = self.host.start(&[&memory[..], &["--store", &store, "--encrypt-store"]].concat());
        self.host.wait_state("web", "running");
        self.host.wait_rounds("web", 2);
        vm
    }

    fn save(&self, more: &[&str]) -> Said {
        self.host.vmemd(&[&["checkpoint", "web", "--to", text(&self.archive), "--json"], more].concat())
    }

    fn saved(&self, more: &[&str]) -> String {
        let said = self.save(&[&["--encrypt-to", text(&self.key)], more].concat());
        assert_eq!(said.code, 0, "{said:?}");
        println!("{}", said.out);
        assert_eq!(said.json()["encrypted"], true, "{said:?}");
        said.json()["checkpoint"].as_str().expect("a name").to_owned()
    }

    fn archive(&self, words: &[&str]) -> Said {
        self.host.vmemd(&[&["checkpoint", words[0], text(&self.archive)], &words[1..]].concat())
    }

    fn restore_words<'a>(&'a self, store: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        [&["restore", text(&self.archive), "--store", store, "--ram", "48M"], more].concat()
    }

    fn refused(&self, more: &[&str]) -> Said {
        let store = self.host.store();
        self.host.vmemd(&self.restore_words(&store, more))
    }

    /// A VM runs from the latest checkpoint, and finds all of its memory as it was.
    fn comes_back(&mut self, more: &[&str]) {
        let (store, key) = (self.host.store(), text(&self.key).to_owned());
        let words = self.restore_words(&store, &[&["--key", &key], more].concat());
        let words: Vec<String> = words.into_iter().map(str::to_owned).collect();
        let mut vm = self.host.start(&words.iter().map(String::as_str).collect::<Vec<_>>());
        // It may have been paused when it was saved.
        self.host
            .wait_stat("web", "its memory", |stat| stat["state"] == "running" || stat["state"] == "paused");
        assert_eq!(self.host.vmemd(&["resume", "web"]).code, 0);
        self.host.wait_rounds("web", 2);
        assert_eq!(self.host.stat("web").expect("it runs")["poisoned_pages"], 0);
        // What it has stored since is encrypted as well: nobody can save it as it is by mistake.
        self.save(&["--base", "none"]).fails(2, &["--encrypt-to"]);
        assert_eq!(self.host.vmemd(&["stop", "web"]).code, 0);
        vm.ends_with(0);
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path that is text")
}

fn key_bytes(seed: u64) -> [u8; 32] {
    let mut random = Random(seed);
    std::array::from_fn(|_| random.below(256) as u8)
}

fn write_key(path: &Path, seed: u64, mode: u32) {
    fs::write(path, key_bytes(seed)).expect("a key file");
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("its mode");
}

/// The files of the checkpoints of an archive.
fn files(archive: &Path) -> Vec<PathBuf> {
    let dirs = fs::read_dir(archive).expect("an archive").map(|entry| entry.expect("an entry").path());
    let within = dirs.filter(|path| path.is_dir()).flat_map(|dir| fs::read_dir(dir).expect("a checkpoint"));
    within.map(|entry| entry.expect("a file").path()).collect()
}

/// Whether a part of memory says something: zeros and counters are everywhere.
fn is_telling(part: &[u8]) -> bool {
    part.iter().collect::<HashSet<_>>().len() >= 10
}

/// How many of these parts are in a file, wherever they begin; in an image, where parts of pages can begin.
fn found(parts: &HashSet<[u8; PART]>, file: &Path) -> usize {
    let bytes = fs::read(file).expect("a file");
    let step = if file.ends_with("memory.img") { PART } else { 1 };
    bytes.windows(PART).step_by(step).filter(|part| parts.contains(*part)).count()
}

#[test]
fn nothing_of_a_vm_s_memory_is_in_an_encrypted_checkpoint_and_it_comes_back_with_the_key() {
    let mut place = Place::new("encrypted");
    let mut vm = place.start();
    place.save(&[]).fails(2, &["is encrypted", "--encrypt-to", "--plain"]);
    // The same memory twice: plain and encrypted.
    assert_eq!(place.host.vmemd(&["pause", "web"]).code, 0);
    let plain = place.host.root.join("plain");
    let said = place.host.vmemd(&["checkpoint", "web", "--to", text(&plain), "--plain"]);
    assert_eq!(said.code, 0, "{said:?}");
    place.saved(&[]);

    let name = |file: &Path| file.file_name().expect("a name").to_string_lossy().into_owned();
    let mut parts = HashSet::new();
    for file in files(&plain) {
        let bytes = fs::read(&file).expect("a file");
        let every = if name(&file) == "memory.img" { PAGE } else { PART };
        let of_file = bytes.chunks(every).filter_map(|piece| piece.first_chunk().copied());
        if matches!(name(&file).as_str(), "memory.img" | "memory.map" | "state") {
            parts.extend(of_file.filter(|part: &[u8; PART]| is_telling(part)));
        }
    }
    assert!(parts.len() > 10_000, "{} parts", parts.len());
    for file in files(&plain).iter().filter(|file| name(file) != "manifest") {
        assert!(found(&parts, file) > 0, "nothing is found in {}, which has all of it", file.display());
    }
    let encrypted = files(&place.archive);
    assert_eq!(encrypted.len(), 4, "{encrypted:?}");
    for file in encrypted {
        assert_eq!(found(&parts, &file), 0, "{} tells of the memory", file.display());
    }

    // The key is in nobody's arguments or environment, and in no word of theirs.
    let key = key_bytes(7);
    let digits: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let stat = place.host.vmemd(&["stat", "web", "--json"]).out;
    let shown = place.archive(&["show", "--json"]).out;
    for file in ["cmdline", "environ"] {
        let words = fs::read(format!("/proc/{}/{file}", vm.pid())).expect("a process");
        assert!(!words.windows(16).any(|part| part == &key[..16]), "the key is in {file}");
    }
    for said in [&stat, &shown, &vm.log()] {
        assert!(!said.contains(&digits[..16]), "{said}");
    }
    assert_eq!(place.host.vmemd(&["stop", "web"]).code, 0);
    vm.ends_with(0);

    place.refused(&[]).fails(2, &["is encrypted", "--key KEYFILE"]);
    let other = place.host.root.join("other");
    write_key(&other, 8, 0o600);
    place.refused(&["--key", text(&other)]).fails(2, &["other", "is not the one of checkpoint"]);
    write_key(&other, 7, 0o644);
    place.refused(&["--key", text(&other)]).fails(2, &["others than its user", "chmod 600"]);
    let plain_words = ["restore", text(&plain), "--key", text(&place.key), "--store", &place.host.store()];
    place.host.vmemd(&plain_words).fails(2, &["is not encrypted"]);
    // In digits, too.
    fs::write(&place.key, format!("{digits}\n")).expect("a key file");
    place.comes_back(&["--eager"]);
}

#[test]
fn a_chain_has_one_key_and_is_verified_merged_and_kept_with_it() {
    let mut place = Place::new("encrypted-chain");
    let _vm = place.start();
    let first = place.saved(&[]);
    place.host.wait_rounds("web", 1);
    let second = place.saved(&["--base", "latest"]);
    let list = place.archive(&["list", "--json"]).json();
    assert_eq!(list["checkpoints"][0]["encrypted"], true, "{list}");
    let key = text(&place.key).to_owned();
    let (shown, is_based) = {
        let shown = place.archive(&["show", &second, "--json"]).json();
        let is_based = shown["manifest"]["base"]["name"] == first.as_str();
        (shown, is_based)
    };
    let salt = |shown: &serde_json::Value| shown["manifest"]["encryption"]["salt"].clone();
    assert_eq!(salt(&shown), salt(&place.archive(&["show", &first, "--json"]).json()), "{shown}");

    // What can be compared without the key, and with it.
    place.archive(&["verify"]).fails(2, &[&first, &second, "--key KEYFILE"]);
    let said = place.archive(&["verify", "--key", &key]);
    assert!(said.code == 0 && said.out.contains("2 checkpoints are whole"), "{said:?}");
    let other = place.host.root.join("other");
    write_key(&other, 8, 0o600);
    place.archive(&["verify", "--key", text(&other)]).fails(2, &["is not the one of checkpoint"]);

    // No other key, and no plain one by mistake.
    place
        .save(&["--encrypt-to", text(&other), "--base", &second])
        .fails(2, &["is not the one of checkpoint"]);
    place.save(&["--base", &second]).fails(2, &["--encrypt-to"]);
    place.save(&["--plain", "--base", &second]).fails(2, &["cannot be the base", "--encrypt-to"]);

    // Its stream takes the key, and makes the same checkpoint elsewhere without it.
    place.archive(&["export", "-"]).fails(2, &["--key KEYFILE"]);
    let stream = place.host.root.join("stream");
    let mut export = place.host.command(&["checkpoint", "export", text(&place.archive), "-", "--key", &key]);
    let exported = export.stdout(fs::File::create(&stream).expect("a file")).output().expect("vmemd runs");
    assert!(exported.status.success(), "{}", String::from_utf8_lossy(&exported.stderr));
    let elsewhere = place.host.root.join("elsewhere");
    let import = ["checkpoint", "import", text(&stream), "--to", text(&elsewhere)];
    let said = place.host.vmemd(&import);
    assert_eq!(said.code, 0, "{said:?}");
    let said = place.host.vmemd(&["checkpoint", "verify", text(&elsewhere), "--key", &key]);
    assert!(said.code == 0 && said.out.contains("1 checkpoint is whole"), "{said:?}");

    // Merged, it needs the other no more, and has its key still.
    if is_based {
        place.archive(&["merge", &second]).fails(2, &["--key KEYFILE"]);
    }
    let said = place.archive(&["merge", &second, "--key", &key]);
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!(place.archive(&["remove", &first]).code, 0);
    let third = place.saved(&["--base", "latest", "--keep", "1"]);
    let said = place.archive(&["verify", "--key", &key]);
    assert!(said.code == 0 && said.out.contains("1 checkpoint is whole"), "{said:?}");

    // A byte of a page, of the map (which has another name since it was merged) and of the state.
    let shown = place.archive(&["show", &third, "--json"]).json();
    let map = shown["manifest"]["parts"]["map"]["file"].as_str().expect("a name").to_owned();
    let flip = |file: &str| {
        let file = place.archive.join(&third).join(file);
        let file = fs::File::options().read(true).write(true).open(file).expect("a file of the checkpoint");
        let at = (0..file.metadata().expect("a file").len()).step_by(PAGE).find_map(|at| {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).expect("a byte");
            (byte[0] != 0).then_some((at, byte[0]))
        });
        let (at, byte) = at.expect("there is something");
        file.write_all_at(&[byte ^ 0x40], at).expect("a byte");
    };
    for (file, words) in
        [("memory.img", "is not what was saved"), (map.as_str(), "checksum"), ("state", "checksum")]
    {
        flip(file);
        place.archive(&["verify", "--key", &key]).fails(13, &[words]);
        if file != "memory.img" {
            place.archive(&["verify"]).fails(13, &[words]);
        }
        flip(file);
    }
    assert_eq!(place.archive(&["verify", "--key", &key]).code, 0);
    assert_eq!(place.host.vmemd(&["stop", "web"]).code, 0);
    place.comes_back(&[]);
}

#[test]
fn a_qemu_comes_back_from_an_encrypted_checkpoint() {
    let qemu = qemus().remove(0);
    let mut place = Place::new("encrypted-qemu");
    let store = place.host.store();
    let words = ["run", "--name", "db", "--ram", "128M", "--store", &store, "--encrypt-store", "--"];
    let mut command = place.host.command(&words);
    command.arg(&qemu.binary).args(Machine::new("192M").run("checker memory 60M 100000").args());
    let guest = Guest::start(command);
    guest.wait_for("checker memory round=1 ", BOOT);
    let (to, key) = (text(&place.archive).to_owned(), text(&place.key).to_owned());
    place.host.vmemd(&["checkpoint", "db", "--to", &to]).fails(2, &["--encrypt-to"]);
    let said = place.host.vmemd(&["checkpoint", "db", "--to", &to, "--encrypt-to", &key]);
    assert_eq!(said.code, 0, "{said:?}");
    kill(guest.pid());
    wait_for("the last of the console", || guest.console().is_over().then_some(()));
    let rounds = || {
        let lines = guest.console().lines_of_each();
        let said: Vec<u64> = lines
            .iter()
            .filter(|line| line.starts_with("checker memory round=") && line.contains(" mismatched="))
            .map(|line| field(line, "mismatched"))
            .collect();
        assert!(said.iter().all(|mismatched| *mismatched == 0), "{lines:?}");
        said.len()
    };
    let before = rounds();
    place.refused(&[]).fails(2, &["--key KEYFILE"]);
    let _vm = place.host.start(&["restore", &to, "--store", &store, "--ram", "96M", "--key", &key]);
    place.host.wait_state("db", "running");
    wait_for("rounds of the checker", || (rounds() >= before + 3).then_some(()));
    assert_eq!(place.host.vmemd(&["stop", "db"]).code, 0);
}
