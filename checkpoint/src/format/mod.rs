//! The files of a checkpoint, by themselves: what is in them, byte by byte, and what of it is refused.
//!
//! Every decoder takes any bytes, and gives a value or an error. What is damaged is not told from what is written
//! wrongly: nothing of a file is believed before its checksum has been found right.

use std::io;

mod chunks;
pub mod first_faults;
pub mod manifest;
pub mod map;
pub mod sealed;

pub use first_faults::FirstFaults;
pub use manifest::{
    BaseRef, CheckpointId, Disk, DiskVersion, Encryption, Machine, Manifest, PageCipher, Part, Parts, Save,
    VmFacts,
};
pub use map::{MapBuilder, MapPiece, MemoryMap, PageCounts, PageKind};

/// Most pages of a VM: 8 TiB.
pub const MAX_PAGES: u64 = migrate::wire::opening::MAX_MEMORY_BYTES / swapd::PAGE_SIZE as u64;

/// Why a file is none of a checkpoint, or not a whole one.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It begins otherwise.
    #[error("it is no {0} of vmemd")]
    Magic(&'static str),
    /// It is of a newer vmemd.
    #[error(
        "it has version {found} of the format, and this vmemd reads versions up to {known}: use the vmemd that made it, \
         or a newer one"
    )]
    Newer {
        /// The version that it has.
        found: u32,
        /// The newest one that is known here.
        known: u32,
    },
    /// Its end is missing.
    #[error("it is cut off: {has} of {should} bytes are there")]
    CutOff {
        /// Its bytes.
        has: u64,
        /// The bytes that it should have.
        should: u64,
    },
    /// There is more than its header says.
    #[error("it goes on behind its end: {has} bytes instead of {should}")]
    TooLong {
        /// Its bytes.
        has: u64,
        /// The bytes that it should have.
        should: u64,
    },
    /// Something in it contradicts itself.
    #[error("it cannot be right: {0}")]
    Value(&'static str),
    /// Its text is not what is expected there.
    #[error("it cannot be right: {0}")]
    Text(String),
    /// Its bytes are not those that were written.
    #[error("its checksum is wrong: it was damaged after it was written")]
    Sum,
    /// A chunk of a sealed file cannot be opened.
    #[error("its seal is broken: it was changed after it was written, or its key is another one")]
    Seal,
    /// It cannot be read.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
}

impl FormatError {
    /// Of what was read through a [sealed file](sealed)'s reader, which hands its own errors on as those of reading.
    #[must_use]
    pub fn of_sealed(self) -> FormatError {
        match self {
            FormatError::Io(error) => error.downcast().unwrap_or_else(FormatError::Io),
            error => error,
        }
    }
}
