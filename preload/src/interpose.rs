//! The C functions that QEMU finds in place of libc's: open, mmap, munmap, madvise, fallocate.
//!
//! Whatever does not concern a backend goes to the kernel as it came, by a raw system call: these functions run before
//! anything is initialised (other libraries' constructors), in every thread, and `dlsym` may allocate. The way through
//! allocates nothing and takes no lock. libc's own calls (malloc, thread stacks) do not come by here.
//!
//! Towards QEMU the memory behaves as the shared file that it believes in: MADV_DONTNEED loses nothing, a punched hole
//! reads as zeros. See [`crate::backends`].

use std::ffi::CStr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use libc::{c_char, c_int, c_long, c_void, mode_t, off_t, size_t};
use vmprocess::qemu::MEMORY_FILES;

use crate::backends::{Backends, Part};

/// Set once, if this process is the QEMU meant.
pub(crate) static BACKENDS: OnceLock<Backends> = OnceLock::new();

/// Why this process is not the QEMU meant, although the library is in it.
pub(crate) static NOT_MEANT: OnceLock<String> = OnceLock::new();

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

/// A new descriptor on a file of guest memory, or an errno; None if it is any other file.
///
/// # Safety
/// The path is null or a C string.
unsafe fn open_memory(path: *const c_char) -> Option<c_int> {
    // SAFETY: not null, so a C string, of which no more is read than up to its end.
    if path.is_null() || unsafe { libc::strncmp(path, MEMORY_FILES.as_ptr().cast(), MEMORY_FILES.len()) } != 0
    {
        return None;
    }
    // SAFETY: a C string.
    let path = unsafe { CStr::from_ptr(path) };
    match BACKENDS.get() {
        Some(backends) => Some(backends.open(path)?.unwrap_or_else(fail)),
        None => {
            let why = NOT_MEANT.get().map_or("its settings were not read", String::as_str);
            eprintln!("vmemd: this QEMU gets no memory: {why}; see docs/qemu.md");
            Some(fail(libc::ENOENT))
        }
    }
}

/// # Safety
/// As open(2). C declares it with a variable number of arguments; a third one is where this has it, and only read where
/// open(2) demands it.
#[unsafe(no_mangle)]
unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's promise.
    if let Some(done) = unsafe { open_memory(path) } {
        return done;
    }
    let makes = flags & libc::O_CREAT != 0 || flags & libc::O_TMPFILE == libc::O_TMPFILE;
    let mode = if makes { mode } else { 0 };
    // SAFETY: the caller's arguments, as they came.
    unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, flags, mode) as c_int }
}

/// # Safety
/// As open(2). The same as `open`: offsets have 64 bits.
#[unsafe(no_mangle)]
unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { open(path, flags, mode) }
}

/// What a fortified program calls for `open` of a file that must be there.
///
/// # Safety
/// As open(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn __open_2(path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { open(path, flags, 0) }
}

/// # Safety
/// As open(2). The same as `__open_2`.
#[unsafe(no_mangle)]
unsafe extern "C" fn __open64_2(path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { open(path, flags, 0) }
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
                // SAFETY: the range is the one that QEMU wanted replaced by the file's content; it is anonymous
                // instead.
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
