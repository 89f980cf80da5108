//! An archive: a directory with the checkpoints of one VM, each a directory that is named by the time of its making.
//!
//! What is in the archive under a name is a whole checkpoint, always: one that is being made, and one that is being
//! removed, has a name that begins with a dot. Whoever makes, merges or removes has the archive's lock
//! ([`Archive::lock`]); whoever lists, restores or verifies needs none. The order of steps, and why a crash at any of
//! them loses nothing, is in `docs/checkpoint-format.md`.
//!
//! A restored VM keeps the images open that it reads from, with a shared lock on each: a checkpoint is not removed
//! under it.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, Mode, OFlags, flock};

mod chain;
#[cfg(test)]
pub(crate) mod crash;
mod entry;
mod error;
mod keep;
mod merge;
mod names;
mod pending;
mod read;
mod steps;
mod verify;

pub use chain::{Chain, LayeredPiece, Layers, MAX_CHAIN, Source};
pub use entry::{Entry, FIRST_FAULTS, IMAGE, MANIFEST, MAP, STATE, StateReader};
pub use error::ArchiveError;
pub use keep::Kept;
pub use merge::Merged;
pub use pending::{Made, Pending};
pub use read::Progress;
pub use verify::{Damage, Verified};

use crate::format::manifest::is_name;
use crate::key::ArchiveKey;

/// Locked by whoever changes the archive; a directory is an archive because it has this file.
const LOCK: &str = "archive.lock";
/// How the name of a checkpoint begins that is being made.
const NEW: &str = ".new-";
/// How the name of a checkpoint begins that is being removed.
const OLD: &str = ".old-";
/// What `mkfs` leaves in a new file system.
const NOT_OURS: &str = "lost+found";

/// A directory with the checkpoints of a VM.
#[derive(Clone, Debug)]
pub struct Archive {
    path: PathBuf,
    dir: Arc<File>,
    key: Option<ArchiveKey>,
}

/// An archive that nobody else changes meanwhile.
#[derive(Debug)]
pub struct Locked {
    archive: Archive,
    /// Unlocked when it is closed, however the process ends.
    _lock: File,
}

/// What an archive has.
#[derive(Debug)]
pub struct Listing {
    /// Its checkpoints, the newest first.
    pub entries: Vec<Entry>,
    /// Names of those whose manifest cannot be read or is missing, each with the reason.
    pub unreadable: Vec<(String, ArchiveError)>,
}

