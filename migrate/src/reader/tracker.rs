//! Which pages are to be read, in this round or the next, and what the sink was given of each.
//!
//! ```text
//!   todo ── taken ──▶ sent ── found dirty ──▶ next ── a round begins ──▶ todo
//!     └───────── found dirty, or moving just now ──────▲
//! ```
//! Pages of blocks that are not tracked yet are *unread*. Nobody is told when they are written, so no report of them
//! counts, and they are not read: a block is tracked first, whole, and then all of it is in `todo`.
//!
//! A page leaves `todo` *before* it is copied: if it is written during the copy or after it, a later scan reports it.
//! Devices are the exception. Their I/O writes through a mapping of its own and ignores write protection. So a page
//! that is pinned for I/O may be reported, be protected again, and only then get its data, without another report.
//! Therefore a reported page is read in the next round at the earliest, and between two rounds
//! [`LiveVm::drain`](crate::LiveVm::drain) waits for all I/O that was under way. A copy that was made between
//! report and data would be wrong for ever.

use swapd::{BLOCK_PAGES, PageNo, Run};

use super::order::raise_for_scans;
use super::outside::planted;
use crate::bitmap::Bitmap;

#[derive(Debug)]
pub(super) struct Tracker {
    pages: u64,
    /// The sink places pages by whether they are in use.
    places_by_use: bool,
    pub(super) todo: Bitmap,
    pub(super) next: Bitmap,
    /// Of blocks that are not tracked yet: all pages of a block, or none.
    pub(super) unread: Bitmap,
    sent: Bitmap,
    /// Sent before any scan saw it written. The target has placed such a page by the heat that was known then: it may
    /// be in the store there, though the guest uses it.
    sent_unseen: Bitmap,
    /// Last sent as zeros.
    zero: Bitmap,
    /// Checksum of what was sent last, of pages that were not zeros.
    sums: Vec<u64>,
    /// How many scans saw a page written.
    scans: Vec<u8>,
    /// Blocks in which a scan saw a page written.
    dirty_blocks: Bitmap,
}

impl Tracker {
    /// Everything is to be sent: all of it is tracked already, or none.
    pub(super) fn new(pages: u64, places_by_use: bool, tracked: bool) -> Tracker {
        let (none, mut all) = (Bitmap::new(pages), Bitmap::new(pages));
        all.set_run(Run::new(PageNo(0), u32::try_from(pages).expect("checked when the target was asked")));
        let (todo, unread) = if tracked { (all, none) } else { (none, all) };
        Tracker {
            pages,
            places_by_use,
            todo,
            unread,
            next: Bitmap::new(pages),
            sent: Bitmap::new(pages),
            sent_unseen: Bitmap::new(pages),
            zero: Bitmap::new(pages),
            sums: vec![0; pages as usize],
            scans: vec![0; pages as usize],
            dirty_blocks: Bitmap::new(pages.div_ceil(u64::from(BLOCK_PAGES))),
        }
    }

    /// Pages of the blocks in which a scan saw a page written.
    pub(super) fn pages_around_dirty(&self) -> u64 {
        self.dirty_blocks.count() * u64::from(BLOCK_PAGES)
    }

    pub(super) fn blocks(&self) -> u32 {
        (self.pages / u64::from(BLOCK_PAGES)) as u32
    }

    /// These blocks are tracked: all of their pages are to be sent.
    ///
    /// # Panics
    /// If they were tracked before.
    pub(super) fn tracked(&mut self, run: Run) {
        assert_eq!(self.unread.count_run(run), run.len, "{run:?} is read twice in one round");
        self.unread.clear_run(run);
        self.todo.set_run(run);
    }

    /// The blocks that are not tracked yet.
    pub(super) fn unread_blocks(&self) -> impl Iterator<Item = u32> {
        (0..self.blocks()).filter(|block| self.unread.get(PageNo::first_of(*block as usize)))
    }

