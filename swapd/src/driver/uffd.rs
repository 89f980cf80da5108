//! userfaultfd: the crate's calls where it has them, and the ioctls of newer kernels that it lacks.
//!
//! `UFFDIO_MOVE` (Linux 6.8), `UFFDIO_POISON` (6.6) and `PAGEMAP_SCAN` (6.7) are declared here after
//! `include/uapi/linux/userfaultfd.h` and `include/uapi/linux/fs.h`. Errno is decoded in this file alone.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;

use crate::error::HostError;
use swapcore::moves::{self, Moved, PATIENT, Refused};
use swapcore::units::PAGE_SIZE;
use userfaultfd::{Event, EventBuffer, FeatureFlags, RegisterMode, Uffd, UffdBuilder};

const FEATURE_POISON: u64 = 1 << 14;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const FEATURE_MOVE: u64 = 1 << 16;
const FEATURES: u64 = FEATURE_POISON | FEATURE_WP_ASYNC | FEATURE_MOVE;

/// Faults read by one system call.
const EVENTS_A_READ: usize = 64;

const fn iowr(kind: u8, number: u8, size: usize) -> libc::c_ulong {
    (3 << 30) | ((size as libc::c_ulong) << 16) | ((kind as libc::c_ulong) << 8) | number as libc::c_ulong
}

#[repr(C)]
struct UffdioMove {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    moved: i64,
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct UffdioPoison {
    start: u64,
    len: u64,
    mode: u64,
    updated: i64,
}

#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const UFFDIO_MOVE: libc::c_ulong = iowr(0xAA, 0x05, size_of::<UffdioMove>());
const UFFDIO_COPY: libc::c_ulong = iowr(0xAA, 0x03, size_of::<UffdioCopy>());
const UFFDIO_POISON: libc::c_ulong = iowr(0xAA, 0x08, size_of::<UffdioPoison>());
const PAGEMAP_SCAN: libc::c_ulong = iowr(b'f', 16, size_of::<PmScanArg>());
const _: () = assert!(UFFDIO_MOVE == 0xC028_AA05);
const _: () = assert!(UFFDIO_COPY == 0xC028_AA03);
const _: () = assert!(UFFDIO_POISON == 0xC020_AA08);
const _: () = assert!(PAGEMAP_SCAN == 0xC060_6610);

const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_PRESENT: u64 = 1 << 3;
/// Set for a page that is swapped out, and for one that the host is putting elsewhere at this moment (compaction).
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_HUGE: u64 = 1 << 6;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
/// Regions returned by one scan call.
const REGIONS_A_SCAN: usize = 1024;

/// One VM's userfaultfd.
pub(super) struct Faults {
    uffd: Uffd,
    pagemap: File,
    buffer: EventBuffer,
    regions: Vec<PageRegion>,
}

impl std::fmt::Debug for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Faults {{ fd: {} }}", self.uffd.as_raw_fd())
    }
}

/// A failed ioctl.
fn last_errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

impl Faults {
    /// Opens a userfaultfd with all that the engine needs.
    pub(super) fn open() -> Result<Self, HostError> {
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(false)
            .require_features(FeatureFlags::from_bits_retain(FEATURES))
            .create()
            .map_err(explain)?;
        let pagemap = File::open("/proc/self/pagemap").map_err(|source| HostError::Pagemap { source })?;
        Ok(Faults {
            uffd,
            pagemap,
            buffer: EventBuffer::new(EVENTS_A_READ),
            regions: vec![PageRegion::default(); REGIONS_A_SCAN],
        })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.uffd.as_raw_fd()
    }

    /// Guest memory: missing pages are reported, writes can be tracked.
    pub(super) fn register_guest(&self, base: *mut u8, len: usize) -> Result<(), HostError> {
        self.register(base, len, RegisterMode::MISSING | RegisterMode::WRITE_PROTECT)
    }

    /// Staging: a legal destination for moves, but a stray touch of it does not wait for anybody.
    pub(super) fn register_staging(&self, base: *mut u8, len: usize) -> Result<(), HostError> {
        self.register(base, len, RegisterMode::WRITE_PROTECT)
    }

