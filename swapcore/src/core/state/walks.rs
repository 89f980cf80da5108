//! The walks that have been asked for, and how far they have come.

use std::collections::VecDeque;
use std::vec::IntoIter;

use crate::api::{DirtyPages, SubscriberId};
use crate::core::event::Ticket;
use crate::table::PageState;
use crate::units::{PageNo, Run};

/// How far a step goes.
#[derive(Clone, Copy, Debug)]
pub struct WalkStep {
    /// Pages of the engine's own table.
    pub table: u64,
    /// Pages in the guest at which the kernel looks; a block is looked at whole.
    pub present: u32,
    /// Blocks at which the kernel looks: where pages have left, it has a page table to look through all the same.
    pub blocks: usize,
    /// Samples that go back: each may be a huge page, 10 us.
    pub samples: usize,
}

/// 0.1 ms for the table; 64 MiB or, where nothing is present, 2 GiB for the kernel, 0.5 to 1.1 ms.
impl Default for WalkStep {
    fn default() -> Self {
        WalkStep { table: 1 << 16, present: 1 << 14, blocks: 1 << 10, samples: 32 }
    }
}

#[derive(Debug)]
pub(crate) enum Task {
    Heat(Vec<u8>),
    /// The pages in any of these states.
    Map(&'static [PageState], Vec<Run>),
    SubscribeDirty(Vec<Run>),
    /// Samples come back before pages are protected: one that came back later would look as if it had been written.
    PutSamplesBack(SubscriberId, Vec<Run>),
    /// Pages of these blocks are protected. Behind the last, who joins is told that it has.
    Track {
        id: SubscriberId,
        rest: IntoIter<Run>,
        joins: bool,
    },
    CollectDirty(SubscriberId, DirtyPages),
    /// The guest has given the pages back.
    Discard,
    /// Heat that the source tells of all pages; of those in the store, so many were not hot before.
    TakeHeat {
        heat: Vec<u8>,
        found: u64,
        first: bool,
    },
}

/// A request on its way over memory.
#[derive(Debug)]
pub(crate) struct Walk {
    pub(crate) ticket: Ticket,
    pub(crate) task: Task,
    /// Where the next step begins, and the last one ends.
    pub(crate) next: PageNo,
    pub(crate) end: PageNo,
}

/// The walks that have been asked for; the first one is under way.
#[derive(Debug, Default)]
pub(crate) struct Walks(VecDeque<Walk>);

impl Walks {
    /// Over so many pages.
    pub(crate) fn begin(&mut self, ticket: Ticket, task: Task, pages: u64) {
        self.0.push_back(Walk { ticket, task, next: PageNo(0), end: PageNo(pages) });
    }

    /// The same from one page to another, in front of those that have not begun: a VM may stand still for it.
    pub(crate) fn begin_next(&mut self, ticket: Ticket, task: Task, next: PageNo, end: PageNo) {
        self.0.insert(self.0.len().min(1), Walk { ticket, task, next, end });
    }

    pub(crate) fn any(&self) -> bool {
        !self.0.is_empty()
    }

    /// The one that is under way.
    pub(crate) fn first(&self) -> Option<&Walk> {
        self.0.front()
    }

    /// The same, to be [put](Walks::put) back unless it is at its end.
    pub(crate) fn take(&mut self) -> Option<Walk> {
        self.0.pop_front()
    }

    pub(crate) fn put(&mut self, walk: Walk) {
        self.0.push_front(walk);
    }

    /// A scan is done for the walk that is under way.
    pub(crate) fn scanned(&mut self) -> Option<(SubscriberId, &mut DirtyPages)> {
        match self.0.front_mut() {
            Some(Walk { task: Task::CollectDirty(id, told), .. }) => Some((*id, told)),
            _ => None,
        }
    }
}
