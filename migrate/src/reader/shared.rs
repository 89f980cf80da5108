//! What a reader and its fillers share.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use swapd::BLOCK_PAGES;

use super::error::ReadError;
use super::outside::EngineHandle;
use super::sink::Sink;
use super::stored::StoredPages;
use super::tracker::Tracker;

pub(super) struct Shared<S> {
    pub(super) handle: EngineHandle,
    pub(super) tracker: RefCell<Tracker>,
    pub(super) stored: StoredPages,
    pub(super) sink: S,
    /// Pages with content that the sink was given.
    pub(super) pages_given: Cell<u64>,
    /// Blocks to be read in this round, by queue, in this order.
    blocks: Vec<RefCell<VecDeque<u32>>>,
}

impl<S: Sink> Shared<S> {
    pub(super) fn new(handle: &EngineHandle, sink: S, tracked: bool) -> Result<Shared<S>, ReadError> {
        let pages = swapd::units::pages_in(handle.memory_bytes());
        Ok(Shared {
            handle: handle.clone(),
            tracker: Tracker::new(pages, sink.places_by_use(), tracked).into(),
            stored: StoredPages::of(handle)?,
            pages_given: Cell::default(),
            blocks: (0..sink.queues()).map(|_| RefCell::default()).collect(),
            sink,
        })
    }

    /// Puts the blocks into their queues, in this order.
    pub(super) fn assign(&self, blocks: impl IntoIterator<Item = u32>) {
        for block in blocks {
            self.blocks[self.sink.queue_of(block) as usize].borrow_mut().push_back(block);
        }
    }

    pub(super) fn next_block(&self, queue: u32) -> Option<u32> {
        self.blocks[queue as usize].borrow_mut().pop_front()
    }

    /// There is more to read in the block.
    pub(super) fn put_back(&self, queue: u32, block: u32) {
        self.blocks[queue as usize].borrow_mut().push_front(block);
    }

    /// The blocks in which pages are to be read now.
    pub(super) fn open_blocks(&self) -> Vec<u32> {
        let tracker = self.tracker.borrow();
        (0..tracker.blocks()).filter(|block| tracker.cover(*block).is_some()).collect()
    }
}

/// The pages of a block, as indices.
pub(super) fn pages_of(block: u32) -> std::ops::Range<usize> {
    let first = block as usize * BLOCK_PAGES as usize;
    first..first + BLOCK_PAGES as usize
}