    /// Ends the serving of a range. Threads that wait there are woken, and find plain memory.
    pub(super) fn unregister(&self, base: *mut u8, len: usize) {
        // The only error is a range that has been unmapped, and then nothing is left to unregister.
        let _ = self.uffd.unregister(base.cast(), len);
    }

    fn register(&self, base: *mut u8, len: usize, mode: RegisterMode) -> Result<(), HostError> {
        self.uffd
            .register_with_mode(base.cast(), len, mode)
            .map(|_| ())
            .map_err(|error| HostError::Register { source: Box::new(error) })
    }

    /// Moves pages between two registered ranges of this process, and wakes who waits at the destination.
    ///
    /// Linux 6.18 forgets moves: at a page that the host is putting elsewhere (compaction) it waits, moves it and
    /// others behind it, still holds the error that made it wait, begins again at the same page, and ends with
    /// "exists". It has counted and woken none of them.
    ///
    /// # Panics
    /// If the kernel says that source or destination are not as the page table has them: going on could lose data.
    pub(super) fn move_pages(&self, to: usize, from: usize, len: usize, patience: u32) -> Moved {
        let moved = moves::carry(len, patience, |done| {
            let mut arg = UffdioMove {
                dst: (to + done) as u64,
                src: (from + done) as u64,
                len: (len - done) as u64,
                mode: 0,
                moved: 0,
            };
            // SAFETY: the kernel checks both ranges against this process' mappings; it only edits page tables of ranges
            // that the engine owns (guest memory and staging), of which no Rust reference exists.
            let result = unsafe { libc::ioctl(self.fd(), UFFDIO_MOVE, &mut arg) };
            let errno = if result == 0 { 0 } else { last_errno() };
            if errno != libc::EEXIST {
                return (arg.moved.max(0) as usize, errno);
            }
            let forgotten = self.moved_already(to + done, from + done, len - done);
            self.wake(to + done, forgotten);
            (forgotten, errno)
        });
        moved.unwrap_or_else(|Refused { done, errno }| {
            panic!(
                "UFFDIO_MOVE of {len:#x} bytes from {from:#x} to {to:#x} stopped at {done:#x}: {}",
                io::Error::from_raw_os_error(errno)
            )
        })
    }

    /// Bytes of the source, from its start on, that have been moved to the destination.
    fn moved_already(&self, to: usize, from: usize, len: usize) -> usize {
        let (Ok(there), Ok(here)) = (self.mapped(to, len), self.mapped(from, len)) else { return 0 };
        there.iter().zip(here).take_while(|(there, here)| **there && !*here).count() * PAGE_SIZE
    }

    /// One flag a page: whether it has an entry in the page tables.
    fn mapped(&self, at: usize, len: usize) -> io::Result<Vec<bool>> {
        const PRESENT_OR_ON_ITS_WAY: u64 = 3 << 62;
        let mut entries = vec![[0; 8]; len / PAGE_SIZE];
        self.pagemap.read_exact_at(entries.as_flattened_mut(), (at / PAGE_SIZE * 8) as u64)?;
        let mapped = |entry| u64::from_ne_bytes(entry) & PRESENT_OR_ON_ITS_WAY != 0;
        Ok(entries.into_iter().map(mapped).collect())
    }

    /// Copies a page to a new frame where there is none, and wakes who waits there. False, if the host has no frame
    /// to give now.
    ///
    /// # Panics
    /// As [`Faults::move_pages`].
    pub(super) fn copy_page(&self, to: usize, from: usize) -> bool {
        let copied = moves::carry(PAGE_SIZE, PATIENT, |_| {
            let mut arg =
                UffdioCopy { dst: to as u64, src: from as u64, len: PAGE_SIZE as u64, mode: 0, copy: 0 };
            // SAFETY: the kernel checks both; the source is a slot of staging, which only the engine uses.
            let result = unsafe { libc::ioctl(self.fd(), UFFDIO_COPY, &mut arg) };
            let errno = if result == 0 { 0 } else { last_errno() };
            (arg.copy.max(0) as usize, errno)
        });
        match copied {
            Ok(moved) => moved == Moved::All,
            Err(Refused { errno: libc::ENOMEM, .. }) => false,
            Err(Refused { errno, .. }) => {
                panic!("UFFDIO_COPY from {from:#x} to {to:#x}: {}", io::Error::from_raw_os_error(errno))
            }
        }
    }

