//! Memory into which pages are read: head room for the sink, then the pages, in one aligned piece. So a sink can put a
//! header before the pages and have all of it leave in one write, and the store can be read straight into it.
//!
//! ```text
//!   0            head                            head + pages x 4096
//!   ├─ head room ──┼─ content of the pages ──────────┤
//! ```

use std::rc::Rc;

use swapd::digest::{is_zero, page_sum};
use swapd::{PAGE_SIZE, PageNo, Run};

use crate::region::{Pages, Region};

/// Pages, with their numbers and checksums.
#[derive(Debug)]
pub struct PageBuffer {
    memory: Rc<Pages>,
    head: usize,
    max_pages: u32,
    runs: Vec<Run>,
    sums: Vec<u64>,
}

/// What a copied page turned out to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Content {
    Zero,
    Sum(u64),
}

impl PageBuffer {
    /// An empty buffer for at most `max_pages` pages, behind head room of at least `head_bytes`.
    pub fn new(head_bytes: usize, max_pages: u32) -> PageBuffer {
        // In whole pages, so that the content is aligned.
        let head = head_bytes.next_multiple_of(PAGE_SIZE);
        let pages = max_pages as usize;
        PageBuffer {
            memory: Pages::new(head + pages * PAGE_SIZE),
            head,
            max_pages,
            runs: Vec::with_capacity(pages),
            sums: Vec::with_capacity(pages),
        }
    }

