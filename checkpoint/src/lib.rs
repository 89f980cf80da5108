//! vmemd's checkpoints: a VM's memory and state in files, taken while it runs, and a VM made of them again.
//!
//! ```text
//!   save ──▶ format (image, map, manifest) ──▶ archive: a directory of whole checkpoints ──▶ restore
//!                                                     ▲
//!                                                     └──▶ stream: one of them, as one stream of bytes
//! ```
//! [`mod@format`] has the files by themselves, [`archive`] the directory in which they are, [`save`] what a VM's
//! process does for a checkpoint, [`restore`] what it does to begin from one, and [`stream`] is how a checkpoint gets
//! to another place. [`key`] is how a checkpoint is kept from those who have not its key. `docs/checkpoint-format.md`
//! describes every byte.

#![deny(missing_docs)]

pub mod archive;
pub mod format;
pub mod key;
mod outside;
pub mod restore;
pub mod save;
#[cfg(test)]
#[allow(unreachable_pub, missing_debug_implementations, reason = "has the shape of what it stands for")]
mod sim;
pub mod stream;
