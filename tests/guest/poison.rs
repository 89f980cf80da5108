//! A page whose content is lost, as the engine leaves one: by UFFDIO_POISON.

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd};

const UFFD_API: u64 = 0xAA;
const UFFD_FEATURE_POISON: u64 = 1 << 14;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_POISON: u64 = 0xc020_aa08;
const REGISTER_MODE_MISSING: u64 = 1;
const PAGE: u64 = 4096;

/// Poisons the page at that address, never touched before; the page stays so while the file is open.
pub(crate) fn poison(address: *mut u8) -> Result<File> {
    // SAFETY: the system call takes flags and gives a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if fd < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: a descriptor just made, owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd as i32) };
    ioctl(&file, UFFDIO_API, [UFFD_API, UFFD_FEATURE_POISON, 0, 0])?;
    let start = address as u64;
    ioctl(&file, UFFDIO_REGISTER, [start, PAGE, REGISTER_MODE_MISSING, 0])?;
    ioctl(&file, UFFDIO_POISON, [start, PAGE, 0, 0])?;
    Ok(file)
}

fn ioctl(file: &File, request: u64, mut argument: [u64; 4]) -> Result<()> {
    // SAFETY: each of the requests reads and writes at most 32 bytes, which the argument has.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, argument.as_mut_ptr()) };
    if result == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}
