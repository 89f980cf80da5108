//! Which pages the guest has written (dirty pages), for everybody who wants to know.
//!
//! The kernel forgets what a scan has told: it protects the pages again. So each scan is for all *subscribers*, and
//! what it found, and what has left the guest since, is kept for each of them until that one collects it. Nobody's
//! collecting, or end, takes anything from the others; a migration whose writes another's end stopped being tracked
//! would lose the pages written from then on.
//!
//! Blocks are *tracked* from when a subscriber asks for them: their pages are protected, and scans look there. A block
//! that is tracked already, for another one, is not protected again: marks that no scan has read would be lost.

use crate::api::{DirtyPages, SubscriberId};
use crate::units::{BLOCK_PAGES, PageNo, Run, runs_of};

/// One bit a page, or a block.
type Bits = Vec<u64>;

#[derive(Debug)]
struct Subscriber {
    id: SubscriberId,
    seen: Bits,
    departed: Bits,
}

#[derive(Debug, Default)]
pub(crate) struct DirtyTracking {
    subscribers: Vec<Subscriber>,
    next: u32,
    /// Blocks whose pages are protected, and scanned.
    tracked: Bits,
    /// Blocks whose pages may be protected still, and of which nobody wants to know any more.
    ending: Bits,
    /// The first of them is not before this one. None: there are none.
    ending_from: Option<usize>,
}

impl DirtyTracking {
    /// Whether there is anybody who wants to know.
    pub(crate) fn is_on(&self) -> bool {
        !self.subscribers.is_empty()
    }

    pub(crate) fn has(&self, id: SubscriberId) -> bool {
        self.subscribers.iter().any(|subscriber| subscriber.id == id)
    }

    /// One more, of a memory of so many pages.
    pub(crate) fn subscribe(&mut self, pages: u64) -> SubscriberId {
        let words = pages.div_ceil(64) as usize;
        let blocks = pages.div_ceil(BLOCK_PAGES.into()).div_ceil(64) as usize;
        self.tracked.resize(blocks, 0);
        self.ending.resize(blocks, 0);
        let id = SubscriberId(self.next);
        self.next += 1;
        self.subscribers.push(Subscriber { id, seen: vec![0; words], departed: vec![0; words] });
        id
    }

    /// True, if that was the last one.
    pub(crate) fn unsubscribe(&mut self, id: SubscriberId) -> bool {
        let before = self.subscribers.len();
        self.subscribers.retain(|subscriber| subscriber.id != id && !mutant!(EndsTrackingForAll));
        let last = before > 0 && self.subscribers.is_empty();
        if last {
            self.ending.iter_mut().zip(&mut self.tracked).for_each(|(ending, tracked)| {
                *ending |= std::mem::take(tracked);
            });
            self.ending_from = Some(0);
        }
        last
    }

    /// The blocks of this run are tracked from now on. Returns those whose pages are to be protected for it.
    pub(crate) fn track(&mut self, run: Run) -> Vec<Run> {
        let new = if mutant!(ProtectsAgain) { vec![run] } else { parts(&self.tracked, run, false) };
        let others = self.tracked.iter().any(|blocks| *blocks != 0);
        for block in run.blocks().map(|part| part.start.block()) {
            if !(mutant!(ScansFirstBlocksOnly) && others) {
                self.tracked[block / 64] |= 1 << (block % 64);
            }
            self.ending[block / 64] &= !(1 << (block % 64));
        }
        new
    }

    /// Where a scan of the run looks, and the rest.
    pub(crate) fn tracked_in(&self, run: Run) -> (Vec<Run>, Vec<Run>) {
        (parts(&self.tracked, run, true), parts(&self.tracked, run, false))
    }

    /// Whether pages are protected of which nobody wants to know any more.
    pub(crate) fn is_ending(&self) -> bool {
        self.ending_from.is_some()
    }

