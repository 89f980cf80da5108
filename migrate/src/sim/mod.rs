//! The simulation: the real sessions, hand-over, records and questions of both sides, on a simulated network, file
//! system and engine, in virtual time, with faults at every step of the protocol. `docs/simulation-migration.md` says
//! what is checked.
//!
//! The world itself (clock, threads, tasks, engine, guest), and the reader in it, are there for unit tests of other
//! crates, too: with the feature `sim`. What is about migrations is in this crate's own tests alone.

pub mod bugs;
pub mod engine;
pub mod guest;
pub(crate) mod outside;
pub mod random;
pub mod runtime;
pub mod world;

/// The reader in this world.
#[cfg(test)]
pub use crate::reader;
/// The reader in this world: its own files once more, which take what they need of the world from here.
#[cfg(not(test))]
#[allow(clippy::duplicate_mod, reason = "the feature must not replace the one in the real world")]
#[allow(dead_code, reason = "a part of it is for migrations")]
#[path = "../reader/mod.rs"]
pub mod reader;

#[cfg(test)]
mod coverage;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod fs;
#[cfg(test)]
mod memory;
#[cfg(test)]
mod net;
#[cfg(test)]
mod scenario;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod vm;

#[cfg(test)]
pub(crate) use tests::{in_a_world, sound_disk};
