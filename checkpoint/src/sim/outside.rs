//! The simulated world in the shape of the real one: what the session is given in its place.

pub(crate) use migrate::sim::engine::{DirtySubscription, EngineHandle};
pub(crate) use migrate::sim::reader;
pub(crate) use migrate::sim::runtime::{Instant, Runtime, runtime, sleep, spawn, timeout};

pub(crate) use super::bugs::planted;
pub(crate) use super::disk::{File, RingFile, punch_hole, write_bytes};
pub(crate) use super::store::{StoredReader, stored_reader};

/// Bytes that no other file has as its salt.
#[expect(clippy::unnecessary_wraps, reason = "has the shape of the real one")]
pub(crate) fn random<const N: usize>() -> std::io::Result<[u8; N]> {
    Ok(std::array::from_fn(|_| migrate::sim::world::world().random.next() as u8))
}
