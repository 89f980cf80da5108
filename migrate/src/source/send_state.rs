//! What the tasks of a source's session share: the tracker, the work of this round, and the buffers.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use swapd::{BLOCK_PAGES, PageNo, Run};
use tokio::sync::Notify;

use super::record::Record;
use super::tracker::Tracker;
use crate::link::state::SessionState;
use crate::outside::{EngineHandle, StoredReader};
use crate::wire::control::Totals;
use crate::wire::extents::stream_of;
use crate::wire::record::Kind;

/// Records that a stream may have in the making and on their way: 4 MiB.
pub(crate) const RECORDS_PER_STREAM: usize = 4;

pub(crate) struct SendState {
    pub(crate) handle: EngineHandle,
    pub(crate) stored: StoredReader,
    pub(crate) session_state: Rc<SessionState>,
    pub(crate) tracker: RefCell<Tracker>,
    pub(crate) lanes: Vec<Lane>,
    /// Pages whose content was sent since this was last reset.
    pub(crate) pages_sent: Cell<u64>,
    /// How often it will still be waited for a store that does not give a page.
    pub(crate) patience: Cell<u32>,
    /// A page that the store gave last.
    pub(crate) last_given: Cell<Option<PageNo>>,
}

/// One data stream's share.
pub(crate) struct Lane {
    queue: RefCell<VecDeque<u32>>,
    free: RefCell<Vec<Record>>,
    freed: Notify,
    pub(crate) totals: Cell<Totals>,
}

/// What a stream's sender sends.
#[derive(Debug)]
pub(crate) enum Outgoing {
    Pages(Record),
    /// Zero or poisoned pages.
    Bare(Kind, Vec<Run>),
    RoundEnd {
        round: u64,
        last: bool,
    },
}

impl Lane {
    pub(crate) fn new() -> Lane {
        Lane {
            queue: RefCell::default(),
            free: RefCell::new((0..RECORDS_PER_STREAM).map(|_| Record::new()).collect()),
            freed: Notify::new(),
            totals: Cell::default(),
        }
    }

    pub(crate) fn next_block(&self) -> Option<u32> {
        self.queue.borrow_mut().pop_front()
    }

    /// There is more to do in a block.
    pub(crate) fn put_back(&self, block: u32) {
        self.queue.borrow_mut().push_front(block);
    }

    /// Waits for a free record.
    pub(crate) async fn take_record(&self) -> Record {
        loop {
            if let Some(record) = self.free.borrow_mut().pop() {
                return record;
            }
            self.freed.notified().await;
        }
    }

    pub(crate) fn give_back(&self, mut record: Record) {
        record.clear();
        self.free.borrow_mut().push(record);
        self.freed.notify_one();
    }

    pub(crate) fn count(&self, kind: Kind, pages: u64) {
        let mut totals = self.totals.get();
        match kind {
            Kind::Pages => totals.pages += pages,
            Kind::Zeros => totals.zeros += pages,
            _ => totals.poisoned += pages,
        }
        self.totals.set(totals);
    }
}

impl SendState {
    pub(crate) fn streams(&self) -> u32 {
        self.lanes.len() as u32
    }

    /// Hands the blocks to their streams, in this order.
    pub(crate) fn assign(&self, blocks: impl IntoIterator<Item = u32>) {
        for block in blocks {
            let first = PageNo(u64::from(block) * u64::from(BLOCK_PAGES));
            let stream = stream_of(first, self.streams());
            self.lanes[stream as usize].queue.borrow_mut().push_back(block);
        }
    }

    pub(crate) fn totals(&self) -> Totals {
        self.lanes.iter().fold(Totals::default(), |mut all, lane| {
            all += lane.totals.get();
            all
        })
    }
}
