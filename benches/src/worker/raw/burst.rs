//! Writes are collected and started as a burst, in the order of their places in the file; between bursts the device
//! has none. A read that meets writes takes longer however few they are, so writes one by one would slow down all
//! reads. The engine under test writes in the same way.

use swapd::{PageNo, Run};

use super::plan::JOINED_PAGES;

/// A burst is started when so many pages wait to be written.
const BURST_PAGES: u32 = 512;
/// Most pages that wait while the burst before them is written. Beyond that, threads wait as well.
const WAITING_PAGES: u32 = 2 * BURST_PAGES;

const _: () = assert!(WAITING_PAGES > BURST_PAGES, "what waits must become a burst");

/// A write that a thread has asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Write {
    pub(super) thread: usize,
    pub(super) run: Run,
    /// Touches of its thread that are done when this write is.
    pub(super) touches: u64,
}

#[derive(Debug, Default)]
pub(super) struct WriteBehind {
    waiting: Vec<Write>,
    waiting_pages: u32,
    /// Writes of the burst that are still to be started, the next one last.
    burst: Vec<Write>,
}

impl WriteBehind {
    /// Whether threads must wait before they write more.
    pub(super) fn is_full(&self) -> bool {
        self.waiting_pages >= WAITING_PAGES
    }

    pub(super) fn add(&mut self, write: Write) {
        self.waiting.push(write);
        self.waiting_pages += write.run.len;
    }

    /// The next write to start. Writes that do not make a burst yet stay, unless `all`.
    pub(super) fn next(&mut self, all: bool) -> Option<Write> {
        if self.burst.is_empty() && (all || self.waiting_pages >= BURST_PAGES) {
            self.begin();
        }
        self.burst.pop()
    }

    fn begin(&mut self) {
        self.waiting_pages = 0;
        self.waiting.sort_by_key(|write| write.run.start);
        for write in self.waiting.drain(..) {
            match self.burst.last_mut() {
                Some(before) if before.takes(&write) => {
                    before.run.len += write.run.len;
                    before.touches = before.touches.max(write.touches);
                }
                _ => self.burst.push(write),
            }
        }
        self.burst.reverse();
    }
}

impl Write {
    /// Whether this write and the one behind it can be one write.
    fn takes(&self, behind: &Write) -> bool {
        let next: PageNo = self.run.end();
        self.thread == behind.thread
            && next == behind.run.start
            && self.run.len + behind.run.len <= JOINED_PAGES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(thread: usize, start: u64, len: u32) -> Write {
        Write { thread, run: Run::new(PageNo(start), len), touches: start }
    }

    #[test]
    fn writes_wait_until_they_make_a_burst() {
        let mut behind = WriteBehind::default();
        let pages = 1..u64::from(BURST_PAGES);
        pages.clone().rev().for_each(|page| behind.add(write(0, 2 * page, 1)));
        assert_eq!(behind.next(false), None);
        behind.add(write(1, 0, 1));
        let burst: Vec<_> = std::iter::from_fn(|| behind.next(false)).collect();
        let sorted: Vec<_> =
            std::iter::once(write(1, 0, 1)).chain(pages.map(|page| write(0, 2 * page, 1))).collect();
        assert_eq!(burst, sorted);
        behind.add(write(0, 7, 3));
        assert_eq!((behind.next(false), behind.next(true)), (None, Some(write(0, 7, 3))));
        assert_eq!(behind.next(true), None);
    }

    #[test]
    fn neighbours_of_one_lane_are_one_write() {
        let mut behind = WriteBehind::default();
        for (thread, start, len) in [(0, 12, 2), (0, 10, 2), (1, 14, 1), (0, 20, JOINED_PAGES), (0, 19, 1)] {
            behind.add(write(thread, start, len));
        }
        let burst: Vec<_> = std::iter::from_fn(|| behind.next(true)).collect();
        // One thread's progress is none of another's, and a write has its limit.
        let joined = Write { touches: 12, ..write(0, 10, 4) };
        assert_eq!(burst, [joined, write(1, 14, 1), write(0, 19, 1), write(0, 20, JOINED_PAGES)]);
    }

    #[test]
    fn lanes_wait_while_too_much_is_waiting() {
        let mut behind = WriteBehind::default();
        let mut page = 0;
        while !behind.is_full() {
            behind.add(write(0, page, 1));
            page += 2;
        }
        assert_eq!(page, 2 * u64::from(WAITING_PAGES));
        assert!(behind.next(false).is_some() && !behind.is_full());
    }
}
