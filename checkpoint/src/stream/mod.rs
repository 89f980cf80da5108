//! A checkpoint as one stream of bytes: for a pipe, a tape, an object store; in short, for what cannot have a sparse
//! file. `docs/checkpoint-format.md` describes every byte of it.
//!
//! ```text
//!   archive: a checkpoint and its bases ──▶ export ──▶ writer ══ pipe, object ══▶ reader ──▶ import ──▶ archive
//! ```
//! The stream stands alone: pages that the checkpoint has in a base are in it, and pages that read as zeros cost
//! nothing. It is written and read from its beginning to its end, once. Its length stands at its beginning and each
//! sum goes into the next one, so a stream that was cut, or put together of two, is never taken for a whole one.

mod buffers;
mod error;
mod export;
mod import;
mod reader;
mod record;
mod writer;

pub use error::StreamError;
pub use export::{Export, Exported};
pub use import::{Imported, import};
pub use reader::{Pages, StreamReader, inspect};
pub use record::{MAX_RECORD_PAGES, Record, RecordKind, record_bytes};
pub use writer::StreamWriter;

use crate::archive::Progress;

/// Whoever is told how far something is, from any thread, and says whether to go on.
pub type Watch<'a> = &'a (dyn Fn(Progress) -> bool + Sync);

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
