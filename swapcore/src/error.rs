//! Why the engine refuses.

use crate::units::PageNo;

/// Why the engine did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CommandError {
    #[error("the engine of this VM has ended")]
    Gone,
    #[error("a RAM budget of {asked} bytes is below the minimum of {minimum} bytes")]
    BudgetTooSmall { asked: u64, minimum: u64 },
    #[error("a RAM budget of {asked} bytes is above the VM's memory of {memory} bytes")]
    BudgetTooLarge { asked: u64, memory: u64 },
    #[error("{0} is not within the VM's memory")]
    OutOfRange(PageNo),
    #[error("{0}")]
    Store(String),
    /// The budget holds from now on, but the frames above it do not leave: no frame has for some seconds.
    #[error(
        "{held} bytes of RAM are still held, above the budget of {budget} bytes; {pinned} bytes of them are pinned"
    )]
    StillAbove { budget: u64, held: u64, pinned: u64 },
    #[error(
        "{pages} pages cannot leave RAM: something holds their frames, as I/O under way and registered buffers do"
    )]
    Pinned { pages: u64 },
    #[error("{0}")]
    NotNow(&'static str),
}
