//! Crashes for tests: an operation on an archive ends at its nth step, and what it had not flushed by then may be lost.
//!
//! Two kinds. Killed: what was done stays done. Without power: data that was not flushed is rubbish, and of the
//! changes of directories that were not flushed any may have lasted and any not, whatever their order was.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use testkit::{Random, TempDir};

use super::steps::Step;

/// What a crash leaves.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Killed,
    /// No change of a directory that was not flushed has lasted.
    NoPower,
    /// By a seed, some of them have.
    Torn(u64),
}

#[derive(Debug)]
pub(crate) struct Crash {
    kind: Kind,
    /// Steps until it happens.
    left: u64,
    happened: bool,
    unflushed: Vec<Data>,
    changes: Vec<Change>,
    /// Where files are kept whose names go, on the same file system.
    limbo: TempDir,
    kept: u64,
}

#[derive(Debug)]
struct Data {
    file: File,
    /// All of it: it is new.
    whole: bool,
    at: u64,
    len: u64,
}

/// A change of a directory, by paths as they then were.
#[derive(Debug)]
enum Change {
    Made(PathBuf),
    Renamed(PathBuf, PathBuf),
    /// What had the second name is in limbo now.
    Replaced(PathBuf, PathBuf, PathBuf),
    Removed(PathBuf, PathBuf),
    RemovedDir(PathBuf),
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Mutex<Crash>>>> = const { RefCell::new(None) };
}

pub(super) fn current() -> Option<Arc<Mutex<Crash>>> {
    CURRENT.with_borrow(Clone::clone)
}

/// This thread works for the one whose crash it is.
pub(crate) fn join(crash: Option<Arc<Mutex<Crash>>>) {
    CURRENT.set(crash);
}

pub(super) fn is_simulated() -> bool {
    current().is_some()
}

/// Runs the operation with a crash before that step. Says whether it came to it.
pub(crate) fn at<T>(place: &Path, step: u64, kind: Kind, operation: impl FnOnce() -> T) -> (T, bool) {
    let limbo = testkit::directory_in(place, "limbo");
    let crash = Crash {
        kind,
        left: step,
        happened: false,
        unflushed: Vec::new(),
        changes: Vec::new(),
        limbo,
        kept: 0,
    };
    let crash = Arc::new(Mutex::new(crash));
    join(Some(crash.clone()));
    let result = operation();
    join(None);
    let happened = crash.lock().unwrap().happened;
    (result, happened)
}

fn crashed() -> io::Error {
    io::Error::other("the test has crashed here")
}

pub(super) fn before(step: Step<'_>) -> io::Result<()> {
    let Some(crash) = current() else { return Ok(()) };
    let mut crash = crash.lock().unwrap();
    if crash.happened {
        return Err(crashed());
    }
    if crash.left == 0 {
        crash.happened = true;
        crash.lose();
        return Err(crashed());
    }
    crash.left -= 1;
    match step {
        Step::Replace(dir, _, name) | Step::RemoveFile(dir, name) => {
            let path = path_of(dir).join(name);
            // A link to a directory is none, and such a step fails.
            crash.kept += 1;
            let kept = crash.limbo.path().join(crash.kept.to_string());
            let _ = fs::hard_link(path, kept);
        }
        _ => {}
    }
    Ok(())
}

