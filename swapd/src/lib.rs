//! vmemd's swap engine: one VM's private virtual memory.

#[macro_use]
pub mod mutant;

mod cipher;
pub mod core;
pub mod digest;
pub mod driver;
pub mod handle;
pub mod policy;
pub mod replay;
#[cfg(feature = "sim")]
pub mod sim;
pub mod staging;
pub mod stats;
pub mod table;
pub mod units;

pub use crate::core::{IoError, IoErrorKind};
pub use driver::errno::kind_of as io_error_kind;
pub use driver::{Engine, EngineConfig, Notice, StartError, StoreConfig, huge_page_mode, lock_limit};
pub use handle::{
    Answer, Arrival, CommandError, Copies, EngineHandle, FaultsSeen, Piece, Place, Placed, SeenFault,
    Written, answered,
};
pub use stats::Stats;
pub use units::{BLOCK_PAGES, PAGE_SHIFT, PAGE_SIZE, PageNo, Run, Slot, SlotRun, TierId};
