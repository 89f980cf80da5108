//! What is asked of the origin, and how far it has come.

use std::collections::VecDeque;

use crate::core::event::{IoId, Ticket};
use crate::error::IoError;
use crate::units::{PageNo, Run};

/// Pages that are wanted in the guest ahead of any touch.
#[derive(Debug)]
pub(crate) struct Fetch {
    pub(crate) ticket: Ticket,
    /// Where the next look begins, and the last one ends.
    pub(crate) next: PageNo,
    pub(crate) end: PageNo,
    /// Pages whose reading has begun, and those of them that have come.
    pub(crate) begun: u32,
    pub(crate) came: u64,
    /// The reads that are under way, with the pages of each.
    pub(crate) ios: Vec<(IoId, u32)>,
}

impl Fetch {
    /// Pages that are being read for it.
    pub(crate) fn under_way(&self) -> u32 {
        self.ios.iter().map(|(_, pages)| pages).sum()
    }

    /// Nothing more is begun.
    pub(crate) fn stop(&mut self) {
        self.next = self.end;
    }
}

/// So many pages are to be moved home.
#[derive(Debug)]
pub(crate) struct Taking {
    pub(crate) ticket: Ticket,
    /// How many more may be begun.
    pub(crate) left: u32,
    /// How many the hand has passed since the request began: all of memory, and there is nothing more to begin.
    pub(crate) passed: u64,
    pub(crate) begun: bool,
    /// A tier that pages are to go to takes no writes.
    pub(crate) refused: Option<IoError>,
}

#[derive(Debug, Default)]
pub(crate) struct Origin {
    /// The first ones are under way.
    pub(crate) fetches: VecDeque<Fetch>,
    /// The first one is under way.
    pub(crate) takings: VecDeque<Taking>,
    /// Pages on their way home: being read, or written.
    pub(crate) homeward: Vec<PageNo>,
    /// Where the search for such pages goes on.
    pub(crate) hand: PageNo,
    /// Something has happened since the last step: the next one may find something to do.
    pub(crate) looks: bool,
}

impl Origin {
    pub(crate) fn is_busy(&self) -> bool {
        !self.fetches.is_empty() || !self.takings.is_empty()
    }

    /// Something has happened that may let pages be fetched, or taken home.
    pub(crate) fn wake(&mut self) {
        self.looks = self.is_busy();
    }

    pub(crate) fn fetch(&mut self, ticket: Ticket, run: Run) {
        let (next, end) = (run.start, run.end());
        self.fetches.push_back(Fetch { ticket, next, end, begun: 0, came: 0, ios: Vec::new() });
        self.wake();
    }

    pub(crate) fn take_home(&mut self, ticket: Ticket, pages: u32) {
        self.takings.push_back(Taking { ticket, left: pages, passed: 0, begun: false, refused: None });
        self.wake();
    }

    /// A read has ended that has brought so many pages.
    pub(crate) fn ended(&mut self, io: IoId, pages: u64) {
        for fetch in &mut self.fetches {
            if let Some(nth) = fetch.ios.iter().position(|(other, _)| *other == io) {
                fetch.ios.swap_remove(nth);
                fetch.came += pages;
            }
        }
    }
}