pub(super) fn after(step: Step<'_>) {
    let Some(crash) = current() else { return };
    let mut crash = crash.lock().unwrap();
    if crash.happened {
        return;
    }
    let kept = crash.limbo.path().join(crash.kept.to_string());
    match step {
        Step::MakeDir(dir, name) => crash.changes.push(Change::Made(path_of(dir).join(name))),
        Step::Create(dir, name) => {
            let path = path_of(dir).join(name);
            let file = File::options().write(true).open(&path).unwrap();
            crash.unflushed.push(Data { file, whole: true, at: 0, len: 0 });
            crash.changes.push(Change::Made(path));
        }
        Step::Resize => {}
        Step::Write(file, at, len) => {
            // Opened anew: it may be for direct I/O.
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            let file = File::options().write(true).open(path).unwrap();
            crash.unflushed.push(Data { file, whole: false, at, len });
        }
        Step::Sync(file) => {
            crash.unflushed.retain(|data| !super::entry::is_same(&data.file, file));
        }
        Step::SyncDir(dir) => {
            let flushed = path_of(dir);
            let (lasting, mut others): (Vec<_>, Vec<_>) =
                crash.changes.drain(..).partition(|change| change.directory() == flushed);
            // What was changed in a directory that is gone for good does not matter any more.
            for change in lasting {
                if let Change::RemovedDir(path) = change {
                    others.retain(|other| !other.directory().starts_with(&path));
                }
            }
            crash.changes = others;
        }
        Step::Rename(dir, from, to) => {
            let dir = path_of(dir);
            crash.changes.push(Change::Renamed(dir.join(from), dir.join(to)));
        }
        Step::Replace(dir, from, to) => {
            let dir = path_of(dir);
            crash.changes.push(Change::Replaced(dir.join(from), dir.join(to), kept));
        }
        Step::RemoveFile(dir, name) => {
            crash.changes.push(Change::Removed(path_of(dir).join(name), kept));
        }
        Step::RemoveDir(dir, name) => crash.changes.push(Change::RemovedDir(path_of(dir).join(name))),
    }
}

fn path_of(dir: &File) -> PathBuf {
    fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd())).unwrap()
}

impl Crash {
    /// What is not durable goes.
    fn lose(&mut self) {
        let mut random = match self.kind {
            Kind::Killed => return,
            Kind::NoPower => None,
            Kind::Torn(seed) => Some(Random(seed)),
        };
        for Data { file, whole, at, len } in self.unflushed.drain(..) {
            if whole {
                let len = file.metadata().unwrap().len();
                file.set_len(len / 2).unwrap();
                file.write_all_at(b"rubbish", 0).unwrap();
            } else {
                file.write_all_at(&vec![0xEE; len as usize], at).unwrap();
            }
        }
        // Renames that last: what happened before them happened to other paths.
        let mut renames: Vec<(PathBuf, PathBuf)> = Vec::new();
        for change in self.changes.drain(..).rev() {
            if random.as_mut().is_some_and(|random| random.below(2) == 0) {
                if let Change::Renamed(from, to) = change {
                    renames.push((from, to));
                }
                continue;
            }
            // What it stands on may not have lasted: then there is nothing to undo.
            let _ = change.undo(&|path| {
                renames.iter().rev().fold(path, |path, (from, to)| match path.strip_prefix(from) {
                    Ok(rest) if rest.as_os_str().is_empty() => to.clone(),
                    Ok(rest) => to.join(rest),
                    Err(_) => path,
                })
            });
        }
    }
}

impl Change {
    fn directory(&self) -> &Path {
        match self {
            Change::Made(path) | Change::Removed(path, _) | Change::RemovedDir(path) => {
                path.parent().unwrap()
            }
            Change::Renamed(_, path) | Change::Replaced(_, path, _) => path.parent().unwrap(),
        }
    }

    fn undo(self, now: &dyn Fn(PathBuf) -> PathBuf) -> io::Result<()> {
        match self {
            Change::Made(path) => {
                let path = now(path);
                if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
            }
            Change::Renamed(from, to) => fs::rename(now(to), now(from)),
            Change::Replaced(from, to, kept) => {
                let to = now(to);
                fs::rename(&to, now(from))?;
                if kept.exists() { fs::hard_link(kept, to) } else { Ok(()) }
            }
            Change::Removed(path, kept) => fs::hard_link(kept, now(path)),
            Change::RemovedDir(path) => fs::create_dir(now(path)),
        }
    }
}
