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
//! operation. Behind the other slots there are whole blocks of them for huge pages, apart: the host has page tables of
//! its own for single frames, and a huge page that comes to where there is one falls to pieces. Each has its own place
//! among them, and is known there as a whole until a part of it goes another way. Standby slots form a list in the
//! order in which they became standby.

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

/// A slot's use in 8 bytes, 0 if it is empty: so nothing is taken from the host for slots that were never used.
#[derive(Clone, Copy)]
struct Packed(u64);

impl Packed {
    const EMPTY: u64 = 0;
    const FREE: u64 = 1;
    const GRANTED: u64 = 2;
    const ORPHAN: u64 = 3;
    /// What page 0 is.
    const PAGES: u64 = 4;

    fn new(used: Use) -> Packed {
        Packed(match used {
            Use::Empty => Packed::EMPTY,
            Use::Free => Packed::FREE,
            Use::Granted => Packed::GRANTED,
            Use::Orphan => Packed::ORPHAN,
            Use::Bound(page) => Packed::PAGES + page.0,
        })
    }

    fn used(self) -> Use {
        match self.0 {
            Packed::EMPTY => Use::Empty,
            Packed::FREE => Use::Free,
            Packed::GRANTED => Use::Granted,
            Packed::ORPHAN => Use::Orphan,
            page => Use::Bound(PageNo(page - Packed::PAGES)),
        }
    }
}

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
    /// [`Packed`], and the neighbours in the standby list.
    used: Vec<u64>,
    links: Vec<[u32; 2]>,
    free: SlotSet,
    /// Without those of the blocks.
    empty: SlotSet,
    /// How many slots of each block are empty.
    blocks: Box<[u32]>,
    /// Which block of memory each has as a whole; one more than its number.
    lent: Box<[u32]>,
    standby_first: u32,
    standby_last: u32,
    standby_count: u32,
}

impl std::fmt::Debug for Staging {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Staging {{ slots: {}, free: {}, empty: {}, standby: {} }}",
            self.used.len(),
            self.free.count,
            self.empty.count,
            self.standby_count
        )
    }
}

impl Staging {
    /// An area of so many single slots, and so many blocks of 512 behind them. All are empty.
    pub fn new(slots: u32, blocks: u32) -> Self {
        let all = slots + blocks * BLOCK_PAGES;
        Staging {
            used: vec![0; all as usize],
            links: vec![[0; 2]; all as usize],
            free: SlotSet::new(all, false),
            empty: SlotSet::new(slots, true),
            blocks: vec![BLOCK_PAGES; blocks as usize].into(),
            lent: vec![0; blocks as usize].into(),
            standby_first: NIL,
            standby_last: NIL,
            standby_count: 0,
        }
    }

    /// All slots, those of the blocks among them.
    pub fn all_slots(&self) -> u32 {
        self.used.len() as u32
    }

    /// Those without the blocks'.
    pub fn slots(&self) -> u32 {
        self.used.len() as u32 - self.blocks.len() as u32 * BLOCK_PAGES
    }

    /// Bytes that the books take: of blocks as wholes, as they nearly always are.
    pub fn bytes(&self) -> usize {
        let sets = [&self.free, &self.empty].map(|set| size_of_val(&set.words[..]));
        let blocks = size_of_val(&self.blocks[..]) + size_of_val(&self.lent[..]);
        self.slots() as usize * size_of::<(u64, [u32; 2])>() + sets.iter().sum::<usize>() + blocks
    }

    /// Frames that nothing needs.
    pub fn free_frames(&self) -> u32 {
        self.free.count
    }

    /// Single slots without a frame.
    pub fn empty_slots(&self) -> u32 {
        self.empty.count
    }

    /// Slots with a frame in them, whatever for.
    pub fn held_frames(&self) -> u32 {
        self.used.len() as u32 - self.empty.count - self.blocks.iter().sum::<u32>()
    }

