//! Page numbers, staging slots and runs of them, and every conversion between them and bytes.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Bytes in a page of guest memory, in a host frame, and in one entry of the store.
pub const PAGE_SIZE: usize = 4096;
/// `log2(PAGE_SIZE)`.
pub const PAGE_SHIFT: u32 = 12;
/// Pages in a 2 MiB block: the unit of first-touch filling and of the table's summaries.
pub const BLOCK_PAGES: u32 = 512;

/// A page of guest memory, counted from the start of guest RAM (not a guest physical address where RAM has holes).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
pub struct PageNo(pub u64);

/// A place for one frame in the staging area.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Slot(pub u32);

/// Where pages are when they are not in RAM. Tier 0 is the VM's own store, the last one its origin.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct TierId(pub u8);

/// Tiers that a VM can have, the origin among them.
pub const TIERS_MAX: usize = 8;

impl TierId {
    /// The VM's own store.
    pub const STORE: TierId = TierId(0);

    /// Where a VM's pages were before it ran here: pages leave it and never enter, so it is no block's home.
    pub const ORIGIN: TierId = TierId(TIERS_MAX as u8 - 1);

    /// Index of the tier in a list with one element a tier.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl fmt::Display for TierId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            TierId::STORE => write!(f, "the store"),
            TierId::ORIGIN => write!(f, "the checkpoint it was restored from"),
            TierId(number) => write!(f, "tier {number}"),
        }
    }
}

/// `len` contiguous pages from `start`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Run {
    /// The first page.
    pub start: PageNo,
    /// How many pages.
    pub len: u32,
}

/// `len` contiguous staging slots from `start`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SlotRun {
    /// The first slot.
    pub start: Slot,
    /// How many slots.
    pub len: u32,
}

impl PageNo {
    /// Byte offset of the page in guest memory.
    pub fn offset(self) -> u64 {
        self.0 << PAGE_SHIFT
    }

    /// The page in which this byte of guest memory lies.
    pub fn from_offset(bytes: u64) -> Self {
        PageNo(bytes >> PAGE_SHIFT)
    }

    /// Index of the page in a list with one element a page.
    pub fn index(self) -> usize {
        self.0 as usize
    }

    /// The 2 MiB block that holds the page.
    pub fn block(self) -> usize {
        (self.0 / u64::from(BLOCK_PAGES)) as usize
    }

    /// First page of this 2 MiB block.
    pub fn first_of(block: usize) -> Self {
        PageNo(block as u64 * u64::from(BLOCK_PAGES))
    }

    /// First page of the next 2 MiB block, wherever the memory of this one ends.
    #[must_use]
    pub fn next_block(self) -> Self {
        PageNo((self.block() as u64 + 1) * u64::from(BLOCK_PAGES))
    }

    /// The page so many pages behind this one, which may lie beyond the memory.
    #[must_use]
    pub fn plus(self, pages: u32) -> Self {
        PageNo(self.0 + u64::from(pages))
    }
}

impl fmt::Display for PageNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {}", self.0)
    }
}

impl Slot {
    /// Byte offset of the slot in the staging area.
    pub fn offset(self) -> usize {
        (self.0 as usize) << PAGE_SHIFT
    }

    /// Index of the slot in a list with one element a slot.
    pub fn index(self) -> usize {
        self.0 as usize
    }

    /// The slot so many slots behind this one, which may lie beyond the staging area.
    #[must_use]
    pub fn plus(self, slots: u32) -> Self {
        Slot(self.0 + slots)
    }
}

impl Run {
    /// `len` pages from `start` on.
    pub fn new(start: PageNo, len: u32) -> Self {
        Run { start, len }
    }

    /// A run of this page alone.
    pub fn one(page: PageNo) -> Self {
        Run { start: page, len: 1 }
    }

    /// First page behind the run.
    pub fn end(self) -> PageNo {
        self.start.plus(self.len)
    }

    /// Whether the page is one of the run.
    pub fn contains(self, page: PageNo) -> bool {
        self.start <= page && page < self.end()
    }

    /// The pages of the run, in ascending order.
    pub fn pages(self) -> impl DoubleEndedIterator<Item = PageNo> + Clone {
        (self.start.0..self.end().0).map(PageNo)
    }

    /// Bytes of all its pages.
    pub fn bytes(self) -> usize {
        (self.len as usize) << PAGE_SHIFT
    }

    /// Index range of the run in a slice with one element a page.
    pub fn indices(self) -> Range<usize> {
        self.start.index()..self.end().index()
    }

    /// Its parts that lie in one block of 2 MiB each, in ascending order.
    pub fn blocks(self) -> impl Iterator<Item = Run> {
        let mut rest = self;
        std::iter::from_fn(move || {
            let room = BLOCK_PAGES - (rest.start.0 % u64::from(BLOCK_PAGES)) as u32;
            let part = rest.part(0, rest.len.min(room));
            rest = rest.part(part.len, rest.len - part.len);
            (part.len > 0).then_some(part)
        })
    }

    /// `len` pages of the run from its `skip`th.
    #[must_use]
    pub fn part(self, skip: u32, len: u32) -> Run {
        assert!(skip + len <= self.len, "part {skip}+{len} of a run of {}", self.len);
        Run { start: self.start.plus(skip), len }
    }
}

impl SlotRun {
    /// `len` slots from `start` on.
    pub fn new(start: Slot, len: u32) -> Self {
        SlotRun { start, len }
    }

    /// Whether the slot is one of the run.
    pub fn contains(self, slot: Slot) -> bool {
        self.start <= slot && slot.0 < self.start.0 + self.len
    }

    /// The slots of the run, in ascending order.
    pub fn slots(self) -> impl DoubleEndedIterator<Item = Slot> + Clone {
        (self.start.0..self.start.0 + self.len).map(Slot)
    }

    /// Bytes of the frames in all its slots.
    pub fn bytes(self) -> usize {
        (self.len as usize) << PAGE_SHIFT
    }

    /// `len` slots of the run from its `skip`th.
    #[must_use]
    pub fn part(self, skip: u32, len: u32) -> SlotRun {
        assert!(skip + len <= self.len, "part {skip}+{len} of a slot run of {}", self.len);
        SlotRun { start: self.start.plus(skip), len }
    }
}

/// Whole pages in `bytes`, rounded down.
pub fn pages_in(bytes: u64) -> u64 {
    bytes >> PAGE_SHIFT
}

/// Bytes of `pages` pages.
pub fn bytes_of(pages: u64) -> u64 {
    pages << PAGE_SHIFT
}

/// Groups an ascending sequence of pages into maximal runs of at most `max` pages.
pub fn runs_of(pages: impl IntoIterator<Item = PageNo>, max: u32) -> impl Iterator<Item = Run> {
    let mut pages = pages.into_iter().peekable();
    std::iter::from_fn(move || {
        let mut run = Run::one(pages.next()?);
        while run.len < max && pages.next_if(|page| *page == run.end()).is_some() {
            run.len += 1;
        }
        Some(run)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_maximal_and_capped() {
        let pages = [1, 2, 3, 7, 9, 10, 11, 12].map(PageNo);
        let runs: Vec<_> = runs_of(pages, 3).map(|run| (run.start.0, run.len)).collect();
        assert_eq!(runs, [(1, 3), (7, 1), (9, 3), (12, 1)]);
    }
}
