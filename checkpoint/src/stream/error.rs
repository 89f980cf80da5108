//! Why a stream cannot be written, or is not taken for a checkpoint.

use std::io;

use swapd::PageNo;

use crate::archive::ArchiveError;
use crate::format::FormatError;

/// Why a checkpoint could not be exported or imported.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The stream is none of a checkpoint, or not a whole one.
    #[error(transparent)]
    Format(FormatError),
    /// A page in the stream is not what was saved.
    #[error("it is damaged: {0} is not what was saved")]
    Page(PageNo),
    /// The stream cannot be read further.
    #[error("cannot read it")]
    Read(#[source] io::Error),
    /// The stream cannot be written further.
    #[error("cannot write it")]
    Write(#[source] io::Error),
    /// The archive cannot give the checkpoint, or not take it.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// The archive has the same checkpoint.
    #[error("the archive has this checkpoint already, as {0}")]
    There(String),
    /// The archive's file system has not enough room.
    #[error("no room: it takes up to {need} bytes, and {free} are free")]
    NoRoom {
        /// Bytes that it takes at most.
        need: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// It was told to give up. The archive is as it was.
    #[error("cancelled")]
    Cancelled,
}

impl StreamError {
    /// Whether the stream, or a checkpoint, is not what was saved.
    pub fn is_damage(&self) -> bool {
        match self {
            StreamError::Format(error) => !matches!(error, FormatError::Newer { .. } | FormatError::Io(_)),
            StreamError::Page(_) => true,
            StreamError::Archive(error) => error.is_damage(),
            _ => false,
        }
    }
}

impl From<FormatError> for StreamError {
    fn from(error: FormatError) -> StreamError {
        match error {
            FormatError::Io(source) => StreamError::Read(source),
            error => StreamError::Format(error),
        }
    }
}
