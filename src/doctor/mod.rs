//! `vmemd doctor`: what this host has and lacks, with the remedy.

mod check;
mod checks;
mod kernel;
mod report;

pub use check::Check;
pub use report::{doctor, lacks};
