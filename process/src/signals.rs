//! SIGINT, SIGTERM and SIGHUP as something that can be waited for.
//!
//! The handler only stores the number and adds to an eventfd; whoever works polls the one or reads the other.
//! A signal that was ignored when the process started (`nohup`, a shell's background job) stays ignored.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Once, OnceLock};

use crate::failure::{Failure, Kind};

const WATCHED: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

static CAUGHT: AtomicI32 = AtomicI32::new(0);
static EVENT: AtomicI32 = AtomicI32::new(-1);
static INSTALL: Once = Once::new();
static FAILED: OnceLock<String> = OnceLock::new();

extern "C" fn on_signal(signal: libc::c_int) {
    CAUGHT.store(signal, Ordering::SeqCst);
    let one = 1u64.to_ne_bytes();
    // SAFETY: write(2) is async-signal-safe, the buffer lives on this stack, and the descriptor is never closed.
    let _ = unsafe { libc::write(EVENT.load(Ordering::SeqCst), one.as_ptr().cast(), one.len()) };
}

/// Takes the signals over. Does so once a process.
///
/// # Errors
/// If the kernel refuses an eventfd or the handlers.
pub fn install() -> Result<(), Failure> {
    INSTALL.call_once(|| {
        // SAFETY: eventfd has no memory arguments.
        let event = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if event < 0 {
            let _ = FAILED.set(format!("eventfd: {}", std::io::Error::last_os_error()));
            return;
        }
        EVENT.store(event, Ordering::SeqCst);
        for signal in WATCHED {
            if let Err(error) = take_over(signal) {
                let _ = FAILED.set(format!("signal {signal}: {error}"));
            }
        }
    });
    match FAILED.get() {
        Some(text) => Err(Failure::new(Kind::Other, format!("cannot handle signals: {text}"))),
        None => Ok(()),
    }
}

fn take_over(signal: libc::c_int) -> std::io::Result<()> {
    // SAFETY: an all-zero sigaction is a valid value of that plain C struct; it is filled by the call below.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null new action only queries; `action` outlives the call.
    if unsafe { libc::sigaction(signal, std::ptr::null(), &mut action) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    if action.sa_sigaction == libc::SIG_IGN {
        return Ok(());
    }
    action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as libc::sighandler_t;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler only does what is async-signal-safe; `action` is initialised and outlives the call.
    if unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

/// The last signal caught, if any.
pub fn caught() -> Option<i32> {
    match CAUGHT.load(Ordering::SeqCst) {
        0 => None,
        signal => Some(signal),
    }
}

/// A descriptor that is readable once a signal was caught; never drained.
pub fn event_fd() -> RawFd {
    EVENT.load(Ordering::SeqCst)
}

/// Fails if a signal was caught: to be called between the steps of long work.
///
/// # Errors
/// [`Kind::Interrupted`], naming the signal.
pub fn check() -> Result<(), Failure> {
    match caught() {
        Some(signal) => Err(interrupted(signal)),
        None => Ok(()),
    }
}

pub fn interrupted(signal: i32) -> Failure {
    Failure::new(Kind::Interrupted, format!("interrupted by {}", name(signal)))
}

pub(crate) fn name(signal: i32) -> &'static str {
    match signal {
        libc::SIGINT => "SIGINT (Ctrl-C)",
        libc::SIGTERM => "SIGTERM",
        libc::SIGHUP => "SIGHUP",
        _ => "a signal",
    }
}

/// Waits until a signal is caught or the descriptor has something (or hung up), at most `timeout_ms`.
/// Returns whether the descriptor has.
pub fn wait_readable(fd: RawFd, timeout_ms: i32) -> bool {
    let mut polled = [
        libc::pollfd { fd, events: libc::POLLIN, revents: 0 },
        libc::pollfd { fd: event_fd(), events: libc::POLLIN, revents: 0 },
    ];
    // SAFETY: both entries are initialised and outlive the call; a negative descriptor is skipped by the kernel.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout_ms) };
    ready > 0 && polled[0].revents != 0
}
