//! What vmemd knows of QEMU's command lines, without starting anything but `QEMU --version` and its kin.
//!
//! ```text
//! arguments ─▶ options ─▶ machine (pin) ─▶ refuse ─▶ rewrite ─▶ print | exec
//!                  └────▶ resources: absolute ─▶ offer ═▶ (target) map ─▶ check ─▶ rewrite
//! ```
//! `docs/qemu.md` says the same to users.

pub mod binary;
pub mod cpu;
#[cfg(test)]
mod golden_tests;
pub mod machine;
pub mod offer;
pub mod options;
pub mod output;
pub mod props;
pub mod refuse;
pub mod resources;
pub mod rewrite;
pub mod rules;

use vmprocess::failure::{Failure, Kind};
use vmprocess::size::Size;
