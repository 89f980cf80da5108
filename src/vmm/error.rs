//! Errors of the reference guest, in words that say what to do about them.

use vmprocess::size::Size;

use crate::vmm::workload::WorkloadError;

/// An error of the reference guest or of the KVM underneath it.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// `/dev/kvm` does not exist.
    #[error(
        "this host has no /dev/kvm: load kvm_intel or kvm_amd (modprobe kvm_amd), enable virtualisation in the \
         firmware, or, inside a virtual machine, enable nested virtualisation"
    )]
    NoKvm,
    /// `/dev/kvm` exists but may not be opened.
    #[error(
        "no permission to open /dev/kvm: add the user to the group kvm (usermod -aG kvm USER, then log in again)"
    )]
    NoPermission,
    /// A request to KVM failed.
    #[error("KVM refused to {action}")]
    Kvm {
        /// What was asked of it.
        action: &'static str,
        /// Its answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Fewer or more vCPUs than the guest program can use.
    #[error("{0} vCPUs are not possible: choose 1 to {max}", max = crate::vmm::limits::VCPUS_MAX)]
    Vcpus(u32),
    /// The memory is smaller than the least one.
    #[error("{given} of memory is too little: the reference guest needs at least {least}")]
    TooLittleMemory {
        /// The size asked for.
        given: Size,
        /// The least possible size.
        least: Size,
    },
    /// The memory is larger than this host can address.
    #[error("{given} of memory is too much: this host's guests reach at most {most}")]
    TooMuchMemory {
        /// The size asked for.
        given: Size,
        /// The greatest possible size.
        most: Size,
    },
    /// The memory is no multiple of 2 MiB.
    #[error("{0} of memory is not a multiple of 2M: round it up or down")]
    UnevenMemory(Size),
    /// The memory's address is not that of a page.
    #[error("guest memory must start at a page of the host, not at {0:#x}")]
    Misaligned(usize),
    /// The working set does not fit the memory.
    #[error(
        "a working set of {wanted} does not fit: of {memory} the guest can use {usable}, the rest are its page \
         tables and its ledger; choose a smaller working set or more memory"
    )]
    WorkingSetTooLarge {
        /// The working set asked for.
        wanted: Size,
        /// The guest's memory.
        memory: Size,
        /// What of it the workload can use.
        usable: Size,
    },
    /// The working set has less than a page for each vCPU.
    #[error("a working set of {wanted} is too small: it needs a page for each vCPU, at least {least}")]
    WorkingSetTooSmall {
        /// The working set asked for.
        wanted: Size,
        /// The least possible working set.
        least: Size,
    },
    /// The text of a workload makes no sense.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// A thread or signal handler could not be set up.
    #[error("cannot {action}")]
    Thread {
        /// What was attempted.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// A vCPU did not leave the guest in time.
    #[error(
        "vCPUs did not stop within {0} s: a page fault of theirs is not being served (see the engine's counters)"
    )]
    PauseTimeout(u64),
    /// The guest has failed and cannot go on.
    #[error("the guest has failed: {0}")]
    Failed(String),
    /// The machine runs, and must be paused for this.
    #[error("the guest is running: pause it before saving it")]
    NotPaused,
    /// A saved state has another version.
    #[error(
        "saved guest has state version {found}, this vmemd knows {known}: use the same vmemd on both hosts"
    )]
    StateVersion {
        /// The version found.
        found: u32,
        /// The version that this program writes and reads.
        known: u32,
    },
    /// A saved state is damaged or none at all.
    #[error("saved guest is unusable: {0}; save it again")]
    BadState(&'static str),
    /// A saved state belongs to a machine of another size.
    #[error("saved guest has {saved} of memory, but {given} was provided: provide exactly {saved}")]
    MemorySize {
        /// What the state says.
        saved: Size,
        /// What the caller has.
        given: Size,
    },
    /// This host's processor cannot take over the registers.
    #[error(
        "this host's KVM does not take the model-specific register {0:#x} of the saved guest: use a host with a similar processor"
    )]
    Register(u32),
}

/// Gives a failed request to KVM its name.
pub(super) fn kvm(action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmmError {
    move |source| VmmError::Kvm { action, source }
}
