//! One vCPU: its thread, which runs the guest and serves what the guest program reports.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::vmm::counters::Counters;
use crate::vmm::error::VmmError;
use crate::vmm::gate::{Gate, Goal};
use crate::vmm::kick;
use crate::vmm::pace::Pace;
use crate::vmm::program::{PORT_FILLED, PORT_IDLE, PORT_MISMATCH, PORT_PROGRESS, PORT_ROUND};

/// The data that all vCPU threads of a machine share with its owner.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) gate: Arc<Gate>,
    pub(super) counters: Counters,
    pub(super) pace: Pace,
    /// Host address of the guest's memory, to tell which page was lost.
    pub(super) memory_base: usize,
}

/// A vCPU that its thread locks while it runs, and its owner while it is parked.
pub(super) type LockedVcpu = Arc<Mutex<VcpuFd>>;

/// Why a vCPU thread left the guest.
enum Left {
    /// The gate is closed for now.
    Asked,
    /// The guest cannot go on.
    Failed(String),
}

/// Starts the thread of a vCPU, parked.
pub(super) fn spawn(index: u32, vcpu: LockedVcpu, shared: Arc<Shared>) -> Result<JoinHandle<()>, VmmError> {
    Builder::new()
        .name(format!("vcpu{index}"))
        .spawn(move || {
            while shared.gate.park() {
                let mut vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
                kick::enter(&mut vcpu);
                let left = run(index, &mut vcpu, &shared);
                complete_io(&mut vcpu);
                kick::leave();
                if let Left::Failed(reason) = left {
                    shared.gate.fail(format!("vCPU {index}: {reason}"));
                }
            }
        })
        .map_err(|source| VmmError::Thread { action: "start a vCPU's thread", source })
}

/// Runs the guest until the gate's goal is another.
fn run(index: u32, vcpu: &mut VcpuFd, shared: &Shared) -> Left {
    loop {
        kick::forget();
        if let Some(address) = kick::lost_page() {
            let offset = address.wrapping_sub(shared.memory_base);
            return Left::Failed(format!(
                "the content of its page {} (guest memory offset {offset:#x}) is lost: the page is poisoned",
                offset >> 12
            ));
        }
        if !shared.gate.is_open() {
            if shared.gate.goal() != Goal::Running {
                return Left::Asked;
            }
            shared.gate.wait_held();
            continue;
        }
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                let value = data.try_into().map(u32::from_le_bytes);
                match value {
                    Ok(value) if serve(index, port, value, shared) => {}
                    _ => {
                        return Left::Failed(format!(
                            "{} bytes written to unknown port {port:#x}",
                            data.len()
                        ));
                    }
                }
            }
            Ok(VcpuExit::Intr) => {}
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {}
            Ok(exit) => {
                let reason = describe(&exit);
                return Left::Failed(format!("{reason}{}", place(vcpu)));
            }
            Err(error) => {
                let lost = if [libc::EFAULT, libc::EHWPOISON].contains(&error.errno()) {
                    ": a page that it touched cannot be provided (poisoned, or no longer mapped)"
                } else {
                    ""
                };
                return Left::Failed(format!("KVM_RUN failed with {error}{lost}{}", place(vcpu)));
            }
        }
    }
}

/// Takes one report; false if there is no such port.
fn serve(index: u32, port: u16, value: u32, shared: &Shared) -> bool {
    match port {
        PORT_PROGRESS | PORT_FILLED => {
            let pages = u64::from(value);
            if port == PORT_FILLED {
                // Filling is set-up: it goes as fast as it can.
                shared.counters.add_filled(pages);
            } else {
                shared.counters.add_verified(pages);
                if let Some(due) = shared.pace.charge(pages) {
                    shared.gate.sleep(Some(due));
                }
            }
        }
        PORT_ROUND => shared.counters.add_round(index),
        PORT_MISMATCH => shared.counters.add_mismatch(u64::from(value)),
        PORT_IDLE => shared.gate.sleep(None),
        _ => return false,
    }
    true
}

/// Lets KVM finish the instruction of an answered exit, so that the registers are those behind it.
fn complete_io(vcpu: &mut VcpuFd) {
    vcpu.set_kvm_immediate_exit(1);
    // With immediate_exit it returns EINTR without running the guest; another error shows again at the next run.
    let _ = vcpu.run();
    vcpu.set_kvm_immediate_exit(0);
}

fn describe(exit: &VcpuExit<'_>) -> String {
    match exit {
        VcpuExit::Shutdown => "shutdown (an exception that the guest program cannot handle)".to_owned(),
        VcpuExit::InternalError => "KVM internal error (an instruction that it cannot emulate)".to_owned(),
        VcpuExit::FailEntry(reason, cpu) => {
            format!("entry into the guest failed on CPU {cpu}, reason {reason:#x}")
        }
        VcpuExit::MemoryFault { gpa, size, .. } => {
            format!(
                "memory fault: {size} bytes at guest-physical {gpa:#x} cannot be provided (poisoned or unmapped)"
            )
        }
        VcpuExit::MmioRead(address, _) => format!("read from {address:#x}, where the guest has no memory"),
        VcpuExit::MmioWrite(address, _) => format!("write to {address:#x}, where the guest has no memory"),
        other => format!("unexpected exit {other:?}"),
    }
}

/// Where the guest program was, for the reason of a failure.
fn place(vcpu: &VcpuFd) -> String {
    vcpu.get_regs().map_or_else(
        |_| String::new(),
        |regs| format!(" at rip {:#x}, page {}, generation {}", regs.rip, regs.rbx, regs.r8 as u32),
    )
}