impl Archive {
    /// An archive that is there.
    ///
    /// # Errors
    /// If the directory is no archive, cannot be read, or is not this user's alone to write to.
    pub fn open(path: &Path) -> Result<Archive, ArchiveError> {
        let no_archive =
            || is_checkpoint(path).unwrap_or_else(|| ArchiveError::NoArchive { path: path.to_owned() });
        let archive = Archive::at(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => no_archive(),
            _ => ArchiveError::io("open", path, error),
        })?;
        archive.is_safe()?;
        match steps::open(&archive.dir, LOCK, false) {
            Ok(_) => Ok(archive),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(no_archive()),
            Err(error) => Err(ArchiveError::io("open", path.join(LOCK), error)),
        }
    }

    /// An archive that is there, or a new one if the directory is missing or empty. A new directory is its user's
    /// alone: a VM's memory has secrets in it.
    ///
    /// # Errors
    /// If the directory is for something else, or cannot be made.
    pub fn create(path: &Path) -> Result<Archive, ArchiveError> {
        match Archive::open(path) {
            Err(ArchiveError::NoArchive { .. }) => {}
            opened => return opened,
        }
        make_durable(path).map_err(|error| match error.kind() {
            // A file, or something below one.
            io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
                ArchiveError::NotDirectory { path: path.to_owned() }
            }
            _ => ArchiveError::io("make", path, error),
        })?;
        let io = |error| ArchiveError::io("read", path, error);
        let archive = Archive::at(path).map_err(io)?;
        archive.is_safe()?;
        if steps::names(&archive.dir).map_err(io)?.iter().any(|name| name != NOT_OURS && name != LOCK) {
            return Err(ArchiveError::NotEmpty { path: path.to_owned() });
        }
        let make = || {
            steps::create(&archive.dir, LOCK, false)?;
            steps::sync_dir(&archive.dir)
        };
        make().map_err(|error| ArchiveError::io("make", path.join(LOCK), error))?;
        Ok(archive)
    }

    fn at(path: &Path) -> io::Result<Archive> {
        let path = std::path::absolute(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = File::from(rustix::fs::open(&path, flags, Mode::empty())?);
        Ok(Archive { path, dir: Arc::new(dir), key: None })
    }

    /// The same archive, with a key: encrypted checkpoints of it can be read, and each that is made is encrypted.
    #[must_use]
    pub fn with_key(self, key: Option<ArchiveKey>) -> Archive {
        Archive { key, ..self }
    }

    /// What is in a checkpoint's files becomes a machine's memory and state: nobody else may write them.
    fn is_safe(&self) -> Result<(), ArchiveError> {
        let found = rustix::fs::fstat(&self.dir)
            .map_err(|error| ArchiveError::io("look at", &self.path, error.into()))?;
        let not_safe = |why| Err(ArchiveError::NotSafe { path: self.path.clone(), why });
        if found.st_mode & 0o022 != 0 {
            return not_safe("can be written to by others (chmod go-w)");
        }
        if found.st_uid != 0 && found.st_uid != rustix::process::geteuid().as_raw() {
            return not_safe("belongs to another user, who is not root either (chown)");
        }
        Ok(())
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that its file system has left for this user.
    ///
    /// # Errors
    /// If it does not say.
    pub fn free_bytes(&self) -> Result<u64, ArchiveError> {
        let found = rustix::fs::fstatvfs(&self.dir)
            .map_err(|error| ArchiveError::io("look at", &self.path, error.into()))?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }

    /// Whether files on its file system may share blocks, with one another and with those of a store there.
    pub fn shares_blocks(&self) -> bool {
        const XFS: i64 = 0x5846_5342;
        const BTRFS: i64 = 0x9123_683e;
        rustix::fs::fstatfs(&self.dir).is_ok_and(|found| [XFS, BTRFS].contains(&found.f_type))
    }

    /// Keeps others from changing it, for as long as the result is there. Does not wait.
    ///
    /// # Errors
    /// [`ArchiveError::Busy`] if somebody else does so already.
    pub fn lock(&self) -> Result<Locked, ArchiveError> {
        let path = self.path.join(LOCK);
        let lock = steps::open_to_write(&self.dir, LOCK, false)
            .map_err(|error| ArchiveError::io("open", &path, error))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Locked { archive: self.clone(), _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(ArchiveError::Busy { path: self.path.clone() }),
            Err(error) => Err(ArchiveError::io("lock", path, error.into())),
        }
    }

    /// All that is in it.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn list(&self) -> Result<Listing, ArchiveError> {
        let names = steps::names(&self.dir).map_err(|error| ArchiveError::io("read", &self.path, error))?;
        let mut listing = Listing { entries: Vec::new(), unreadable: Vec::new() };
        for name in names.into_iter().filter(|name| is_name(name) && name != LOCK) {
            match self.entry(&name) {
                Ok(Some(entry)) => listing.entries.push(entry),
                Ok(None) => {}
                Err(error) => listing.unreadable.push((name, error)),
            }
        }
        let age = |entry: &Entry| (entry.manifest().made_at_ms, entry.name().to_owned());
        listing.entries.sort_by_key(|entry| std::cmp::Reverse(age(entry)));
        Ok(listing)
    }

    /// The checkpoint of that name, or the latest one. If the latest cannot be read, an older one is not taken in its
    /// place.
    ///
    /// # Errors
    /// If there is none, or its manifest is damaged or missing.
    pub fn find(&self, name: Option<&str>) -> Result<Entry, ArchiveError> {
        let Some(name) = name else { return self.latest() };
        if !is_name(name) {
            return Err(ArchiveError::Name(name.to_owned()));
        }
        let missing = || ArchiveError::NoCheckpoint { path: self.path.clone(), name: name.to_owned() };
        self.entry(name)?.ok_or_else(missing)
    }

    fn latest(&self) -> Result<Entry, ArchiveError> {
        let Listing { entries, unreadable } = self.list()?;
        // The time of the newest one by its manifest: it may have got another name since.
        let newest = entries.first().map(|entry| {
            let made = names::of_time(entry.manifest().made_at_ms);
            let number =
                names::parse(entry.name()).filter(|(time, _)| *time == made).map_or(1, |(_, number)| number);
            (made, number)
        });
        // A name is the time of the checkpoint's making. Nobody knows how old one with a name of its user's is.
        let may_be_newer = |name: &str| match (names::parse(name), &newest) {
            (Some(name), Some((time, number))) => name > (time.as_str(), *number),
            _ => true,
        };
        match unreadable.into_iter().rfind(|(name, _)| may_be_newer(name)) {
            Some((name, error)) => Err(ArchiveError::Latest { name, source: Box::new(error) }),
            None => entries.into_iter().next().ok_or_else(|| ArchiveError::Empty { path: self.path.clone() }),
        }
    }

    /// What has this name, if it is a checkpoint.
    fn entry(&self, name: &str) -> Result<Option<Entry>, ArchiveError> {
        match steps::open_dir(&self.dir, name) {
            Ok(dir) => match Entry::read(&self.path, self.key.as_ref(), dir, name) {
                // Whoever removes a checkpoint gives its directory another name first.
                Err(ArchiveError::NoManifest { .. }) if !self.is_there(name) => Ok(None),
                read => read,
            },
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Ok(None),
                // A symbolic link: no checkpoint is one.
                _ if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => Ok(None),
                _ => Err(ArchiveError::io("open", self.path.join(name), error)),
            },
        }
    }

    /// Whether a directory has this name now.
    fn is_there(&self, name: &str) -> bool {
        steps::open_dir(&self.dir, name).is_ok()
    }
}

/// Why a path is no archive, if it is a checkpoint in one.
fn is_checkpoint(path: &Path) -> Option<ArchiveError> {
    let path = path.canonicalize().ok()?;
    let (archive, name) = (path.parent()?, path.file_name()?.to_str()?);
    if !is_name(name) || !archive.join(LOCK).is_file() || !path.join(MANIFEST).is_file() {
        return None;
    }
    Some(ArchiveError::IsCheckpoint {
        archive: archive.to_owned(),
        name: name.to_owned(),
        path: path.clone(),
    })
}

/// Makes a directory, with those that it is in, and flushes each that has got a new one: else a power failure could
/// take all of it, with checkpoints that are durable in it.
fn make_durable(path: &Path) -> io::Result<()> {
    let path = std::path::absolute(path)?;
    let missing = path.ancestors().take_while(|dir| !dir.exists()).count();
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
    for dir in path.ancestors().skip(1).take(missing) {
        steps::sync_dir(&File::open(dir)?)?;
    }
    Ok(())
}

impl Deref for Locked {
    type Target = Archive;

    fn deref(&self) -> &Archive {
        &self.archive
    }
}

#[cfg(test)]
#[path = "archive_tests.rs"]
mod tests;
