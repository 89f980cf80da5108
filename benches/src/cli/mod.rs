//! The `vmemd-bench` command: raw arguments, resolved settings, the right measurement, exit code.

mod args;
mod command;
mod jobs;
mod traces;

pub use command::main;
