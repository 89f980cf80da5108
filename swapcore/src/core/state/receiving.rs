//! How far the receiving of a VM has come.

use std::collections::VecDeque;

use super::cold_hand::ColdHand;
use crate::core::event::Ticket;
use crate::units::PageNo;

/// As long as the source has not watched the VM, one page in so many of those in the store is taken to be hot.
const HOT_UNSEEN_SHARE: u64 = 4;

#[derive(Debug)]
pub(crate) struct Receiving {
    /// One bit a page: a version of it has come.
    came: Vec<u64>,
    to_come: u64,
    /// Pages already placed in the store that the source's latest heat map newly calls hot; none before the second map.
    /// About as many again are expected of the next map, and so much RAM is kept free for them. 0: the source has seen
    /// the whole working set.
    found_hot: Option<u64>,
    pub(crate) cold: ColdHand,
    /// Reads and victims counted before.
    pages_read: u64,
    victims: u64,
    grants: VecDeque<(Ticket, u32)>,
    settle: Option<Ticket>,
}

impl Receiving {
    /// Of a VM of so many pages; as much has been read, and as many victims have been chosen by now.
    pub(crate) fn new(pages: u64, pages_read: u64, victims: u64) -> Receiving {
        Receiving {
            came: vec![0; pages.div_ceil(64) as usize],
            to_come: pages,
            found_hot: None,
            cold: ColdHand::new(),
            pages_read,
            victims,
            grants: VecDeque::new(),
            settle: None,
        }
    }

    pub(crate) fn came(&mut self, page: PageNo) {
        let (word, bit) = (&mut self.came[page.index() / 64], 1 << (page.index() % 64));
        self.to_come -= u64::from(*word & bit == 0);
        *word |= bit;
    }

    /// Pages of which no version has come.
    pub(crate) fn to_come(&self) -> u64 {
        self.to_come
    }

    /// A heat map has made so many pages hot that are in the store.
    pub(crate) fn found_hot(&mut self, pages: u64) {
        self.found_hot = Some(pages);
    }

    /// About as many hot pages in the store are expected of the next heat map as the last one found.
    pub(crate) fn hot_unseen(&self, in_store: u64) -> u64 {
        self.found_hot.unwrap_or(in_store / HOT_UNSEEN_SHARE)
    }

    /// What has been read, and how many victims were chosen since the beginning, of these counts.
    pub(crate) fn since(&self, pages_read: u64, victims: u64) -> (u64, u64) {
        (pages_read - self.pages_read, victims - self.victims)
    }

    /// Somebody waits for up to so many frames.
    pub(crate) fn wait_for_frames(&mut self, ticket: Ticket, count: u32) {
        self.grants.push_back((ticket, count.max(1)));
    }

    pub(crate) fn first_waiter(&self) -> Option<(Ticket, u32)> {
        self.grants.front().copied()
    }

    pub(crate) fn end_first_waiter(&mut self) {
        self.grants.pop_front();
    }

    /// False, if somebody waits for that already.
    pub(crate) fn settle(&mut self, ticket: Ticket) -> bool {
        self.settle.replace(ticket).is_none()
    }

    pub(crate) fn settles(&self) -> Option<Ticket> {
        self.settle
    }

    pub(crate) fn end_settle(&mut self) {
        self.settle = None;
    }

    /// Whoever waits for anything.
    pub(crate) fn waiters(&self) -> impl Iterator<Item = Ticket> {
        self.grants.iter().map(|(ticket, _)| *ticket).chain(self.settle)
    }
}
