//! The last message to the source of a VM if the QEMU that was to take it ends: a wrong argument, a disk that somebody
//! else has open, device state that it does not understand. QEMU then prints why and exits, and only its exit handlers
//! still run.
//!
//! ```text
//!   Expected ──▶ Coming ──▶ (nothing: it is here)
//!      │            └─ exit: the monitor is shut; whoever waits for QEMU gives up, tells the source, ends the process
//!      └─ exit: the source is refused from here
//! ```

use std::io::{Read, Seek, SeekFrom};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use migrate::RefuseKind;
use vmprocess::ArriveSettings;
use vmprocess::last_words::{LOG_BYTES_MAX, last_words};

use crate::qmp::lock;

/// How long an exit waits for the source to be told.
pub(crate) const GOODBYE_LIMIT: Duration = Duration::from_secs(3);

#[derive(Debug)]
enum Stage {
    /// Nobody has taken the source's connection yet.
    Expected { control: RawFd },
    /// A thread of ours receives it, and waits for this monitor.
    Coming { monitor: UnixStream },
}

static STAGE: Mutex<Option<Stage>> = Mutex::new(None);
static ENDING: AtomicBool = AtomicBool::new(false);
/// A forked child that exits says nothing: the connections are its parent's too.
static PID: AtomicU32 = AtomicU32::new(0);
/// Where QEMU's log ended when it started.
static LOG_START: Mutex<u64> = Mutex::new(0);

/// Before QEMU's `main`.
pub(crate) fn expect(settings: &ArriveSettings) {
    *lock(&LOG_START) = log().and_then(|mut log| log.seek(SeekFrom::End(0)).ok()).unwrap_or(0);
    PID.store(std::process::id(), Ordering::SeqCst);
    *lock(&STAGE) = Some(Stage::Expected { control: settings.control_fd });
    // SAFETY: the handler may run at any exit of the process.
    unsafe { libc::atexit(at_exit) };
}

/// The source's connection has been taken over.
pub(crate) fn taken() {
    *lock(&STAGE) = None;
}

/// From here on somebody waits for QEMU, who tells the source.
pub(crate) fn coming(monitor: &UnixStream) {
    *lock(&STAGE) = monitor.try_clone().ok().map(|monitor| Stage::Coming { monitor });
}

/// The VM is here, or never will be.
pub(crate) fn over() {
    *lock(&STAGE) = None;
}

/// Why the VM cannot come, if that is because QEMU is ending.
pub(crate) fn reason() -> Option<String> {
    ENDING.load(Ordering::SeqCst).then(|| {
        let said = words(&since_start(), &program());
        let said = if said.is_empty() { "see its log".to_owned() } else { said };
        format!("QEMU ended before the VM had come: {said}")
    })
}

extern "C" fn at_exit() {
    if PID.load(Ordering::SeqCst) != std::process::id() {
        return;
    }
    // There is nobody left to tell of a panic.
    let _ = std::panic::catch_unwind(|| {
        let Some(stage) = lock(&STAGE).take() else { return };
        ENDING.store(true, Ordering::SeqCst);
        match stage {
            Stage::Expected { control } => {
                // SAFETY: the daemon left the descriptor to this process, and nobody has taken it.
                let mut control = unsafe { TcpStream::from_raw_fd(control) };
                migrate::refuse(&mut control, RefuseKind::Other, &reason().unwrap_or_default());
            }
            Stage::Coming { monitor } => {
                let _ = monitor.shutdown(Shutdown::Both);
                // Whoever waited for it ends the process when the source has been told.
                std::thread::sleep(GOODBYE_LIMIT);
            }
        }
    });
}

/// Standard error, if it is a file that can be read.
fn log() -> Option<std::fs::File> {
    let file = std::fs::File::open("/proc/self/fd/2").ok()?;
    file.metadata().is_ok_and(|meta| meta.is_file()).then_some(file)
}

fn since_start() -> String {
    let mut said = Vec::new();
    if let Some(mut log) = log()
        && log.seek(SeekFrom::Start(*lock(&LOG_START))).is_ok()
    {
        let _ = log.take(LOG_BYTES_MAX).read_to_end(&mut said);
    }
    String::from_utf8_lossy(&said).into_owned()
}

/// As QEMU calls itself in its errors.
fn program() -> String {
    let name = std::env::args_os().next().unwrap_or_default();
    let name = std::path::Path::new(&name).file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// The last of QEMU's own words in a log.
fn words(log: &str, program: &str) -> String {
    let own = log.lines().filter_map(|line| line.strip_prefix(program)?.strip_prefix(": "));
    last_words(own.filter(|line| !line.starts_with("warning:")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_errors_of_qemu_are_found_in_its_log() {
        let log = "2026 INFO arriving\nqemu-x: warning: TCG\nqemu-x: Unknown section 'rng'\nqemu-x-y: no\nqemu-x: \
                   load failed\n";
        assert_eq!(words(log, "qemu-x"), "Unknown section 'rng'; load failed");
        assert_eq!(words("nothing", "qemu-x"), "");
    }
}
