//! vmemd: the command, the host daemon and the drivers of VMs.

pub mod bench;
pub mod cli;
pub mod daemon;
pub mod doctor;
pub mod pki;
pub mod qemu;
mod reference;
pub mod run;
pub mod vmm;
