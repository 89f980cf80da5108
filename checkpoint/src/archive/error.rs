//! Why an archive, or a checkpoint in it, cannot be used so.

use std::io;
use std::path::{Path, PathBuf};

use swapd::PageNo;

use crate::format::FormatError;
use crate::key::KeyFileError;

/// Why something could not be done with an archive.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// There is no such directory, or none that is an archive.
    #[error("{path} is no archive of checkpoints")]
    NoArchive {
        /// The directory.
        path: PathBuf,
    },
    /// It is a checkpoint in an archive.
    #[error("{path} is a checkpoint, not an archive: say {archive} {name}", archive = archive.display())]
    IsCheckpoint {
        /// What was named.
        path: PathBuf,
        /// The archive that it is in.
        archive: PathBuf,
        /// Its name there.
        name: String,
    },
    /// It is a file.
    #[error("{path} is not a directory, and an archive is one: name a directory that is empty or missing")]
    NotDirectory {
        /// The path.
        path: PathBuf,
    },
    /// It is a directory for something else.
    #[error("{path} has other things in it and is no archive: name a directory that is empty or missing")]
    NotEmpty {
        /// The directory.
        path: PathBuf,
    },
    /// Others than this user can put things there.
    #[error("{path} {why}: a VM would begin from what somebody else has put there")]
    NotSafe {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// No checkpoint can be called so.
    #[error("{0:?} is not a name of a checkpoint: `vmemd checkpoint list` shows them")]
    Name(String),
    /// There is no such checkpoint.
    #[error("there is no checkpoint {name} in {path}")]
    NoCheckpoint {
        /// The archive.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// A directory that has a checkpoint's name, or files of one, and no manifest.
    #[error("checkpoint {name} is damaged: it has no manifest")]
    NoManifest {
        /// Its name.
        name: String,
    },
    /// A checkpoint lacks a file that its manifest names.
    #[error("checkpoint {name} is damaged: its file {file} is missing")]
    NoFile {
        /// The checkpoint.
        name: String,
        /// The file.
        file: String,
    },
    /// The latest one is wanted, and cannot be read. An older one in its place would be a VM that has lost what it did
    /// since.
    #[error("{name}, the latest checkpoint, cannot be read (name an older one, or remove it)")]
    Latest {
        /// The latest.
        name: String,
        /// What is wrong with it.
        source: Box<ArchiveError>,
    },
    /// There is no checkpoint at all.
    #[error("there is no checkpoint in {path}")]
    Empty {
        /// The archive.
        path: PathBuf,
    },
    /// Too little room for what is to be written, or too much for what would be left.
    #[error("no room in {path}: it takes {need_bytes} bytes, and {free_bytes} are free")]
    NoRoom {
        /// The archive.
        path: PathBuf,
        /// What it takes.
        need_bytes: u64,
        /// What its file system has for this user.
        free_bytes: u64,
    },
    /// Somebody else has the archive's lock.
    #[error(
        "another command makes, merges or removes checkpoints in {path} just now: wait until it has ended"
    )]
    Busy {
        /// The archive.
        path: PathBuf,
    },
    /// Its checkpoints are of another VM.
    #[error("the checkpoints in {path} are of the VM {has:?}: {wanted:?} needs an archive of its own")]
    OtherVm {
        /// The archive.
        path: PathBuf,
        /// The VM of its checkpoints.
        has: String,
        /// The VM for which there was to be one.
        wanted: String,
    },
    /// A VM that was restored from it runs, or it is being read.
    #[error(
        "checkpoint {name} is in use: a VM restored from it still reads its image (or something verifies it); stop that VM, \
         or wait until it needs the image no longer"
    )]
    InUse {
        /// The checkpoint.
        name: String,
    },
    /// It was removed while it was being opened.
    #[error("checkpoint {name} is being removed")]
    Removed {
        /// The checkpoint.
        name: String,
    },
    /// Others need its pages.
    #[error(
        "checkpoint {name} is the base of {of}: merge it into that one first (`vmemd checkpoint merge DIR {of}`)"
    )]
    IsBase {
        /// The checkpoint.
        name: String,
        /// One that has it as its base.
        of: String,
    },
    /// It is not known whether others need its pages.
    #[error(
        "checkpoint {damaged} cannot be read, so it may have {name} as its base: remove {damaged} first, or repair it"
    )]
    MayBeBase {
        /// The checkpoint.
        name: String,
        /// Another one, whose manifest cannot be read.
        damaged: String,
    },
    /// It is encrypted, and nobody has named its key.
    #[error("checkpoint {name} is encrypted: name the file of its key (--key KEYFILE)")]
    KeyNeeded {
        /// The checkpoint.
        name: String,
    },
    /// It is encrypted with another key.
    #[error("the key in {key} is not the one of checkpoint {name}")]
    WrongKey {
        /// The checkpoint.
        name: String,
        /// The key's file.
        key: PathBuf,
    },
    /// A key was named for what is not encrypted: it may be another checkpoint than its user takes it for.
    #[error("checkpoint {name} is not encrypted: leave --key out, if that is as it should be")]
    NotEncrypted {
        /// The checkpoint.
        name: String,
    },
    /// A file is no key.
    #[error(transparent)]
    KeyFile(#[from] KeyFileError),
    /// The new checkpoint would share pages with one that is not encrypted as it is.
    #[error("checkpoint {base} cannot be the base: {why}")]
    BaseKey {
        /// The checkpoint that was to be the base.
        base: String,
        /// What does not fit.
        why: &'static str,
    },
    /// A base is not there.
    #[error("checkpoint {name} needs the pages of {base}, which is not in the archive: put it back")]
    BaseMissing {
        /// The checkpoint.
        name: String,
        /// The name of its base.
        base: String,
    },
    /// What has the base's name is not the base.
    #[error("checkpoint {name} was made against another {base} than the one in the archive: {why}")]
    BaseOther {
        /// The checkpoint.
        name: String,
        /// The name of its base.
        base: String,
        /// What is different.
        why: &'static str,
    },
    /// A checkpoint is its own base, through others.
    #[error("the bases of checkpoint {name} lead back to {base}: a manifest was changed by hand")]
    Circle {
        /// The checkpoint.
        name: String,
        /// The first one that comes twice.
        base: String,
    },
    /// There are too many bases behind each other.
    #[error(
        "checkpoint {name} stands on {count} others, and at most {max} are possible: merge it, or make one without a base"
    )]
    TooDeep {
        /// The checkpoint.
        name: String,
        /// How many there are.
        count: usize,
        /// How many there may be.
        max: usize,
    },
    /// A page has no content where its checkpoint says, or another.
    #[error("checkpoint {name} is damaged: {page} should be in its base {base}, which {why}")]
    BasePage {
        /// The checkpoint.
        name: String,
        /// The page.
        page: PageNo,
        /// The base.
        base: String,
        /// What the base has instead.
        why: &'static str,
    },
    /// A page of an image is not what was written.
    #[error("checkpoint {name} is damaged: {page} in its image is not what was saved")]
    Page {
        /// The checkpoint whose image it is.
        name: String,
        /// The page.
        page: PageNo,
    },
    /// A file is damaged, or of a newer vmemd.
    #[error("cannot use {path}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: FormatError,
    },
    /// The operating system refuses something.
    #[error("cannot {what} {path}")]
    Io {
        /// The step, as a verb.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// It has its name, and a power failure may take it.
    #[error(
        "the checkpoint {name} is there, but perhaps not durable: cannot flush {path}: a power failure now may take it"
    )]
    NotFlushed {
        /// The checkpoint.
        name: String,
        /// The archive.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// It was told to give up. Nothing has been changed for those who use the checkpoints.
    #[error("cancelled")]
    Cancelled,
}

impl ArchiveError {
    pub(crate) fn io(what: &'static str, path: impl AsRef<Path>, source: io::Error) -> ArchiveError {
        ArchiveError::Io { what, path: path.as_ref().to_owned(), source }
    }

    pub(crate) fn format(path: impl AsRef<Path>, source: FormatError) -> ArchiveError {
        match source {
            FormatError::Io(source) => ArchiveError::io("read", path, source),
            source => ArchiveError::Format { path: path.as_ref().to_owned(), source },
        }
    }

    /// Whether a checkpoint is not what was saved.
    pub fn is_damage(&self) -> bool {
        use ArchiveError as E;
        match self {
            E::BaseMissing { .. } | E::BaseOther { .. } | E::Circle { .. } => true,
            E::BasePage { .. } | E::Page { .. } => true,
            E::NoManifest { .. } | E::NoFile { .. } => true,
            E::Latest { source, .. } => source.is_damage(),
            E::Format { source, .. } => !matches!(source, FormatError::Newer { .. }),
            _ => false,
        }
    }
}
