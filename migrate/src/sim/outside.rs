//! The simulated world in the shape of the real one: what the sessions are given in its place.

#![cfg_attr(not(test), allow(unused_imports, reason = "a reader needs less than a session"))]

pub(crate) use super::bugs::planted;
pub(crate) use super::engine::{DirtySubscription, EngineHandle, StoredReader};
#[cfg(test)]
pub(crate) use super::fs::{
    File, FileExt, OpenOptions, boot_id, in_memory, make_own, remove_file, unnamed_file, vouch_for,
};
#[cfg(test)]
pub(crate) use super::net::{StdStream, TcpStream, round_trip, secure};
pub(crate) use super::runtime::{
    Instant, JoinHandle, JoinSet, Runtime, on_own_thread, pause, random_bytes, runtime, sleep, spawn,
    timeout, timeout_at, yield_to_ring,
};

/// Of a block: the simulated VM has few.
pub(crate) const PORTION_PAGES: u64 = 512;
