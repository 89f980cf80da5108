//! vmemd's checkpoints: a VM's memory and state in files, taken while it runs, and a VM made of them again.
//!
//! ```text
//!   save ──▶ format (image, map, manifest) ──▶ archive: a directory of whole checkpoints ──▶ restore
//!                                                     ▲
//!                                                     └──▶ stream: one of them, as one stream of bytes
//! ```
//! [`mod@format`] has the files by themselves, [`archive`] the directory in which they are, [`save`] what a VM's
//! process does for a checkpoint, [`restore`] what it does to begin from one, and [`stream`] is how a checkpoint gets
//! to another place. `docs/checkpoint-format.md` describes every byte.

#![deny(missing_docs)]

pub mod archive;
pub mod format;
mod outside;
pub mod restore;
pub mod save;
#[cfg(test)]
#[allow(unreachable_pub, missing_debug_implementations, reason = "has the shape of what it stands for")]
mod sim;
pub mod stream;
