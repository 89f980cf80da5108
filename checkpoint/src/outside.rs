//! The world outside of a live session: files, time, tasks, the engine, and the reader that is in the same world.
//!
//! Everything of [`save`](crate::save) that takes time or can fail is reached through here. Unit tests of this crate
//! put a simulated world of the same shape in its place (`sim/`), so what they drive is the session as it is; any other
//! build has the real one. There is no way to flush here: what a session writes is made durable by the archive's owner.

#[cfg(test)]
pub(crate) use crate::sim::outside::*;
#[cfg(not(test))]
pub(crate) use real::*;

/// Whether a deliberate bug is planted, for the simulation to find; in a normal build it never is, and leaves no code.
#[cfg(not(test))]
macro_rules! planted {
    ($bug:ident) => {
        false
    };
}
#[cfg(not(test))]
pub(crate) use planted;

#[cfg(not(test))]
mod real {
    use std::io;

    pub(crate) use std::fs::File;
    pub(crate) use std::time::Instant;

    pub(crate) use migrate::reader;
    pub(crate) use swapd::{DirtySubscription, EngineHandle, StoredReader};
    pub(crate) use tokio::time::{sleep, timeout};
    pub(crate) use tokio_uring::fs::File as RingFile;
    pub(crate) use tokio_uring::{Runtime, spawn};

    pub(crate) fn runtime() -> io::Result<Runtime> {
        Runtime::new(&tokio_uring::builder())
    }

    pub(crate) use crate::key::random;

    pub(crate) fn stored_reader(handle: &EngineHandle) -> StoredReader {
        handle.stored_reader()
    }

    /// Writes bytes on the ring; dropped half-way, they may be written all the same.
    pub(crate) async fn write_bytes(file: &RingFile, bytes: Vec<u8>, at: u64) -> io::Result<()> {
        file.write_all_at(bytes, at).await.0
    }

    /// Gives the file's blocks back; the file stays as long as it is.
    pub(crate) async fn punch_hole(file: &RingFile, at: u64, len: u64) -> io::Result<()> {
        file.fallocate(at, len, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE).await
    }
}
