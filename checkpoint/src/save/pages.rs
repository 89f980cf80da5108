//! What an image has of each page, and what the checkpoint says of it: values in, values out.
//!
//! ```text
//!   found as zeros, or lost ──▶ Zero, Lost      (the image may have an old version: a hole in the end)
//!   has the base's content  ──▶ Base, or Here if the image began as the base's clone and was not changed there
//!   has other content       ──▶ Here, written
//! ```

use swapd::{PageNo, Run};

use super::options::Base;
use crate::format::{MapBuilder, MemoryMap, PageKind};
use crate::outside::planted;

/// The image has blocks for the page.
const IN_IMAGE: u8 = 1;
/// What the image has of the page has been written since, so it is not the base's any more.
const CHANGED: u8 = 2;

#[derive(Debug)]
pub(super) struct PageTable {
    map: MapBuilder,
    /// A byte a page, of the bits above.
    image: Vec<u8>,
    base: Option<Base>,
}

impl PageTable {
    /// Of a memory of so many pages, none of which has been found yet.
    ///
    /// # Panics
    /// If the base's memory is of another size.
    pub(super) fn new(pages: u64, base: Option<Base>) -> PageTable {
        // Zeroed by the kernel when it is first touched.
        let mut image = vec![0; pages as usize];
        if let Some(base) = &base {
            assert_eq!(base.map.pages(), pages, "a base of another size");
            if base.cloned {
                let here = base.map.pieces().filter(|piece| piece.kind == PageKind::Here);
                here.for_each(|piece| image[piece.run.indices()].fill(IN_IMAGE));
            }
        }
        PageTable { map: MapBuilder::new(pages), image, base }
    }

    /// The pages are being written into the image.
    pub(super) fn writes(&mut self, run: Run, sums: &[u64]) {
        if !(planted!(KeepsOldSums) && self.map.kind(run.start) == PageKind::Here) {
            self.map.set_content(run, PageKind::Here, sums);
        }
        self.image[run.indices()].fill(IN_IMAGE | CHANGED);
    }

    /// What the image has of the pages is not certain from now on, until they are [written](Self::writes).
    pub(super) fn may_change(&mut self, run: Run) {
        self.image[run.indices()].fill(IN_IMAGE | CHANGED);
    }

    /// Whether the page need not be written, because the base has this content of it. If so, that is noted.
    pub(super) fn is_in_base(&mut self, page: PageNo, sum: u64) -> bool {
        let has = |base: &&Base| {
            let known = base.map.sum(page);
            known == Some(sum) || (known.is_some() && planted!(BelievesTheBase))
        };
        let Some(base) = self.base.as_ref().filter(has) else { return false };
        let kind = match base.cloned && base.map.kind(page) == PageKind::Here {
            true if self.image[page.index()] & CHANGED != 0 && !planted!(BelievesTheClone) => return false,
            true => PageKind::Here,
            false => PageKind::Base,
        };
        self.map.set_content(Run::one(page), kind, &[sum]);
        true
    }

    /// The pages have no content.
    pub(super) fn is_bare(&mut self, run: Run, kind: PageKind) {
        if !planted!(ForgetsWhatIsBare) {
            self.map.set(run, kind);
        }
    }

    /// What the image has, and the checkpoint has not: holes are to be there.
    pub(super) fn holes(&self) -> Vec<Run> {
        let mut holes: Vec<Run> = Vec::new();
        for (index, _) in self.image.iter().enumerate().filter(|(_, bits)| **bits & IN_IMAGE != 0) {
            let page = PageNo(index as u64);
            if self.map.kind(page) == PageKind::Here {
                continue;
            }
            match holes.last_mut() {
                Some(run) if run.end() == page && run.len < u32::MAX => run.len += 1,
                _ => holes.push(Run::one(page)),
            }
        }
        holes
    }

    /// The checkpoint's map.
    pub(super) fn finish(&self, heat: &[u8]) -> MemoryMap {
        self.map.finish(heat)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(cloned: bool) -> Base {
        let mut map = MapBuilder::new(512);
        map.set_content(Run::new(PageNo(0), 4), PageKind::Here, &[10, 11, 12, 13]);
        map.set_content(Run::new(PageNo(4), 2), PageKind::Base, &[14, 15]);
        Base { map: map.finish(&[]), cloned }
    }

    #[test]
    fn what_the_base_has_is_not_written() {
        let mut table = PageTable::new(512, Some(base(false)));
        assert!(table.is_in_base(PageNo(0), 10) && table.is_in_base(PageNo(4), 14));
        assert!(!table.is_in_base(PageNo(1), 10) && !table.is_in_base(PageNo(9), 0));
        table.writes(Run::one(PageNo(1)), &[10]);
        // It has become what it was: what the image has of it is in the way.
        assert!(table.is_in_base(PageNo(1), 11));
        let map = table.finish(&[]);
        assert_eq!(
            [0, 1, 4, 5].map(|page| map.kind(PageNo(page))),
            [PageKind::Base, PageKind::Base, PageKind::Base, PageKind::Zero]
        );
        assert_eq!(table.holes(), [Run::one(PageNo(1))]);
    }

    #[test]
    fn what_may_have_changed_in_a_clone_is_written_again() {
        let mut table = PageTable::new(512, Some(base(true)));
        table.may_change(Run::new(PageNo(0), 2));
        // It became what the base has while it could not be shared: the image may have something else there.
        assert!(!table.is_in_base(PageNo(0), 10) && table.is_in_base(PageNo(2), 12));
        table.is_bare(Run::one(PageNo(1)), PageKind::Zero);
        table.writes(Run::one(PageNo(0)), &[10]);
        assert_eq!(table.holes(), [Run::one(PageNo(1)), Run::one(PageNo(3))]);
    }

    #[test]
    fn what_a_clone_has_stays_in_it_unless_it_was_changed() {
        let mut table = PageTable::new(512, Some(base(true)));
        assert!(table.is_in_base(PageNo(0), 10) && table.is_in_base(PageNo(4), 14));
        table.writes(Run::one(PageNo(1)), &[7]);
        assert!(!table.is_in_base(PageNo(1), 11), "the image has something else there by now");
        table.writes(Run::one(PageNo(1)), &[11]);
        table.is_bare(Run::one(PageNo(3)), PageKind::Lost);
        let map = table.finish(&[]);
        let kinds = [PageKind::Here, PageKind::Here, PageKind::Zero, PageKind::Lost, PageKind::Base];
        assert_eq!([0, 1, 2, 3, 4].map(|page| map.kind(PageNo(page))), kinds);
        assert_eq!(table.holes(), [Run::new(PageNo(2), 2)]);
    }
}
