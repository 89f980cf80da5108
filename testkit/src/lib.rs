//! What the tests of all crates have in common. For `[dev-dependencies]` alone.
//!
//! - [`harness`]: like `cargo test`'s own, but a test that cannot run on this host counts as ignored, with the
//!   reason.
//! - [`mod@skip`]: how a test says that it cannot run.
//! - [`wait`]: waiting for events that give no sign.
//! - [`place`]: directories that are removed when the test ends; taking turns.
//! - [`random`], [`pages`]: random numbers, and the content of pages.
//! - [`quiet`]: panics that are expected.

pub mod harness;
pub mod pages;
pub mod place;
pub mod quiet;
pub mod random;
pub mod skip;
pub mod wait;

pub use inventory;
pub use place::{TempDir, alone, directory, directory_in, open_file_in};
pub use quiet::quietly;
pub use random::Random;
pub use skip::{OrSkip, Reason, skip, skip_part};
pub use testkit_macros::test;
pub use wait::{until, wait_for, wait_until};