    /// Empties it, to be filled again.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.sums.clear();
    }

    /// How many pages are in it.
    pub fn pages(&self) -> u32 {
        self.sums.len() as u32
    }

    /// How many more pages would fit.
    pub fn room(&self) -> u32 {
        self.max_pages - self.pages()
    }

    /// Which pages are in it, in the order of [`content`](Self::content). Each run lies within one 2 MiB block.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The checksum of each page.
    pub fn sums(&self) -> &[u64] {
        &self.sums
    }

    /// The bytes of the pages, one behind the other.
    pub fn content(&self) -> &[u8] {
        let bytes = self.pages() as usize * PAGE_SIZE;
        // SAFETY: within the allocation, and initialised. No operation is in flight on it: those are made from a buffer
        // that is borrowed mutably until they have ended.
        unsafe { std::slice::from_raw_parts(self.memory.base().add(self.head), bytes) }
    }

    /// The same, to be changed in place before the buffer goes away: encrypted. The [sums](Self::sums) stay those of what
    /// was there.
    pub fn content_mut(&mut self) -> &mut [u8] {
        let bytes = self.pages() as usize * PAGE_SIZE;
        // SAFETY: as in `content`, and the buffer is borrowed mutably: nobody else looks at it meanwhile.
        unsafe { std::slice::from_raw_parts_mut(self.memory.base().add(self.head), bytes) }
    }

    /// Offset of a page.
    fn at(&self, index: u32) -> usize {
        self.head + index as usize * PAGE_SIZE
    }

    /// Copies a page behind the buffer's last and looks at the copy. It belongs to the buffer only once it is
    /// [kept](Self::keep).
    ///
    /// # Safety
    /// `from` must be readable for a page. The guest may be writing to it.
    pub(crate) unsafe fn copy(&mut self, page: PageNo, from: *const u8) -> Content {
        assert!(self.room() > 0, "a buffer with more pages than it can have");
        // SAFETY: the destination is within our memory and no operation is in flight on it (the buffer is with us). The
        // source is readable by the caller's promise. A racing writer makes the copy a mixture, which is not used: the
        // page is found dirty by the next scan. What is summed and given away is the copy.
        let bytes = unsafe {
            let to = self.memory.base().add(self.at(self.pages()));
            std::ptr::copy_nonoverlapping(from, to, PAGE_SIZE);
            std::slice::from_raw_parts(to, PAGE_SIZE)
        };
        if is_zero(bytes) { Content::Zero } else { Content::Sum(page_sum(page, bytes)) }
    }

    /// The page that was copied or read last is part of the buffer.
    pub(crate) fn keep(&mut self, page: PageNo, sum: u64) {
        self.sums.push(sum);
        match self.runs.last_mut() {
            Some(run) if run.end() == page && run.start.block() == page.block() => run.len += 1,
            _ => self.runs.push(Run::one(page)),
        }
    }

    /// Room for `pages` more, to be read into.
    pub(super) fn tail(&mut self, pages: u32) -> Region<Rc<Pages>> {
        assert!(pages <= self.room(), "a buffer with more pages than it can have");
        let from = self.at(self.pages());
        // SAFETY: bytes behind the buffer's last page, which nothing else uses while the reader awaits its completion.
        unsafe { self.memory.region(from, from + pages as usize * PAGE_SIZE) }
    }

    /// The last bytes of the head room, right before the pages, to be written to; and the pages' runs and checksums.
    pub(crate) fn head_room(&mut self, bytes: usize) -> (&mut [u8], &[Run], &[u64]) {
        assert!(bytes <= self.head, "{bytes} bytes of head room, of {}", self.head);
        let from = self.head - bytes;
        // SAFETY: within our memory, borrowed alone, with no operation in flight on it.
        let room = unsafe { std::slice::from_raw_parts_mut(self.memory.base().add(from), bytes) };
        (room, &self.runs, &self.sums)
    }

    /// Some of its pages, for one operation, which has the buffer until it has ended.
    ///
    /// # Panics
    /// If it has not so many.
    pub fn into_part(self, first: u32, pages: u32) -> Region<PageBuffer> {
        assert!(first + pages <= self.pages(), "{pages} pages from {first} on, of {}", self.pages());
        // SAFETY: within our memory, which lives as long as the buffer and stays where it is. Nobody can use it
        // meanwhile: the region has the buffer.
        unsafe {
            let from = self.memory.base().add(self.at(first));
            Region::new(from, pages as usize * PAGE_SIZE, self)
        }
    }

    /// The last `head_bytes` of the head room and all pages, for one operation. The caller keeps the buffer as it is
    /// until that has ended.
    pub(crate) fn whole(&mut self, head_bytes: usize) -> Region<Rc<Pages>> {
        let (from, to) = (self.head - head_bytes, self.at(self.pages()));
        // SAFETY: the caller's promise.
        unsafe { self.memory.region(from, to) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zero_page_is_seen() {
        let mut buffer = PageBuffer::new(0, 4);
        // SAFETY: the array is a page.
        assert_eq!(unsafe { buffer.copy(PageNo(0), [0; PAGE_SIZE].as_ptr()) }, Content::Zero);
        assert_eq!((buffer.pages(), buffer.content().len()), (0, 0));
    }

    #[test]
    fn pages_lie_behind_the_head_room_one_after_the_other() {
        let mut buffer = PageBuffer::new(100, 4);
        for (page, byte) in [(5, 1), (6, 2), (9, 3)] {
            // SAFETY: the array is a page.
            let content = unsafe { buffer.copy(PageNo(page), [byte; PAGE_SIZE].as_ptr()) };
            let Content::Sum(sum) = content else { panic!("not zero") };
            buffer.keep(PageNo(page), sum);
        }
        assert_eq!((buffer.pages(), buffer.room()), (3, 1));
        assert_eq!(buffer.runs(), [Run::new(PageNo(5), 2), Run::one(PageNo(9))]);
        assert_eq!(buffer.content()[2 * PAGE_SIZE], 3);
        let part = buffer.into_part(1, 2);
        assert_eq!((part.bytes().len(), part.bytes()[0]), (2 * PAGE_SIZE, 2));
        let mut buffer = part.into_keep();
        buffer.head_room(100).0.fill(7);
        let whole = buffer.whole(100);
        assert_eq!((whole.bytes()[0], whole.bytes()[99], whole.bytes()[100]), (7, 7, 1));
        assert_eq!(whole.bytes().len(), 100 + 3 * PAGE_SIZE);
    }
}
