//! The content of a job's pages, by which a page with the wrong content is noticed when it is touched.
//!
//! From a page's first write on, its word 0 is its stamp: a function of the page's number and the job's seed. All
//! other words are for the job: a touch that writes puts a number into its line. Accesses are raw and volatile,
//! because pages come and go and several threads touch the same page at the same time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use swapd::{PAGE_SHIFT, PAGE_SIZE, Run};

use crate::pattern::{LINE_BYTES, Random, Touch, mixed};

const WORDS: usize = PAGE_SIZE / 8;
const LINE_WORDS: usize = LINE_BYTES as usize / 8;

/// The memory under test: its first page's address.
///
/// Whoever makes one promises that all pages of the areas that are touched through it stay mapped meanwhile.
#[derive(Clone, Copy, Debug)]
pub(super) struct Base(pub(super) *mut u8);

// SAFETY: an address of memory that all threads may touch, by raw accesses alone.
unsafe impl Send for Base {}
// SAFETY: as above.
unsafe impl Sync for Base {}

impl Base {
    fn word(self, page: u64, word: usize) -> *mut u64 {
        self.0.wrapping_add((page as usize) << PAGE_SHIFT).cast::<u64>().wrapping_add(word)
    }
}

/// The pages of one job's area. Clones know of each other's writes.
#[derive(Clone, Debug)]
pub(super) struct Content {
    seed: u64,
    area: Run,
    /// One bit a page, set when the page has its stamp; only where pages are not filled at the start.
    stamped: Option<Arc<[AtomicU64]>>,
}

impl Content {
    /// Pages that are filled before they are touched.
    pub(super) fn filled(area: Run, seed: u64) -> Content {
        Content { seed: mixed(!seed), area, stamped: None }
    }

    /// Pages that read as zeros until they are written.
    pub(super) fn untouched(area: Run, seed: u64) -> Content {
        let bits = (0..area.len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Content { stamped: Some(bits), ..Content::filled(area, seed) }
    }

    fn stamp(&self, page: u64) -> u64 {
        // Never zero, which is what a page has that was not written yet.
        mixed(page ^ self.seed) | 1
    }

    fn is_stamped(&self, page: u64) -> bool {
        let index = page - self.area.start.0;
        self.stamped
            .as_ref()
            .is_none_or(|bits| bits[index as usize / 64].load(Ordering::Acquire) >> (index % 64) & 1 != 0)
    }

    fn set_stamped(&self, page: u64) {
        let index = page - self.area.start.0;
        if let Some(bits) = &self.stamped {
            bits[index as usize / 64].fetch_or(1 << (index % 64), Ordering::Release);
        }
    }

    /// Writes all pages of the area whole, in order, with content that no compression makes smaller.
    pub(super) fn fill(&self, base: Base) {
        let mut random = Random::new(self.seed);
        for page in self.area.pages() {
            let mut words = [0; WORDS];
            words.fill_with(|| random.next());
            words[0] = self.stamp(page.0);
            // SAFETY: the area is mapped as `Base` promises, nobody else touches it while it is filled, and `words`
            // is a page.
            unsafe { std::ptr::copy_nonoverlapping(words.as_ptr(), base.word(page.0, 0), WORDS) };
            self.set_stamped(page.0);
        }
    }

    /// Reads or writes the line, and says whether the page has its own content.
    pub(super) fn touch(&self, base: Base, touch: Touch, number: u64) -> bool {
        let Touch { page, line, write, .. } = touch;
        // The stamp has the first word of the first line.
        let word = base.word(page, (usize::from(line) * LINE_WORDS).max(1));
        let stamp = base.word(page, 0);
        let expected = self.stamp(page);
        let known = self.is_stamped(page);
        // SAFETY: the page lies in the job's area, which is mapped as `Base` promises; lines end within their page.
        // The write comes first, so that the page's fault is a write's.
        let found = unsafe {
            match write {
                true => word.write_volatile(number),
                false => drop(word.read_volatile()),
            }
            stamp.read_volatile()
        };
        if write && !known {
            // SAFETY: as above.
            unsafe { stamp.write_volatile(expected) };
            self.set_stamped(page);
        }
        found == expected || (!known && found == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use migrate::PlainMemory;
    use swapd::PageNo;

    fn touch(page: u64, line: u16, write: bool) -> Touch {
        Touch { page, line, write, ends: true }
    }

    #[test]
    fn filled_pages_keep_their_stamps_until_they_are_mixed_up() {
        let memory = PlainMemory::new(16 * 4096).unwrap();
        let base = Base(memory.base());
        let content = Content::filled(Run::new(PageNo(4), 8), 1);
        content.fill(base);
        for page in 4..12 {
            for line in 0..64 {
                assert!(content.touch(base, touch(page, line, line % 2 == 0), 5));
            }
        }
        // SAFETY: two different pages of the mapping.
        unsafe { std::ptr::copy_nonoverlapping(base.word(5, 0), base.word(6, 0), WORDS) };
        assert!(content.touch(base, touch(5, 3, false), 5));
        assert!(!content.touch(base, touch(6, 3, false), 5));
        assert!(!content.touch(base, touch(6, 0, true), 5), "a write does not mend it");
        assert!(!content.touch(base, touch(6, 3, false), 5));
    }

    #[test]
    fn untouched_pages_are_zeros_once() {
        let memory = PlainMemory::new(4 * 4096).unwrap();
        let base = Base(memory.base());
        let content = Content::untouched(Run::new(PageNo(0), 4), 1);
        assert!(content.touch(base, touch(0, 0, false), 1));
        assert!(content.touch(base, touch(0, 0, true), 1));
        assert!(content.clone().touch(base, touch(0, 7, false), 1));
        // SAFETY: a page of the mapping.
        unsafe { base.word(0, 0).write_volatile(0) };
        assert!(!content.touch(base, touch(0, 7, false), 1), "a page that was written is not zero any more");
    }
}
