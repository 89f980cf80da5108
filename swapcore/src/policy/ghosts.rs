//! Whether what leaves the queue of lone pages comes back soon, and how many of the next ones stay therefore.
//!
//! A page that leaves unproven is a *ghost* while a third of the budget's worth of pages leaves after it (ARC, Megiddo
//! and Modha, FAST 2003; S3-FIFO). One that is missed as a ghost left too early, so more of the next ones stay; one
//! that is not makes fewer stay. Above three returns in five the share grows, else it shrinks: in random touches of
//! twice the budget one ghost in four comes back, in a working set that is new and fits nearly all do.
//!
//! Of 16 pages one is watched, chosen by a hash (spatial sampling: Waldspurger et al., FAST 2015), by two bytes: in
//! which *epoch* it left, which is so many pages that have left. The ghosts of an epoch are counted, and whatever is
//! left of the count when the epoch is no longer watched has not come back.

use crate::units::{PageNo, Run};

/// One page of so many is watched.
const GROUP: u64 = 16;
/// Epochs watched at a time, the one under way among them.
const EPOCHS: usize = 8;
/// An epoch lasts until this part of the budget has left.
const EPOCH_SHARE: u64 = 24;
/// Shares are in parts of this.
const WHOLE: u64 = 1 << 20;
/// The rest leaves, or nothing would be known of what comes back.
const SHARE_MAX: u64 = WHOLE / 8 * 7;
/// So many times as far as a return moves the share up, a ghost that never came moves it down, in halves.
const GONE_WEIGHT_HALVES: u64 = 3;
/// The share goes from nothing to the whole while this part of the budget returns,
const RANGE_SHARE: u64 = 16;
/// and not by fewer watched pages than this: chance would rule it.
const RANGE_MIN: u64 = 32;

const _: () =
    assert!(EPOCHS as u64 * 3 == EPOCH_SHARE, "ghosts are watched while a third of the budget leaves");
const _: () = assert!(GROUP == 1 << 4, "the hash below has four bits");

/// The ghosts of one VM, and the share of unproven pages that stays because of them.
#[derive(Debug)]
pub struct Ghosts {
    /// The epoch in which the watched page of each group left unproven; 0: it is no ghost.
    left_in: Vec<u16>,
    /// From 1, wrapping.
    epoch: u16,
    /// Pages that have left in this epoch, by whichever way.
    left: u64,
    /// Of each epoch that is watched, the watched pages that are still away.
    away: [u32; EPOCHS],
    /// Of pages about to leave unproven, how many stay.
    share: u64,
    /// Pages that were to stay, not yet chosen.
    owed: u64,
}

impl Ghosts {
    /// For a memory of so many pages. As long as nothing is known, most stays: memory may just have been filled, and
    /// the rest of it was not asked for since.
    pub fn new(pages: u64) -> Self {
        Ghosts {
            left_in: vec![0; pages.div_ceil(GROUP) as usize],
            epoch: 1,
            left: 0,
            away: [0; EPOCHS],
            share: SHARE_MAX,
            owed: 0,
        }
    }

    /// Bytes that grow with the memory.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.left_in[..])
    }

    /// Whether the next page that is about to leave unproven stays instead.
    pub fn next_stays(&mut self) -> bool {
        self.owed += self.share;
        let stays = self.owed >= WHOLE;
        self.owed -= if stays { WHOLE } else { 0 };
        stays
    }

    /// The page leaves unproven.
    pub fn note_unproven(&mut self, page: PageNo) {
        if is_watched(page) {
            self.take(page);
            self.left_in[group_of(page)] = self.epoch;
            self.away[usize::from(self.epoch) % EPOCHS] += 1;
        }
    }

    /// So many pages have left, by whichever way, with a budget of so many frames.
    pub fn note_left(&mut self, pages: u32, budget: u64) {
        self.left += u64::from(pages);
        if self.left >= (budget / EPOCH_SHARE).max(1) {
            self.left = 0;
            self.epoch = self.epoch.wrapping_add(1).max(1);
            let gone = u64::from(std::mem::take(&mut self.away[usize::from(self.epoch) % EPOCHS]));
            self.share = self.share.saturating_sub(gone * step(budget) * GONE_WEIGHT_HALVES / 2);
        }
    }

    /// The pages come back because they are touched, or about to be.
    pub fn note_back(&mut self, run: Run, budget: u64) {
        for page in run.pages().filter(|page| is_watched(*page)) {
            if self.take(page) {
                self.share = (self.share + step(budget)).min(SHARE_MAX);
            }
        }
    }

    /// The page is no ghost any more; true if it was one.
    fn take(&mut self, page: PageNo) -> bool {
        let left_in = std::mem::take(&mut self.left_in[group_of(page)]);
        let is_ghost = left_in != 0 && usize::from(self.epoch.wrapping_sub(left_in)) < EPOCHS;
        if is_ghost {
            let away = &mut self.away[usize::from(left_in) % EPOCHS];
            // Epochs come again after 65 535 others, and a ghost of then is taken for one of now.
            *away = away.saturating_sub(1);
        }
        is_ghost
    }
}