    /// Writes to these pages, which are in the guest, are not noted until they are scanned again.
    pub(super) fn end_tracking(&self, at: usize, len: usize) {
        // After a failure the pages stay protected and their writes are noted, which does no harm.
        let _ = self.uffd.remove_write_protection(at as *mut _, len, false);
    }

    /// Whether one huge page is mapped at this block. No, if the kernel does not say.
    pub(super) fn is_huge(&self, block: usize, len: usize) -> bool {
        let mut region = PageRegion::default();
        let mut arg = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            start: block as u64,
            end: (block + len) as u64,
            vec: (&raw mut region) as u64,
            vec_len: 1,
            category_mask: PAGE_IS_HUGE,
            return_mask: PAGE_IS_HUGE,
            ..PmScanArg::default()
        };
        // SAFETY: `vec` points to one region that lives as long as the call; the kernel writes no more than that.
        let count = unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &mut arg) };
        count == 1 && (region.start, region.end) == (arg.start, arg.end)
    }

    /// Makes a missing page raise a memory error when touched, and wakes who waits for it.
    pub(super) fn poison(&self, at: usize, len: usize) -> io::Result<()> {
        let mut arg = UffdioPoison { start: at as u64, len: len as u64, mode: 0, updated: 0 };
        // SAFETY: as above; the range is the engine's and has no frame.
        let result = unsafe { libc::ioctl(self.fd(), UFFDIO_POISON, &mut arg) };
        match (result, last_errno()) {
            (0, _) => Ok(()),
            // The page is poisoned already; threads that wait for it must be woken all the same.
            (_, libc::EEXIST) => {
                self.wake(at, len);
                Ok(())
            }
            (_, errno) => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    pub(super) fn wake(&self, at: usize, len: usize) {
        // The only errors are of a range that is empty or not registered: nobody waits there.
        let _ = self.uffd.wake(at as *mut libc::c_void, len);
    }

    /// Calls `found` with the address of every fault that waits in the kernel's queue.
    pub(super) fn read(&mut self, mut found: impl FnMut(usize)) -> io::Result<()> {
        loop {
            let mut count = 0;
            let events = match self.uffd.read_events(&mut self.buffer) {
                Ok(events) => events,
                Err(userfaultfd::Error::SystemError(errno)) => {
                    return Err(io::Error::from_raw_os_error(errno as i32));
                }
                Err(error) => return Err(io::Error::other(error)),
            };
            for event in events {
                count += 1;
                if let Ok(Event::Pagefault { addr, .. }) = event {
                    found(addr as usize);
                }
            }
            if count < EVENTS_A_READ {
                return Ok(());
            }
        }
    }

    /// Pages written since they were last protected, as address ranges; protects them again.
    /// Holes are left alone: a move into a protected hole would fail.
    pub(super) fn scan_dirty(
        &mut self,
        base: usize,
        len: usize,
        mut found: impl FnMut(usize, usize),
    ) -> io::Result<()> {
        let end = (base + len) as u64;
        let mut at = base as u64;
        while at < end {
            let mut arg = PmScanArg {
                size: size_of::<PmScanArg>() as u64,
                flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
                start: at,
                end,
                vec: self.regions.as_mut_ptr() as u64,
                vec_len: self.regions.len() as u64,
                category_mask: PAGE_IS_WRITTEN,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask: PAGE_IS_WRITTEN,
                ..PmScanArg::default()
            };
            // SAFETY: `vec` points to `vec_len` regions that live as long as the call; the kernel writes no more than
            // these.
            let count = unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &mut arg) };
            if count < 0 {
                match last_errno() {
                    libc::EINTR | libc::EAGAIN => continue,
                    errno => return Err(io::Error::from_raw_os_error(errno)),
                }
            }
            for region in &self.regions[..count as usize] {
                found(region.start as usize, (region.end - region.start) as usize);
            }
            at = arg.walk_end;
        }
        Ok(())
    }
}

