//! What must be so after every step, whatever went wrong: the newest content of each page is in exactly one place, the
//! frames are those on record and within the budget, and what a migration reads is what it was told.

use super::Sim;
use super::closed::Closed;
use super::coverage::Fault;
use super::kernel::Entry;
use crate::api::{Place, SubscriberId};
use crate::core::Ticket;
use crate::table::{Flag, PageState};
use crate::units::{PageNo, Run, Slot, TIERS_MAX, TierId};

/// A run that a migration reads.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) run: Run,
    /// Where each page was said to be, and what it contained. None: it has been given back or lost since.
    pub(super) pages: Vec<Option<(Place, TierId, Option<u64>)>>,
}

/// Somebody who wants to know which pages the guest writes.
#[derive(Debug)]
pub(super) struct Subscriber {
    pub(super) id: Option<SubscriberId>,
    /// A subscription, or what it has to tell, is asked for.
    pub(super) asked: bool,
    /// It has been told that writes to the page are noted for it.
    pub(super) tracked: Vec<bool>,
    /// Written since the page was last scanned.
    pub(super) written: Vec<bool>,
    /// Written before the page was scanned: the next answer has to name it.
    pub(super) to_tell: Vec<bool>,
}

#[derive(Debug)]
pub(super) struct Oracle {
    /// What the guest last wrote. None: lost, and said to be.
    pub(super) truth: Vec<Option<u64>>,
    /// Those who want to know what is written, as a migration does, and another one beside it.
    pub(super) subscribers: [Subscriber; 2],
    pub(super) held: Vec<Held>,
    /// Discards that are done in steps: how far each is, and where it ends.
    pub(super) discards: Vec<(Ticket, PageNo, PageNo)>,
    /// The core has said that who waits for a frame gets none, and not that this is over.
    pub(super) starved: bool,
    /// For how many ticks somebody has waited for each tier, which has been silent all the time; and whether the core
    /// has said that it is, and not that this is over.
    pub(super) silent: [(u64, bool); TIERS_MAX],
    /// For how many ticks somebody has waited for a frame while no operation of any tier has ended.
    pub(super) hungry_ticks: u64,
    /// Which tiers take no writes, and what is on its way there.
    pub(super) closed: Closed,
    /// The core has said that all frames are held and the guest waits for one, and not that this is over.
    pub(super) short: bool,
    /// Frames taken at the last check.
    taken: u64,
}

impl Oracle {
    pub(super) fn new(pages: usize) -> Self {
        Oracle {
            truth: vec![Some(0); pages],
            subscribers: [(); 2].map(|()| Subscriber {
                id: None,
                asked: false,
                tracked: vec![false; pages],
                written: vec![false; pages],
                to_tell: vec![false; pages],
            }),
            held: Vec::new(),
            discards: Vec::new(),
            starved: false,
            silent: [(0, false); TIERS_MAX],
            hungry_ticks: 0,
            closed: Closed::default(),
            short: false,
            taken: 0,
        }
    }

    /// Who holds the page may still be reading it from the store. It has gone from everywhere else.
    pub(super) fn is_given_back(&mut self, page: PageNo, damaged: bool) {
        for held in self.held.iter_mut().filter(|held| held.run.contains(page)) {
            let told = &mut held.pages[(page.0 - held.run.start.0) as usize];
            *told = told.filter(|(place, ..)| *place == Place::Stored && !damaged);
        }
    }

    pub(super) fn written(&mut self, page: PageNo) {
        for Subscriber { tracked, written, .. } in &mut self.subscribers {
            written[page.index()] |= tracked[page.index()];
        }
    }

    /// The kernel says which pages of the run have been written.
    pub(super) fn scanned(&mut self, run: Run) {
        for Subscriber { written, to_tell, .. } in &mut self.subscribers {
            for (written, to_tell) in written[run.indices()].iter_mut().zip(&mut to_tell[run.indices()]) {
                *to_tell |= std::mem::take(written);
            }
        }
    }

