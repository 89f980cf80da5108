//! The things that a QEMU command line names and that are outside of it: files, sockets, network interfaces,
//! descriptors.
//!
//! One walk (`visit`) finds them all, so what is listed, made absolute and mapped for another host is the same.

mod check;
mod descriptors;
mod files;
mod walk;
pub mod what;

pub use check::{Host, ThisHost};
pub(super) use check::{missing, report};
pub use walk::{Resource, absolute, from_anywhere, list, map};
pub(super) use walk::{disks, is_character, with_other_disks};
