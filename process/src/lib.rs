//! The process of one VM, whatever its machine: its control socket, its life, leaving and arriving.
//!
//! ```text
//!   run ───────────────────────▶ Here ◀────────── taken back ─────────────┐
//!   receive, restore ▶ Arriving ──┘ │ migrate                              │
//!                                   └──▶ Migrating ──▶ Moved     or    InDoubt
//! ```
//! The VM's processors and devices are a [`Machine`]; one that is still to come, a [`Newcomer`]. The process is either
//! ours from its first instruction, or another program's in which this crate is a guest itself, such as QEMU: see
//! [`Owner`] for what differs.
//!
//! A program that embeds a VM goes these steps, on a thread of its own. Every thread that is started here inherits that
//! one's signal mask: block all signals on it first, where the program takes its signals on threads of its choice.
//!
//! 1. [`RunDir::claim_name`](control::rundir::RunDir::claim_name), then [`Process::begin`]; at a target
//!    [`Arrival::begin`]. From here on the control socket answers. Keep the [`NameHold`] of [`Process::name_hold`] for
//!    the program's exit handlers.
//! 2. Start the engine, with [`Process::notices`] as its listener, and wrap it by [`Memory::external`].
//! 3. [`Process::run`], or [`Process::receive`] ([`Arrival::refuse`] if it cannot): blocks until the VM is to end here.
//! 4. The guest has then been asked to quit, if [`End::quit`] says so; otherwise the program has to end itself. The
//!    name is held until the [`Process`] is dropped, or the [`NameHold`] is released.

#![deny(missing_docs)]

#[cfg(test)]
#[macro_use]
extern crate testkit;

pub mod control;
pub mod failure;
pub mod host;
pub mod last_words;
pub mod medium;
pub mod passing;
pub mod qemu;
pub mod signals;
pub mod size;

mod actions;
mod arrive;
mod checkpoint;
mod checkpointing;
mod doubt;
mod facts;
pub mod granted;
mod halt;
mod hold;
mod homing;
mod leave;
mod life;
mod live_vm;
mod machine;
mod memory;
mod process;
mod record;
mod restore;
mod source_vm;
mod vm;

pub use ::checkpoint::format::{Disk, DiskVersion};
pub use arrive::{Arrival, ArriveSettings};
pub use facts::Facts;
pub use homing::RestoreOptions;
pub use life::End;
pub use machine::{GuestView, Machine, Newcomer, RunState};
pub use memory::{Memory, MemorySpec};
pub use process::{NameHold, Owner, Process};
pub use restore::{Restoration, Restored};
pub use vm::OnEnd;

#[cfg(test)]
testkit::main!();
