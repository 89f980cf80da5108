//! vmemd: the command, the host daemon and the drivers of VMs.

pub mod bench;
pub mod cli;
pub mod daemon;
pub mod doctor;
mod reference;
pub mod run;
pub mod vmm;