    /// A migration has been told that the page is stored at the origin, and holds it.
    pub(super) fn is_read_at_origin(&self, page: PageNo) -> bool {
        let told = self.held.iter().filter(|held| held.run.contains(page));
        let mut told = told.filter_map(|held| held.pages[(page.0 - held.run.start.0) as usize]);
        told.any(|(place, tier, _)| place == Place::Stored && tier == TierId::ORIGIN)
    }

    /// Who holds the page will not find it where it was.
    pub(super) fn is_not_as_held(&mut self, page: PageNo) {
        for held in self.held.iter_mut().filter(|held| held.run.contains(page)) {
            held.pages[(page.0 - held.run.start.0) as usize] = None;
        }
    }
}

/// Panics about a page, and remembers which one it is.
macro_rules! ensure {
    ($sim:expr, $page:expr, $good:expr, $($text:tt)+) => {
        if !$good {
            $sim.trace.suspect.set(Some($page));
            panic!($($text)+);
        }
    };
}

impl Sim {
    /// Looks at everything, if anything has happened since it did so last: an access of the guest that finds its page
    /// looks at that page itself.
    pub(super) fn check(&mut self) {
        if !std::mem::take(&mut self.changed) {
            return;
        }
        self.core.check();
        let mut frames = self.kernel.staging.iter().filter(|frame| frame.is_some()).count() as u64;
        for index in 0..self.pages as usize {
            frames += u64::from(self.check_page(PageNo(index as u64)));
        }
        let (taken, budget) = (self.core.frames_taken(), self.core.budget_frames());
        assert_eq!(frames, taken, "frames in the guest and in staging = frames on record");
        // A budget below what is in use is reached in steps, downwards only.
        assert!(taken <= budget.max(self.oracle.taken), "{taken} frames with a budget of {budget}");
        self.oracle.taken = taken;
        self.oracle.held.iter().for_each(|held| self.check_held(held));
        self.check_closed();
        self.coverage.checks += 1;
    }

    /// Says whether the page has a frame in the guest.
    fn check_page(&self, page: PageNo) -> bool {
        let index = page.index();
        let table = self.core.table();
        let state = table.state(page);
        let memory = state == PageState::Untouched || self.memory.binary_search(&page).is_ok();
        ensure!(self, page, memory, "{page} is nobody's, and {state:?}");
        let entry = self.kernel.guest[index];
        let truth = self.oracle.truth[index];
        let stored = table.has(page, Flag::InStore);
        let empty = matches!(state, PageState::Untouched | PageState::Poisoned);
        ensure!(
            self,
            page,
            !(empty && table.has(page, Flag::Origin)),
            "{page} is {state:?}, and said to be at the origin"
        );
        // Most pages, most of the time.
        match (state, entry) {
            (PageState::Untouched, Entry::Missing) if truth == Some(0) && !stored => return false,
            (PageState::Resident, Entry::Frame(content)) if truth == Some(content) && !stored => return true,
            _ => {}
        }
        let found = match state {
            PageState::Untouched => Some(0),
            PageState::Resident => match entry {
                Entry::Frame(content) => Some(content),
                _ => None,
            },
            PageState::Poisoned => None,
            PageState::Stored => self.stored(page, truth),
            PageState::Standby | PageState::Leaving | PageState::Sampled => self.in_slot(page),
            PageState::Arriving => match self.core.slot_of(page) {
                Some(slot) if self.kernel.is_busy(slot) => self.stored(page, truth),
                _ => self.in_slot(page),
            },
        };
        let here = matches!(entry, Entry::Frame(_));
        ensure!(
            self,
            page,
            here == (state == PageState::Resident),
            "{page} is {state:?}, and {entry:?} in the guest"
        );
        let marked = entry == Entry::Poison;
        ensure!(
            self,
            page,
            !marked || state == PageState::Poisoned,
            "{page} is {state:?}, and poisoned in the guest"
        );
        ensure!(
            self,
            page,
            found == truth,
            "{page} ({state:?}) has {found:x?}, and the guest last wrote {truth:x?}"
        );
        if stored {
            // Whatever the page is now: the store has what the checksum on record is of.
            let sum = super::sum_of(page, self.disk.content[self.stored_place(page)]);
            let good = self.core.recorded_sum(page) == Some(sum) || self.is_excused(page);
            ensure!(
                self,
                page,
                good,
                "{page} ({state:?}): the store has not what the checksum on record is of"
            );
        } else {
            let needs = matches!(state, PageState::Stored | PageState::Standby);
            ensure!(self, page, !needs, "{page} is {state:?}, and the store is not said to have it");
        }
        here
    }

