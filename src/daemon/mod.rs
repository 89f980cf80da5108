//! `vmemd serve`: lets VMs arrive at this host. Holds no VM's memory; VMs outlive it.

mod admission;
mod children;
pub mod passing;
pub mod serve;

use std::path::PathBuf;

use crate::control::rundir::RunDir;

/// Where the fates of hand-overs are recorded.
pub fn sessions_dir(dir: &RunDir) -> PathBuf {
    dir.path().join(".sessions")
}