fn group_of(page: PageNo) -> usize {
    (page.0 / GROUP) as usize
}

/// By a hash of the group: every page of a stride would be watched otherwise, or none.
fn is_watched(page: PageNo) -> bool {
    (page.0 / GROUP).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 60 == page.0 % GROUP
}

/// How far one return moves the share.
fn step(budget: u64) -> u64 {
    WHOLE / (budget / RANGE_SHARE / GROUP).max(RANGE_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    const BUDGET: u64 = 24_000;
    const PAGES: u64 = 1 << 20;

    /// So many pages leave unproven, one after the other; `returns` of a thousand come back when `later` others have
    /// left.
    fn play(ghosts: &mut Ghosts, pages: u64, returns: u64, later: u64) {
        for nth in 0..pages {
            ghosts.note_unproven(PageNo(nth));
            ghosts.note_left(1, BUDGET);
            let back = nth.checked_sub(later).filter(|back| back.wrapping_mul(0x9E37_79B9) % 1000 < returns);
            ghosts.note_back(Run::new(PageNo(back.unwrap_or_default()), u32::from(back.is_some())), BUDGET);
        }
    }

    fn stay_of_a_thousand(ghosts: &mut Ghosts) -> usize {
        (0..1000).filter(|_| ghosts.next_stays()).count()
    }

    #[test]
    fn most_stays_until_something_is_known() {
        assert_eq!(stay_of_a_thousand(&mut Ghosts::new(PAGES)), 875);
    }

    #[test]
    fn what_mostly_comes_back_soon_stays_and_nothing_else() {
        for (what, returns, later, stays) in [
            ("never missed", 0, 100, false),
            ("random touches of twice the budget", 280, 4000, false),
            ("half of it comes back", 500, 100, false),
            ("most of it comes back", 800, 100, true),
            ("a new working set", 1000, 4000, true),
            ("all of it, but too late", 1000, 9000, false),
        ] {
            let mut ghosts = Ghosts::new(PAGES);
            for round in 0..2 {
                play(&mut ghosts, 20 * BUDGET, returns, later);
                let of_a_thousand = stay_of_a_thousand(&mut ghosts);
                assert!(
                    if stays { of_a_thousand > 500 } else { of_a_thousand < 100 },
                    "{what}: {of_a_thousand}"
                );
                // And from the other end.
                if round == 0 {
                    play(&mut ghosts, 20 * BUDGET, if stays { 0 } else { 1000 }, 100);
                    let opposite = stay_of_a_thousand(&mut ghosts);
                    assert!(if stays { opposite == 0 } else { opposite == 875 }, "{what}: {opposite}");
                }
            }
        }
    }

    #[test]
    fn one_page_of_sixteen_is_watched_whatever_the_stride() {
        for stride in [1, 2, 3, 8, 16, 17, 64, 512] {
            let watched = (0..16_000).filter(|nth| is_watched(PageNo(nth * stride))).count();
            assert!((900..1100).contains(&watched), "stride {stride}: {watched}");
        }
    }

    #[test]
    fn two_bytes_for_sixteen_pages() {
        assert_eq!(Ghosts::new(1 << 18).bytes(), (1 << 18) / 8);
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Unproven(u64),
        Left(u32),
        Back(u64, u32),
    }

    fn steps() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u64..600).prop_map(Step::Unproven),
            (1u32..64).prop_map(Step::Left),
            (0u64..600, 1u32..40).prop_map(|(page, pages)| Step::Back(page, pages)),
        ]
    }

    proptest! {
        /// Against a model that remembers of every watched page how long ago it left.
        #[test]
        fn ghosts_are_counted_once(steps in prop::collection::vec(steps(), 1..2000), budget in 1u64..3000) {
            let (mut ghosts, mut model) = (Ghosts::new(640), HashMap::<u64, u32>::new());
            let mut epochs = 0;
            for step in steps {
                let before = ghosts.share;
                match step {
                    Step::Unproven(page) => {
                        ghosts.note_unproven(PageNo(page));
                        if is_watched(PageNo(page)) {
                            model.insert(page, epochs);
                        }
                        prop_assert_eq!(ghosts.share, before);
                    }
                    Step::Left(pages) => {
                        let epoch = ghosts.epoch;
                        ghosts.note_left(pages, budget);
                        epochs += u32::from(ghosts.epoch != epoch);
                        let known = model.len();
                        model.retain(|_, left_in| epochs - *left_in < EPOCHS as u32);
                        let expected = if model.len() == known { ghosts.share == before } else { ghosts.share < before || before == 0 };
                        prop_assert!(expected);
                    }
                    Step::Back(page, pages) => {
                        ghosts.note_back(Run::new(PageNo(page), pages), budget);
                        let known = model.len();
                        for page in page..page + u64::from(pages) {
                            model.remove(&page);
                        }
                        let expected = if model.len() == known { ghosts.share == before } else { ghosts.share > before || before == SHARE_MAX };
                        prop_assert!(expected);
                    }
                }
                prop_assert_eq!(ghosts.away.iter().sum::<u32>() as usize, model.len());
                prop_assert!(ghosts.share <= SHARE_MAX);
            }
        }
    }
}
