//! Why an engine cannot start.

/// Why an engine could not start. Each text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{0}")]
    Budget(String),
    /// No permission, or no such feature in this kernel.
    #[error("{0}")]
    Host(String),
    #[error("{0}")]
    Store(String),
    #[error("{0}")]
    Memory(String),
}
