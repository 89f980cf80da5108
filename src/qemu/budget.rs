//! Which RAM budget a VM can have.

use vmprocess::failure::{Failure, FailureKind};
use vmprocess::size::Size;

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
    Err(Failure::new(FailureKind::Usage, text))
}
