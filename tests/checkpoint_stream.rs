//! `vmemd checkpoint export` and `import`, as a user calls them: through pipes, and with a real object store where one
//! is installed. The checkpoints are made by hand; no VM runs.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use checkpoint::archive::{Archive, Made};
use checkpoint::format::{Disk, DiskVersion, Machine, MapBuilder, PageKind, Save, VmFacts};
use memmap2::MmapMut;
use swapd::digest::page_sum;
use swapd::units::bytes_of;
use swapd::{PAGE_SIZE, PageNo, Run};
use testkit::TempDir;

/// 64 MiB, of which the second half has content: more than two parts of an upload.
const PAGES: u64 = 16 << 10;

struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Place {
        let place = Place { dir: testkit::directory("streams") };
        make(&place.path("from"), "web", 1);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).into_os_string().into_string().unwrap()
    }

    fn vmemd(&self, args: &[&str]) -> Command {
        let mut command = Command::new(common::vmemd());
        command.arg("checkpoint").args(args).stdin(Stdio::null());
        for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT", "AWS_REGION"] {
            command.env_remove(name);
        }
        command
    }

    fn say(&self, args: &[&str]) -> Output {
        self.vmemd(args).output().unwrap()
    }

    /// A stream of the checkpoint, in a file.
    fn stream(&self) -> PathBuf {
        let path = self.path("web.log");
        let to = File::create(&path).unwrap();
        let said = self.vmemd(&["export", &self.text("from"), "-"]).stdout(to).output().unwrap();
        assert!(said.status.success(), "{said:?}");
        path
    }
}

fn made(vm: &str, at: u64) -> Made {
    let disk = Disk {
        name: "root".to_owned(),
        file: "/srv/root.qcow2".to_owned(),
        format: "qcow2".to_owned(),
        version: DiskVersion::Snapshot("vmemd-1".to_owned()),
    };
    let vm = VmFacts {
        name: vm.to_owned(),
        memory_bytes: bytes_of(PAGES),
        vcpus: 1,
        machine: Machine::Reference,
        offer: None,
        budget_bytes: bytes_of(PAGES),
        paused: false,
        disks: vec![disk],
        without_disks: Vec::new(),
    };
    Made { made_at_ms: at * 1000, made_by: "a test".to_owned(), vm, save: Save::default() }
}

fn make(path: &Path, vm: &str, at: u64) {
    let archive = Archive::create(path).unwrap().lock().unwrap();
    let pending = archive.new_checkpoint(vm, bytes_of(PAGES), None).unwrap();
    let run = Run::new(PageNo(PAGES / 2), (PAGES / 2) as u32);
    let mut bytes = MmapMut::map_anon(run.bytes()).unwrap();
    let words = bytes.as_chunks_mut::<8>().0.iter_mut().enumerate();
    words.for_each(|(nth, word)| *word = testkit::pages::word(at, 1, nth).to_le_bytes());
    let pages = run.pages().zip(bytes.as_chunks::<PAGE_SIZE>().0);
    let sums: Vec<u64> = pages.map(|(page, bytes)| page_sum(page, bytes)).collect();
    let mut map = MapBuilder::new(PAGES);
    map.set_content(run, PageKind::Here, &sums);
    pending.image().write_all_at(&bytes, run.start.offset()).unwrap();
    map.finish(&[]).write(&mut pending.map()).unwrap();
    pending.finish(made(vm, at)).unwrap();
}

fn is(said: &Output, code: i32, words: &str) {
    let text = String::from_utf8_lossy(&said.stderr);
    assert_eq!(said.status.code(), Some(code), "{text}");
    assert!(text.contains(words), "{words:?} in {text}");
}

/// Nothing has been left, hidden or not.
fn is_empty(archive: &Path) {
    let names = fs::read_dir(archive).unwrap().map(|entry| entry.unwrap().file_name());
    let names: Vec<_> = names.filter(|name| name != "archive.lock").collect();
    assert!(names.is_empty(), "{names:?}");
}

