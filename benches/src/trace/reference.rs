//! Policies from the literature in their plainest form, with which the engine's own is compared.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

/// How a policy answered a touch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum TouchOutcome {
    Hit,
    /// The page was not resident and got a frame. The page named here lost its frame for that; none if a frame was
    /// free.
    Miss(Option<u32>),
}

/// A choice of victims, for a number of frames given at the start.
pub(super) trait Policy {
    fn touch(&mut self, page: u32) -> TouchOutcome;
}

const NONE: u32 = u32::MAX;

/// LRU: the victim is the page that was not used for the longest time.
pub(super) struct Lru {
    /// The neighbours of each page in a ring of the resident pages; the last element is the ring's head. `NONE`: the
    /// page is not resident.
    newer: Vec<u32>,
    older: Vec<u32>,
    free: usize,
}

impl Lru {
    pub(super) fn new(pages: usize, frames: usize) -> Self {
        let mut ring = vec![NONE; pages + 1];
        ring[pages] = pages as u32;
        Lru { newer: ring.clone(), older: ring, free: frames }
    }

    fn head(&self) -> u32 {
        self.newer.len() as u32 - 1
    }

    fn unlink(&mut self, page: u32) {
        let (newer, older) = (self.newer[page as usize], self.older[page as usize]);
        self.older[newer as usize] = older;
        self.newer[older as usize] = newer;
        self.newer[page as usize] = NONE;
    }

    fn link_newest(&mut self, page: u32) {
        let head = self.head();
        let second = self.older[head as usize];
        (self.newer[page as usize], self.older[page as usize]) = (head, second);
        self.older[head as usize] = page;
        self.newer[second as usize] = page;
    }
}

impl Policy for Lru {
    fn touch(&mut self, page: u32) -> TouchOutcome {
        let outcome = if self.newer[page as usize] != NONE {
            self.unlink(page);
            TouchOutcome::Hit
        } else if self.free > 0 {
            self.free -= 1;
            TouchOutcome::Miss(None)
        } else {
            let oldest = self.newer[self.head() as usize];
            self.unlink(oldest);
            TouchOutcome::Miss(Some(oldest))
        };
        self.link_newest(page);
        outcome
    }
}

/// FIFO: the victim is the page that came in first.
pub(super) struct Fifo {
    queue: VecDeque<u32>,
    resident: Vec<bool>,
    frames: usize,
}

impl Fifo {
    pub(super) fn new(pages: usize, frames: usize) -> Self {
        Fifo { queue: VecDeque::new(), resident: vec![false; pages], frames }
    }
}

impl Policy for Fifo {
    fn touch(&mut self, page: u32) -> TouchOutcome {
        if self.resident[page as usize] {
            return TouchOutcome::Hit;
        }
        let victim = if self.queue.len() == self.frames { self.queue.pop_front() } else { None };
        if let Some(victim) = victim {
            self.resident[victim as usize] = false;
        }
        self.resident[page as usize] = true;
        self.queue.push_back(page);
        TouchOutcome::Miss(victim)
    }
}

/// CLOCK (Corbató 1968): FIFO, but a page that was used since the hand last came by is passed over once.
pub(super) struct Clock {
    ring: Vec<u32>,
    hand: usize,
    resident: Vec<bool>,
    used: Vec<bool>,
    frames: usize,
}

impl Clock {
    pub(super) fn new(pages: usize, frames: usize) -> Self {
        Clock { ring: Vec::new(), hand: 0, resident: vec![false; pages], used: vec![false; pages], frames }
    }
}

impl Policy for Clock {
    fn touch(&mut self, page: u32) -> TouchOutcome {
        if self.resident[page as usize] {
            self.used[page as usize] = true;
            return TouchOutcome::Hit;
        }
        self.resident[page as usize] = true;
        if self.ring.len() < self.frames {
            self.ring.push(page);
            return TouchOutcome::Miss(None);
        }
        while std::mem::take(&mut self.used[self.ring[self.hand] as usize]) {
            self.hand = (self.hand + 1) % self.frames;
        }
        let victim = std::mem::replace(&mut self.ring[self.hand], page);
        self.hand = (self.hand + 1) % self.frames;
        self.resident[victim as usize] = false;
        TouchOutcome::Miss(Some(victim))
    }
}

