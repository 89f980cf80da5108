//! What goes over the wire, byte by byte: see `docs/wire.md`.
//!
//! Everything here is pure: bytes in, values out, or the other way. Every decoder checks lengths before it
//! allocates, and refuses what it does not understand with a [`WireError`] that says what was wrong.

pub mod control;
pub mod extents;
pub mod heat;
pub mod opening;
pub mod record;

use crate::versions::{Named, NoneInCommon, Side, Versions};

/// The versions of everything in this module that this vmemd speaks. Two sides take the highest that both know; a peer
/// that knows none of them is refused. `docs/wire.md` says when to raise which end.
pub const VERSIONS: Versions = 2..=3;
/// From this version on, a target takes a state of any size: [`control::state_limit`].
pub(crate) const STATE_WITHOUT_LIMIT: u16 = 3;

// An opening has one byte for the distance between the ends.
const _: () = assert!(*VERSIONS.start() <= *VERSIONS.end());
const _: () = assert!(*VERSIONS.end() - *VERSIONS.start() <= u8::MAX as u16);

/// Why a source and a target cannot speak to each other, in words that are right on both sides.
pub(crate) fn none_in_common(source: Versions, target: Versions) -> NoneInCommon {
    let source = Side { name: "source", versions: source, remedy: "update vmemd at the source" };
    let target = Side { name: "target", versions: target, remedy: "update vmemd at the target" };
    NoneInCommon { protocol: "migration protocol", sides: [source, target] }
}

/// Why bytes are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The magic is missing: the peer is not vmemd, or the stream has lost its step.
    #[error("it does not speak vmemd's migration protocol")]
    NotOurs,
    /// The versions of a peer, of which none is known here.
    #[error("it speaks {} of the migration protocol, and here is {}", Named(.0.clone()), Named(VERSIONS))]
    Version(Versions),
    /// The kind of an opening or record is not one of this version.
    #[error("a message of unknown kind {0}")]
    UnknownKind(u8),
    /// A number is above its limit. Found before anything is allocated for it.
    #[error("{what} of {value}, where at most {limit} is allowed")]
    TooLarge {
        /// What there is too much of, for the message.
        what: &'static str,
        /// The number, as received.
        value: u64,
        /// The most that is allowed.
        limit: u64,
    },
    /// Lengths or counts in one message contradict each other; the text names them.
    #[error("a message whose lengths do not fit each other: {0}")]
    Lengths(&'static str),
    /// The bytes were changed on the way, or a record is not the one that is due on its connection.
    #[error("a damaged or misplaced message: its checksum does not match")]
    Checksum,
    /// A run is empty, crosses a block, or ends beyond the memory.
    #[error("pages {start}+{len} are not a run within one 2 MiB block of a memory of {memory} pages")]
    BadRun {
        /// The run's first page.
        start: u64,
        /// Pages in the run.
        len: u32,
        /// Pages of the VM's memory.
        memory: u64,
    },
    /// A page came where its other versions do not: their order would be lost.
    #[error("page {page} came on stream {stream}, where it does not belong")]
    WrongStream {
        /// First page of the run.
        page: u64,
        /// The data stream on which it came.
        stream: u32,
    },
    /// A field has a value that it cannot have.
    #[error("a field with the value {value}, which {what} cannot have")]
    BadValue {
        /// What cannot have that value, for the message.
        what: &'static str,
        /// The value, as received.
        value: u64,
    },
    /// A text is not UTF-8, so it can be neither shown nor used as a name.
    #[error("a text that is not UTF-8")]
    NotText,
}

/// `value`, if it is at most `limit`.
fn at_most(what: &'static str, value: u64, limit: u64) -> Result<u64, WireError> {
    if value > limit { Err(WireError::TooLarge { what, value, limit }) } else { Ok(value) }
}
