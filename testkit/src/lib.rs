//! What the tests of all crates have in common. For `[dev-dependencies]` alone.
//!
//! - [`harness`]: `cargo test`'s own, but for tests that cannot run here: they are counted as ignored, with the reason.
//! - [`mod@skip`]: how a test says so.
//! - [`wait`]: for what gives no sign when it happens.
//! - [`place`]: directories that go with the test.
//! - [`random`], [`pages`]: what is written and checked.

pub mod harness;
pub mod pages;
pub mod place;
pub mod random;
pub mod skip;
pub mod wait;

pub use inventory;
pub use place::{TempDir, directory, directory_in, open_file_in};
pub use random::Random;
pub use skip::{OrSkip, Reason, skip, skip_part};
pub use testkit_macros::test;
pub use wait::{until, wait_for, wait_until};
