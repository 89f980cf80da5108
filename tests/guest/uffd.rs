//! Memory whose faults are served by another thread, and pages whose content is lost: userfaultfd as the engine
//! uses it, reduced to what these tests need.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

const UFFD_API: u64 = 0xAA;
const UFFD_FEATURE_POISON: u64 = 1 << 14;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_ZEROPAGE: u64 = 0xc020_aa04;
const UFFDIO_POISON: u64 = 0xc020_aa08;
const REGISTER_MODE_MISSING: u64 = 1;
const PAGE: u64 = 4096;
/// A fault message: its kind in the first byte, the address in the third word.
const MESSAGE_BYTES: usize = 32;
const POLL_MS: i32 = 5;

fn open(start: u64, bytes: u64) -> Result<File> {
    // SAFETY: the system call takes flags and gives a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if fd < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: a descriptor just made, owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd as i32) };
    ioctl(&file, UFFDIO_API, [UFFD_API, UFFD_FEATURE_POISON, 0, 0])?;
    ioctl(&file, UFFDIO_REGISTER, [start, bytes, REGISTER_MODE_MISSING, 0])?;
    Ok(file)
}

/// Poisons the page at that address, never touched before; it stays so while the file is open.
pub(crate) fn poison(address: *mut u8) -> Result<File> {
    let file = open(address as u64, PAGE)?;
    ioctl(&file, UFFDIO_POISON, [address as u64, PAGE, 0, 0])?;
    Ok(file)
}

/// Serves first touches of a range with zeros, unless it stalls.
pub(crate) struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    ended: AtomicBool,
    stalled: AtomicBool,
    waiting: AtomicU64,
    served: AtomicU64,
}

impl Server {
    pub(crate) fn new(start: *mut u8, bytes: u64) -> Result<Server> {
        let file = open(start as u64, bytes)?;
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let thread = std::thread::spawn(move || serve(file, &theirs));
        Ok(Server { shared, thread: Some(thread) })
    }

    /// Leaves faults unserved from now on, or serves them again.
    pub(crate) fn stall(&self, stalled: bool) {
        self.shared.stalled.store(stalled, Ordering::SeqCst);
    }

    /// Faults read so far that wait for the stall's end.
    pub(crate) fn waiting(&self) -> u64 {
        self.shared.waiting.load(Ordering::SeqCst)
    }

    pub(crate) fn served(&self) -> u64 {
        self.shared.served.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.thread.take().map(JoinHandle::join);
    }
}

fn serve(mut file: File, shared: &Shared) {
    let mut waiting: Vec<u64> = Vec::new();
    while !shared.ended.load(Ordering::SeqCst) {
        let mut poll = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, as the count says.
        unsafe { libc::poll(&raw mut poll, 1, POLL_MS) };
        let mut message = [0; MESSAGE_BYTES];
        match file.read(&mut message) {
            Ok(_) => waiting.push(u64::from_le_bytes(message[16..24].try_into().unwrap()) & !(PAGE - 1)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("reading a fault: {error}"),
        }
        if !shared.stalled.load(Ordering::SeqCst) {
            for address in waiting.drain(..) {
                // A page that two vCPUs touched at once is there already.
                if ioctl(&file, UFFDIO_ZEROPAGE, [address, PAGE, 0, 0]).is_ok() {
                    shared.served.fetch_add(1, Ordering::SeqCst);
                }
            }
        }
        shared.waiting.store(waiting.len() as u64, Ordering::SeqCst);
    }
}

fn ioctl(file: &File, request: u64, mut argument: [u64; 4]) -> Result<()> {
    // SAFETY: each of the requests reads and writes at most 32 bytes, which the argument has.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, argument.as_mut_ptr()) };
    if result == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}
