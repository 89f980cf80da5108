//! A host of a test, as the product's tests have it, with the benchmark's command on it.
#![allow(dead_code, unused_imports, reason = "each test file uses a part")]

#[path = "../../../tests/common/mod.rs"]
mod product;

use std::path::Path;

pub(crate) use product::*;

pub(crate) const BENCH: &str = env!("CARGO_BIN_EXE_vmemd-bench");

pub(crate) trait Bench {
    /// Runs `vmemd-bench` to its end.
    fn bench(&self, args: &[&str]) -> Said;
    /// Starts `vmemd-bench`, in a process group of its own.
    fn start_bench(&mut self, args: &[&str]) -> Running;
}

impl Bench for Host {
    fn bench(&self, args: &[&str]) -> Said {
        Said::by(&mut self.command_of(Path::new(BENCH), args))
    }

    fn start_bench(&mut self, args: &[&str]) -> Running {
        let command = self.command_of(Path::new(BENCH), args);
        self.start_command(command)
    }
}
