//! `vmemd bench`: `vmemd-bench` takes this process's place. It is a program of its own, which a host that only runs VMs
//! does without.

use std::convert::Infallible;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use vmprocess::failure::Failure;

use crate::program;

const PROGRAM: &str = "vmemd-bench";

/// Comes back only with a failure: help, signals and exit codes are then those of `vmemd-bench`.
pub(super) fn bench(run_dir: Option<PathBuf>, args: Vec<OsString>) -> Result<Infallible, Failure> {
    let path = program::find(PROGRAM)?;
    let mut command = Command::new(&path);
    if let Some(run_dir) = run_dir {
        command.arg("--run-dir").arg(run_dir);
    }
    let error = command.args(args).exec();
    Err(Failure::io(format!("cannot start {}", path.display()), &error))
}
