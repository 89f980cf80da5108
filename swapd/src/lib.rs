//! vmemd's swap engine, which gives one VM a private virtual memory. Its decisions are made in `swapcore`; this crate
//! carries them out with userfaultfd, io_uring and memory mappings.

#![deny(missing_docs)]

#[cfg(test)]
#[macro_use]
extern crate testkit;

mod cipher;
mod driver;
mod error;
mod handle;
mod notice;
mod origin;
mod reader;

pub use cipher::Cipher;
pub use driver::engine::{Engine, EngineConfig, StoreConfig};
pub use driver::locking::lock_limit;
pub use driver::memory::huge_page_mode;
pub use error::{BudgetError, HostError, MemoryError, StartError, StoreError};
pub use handle::{DirtySubscription, EngineHandle, PendingAnswer, answered};
pub use notice::Notice;
pub use origin::{LayerOf, Origin, OriginError, OriginLayer};
pub use reader::{CloneError, Cloned, StoredPart, StoredReader, share_blocks, verify};
pub use swapcore::api::{
    Adopted, ArrivedRun, Copies, DirtyPages, FaultKind, FaultsSeen, Piece, Place, Placed, SeenFault,
};
pub use swapcore::error::{CommandError, IoError, IoErrorKind};
pub use swapcore::stats::Stats;
pub use swapcore::units::{BLOCK_PAGES, PAGE_SHIFT, PAGE_SIZE, PageNo, Run, Slot, SlotRun, TierId};
pub use swapcore::{core, digest, replay, stats, units};

#[cfg(test)]
testkit::main!();
