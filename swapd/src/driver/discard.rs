//! Space given back on a block device: a discard, by a thread for it alone. The call returns when the device has done it, which may take
//! as long as the device likes, and io_uring has no such operation before Linux 6.12.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use super::mailbox::{Command, Mailbox};
use super::store::Store;
use swapcore::core::IoId;
use swapcore::units::Run;

/// `_IO(0x12, 119)`, which the libc crate does not have.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// The thread ends with this.
#[derive(Debug)]
pub(super) struct Discarder(Sender<(IoId, Run)>);

impl Discarder {
    /// None for a file: that has holes.
    pub(super) fn of(store: &Arc<Store>, mailbox: &Arc<Mailbox>) -> io::Result<Option<Discarder>> {
        if !store.file().metadata()?.file_type().is_block_device() {
            return Ok(None);
        }
        let (sender, todo) = channel::<(IoId, Run)>();
        let (store, mailbox) = (store.clone(), mailbox.clone());
        let work = move || {
            for (io, run) in todo {
                mailbox.send(Command::Dropped { io, result: discard(&store, run) });
            }
        };
        std::thread::Builder::new().name("vmemd-discard".into()).spawn(work)?;
        Ok(Some(Discarder(sender)))
    }

    pub(super) fn start(&mut self, io: IoId, run: Run) {
        self.0.send((io, run)).expect("the thread lives as long as this");
    }
}

fn discard(store: &Store, run: Run) -> io::Result<()> {
    let range = [store.place_of(run.start), run.bytes() as u64];
    // SAFETY: the kernel reads two numbers, which outlive the call. What it discards is content that nobody needs any more: the core
    // writes none of these pages, nor reads one, until this has ended.
    match unsafe { libc::ioctl(store.file().as_raw_fd(), BLKDISCARD, range.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the store will say the same for ever.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::EINVAL))
}
