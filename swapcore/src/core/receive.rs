//! The target's end of a migration: pages arrive in staging frames and are placed by [`crate::policy::placement`].
//!
//! While receiving, no VM runs and nothing is paged: frames are taken and written only for what arrives. What was placed in RAM before it
//! was known that there is something hotter is placed once more, in the store. It ends when all has arrived, not when all is written: the
//! VM stands still meanwhile, and what still leaves is in a state that it may well be in. Whoever has time to wait for the writes
//! [settles](Core::settle_receiving) before.

use std::collections::VecDeque;

use super::Core;
use super::event::{Action, Response, Ticket};
use super::state::receiving::Receiving;
use crate::api::{Arrival, Placed};
use crate::error::CommandError;
use crate::policy::clock::{VICTIM_RUN_MAX, may_leave};
use crate::policy::placement::{Arrivals, HEAT_AGAIN, HOT};
use crate::table::{Flag, PageState};
use crate::units::{BLOCK_PAGES, PageNo, Run, SlotRun};

/// Frames kept for receiving into, at least: newer versions come while the old ones still have theirs.
const RECEIVE_FRAMES: u32 = 512;

/// How often, for one heat map, the search begins anew because of a page that came and is colder than all others were: each time it looks
/// at every page in RAM, and where there is no end of such pages they are not what counts.
const RESTARTS_MAX: u32 = 16;

/// Pages that give way at a time, at least.
const WAY_MIN: u32 = 64;

/// As long as the source has not watched the VM, one page in so many of those in the store is taken to be hot.
const HOT_UNSEEN_SHARE: u64 = 4;

const NOT_RECEIVING: CommandError = CommandError::NotNow("the VM is not being received");

impl Core {
    pub(super) fn start_receiving(&mut self, heat: &[u8]) -> Result<Response, CommandError> {
        if self.table.count(PageState::Untouched) != self.table.pages() || self.receiving.is_some() {
            return Err(CommandError::NotNow("only an empty VM can be received into"));
        }
        self.check_heat(heat)?;
        self.table.count_hot_from(Some(HOT));
        let pages = self.table.pages();
        self.receiving = Some(Receiving {
            came: vec![0; pages.div_ceil(64) as usize],
            to_come: pages,
            found_hot: None,
            hand: PageNo(0),
            coldest: 0,
            next_coldest: u8::MAX,
            restarts: 0,
            pages_read_before: self.counts.pages_read,
            victims_before: self.counts.victims,
            grants: VecDeque::new(),
            settle: None,
        });
        self.frames.set_receiving(true);
        self.take_heat(heat)?;
        Ok(Response::Done)
    }

    fn check_heat(&self, heat: &[u8]) -> Result<(), CommandError> {
        let fits = heat.len() as u64 == self.table.pages();
        fits.then_some(()).ok_or(CommandError::NotNow("the heat map is not of this VM's size"))
    }

    pub(super) fn update_heat(&mut self, heat: &[u8]) -> Result<Response, CommandError> {
        let found = self.take_heat(heat)?;
        self.receiving.as_mut().expect("checked by take_heat").found_hot = Some(found);
        Ok(Response::Done)
    }

    /// Returns how many pages in the store it made hot.
    fn take_heat(&mut self, heat: &[u8]) -> Result<u64, CommandError> {
        self.check_heat(heat)?;
        let Some(receiving) = &mut self.receiving else { return Err(NOT_RECEIVING) };
        (receiving.hand, receiving.coldest, receiving.next_coldest) = (PageNo(0), 0, u8::MAX);
        receiving.restarts = 0;
        let mut found = 0;
        for (page, heat) in (0..).map(PageNo).zip(heat.iter().copied()) {
            let before = self.table.heat(page);
            // Untouched table entries stay untouched in memory as well.
            if heat > 0 || before > 0 {
                self.table.set_heat(page, heat);
            }
            let stored = matches!(self.table.state(page), PageState::Leaving | PageState::Stored);
            found += u64::from(heat >= HOT && stored && before < HOT);
        }
        Ok(found)
    }

    pub(super) fn grant(&mut self, ticket: Ticket, count: u32) -> Option<Result<Response, CommandError>> {
        let Some(receiving) = &mut self.receiving else { return Some(Err(NOT_RECEIVING)) };
        receiving.grants.push_back((ticket, count.max(1)));
        None
    }

    pub(super) fn return_frames(&mut self, slots: SlotRun) -> Response {
        self.frames.end_grant(slots);
        Response::Done
    }

