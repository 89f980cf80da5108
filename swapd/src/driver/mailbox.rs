//! The queue of commands into the engine's loop, and the descriptor that wakes it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use swapcore::core::{IoId, Request, Response};
use swapcore::error::CommandError;
use swapcore::units::Run;
use tokio::sync::oneshot;

use crate::error::StartError;

/// A command to the engine's loop, with the way back for its answer.
pub(crate) enum Command {
    /// A request to the core.
    Ask {
        request: Request,
        /// Hands the answer over. False if nobody waits for it any more.
        reply: Box<dyn FnOnce(Result<Response, CommandError>) -> bool + Send>,
    },
    Attach {
        region: usize,
        base: usize,
        reply: oneshot::Sender<Result<(), StartError>>,
    },
    CloseOrigin {
        reply: oneshot::Sender<Result<(), CommandError>>,
    },
    /// The host has done what it could to put this in huge pages.
    Collapsed {
        run: Run,
    },
    /// A block device has forgotten what it was told to, or not.
    Dropped {
        io: IoId,
        result: io::Result<()>,
    },
}

#[derive(Default)]
struct Queue {
    commands: VecDeque<Command>,
    closed: bool,
}

/// A queue with many senders and one receiver. A closed mailbox drops commands, and the sender of one is told that
/// the engine has gone.
pub(crate) struct Mailbox {
    queue: Mutex<Queue>,
    wake: OwnedFd,
}

impl std::fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mailbox {{ wake: {} }}", self.wake.as_raw_fd())
    }
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Mailbox { queue: Mutex::default(), wake })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// Queues a command. Only the first of a burst wakes the loop.
    pub(crate) fn send(&self, command: Command) {
        let mut queue = self.lock();
        if queue.closed {
            return;
        }
        queue.commands.push_back(command);
        if queue.commands.len() == 1 {
            drop(queue);
            self.ring_bell();
        }
    }

    /// No command is taken any more; the loop ends.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.ring_bell();
    }

    fn ring_bell(&self) {
        // A write fails only if the counter is full: then the loop has been woken already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Takes all commands; true if the mailbox is closed.
    pub(super) fn take(&self, into: &mut Vec<Command>) -> bool {
        // An empty counter says EAGAIN: nothing was sent since the last look.
        let _ = rustix::io::read(&self.wake, &mut [0; size_of::<u64>()]);
        let mut queue = self.lock();
        into.extend(queue.commands.drain(..));
        queue.closed
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Queue> {
        // The queue is whole at every point at which a holder could panic.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
