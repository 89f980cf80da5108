//! The internal snapshots of checkpoints, in the files of their VMs' disks: they go with their checkpoint, and are
//! looked at with it.
//!
//! ```text
//!   a checkpoint is gone ──▶ its snapshots, but for those that another one has
//!      a VM has the file open ──▶ its process is asked: its QEMU deletes it
//!      nobody has it open     ──▶ qemu-img
//!      neither                ──▶ it stays, and is told by name, with the command that deletes it
//! ```
//! The checkpoint goes first: a checkpoint without its snapshot would be none. A snapshot that stays takes room.

use std::collections::BTreeMap;
use std::path::Path;

use checkpoint::archive::{Archive, Entry, Listing};
use checkpoint::format::DiskVersion;
use serde::Serialize;
use serde_json::Value;
use vmprocess::control::client::{ACTION_TIMEOUT, VmClient};
use vmprocess::control::protocol::Request;
use vmprocess::control::rundir::RunDir;
use vmprocess::failure::{Failure, FailureKind};

use super::terminal::warn;
use crate::qemu::img::{Checked, Img};

/// A snapshot of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Snapshot {
    file: String,
    snapshot: String,
}

/// What became of the snapshots of checkpoints that are gone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Deleted {
    deleted: Vec<Snapshot>,
    left: Vec<Left>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Left {
    #[serde(flatten)]
    snapshot: Snapshot,
    why: String,
}

/// All snapshots of a checkpoint that vmemd has made.
fn of(entry: &Entry) -> impl Iterator<Item = Snapshot> {
    entry.manifest().vm.disks.iter().filter_map(|disk| match &disk.version {
        DiskVersion::Snapshot(snapshot) if DiskVersion::is_snapshot(snapshot) => {
            Some(Snapshot { file: disk.file.clone(), snapshot: snapshot.clone() })
        }
        DiskVersion::Snapshot(_) | DiskVersion::InState => None,
    })
}

/// Deletes the snapshots of those checkpoints that were there before, and are no more. Leaves those that a checkpoint of
/// the archive has, whatever it calls their file, and all of them if not all of the archive can be read.
///
/// # Errors
/// If the archive cannot be listed.
pub(super) fn delete_gone(archive: &Archive, before: &Listing, run_dir: &Path) -> Result<Deleted, Failure> {
    let now = archive.list()?;
    let stays = |entry: &Entry| now.entries.iter().any(|other| other.manifest().id == entry.manifest().id);
    let mut gone: Vec<Snapshot> = before.entries.iter().filter(|entry| !stays(entry)).flat_map(of).collect();
    gone.sort();
    gone.dedup();
    let needed: Vec<String> = now.entries.iter().flat_map(of).map(|one| one.snapshot).collect();
    gone.retain(|one| !needed.contains(&one.snapshot));
    for (name, _) in &before.unreadable {
        if !now.unreadable.iter().any(|(other, _)| other == name) {
            warn(&format!(
                "{name} could not be read: if it had snapshots in disks, they stay (`qemu-img snapshot -l FILE`: vmemd- \
                 and a time)"
            ));
        }
    }
    let mut done = Deleted::default();
    if let Some((name, _)) = now.unreadable.first() {
        let why = format!("{name} cannot be read, and may need it");
        done.left = gone.into_iter().map(|snapshot| Left { snapshot, why: why.clone() }).collect();
    } else if !gone.is_empty() {
        let mut vms = running(run_dir);
        for snapshot in gone {
            match delete(&mut vms, &snapshot) {
                Ok(()) => done.deleted.push(snapshot),
                Err(why) => done.left.push(Left { snapshot, why }),
            }
        }
    }
    done.tell();
    Ok(done)
}

/// The QEMU VMs that answer.
fn running(run_dir: &Path) -> Vec<VmClient> {
    let Ok(dir) = RunDir::open(run_dir) else { return Vec::new() };
    let sockets = dir.sockets().unwrap_or_default();
    let answers = |socket| {
        let mut vm = VmClient::connect_to(&dir, socket).ok()?;
        vm.stat().is_ok_and(|stat| stat.run_state.is_some()).then_some(vm)
    };
    // All at once: one that does not answer must not hold up the others.
    std::thread::scope(|scope| {
        let asked: Vec<_> = sockets.iter().map(|socket| scope.spawn(move || answers(socket))).collect();
        asked.into_iter().filter_map(|asked| asked.join().ok()?).collect()
    })
}

