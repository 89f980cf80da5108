//! The key of encrypted checkpoints, from the user's file to what pages and files are encrypted with.
//!
//! ```text
//!   key file: 32 bytes ──▶ with the chain's salt: key of the chain ──▶ of its pages: AES-256-XTS, the page's number
//!                                                        │
//!                                                        ├──▶ of a file, with its own salt: AES-256-GCM in chunks
//!                                                        └──▶ check value: tells a wrong key at once
//! ```
//! Each arrow is HKDF-SHA256. A *chain* is a checkpoint without a base and those that stand on it, directly or not: they
//! share blocks, so they have one key. The VM's process and QEMU's are given the key of one chain through a pipe: the
//! user's own key stays in the command, and no key is ever an argument, in the environment or in a line of the control
//! socket.

mod chain;
mod user;

pub use chain::{CHECK_BYTES, ChainKey, KEY_BYTES, SALT_BYTES};
pub use user::{ArchiveKey, KeyFileError};

pub(crate) use chain::random;
