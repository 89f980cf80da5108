//! A file on the disk under test, laid out as a store is, and a ring that reads and writes it past the host's page
//! cache.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use io_uring::types::{Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode};
use memmap2::MmapMut;
use swapd::Run;

use super::plan::JOINED_PAGES;
use crate::pattern::Random;

const FILL_BYTES: u64 = 1 << 20;
const BUFFER_BYTES: usize = (JOINED_PAGES as usize) << swapd::PAGE_SHIFT;
const FILE: Fixed = Fixed(0);

/// Makes a file without a name, and fills it with content that no compression makes smaller.
pub(super) fn make(dir: &Path, bytes: u64) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_DIRECT | libc::O_TMPFILE)
        .open(dir)?;
    let mut buffer = MmapMut::map_anon(FILL_BYTES as usize)?;
    let mut random = Random::new(bytes);
    buffer.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&random.next().to_ne_bytes()));
    let mut offset = 0;
    while offset < bytes {
        let len = FILL_BYTES.min(bytes - offset) as usize;
        buffer[..8].copy_from_slice(&offset.to_ne_bytes());
        file.write_all_at(&buffer[..len], offset)?;
        offset += len as u64;
    }
    file.sync_all()?;
    Ok(file)
}

/// One read or write under way, in a slot of the ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transfer {
    pub(super) thread: usize,
    pub(super) run: Run,
    pub(super) write: bool,
    /// Touches of its thread that are done when the transfer is. The device hands the number back unchanged.
    pub(super) touches: u64,
    pub(super) began: u64,
}

/// A fixed number of transfers at a time. Each read has a buffer of its own; all writes take the same bytes.
pub(super) struct Device {
    ring: IoUring,
    /// The buffers. Only the device reads and writes them; they are unmapped after the ring is gone.
    buffers: MmapMut,
    transfers: Vec<Option<Transfer>>,
    vacant: Vec<usize>,
    vacant_for_writes: Vec<usize>,
    reads: usize,
    _file: File,
}

impl Device {
    pub(super) fn new(file: File, reads: usize, writes: usize) -> io::Result<Device> {
        let slots = reads + writes;
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .build(slots.next_power_of_two() as u32)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let mut buffers = MmapMut::map_anon((reads + 1) * BUFFER_BYTES)?;
        let mut random = Random::new(1);
        buffers.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&random.next().to_ne_bytes()));
        Ok(Device {
            ring,
            buffers,
            transfers: vec![None; slots],
            vacant: (0..reads).rev().collect(),
            vacant_for_writes: (reads..slots).rev().collect(),
            reads,
            _file: file,
        })
    }

    pub(super) fn in_flight(&self) -> usize {
        self.transfers.len() - self.vacant.len() - self.vacant_for_writes.len()
    }

    /// Queues a transfer, which is submitted by the next [`Device::wait`].
    ///
    /// # Panics
    /// If all slots are in use.
    pub(super) fn start(&mut self, transfer: Transfer) {
        let vacant = if transfer.write { &mut self.vacant_for_writes } else { &mut self.vacant };
        let slot = vacant.pop().expect("as many slots as threads and writers need");
        // SAFETY: within the mapping: a read's own part of it, or the part behind those, which all writes share.
        let at = unsafe { self.buffers.as_mut_ptr().add(slot.min(self.reads) * BUFFER_BYTES) };
        let (len, offset) = (transfer.run.bytes() as u32, transfer.run.start.offset());
        let entry = match transfer.write {
            true => opcode::Write::new(FILE, at, len).offset(offset).build(),
            false => opcode::Read::new(FILE, at, len).offset(offset).build(),
        };
        self.transfers[slot] = Some(transfer);
        // SAFETY: nobody else changes the buffer until the transfer has completed, and the device is not dropped
        // before. The ring has room for all slots.
        unsafe { self.ring.submission().push(&entry.user_data(slot as u64)) }
            .expect("the ring has an entry for every slot");
    }

    /// Submits what is queued, waits for at least one completion or until `patience` is over, and calls `done` for
    /// each transfer that has ended.
    pub(super) fn wait(&mut self, patience: Duration, mut done: impl FnMut(Transfer)) -> io::Result<()> {
        let timeout = Timespec::new().sec(patience.as_secs()).nsec(patience.subsec_nanos());
        let args = SubmitArgs::new().timespec(&timeout);
        match self.ring.submitter().submit_with_args(1, &args) {
            Ok(_) => {}
            Err(error)
                if [libc::ETIME, libc::EINTR, libc::EAGAIN, libc::EBUSY]
                    .contains(&error.raw_os_error().unwrap_or(0)) => {}
            Err(error) => return Err(error),
        }
        for entry in self.ring.completion() {
            let slot = entry.user_data() as usize;
            let transfer = self.transfers[slot].take().expect("a transfer completes once");
            if transfer.write {
                self.vacant_for_writes.push(slot)
            } else {
                self.vacant.push(slot)
            }
            if entry.result() < 0 {
                return Err(io::Error::from_raw_os_error(-entry.result()));
            }
            if entry.result() as usize != transfer.run.bytes() {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "a transfer was cut short"));
            }
            done(transfer);
        }
        Ok(())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // A buffer must not be unmapped while the device uses it: what is under way is waited for.
        while self.in_flight() > 0 && self.wait(Duration::from_secs(1), |_| {}).is_ok() {}
    }
}
