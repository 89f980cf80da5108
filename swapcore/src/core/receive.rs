//! The target's end of a migration: pages arrive in staging frames and are placed by [`crate::policy::placement`].
//!
//! While receiving, no VM runs and nothing is paged: frames are taken and written only for what arrives. What was
//! placed in RAM before it was known that there is something hotter is placed once more, in the store. It ends when all
//! has arrived, not when all is written: the VM stands still meanwhile, and what still leaves is in a state that it may
//! well be in. Whoever has time to wait for the writes [settles](Core::settle_receiving) before.

use super::event::{Action, Response, Ticket};
use super::state::cold_hand::ColdHand;
use super::state::receiving::Receiving;
use super::state::walks::Task;
use super::{Core, Counts};
use crate::api::{ArrivedRun, Placed};
use crate::error::CommandError;
use crate::policy::placement::{Arrivals, HEAT_AGAIN, HOT};
use crate::table::{Flag, PageState};
use crate::units::{PageNo, Run, SlotRun};

/// Frames kept for receiving into, at least: newer versions come while the old ones still have theirs.
const RECEIVE_FRAMES: u32 = 512;

/// Pages that give way at a time, at least.
const WAY_MIN: u32 = 64;

const NOT_RECEIVING: CommandError = CommandError::NotNow("the VM is not being received");

impl Core {
    pub(super) fn start_receiving(
        &mut self,
        ticket: Ticket,
        heat: Vec<u8>,
    ) -> Option<Result<Response, CommandError>> {
        if self.table.count(PageState::Untouched) != self.table.pages() || self.receiving.is_some() {
            return Some(Err(CommandError::NotNow("only an empty VM can be received into")));
        }
        if let Err(error) = self.check_heat(&heat) {
            return Some(Err(error));
        }
        self.table.count_hot_from(Some(HOT));
        let Counts { pages_read, victims, .. } = self.counts;
        self.receiving = Some(Receiving::new(self.table.pages(), pages_read, victims));
        self.frames.set_receiving(true);
        self.begin_taking_heat(ticket, heat, true);
        None
    }

    fn check_heat(&self, heat: &[u8]) -> Result<(), CommandError> {
        let fits = heat.len() as u64 == self.table.pages();
        fits.then_some(()).ok_or(CommandError::NotNow("the heat map is not of this VM's size"))
    }

    pub(super) fn update_heat(
        &mut self,
        ticket: Ticket,
        heat: Vec<u8>,
    ) -> Option<Result<Response, CommandError>> {
        if let Err(error) = self.check_heat(&heat) {
            return Some(Err(error));
        }
        if self.receiving.is_none() {
            return Some(Err(NOT_RECEIVING));
        }
        self.begin_taking_heat(ticket, heat, false);
        None
    }

    fn begin_taking_heat(&mut self, ticket: Ticket, heat: Vec<u8>, first: bool) {
        self.walks.begin(ticket, Task::TakeHeat { heat, found: 0, first }, self.table.pages());
    }

    /// The heat of the run's pages. Returns how many pages in the store it made hot.
    pub(super) fn take_heat(&mut self, run: Run, heat: &[u8]) -> u64 {
        if self.receiving.is_none() {
            return 0;
        }
        let mut found = 0;
        for (page, heat) in run.pages().zip(heat.iter().copied()) {
            let before = self.table.heat(page);
            // Untouched table entries stay untouched in memory as well.
            if heat > 0 || before > 0 {
                self.table.set_heat(page, heat);
            }
            let stored = matches!(self.table.state(page), PageState::Leaving | PageState::Stored);
            found += u64::from(heat >= HOT && stored && before < HOT);
        }
        found
    }

    /// A heat map has been taken over: the coldest pages are sought anew, for others may be colder now than those.
    pub(super) fn heat_taken(&mut self, found: u64, first: bool) -> Result<Response, CommandError> {
        let Some(receiving) = &mut self.receiving else { return Err(NOT_RECEIVING) };
        receiving.cold = ColdHand::new();
        if !first {
            receiving.found_hot(found);
        }
        Ok(Response::Done)
    }

    pub(super) fn grant(&mut self, ticket: Ticket, count: u32) -> Option<Result<Response, CommandError>> {
        let Some(receiving) = &mut self.receiving else { return Some(Err(NOT_RECEIVING)) };
        receiving.wait_for_frames(ticket, count);
        None
    }

    pub(super) fn return_frames(&mut self, slots: SlotRun) -> Response {
        self.frames.end_grant(slots);
        Response::Done
    }

