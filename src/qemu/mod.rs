//! What vmemd knows of QEMU's command lines, without starting anything but `QEMU --version` and its kin.
//!
//! ```text
//! arguments ─▶ options ─▶ machine (pin) ─▶ refuse ─▶ rewrite ─▶ print | exec
//!                  └────▶ resources: absolute ─▶ offer ═▶ (target) map ─▶ check ─▶ rewrite
//! ```
//! `docs/qemu.md` says the same to users.

pub mod accel;
pub mod ask;
pub mod binary;
pub mod cpu;
#[cfg(test)]
mod golden_tests;
pub mod launch;
mod loaded;
pub mod machine;
pub mod offer;
pub mod options;
pub mod output;
pub mod props;
pub mod refuse;
pub mod resources;
pub mod rewrite;
pub mod rules;
pub mod run;
pub mod waits;

use vmprocess::failure::{Failure, Kind};
use vmprocess::size::Size;

/// A list of reasons, for where only one line is shown.
pub fn one_line(text: &str) -> String {
    text.replace(":\n  ", ": ").replace("\n  ", "; ")
}

/// Refuses a RAM budget that a VM of that memory cannot have.
pub fn check_ram(memory: Size, ram: Size) -> Result<(), Failure> {
    let minimum = Size(swapd::Engine::MIN_BUDGET_BYTES);
    let text = if ram > memory.max(minimum) {
        format!("--ram {ram} is more than the VM's memory of {memory}: a VM cannot use more RAM than that")
    } else if ram < minimum {
        format!("--ram {ram} is below the minimum of {minimum}")
    } else {
        return Ok(());
    };
    Err(Failure::new(Kind::Usage, text))
}
