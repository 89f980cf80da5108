//! Why memory cannot be read to the end.

use swapd::CommandError;

/// Why a [`Reader`](super::Reader) stopped. Its owner closes it; the VM is not harmed.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The engine refused a request, or has ended; or a tier gave nothing at all for too long.
    #[error("the engine failed")]
    Engine(#[from] CommandError),
    /// The store could not be opened for reading beside the engine.
    #[error("the store cannot be opened")]
    Store(#[source] std::io::Error),
    /// The VM stands still, and the engine goes on moving some pages all the same.
    #[error("the engine does not come to rest: some pages stay on the move")]
    Restless,
    /// The sink takes nothing any more. Its owner knows why.
    #[error("whoever takes the pages takes no more")]
    Closed,
}
