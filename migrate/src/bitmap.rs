//! One bit a page.

use swapd::{PageNo, Run};

/// A set of pages of a VM, with its count at hand.
#[derive(Clone, Debug)]
pub(crate) struct Bitmap {
    words: Vec<u64>,
    pages: u64,
    count: u64,
}

impl Bitmap {
    pub(crate) fn new(pages: u64) -> Bitmap {
        Bitmap { words: vec![0; pages.div_ceil(64) as usize], pages, count: 0 }
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    pub(crate) fn is_full(&self) -> bool {
        self.count == self.pages
    }

    pub(crate) fn get(&self, page: PageNo) -> bool {
        assert!(page.0 < self.pages, "{page} of {} pages", self.pages);
        self.words[page.index() / 64] >> (page.0 % 64) & 1 == 1
    }

    /// Adds a page; says whether it is new.
    pub(crate) fn set(&mut self, page: PageNo) -> bool {
        let new = !self.get(page);
        self.words[page.index() / 64] |= 1 << (page.0 % 64);
        self.count += u64::from(new);
        new
    }

    /// Removes a page; says whether it was there.
    pub(crate) fn clear(&mut self, page: PageNo) -> bool {
        let was = self.get(page);
        self.words[page.index() / 64] &= !(1 << (page.0 % 64));
        self.count -= u64::from(was);
        was
    }

    pub(crate) fn set_run(&mut self, run: Run) {
        self.for_words(run, |word, mask| *word |= mask, |had, mask| i64::from((mask & !had).count_ones()));
    }

    pub(crate) fn clear_run(&mut self, run: Run) {
        self.for_words(run, |word, mask| *word &= !mask, |had, mask| -i64::from((mask & had).count_ones()));
    }

    /// How many pages of the run are in the set.
    pub(crate) fn count_run(&self, run: Run) -> u32 {
        masks(run).map(|(at, mask)| (self.words[at] & mask).count_ones()).sum()
    }

    /// The first page of the set that is in the run.
    pub(crate) fn first_in(&self, run: Run) -> Option<PageNo> {
        masks(run).find_map(|(at, mask)| match self.words[at] & mask {
            0 => None,
            bits => Some(PageNo(at as u64 * 64 + u64::from(bits.trailing_zeros()))),
        })
    }

    /// The pages of the set that are in the run, ascending.
    pub(crate) fn pages_in(&self, run: Run) -> impl Iterator<Item = PageNo> + '_ {
        masks(run).flat_map(|(at, mask)| {
            let mut bits = self.words[at] & mask;
            std::iter::from_fn(move || {
                (bits != 0).then(|| {
                    let bit = bits.trailing_zeros();
                    bits &= bits - 1;
                    PageNo(at as u64 * 64 + u64::from(bit))
                })
            })
        })
    }

    fn for_words(&mut self, run: Run, change: impl Fn(&mut u64, u64), gain: impl Fn(u64, u64) -> i64) {
        assert!(run.end().0 <= self.pages, "{run:?} of {} pages", self.pages);
        for (at, mask) in masks(run) {
            self.count = self.count.wrapping_add_signed(gain(self.words[at], mask));
            change(&mut self.words[at], mask);
        }
    }
}

/// The words that a run spans, and which of their bits.
fn masks(run: Run) -> impl Iterator<Item = (usize, u64)> {
    let (start, end) = (run.start.0, run.end().0);
    (start / 64..end.div_ceil(64)).map(move |word| {
        let from = start.saturating_sub(word * 64).min(64);
        let to = (end - word * 64).min(64);
        let below = |bits: u64| if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
        (word as usize, below(to) & !below(from))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_as_a_set(ops in prop::collection::vec((0_u64..200, 0_u32..140, 0_u8..4), 0..40)) {
            let pages = 331;
            let (mut map, mut model) = (Bitmap::new(pages), BTreeSet::new());
            for (start, len, op) in ops {
                let run = Run::new(PageNo(start), len.min((pages - start) as u32));
                match op {
                    0 => { map.set_run(run); model.extend(run.pages()); }
                    1 => { map.clear_run(run); model.retain(|page| !run.contains(*page)); }
                    2 => prop_assert_eq!(map.set(run.start), model.insert(run.start)),
                    _ => prop_assert_eq!(map.clear(run.start), model.remove(&run.start)),
                }
                prop_assert_eq!(map.count(), model.len() as u64);
                let inside: Vec<_> = model.iter().copied().filter(|page| run.contains(*page)).collect();
                prop_assert_eq!(map.count_run(run) as usize, inside.len());
                prop_assert_eq!(map.first_in(run), inside.first().copied());
                prop_assert_eq!(map.pages_in(run).collect::<Vec<_>>(), inside);
            }
        }
    }
}