#[test]
fn a_checkpoint_goes_through_a_pipe() {
    let place = Place::new();
    let mut export = place.vmemd(&["export", &place.text("from"), "-"]);
    let mut export = export.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pipe = export.stdout.take().unwrap();
    let import = place.vmemd(&["import", "-", "--to", &place.text("to")]).stdin(pipe).output().unwrap();
    is(&import, 0, "disk root: its content is no part of the stream");
    is(&export.wait_with_output().unwrap(), 0, "disk root: its content is no part of the stream");
    // The disk stayed where it was made.
    is(&place.say(&["verify", &place.text("to")]), 13, "its disk /srv/root.qcow2 is not there");
    is(&place.say(&["verify", "--without-disks", &place.text("to")]), 0, "");
    let again = place.say(&["import", place.stream().to_str().unwrap(), "--to", &place.text("to")]);
    is(&again, 4, "has this checkpoint already");
}

#[test]
fn what_is_damaged_cut_or_of_another_vm_is_refused() {
    let place = Place::new();
    let stream = place.stream();
    let to = place.text("to");
    let import = |name: &str| place.say(&["import", &place.text(name), "--to", &to]);
    let whole = fs::read(&stream).unwrap();
    fs::write(place.path("cut"), &whole[..whole.len() - 1]).unwrap();
    is(&import("cut"), 13, "cut off");
    is_empty(&place.path("to"));
    let mut damaged = whole.clone();
    damaged[20 << 20] ^= 1;
    fs::write(place.path("damaged"), damaged).unwrap();
    is(&import("damaged"), 13, "is not what was saved");
    fs::write(place.path("other"), "no checkpoint").unwrap();
    is(&import("other"), 13, "is no stream of a checkpoint");
    is(&import("missing"), 1, "cannot open");
    is_empty(&place.path("to"));
    make(&place.path("db"), "db", 2);
    is(&place.say(&["import", stream.to_str().unwrap(), "--to", &place.text("db")]), 4, "of the VM \"db\"");
    // A damaged page does not leave the archive.
    let entry = Archive::open(&place.path("from")).unwrap().find(None).unwrap();
    let image = File::options().write(true).open(entry.path().join("memory.img")).unwrap();
    image.write_all_at(b"otherwise", bytes_of(PAGES - 1)).unwrap();
    is(&place.say(&["export", &place.text("from"), "-"]), 13, "is damaged");
}

#[test]
fn a_pipe_that_stands_still_ends_by_a_signal() {
    let place = Place::new();
    let mut export = place.vmemd(&["export", &place.text("from"), "-"]);
    let mut export = export.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // It has begun, and more than the pipe holds is to come.
    let mut pipe = export.stdout.take().unwrap();
    pipe.read_exact(&mut [0; 64]).unwrap();
    kill(export.id());
    is(&export.wait_with_output().unwrap(), 130, "interrupted");
    drop(pipe);

    let mut import = place.vmemd(&["import", "-", "--to", &place.text("to")]);
    let mut import = import.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let whole = fs::read(place.stream()).unwrap();
    // Open all the while: the child's own would be closed by whoever waits for it.
    let mut pipe = import.stdin.take().unwrap();
    pipe.write_all(&whole[..20 << 20]).unwrap();
    kill(import.id());
    let status = import.wait().unwrap();
    drop(pipe);
    assert_eq!(status.code(), Some(130));
    is_empty(&place.path("to"));
}

/// Not SIGINT, which stays ignored if whoever has started the tests ignores it.
fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
}

#[test]
fn without_object_stores_it_says_so() {
    if cfg!(feature = "object-store") {
        return;
    }
    let place = Place::new();
    let said = place.say(&["export", &place.text("from"), "s3://backups/web"]);
    is(&said, 2, "built without object stores");
}

#[cfg(feature = "object-store")]
#[path = "checkpoint_stream/object.rs"]
mod object;