/// What it means that no userfaultfd can be had.
fn explain(error: userfaultfd::Error) -> HostError {
    let errno = match &error {
        userfaultfd::Error::SystemError(errno) => *errno as i32,
        _ => 0,
    };
    let device = matches!(error, userfaultfd::Error::OpenDevUserfaultfd(_));
    let source = Box::new(error);
    match errno {
        _ if device => HostError::FaultsDevice { source },
        libc::EPERM => HostError::FaultsPermission { source },
        libc::EINVAL => HostError::FaultsTooOld { source },
        libc::ENOSYS => HostError::FaultsMissing { source },
        _ => HostError::Faults { source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two mappings of so many pages, of which the second has frames. Ends the test if this host has no userfaultfd
    /// for us.
    fn hole_and_frames(pages: usize) -> (Faults, [memmap2::MmapMut; 2]) {
        let faults = Faults::open().unwrap_or_else(|why| testkit::skip(testkit::Reason::Uffd, why));
        let [mut hole, mut frames] = [(); 2].map(|()| memmap2::MmapMut::map_anon(pages * PAGE_SIZE).unwrap());
        faults.register_guest(hole.as_mut_ptr(), hole.len()).unwrap();
        faults.register_staging(frames.as_mut_ptr(), frames.len()).unwrap();
        frames.fill(7);
        (faults, [hole, frames])
    }

    /// A move as Linux 6.18 does it when it forgets what it has moved.
    fn move_and_say_nothing(faults: &Faults, to: usize, from: usize, len: usize) {
        const UFFDIO_MOVE_MODE_DONTWAKE: u64 = 1;
        let mode = UFFDIO_MOVE_MODE_DONTWAKE;
        let mut arg = UffdioMove { dst: to as u64, src: from as u64, len: len as u64, mode, moved: 0 };
        // SAFETY: both are mappings of the test's own, to which there is no reference.
        assert_eq!(unsafe { libc::ioctl(faults.fd(), UFFDIO_MOVE, &mut arg) }, 0, "{}", last_errno());
    }

    #[test]
    fn what_the_kernel_forgot_to_count_is_counted_and_who_waits_there_is_woken() {
        let (faults, [hole, frames]) = hole_and_frames(5);
        let (to, from) = (hole.as_ptr() as usize, frames.as_ptr() as usize);
        let (told, tells) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            // SAFETY: it is mapped until the test has heard of it.
            told.send(unsafe { std::ptr::read_volatile((to + PAGE_SIZE) as *const u8) })
        });
        let mut waits = libc::pollfd { fd: faults.fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one descriptor, which lives.
        assert_eq!(unsafe { libc::poll(&mut waits, 1, 10_000) }, 1, "it waits for the second page");
        move_and_say_nothing(&faults, to, from, 3 * PAGE_SIZE);
        assert_eq!(faults.move_pages(to, from, hole.len(), PATIENT), Moved::All);
        assert_eq!(tells.recv_timeout(std::time::Duration::from_secs(10)), Ok(7), "it is woken");
        assert!(hole.iter().all(|byte| *byte == 7), "all of it is there");
    }

    #[test]
    fn a_destination_with_something_else_in_it_is_refused() {
        let (faults, [hole, frames]) = hole_and_frames(2);
        let (to, from) = (hole.as_ptr() as usize, frames.as_ptr() as usize);
        assert!(faults.copy_page(to, from));
        let moving = std::panic::AssertUnwindSafe(|| faults.move_pages(to, from, hole.len(), PATIENT));
        let refused = std::panic::catch_unwind(moving).expect_err("nothing may be moved over a page");
        let said = refused.downcast_ref::<String>().expect("a text");
        assert!(said.contains("stopped at 0x0: File exists"), "{said}");
    }
}