/// LFU: the victim is the page with the fewest touches since the start, those included that found it not resident.
/// Where hot pages stay hot, no policy does better without knowing the future.
pub(super) struct Lfu {
    /// Resident pages by their counts. A count may be out of date, and is too low then.
    order: BinaryHeap<Reverse<(u32, u32)>>,
    resident: Vec<bool>,
    counts: Vec<u32>,
    frames: usize,
}

impl Lfu {
    pub(super) fn new(pages: usize, frames: usize) -> Self {
        let order = BinaryHeap::with_capacity(frames + 1);
        Lfu { order, resident: vec![false; pages], counts: vec![0; pages], frames }
    }

    fn evict(&mut self) -> u32 {
        loop {
            let Reverse((count, page)) = self.order.pop().expect("there are frames");
            let now = self.counts[page as usize];
            if count == now {
                return page;
            }
            self.order.push(Reverse((now, page)));
        }
    }
}

impl Policy for Lfu {
    fn touch(&mut self, page: u32) -> TouchOutcome {
        self.counts[page as usize] += 1;
        if self.resident[page as usize] {
            return TouchOutcome::Hit;
        }
        let victim = (self.order.len() == self.frames).then(|| self.evict());
        if let Some(victim) = victim {
            self.resident[victim as usize] = false;
        }
        self.resident[page as usize] = true;
        self.order.push(Reverse((self.counts[page as usize], page)));
        TouchOutcome::Miss(victim)
    }
}

/// S3-FIFO (Yang et al., SOSP 2023): a small queue on probation, a main queue, and ghosts, which are the pages that
/// left the small queue lately.
pub(super) struct S3Fifo {
    small: VecDeque<u32>,
    main: VecDeque<u32>,
    resident: Vec<bool>,
    /// Uses of each page since it came in, at most three.
    uses: Vec<u8>,
    /// Number of the departure from the small queue to the ghosts; 0: never. The last so many departed are ghosts.
    departed: Vec<u32>,
    departures: u32,
    frames: usize,
}

impl S3Fifo {
    const SMALL_SHARE: usize = 10;
    const USES_MAX: u8 = 3;

    pub(super) fn new(pages: usize, frames: usize) -> Self {
        S3Fifo {
            small: VecDeque::new(),
            main: VecDeque::new(),
            resident: vec![false; pages],
            uses: vec![0; pages],
            departed: vec![0; pages],
            departures: 0,
            frames,
        }
    }

    fn is_ghost(&self, page: u32) -> bool {
        let number = self.departed[page as usize];
        let remembered = self.frames - self.frames / Self::SMALL_SHARE;
        number != 0 && ((self.departures - number) as usize) < remembered
    }

    fn evict(&mut self) -> u32 {
        loop {
            let small_is_full = self.small.len() >= (self.frames / Self::SMALL_SHARE).max(1);
            if small_is_full || self.main.is_empty() {
                let page = self.small.pop_front().expect("all frames are in the two queues");
                if std::mem::take(&mut self.uses[page as usize]) > 1 {
                    self.main.push_back(page);
                } else {
                    self.departures += 1;
                    self.departed[page as usize] = self.departures;
                    return page;
                }
            } else {
                let page = self.main.pop_front().expect("it is not empty");
                if self.uses[page as usize] == 0 {
                    return page;
                }
                self.uses[page as usize] -= 1;
                self.main.push_back(page);
            }
        }
    }
}

