//! The VM's one io_uring: it waits for faults, commands and completions at once.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use memmap2::MmapMut;

use super::store::Store;
use crate::error::HostError;
use crate::origin::Layers;
use swapcore::core::{IO_PAGES_MAX, IoId};
use swapcore::transfer::Transfer;
use swapcore::units::{PAGE_SIZE, Run, SlotRun, TierId};

/// Submission entries; completions have twice as many. More operations than this wait in the kernel's overflow list.
const ENTRIES: u32 = 512;
/// Memory of the ring: submissions of 64 bytes, completions of 16.
pub(super) const BYTES: u64 = ENTRIES as u64 * (64 + 2 * 16);
const DATA_FAULTS: u64 = u64::MAX;
const DATA_COMMANDS: u64 = u64::MAX - 1;
/// Beside the number of an operation: it is a drop.
const DATA_DROP: u64 = 1 << 32;
/// Beside the number of a transfer: which part of it.
const PART_SHIFT: u32 = 40;
/// The store's place among the registered files. The origin's layers come behind it.
const STORE: Fixed = Fixed(0);
/// Threads of the kernel's that may wait for files of this VM at a time. Who begins a read cannot always be spared the
/// wait, as where the file system has to read first where the content is. By default such reads have four threads a
/// processor: those of an origin that does not answer would take all of them, and the store's would wait with them.
const WORKERS: u32 = 512;

// No part is taken for one of the watched descriptors.
const _: () = assert!((IO_PAGES_MAX as u64) < 1 << (u64::BITS - PART_SHIFT - 1));

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

/// A read or write of a tier that is under way.
#[derive(Debug)]
pub(super) struct Operation {
    pub(super) tier: TierId,
    pub(super) run: Run,
    /// Where the pages go that are read; none for a write.
    pub(super) slots: Option<SlotRun>,
    /// What is written, if that is not what is in staging. The device reads it until the operation has completed.
    pub(super) sealed: Option<MmapMut>,
    first: Part,
    /// If the run is in more than one file.
    others: Vec<Part>,
    /// Parts that have not ended yet.
    left: u32,
    /// Of the first part that failed.
    error: Option<io::Error>,
    started: Instant,
}

/// The pages of an operation that are next to each other in one file.
#[derive(Debug)]
struct Part {
    file: Fixed,
    /// See [`Layer::blocks`](crate::origin::Layer::blocks).
    blocks: bool,
    transfer: Transfer,
}

impl Operation {
    fn of(tier: TierId, run: Run, (first, others): (Part, Vec<Part>)) -> Operation {
        let left = 1 + others.len() as u32;
        Operation {
            tier,
            run,
            slots: None,
            sealed: None,
            first,
            others,
            left,
            error: None,
            started: Instant::now(),
        }
    }

    fn part(&mut self, nth: usize) -> &mut Part {
        if nth == 0 { &mut self.first } else { &mut self.others[nth - 1] }
    }
}

pub(super) struct Ring {
    ring: IoUring,
    /// Registered with it.
    store: Arc<Store>,
    /// As well, if there is one.
    origin: Option<Arc<Layers>>,
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
    /// A ring that watches both descriptors and does I/O on the store, and reads from the origin.
    pub(super) fn new(
        store: Arc<Store>,
        origin: Option<Arc<Layers>>,
        faults: RawFd,
        commands: RawFd,
    ) -> Result<Self, HostError> {
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
        let layers = origin.iter().flat_map(|origin| origin.files());
        let files: Vec<_> = std::iter::once(store.file()).chain(layers).map(File::as_raw_fd).collect();
        ring.submitter().register_files(&files).map_err(|source| HostError::RingStore { source })?;
        if origin.is_some() {
            ring.submitter()
                .register_iowq_max_workers(&mut [WORKERS, 0])
                .map_err(|source| HostError::Ring { source })?;
        }
        let mut ring = Ring { ring, store, origin, faults, commands, operations: Vec::new(), in_flight: 0 };
        ring.watch(faults, DATA_FAULTS);
        ring.watch(commands, DATA_COMMANDS);
        Ok(ring)
    }

