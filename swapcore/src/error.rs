//! What fails, and why the engine refuses.

use std::io;

use crate::errno;
use crate::units::{PageNo, TierId};

/// What kind of failure an operation on a tier met. Decided once, where the errno is seen ([`IoErrorKind::of`], and the
/// table in `docs/reliability.md`); everything behind that goes by the kind.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum IoErrorKind {
    /// No room. What is stored can still be read.
    Full,
    /// Nobody answers: the way to the medium is broken, or whoever is at its end. Says nothing about the medium.
    Unreachable,
    /// The host had no means for it at this moment.
    Passing(i32),
    /// The medium is said to be broken, at this place at least.
    Broken(i32),
    /// It was read, and is not what was written.
    Mismatch,
}

/// An operation on a tier failed. [`std::fmt::Display`] is what an operator is told.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct IoError {
    /// The tier that was asked.
    pub tier: TierId,
    /// Whether it was a write; else it was a read.
    pub write: bool,
    /// What kind of failure it was.
    pub kind: IoErrorKind,
}

impl IoErrorKind {
    /// Only a broken medium counts against a page, and what is not known for certain to be something else counts as
    /// that: the core asks more than once, and others too, before it gives a page up.
    pub fn of(error: &io::Error) -> IoErrorKind {
        // A device that ends too early has none.
        let errno = error.raw_os_error().unwrap_or(errno::EIO);
        match errno {
            errno::ENOSPC | errno::EDQUOT => IoErrorKind::Full,
            // From the block layer: a lost path, a time-out, a device that is off or away, one that another host has
            // reserved.
            errno::ENOLINK
            | errno::ETIMEDOUT
            | errno::ETIME
            | errno::ENODEV
            | errno::ENXIO
            | errno::ENOMEDIUM
            | errno::EBADE
            // From file systems behind a network or another process.
            | errno::ESHUTDOWN
            | errno::ENOTCONN
            | errno::ECONNREFUSED
            | errno::ECONNRESET
            | errno::ECONNABORTED
            | errno::EPIPE
            | errno::ECOMM
            | errno::EHOSTDOWN
            | errno::EHOSTUNREACH
            | errno::ENETDOWN
            | errno::ENETUNREACH
            | errno::ENETRESET
            | errno::ENONET
            | errno::ESTALE => IoErrorKind::Unreachable,
            // The host is short of something. (A transfer that met EINTR or EAGAIN is submitted anew, and does not come
            // here.)
            errno::EINTR | errno::EAGAIN | errno::EBUSY | errno::ENOMEM | errno::ENFILE | errno::ENOBUFS => {
                IoErrorKind::Passing(errno)
            }
            // EIO says anything and nothing; EREMOTEIO, ENODATA, EILSEQ and EBADMSG name the medium.
            _ => IoErrorKind::Broken(errno),
        }
    }
}

impl std::fmt::Display for IoError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let IoError { tier, write, kind } = self;
        let done = if *write { "written" } else { "read" };
        let because = |errno: &i32| io::Error::from_raw_os_error(*errno);
        match kind {
            IoErrorKind::Full => write!(f, "{tier} is full: No space left on device"),
            IoErrorKind::Unreachable => write!(f, "{tier} cannot be reached"),
            IoErrorKind::Passing(errno) => {
                write!(f, "{tier} cannot be {done} at this moment: {}", because(errno))
            }
            IoErrorKind::Broken(errno) => write!(f, "{tier} cannot be {done}: {}", because(errno)),
            IoErrorKind::Mismatch => write!(f, "{tier} does not give back what was written"),
        }
    }
}

impl std::error::Error for IoError {}

/// Why the engine did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CommandError {
    /// The engine's thread has ended, or ends before it answers.
    #[error("the engine of this VM has ended")]
    Gone,
    /// The budget asked for is less than any VM needs.
    #[error("a RAM budget of {asked} bytes is below the minimum of {minimum} bytes")]
    BudgetTooSmall {
        /// What was asked for, in bytes.
        asked: u64,
        /// The smallest budget of any VM, in bytes.
        minimum: u64,
    },
    /// The budget asked for is more than the VM could ever use.
    #[error("a RAM budget of {asked} bytes is above the VM's memory of {memory} bytes")]
    BudgetTooLarge {
        /// What was asked for, in bytes.
        asked: u64,
        /// The VM's memory, in bytes.
        memory: u64,
    },
    /// This page, of those that were named, is beyond the VM's memory or in a gap between its regions.
    #[error("{0} is not within the VM's memory")]
    OutOfRange(PageNo),
    /// What is asked for needs writes to a tier that takes none; the error is that of the write that failed.
    #[error("{0}")]
    Store(IoError),
    /// The budget holds from now on, but the frames above it do not leave: no frame has for some seconds.
    #[error(
        "{held} bytes of RAM are still held, above the budget of {budget} bytes; {pinned} bytes of them are pinned"
    )]
    StillAbove {
        /// The budget from now on, in bytes.
        budget: u64,
        /// What the VM holds, in bytes.
        held: u64,
        /// How much of that could not leave because something holds its frames, in bytes.
        pinned: u64,
    },
    /// The pages were asked to leave, and have not for some seconds.
    #[error(
        "{pages} pages cannot leave RAM: something holds their frames, as I/O under way and registered buffers do"
    )]
    Pinned {
        /// How many pages of the run are still in RAM.
        pages: u64,
    },
    /// It does not fit the state that the VM is in; the text says which.
    #[error("{0}")]
    NotNow(&'static str),
}