    /// What was to come next is to be sent now.
    pub(super) fn begin_round(&mut self) {
        assert_eq!(self.unread.count(), 0, "a round begins before all of memory has been read once");
        assert_eq!(self.todo.count(), 0, "a round begins before the last has ended");
        std::mem::swap(&mut self.todo, &mut self.next);
    }

    /// These pages have left the guest, and may have been written before: they are dirty. That they left was the
    /// engine's choice, so they are not counted as in use.
    pub(super) fn departed(&mut self, run: Run) {
        for part in run.blocks() {
            if !self.unread.get(part.start) {
                self.comes_next(part);
            }
        }
    }

    fn comes_next(&mut self, run: Run) {
        if !planted!(ForgetsDirtyPages) || self.todo.count_run(run) == 0 {
            self.next.set_run(run);
        }
        self.todo.clear_run(run);
    }

    /// A scan found these pages dirty. They leave this round's list, because they will have to be read again anyway.
    /// Returns how many of them no scan had found before.
    pub(super) fn found_dirty(&mut self, run: Run) -> u64 {
        self.departed(run);
        let mut new = 0;
        for scans in &mut self.scans[run.indices()] {
            new += u64::from(*scans == 0);
            *scans = scans.saturating_add(1);
        }
        for block in run.start.block()..=run.start.plus(run.len - 1).block() {
            self.dirty_blocks.set(PageNo(block as u64));
        }
        new
    }

    /// From the first to the last page of a block that is to be sent now.
    pub(super) fn cover(&self, block: u32) -> Option<Run> {
        let run = Run::new(PageNo(u64::from(block) * u64::from(BLOCK_PAGES)), BLOCK_PAGES);
        let first = self.todo.first_in(run)?;
        let last = self.todo.pages_in(run).last()?;
        Some(Run::new(first, (last.0 - first.0) as u32 + 1))
    }

    /// The first page of the run that is to be sent now.
    pub(super) fn first_in(&self, run: Run) -> Option<PageNo> {
        self.todo.first_in(run)
    }

    /// All of them.
    pub(super) fn pages_in(&self, run: Run) -> impl Iterator<Item = PageNo> {
        self.todo.pages_in(run)
    }

    /// The page is taken, to be copied now.
    pub(super) fn take(&mut self, page: PageNo) {
        self.todo.clear(page);
    }

    /// The page cannot be sent just now.
    pub(super) fn defer(&mut self, page: PageNo) {
        self.todo.clear(page);
        self.next.set(page);
    }

    /// Whether content with this checksum is to be sent, because it differs from what was sent last. If so, it counts
    /// as sent. Where pages are placed by use, a page that was sent before any scan saw it written is sent again after
    /// the first that did, even unchanged: the target learns that the page is in use, and places it anew.
    pub(super) fn differs_from_sent(&mut self, page: PageNo, sum: u64) -> bool {
        let was_zero = self.zero.clear(page);
        let is_seen = self.scans[page.index()] > 0;
        let found = is_seen && self.sent_unseen.clear(page) && self.places_by_use;
        let news = self.sent.set(page) || was_zero || found || self.sums[page.index()] != sum;
        if !is_seen {
            self.sent_unseen.set(page);
        }
        self.sums[page.index()] = sum;
        news
    }

    /// Whether it is to be sent that the page reads as zeros. If so, it counts as sent.
    pub(super) fn differs_from_sent_zero(&mut self, page: PageNo) -> bool {
        let first = self.sent.set(page);
        self.zero.set(page) || first
    }

    /// The page counts as never sent: its content is lost, so whatever comes after is to be sent.
    pub(super) fn unsent(&mut self, page: PageNo) {
        self.sent.clear(page);
    }

    /// The untouched pages of a run, which are sent before all others.
    pub(super) fn sent_untouched(&mut self, run: Run) {
        self.todo.clear_run(run);
        self.sent.set_run(run);
        self.zero.set_run(run);
    }