    pub(super) fn arrive(&mut self, arrival: &Arrival) -> Result<Response, CommandError> {
        assert_eq!(arrival.run.len, arrival.slots.len, "one frame a page");
        assert_eq!(arrival.run.len as usize, arrival.sums.len(), "one sum a page");
        if let Some(error) = self.store_error() {
            return Err(error);
        }
        if self.receiving.is_none() {
            return Err(NOT_RECEIVING);
        }
        let mut to_guest = Vec::with_capacity(arrival.run.len as usize);
        let mut to_store = Vec::new();
        for (nth, (page, slot)) in arrival.run.pages().zip(arrival.slots.slots()).enumerate() {
            self.frames.check_granted(slot);
            let to_ram = self.choose_ram(page, arrival.again);
            self.replace(page);
            self.frames.bind(page, slot);
            if to_ram {
                self.table.set(page, PageState::Arriving);
                to_guest.push((page, slot));
            } else {
                self.table.set(page, PageState::Leaving);
                self.sums[page.index()] = arrival.sums[nth];
                if self.table.has(page, Flag::Writing) {
                    self.ios.outdate(page);
                }
                // An older version that is still being written comes first; its end starts this one.
                if !self.table.has(page, Flag::Writing) || mutant!(WritesTwoVersionsAtOnce) {
                    to_store.push((page, slot));
                }
            }
        }
        self.move_in(to_guest);
        self.place_in_store(&to_store);
        Ok(Response::Done)
    }

    pub(super) fn arrive_zero(&mut self, run: Run) -> Result<Response, CommandError> {
        if self.receiving.is_none() {
            return Err(NOT_RECEIVING);
        }
        run.pages().for_each(|page| {
            self.came(page);
            self.replace(page);
        });
        Ok(Response::Done)
    }

    pub(super) fn arrive_poisoned(&mut self, run: Run) -> Result<Response, CommandError> {
        self.arrive_zero(run)?;
        for page in run.pages() {
            self.table.set(page, PageState::Poisoned);
            self.lost.insert(page);
            self.actions.push_back(Action::Poison { page });
        }
        Ok(Response::Done)
    }

    /// Frames that are kept to receive into.
    fn receive_reserve(&self) -> u64 {
        u64::from(self.frames.marks().high.max(RECEIVE_FRAMES)).min(self.frames.budget() / 8)
    }

    pub(super) fn placed_in_ram(&self) -> u64 {
        self.table.count(PageState::Resident) + self.table.count(PageState::Arriving)
    }

    /// Decides for one page.
    fn choose_ram(&mut self, page: PageNo, again: bool) -> bool {
        let reserve = self.receive_reserve();
        let before = self.table.state(page);
        let known = self.table.heat(page);
        let heat = if again { known.max(HEAT_AGAIN) } else { known };
        let receiving = self.receiving.as_ref().expect("checked by the caller");
        let in_store = self.table.count(PageState::Leaving) + self.table.count(PageState::Stored);
        // About as many hot pages in the store are expected of the next heat map as the last one found.
        let unseen = receiving.found_hot.unwrap_or(in_store / HOT_UNSEEN_SHARE);
        let facts = Arrivals {
            room: self.frames.budget() - reserve,
            overdraft: reserve / 2,
            // Its own old version makes room.
            in_ram: self.placed_in_ram()
                - u64::from(matches!(before, PageState::Resident | PageState::Arriving)),
            to_come: receiving.to_come,
            hot_in_store: self.table.hot_in_store() + unseen,
            coldest: receiving.coldest,
        };
        let to_ram = facts.into_ram(heat);
        if heat > known {
            self.table.set_heat(page, heat);
        }
        self.came(page);
        to_ram
    }

    /// More is in RAM than may be, for it is hotter than what was there: the coldest goes to the store instead.
    pub(super) fn make_way(&mut self) {
        let room = self.frames.budget() - self.receive_reserve();
        let over = self.placed_in_ram().saturating_sub(room) as u32;
        if over == 0 || self.receiving.is_none() || self.tiers.latched().is_some() {
            return;
        }
        let want = over.max(WAY_MIN);
        let mut cold = std::mem::take(&mut self.scratch.runs);
        self.find_cold(want, &mut cold);
        for run in cold.drain(..) {
            let out = self.start_out(run, PageState::Leaving);
            if out < run.len {
                // No slots: those that stay are found again once there are.
                self.receiving.as_mut().expect("looked at above").hand = run.start.plus(out);
                break;
            }
        }
        self.scratch.runs = cold;
    }

    /// The coldest pages in RAM, some `want` of them, where the hand comes to next. None, if nothing there is colder than the rest.
    fn find_cold(&mut self, want: u32, cold: &mut Vec<Run>) {
        cold.clear();
        let receiving = self.receiving.as_mut().expect("only called while the VM is received");
        let (table, pages) = (&self.table, self.table.pages());
        let mut found = 0;
        while found < want {
            let page = receiving.hand;
            if page.0 >= pages {
                // The hand has been everywhere since the coldest were as cold as this.
                if !cold.is_empty() || receiving.next_coldest == u8::MAX {
                    return;
                }
                receiving.hand = PageNo(0);
                receiving.coldest = receiving.next_coldest;
                receiving.next_coldest = u8::MAX;
                continue;
            }
            if let Some(block) = table.skip_empty_region(page.block()) {
                receiving.hand = PageNo(block as u64 * u64::from(BLOCK_PAGES));
                continue;
            }
            if table.resident_in_block(page.block()) == 0 {
                receiving.hand = page.next_block();
                continue;
            }
            receiving.hand = page.plus(1);
            if !may_leave(table, page) {
                continue;
            }
            let heat = table.heat(page);
            if heat > receiving.coldest {
                receiving.next_coldest = receiving.next_coldest.min(heat);
                continue;
            }
            found += 1;
            match cold.last_mut() {
                Some(run) if run.end() == page && run.len < VICTIM_RUN_MAX => run.len += 1,
                _ => cold.push(Run::one(page)),
            }
        }
    }