    /// What the slot is used for.
    pub fn used(&self, slot: Slot) -> Use {
        let lent =
            slot.0.checked_sub(self.slots()).map(|beyond| (beyond / BLOCK_PAGES, beyond % BLOCK_PAGES));
        match lent.map(|(at, nth)| (self.lent[at as usize], nth)) {
            Some((block @ 1.., nth)) => {
                Use::Bound(PageNo(u64::from(block - 1) * u64::from(BLOCK_PAGES) + u64::from(nth)))
            }
            _ => Packed(self.used[slot.index()]).used(),
        }
    }

    /// The slots that are bound one by one, with their pages, in ascending order. Blocks without any are passed over:
    /// there may be 2048.
    pub fn bound_one_by_one(&self) -> impl Iterator<Item = (PageNo, Slot)> {
        let has_any = |place: &usize| self.lent[*place] == 0 && self.blocks[*place] < BLOCK_PAGES;
        let blocks = (0..self.blocks.len()).filter(has_any).map(|place| self.slots_at(place));
        let runs = std::iter::once(SlotRun::new(Slot(0), self.slots())).chain(blocks);
        runs.flat_map(|run| run.slots()).filter_map(|slot| match Packed(self.used[slot.index()]).used() {
            Use::Bound(page) => Some((page, slot)),
            _ => None,
        })
    }

    /// Up to `want` contiguous free frames. The caller binds or grants them.
    pub fn take_free(&mut self, want: u32) -> Option<SlotRun> {
        self.free.take(want)
    }

    /// Up to `want` contiguous slots without a frame. The caller binds or grants them.
    pub fn take_empty(&mut self, want: u32) -> Option<SlotRun> {
        self.empty.take(want)
    }

    /// Where the block's place is, if there are any.
    fn place_of(&self, block: usize) -> Option<usize> {
        (!self.blocks.is_empty()).then(|| block % self.blocks.len())
    }

    fn slots_at(&self, place: usize) -> SlotRun {
        SlotRun::new(Slot(self.slots() + place as u32 * BLOCK_PAGES), BLOCK_PAGES)
    }

    /// Whether the place of this block of memory is empty.
    pub fn has_place(&self, block: usize) -> bool {
        self.place_of(block).is_some_and(|place| self.blocks[place] == BLOCK_PAGES)
    }

    /// The slots for a huge page, which are bound to its pages as a whole until they are [split](Self::split).
    pub fn lend(&mut self, block: usize) -> Option<SlotRun> {
        let place = self.place_of(block).filter(|place| self.blocks[*place] == BLOCK_PAGES)?;
        self.blocks[place] = 0;
        self.lent[place] = block as u32 + 1;
        Some(self.slots_at(place))
    }

    /// The slots that the block of memory has as a whole.
    pub fn lent_to(&self, block: usize) -> Option<SlotRun> {
        let place = self.place_of(block).filter(|place| self.lent[*place] == block as u32 + 1)?;
        Some(self.slots_at(place))
    }

    /// How many pages are in blocks that have slots as wholes.
    pub fn lent_pages(&self) -> usize {
        self.lent.iter().filter(|block| **block > 0).count() * BLOCK_PAGES as usize
    }

    /// All of its frames went to the guest.
    pub fn take_back(&mut self, block: usize) {
        let place = self.place_of(block).filter(|place| self.lent[*place] == block as u32 + 1);
        let place = place.expect("the block has slots as a whole");
        self.lent[place] = 0;
        self.blocks[place] = BLOCK_PAGES;
    }

    /// From now on the block's slots are bound one by one.
    pub fn split(&mut self, block: usize) -> Option<SlotRun> {
        let slots = self.lent_to(block)?;
        slots.slots().for_each(|slot| self.used[slot.index()] = Packed::new(self.used(slot)).0);
        let place = self.place_of(block)?;
        self.lent[place] = 0;
        Some(slots)
    }

