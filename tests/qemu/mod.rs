//! Real guests of a test: QEMU processes that do not outlive it, and the lines of their console.
//!
//! ```text
//! Command (any prefix + QEMU and its arguments) ─▶ Guest::start ─▶ adds the console ─▶ spawns
//! QEMU ── Unix socket ──▶ Console, one thread a connection ─▶ lines() · wait_line(...)
//! ```
//! The console listens and QEMU connects, so that a QEMU that takes the VM over (a migration's target, started from
//! the same arguments) comes to the same console. What VMs print is read in the order of their connections.
#![allow(dead_code, unused_imports, reason = "each test file uses a part")]

mod console;
mod kit;
mod monitor;
mod network;

use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

#[allow(unused_imports, reason = "each test file uses a part")]
pub(crate) use console::{Console, field};
#[allow(unused_imports, reason = "each test file uses a part")]
pub(crate) use kit::{Machine, Qemu, checker, on_host};
#[allow(unused_imports, reason = "each test file uses a part")]
pub(crate) use network::Network;

#[allow(unused_imports, reason = "each test file uses a part")]
pub(crate) use monitor::Monitor;

/// How long a boot may take on a slow, busy machine.
pub(crate) const BOOT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(100);

/// The QEMUs to test with, at least one. Ends the test where their VMs cannot run.
pub(crate) fn qemus() -> Vec<Qemu> {
    crate::common::needs_vms();
    Qemu::versions()
}

/// A QEMU process started by a test, killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Guest {
    child: Child,
    console: Console,
    directory: PathBuf,
}

impl Guest {
    /// Starts the command, with its console added at the end: its last arguments must be QEMU's.
    pub(crate) fn start(mut command: Command) -> Guest {
        let directory = directory("guest");
        let console = Console::listen(&directory.join("console"));
        let log = std::fs::File::create(directory.join("log")).expect("a log file");
        command
            .args(console.args())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log file"))
            .stderr(log)
            .process_group(0);
        // A test that is killed leaves nothing behind.
        // SAFETY: between fork and exec only this one async-signal-safe call is made, which touches no memory.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let child = command.spawn().unwrap_or_else(|error| panic!("{error}: {command:?}"));
        Guest { child, console, directory }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The console, which outlives the process: a VM that moves goes on printing to it.
    pub(crate) fn console(&self) -> &Console {
        &self.console
    }

    /// Every whole line so far.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.console.lines()
    }

    /// The first line, of all that were and will be printed, that `wanted` likes.
    ///
    /// Panics, with the end of the console and of the process's log, if none comes in time or none can come any more.
    pub(crate) fn wait_line(&self, wanted: impl Fn(&str) -> bool, time: Duration) -> String {
        self.find(wanted, time).unwrap_or_else(|why| self.fail(&format!("no such line: {why}")))
    }

    /// The first line that begins with these words.
    pub(crate) fn wait_for(&self, words: &str, time: Duration) -> String {
        self.find(|line| line.starts_with(words), time)
            .unwrap_or_else(|why| self.fail(&format!("no line \"{words}...\": {why}")))
    }

    fn find(&self, wanted: impl Fn(&str) -> bool, time: Duration) -> Result<String, String> {
        let deadline = Instant::now() + time;
        loop {
            // Looked at before the lines are: what ended has printed all.
            let over = !self.lives() && self.console.is_over();
            if let Some(line) = self.console.find(&wanted, POLL) {
                return Ok(line);
            }
            if over {
                return Err("the process ended, and no other has its console".to_owned());
            }
            if Instant::now() > deadline {
                return Err(format!("waited {time:?}"));
            }
        }
    }

    /// Whether the process still runs (one that ended is a zombie until it is waited for).
    pub(crate) fn lives(&self) -> bool {
        crate::common::lives(self.pid())
    }

    /// Waits until the process ends.
    pub(crate) fn wait_end(&mut self, time: Duration) -> ExitStatus {
        let deadline = Instant::now() + time;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            if Instant::now() > deadline {
                self.fail(&format!("it did not end in {time:?}"));
            }
            std::thread::sleep(POLL);
        }
    }

    /// What the process printed itself.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    fn fail(&self, why: &str) -> ! {
        let lines = self.lines();
        let last = &lines[lines.len().saturating_sub(30)..];
        panic!("guest {}: {why}\nconsole:\n{}\nlog:\n{}", self.pid(), last.join("\n"), self.log());
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // The whole group: the command may have been more than QEMU.
        // SAFETY: no memory arguments; the group was made for this child, which has not been waited for by pid alone.
        unsafe { libc::kill(-(self.child.id() as i32), libc::SIGKILL) };
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// A fresh directory of this test run, short enough for the path of a socket.
pub(crate) fn directory(name: &str) -> PathBuf {
    testkit::directory_in(env!("CARGO_TARGET_TMPDIR"), name).keep()
}

/// A TCP port that is free now.
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}
