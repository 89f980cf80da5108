//! Why there is no checkpoint.

use std::io;

use migrate::VmError;
use swapd::CommandError;

use crate::outside::reader::ReadError;

/// Why a VM was not saved. It goes on as before.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// What it is to be saved into, or what it is compared with, does not fit the VM. The text says why.
    #[error("{0}")]
    Options(String),
    /// The [`CancelFlag`](migrate::CancelFlag) was set before all was written.
    #[error("cancelled")]
    Cancelled,
    /// A file of the checkpoint could not be written.
    #[error("the checkpoint's {what} cannot be written")]
    Write {
        /// Which file.
        what: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
    /// The VM has stood still for as long as it may, and not all of it was written.
    #[error(
        "the VM has stood still for {} s, and its last pages were not written by then: the destination does not \
         answer, or is too slow",
        .0.as_secs()
    )]
    StoodTooLong(std::time::Duration),
    /// The VM did not do what a checkpoint needs of it: drain, pause, save its state.
    #[error("the VM failed")]
    Vm(#[from] VmError),
    /// The engine refused a request, or has ended.
    #[error("the engine failed")]
    Engine(#[from] CommandError),
    /// This process lacks something for it.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
    /// The engine goes on moving some pages though the VM stands still.
    #[error("the engine does not come to rest: some pages stay on the move")]
    Restless,
}

impl From<ReadError> for SaveError {
    fn from(error: ReadError) -> SaveError {
        match error {
            ReadError::Engine(error) => SaveError::Engine(error),
            ReadError::Store(source) => SaveError::Host { what: "the store cannot be opened", source },
            ReadError::Restless => SaveError::Restless,
            // Whoever has closed the sink has its reason, which is told instead.
            ReadError::Closed => SaveError::Cancelled,
        }
    }
}
