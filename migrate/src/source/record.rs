//! A record of pages while it is being put together: head room, then up to 256 pages, in one aligned buffer, so that it
//! leaves in one write and the store can be read straight into it.
//!
//! ```text
//!   0        HEAD - header - meta          HEAD                         HEAD + pages x 4096
//!   ├─ unused ─┼─ header, runs, checksums ─┼─ content of the pages ────────────┤
//! ```

use std::rc::Rc;

use swapd::digest::{is_zero, page_sum};
use swapd::{PAGE_SIZE, PageNo, Run};

use crate::link::region::{Pages, Region};
use crate::wire::extents;
use crate::wire::record::{HEADER_BYTES, Header, Kind, MAX_DATA_META, MAX_RECORD_PAGES, Sequence};

/// Room for the header and metadata, in whole pages so that the content is aligned.
const HEAD: usize = (HEADER_BYTES + MAX_DATA_META).next_multiple_of(PAGE_SIZE);

#[derive(Debug)]
pub(crate) struct Record {
    buffer: Rc<Pages>,
    runs: Vec<Run>,
    sums: Vec<u64>,
}

/// What a copied page turned out to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Content {
    Zero,
    Sum(u64),
}

impl Record {
    pub(crate) fn new() -> Record {
        let pages = MAX_RECORD_PAGES as usize;
        Record {
            buffer: Pages::new(HEAD + pages * PAGE_SIZE),
            runs: Vec::with_capacity(pages),
            sums: Vec::with_capacity(pages),
        }
    }

    pub(crate) fn clear(&mut self) {
        self.runs.clear();
        self.sums.clear();
    }

    pub(crate) fn pages(&self) -> u32 {
        self.sums.len() as u32
    }

    pub(crate) fn room(&self) -> u32 {
        MAX_RECORD_PAGES - self.pages()
    }

    fn at(&self, index: u32) -> usize {
        HEAD + index as usize * PAGE_SIZE
    }

    /// Copies a page behind the record's last and looks at the copy. It belongs to the record only once it is [kept](Self::keep).
    ///
    /// # Safety
    /// `from` must be readable for a page. The guest may be writing to it.
    pub(crate) unsafe fn copy(&mut self, page: PageNo, from: *const u8) -> Content {
        assert!(self.room() > 0, "a record with more pages than it can have");
        // SAFETY: the destination is within our buffer and no operation is in flight on it (the record is with us). The
        // source is readable by the caller's promise. A racing writer makes the copy a mixture, which is not used: the page is
        // found written by the next scan. What is summed and sent is the copy.
        let bytes = unsafe {
            let to = self.buffer.base().add(self.at(self.pages()));
            std::ptr::copy_nonoverlapping(from, to, PAGE_SIZE);
            std::slice::from_raw_parts(to, PAGE_SIZE)
        };
        if is_zero(bytes) { Content::Zero } else { Content::Sum(page_sum(page, bytes)) }
    }

    /// The page that was copied last is part of the record.
    pub(crate) fn keep(&mut self, page: PageNo, sum: u64) {
        self.sums.push(sum);
        match self.runs.last_mut() {
            Some(run) if run.end() == page && run.start.block() == page.block() => run.len += 1,
            _ => self.runs.push(Run::one(page)),
        }
    }

    /// Room for `pages` more, to be read into.
    pub(crate) fn tail(&mut self, pages: u32) -> Region<Rc<Pages>> {
        assert!(pages <= self.room(), "a record with more pages than it can have");
        let from = self.at(self.pages());
        // SAFETY: bytes behind the record's last page, which nothing else uses while the reader awaits its completion.
        unsafe { self.buffer.region(from, from + pages as usize * PAGE_SIZE) }
    }

    /// Seals the record: the bytes to send.
    pub(crate) fn seal(&mut self, sequence: &mut Sequence) -> Region<Rc<Pages>> {
        let meta_bytes = 8 * (self.runs.len() + self.sums.len());
        let header = Header {
            kind: Kind::Pages,
            flags: 0,
            pages: self.pages(),
            number: self.runs.len() as u64,
            meta_bytes: meta_bytes as u32,
            payload_bytes: self.pages() << swapd::PAGE_SHIFT,
        };
        let start = HEAD - meta_bytes - HEADER_BYTES;
        // SAFETY: the head room of our own buffer, with no operation in flight on it.
        let head = unsafe { std::slice::from_raw_parts_mut(self.buffer.base().add(start), HEAD - start) };
        let (header_bytes, meta) = head.split_at_mut(HEADER_BYTES);
        let words = self.runs.iter().map(|run| extents::encode(*run));
        let words = words.chain(self.sums.iter().map(|sum| sum.to_le_bytes()));
        meta.as_chunks_mut().0.iter_mut().zip(words).for_each(|(into, word)| *into = word);
        header_bytes.copy_from_slice(&header.seal(meta, sequence));
        // SAFETY: the record is borrowed until it is sent, and the borrowing sender does nothing else with it.
        unsafe { self.buffer.region(start, self.at(self.pages())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::SessionId;
    use crate::wire::extents::Bounds;
    use crate::wire::record::Lane;

    #[test]
    fn a_record_is_header_runs_sums_and_content_in_one_piece() {
        let sequence = || Sequence::new(SessionId([1; 16]), Lane::Stream(0));
        let mut record = Record::new();
        for (page, byte) in [(5, 1), (6, 2), (9, 3)] {
            let page = PageNo(page);
            let bytes = [byte; PAGE_SIZE];
            // SAFETY: the array is a page.
            let Content::Sum(sum) = (unsafe { record.copy(page, bytes.as_ptr()) }) else {
                panic!("not zero")
            };
            record.keep(page, sum);
        }
        let region = record.seal(&mut sequence());
        let (head, rest) = region.bytes().split_first_chunk::<HEADER_BYTES>().unwrap();
        let header = Header::open(head).unwrap();
        let (meta, content) = rest.split_at(header.meta_bytes as usize);
        Header::verify(head, meta, &mut sequence()).unwrap();
        let mut runs = Vec::new();
        let bounds = Bounds { memory_pages: 512, stream: 0, streams: 1 };
        bounds.decode(&meta[..16], 3, &mut runs).unwrap();
        assert_eq!(runs, [Run::new(PageNo(5), 2), Run::one(PageNo(9))]);
        assert_eq!(content.len(), 3 * PAGE_SIZE);
        assert_eq!(content[2 * PAGE_SIZE], 3);
    }

    #[test]
    fn a_zero_page_is_seen() {
        let mut record = Record::new();
        // SAFETY: the array is a page.
        assert_eq!(unsafe { record.copy(PageNo(0), [0; PAGE_SIZE].as_ptr()) }, Content::Zero);
        assert_eq!(record.pages(), 0);
    }
}
