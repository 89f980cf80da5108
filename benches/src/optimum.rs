//! The fewest misses that any choice of victims could have (Belady's MIN, 1966), and the device traffic that goes
//! with them.
//!
//! The resident pages are kept by the time of their next use, as bits of a set over the times: whether a touch is a
//! hit is whether its own time is in the set, and the victim is the page behind the set's largest time. Pages that
//! are never used again are victims before all others, clean ones first.

/// The bit of a touch that says that it writes the page. The other bits are the page's number.
pub(crate) const WRITE: u32 = 1 << 31;
/// In the place of the time of the next use: the page is not used again.
const NEVER: u32 = u32::MAX;

/// What the optimum did in the touches that count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Optimum {
    pub(crate) touched: u64,
    /// Pages that had to be read from the device. A page that was never written has no content to be read.
    pub(crate) misses: u64,
    /// Pages that had changed when they lost their frame, and so had to be written.
    pub(crate) evicted_dirty: u64,
}

/// One page read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Traffic {
    /// Index of the touch that caused it.
    pub(crate) at: usize,
    pub(crate) page: u32,
    pub(crate) write: bool,
}

/// Runs MIN with `frames` frames over `touches` (a page number, with [`WRITE`] set or not). All `warm` pages, each
/// named once, have been written before, in that order, and the last of them are resident: nobody who fills memory
/// knows yet what will be touched. What happens from the touch at `count_from` on is counted, and told to `tell` in
/// the order in which it happens.
///
/// # Panics
/// Without frames, and at more touches than 32 bits can number.
pub(crate) fn optimum(
    touches: &[u32],
    warm: &[u32],
    frames: usize,
    count_from: usize,
    mut tell: impl FnMut(Traffic),
) -> Optimum {
    assert!(frames > 0, "a touch needs a frame");
    let (stored, warm) = warm.split_at(warm.len().saturating_sub(frames));
    let total = warm.len() + touches.len();
    assert!(total < NEVER as usize, "too many touches: {total}");
    let at = |time: usize| warm.get(time).map_or_else(|| touches[time - warm.len()], |page| page | WRITE);
    let page_at = |time: usize| (at(time) & !WRITE) as usize;
    let stored_pages = stored.iter().map(|page| *page as usize);
    let pages = (0..total).map(page_at).chain(stored_pages.clone()).max().map_or(0, |page| page + 1);
    let next = next_uses(total, pages, page_at);

    let mut resident = TimeSet::new(total);
    let mut dead = Dead::default();
    let mut dirty = vec![false; pages];
    let mut has_content = vec![false; pages];
    stored_pages.for_each(|page| has_content[page] = true);
    let mut free = frames;
    let mut done = Optimum::default();
    for time in 0..total {
        let (page, write) = (page_at(time), at(time) & WRITE != 0);
        let counted = time.checked_sub(warm.len()).filter(|touch| *touch >= count_from);
        done.touched += u64::from(counted.is_some());
        if !resident.remove(time) {
            if free > 0 {
                free -= 1;
            } else {
                let victim = dead.pop().unwrap_or_else(|| page_at(resident.take_largest()));
                if std::mem::take(&mut dirty[victim])
                    && let Some(at) = counted
                {
                    done.evicted_dirty += 1;
                    tell(Traffic { at, page: victim as u32, write: true });
                }
            }
            if has_content[page]
                && let Some(at) = counted
            {
                done.misses += 1;
                tell(Traffic { at, page: page as u32, write: false });
            }
        }
        dirty[page] |= write;
        has_content[page] |= write;
        match next[time] {
            NEVER if dirty[page] => dead.dirty.push(page),
            NEVER => dead.clean.push(page),
            next => resident.insert(next as usize),
        }
    }
    done
}

/// For each touch, the time of the next one of the same page.
fn next_uses(total: usize, pages: usize, page_at: impl Fn(usize) -> usize) -> Vec<u32> {
    let mut next = vec![NEVER; total];
    let mut seen = vec![NEVER; pages];
    for time in (0..total).rev() {
        next[time] = std::mem::replace(&mut seen[page_at(time)], time as u32);
    }
    next
}

/// Resident pages that are not used again, clean ones and dirty ones.
#[derive(Default)]
struct Dead {
    clean: Vec<usize>,
    dirty: Vec<usize>,
}

impl Dead {
    fn pop(&mut self) -> Option<usize> {
        self.clean.pop().or_else(|| self.dirty.pop())
    }
}

/// A set of numbers below a bound: a bit each, and above every 64 bits one that says whether any of them is set.
struct TimeSet {
    /// From the bits themselves up to a single word.
    levels: Vec<Vec<u64>>,
}

impl TimeSet {
    fn new(bound: usize) -> Self {
        let mut levels = vec![vec![0; bound.div_ceil(64).max(1)]];
        while let Some(below) = levels.last().map(Vec::len).filter(|len| *len > 1) {
            levels.push(vec![0; below.div_ceil(64)]);
        }
        TimeSet { levels }
    }

    fn insert(&mut self, mut number: usize) {
        for level in &mut self.levels {
            level[number / 64] |= 1 << (number % 64);
            number /= 64;
        }
    }

    /// Removes a number, and says whether it was in the set.
    fn remove(&mut self, mut number: usize) -> bool {
        if self.levels[0][number / 64] >> (number % 64) & 1 == 0 {
            return false;
        }
        for level in &mut self.levels {
            level[number / 64] &= !(1 << (number % 64));
            if level[number / 64] != 0 {
                break;
            }
            number /= 64;
        }
        true
    }

