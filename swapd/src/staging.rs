//! Which staging slots hold a frame, for which page, and which are free: bookkeeping only, no memory.
//!
//! ```text
//!            take_empty                     (frame moved in from the guest)
//!   Empty ───────────────▶ Bound(page) ◀──────────────────────────────┐
//!     ▲                        │ frame moved to the guest: vacate     │
//!     ├────────────────────────┘                                      │
//!     │ return to host         │ frame no longer needed: free         │
//!     └──────────── Free ◀─────┘                                      │
//!                     │ take_free                                     │
//!                     └──────────────▶ Bound(page) or Granted ────────┘
//! ```
//! Slots are handed out in contiguous runs, so that a batch moves by one ioctl and is written by one
//! operation. Behind the other slots there are whole blocks of them for huge pages, apart: the host has page tables of its own for
//! single frames, and a huge page that comes to where there is one falls to pieces. Standby slots form a list in the order in which they became standby.

use crate::units::{BLOCK_PAGES, PageNo, Slot, SlotRun};

/// What a slot is used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Use {
    /// No frame.
    Empty,
    /// A frame that nothing needs.
    Free,
    /// A frame for this page, or a place reserved for its frame.
    Bound(PageNo),
    /// A frame that a session of a migration receives into.
    Granted,
    /// A frame that the device still works with, though its page has gone another way.
    Orphan,
}

const NIL: u32 = u32::MAX;

/// A slot's use in 8 bytes: a page number, or one of the numbers beyond all pages.
#[derive(Clone, Copy)]
struct Packed(u64);

impl Packed {
    const EMPTY: u64 = u64::MAX;
    const FREE: u64 = u64::MAX - 1;
    const GRANTED: u64 = u64::MAX - 2;
    const ORPHAN: u64 = u64::MAX - 3;

    fn new(used: Use) -> Packed {
        Packed(match used {
            Use::Empty => Packed::EMPTY,
            Use::Free => Packed::FREE,
            Use::Granted => Packed::GRANTED,
            Use::Orphan => Packed::ORPHAN,
            Use::Bound(page) => page.0,
        })
    }

    fn used(self) -> Use {
        match self.0 {
            Packed::EMPTY => Use::Empty,
            Packed::FREE => Use::Free,
            Packed::GRANTED => Use::Granted,
            Packed::ORPHAN => Use::Orphan,
            page => Use::Bound(PageNo(page)),
        }
    }
}

#[derive(Clone, Copy)]
struct Info {
    used: Packed,
    prev: u32,
    next: u32,
}

const _: () = assert!(size_of::<Info>() == 16, "bookkeeping is to stay small");

/// A set of slots with fast search for contiguous runs.
#[derive(Debug)]
struct SlotSet {
    words: Vec<u64>,
    /// One bit a word: it is not zero.
    summary: Vec<u64>,
    count: u32,
    cursor: usize,
}

impl SlotSet {
    fn new(slots: u32, full: bool) -> Self {
        let words = slots.div_ceil(64) as usize;
        let mut set =
            SlotSet { words: vec![0; words], summary: vec![0; words.div_ceil(64)], count: 0, cursor: 0 };
        if full {
            (0..slots).for_each(|slot| set.insert(slot));
        }
        set
    }

    fn contains(&self, slot: u32) -> bool {
        self.words.get((slot / 64) as usize).is_some_and(|word| word >> (slot % 64) & 1 == 1)
    }

    fn insert(&mut self, slot: u32) {
        debug_assert!(!self.contains(slot));
        self.words[(slot / 64) as usize] |= 1 << (slot % 64);
        self.summary[(slot / 4096) as usize] |= 1 << (slot / 64 % 64);
        self.count += 1;
    }

    fn remove(&mut self, slot: u32) {
        debug_assert!(self.contains(slot));
        let word = &mut self.words[(slot / 64) as usize];
        *word &= !(1 << (slot % 64));
        if *word == 0 {
            self.summary[(slot / 4096) as usize] &= !(1 << (slot / 64 % 64));
        }
        self.count -= 1;
    }

    /// The first word from `from` on, round and round, that is not zero. There must be one.
    fn next_word(&self, from: usize) -> usize {
        let first = self.summary[from / 64] >> (from % 64);
        if first != 0 {
            return from + first.trailing_zeros() as usize;
        }
        let groups = self.summary.len();
        let behind = (1..=groups).map(|step| (from / 64 + step) % groups);
        let group = behind.into_iter().find(|group| self.summary[*group] != 0).expect("the set is not empty");
        group * 64 + self.summary[group].trailing_zeros() as usize
    }

