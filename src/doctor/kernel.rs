//! Asks the kernel what it offers: userfaultfd and its features, io_uring.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `_IO(0xAA, 0x00)`: a userfaultfd from an open `/dev/userfaultfd`.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xAA00;
/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`: the handshake that tells the features.
const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
const UFFD_API: u64 = 0xAA;
const UFFD_FEATURE_MOVE: u64 = 1 << 16;
/// Size of `struct io_uring_params`.
const URING_PARAMS_BYTES: usize = 120;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}
const _: () = assert!(size_of::<UffdioApi>() == 0x18);

/// A userfaultfd for kernel and user faults: by the system call, else through the device.
pub(super) fn userfaultfd() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: no memory arguments.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd >= 0 {
        // SAFETY: new, and owned by nobody else.
        return Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    }
    let refused = io::Error::last_os_error();
    let Ok(device) = File::options().read(true).write(true).open("/dev/userfaultfd") else {
        return Err(refused);
    };
    // SAFETY: this request takes its flags by value.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: new, and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether the kernel has UFFDIO_MOVE.
pub(super) fn has_move(userfaultfd: &OwnedFd) -> io::Result<bool> {
    let mut api = UffdioApi { api: UFFD_API, features: 0, ioctls: 0 };
    // SAFETY: the request reads and writes one struct of that size, which outlives the call.
    let done = unsafe { libc::ioctl(userfaultfd.as_raw_fd(), UFFDIO_API, &mut api) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(api.features & UFFD_FEATURE_MOVE != 0)
}

/// Tries to set up the smallest ring.
pub(super) fn io_uring() -> io::Result<()> {
    let mut params = [0u64; URING_PARAMS_BYTES / 8];
    // SAFETY: the kernel reads and writes one io_uring_params of that size and alignment, which outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: new, and owned by nobody else.
    drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    Ok(())
}

/// The version of Landlock's interface.
pub(super) fn landlock() -> io::Result<i64> {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    // SAFETY: with this flag there is no structure to read.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0_usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    if version > 0 { Ok(version) } else { Err(io::Error::last_os_error()) }
}

/// `6.8.0-31-generic` as (6, 8), with the text.
pub(super) fn version() -> Option<((u32, u32), String)> {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok()?.trim().to_owned();
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    let version = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some((version, text))
}
