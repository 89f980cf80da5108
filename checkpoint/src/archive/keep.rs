//! Removing checkpoints: one, all but the newest few, and what crashes have left.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::chain::MAX_CHAIN;
use super::entry::{Entry, FIRST_FAULTS, IMAGE, MANIFEST, NEW_SUFFIX};
use super::error::ArchiveError;
use super::read::Watch;
use super::{Listing, Locked, NEW, OLD, steps};
use crate::format::CheckpointId;

/// How long an image that is in use is waited for, and how often it is tried.
const LET_GO_LIMIT: Duration = Duration::from_secs(3);
const LET_GO_EVERY: Duration = Duration::from_millis(50);

/// What became of the checkpoints that were not to be kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Those that have got the pages of bases that were to go.
    pub merged: Vec<String>,
    /// Those that are gone.
    pub removed: Vec<String>,
    /// Those that are in use, or the base of one that is: they go with the next call.
    pub in_use: Vec<String>,
}

impl Locked {
    /// Removes what crashes have left: checkpoints that were being made or removed, files that no manifest names, and
    /// pages that a merge had put into an image.
    /// Needed by nobody else: such leftovers are overlooked.
    ///
    /// # Errors
    /// If something cannot be removed.
    pub fn clean(&self) -> Result<(), ArchiveError> {
        let names = steps::names(&self.dir).map_err(|error| ArchiveError::io("read", &self.path, error))?;
        for name in names.iter().filter(|name| name.starts_with(NEW) || name.starts_with(OLD)) {
            remove_tree(&self.dir, name)
                .map_err(|error| ArchiveError::io("remove", self.path.join(name), error))?;
        }
        self.list()?.entries.iter().try_for_each(|entry| {
            self.clean_merge(entry);
            clean_entry(entry)
        })
    }

    /// Removes a checkpoint.
    ///
    /// # Errors
    /// If it is in use, or the base of another one, or cannot be removed.
    pub fn remove(&self, name: &str) -> Result<(), ArchiveError> {
        self.clean()?;
        let listing = self.list()?;
        if !listing.unreadable.iter().any(|(unreadable, _)| unreadable == name) {
            self.find(Some(name))?;
        }
        self.remove_unused(&listing, name)
    }

    /// Also one that cannot be read, and that a VM may have been restored from when it could.
    fn remove_unused(&self, listing: &Listing, name: &str) -> Result<(), ArchiveError> {
        let named = |base: &Entry| base.manifest().base.as_ref().is_some_and(|base| base.name == name);
        if let Some(of) = listing.entries.iter().find(|other| named(other)) {
            return Err(ArchiveError::IsBase { name: name.to_owned(), of: of.name().to_owned() });
        }
        if let Some((damaged, _)) = listing.unreadable.iter().find(|(damaged, _)| damaged != name) {
            return Err(ArchiveError::MayBeBase { name: name.to_owned(), damaged: damaged.clone() });
        }
        let path = self.path.join(name);
        let io = |what| {
            let path = path.clone();
            move |error| ArchiveError::io(what, path, error)
        };
        // Held until the directory has another name: whoever opens the image later sees that it is gone.
        let image = self.only_user(name)?;
        let id = CheckpointId::random().map_err(io("name"))?;
        let old = format!("{OLD}{:016x}", id.0 as u64);
        steps::rename(&self.dir, name, &old).map_err(io("remove"))?;
        // Before its files: else a crash could leave the name with a part of them.
        steps::sync_dir(&self.dir).map_err(io("remove"))?;
        // NFS gives a file that is open another name instead of removing it, and its directory stays.
        drop(image);
        remove_tree(&self.dir, &old).map_err(io("remove"))
    }