    pub(super) fn arrive(&mut self, arrival: &ArrivedRun) -> Result<Response, CommandError> {
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
            let known = self.table.heat(page);
            let heat = if arrival.again { known.max(HEAT_AGAIN) } else { known };
            let receiving = self.receiving.as_ref().expect("looked at above");
            let to_ram = self.arrivals(receiving, page).into_ram(heat);
            if heat > known {
                self.table.set_heat(page, heat);
            }
            self.came(page);
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

    /// What the decision about a page that arrives depends on.
    fn arrivals(&self, receiving: &Receiving, page: PageNo) -> Arrivals {
        let reserve = self.receive_reserve();
        let in_store = self.table.count(PageState::Leaving) + self.table.count(PageState::Stored);
        // Its own old version makes room.
        let own = matches!(self.table.state(page), PageState::Resident | PageState::Arriving);
        Arrivals {
            room: self.frames.budget() - reserve,
            overdraft: reserve / 2,
            in_ram: self.placed_in_ram() - u64::from(own),
            to_come: receiving.to_come(),
            hot_in_store: self.table.hot_in_store() + receiving.hot_unseen(in_store),
            coldest: receiving.cold.coldest(),
        }
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
        self.receiving.as_mut().expect("looked at above").cold.find(&self.table, want, &mut cold);
        for run in cold.drain(..) {
            let out = self.start_out(run, PageState::Leaving);
            if out < run.len {
                // No slots: those that stay are found again once there are.
                self.receiving.as_mut().expect("looked at above").cold.back_to(run.start.plus(out));
                break;
            }
        }
        self.scratch.runs = cold;
    }

    /// A page has come to RAM, or is held there no longer.
    pub(super) fn may_give_way(&mut self, page: PageNo) {
        if let Some(receiving) = &mut self.receiving {
            receiving.cold.may_give_way(&self.table, page);
        }
    }

    fn came(&mut self, page: PageNo) {
        self.receiving.as_mut().expect("checked by the caller").came(page);
    }

    /// Drops a page's old version. A frame in the guest is recycled through staging.
    fn replace(&mut self, page: PageNo) {
        if self.table.state(page) == PageState::Resident
            && let Some(slots) = self.frames.orphan_empty()
        {
            self.table.set(page, PageState::Untouched);
            self.table.unstore(page);
            self.note_dead(page);
            self.actions.push_back(Action::MoveOut { run: Run::one(page), slots, digest: false });
        } else if self.forget(page) {
            self.actions.push_back(Action::DropGuest { run: Run::one(page) });
        }
    }

    /// Grants what can be granted, and says when everything is in its place.
    pub(super) fn serve_receiving(&mut self) {
        let failed = self.store_error();
        let Some(receiving) = &mut self.receiving else { return };
        while let Some((ticket, count)) = receiving.first_waiter() {
            let answer = if let Some(error) = &failed {
                Err(error.clone())
            } else {
                let Some(slots) = self.frames.grant(count) else { break };
                Ok(Response::Frames(slots))
            };
            receiving.end_first_waiter();
            self.actions.push_back(Action::Answer { ticket, answer });
        }
        let Some(ticket) = receiving.settles() else { return };
        let in_motion = self.table.count(PageState::Leaving) + self.table.count(PageState::Arriving);
        let answer = match failed {
            Some(error) => Err(error),
            None if in_motion == 0 && self.ios.is_idle() => Ok(Response::Done),
            None => return,
        };
        receiving.end_settle();
        self.actions.push_back(Action::Answer { ticket, answer });
    }

    /// Answers when every page that has arrived is where it belongs.
    pub(super) fn settle_receiving(&mut self, ticket: Ticket) -> Option<Result<Response, CommandError>> {
        let Some(receiving) = &mut self.receiving else { return Some(Err(NOT_RECEIVING)) };
        if !receiving.settle(ticket) {
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
        self.actions
            .extend(receiving.waiters().map(|ticket| Action::Answer { ticket, answer: Err(NOT_RECEIVING) }));
        self.begin_collapse(false);
        let count = |states: [PageState; 2]| states.iter().map(|state| self.table.count(*state)).sum::<u64>();
        let leaving = if mutant!(OverlooksWhatIsLeaving) { PageState::Arriving } else { PageState::Leaving };
        let (pageins, pageouts) = receiving.since(self.counts.pages_read, self.counts.victims);
        Ok(Response::Placed(Placed {
            pages_ram: count([PageState::Resident, PageState::Arriving]),
            pages_store: count([PageState::Stored, leaving]),
            pages_zero: self.table.count(PageState::Untouched),
            pageins,
            pageouts,
        }))
    }
}
