//! The registers of a vCPU: what they are at the start, and how they are saved and loaded.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::vmm::error::VmmError;
use crate::vmm::error::kvm;
use crate::vmm::image::{GDT_LIMIT, SELECTOR_CODE, SELECTOR_DATA, SELECTOR_TSS, TSS_LIMIT};
use crate::vmm::layout::{BLOCKS, GDT, PAGE, PROGRAM, TABLES, TSS};
use crate::vmm::program::block;

/// Protected mode, monitor coprocessor, extension type, numeric errors, write protection, paging.
const CR0: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
/// Physical address extension, FXSAVE and SSE, SSE exceptions.
const CR4: u64 = 1 << 5 | 1 << 9 | 1 << 10;
/// Long mode enabled and active.
const EFER: u64 = 1 << 8 | 1 << 10;
/// The bit that is always one: interrupts off, I/O privilege level 0.
const RFLAGS: u64 = 1 << 1;

/// Segment types: data that was accessed and may be written, code that was accessed and may be read, busy TSS.
const TYPE_DATA: u8 = 3;
const TYPE_CODE: u8 = 11;
const TYPE_TSS: u8 = 11;

/// What KVM can show the guest of this host's processor.
pub(super) fn cpuid(kvm_fd: &Kvm) -> Result<CpuId, VmmError> {
    kvm_fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("list the processor's features"))
}

/// Bits of a guest-physical address on this host.
pub(super) fn physical_bits(cpuid: &CpuId) -> u32 {
    const ADDRESS_SIZES: u32 = 0x8000_0008;
    const BITS_WITHOUT: u32 = 36;
    let leaf = cpuid.as_slice().iter().find(|entry| entry.function == ADDRESS_SIZES);
    leaf.map_or(BITS_WITHOUT, |entry| entry.eax & 0xff)
}

/// Puts a vCPU at the entry of the guest program, in ring 3.
pub(super) fn set_initial(vcpu: &VcpuFd, index: u32) -> Result<(), VmmError> {
    let mut sregs = vcpu.get_sregs().map_err(kvm("read a vCPU's system registers"))?;
    let data = segment(SELECTOR_DATA, TYPE_DATA, false);
    sregs.cs = segment(SELECTOR_CODE, TYPE_CODE, true);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        base: TSS,
        limit: TSS_LIMIT,
        selector: SELECTOR_TSS,
        type_: TYPE_TSS,
        present: 1,
        ..Default::default()
    };
    sregs.gdt.base = GDT;
    sregs.gdt.limit = GDT_LIMIT;
    // No handlers: the guest program raises no exception, and one that it raises shuts the vCPU down.
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, TABLES, CR4, EFER);
    vcpu.set_sregs(&sregs).map_err(kvm("set a vCPU's system registers"))?;
    let block_start = BLOCKS + u64::from(index) * PAGE;
    let regs = kvm_regs {
        rip: PROGRAM,
        rsp: block_start + block::STACK,
        r15: block_start,
        rflags: RFLAGS,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(kvm("set a vCPU's registers"))
}

/// A flat segment of ring 3.
fn segment(selector: u16, type_: u8, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}
