//! Faults of this thread and processor time of this process, by the kernel's counts.

/// Page faults of this thread.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Faults {
    pub(super) minor: u64,
    /// Faults for which the kernel has waited for the device.
    pub(super) major: u64,
}

pub(super) fn thread_faults() -> Faults {
    let usage = usage(libc::RUSAGE_THREAD);
    Faults { minor: usage.ru_minflt as u64, major: usage.ru_majflt as u64 }
}

/// User and system time of the whole process.
pub(super) fn process_cpu_ns() -> u64 {
    let usage = usage(libc::RUSAGE_SELF);
    let ns = |time: libc::timeval| time.tv_sec as u64 * 1_000_000_000 + time.tv_usec as u64 * 1000;
    ns(usage.ru_utime) + ns(usage.ru_stime)
}

fn usage(of: libc::c_int) -> libc::rusage {
    // SAFETY: an all-zero rusage is a valid value of that plain C struct; it is filled by the call below.
    let mut found: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `found` outlives the call; with these two constants it cannot fail.
    unsafe { libc::getrusage(of, &mut found) };
    found
}

/// Locks the pages that this process has used by now, so that they stay in RAM: in a memory cgroup that swaps, a
/// touch could otherwise wait for a page of this program's own. Mappings that are made later are not locked. A host
/// that does not allow it measures without.
pub(super) fn lock_what_is_mapped() {
    // From linux/mman.h; libc has it for few targets.
    const MCL_ONFAULT: libc::c_int = 4;
    // SAFETY: no memory arguments; locking changes no content.
    let _ = unsafe { libc::mlockall(libc::MCL_CURRENT | MCL_ONFAULT) };
}