    /// From now on the slot, which was taken before, is used for this.
    ///
    /// # Panics
    /// If that is [`Use::Empty`] or [`Use::Free`]: only [`Staging::vacate`] and [`Staging::free`] put a slot where it
    /// is found again.
    pub fn assign(&mut self, slot: Slot, used: Use) {
        assert!(
            !matches!(used, Use::Empty | Use::Free),
            "slots become empty or free through vacate and free"
        );
        self.used[slot.index()] = Packed::new(used).0;
    }

    /// The slot's frame is not needed any more.
    pub fn free(&mut self, slot: Slot) {
        assert!(!self.free.contains(slot.0) && !self.empty.contains(slot.0), "{slot:?} is free already");
        self.used[slot.index()] = Packed::new(Use::Free).0;
        self.free.insert(slot.0);
    }

    /// The slot's frame went to the guest, or to the host.
    pub fn vacate(&mut self, slot: Slot) {
        assert!(!matches!(self.used(slot), Use::Free | Use::Empty), "{slot:?} is empty already");
        self.used[slot.index()] = Packed::new(Use::Empty).0;
        match slot.0.checked_sub(self.slots()) {
            None => self.empty.insert(slot.0),
            Some(beyond) => self.blocks[(beyond / BLOCK_PAGES) as usize] += 1,
        }
    }

    // ── the standby list ──────────────────────────────────────────────────────────────────

    /// Slots in the standby list.
    pub fn standby_count(&self) -> u32 {
        self.standby_count
    }

    /// The slot that became standby first. None if the list is empty.
    pub fn standby_oldest(&self) -> Option<Slot> {
        (self.standby_first != NIL).then_some(Slot(self.standby_first))
    }

    /// Puts a slot at the end of the list. It must not be in the list, which would be cut off there.
    pub fn standby_push(&mut self, slot: Slot) {
        let last = self.standby_last;
        self.links[slot.index()] = [last, NIL];
        match last {
            NIL => self.standby_first = slot.0,
            last => self.links[last as usize][1] = slot.0,
        }
        self.standby_last = slot.0;
        self.standby_count += 1;
    }

    /// Takes a slot out of the list, wherever it is. It must be in the list, or the list's ends and its count are
    /// wrong.
    pub fn standby_remove(&mut self, slot: Slot) {
        let [prev, next] = self.links[slot.index()];
        match prev {
            NIL => self.standby_first = next,
            prev => self.links[prev as usize][1] = next,
        }
        match next {
            NIL => self.standby_last = prev,
            next => self.links[next as usize][0] = prev,
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
        let [first, second] = [4, 7].map(|block| staging.lend(block).unwrap());
        assert_eq!((first.start, first.len, second.start), (Slot(64), BLOCK_PAGES, Slot(64 + BLOCK_PAGES)));
        assert_eq!((staging.lend(5), staging.held_frames(), staging.empty_slots()), (None, 1024, 64));
        assert_eq!(staging.used(Slot(67)), Use::Bound(PageNo(4 * 512 + 3)));
        assert_eq!([4, 6].map(|block| staging.lent_to(block)), [Some(first), None]);
        staging.take_back(4);
        assert_eq!(
            (staging.used(Slot(67)), staging.held_frames(), staging.lent_pages()),
            (Use::Empty, 512, 512)
        );
        assert!(staging.has_place(6) && !staging.has_place(5));
        // A part goes another way.
        assert_eq!(staging.split(7), Some(second));
        assert_eq!(staging.used(second.start), Use::Bound(PageNo(7 * 512)));
        second.slots().skip(1).for_each(|slot| staging.vacate(slot));
        assert_eq!((staging.has_place(7), staging.held_frames()), (false, 1));
        // Its last frame is needed by nobody, and then by another page.
        staging.free(second.start);
        let slots = staging.take_free(1).unwrap();
        staging.assign(slots.start, Use::Bound(PageNo(3)));
        staging.vacate(slots.start);
        assert_eq!((staging.lend(5), staging.empty_slots()), (Some(second), 64));
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
