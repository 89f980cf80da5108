//! vmemd: the command, the host daemon and the drivers of VMs.

#[cfg(test)]
#[macro_use]
extern crate testkit;

pub mod cli;
pub mod daemon;
pub mod doctor;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
#[cfg(feature = "object-store")]
mod object;
pub mod pki;
pub mod program;
pub mod qemu;
mod reference;
pub mod restore;
pub mod restore_settings;
pub mod run;
mod sandbox;
pub mod vmm;

#[cfg(test)]
testkit::main!();
