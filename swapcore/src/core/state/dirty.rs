//! Which pages the guest has written (dirty pages), for everybody who wants to know.
//!
//! The kernel forgets what a scan has told: it protects the pages again. So each scan is for all *subscribers*, and
//! what it found, and what has left the guest since, is kept for each of them until that one collects it. Nobody's
//! collecting, or end, takes anything from the others; a migration whose writes another's end stopped being tracked
//! would lose the pages written from then on.

use crate::api::{DirtyPages, SubscriberId};
use crate::units::{PageNo, Run, runs_of};

/// One bit a page.
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
        let id = SubscriberId(self.next);
        self.next += 1;
        self.subscribers.push(Subscriber { id, seen: vec![0; words], departed: vec![0; words] });
        id
    }

    /// True, if that was the last one.
    pub(crate) fn unsubscribe(&mut self, id: SubscriberId) -> bool {
        let before = self.subscribers.len();
        self.subscribers.retain(|subscriber| subscriber.id != id && !mutant!(EndsTrackingForAll));
        before > 0 && self.subscribers.is_empty()
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