    /// The set must not be empty.
    fn take_largest(&mut self) -> usize {
        let largest = self.levels.iter().rev().fold(0, |at, level| at * 64 + level[at].ilog2() as usize);
        self.remove(largest);
        largest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn pages_of(touches: &[u32]) -> Vec<u32> {
        touches.iter().map(|touch| touch & !WRITE).collect()
    }

    /// The same by looking through all residents and all the future.
    fn naive(touches: &[u32], frames: usize, stored: &[u32]) -> (Vec<Traffic>, Optimum) {
        let pages = pages_of(touches);
        let (mut resident, mut dirty) = (vec![], BTreeSet::new());
        let mut content: BTreeSet<u32> = stored.iter().copied().collect();
        let (mut traffic, mut done) = (vec![], Optimum::default());
        for (at, page) in pages.iter().copied().enumerate() {
            done.touched += 1;
            if !resident.contains(&page) {
                if resident.len() == frames {
                    let key = |page: &u32| {
                        let next = pages[at..].iter().position(|other| other == page);
                        (next.unwrap_or(usize::MAX), !dirty.contains(page))
                    };
                    let victim = *resident.iter().max_by_key(|page| key(page)).unwrap();
                    resident.retain(|page| *page != victim);
                    if dirty.remove(&victim) {
                        done.evicted_dirty += 1;
                        traffic.push(Traffic { at, page: victim, write: true });
                    }
                }
                if content.contains(&page) {
                    done.misses += 1;
                    traffic.push(Traffic { at, page, write: false });
                }
                resident.push(page);
            }
            if touches[at] & WRITE != 0 {
                dirty.insert(page);
                content.insert(page);
            }
        }
        (traffic, done)
    }

    /// The fewest misses of all possible choices.
    fn exhaustive(pages: &[u32], frames: u32, resident: u32) -> u64 {
        let Some((page, rest)) = pages.split_first() else { return 0 };
        let bit = 1 << page;
        if resident & bit != 0 {
            return exhaustive(rest, frames, resident);
        }
        if resident.count_ones() < frames {
            return 1 + exhaustive(rest, frames, resident | bit);
        }
        let victims = (0..32).filter(|victim| resident >> victim & 1 == 1);
        1 + victims
            .map(|victim| exhaustive(rest, frames, resident & !(1 << victim) | bit))
            .min()
            .expect("there is a victim")
    }

    fn touch() -> impl Strategy<Value = u32> {
        (0u32..12, any::<bool>()).prop_map(|(page, write)| page | if write { WRITE } else { 0 })
    }

    proptest! {
        #[test]
        fn as_the_naive_model(
            touches in prop::collection::vec(touch(), 1..200), frames in 1usize..9, warm in 0usize..12,
            from in 0usize..50
        ) {
            let warm: Vec<_> = (0..warm as u32).collect();
            let (stored, resident) = warm.split_at(warm.len().saturating_sub(frames));
            let whole: Vec<_> = resident.iter().map(|page| page | WRITE).chain(touches.iter().copied()).collect();
            let (expected, _) = naive(&whole, frames, stored);
            let shift = |traffic: &Traffic| Some(Traffic { at: traffic.at.checked_sub(resident.len())?, ..*traffic });
            let expected: Vec<_> = expected.iter().filter_map(shift).filter(|traffic| traffic.at >= from).collect();
            let mut told = vec![];
            let done = optimum(&touches, &warm, frames, from, |traffic| told.push(traffic));
            prop_assert_eq!(done.touched, touches.len().saturating_sub(from) as u64);
            prop_assert_eq!(done.misses, told.iter().filter(|traffic| !traffic.write).count() as u64);
            prop_assert_eq!(done.evicted_dirty, told.iter().filter(|traffic| traffic.write).count() as u64);
            // Which of several dirty pages that are not used again goes first is open.
            let times = |traffic: &[Traffic]| traffic.iter().map(|it| (it.at, it.write)).collect::<Vec<_>>();
            prop_assert_eq!(times(&told), times(&expected));
            let reads = |traffic: &[Traffic]| traffic.iter().filter(|it| !it.write).copied().collect::<Vec<_>>();
            prop_assert_eq!(reads(&told), reads(&expected));
        }

        #[test]
        fn no_choice_is_better(pages in prop::collection::vec(0u32..5, 1..12), frames in 1u32..4) {
            let warm: Vec<_> = (0..5).collect();
            let touches: Vec<_> = warm.iter().chain(&pages).map(|page| page | WRITE).collect();
            // With content from the start, every page that comes is a miss: the first five touches cost as much in
            // all cases.
            let done = optimum(&touches, &[], frames as usize, 0, |_| {});
            prop_assert_eq!(done.misses + 5, exhaustive(&pages_of(&touches), frames, 0));
        }
    }

    #[test]
    fn a_loop_keeps_all_but_a_few() {
        let touches: Vec<u32> = (0..110 * 100).map(|time| (time % 110) | WRITE).collect();
        let done = optimum(&touches, &[], 100, 110, |_| {});
        // A resident page less than frames: each touch needs one frame to come into.
        let least = 99 * 110 * 10 / 109;
        assert!(done.misses.abs_diff(least) < 30, "{} misses, about {least} expected", done.misses);
        assert_eq!(done.touched, 99 * 110);
    }

    #[test]
    #[ignore = "a measurement"]
    fn twenty_million_touches() {
        let mut state = 1u64;
        let touches: Vec<u32> = (0..20_000_000)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 44) as u32 | WRITE
            })
            .collect();
        let warm: Vec<u32> = (0..1 << 20).collect();
        let start = std::time::Instant::now();
        let done = optimum(&touches, &warm, 1 << 19, 2_000_000, |_| {});
        println!("{done:?} in {:?}", start.elapsed());
    }
}
