//! The `vmemd` command: raw arguments, resolved settings, the right mechanism, output, exit code.

mod archive_args;
mod args;
mod bench;
mod checkpoint;
mod checkpoints;
mod command;
mod migrate;
mod resolve;
mod settings;
mod snapshots;
mod stat;
mod streams;
pub mod terminal;
pub mod values;
mod vms;
mod work;

pub use command::main;
