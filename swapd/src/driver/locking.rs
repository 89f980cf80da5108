//! Locking frames against the host's own swap, and the limit that a user without privileges has for it.
//!
//! The kernel counts address space, not frames: all of guest memory and staging, whatever the budget.

use std::io;

use crate::error::{HostError, MemoryError};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const CAP_IPC_LOCK: u32 = 14;

/// Bytes that this process may lock; `None`: as many as it likes.
pub fn lock_limit() -> Option<u64> {
    getrlimit(Resource::Memlock).maximum.filter(|_| !is_exempt())
}

/// Raises the limit of locked memory to so many bytes, as far as that takes no privilege.
pub(super) fn allow(bytes: u64) -> Result<(), HostError> {
    let Rlimit { current, maximum } = getrlimit(Resource::Memlock);
    if current.is_none_or(|current| current >= bytes) || is_exempt() {
        return Ok(());
    }
    if let Some(available_bytes) = maximum.filter(|maximum| *maximum < bytes) {
        return Err(HostError::LockLimit { needed_bytes: bytes, available_bytes });
    }
    // A failure is not reported here: the locking itself fails then, and says what to do.
    let _ = setrlimit(Resource::Memlock, Rlimit { current: maximum, maximum });
    Ok(())
}

/// Locks a range of addresses: the frames that it has, and those that come to it later.
pub(super) fn lock_on_fault(base: usize, bytes: usize) -> Result<(), MemoryError> {
    // SAFETY: locking changes nothing of the content of what is mapped there.
    let result = unsafe { libc::mlock2(base as *const libc::c_void, bytes, libc::MLOCK_ONFAULT) };
    if result == 0 {
        return Ok(());
    }
    Err(MemoryError::Lock { bytes, source: io::Error::last_os_error() })
}

/// Whether this process may lock memory beyond the limit (CAP_IPC_LOCK).
fn is_exempt() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    effective.is_some_and(|bits| bits >> CAP_IPC_LOCK & 1 == 1)
}
