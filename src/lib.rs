//! vmemd: the command, the host daemon and the drivers of VMs.

pub mod bench;
pub mod cli;
pub mod control;
pub mod daemon;
pub mod doctor;
pub mod failure;
pub mod host;
pub mod process;
pub mod qemu;
pub mod signals;
pub mod size;
pub mod vmm;
