//! What the reader needs of whoever takes the pages.

use std::future::Future;

use swapd::{PageNo, Run, TierId};

use super::buffer::PageBuffer;

/// Most runs in one [`Found::Zeros`] or [`Found::Lost`].
pub const MAX_RUNS: u32 = 512;

/// Pages that the reader has found. Each run lies within one 2 MiB block.
#[derive(Debug)]
pub enum Found {
    /// Pages with content.
    Pages(PageBuffer),
    /// Pages that read as zeros.
    Zeros(Vec<Run>),
    /// Pages whose content is lost: a touch of them is a memory error.
    Lost(Vec<Run>),
}

/// Pages that are in a tier, held while the sink is asked about them. The run lies within one 2 MiB block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StoredRun<'a> {
    /// Where they are stored.
    pub tier: TierId,
    /// Which pages these are.
    pub run: Run,
    /// The checksum of each.
    pub sums: &'a [u64],
}

/// The sink takes nothing any more. Why is the sink's own business: its owner knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Closed;

/// Where the pages go.
///
/// Blocks are spread over *queues*. All that is found of a block goes through one queue, in the order in which it was
/// found. So a sink that keeps each queue in order keeps the versions of each page in order: an old one never follows a
/// newer one.
pub trait Sink: 'static {
    /// How many queues there are, at least 1. It never changes.
    fn queues(&self) -> u32;

    /// The queue of a block, less than [`queues`](Self::queues). It never changes.
    fn queue_of(&self, block: u32) -> u32;

    /// An empty buffer to read into, once there is one: this is what bounds the memory that a reader needs. None: the
    /// sink takes nothing any more.
    fn buffer(&self, queue: u32) -> impl Future<Output = Option<PageBuffer>>;

    /// A buffer comes back empty, because nothing was found for it.
    fn unused(&self, queue: u32, buffer: PageBuffer);

    /// Takes what was found. Waits for as long as the sink has no room for it.
    fn take(&self, queue: u32, found: Found) -> impl Future<Output = Result<(), Closed>>;

    /// Whether a page that has been given is to be given again, unchanged, when a scan sees it written for the first
    /// time: for whoever places pages by whether they are in use. It never changes.
    fn places_by_use(&self) -> bool {
        true
    }

    /// Whether the sink has this content of the page from elsewhere, such as an earlier image. If so, the page counts
    /// as given: it is neither read from the store nor put into a buffer.
    fn has(&self, page: PageNo, sum: u64) -> bool {
        let _ = (page, sum);
        false
    }

    /// Takes pages straight from the tier in which they are, without a look at their content: such as a file system
    /// can, which lets two files share blocks. `Ok(false)`: the sink does not, and the pages are read into a buffer.
    /// They are held until this returns; then they may change.
    fn take_stored(&self, stored: StoredRun<'_>) -> impl Future<Output = Result<bool, Closed>> {
        let _ = stored;
        async { Ok(false) }
    }
}