    /// Where the first of them is.
    pub(crate) fn next_ending(&mut self) -> Option<PageNo> {
        let from = self.ending_from? / 64;
        let word = (from..self.ending.len()).find(|word| self.ending[*word] != 0);
        self.ending_from = word.map(|word| word * 64 + self.ending[word].trailing_zeros() as usize);
        self.ending_from.map(PageNo::first_of)
    }

    /// Those of this run, which are protected no longer.
    pub(crate) fn take_ending(&mut self, run: Run) -> Vec<Run> {
        let ended = parts(&self.ending, run, true);
        for block in run.blocks().map(|part| part.start.block()) {
            self.ending[block / 64] &= !(1 << (block % 64));
        }
        ended
    }

    /// The page's frame leaves the guest, and its write protection is lost with it: it may have been written.
    pub(crate) fn departed(&mut self, page: PageNo) {
        for subscriber in &mut self.subscribers {
            subscriber.departed[page.index() / 64] |= 1 << (page.index() % 64);
        }
    }

    /// A scan has found these pages written.
    pub(crate) fn scanned(&mut self, seen: &[Run]) {
        for subscriber in &mut self.subscribers {
            for page in seen.iter().flat_map(|run| run.pages()) {
                subscriber.seen[page.index() / 64] |= 1 << (page.index() % 64);
            }
        }
    }

    /// What the subscriber has not been told of the run yet. The run begins and ends at a multiple of 64 pages, or with
    /// the memory.
    pub(crate) fn collect(&mut self, id: SubscriberId, run: Run, into: &mut DirtyPages) {
        let Some(nth) = self.subscribers.iter().position(|subscriber| subscriber.id == id) else { return };
        let Subscriber { seen, departed, .. } = &mut self.subscribers[nth];
        let words = run.indices().start / 64..run.indices().end.div_ceil(64);
        // What was seen was written by somebody who uses it, whether it has left since or not.
        words.clone().for_each(|word| departed[word] &= !seen[word]);
        take(seen, words.clone(), &mut into.seen);
        take(departed, words.clone(), &mut into.departed);
        if mutant!(ForgetsLeftOfOtherSteps) {
            departed.fill(0);
        }
        if mutant!(OneCollectsForAll) {
            self.subscribers.iter_mut().for_each(|subscriber| subscriber.seen[words.clone()].fill(0));
        }
    }
}

/// The parts of a run of whole blocks whose bit is as wanted.
fn parts(bits: &Bits, run: Run, wanted: bool) -> Vec<Run> {
    let mut parts: Vec<Run> = Vec::new();
    for part in run.blocks() {
        let block = part.start.block();
        match parts.last_mut() {
            _ if (bits[block / 64] >> (block % 64) & 1 == 1) != wanted => {}
            Some(last) if last.end() == part.start => last.len += part.len,
            _ => parts.push(part),
        }
    }
    parts
}

