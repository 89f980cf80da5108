//! Why an engine cannot start.

/// Why an engine could not start. Each text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The memory or the RAM budget asked for cannot be had.
    #[error("{0}")]
    Budget(String),
    /// No permission, or no such feature in this kernel.
    #[error("{0}")]
    Host(String),
    /// The store cannot be opened, or has too little room.
    #[error("{0}")]
    Store(String),
    /// The VM's memory cannot be mapped, or is not what an engine can serve.
    #[error("{0}")]
    Memory(String),
}
