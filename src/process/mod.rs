//! The process of one VM: its memory, its machine, its control socket, from the start to the end.
//!
//! ```text
//!   run ──────────────▶ Here ◀──────────── taken back ───────────┐
//!   receive ▶ Arriving ──┘ │ migrate                              │
//!                          └──▶ Migrating ──▶ Moved     or    InDoubt
//! ```

mod actions;
pub mod arrive;
mod leave;
mod life;
mod memory;
mod record;
pub mod run;
mod vm;

pub use memory::MemorySpec;