/// Deletes it, or says why it stays.
fn delete(vms: &mut Vec<VmClient>, one: &Snapshot) -> Result<(), String> {
    let Snapshot { file, snapshot } = one;
    let request = Request::RemoveSnapshot { file: file.clone(), snapshot: snapshot.clone() };
    let mut at = 0;
    while let Some(vm) = vms.get_mut(at) {
        match vm.ask(&request, ACTION_TIMEOUT) {
            Ok(answer) if answer["removed"] == true => return Ok(()),
            Ok(_) => at += 1,
            // Of an older vmemd, that does not know the word, and closes the connection: if it has the file open, qemu-img
            // does not get it.
            Err(failure) if failure.kind == FailureKind::Usage => drop(vms.remove(at)),
            // It has given its disks away, and takes them back when it goes on: nobody may have them open just then.
            Err(failure) => return Err(failure.text),
        }
    }
    if std::fs::symlink_metadata(file).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
        return Err("the file is not on this host".to_owned());
    }
    let deleted = Img::installed().and_then(|img| img.delete(file, snapshot));
    deleted.map_err(|failure| failure.text)
}

impl Deleted {
    fn tell(&self) {
        for Left { snapshot: Snapshot { file, snapshot }, why } in &self.left {
            warn(&format!(
                "the snapshot {snapshot} stays in {file}: {why}. It takes room there; when no VM has the file open: \
                 qemu-img snapshot -d {snapshot} {file} (while one has: blockdev-snapshot-delete-internal-sync on its monitor)"
            ));
        }
    }

    /// A line for people; none if there was nothing to do.
    pub(super) fn summary(&self) -> Option<String> {
        let named = self.deleted.iter().map(|one| format!("{} in {}", one.snapshot, one.file));
        let named: Vec<String> = named.collect();
        (!named.is_empty()).then(|| named.join(", "))
    }
}

/// What was seen of the disks of checkpoints.
#[derive(Debug, Default)]
pub(super) struct Looked {
    /// Of a checkpoint, what is missing or broken.
    pub(super) damage: Vec<(String, String)>,
    /// Files of which nothing was seen, each with the reason.
    pub(super) not_looked_at: BTreeMap<String, String>,
    /// Files whose snapshots are there, and whose tables were not compared with each other, each with the reason.
    pub(super) not_checked: BTreeMap<String, String>,
    /// Files of which all was seen.
    pub(super) whole: Vec<String>,
}

/// Looks at the disks of checkpoints: whether the file is there, has the snapshots, and is whole by qemu-img's word.
/// `leave`: at none of them.
pub(super) fn look(entries: &[Entry], leave: bool) -> Looked {
    let mut files: BTreeMap<String, Vec<(&str, String)>> = BTreeMap::new();
    for entry in entries {
        for Snapshot { file, snapshot } in of(entry) {
            files.entry(file).or_default().push((entry.name(), snapshot));
        }
    }
    let mut looked = Looked::default();
    let img = match Img::installed() {
        _ if leave => Err("it was asked not to".to_owned()),
        found => found.map_err(|failure| failure.text),
    };
    for (file, needed) in files {
        let img = match &img {
            Ok(img) => img,
            Err(why) => {
                looked.not_looked_at.insert(file, why.clone());
                continue;
            }
        };
        if std::fs::symlink_metadata(&file).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
            looked.all_damaged(&needed, &format!("its disk {file} is not there"));
            continue;
        }
        let has = match img.snapshots(&file) {
            Ok(has) => has,
            Err(failure) => {
                looked.not_looked_at.insert(file, failure.text);
                continue;
            }
        };
        for (name, snapshot) in needed.iter().filter(|(_, snapshot)| !has.contains(snapshot)) {
            let why = format!("its disk {file} has no snapshot {snapshot} any more");
            looked.damage.push(((*name).to_owned(), why));
        }
        match img.check(&file) {
            Ok(Checked::Whole) => looked.whole.push(file),
            Ok(Checked::Corrupt(said)) => {
                looked.all_damaged(&needed, &format!("its disk {file} is damaged: {said}"))
            }
            Ok(Checked::Not(why)) => drop(looked.not_checked.insert(file, why)),
            Err(failure) => drop(looked.not_checked.insert(file, failure.text)),
        }
    }
    looked
}

impl Looked {
    /// All checkpoints that have a snapshot in a file.
    fn all_damaged(&mut self, needed: &[(&str, String)], why: &str) {
        self.damage.extend(needed.iter().map(|(name, _)| ((*name).to_owned(), why.to_owned())));
    }

    /// Says what was not looked at.
    pub(super) fn tell(&self) {
        for (file, why) in &self.not_looked_at {
            warn(&format!("the disk {file} was not looked at: {why}"));
        }
        for (file, why) in &self.not_checked {
            warn(&format!("the disk {file} has its snapshots; whether it is whole was not looked at: {why}"));
        }
        if !self.whole.is_empty() {
            warn("of the disks' content nothing is known: no checkpoint has a checksum of it");
        }
    }

    /// The names and reasons, for programs.
    pub(super) fn json(files: &BTreeMap<String, String>) -> Value {
        files.iter().map(|(file, why)| serde_json::json!({ "file": file, "why": why })).collect()
    }
}
