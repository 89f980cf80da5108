//! The C functions that QEMU finds in place of libc's: mmap, munmap, madvise, fallocate.
//!
//! Whatever does not concern a backend goes to the kernel as it came, by a raw system call: these functions run before
//! anything is initialised (other libraries' constructors), in every thread, and `dlsym` may allocate. The way through
//! allocates nothing and takes no lock. libc's own calls (malloc, thread stacks) do not come by here.
//!
//! Towards QEMU the memory behaves as the shared file that it believes in: MADV_DONTNEED loses nothing, a punched hole
//! reads as zeros. See [`crate::backends`].

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use libc::{c_int, c_long, c_void, off_t, size_t};

use crate::backends::{Backends, Part};

/// Set once, if this process is the QEMU meant.
pub(crate) static BACKENDS: OnceLock<Backends> = OnceLock::new();

/// What the kernel's own fork and core dump are told.
const ADVICE_TO_FOLLOW: [c_int; 3] = [libc::MADV_DONTFORK, libc::MADV_DONTDUMP, libc::MADV_DODUMP];

fn errno() -> c_int {
    // SAFETY: the location of this thread's errno is always valid.
    unsafe { *libc::__errno_location() }
}

fn fail(errno: c_int) -> c_int {
    // SAFETY: the location of this thread's errno is always valid.
    unsafe { *libc::__errno_location() = errno };
    -1
}

/// Does what differs from the kernel's own way. No panic may reach QEMU's frames: it becomes an error of the call.
fn deviate<T>(what: &str, work: impl FnOnce() -> Result<T, c_int>) -> Result<T, c_int> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        tracing::error!("{what} of guest memory: a bug in vmemd (see the panic above)");
        Err(libc::EFAULT)
    })
}

/// # Safety
/// As mmap(2).
unsafe fn real_mmap(addr: usize, len: size_t, prot: c_int, flags: c_int, fd: c_int, offset: off_t) -> c_long {
    // SAFETY: the caller's arguments, as they came.
    unsafe { libc::syscall(libc::SYS_mmap, addr, len, prot, flags, fd, offset) }
}

/// # Safety
/// As mmap(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn mmap(
    addr: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    // MAP_SHARED and MAP_SHARED_VALIDATE both have this bit.
    if flags & libc::MAP_SHARED != 0
        && flags & libc::MAP_ANONYMOUS == 0
        && let Some(backends) = BACKENDS.get()
        && let Some(index) = backends.of_descriptor(fd)
    {
        let mapped = deviate("mapping", || {
            backends.map(index, len, offset, addr as usize, flags & libc::MAP_FIXED != 0, |at| {
                let flags =
                    flags & libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
                // SAFETY: the range is the one that QEMU wanted replaced by the file's content; it is anonymous instead.
                match unsafe { real_mmap(at, len, prot, flags, -1, 0) } {
                    -1 => Err(errno()),
                    address => Ok(address as usize),
                }
            })
        });
        return match mapped {
            Ok(address) => address as *mut c_void,
            Err(errno) => {
                fail(errno);
                libc::MAP_FAILED
            }
        };
    }
    // SAFETY: the caller's arguments, as they came.
    unsafe { real_mmap(addr as usize, len, prot, flags, fd, offset) as *mut c_void }
}

/// # Safety
/// As mmap(2). The same as `mmap`: off_t has 64 bits.
#[unsafe(no_mangle)]
unsafe extern "C" fn mmap64(
    addr: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { mmap(addr, len, prot, flags, fd, offset) }
}

/// # Safety
/// As munmap(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn munmap(addr: *mut c_void, len: size_t) -> c_int {
    // SAFETY: the caller's arguments.
    let real = |at: usize, len: usize| unsafe { libc::syscall(libc::SYS_munmap, at, len) as c_int };
    each_part("unmapping", addr as usize, len, real, |backends, part| {
        // The engine keeps its mapping for the life of the process; what was in it is given up.
        backends.discard(part);
        Ok(())
    })
}

/// # Safety
/// As madvise(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn madvise(addr: *mut c_void, len: size_t, advice: c_int) -> c_int {
    // SAFETY: the caller's arguments.
    let real = |at: usize, len: usize| unsafe { libc::syscall(libc::SYS_madvise, at, len, advice) as c_int };
    each_part("advice on", addr as usize, len, real, |backends, part| match advice {
        libc::MADV_REMOVE => {
            backends.discard(part);
            Ok(())
        }
        // As on any shared file.
        libc::MADV_FREE => Err(libc::EINVAL),
        advice if ADVICE_TO_FOLLOW.contains(&advice) => match real(part.address, part.bytes) {
            0 => Ok(()),
            _ => Err(errno()),
        },
        // DONTNEED loses nothing of shared memory. Where frames are, and of which size, is the engine's business:
        // POPULATE, WILLNEED, HUGEPAGE, MERGEABLE, COLD and the like are heard and not followed.
        _ => Ok(()),
    })
}

/// # Safety
/// As fallocate(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn fallocate(fd: c_int, mode: c_int, offset: off_t, len: off_t) -> c_int {
    if let Some(backends) = BACKENDS.get()
        && let Some(index) = backends.of_descriptor(fd)
    {
        let done = deviate("fallocate", || {
            if mode & libc::FALLOC_FL_PUNCH_HOLE == 0 {
                // Room in a file that stays empty.
                return Ok(());
            }
            backends.discard(backends.part_of_file(index, offset, len).ok_or(libc::EINVAL)?);
            Ok(())
        });
        return done.map_or_else(fail, |()| 0);
    }
    // SAFETY: the caller's arguments, as they came.
    unsafe { libc::syscall(libc::SYS_fallocate, fd, mode, offset, len) as c_int }
}

/// # Safety
/// As fallocate(2). The same as `fallocate`: off_t has 64 bits.
#[unsafe(no_mangle)]
unsafe extern "C" fn fallocate64(fd: c_int, mode: c_int, offset: off_t, len: off_t) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { fallocate(fd, mode, offset, len) }
}

/// Does `ours` to the parts of a range that are guest memory, and `real` to the others.
fn each_part(
    what: &str,
    address: usize,
    len: usize,
    real: impl Fn(usize, usize) -> c_int,
    ours: impl Fn(&Backends, Part) -> Result<(), c_int>,
) -> c_int {
    let Some(backends) = BACKENDS.get() else { return real(address, len) };
    let end = len.checked_next_multiple_of(swapd::PAGE_SIZE).and_then(|len| address.checked_add(len));
    let (true, Some(end)) = (address.is_multiple_of(swapd::PAGE_SIZE), end) else {
        return real(address, len);
    };
    let mut at = address;
    while let Some(part) = backends.first_part(at, end) {
        if part.address > at && real(at, part.address - at) != 0 {
            return -1;
        }
        at = part.address + part.bytes;
        if let Err(errno) = deviate(what, || ours(backends, part)) {
            return fail(errno);
        }
    }
    if at < end || len == 0 { real(at, end - at) } else { 0 }
}

#[cfg(test)]
#[path = "interpose_tests.rs"]
mod tests;
