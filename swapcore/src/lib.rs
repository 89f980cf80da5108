//! The engine without hands: one VM's page table, policies and core. Events go in, actions come out; there is no I/O,
//! no clock and no lock, so that the crate that has them (`swapd`) and the simulation run the same code.
//!
//! Each file depends only on those before it: `units`, `table` and `staging`, `policy`, `api`, `core`, `replay` and
//! `sim`.

#![deny(missing_docs)]

#[macro_use]
pub mod mutant;

pub mod api;
pub mod core;
pub mod digest;
pub mod errno;
pub mod error;
pub mod moves;
pub mod policy;
pub mod replay;
#[cfg(feature = "sim")]
pub mod sim;
pub mod staging;
pub mod stats;
pub mod table;
pub mod transfer;
pub mod units;
