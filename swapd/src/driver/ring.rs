//! The VM's one io_uring: it waits for faults, commands and completions at once.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::types::{Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue, types};

use swapcore::core::IoId;
use swapcore::transfer::Transfer;
use swapcore::units::Run;

/// Submission entries; completions have twice as many. More operations than this wait in the kernel's overflow list.
const ENTRIES: u32 = 512;
/// Memory of the ring: submissions of 64 bytes, completions of 16.
pub(super) const BYTES: u64 = ENTRIES as u64 * (64 + 2 * 16);
const DATA_FAULTS: u64 = u64::MAX;
const DATA_COMMANDS: u64 = u64::MAX - 1;
/// The store's place among the registered files.
const STORE: Fixed = Fixed(0);

/// What the ring has to tell.
#[derive(Debug)]
pub(super) enum Completion {
    Faults,
    Commands,
    /// All bytes transferred, or an error.
    Io {
        io: IoId,
        result: io::Result<()>,
    },
}

pub(super) struct Ring {
    ring: IoUring,
    faults: RawFd,
    commands: RawFd,
    /// By number of the operation, with when they were started. The buffers are staging slots or a sealer's copies, which outlive the ring.
    transfers: Vec<Option<(Transfer, Instant)>>,
    in_flight: usize,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ring {{ in_flight: {} }}", self.in_flight)
    }
}

impl Ring {
    /// A ring that watches both descriptors and does I/O on the store.
    pub(super) fn new(store: &File, faults: RawFd, commands: RawFd) -> Result<Self, String> {
        let ring = IoUring::builder()
            .setup_cqsize(ENTRIES * 2)
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .build(ENTRIES)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EPERM | libc::ENOSYS) => format!(
                    "io_uring is switched off on this host ({error}); set the sysctl kernel.io_uring_disabled=0"
                ),
                _ => format!("cannot create an io_uring ({error}); vmemd needs Linux 6.8 or newer"),
            })?;
        ring.submitter()
            .register_files(&[store.as_raw_fd()])
            .map_err(|error| format!("cannot register the store with io_uring: {error}"))?;
        let mut ring = Ring { ring, faults, commands, transfers: Vec::new(), in_flight: 0 };
        ring.watch(faults, DATA_FAULTS);
        ring.watch(commands, DATA_COMMANDS);
        Ok(ring)
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// How long the oldest transfer under way has been so.
    pub(super) fn oldest(&self) -> Duration {
        let started = self.transfers.iter().flatten().map(|(_, started)| *started).min();
        started.map_or(Duration::ZERO, |started| started.elapsed())
    }

    fn watch(&mut self, fd: RawFd, data: u64) {
        let poll = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).multi(true).build();
        self.push(&poll.user_data(data));
    }

    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: a poll has no buffer; the buffer of a transfer is staging memory, which is unmapped only after the
            // ring is gone, and whose slots the core keeps until the operation has completed, or a sealer's copy, kept as long.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            if let Err(error) = self.ring.submit() {
                assert!(is_passing(&error), "io_uring does not take submissions any more: {error}");
            }
        }
    }

    /// Starts a transfer between the store and memory at `address`, which stays until it has completed.
    pub(super) fn start(&mut self, io: IoId, write: bool, run: Run, address: usize) {
        let at = io.0 as usize;
        if self.transfers.len() <= at {
            self.transfers.resize(at + 1, None);
        }
        let transfer = Transfer { write, offset: run.start.offset(), address, len: run.bytes(), done: 0 };
        self.in_flight += 1;
        self.submit(io, transfer, Instant::now());
    }

    fn submit(&mut self, io: IoId, transfer: Transfer, started: Instant) {
        let Transfer { write, offset, address, len, done } = transfer;
        let (at, rest, offset) = ((address + done) as *mut u8, (len - done) as u32, offset + done as u64);
        let entry = if write {
            opcode::Write::new(STORE, at, rest).offset(offset).build()
        } else {
            opcode::Read::new(STORE, at, rest).offset(offset).build()
        };
        self.transfers[io.0 as usize] = Some((transfer, started));
        self.push(&entry.user_data(u64::from(io.0)));
    }

    /// Submits what was pushed, without waiting.
    pub(super) fn submit_now(&mut self) {
        if !self.ring.submission().is_empty()
            && let Err(error) = self.ring.submit()
        {
            assert!(is_passing(&error), "io_uring does not take submissions any more: {error}");
        }
    }

    /// Submits what was pushed and waits for at least one completion, or until `patience` is over.
    pub(super) fn wait(&mut self, patience: Duration, completions: &mut Vec<Completion>) {
        let timeout = Timespec::new().sec(patience.as_secs()).nsec(patience.subsec_nanos());
        let args = SubmitArgs::new().timespec(&timeout);
        match self.ring.submitter().submit_with_args(1, &args) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ETIME) || is_passing(&error) => {}
            Err(error) => panic!("io_uring does not wait any more: {error}"),
        }
        self.collect(completions);
    }

    fn collect(&mut self, completions: &mut Vec<Completion>) {
        loop {
            let Some(entry) = self.ring.completion().next() else { return };
            completions.extend(self.completed(&entry));
        }
    }

    fn completed(&mut self, entry: &cqueue::Entry) -> Option<Completion> {
        let watched = match entry.user_data() {
            DATA_FAULTS => Some((self.faults, DATA_FAULTS, Completion::Faults)),
            DATA_COMMANDS => Some((self.commands, DATA_COMMANDS, Completion::Commands)),
            _ => None,
        };
        if let Some((fd, data, completion)) = watched {
            if !cqueue::more(entry.flags()) {
                self.watch(fd, data);
            }
            return Some(completion);
        }
        let io = IoId(entry.user_data() as u32);
        let (mut transfer, started) =
            self.transfers[io.0 as usize].take().expect("a transfer completes once");
        let Some(result) = transfer.completed(entry.result()) else {
            self.submit(io, transfer, started);
            return None;
        };
        self.in_flight -= 1;
        Some(Completion::Io { io, result })
    }
}

/// Errors of a submission that the next one may not meet.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}
