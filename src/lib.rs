//! vmemd: the command, the host daemon and the drivers of VMs.

pub mod size;
pub mod vmm;
