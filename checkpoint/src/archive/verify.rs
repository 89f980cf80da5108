//! Reading all of a checkpoint.
//!
//! TODO
use swapd::PageNo;

use super::error::ArchiveError;
use super::{Archive, Entry};

/// How far something is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub bytes_done: u64,
    /// Bytes to do in all.
    pub bytes_total: u64,
}

/// Something that is not what was saved.
#[derive(Debug)]
pub enum Damage {
    /// A page in an image.
    Page {
        /// The checkpoint whose image it is.
        checkpoint: String,
        /// The page.
        page: PageNo,
    },
    /// A file, or how it fits the others.
    File {
        /// The checkpoint.
        checkpoint: String,
        /// What is wrong.
        error: ArchiveError,
    },
}

/// What was read.
#[derive(Debug, Default)]
pub struct Verified {
    /// Checkpoints that were looked at, bases among them.
    pub checkpoints: usize,
    /// Pages that were read.
    pub pages: u64,
    /// Pages that are not what was saved.
    pub damaged_pages: u64,
    /// What is damaged: the first few pages, and every file.
    pub damage: Vec<Damage>,
}

impl Archive {
    /// Reads all that these checkpoints need, each page of an image once, and compares it with its checksum.
    ///
    /// `progress` is told how far it is, from any thread, and says whether to go on.
    ///
    /// # Errors
    /// If something cannot be opened, or it was told to stop. Damage is no error.
    pub fn verify(
        &self,
        entries: &[Entry],
        progress: &(dyn Fn(Progress) -> bool + Sync),
    ) -> Result<Verified, ArchiveError> {
        let _ = (entries, progress);
        unimplemented!()
    }
}
