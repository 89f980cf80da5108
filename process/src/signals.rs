//! SIGINT, SIGTERM and SIGHUP as something that can be waited for.
//!
//! The handler only stores the number and writes to a pipe; whoever works polls the one or reads the other.
//! A signal that was ignored when the process started (`nohup`, a shell's background job) stays ignored.

use std::io::{self, PipeReader, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::{flag, low_level::pipe};

use crate::failure::{Failure, FailureKind};

const WATCHED: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// The last signal caught, 0 before the first.
static CAUGHT: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);
/// Readable once a signal was caught: never drained.
static EVENT: OnceLock<PipeReader> = OnceLock::new();
static INSTALLED: OnceLock<Result<(), String>> = OnceLock::new();

/// Takes the signals over. Does so once a process.
///
/// # Errors
/// If the kernel refuses a pipe or the handlers.
pub fn install() -> Result<(), Failure> {
    let installed = INSTALLED.get_or_init(|| take_over().map_err(|error| error.to_string()));
    installed
        .clone()
        .map_err(|text| Failure::new(FailureKind::Other, format!("cannot handle signals: {text}")))
}

fn take_over() -> io::Result<()> {
    let ignored = ignored()?;
    let (event, mut bell) = io::pipe()?;
    let _ = EVENT.set(event);
    for signal in WATCHED.into_iter().filter(|signal| ignored & 1 << (signal - 1) == 0) {
        // In this order: whoever the pipe wakes finds the number.
        flag::register_usize(signal, CAUGHT.clone(), signal as usize)?;
        pipe::register(signal, bell.try_clone()?)?;
    }
    // A signal between the two has rung no bell.
    if caught().is_some() { bell.write_all(b"!") } else { Ok(()) }
}

/// The signals that this process ignores: signal *n* is bit *n* - 1.
fn ignored() -> io::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .ok_or_else(|| io::Error::other("/proc/self/status has no SigIgn"))
}

/// The last signal caught, if any.
pub fn caught() -> Option<i32> {
    match CAUGHT.load(Ordering::SeqCst) {
        0 => None,
        signal => Some(signal as i32),
    }
}

/// Fails if a signal was caught: to be called between the steps of long work.
///
/// # Errors
/// [`FailureKind::Interrupted`], naming the signal.
pub fn check() -> Result<(), Failure> {
    match caught() {
        Some(signal) => Err(interrupted(signal)),
        None => Ok(()),
    }
}

/// The failure of whatever that signal has ended, which names it.
pub fn interrupted(signal: i32) -> Failure {
    Failure::new(FailureKind::Interrupted, format!("interrupted by {}", name(signal)))
}

pub(crate) fn name(signal: i32) -> &'static str {
    match signal {
        libc::SIGINT => "SIGINT (Ctrl-C)",
        libc::SIGTERM => "SIGTERM",
        libc::SIGHUP => "SIGHUP",
        _ => "a signal",
    }
}

/// Waits until a signal is caught, without a limit. May return before.
pub(crate) fn wait() {
    poll_with(None, None);
}

/// Waits until a signal is caught or the descriptor has something (or hung up), at most `timeout`; `None`: without a
/// limit. Returns whether the descriptor has.
pub fn wait_readable(fd: BorrowedFd<'_>, timeout: Option<Duration>) -> bool {
    poll_with(Some(fd), timeout)
}

fn poll_with(fd: Option<BorrowedFd<'_>>, timeout: Option<Duration>) -> bool {
    let event = EVENT.get().map(std::os::fd::AsFd::as_fd);
    let entry = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
    let mut polled: Vec<PollFd<'_>> = fd.into_iter().chain(event).map(entry).collect();
    // A time that the kernel has no number for is none to wait for.
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    let ready = poll(&mut polled, timeout.as_ref());
    fd.is_some() && ready.is_ok_and(|ready| ready > 0) && !polled[0].revents().is_empty()
}
