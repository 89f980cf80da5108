//! The VM's one io_uring: it waits for faults, commands and completions at once.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use memmap2::MmapMut;

use super::store::Store;
use crate::error::HostError;
use swapcore::core::IoId;
use swapcore::transfer::Transfer;
use swapcore::units::{Run, SlotRun};

/// Submission entries; completions have twice as many. More operations than this wait in the kernel's overflow list.
const ENTRIES: u32 = 512;
/// Memory of the ring: submissions of 64 bytes, completions of 16.
pub(super) const BYTES: u64 = ENTRIES as u64 * (64 + 2 * 16);
const DATA_FAULTS: u64 = u64::MAX;
const DATA_COMMANDS: u64 = u64::MAX - 1;
/// Beside the number of an operation: it is a drop.
const DATA_DROP: u64 = 1 << 32;
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
        operation: Operation,
        result: io::Result<()>,
    },
    Dropped {
        io: IoId,
        result: io::Result<()>,
    },
}

/// A read or write of the store that is under way.
#[derive(Debug)]
pub(super) struct Operation {
    pub(super) run: Run,
    /// Where the pages go that are read; none for a write.
    pub(super) slots: Option<SlotRun>,
    /// What is written, if that is not what is in staging. The device reads it until the operation has completed.
    pub(super) sealed: Option<MmapMut>,
    transfer: Transfer,
    started: Instant,
}

pub(super) struct Ring {
    ring: IoUring,
    /// Registered with it.
    store: Arc<Store>,
    faults: RawFd,
    commands: RawFd,
    /// By number of the operation. The buffers are staging slots, which outlive the ring, or the operation's own.
    operations: Vec<Option<Operation>>,
    in_flight: usize,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ring {{ in_flight: {} }}", self.in_flight)
    }
}

impl Ring {
    /// A ring that watches both descriptors and does I/O on the store.
    pub(super) fn new(store: Arc<Store>, faults: RawFd, commands: RawFd) -> Result<Self, HostError> {
        let ring = IoUring::builder()
            .setup_cqsize(ENTRIES * 2)
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .build(ENTRIES)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EPERM | libc::ENOSYS) => HostError::RingOff { source },
                _ => HostError::Ring { source },
            })?;
        ring.submitter()
            .register_files(&[store.file().as_raw_fd()])
            .map_err(|source| HostError::RingStore { source })?;
        let mut ring = Ring { ring, store, faults, commands, operations: Vec::new(), in_flight: 0 };
        ring.watch(faults, DATA_FAULTS);
        ring.watch(commands, DATA_COMMANDS);
        Ok(ring)
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// How long the oldest transfer under way has been so.
    pub(super) fn oldest(&self) -> Duration {
        let started = self.operations.iter().flatten().map(|operation| operation.started).min();
        started.map_or(Duration::ZERO, |started| started.elapsed())
    }

    fn watch(&mut self, fd: RawFd, data: u64) {
        let poll = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).multi(true).build();
        self.push(&poll.user_data(data));
    }

    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: a poll has no buffer; the buffer of a transfer is staging memory, which is unmapped only after the
            // ring is gone, and whose slots the core keeps until the operation has completed, or the operation's own, kept as long.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            if let Err(error) = self.ring.submit() {
                assert!(is_passing(&error), "io_uring does not take submissions any more: {error}");
            }
        }
    }

    /// Starts to read a run into its slots, the first of which is at `address`.
    pub(super) fn read(&mut self, io: IoId, run: Run, slots: SlotRun, address: usize) {
        self.start(io, run, address, Some(slots), None);
    }

    /// Starts to write a run from memory at `address`, which stays as it is until the operation has completed: of staging, or of `sealed`.
    pub(super) fn write(&mut self, io: IoId, run: Run, address: usize, sealed: Option<MmapMut>) {
        self.start(io, run, address, None, sealed);
    }

    fn start(&mut self, io: IoId, run: Run, address: usize, slots: Option<SlotRun>, sealed: Option<MmapMut>) {
        let (write, offset) = (slots.is_none(), self.store.place_of(run.start));
        let transfer = Transfer { write, offset, address, len: run.bytes(), done: 0 };
        self.in_flight += 1;
        self.submit(io, Operation { run, slots, sealed, transfer, started: Instant::now() });
    }

    /// Makes a hole in the store's file. The kernel does that in a thread of its own, in which it keeps other operations on the file
    /// waiting.
    pub(super) fn start_hole(&mut self, io: IoId, run: Run) {
        let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (at, len) = (self.store.place_of(run.start), run.bytes() as u64);
        let entry = opcode::Fallocate::new(STORE, len).offset(at).mode(hole).build();
        self.in_flight += 1;
        self.push(&entry.user_data(DATA_DROP | u64::from(io.0)));
    }

    fn submit(&mut self, io: IoId, operation: Operation) {
        let Transfer { write, offset, address, len, done } = operation.transfer;
        let (at, rest, offset) = ((address + done) as *mut u8, (len - done) as u32, offset + done as u64);
        let entry = if write {
            opcode::Write::new(STORE, at, rest).offset(offset).build()
        } else {
            opcode::Read::new(STORE, at, rest).offset(offset).build()
        };
        let index = io.0 as usize;
        if self.operations.len() <= index {
            self.operations.resize_with(index + 1, || None);
        }
        self.operations[index] = Some(operation);
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
        if entry.user_data() & DATA_DROP != 0 {
            self.in_flight -= 1;
            let result = match entry.result() {
                errno if errno < 0 => Err(io::Error::from_raw_os_error(-errno)),
                _ => Ok(()),
            };
            return Some(Completion::Dropped { io, result });
        }
        let mut operation = self.operations[io.0 as usize].take().expect("an operation completes once");
        let Some(result) = operation.transfer.completed(entry.result()) else {
            self.submit(io, operation);
            return None;
        };
        self.in_flight -= 1;
        Some(Completion::Io { io, operation, result })
    }
}

/// Errors of a submission that the next one may not meet.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}
