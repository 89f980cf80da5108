//! How far a pass has come that puts huge pages together.

/// A pass over the blocks.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Pass {
    /// Where it goes on, if there is one.
    pub(crate) next: Option<usize>,
    /// Blocks that the host is at.
    pub(crate) under_way: u32,
    /// Also over blocks that are in huge pages, for these may be mapped page by page.
    pub(crate) all: bool,
    pub(crate) began: u64,
    /// Pages that had been read from the store by then.
    pub(crate) read: u64,
    pub(crate) failed: bool,
    pub(crate) again_left: u32,
}