    /// Takes the first run of `want` slots found from the cursor on, or the longest of those looked at.
    fn take(&mut self, want: u32) -> Option<SlotRun> {
        /// Words looked at before a shorter run is good enough.
        const SEARCH_WORDS: usize = 256;
        if self.count == 0 || want == 0 {
            return None;
        }
        let mut best: Option<SlotRun> = None;
        let mut at = self.cursor;
        let mut seen = 0;
        while seen < self.words.len() {
            let next = self.next_word(at);
            seen += (next + self.words.len() - at) % self.words.len();
            at = next;
            let first = at as u32 * 64 + self.words[at].trailing_zeros();
            let mut start = first;
            // Runs within this word, and the one that goes on behind it.
            loop {
                let mut len = 0;
                while len < want && self.contains(start + len) {
                    len += 1;
                }
                if len > best.map_or(0, |run| run.len) {
                    best = Some(SlotRun::new(Slot(start), len));
                }
                if len >= want {
                    break;
                }
                start += len + 1;
                while start / 64 == at as u32 && !self.contains(start) {
                    start += 1;
                }
                if start / 64 != at as u32 {
                    break;
                }
            }
            seen += 1;
            let enough = best.is_some_and(|run| run.len >= want);
            if enough || (seen >= SEARCH_WORDS && best.is_some()) {
                break;
            }
            at = (at + 1) % self.words.len();
        }
        self.cursor = at;
        let run = best?;
        run.slots().for_each(|slot| self.remove(slot.0));
        Some(run)
    }
}

/// The staging area's books.
pub struct Staging {
    infos: Vec<Info>,
    free: SlotSet,
    /// Without those of the blocks.
    empty: SlotSet,
    /// How many slots of each block are empty.
    blocks: Box<[u32]>,
    standby_first: u32,
    standby_last: u32,
    standby_count: u32,
}

impl std::fmt::Debug for Staging {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Staging {{ slots: {}, free: {}, empty: {}, standby: {} }}",
            self.infos.len(),
            self.free.count,
            self.empty.count,
            self.standby_count
        )
    }
}

impl Staging {
    pub fn new(slots: u32, blocks: u32) -> Self {
        let all = slots + blocks * BLOCK_PAGES;
        Staging {
            infos: vec![Info { used: Packed::new(Use::Empty), prev: NIL, next: NIL }; all as usize],
            free: SlotSet::new(all, false),
            empty: SlotSet::new(slots, true),
            blocks: vec![BLOCK_PAGES; blocks as usize].into(),
            standby_first: NIL,
            standby_last: NIL,
            standby_count: 0,
        }
    }

    pub fn all_slots(&self) -> u32 {
        self.infos.len() as u32
    }

    /// Those without the blocks'.
    pub fn slots(&self) -> u32 {
        self.infos.len() as u32 - self.blocks.len() as u32 * BLOCK_PAGES
    }

    /// Bytes that the books take.
    pub fn bytes(&self) -> usize {
        let sets = [&self.free, &self.empty].map(|set| size_of_val(&set.words[..]));
        size_of_val(&self.infos[..]) + sets.iter().sum::<usize>()
    }

    /// Frames that nothing needs.
    pub fn free_frames(&self) -> u32 {
        self.free.count
    }

    pub fn empty_slots(&self) -> u32 {
        self.empty.count
    }

    /// Slots with a frame in them, whatever for.
    pub fn held_frames(&self) -> u32 {
        self.infos.len() as u32 - self.empty.count - self.blocks.iter().sum::<u32>()
    }

    pub fn used(&self, slot: Slot) -> Use {
        self.infos[slot.index()].used.used()
    }

    /// Up to `want` contiguous free frames. The caller binds or grants them.
    pub fn take_free(&mut self, want: u32) -> Option<SlotRun> {
        self.free.take(want)
    }

    /// Up to `want` contiguous slots without a frame. The caller binds or grants them.
    pub fn take_empty(&mut self, want: u32) -> Option<SlotRun> {
        self.empty.take(want)
    }

    /// Blocks of slots without any frame.
    pub fn whole_blocks(&self) -> u32 {
        self.blocks.iter().filter(|empty| **empty == BLOCK_PAGES).count() as u32
    }

    /// A block of slots without frames. The caller binds them.
    pub fn take_block(&mut self) -> Option<SlotRun> {
        let block = self.blocks.iter().position(|empty| *empty == BLOCK_PAGES)?;
        self.blocks[block] = 0;
        Some(SlotRun::new(Slot(self.slots() + block as u32 * BLOCK_PAGES), BLOCK_PAGES))
    }

    pub fn assign(&mut self, slot: Slot, used: Use) {
        assert!(
            !matches!(used, Use::Empty | Use::Free),
            "slots become empty or free through vacate and free"
        );
        self.infos[slot.index()].used = Packed::new(used);
    }

