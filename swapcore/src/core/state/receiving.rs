//! How far the receiving of a VM has come.

use std::collections::VecDeque;

use crate::core::event::Ticket;
use crate::units::PageNo;

#[derive(Debug)]
pub(crate) struct Receiving {
    /// One bit a page: a version of it has come.
    pub(crate) came: Vec<u64>,
    pub(crate) to_come: u64,
    /// Pages already placed in the store that the source's latest heat map newly calls hot; none before the second map. About as many
    /// again are expected of the next map, and so much RAM is kept free for them. 0: the source has seen the whole working set.
    pub(crate) found_hot: Option<u64>,
    /// Where the search for pages that give way to hotter ones goes on.
    pub(crate) hand: PageNo,
    /// No page in RAM that may leave is colder than this, and what the coldest of those behind the hand has.
    pub(crate) coldest: u8,
    pub(crate) next_coldest: u8,
    /// Since the last heat map, for what was colder than the coldest.
    pub(crate) restarts: u32,
    pub(crate) pages_read_before: u64,
    pub(crate) victims_before: u64,
    pub(crate) grants: VecDeque<(Ticket, u32)>,
    pub(crate) settle: Option<Ticket>,
}
