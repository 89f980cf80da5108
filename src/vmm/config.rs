//! The configuration of a reference guest.

use crate::vmm::workload::Workload;

/// The configuration of a reference guest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MachineConfig {
    /// RAM in bytes, a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// 1 to [`VCPUS_MAX`](crate::vmm::VCPUS_MAX).
    pub vcpus: u32,
    /// What the guest does.
    pub workload: Workload,
}
