//! The order in which a restored VM's pages come in, as the next restore of the same checkpoint is to bring them.
//!
//! A fault stands for its 64 KiB of the image: a read brings its neighbours along, and which of them the guest goes on
//! to touch is not seen, for they are there by then. Other pages that came without being waited for, because a prefetch
//! or a fetch brought them ahead of any touch, are in the order behind the faults that were seen until then.

use swapd::{PageNo, Run};

use super::image::Image;

/// Pages that come in with one that is touched.
const CLUSTER_PAGES: u64 = 16;

/// Pages as they come in.
#[derive(Clone, Debug)]
pub struct FirstTouches {
    /// One bit for each cluster of memory.
    seen: Vec<u64>,
    runs: Vec<Run>,
    pages: u64,
    pages_max: u64,
}

impl FirstTouches {
    /// Of an image's pages; more than `pages_max` (the budget) would push each other out when they are brought.
    pub fn new(image: &Image, pages_max: u64) -> FirstTouches {
        let clusters = image.pages().div_ceil(CLUSTER_PAGES);
        let seen = vec![0; clusters.div_ceil(64) as usize];
        FirstTouches { seen, runs: Vec::new(), pages: 0, pages_max }
    }

    /// The guest waited for this page.
    pub fn touched(&mut self, image: &Image, page: PageNo) {
        self.came(image, Run::one(page));
    }

    /// These pages were brought ahead of any touch, or with one.
    pub fn came(&mut self, image: &Image, run: Run) {
        if run.len == 0 || run.end().0 > image.pages() {
            return;
        }
        for cluster in run.start.0 / CLUSTER_PAGES..=(run.end().0 - 1) / CLUSTER_PAGES {
            let (word, bit) = ((cluster / 64) as usize, 1 << (cluster % 64));
            if self.seen[word] & bit != 0 || self.is_full() {
                continue;
            }
            self.seen[word] |= bit;
            let first = cluster * CLUSTER_PAGES;
            let pages = CLUSTER_PAGES.min(image.pages() - first);
            for part in image.stored_in(Run::new(PageNo(first), pages as u32)) {
                self.append(part);
            }
        }
    }

    /// As many pages came as the budget holds: what comes now pushes others out.
    pub fn is_full(&self) -> bool {
        self.pages >= self.pages_max
    }

    /// The order.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    fn append(&mut self, part: Run) {
        self.pages += u64::from(part.len);
        match self.runs.last_mut() {
            Some(last) if last.end() == part.start => last.len += part.len,
            _ => self.runs.push(part),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::restore::image::tests::{image, run};

    #[test]
    fn a_fault_stands_for_its_cluster_once_and_in_its_place() {
        let image = image(1000, &[run(0, 100), run(120, 880)], &[], Vec::new());
        let mut order = FirstTouches::new(&image, 100);
        order.touched(&image, PageNo(500));
        // With the part of its cluster that has content.
        order.touched(&image, PageNo(99));
        order.touched(&image, PageNo(510));
        order.touched(&image, PageNo(501));
        // The last cluster is shorter; beyond the memory is nothing.
        order.touched(&image, PageNo(999));
        order.touched(&image, PageNo(1000));
        assert_eq!(order.runs(), [run(496, 16), run(96, 4), run(992, 8)]);
        // Two clusters beside each other are one run.
        order.came(&image, run(130, 20));
        assert_eq!(order.runs()[3..], [run(128, 32)]);
        assert!(!order.is_full());
        order.came(&image, run(300, 400));
        assert!(order.is_full() && order.runs().iter().map(|run| run.len).sum::<u32>() < 117);
    }
}