/// Moves the bits of these words to `into`, as ascending runs.
fn take(bits: &mut Bits, words: std::ops::Range<usize>, into: &mut Vec<Run>) {
    let set = words.clone().filter(|word| bits[*word] != 0).flat_map(|word| {
        let bits = bits[word];
        (0..64).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| PageNo(word as u64 * 64 + bit))
    });
    into.extend(runs_of(set, u32::MAX));
    bits[words].fill(0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const PAGES: u64 = 256;

    #[derive(Clone, Debug)]
    enum Step {
        Left(u64),
        Scan(BTreeSet<u64>),
        Collect(usize),
        Join,
        End(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..PAGES).prop_map(Step::Left),
            proptest::collection::btree_set(0..PAGES, 0..20).prop_map(Step::Scan),
            (0..3_usize).prop_map(Step::Collect),
            Just(Step::Join),
            (0..3_usize).prop_map(Step::End),
        ]
    }

    /// Blocks, from the first to the last.
    fn blocks(first: u64, last: u64) -> Run {
        Run::new(PageNo(first * 512), ((last - first + 1) * 512) as u32)
    }

    #[test]
    fn a_block_is_protected_for_the_first_who_asks_and_scanned_until_the_last_has_ended() {
        let mut tracking = DirtyTracking::default();
        let [first, second] = [(); 2].map(|()| tracking.subscribe(200 * 512 - 100));
        assert_eq!(tracking.tracked_in(blocks(0, 198)).0, [], "nobody has asked");
        assert_eq!(tracking.track(blocks(3, 4)), [blocks(3, 4)]);
        assert_eq!(tracking.track(blocks(2, 70)), [blocks(2, 2), blocks(5, 70)], "the others are tracked");
        assert_eq!(
            tracking.tracked_in(blocks(0, 198)),
            (vec![blocks(2, 70)], vec![blocks(0, 1), blocks(71, 198)])
        );
        assert!(!tracking.unsubscribe(first) && !tracking.is_ending());
        assert_eq!(tracking.tracked_in(blocks(4, 80)).0, [blocks(4, 70)], "for the second");
        assert!(tracking.unsubscribe(second) && tracking.is_ending());
        assert_eq!(tracking.tracked_in(blocks(0, 198)).0, []);
        // Somebody comes before all of it is free again. Memory ends in the middle of a block.
        tracking.subscribe(200 * 512 - 100);
        let last = Run::new(PageNo(199 * 512), 412);
        assert_eq!(tracking.track(last), [last]);
        assert_eq!(tracking.track(blocks(60, 64)), [blocks(60, 64)], "marks of before say nothing");
        assert_eq!(tracking.next_ending(), Some(PageNo(2 * 512)));
        assert_eq!(tracking.take_ending(blocks(0, 62)), [blocks(2, 59)]);
        assert_eq!(tracking.next_ending(), Some(PageNo(65 * 512)));
        assert_eq!(tracking.take_ending(blocks(65, 198)), [blocks(65, 70)]);
        assert!(tracking.next_ending().is_none() && !tracking.is_ending());
        assert_eq!(tracking.tracked_in(blocks(0, 198)).0, [blocks(60, 64)]);
    }

    proptest! {
        /// Everybody hears of each page that was seen or has left since they joined or collected last, once.
        #[test]
        fn each_subscriber_is_told_all_of_its_own(steps in proptest::collection::vec(step(), 1..60)) {
            let mut tracking = DirtyTracking::default();
            let mut model: Vec<(SubscriberId, BTreeSet<u64>, BTreeSet<u64>)> = Vec::new();
            for step in steps {
                match step {
                    Step::Left(page) => {
                        tracking.departed(PageNo(page));
                        model.iter_mut().for_each(|(_, _, departed)| departed.extend([page]));
                    }
                    Step::Scan(pages) => {
                        let runs: Vec<_> = runs_of(pages.iter().copied().map(PageNo), 64).collect();
                        tracking.scanned(&runs);
                        model.iter_mut().for_each(|(_, seen, _)| seen.extend(&pages));
                    }
                    Step::Join if model.len() < 3 => {
                        model.push((tracking.subscribe(PAGES), BTreeSet::new(), BTreeSet::new()));
                    }
                    Step::Collect(nth) if nth < model.len() => {
                        let mut told = DirtyPages::default();
                        tracking.collect(model[nth].0, Run::new(PageNo(0), PAGES as u32), &mut told);
                        let pages = |runs: &[Run]| -> BTreeSet<u64> {
                            runs.iter().flat_map(|run| run.pages()).map(|page| page.0).collect()
                        };
                        let (seen, departed) = (std::mem::take(&mut model[nth].1), std::mem::take(&mut model[nth].2));
                        prop_assert_eq!(pages(&told.departed), departed.difference(&seen).copied().collect::<BTreeSet<_>>());
                        prop_assert_eq!(pages(&told.seen), seen);
                    }
                    Step::End(nth) if nth < model.len() => {
                        let (id, ..) = model.remove(nth);
                        prop_assert_eq!(tracking.unsubscribe(id), model.is_empty());
                    }
                    _ => {}
                }
                prop_assert_eq!(tracking.is_on(), !model.is_empty());
            }
        }
    }
}