    /// A page has come to RAM, or is held there no longer. The hand may have passed it: it comes by again.
    pub(super) fn may_give_way(&mut self, page: PageNo) {
        let Some(receiving) = &mut self.receiving else { return };
        if !may_leave(&self.table, page) {
            return;
        }
        let heat = self.table.heat(page);
        if heat < receiving.coldest && receiving.restarts < RESTARTS_MAX {
            (receiving.hand, receiving.coldest, receiving.next_coldest) = (PageNo(0), heat, u8::MAX);
            receiving.restarts += 1;
        } else if page < receiving.hand {
            receiving.next_coldest = receiving.next_coldest.min(heat);
        }
    }

    fn came(&mut self, page: PageNo) {
        let receiving = self.receiving.as_mut().expect("checked by the caller");
        let (word, bit) = (&mut receiving.came[page.index() / 64], 1 << (page.index() % 64));
        if *word & bit == 0 {
            *word |= bit;
            receiving.to_come -= 1;
        }
    }

    /// Drops a page's old version. A frame in the guest is recycled through staging.
    fn replace(&mut self, page: PageNo) {
        if self.table.state(page) == PageState::Resident
            && let Some(slots) = self.frames.orphan_empty()
        {
            self.table.set(page, PageState::Untouched);
            self.table.put(page, Flag::Stored, false);
            self.note_dead(page);
            self.actions.push_back(Action::MoveOut { run: Run::one(page), slots, digest: false });
        } else if self.forget(page) {
            self.actions.push_back(Action::DropGuest { run: Run::one(page) });
        }
    }

    /// Grants what can be granted, and says when everything is in its place.
    pub(super) fn serve_receiving(&mut self) {
        let failed = self.store_error();
        while let Some((ticket, count)) =
            self.receiving.as_ref().and_then(|receiving| receiving.grants.front())
        {
            let (ticket, count) = (*ticket, *count);
            let answer = if let Some(error) = &failed {
                Err(error.clone())
            } else {
                let Some(slots) = self.frames.grant(count) else { break };
                Ok(Response::Frames(slots))
            };
            self.actions.push_back(Action::Answer { ticket, answer });
            self.receiving.as_mut().expect("still receiving").grants.pop_front();
        }
        let Some(ticket) = self.receiving.as_ref().and_then(|receiving| receiving.settle) else { return };
        let in_motion = self.table.count(PageState::Leaving) + self.table.count(PageState::Arriving);
        let answer = match failed {
            Some(error) => Err(error),
            None if in_motion == 0 && self.ios.is_idle() => Ok(Response::Done),
            None => return,
        };
        self.receiving.as_mut().expect("still receiving").settle = None;
        self.actions.push_back(Action::Answer { ticket, answer });
    }

    /// Answers when every page that has arrived is where it belongs.
    pub(super) fn settle_receiving(&mut self, ticket: Ticket) -> Option<Result<Response, CommandError>> {
        let Some(receiving) = &mut self.receiving else { return Some(Err(NOT_RECEIVING)) };
        if receiving.settle.replace(ticket).is_some() {
            return Some(Err(CommandError::NotNow("the receiving is being settled already")));
        }
        None
    }

    /// Nothing more arrives: the VM may run. What is on its way to the store stays so, and counts as being there.
    pub(super) fn finish_receiving(&mut self) -> Result<Response, CommandError> {
        if let Some(error) = self.store_error() {
            return Err(error);
        }
        let Some(receiving) = self.receiving.take() else { return Err(NOT_RECEIVING) };
        self.frames.set_receiving(false);
        self.table.count_hot_from(None);
        let waiting = receiving.grants.iter().map(|(ticket, _)| *ticket).chain(receiving.settle);
        self.actions.extend(waiting.map(|ticket| Action::Answer { ticket, answer: Err(NOT_RECEIVING) }));
        self.begin_collapse(false);
        let count = |states: [PageState; 2]| states.iter().map(|state| self.table.count(*state)).sum::<u64>();
        let leaving = if mutant!(OverlooksWhatIsLeaving) { PageState::Arriving } else { PageState::Leaving };
        Ok(Response::Placed(Placed {
            pages_ram: count([PageState::Resident, PageState::Arriving]),
            pages_store: count([PageState::Stored, leaving]),
            pages_zero: self.table.count(PageState::Untouched),
            pageins: self.counts.pages_read - receiving.pages_read_before,
            pageouts: self.counts.victims - receiving.victims_before,
        }))
    }
}
