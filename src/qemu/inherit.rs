//! The descriptors that a started program inherits.

use std::os::fd::RawFd;

/// In a process that is about to become another program: these descriptors stay open over exec.
pub(crate) fn inherit(numbers: &[RawFd]) -> std::io::Result<()> {
    for fd in numbers {
        // SAFETY: changes a flag of a descriptor that is open.
        if unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}
