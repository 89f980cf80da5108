//! Giving a checkpoint the pages of its bases, so that it needs them no longer.
//!
//! TODO
use super::error::ArchiveError;
use super::{Locked, Progress};

/// What a merge has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// Pages that the bases and the checkpoint have as one, in the same blocks.
    pub shared: u64,
    /// Pages that were copied.
    pub copied: u64,
}

impl Locked {
    /// Gives a checkpoint the pages of its bases, so that it can stand alone. The bases stay as they are. VMs that were
    /// restored from it are not disturbed: pages that it has already are not touched.
    ///
    /// `progress` is told how far it is, and says whether to go on.
    ///
    /// # Errors
    /// If a base is missing or damaged, or there is no room. The checkpoint is as it was.
    pub fn merge(
        &self,
        name: &str,
        progress: &(dyn Fn(Progress) -> bool + Sync),
    ) -> Result<Merged, ArchiveError> {
        let _ = (name, progress);
        unimplemented!()
    }
}
