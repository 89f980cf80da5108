//! The names by which a benchmark recognises files, cgroups and processes that an earlier, killed one has left
//! behind.

use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};

/// The beginning of the name of everything that a benchmark makes.
pub(crate) const PREFIX: &str = "vmemd-bench-";
pub(crate) const SWAP_FILE: &str = "swapfile";

/// Ends a process at once.
pub(crate) fn kill(pid: i32) {
    // A process that this benchmark has started, or one that is dead.
    if pid > 1
        && let Some(process) = Pid::from_raw(pid)
    {
        let _ = kill_process(process, Signal::KILL);
    }
}

/// Whether a name is that of something made by a benchmark that does not run any more.
pub(crate) fn is_left(name: &str) -> bool {
    let Some(rest) = name.strip_prefix(PREFIX) else { return false };
    let pid = rest.split('-').next().unwrap_or_default();
    pid.parse::<u32>().is_ok_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_told_from_what_is_in_use() {
        assert!(is_left("vmemd-bench-4294967294"));
        assert!(is_left("vmemd-bench-4294967294-1-swap"));
        assert!(!is_left(&format!("vmemd-bench-{}-1-swap", std::process::id())));
        assert!(!is_left("vmemd-bench-"));
        assert!(!is_left("somebody-else-4294967294"));
    }
}
