//! QEMU's command lines: read, judged, changed and described, without starting anything but `QEMU --version` and its
//! kin.
//!
//! ```text
//! arguments ─▶ options ─▶ machine (pin) ─▶ refuse ─▶ rewrite ─▶ print | exec
//!                  └────▶ resources: absolute ─▶ offer ═▶ (target) map ─▶ check ─▶ rewrite
//! ```
//! `docs/qemu.md` says the same to users.

pub mod accel;
pub mod ask;
pub mod binary;
pub mod budget;
pub mod cpu;
pub mod disk_versions;
mod generation;
#[cfg(test)]
mod golden_tests;
pub(crate) mod img;
pub mod inherit;
pub mod launch;
mod loaded;
pub mod machine;
pub mod offer;
pub mod options;
pub mod output;
pub mod props;
pub mod refuse;
mod refused;
pub mod resources;
pub mod restore;
pub mod rewrite;
pub mod rules;
pub mod run;
mod twice;
pub mod waits;
pub mod words;