    /// The store has been full for long.
    pub(super) fn check_copies(&self) {
        for page in (0..self.pages).map(PageNo) {
            let copy = self.core.is_full(self.core.table().home(page.block()))
                && self.core.table().state(page) == PageState::Resident
                && self.disk.allocated[page.index()];
            ensure!(self, page, !copy, "{page} is in RAM, and its copy takes room in a full store");
        }
    }

    /// Nothing is asked, nothing is under way: the disk has no room taken by what nobody will read.
    pub(super) fn check_space(&self) {
        for page in (0..self.pages).map(PageNo) {
            let allocated = self.disk.allocated[page.index()];
            ensure!(
                self,
                page,
                !allocated || self.core.is_place_taken(page),
                "{page} has a place that is not on record"
            );
            let empty = self.core.table().state(page) == PageState::Untouched;
            let kept = allocated && empty && !self.disk.keeps_all;
            ensure!(self, page, !kept, "{page} is empty, and its place in the store is not given back");
        }
    }

    fn in_slot(&self, page: PageNo) -> Option<u64> {
        self.core.slot_of(page).and_then(|slot: Slot| self.kernel.staging[slot.index()])
    }

    /// What a read of the store ends with: its content, or the knowledge that it is lost. The checksum tells.
    fn stored(&self, page: PageNo, truth: Option<u64>) -> Option<u64> {
        let content = Some(self.disk.content[self.stored_place(page)]);
        let excused = content != truth && self.is_excused(page);
        if excused { truth } else { content }
    }

    /// Where what is stored of the page has to be.
    pub(super) fn stored_place(&self, page: PageNo) -> usize {
        self.disk.place(self.core.table().stored_at(page), page)
    }

    fn is_excused(&self, page: PageNo) -> bool {
        self.disk.damage[self.stored_place(page)].is_some_and(|fault| fault != Fault::BadSector)
    }

    /// Held pages stay where the migration was told that they are.
    fn check_held(&self, held: &Held) {
        for (page, told) in held.run.pages().zip(&held.pages) {
            let index = page.index();
            match told {
                Some((Place::Memory, ..)) => {
                    let here = matches!(self.kernel.guest[index], Entry::Frame(_));
                    ensure!(self, page, here, "{page} left the guest while it was held");
                }
                Some((Place::Stored, tier, content)) => {
                    let place = self.disk.place(*tier, page);
                    let same =
                        Some(self.disk.content[place]) == *content || self.disk.damage[place].is_some();
                    ensure!(
                        self,
                        page,
                        same,
                        "{page} is not in the store as it was when it was held, {content:x?}"
                    );
                }
                Some((Place::Zero, _, content)) => {
                    ensure!(
                        self,
                        page,
                        *content == Some(0),
                        "{page} was said to be zero, and was {content:x?}"
                    );
                }
                Some((Place::Poisoned, _, content)) => {
                    ensure!(self, page, content.is_none(), "{page} was said to be lost, and is not");
                }
                Some((Place::Staged | Place::Moving, ..)) | None => {}
            }
        }
    }
}