    /// Lets go of the origin's files, so many. A read of one would be an error from now on.
    pub(super) fn forget_origin(&self, layers: usize) -> io::Result<()> {
        self.ring.submitter().register_files_update(STORE.0 + 1, &vec![-1; layers]).map(drop)
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// How long the tier's oldest transfer under way has been so.
    pub(super) fn oldest(&self, tier: TierId) -> Duration {
        let of_tier = self.operations.iter().flatten().filter(|operation| operation.tier == tier);
        let started = of_tier.map(|operation| operation.started).min();
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

    /// Starts to read a run from a tier into its slots, the first of which is at `address`.
    pub(super) fn read(&mut self, io: IoId, tier: TierId, run: Run, slots: SlotRun, address: usize) {
        let parts = match (tier, &self.origin) {
            (TierId::STORE, _) => (self.part_in_store(run, address, false), Vec::new()),
            (TierId::ORIGIN, Some(origin)) => parts_in_origin(origin, run, address),
            (tier, _) => panic!("a read of {tier}, which this VM does not have"),
        };
        self.start(io, Operation { slots: Some(slots), ..Operation::of(tier, run, parts) });
    }

    /// Starts to write a run to the store from memory at `address`, which stays as it is until the operation has
    /// completed: of staging, or of `sealed`.
    pub(super) fn write(&mut self, io: IoId, run: Run, address: usize, sealed: Option<MmapMut>) {
        let parts = (self.part_in_store(run, address, true), Vec::new());
        self.start(io, Operation { sealed, ..Operation::of(TierId::STORE, run, parts) });
    }

    fn part_in_store(&self, run: Run, address: usize, write: bool) -> Part {
        let offset = self.store.place_of(run.start);
        Part {
            file: STORE,
            blocks: false,
            transfer: Transfer { write, offset, address, len: run.bytes(), done: 0 },
        }
    }

    fn start(&mut self, io: IoId, operation: Operation) {
        let index = io.0 as usize;
        if self.operations.len() <= index {
            self.operations.resize_with(index + 1, || None);
        }
        let parts = operation.left as usize;
        self.operations[index] = Some(operation);
        self.in_flight += 1;
        (0..parts).for_each(|part| self.submit(io, part));
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

    /// Submits what is left of a part.
    fn submit(&mut self, io: IoId, nth: usize) {
        let operation = self.operations[io.0 as usize].as_mut().expect("it is under way");
        let Part { file, blocks, transfer } = operation.part(nth);
        let Transfer { write, offset, address, len, done } = *transfer;
        let (at, rest, offset) = ((address + done) as *mut u8, (len - done) as u32, offset + done as u64);
        let entry = if write {
            opcode::Write::new(*file, at, rest).offset(offset).build()
        } else {
            opcode::Read::new(*file, at, rest).offset(offset).build()
        };
        let how = if *blocks { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        self.push(&entry.flags(how).user_data((nth as u64) << PART_SHIFT | u64::from(io.0)));
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
        let nth = (entry.user_data() >> PART_SHIFT) as usize;
        let place = &mut self.operations[io.0 as usize];
        let operation = place.as_mut().expect("an operation completes once");
        let Some(result) = operation.part(nth).transfer.completed(entry.result()) else {
            self.submit(io, nth);
            return None;
        };
        operation.left -= 1;
        if let Err(error) = result {
            operation.error.get_or_insert(error);
        }
        // The frames of all parts are the operation's until the last has ended.
        let mut operation = place.take_if(|operation| operation.left == 0)?;
        self.in_flight -= 1;
        let result = operation.error.take().map_or(Ok(()), Err);
        Some(Completion::Io { io, operation, result })
    }
}

/// The parts of a run, each in one of the origin's layers.
fn parts_in_origin(origin: &Layers, run: Run, address: usize) -> (Part, Vec<Part>) {
    let mut rest = run;
    let mut next = || {
        (rest.len > 0).then(|| {
            let (layer, part) = origin.first_part(rest);
            rest = rest.part(part.len, rest.len - part.len);
            let address = address + (part.start.0 - run.start.0) as usize * PAGE_SIZE;
            let transfer =
                Transfer { write: false, offset: part.start.offset(), address, len: part.bytes(), done: 0 };
            let file = Fixed(STORE.0 + 1 + layer as u32);
            Part { file, blocks: origin.layer(layer).blocks, transfer }
        })
    };
    (next().expect("a read of no pages"), std::iter::from_fn(next).collect())
}

/// Errors of a submission that the next one may not meet.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