    /// The image, locked against all others; `None` if there is none.
    fn only_user(&self, name: &str) -> Result<Option<File>, ArchiveError> {
        let path = self.path.join(name).join(IMAGE);
        // NFS locks a file exclusively only for whoever may write to it.
        let opened =
            steps::open_dir(&self.dir, name).and_then(|dir| steps::open_to_write(&dir, IMAGE, false));
        let image = match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(|error| ArchiveError::io("open", &path, error))?,
        };
        // The kernel closes what an io_uring has of a process some moments after that has ended, and its locks with it.
        let deadline = Instant::now() + LET_GO_LIMIT;
        loop {
            match flock(&image, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Some(image)),
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(LET_GO_EVERY),
                Err(Errno::WOULDBLOCK) => return Err(ArchiveError::InUse { name: name.to_owned() }),
                Err(error) => return Err(ArchiveError::io("lock", path, error.into())),
            }
        }
    }

    /// Removes all checkpoints but the newest so many (at least one). Those of them that stand on one that goes are
    /// merged first. What is in use stays, and goes with a later call. `made`, if there is one, was made just now: it
    /// is the newest, whatever the clock has said.
    ///
    /// # Errors
    /// If something cannot be read, merged or removed.
    pub fn keep(&self, count: usize, made: Option<&str>, watch: Watch<'_>) -> Result<Kept, ArchiveError> {
        self.clean()?;
        let mut listing = self.list()?;
        listing.entries.sort_by_key(|entry| made != Some(entry.name()));
        let (stay, go) = listing.entries.split_at(count.max(1).min(listing.entries.len()));
        let mut kept = Kept::default();
        if go.is_empty() {
            return Ok(kept);
        }
        if let Some((damaged, _)) = listing.unreadable.first() {
            let name = go[0].name().to_owned();
            return Err(ArchiveError::MayBeBase { name, damaged: damaged.clone() });
        }
        for entry in stay {
            let base = entry.manifest().base.as_ref();
            if base.is_some_and(|base| go.iter().any(|gone| gone.name() == base.name)) {
                self.merge(entry.name(), watch)?;
                kept.merged.push(entry.name().to_owned());
            }
        }
        // A base goes when all that stand on it have gone: at most as many turns as a chain is long.
        let mut left: Vec<&str> = go.iter().map(Entry::name).collect();
        for _ in 0..MAX_CHAIN {
            let before = left.len();
            let mut still = Vec::new();
            for name in left {
                match self.remove(name) {
                    Ok(()) => kept.removed.push(name.to_owned()),
                    Err(ArchiveError::InUse { .. } | ArchiveError::IsBase { .. }) => still.push(name),
                    Err(error) => return Err(error),
                }
            }
            left = still;
            if left.len() == before {
                break;
            }
        }
        kept.in_use = left.into_iter().map(str::to_owned).collect();
        Ok(kept)
    }
}

/// Removes the files in a checkpoint's directory that are none of its own.
pub(super) fn clean_entry(entry: &Entry) -> Result<(), ArchiveError> {
    let io = |error| ArchiveError::io("clean", entry.path(), error);
    let parts = &entry.manifest().parts;
    let own = [MANIFEST, IMAGE, FIRST_FAULTS, &parts.map.file, &parts.state.file];
    for name in steps::names(entry.dir()).map_err(io)? {
        // What has a name that is never given here belongs to somebody who put it there.
        let is_ours = name.ends_with(NEW_SUFFIX) || name.starts_with(super::MAP);
        if is_ours && !own.contains(&name.as_str()) {
            steps::remove_file(entry.dir(), &name).map_err(io)?;
        }
    }
    Ok(())
}

/// Removes a directory with all that is in it. One that is not there is no error.
pub(super) fn remove_tree(parent: &File, name: &str) -> io::Result<()> {
    let dir = match steps::open_dir(parent, name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        dir => dir?,
    };
    for file in steps::names(&dir)? {
        match steps::remove_file(&dir, &file) {
            // Somebody has put a directory there.
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => remove_tree(&dir, &file)?,
            removed => removed?,
        }
    }
    steps::remove_dir(parent, name)
}
