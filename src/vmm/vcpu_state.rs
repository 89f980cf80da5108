//! The saved registers of one vCPU: taken from KVM, given to KVM, written and read as bytes.
//!
//! Blocks of the kernel's own (`struct kvm_regs` and so on, as in its `<asm/kvm.h>`) are kept as they are: they
//! are little-endian, of fixed size, and part of its stable interface.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use crate::vmm::bytes::{Reader, Writer};
use crate::vmm::error::VmmError;
use crate::vmm::error::kvm;

/// Model-specific registers that are part of the state. A host without one of them leaves it out.
const MSRS: [u32; 11] = [
    0x10,        // time stamp counter
    0x174,       // SYSENTER: code segment, stack, entry
    0x175,       //
    0x176,       //
    0x277,       // page attribute table
    0xc000_0081, // SYSCALL: segments, entry, compatibility entry, flags
    0xc000_0082, //
    0xc000_0083, //
    0xc000_0084, //
    0xc000_0102, // kernel GS base
    0xc000_0103, // auxiliary time stamp
];
const XSAVE_BYTES: usize = 4096;

/// Kernel structures that are saved as they are.
///
/// # Safety
/// Implementors consist of integers alone, without padding between them, so that every byte is defined and every
/// value of it is valid.
unsafe trait Raw: Copy + Default {}
// SAFETY: all pads are explicit fields; the sizes below show that the compiler added none.
unsafe impl Raw for kvm_regs {}
// SAFETY: as above.
unsafe impl Raw for kvm_sregs {}
// SAFETY: as above.
unsafe impl Raw for kvm_xcrs {}
// SAFETY: as above.
unsafe impl Raw for kvm_debugregs {}
// SAFETY: as above.
unsafe impl Raw for kvm_vcpu_events {}
// SAFETY: as above.
unsafe impl Raw for kvm_mp_state {}

const _: () = assert!(size_of::<kvm_regs>() == 144 && size_of::<kvm_sregs>() == 312);
const _: () = assert!(size_of::<kvm_xcrs>() == 392 && size_of::<kvm_debugregs>() == 128);
const _: () = assert!(size_of::<kvm_vcpu_events>() == 64 && size_of::<kvm_mp_state>() == 4);

/// All registers of a vCPU.
pub(super) struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    msrs: Vec<kvm_msr_entry>,
}

impl VcpuState {
    /// Takes the registers of a vCPU that is out of the guest, with nothing left to complete.
    pub(super) fn take(vcpu: &VcpuFd) -> Result<VcpuState, VmmError> {
        let mut msrs = Vec::with_capacity(MSRS.len());
        for index in MSRS {
            let mut one = msr_list(kvm_msr_entry { index, ..Default::default() });
            if vcpu.get_msrs(&mut one).map_err(kvm("read a vCPU's model-specific registers"))? == 1 {
                msrs.extend_from_slice(one.as_slice());
            }
        }
        Ok(VcpuState {
            mp_state: vcpu.get_mp_state().map_err(kvm("read a vCPU's run state"))?,
            regs: vcpu.get_regs().map_err(kvm("read a vCPU's registers"))?,
            sregs: vcpu.get_sregs().map_err(kvm("read a vCPU's system registers"))?,
            xsave: Box::new(vcpu.get_xsave().map_err(kvm("read a vCPU's vector registers"))?),
            xcrs: vcpu.get_xcrs().map_err(kvm("read a vCPU's extended control registers"))?,
            debugregs: vcpu.get_debug_regs().map_err(kvm("read a vCPU's debug registers"))?,
            events: vcpu.get_vcpu_events().map_err(kvm("read a vCPU's pending events"))?,
            msrs,
        })
    }

    /// Gives the registers to a fresh vCPU.
    pub(super) fn give(&self, vcpu: &VcpuFd) -> Result<(), VmmError> {
        vcpu.set_sregs(&self.sregs).map_err(kvm("set a vCPU's system registers"))?;
        vcpu.set_regs(&self.regs).map_err(kvm("set a vCPU's registers"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(kvm("set a vCPU's extended control registers"))?;
        // SAFETY: KVM reads more than the 4096 bytes of kvm_xsave only with features that a process must ask the
        // kernel for (AMX), and this one does not.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(kvm("set a vCPU's vector registers"))?;
        vcpu.set_debug_regs(&self.debugregs).map_err(kvm("set a vCPU's debug registers"))?;
        for entry in &self.msrs {
            let taken = vcpu.set_msrs(&msr_list(*entry)).is_ok_and(|count| count == 1);
            // A register that this host lacks may be left out if it holds nothing.
            if !taken && entry.data != 0 {
                return Err(VmmError::Register(entry.index));
            }
        }
        vcpu.set_vcpu_events(&self.events).map_err(kvm("set a vCPU's pending events"))?;
        vcpu.set_mp_state(self.mp_state).map_err(kvm("set a vCPU's run state"))
    }

    pub(super) fn write(&self, out: &mut Writer) {
        out.block(raw_bytes(&self.regs));
        out.block(raw_bytes(&self.sregs));
        let xsave: Vec<u8> = self.xsave.region.iter().flat_map(|word| word.to_le_bytes()).collect();
        out.block(&xsave);
        out.block(raw_bytes(&self.xcrs));
        out.block(raw_bytes(&self.debugregs));
        out.block(raw_bytes(&self.events));
        out.block(raw_bytes(&self.mp_state));
        let msrs = self.msrs.iter();
        let msrs: Vec<u8> =
            msrs.flat_map(|msr| [&msr.index.to_le_bytes()[..], &msr.data.to_le_bytes()].concat()).collect();
        out.block(&msrs);
    }

    pub(super) fn read(input: &mut Reader<'_>) -> Result<VcpuState, VmmError> {
        let regs = raw_value(input.block()?)?;
        let sregs = raw_value(input.block()?)?;
        let region = input.block()?;
        if region.len() != XSAVE_BYTES {
            return Err(VmmError::BadState("its vector registers have another size"));
        }
        let mut xsave = Box::<kvm_xsave>::default();
        for (word, bytes) in xsave.region.iter_mut().zip(region.as_chunks().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        Ok(VcpuState {
            regs,
            sregs,
            xsave,
            xcrs: raw_value(input.block()?)?,
            debugregs: raw_value(input.block()?)?,
            events: raw_value(input.block()?)?,
            mp_state: raw_value(input.block()?)?,
            msrs: read_msrs(input.block()?)?,
        })
    }
}

fn read_msrs(bytes: &[u8]) -> Result<Vec<kvm_msr_entry>, VmmError> {
    let mut input = Reader::new(bytes);
    let mut msrs = Vec::new();
    while !input.is_empty() {
        msrs.push(kvm_msr_entry { index: input.u32()?, data: input.u64()?, ..Default::default() });
    }
    Ok(msrs)
}

fn msr_list(entry: kvm_msr_entry) -> Msrs {
    Msrs::from_entries(&[entry]).expect("one entry is within KVM's limit")
}

fn raw_bytes<T: Raw>(value: &T) -> &[u8] {
    // SAFETY: a Raw value is size_of::<T>() defined bytes; the slice borrows it.
    unsafe { std::slice::from_raw_parts((&raw const *value).cast(), size_of::<T>()) }
}

fn raw_value<T: Raw>(bytes: &[u8]) -> Result<T, VmmError> {
    if bytes.len() != size_of::<T>() {
        return Err(VmmError::BadState("a block of registers has another size"));
    }
    // SAFETY: the slice has exactly the size of T, of which all bytes are valid; it need not be aligned.
    Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}