    /// The engine's heat, corrected by what the scans have seen.
    pub(super) fn heat(&self, base: &[u8]) -> Vec<u8> {
        let known = base.iter().zip(&self.scans);
        known.map(|(heat, scans)| raise_for_scans(*heat, *scans)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_page_waits_for_the_next_round() {
        let mut tracker = Tracker::new(1024, true, true);
        assert_eq!(tracker.found_dirty(Run::new(PageNo(0), 510)), 510);
        assert_eq!(tracker.pages_around_dirty(), 512);
        assert_eq!(tracker.cover(0), Some(Run::new(PageNo(510), 2)));
        tracker.take(PageNo(511));
        assert_eq!(tracker.cover(0), Some(Run::one(PageNo(510))));
        tracker.todo.clear_run(Run::new(PageNo(0), 1024));
        tracker.begin_round();
        assert_eq!((tracker.todo.count(), tracker.next.count()), (510, 0));
    }

    #[test]
    fn what_the_source_pages_out_is_sent_again_and_not_taken_for_what_is_in_use() {
        let mut tracker = Tracker::new(1024, true, true);
        tracker.departed(Run::new(PageNo(512), 4));
        assert_eq!((tracker.next.count(), tracker.todo.count(), tracker.pages_around_dirty()), (4, 1020, 0));
        assert_eq!(tracker.found_dirty(Run::new(PageNo(514), 1)), 1, "never seen before");
        let heat = tracker.heat(&[1; 1024]);
        assert_eq!((heat[512], heat[513]), (1, 1));
        assert!(heat[514] > 1);
    }

    #[test]
    fn what_is_not_tracked_is_not_read_and_no_report_of_it_counts() {
        let mut tracker = Tracker::new(1536, true, false);
        let block = |nth: u64| Run::new(PageNo(nth * 512), 512);
        assert_eq!((tracker.todo.count(), tracker.unread.count()), (0, 1536));
        tracker.tracked(block(1));
        assert_eq!(tracker.unread_blocks().collect::<Vec<_>>(), [0, 2]);
        assert_eq!((tracker.cover(0), tracker.cover(1)), (None, Some(block(1))));
        // Across a border: the part that is tracked comes next, the other is still to be read.
        tracker.departed(Run::new(PageNo(500), 20));
        assert_eq!(tracker.found_dirty(Run::new(PageNo(1020), 10)), 10, "it tells of use all the same");
        let next: Vec<_> = tracker.next.pages_in(Run::new(PageNo(0), 1536)).map(|page| page.0).collect();
        assert_eq!(next, (512..520).chain(1020..1024).collect::<Vec<_>>());
        assert_eq!((tracker.todo.count(), tracker.unread.count()), (500, 1024));
        tracker.tracked(block(0));
        tracker.tracked(block(2));
        assert_eq!((tracker.todo.count(), tracker.unread.count(), tracker.next.count()), (1524, 0, 12));
    }

    #[test]
    fn only_news_is_sent() {
        let (mut tracker, page) = (Tracker::new(512, true, true), PageNo(7));
        assert!(tracker.differs_from_sent(page, 5));
        assert!(!tracker.differs_from_sent(page, 5));
        assert!(tracker.differs_from_sent_zero(page));
        assert!(!tracker.differs_from_sent_zero(page));
        assert!(tracker.differs_from_sent(page, 5));
        assert!(tracker.differs_from_sent(page, 6));
        tracker.unsent(page);
        assert!(tracker.differs_from_sent(page, 6));
        tracker.found_dirty(Run::one(page));
        assert!(tracker.differs_from_sent(page, 6), "the target does not know yet that it is in use");
        assert!(!tracker.differs_from_sent(page, 6));
        // A file knows nothing of use.
        let mut file = Tracker::new(512, false, true);
        assert!(file.differs_from_sent(page, 5));
        file.found_dirty(Run::one(page));
        assert!(!file.differs_from_sent(page, 5));
        assert!(file.differs_from_sent(page, 6));
        tracker.sent_untouched(Run::one(PageNo(8)));
        assert!(!tracker.differs_from_sent_zero(PageNo(8)));
        assert!(tracker.differs_from_sent(PageNo(8), 0));
    }
}