impl Policy for S3Fifo {
    fn touch(&mut self, page: u32) -> TouchOutcome {
        if self.resident[page as usize] {
            let uses = &mut self.uses[page as usize];
            *uses = (*uses + 1).min(Self::USES_MAX);
            return TouchOutcome::Hit;
        }
        let was_ghost = self.is_ghost(page);
        let victim = (self.small.len() + self.main.len() == self.frames).then(|| self.evict());
        if let Some(victim) = victim {
            self.resident[victim as usize] = false;
        }
        self.resident[page as usize] = true;
        self.uses[page as usize] = 0;
        self.departed[page as usize] = 0;
        if was_ghost {
            self.main.push_back(page)
        } else {
            self.small.push_back(page)
        }
        TouchOutcome::Miss(victim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimum::{WRITE, optimum};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const PAGES: usize = 40;

    fn all(frames: usize) -> Vec<(&'static str, Box<dyn Policy>)> {
        vec![
            ("lru", Box::new(Lru::new(PAGES, frames))),
            ("fifo", Box::new(Fifo::new(PAGES, frames))),
            ("clock", Box::new(Clock::new(PAGES, frames))),
            ("lfu", Box::new(Lfu::new(PAGES, frames))),
            ("s3-fifo", Box::new(S3Fifo::new(PAGES, frames))),
        ]
    }

    fn misses(policy: &mut dyn Policy, touches: &[u32]) -> usize {
        touches.iter().filter(|page| policy.touch(**page) != TouchOutcome::Hit).count()
    }

    proptest! {
        /// Hits are of resident pages, victims were resident, frames are kept to, and nobody is better than the
        /// optimum.
        #[test]
        fn every_policy_keeps_to_the_rules(
            touches in prop::collection::vec(0u32..PAGES as u32, 1..600), frames in 1usize..PAGES
        ) {
            let written: Vec<_> = touches.iter().map(|page| page | WRITE).collect();
            let firsts = touches.iter().collect::<BTreeSet<_>>().len();
            let least = optimum(&written, &[], frames, 0, |_| {}).misses as usize + firsts;
            for (name, mut policy) in all(frames) {
                let (mut resident, mut missed) = (BTreeSet::new(), 0);
                for page in &touches {
                    match policy.touch(*page) {
                        TouchOutcome::Hit => prop_assert!(resident.contains(page), "{name}: {page} was not there"),
                        TouchOutcome::Miss(victim) => {
                            missed += 1;
                            if let Some(victim) = victim {
                                prop_assert!(resident.remove(&victim), "{name}: {victim} was not there");
                            }
                            prop_assert!(resident.insert(*page), "{name}: {page} was there");
                            prop_assert!(resident.len() <= frames, "{name}");
                        }
                    }
                }
                prop_assert!(missed >= least, "{name}: {missed} misses where {least} are the least");
            }
        }

        #[test]
        fn lru_keeps_the_last_distinct_pages(
            touches in prop::collection::vec(0u32..PAGES as u32, 1..300), frames in 1usize..PAGES
        ) {
            let mut lru = Lru::new(PAGES, frames);
            for (at, page) in touches.iter().enumerate() {
                let since: BTreeSet<_> = touches[..at].iter().rev().take_while(|other| *other != page).collect();
                let hit = touches[..at].contains(page) && since.len() < frames;
                prop_assert_eq!(lru.touch(*page) == TouchOutcome::Hit, hit);
            }
        }
    }

    #[test]
    fn lfu_knows_what_was_hot_after_it_left() {
        let touches = [1, 1, 1, 2, 3, 4, 1, 2];
        let mut lfu = Lfu::new(PAGES, 2);
        assert_eq!(misses(&mut lfu, &touches), 5, "1, 2, 3, 4, 2");
    }

    #[test]
    fn s3_fifo_keeps_what_is_used_through_a_scan() {
        let hot = (0..5).chain(0..5).chain(0..5);
        let scan = 10..40;
        let touches: Vec<u32> = hot.clone().chain(scan).chain(hot).collect();
        let mut s3_fifo = S3Fifo::new(PAGES, 10);
        assert_eq!(misses(&mut s3_fifo, &touches), 5 + 30);
        assert_eq!(misses(&mut Lru::new(PAGES, 10), &touches), 5 + 30 + 5);
    }
}
