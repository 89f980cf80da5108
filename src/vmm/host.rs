//! The parts of KVM that the reference guest uses: the device, a VM with its memory slots, vCPUs.

use kvm_bindings::{CpuId, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmprocess::size::Size;

use crate::vmm::config::MachineConfig;
use crate::vmm::error::VmmError;
use crate::vmm::error::kvm;
use crate::vmm::layout::{HOLE_END, HOLE_START, PAGE, physical};
use crate::vmm::limits::VCPUS_MAX;
use crate::vmm::memory::GuestMemory;
use crate::vmm::registers;

/// Where KVM on Intel keeps its own pages, inside the hole: a task state segment of three pages, a page table.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
const _: () = assert!(HOLE_START < IDENTITY_MAP_ADDRESS && (TSS_ADDRESS as u64) < HOLE_END);

/// KVM, opened, with an empty VM that fits the configuration.
pub(super) struct Host {
    pub(super) vm: VmFd,
    cpuid: CpuId,
}

/// Whether this host can run guests at all.
///
/// # Errors
/// What it lacks.
pub fn check_kvm() -> Result<(), VmmError> {
    open_kvm().map(drop)
}

fn open_kvm() -> Result<Kvm, VmmError> {
    Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => VmmError::NoKvm,
        libc::EACCES | libc::EPERM => VmmError::NoPermission,
        _ => VmmError::Kvm { action: "open /dev/kvm", source: error },
    })
}

impl Host {
    pub(super) fn open(config: &MachineConfig) -> Result<Host, VmmError> {
        if !(1..=VCPUS_MAX).contains(&config.vcpus) {
            return Err(VmmError::Vcpus(config.vcpus));
        }
        let kvm_fd = open_kvm()?;
        let cpuid = registers::cpuid(&kvm_fd)?;
        let bits = registers::physical_bits(&cpuid).min(63);
        if physical(config.memory_bytes - PAGE) >> bits != 0 {
            let most = Size((1 << bits) - (HOLE_END - HOLE_START));
            return Err(VmmError::TooMuchMemory { given: Size(config.memory_bytes), most });
        }
        let vm = kvm_fd.create_vm().map_err(kvm("create a VM"))?;
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(kvm("place its identity map"))?;
        vm.set_tss_address(TSS_ADDRESS).map_err(kvm("place its task state segment"))?;
        Ok(Host { vm, cpuid })
    }

    /// Gives the VM its memory and makes its vCPUs, whose registers are not set yet.
    pub(super) fn vcpus(
        &self,
        config: &MachineConfig,
        memory: &GuestMemory,
    ) -> Result<Vec<VcpuFd>, VmmError> {
        let base = memory.base() as usize;
        if base == 0 || !base.is_multiple_of(PAGE as usize) {
            return Err(VmmError::Misaligned(base));
        }
        let low = config.memory_bytes.min(HOLE_START);
        let slots = [(0, low), (low, config.memory_bytes - low)];
        for (slot, (start, bytes)) in (0..).zip(slots).filter(|(_, (_, bytes))| *bytes > 0) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: physical(start),
                memory_size: bytes,
                userspace_addr: base as u64 + start,
            };
            // SAFETY: who makes a ReferenceMachine promises that memory_bytes from the base stay mapped while it
            // exists; the slots lie within and do not overlap.
            unsafe { self.vm.set_user_memory_region(region) }.map_err(kvm("map the guest's memory"))?;
        }
        (0..config.vcpus).map(|index| self.vcpu(index)).collect()
    }

    fn vcpu(&self, index: u32) -> Result<VcpuFd, VmmError> {
        let vcpu = self.vm.create_vcpu(u64::from(index)).map_err(kvm("create a vCPU"))?;
        vcpu.set_cpuid2(&self.cpuid).map_err(kvm("set a vCPU's features"))?;
        Ok(vcpu)
    }
}