    /// The slot's frame is not needed any more.
    pub fn free(&mut self, slot: Slot) {
        assert!(!self.free.contains(slot.0) && !self.empty.contains(slot.0), "{slot:?} is free already");
        self.infos[slot.index()].used = Packed::new(Use::Free);
        self.free.insert(slot.0);
    }

    /// The slot's frame went to the guest, or to the host.
    pub fn vacate(&mut self, slot: Slot) {
        assert!(!matches!(self.used(slot), Use::Free | Use::Empty), "{slot:?} is empty already");
        self.infos[slot.index()].used = Packed::new(Use::Empty);
        match slot.0.checked_sub(self.slots()) {
            None => self.empty.insert(slot.0),
            Some(beyond) => self.blocks[(beyond / BLOCK_PAGES) as usize] += 1,
        }
    }

    // ── the standby list ──────────────────────────────────────────────────────────────────

    pub fn standby_count(&self) -> u32 {
        self.standby_count
    }

    pub fn standby_oldest(&self) -> Option<Slot> {
        (self.standby_first != NIL).then_some(Slot(self.standby_first))
    }

    pub fn standby_push(&mut self, slot: Slot) {
        let last = self.standby_last;
        let info = &mut self.infos[slot.index()];
        (info.prev, info.next) = (last, NIL);
        match last {
            NIL => self.standby_first = slot.0,
            last => self.infos[last as usize].next = slot.0,
        }
        self.standby_last = slot.0;
        self.standby_count += 1;
    }

    pub fn standby_remove(&mut self, slot: Slot) {
        let Info { prev, next, .. } = self.infos[slot.index()];
        match prev {
            NIL => self.standby_first = next,
            prev => self.infos[prev as usize].next = next,
        }
        match next {
            NIL => self.standby_last = prev,
            next => self.infos[next as usize].prev = prev,
        }
        self.standby_count -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn runs_cross_words_and_fall_back_to_the_longest() {
        let mut set = SlotSet::new(256, true);
        assert_eq!(set.take(200), Some(SlotRun::new(Slot(0), 200)));
        assert_eq!(set.take(100), Some(SlotRun::new(Slot(200), 56)));
        assert_eq!(set.take(1), None);
    }

    #[test]
    fn a_block_is_had_whole_or_not_at_all() {
        let mut staging = Staging::new(64, 2);
        let bind = |staging: &mut Staging, slots: SlotRun| {
            slots.slots().for_each(|slot| staging.assign(slot, Use::Bound(PageNo(u64::from(slot.0)))));
        };
        let [first, second] = [staging.take_block().unwrap(), staging.take_block().unwrap()];
        assert_eq!((first.start, first.len, second.start), (Slot(64), BLOCK_PAGES, Slot(64 + BLOCK_PAGES)));
        [first, second].into_iter().for_each(|slots| bind(&mut staging, slots));
        assert_eq!((staging.take_block(), staging.held_frames(), staging.empty_slots()), (None, 1024, 64));
        second.slots().skip(1).for_each(|slot| staging.vacate(slot));
        assert_eq!((staging.whole_blocks(), staging.held_frames()), (0, 513));
        // Its last frame is needed by nobody, and then by another page.
        staging.free(second.start);
        let slots = staging.take_free(1).unwrap();
        bind(&mut staging, slots);
        staging.vacate(slots.start);
        assert_eq!((staging.take_block(), staging.empty_slots()), (Some(second), 64));
    }

    #[test]
    fn standby_leaves_in_the_order_of_arrival() {
        let mut staging = Staging::new(64, 0);
        let run = staging.take_empty(4).unwrap();
        for slot in run.slots() {
            staging.assign(slot, Use::Bound(PageNo(u64::from(slot.0))));
            staging.standby_push(slot);
        }
        staging.standby_remove(Slot(1));
        let mut order = vec![];
        while let Some(slot) = staging.standby_oldest() {
            staging.standby_remove(slot);
            order.push(slot.0);
        }
        assert_eq!(order, [0, 2, 3]);
        assert_eq!(staging.standby_count(), 0);
    }

    proptest! {
        /// Against a naive set: what is taken was in, is contiguous, is out afterwards; nothing is lost.
        #[test]
        fn slot_set_matches_a_naive_model(steps in prop::collection::vec((0u32..300, 1u32..100, any::<bool>()), 1..200)) {
            let mut set = SlotSet::new(300, false);
            let mut model = std::collections::BTreeSet::new();
            for (slot, want, take) in steps {
                if take {
                    match set.take(want) {
                        Some(run) => {
                            prop_assert!(run.len <= want && run.len > 0);
                            for slot in run.slots() {
                                prop_assert!(model.remove(&slot.0));
                            }
                        }
                        None => prop_assert!(model.is_empty()),
                    }
                } else if model.insert(slot) {
                    set.insert(slot);
                }
                prop_assert_eq!(set.count as usize, model.len());
            }
        }
    }
}
