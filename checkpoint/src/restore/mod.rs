//! What a VM's process does to begin from a checkpoint.
//!
//! ```text
//!   archive: a checkpoint and its bases ──▶ open: files, locks ──▶ image: which page is where, its sum
//!                                                                      │
//!                       the engine adopts all of it ◀──────────────────┤
//!                       order: what comes ahead of any touch ◀─────────┘
//! ```
//! Nothing is copied before the VM runs, and no file of the checkpoint is changed, but for the order of first faults.

mod first_touches;
mod image;
mod open;
mod order;

pub use first_touches::FirstTouches;
pub use image::{ADOPT_PAGES, Image};
pub use open::{Checkpoint, Hold, open};
pub use order::order;
