//! The origin: where the pages of a VM were before it ran here, such as the image of a checkpoint. Pages leave it and
//! never enter, so it is no block's home, and it is neither written nor dropped from.
//!
//! ```text
//!                adopted                              written home: [`Core::take_home`]
//!   Untouched ───────────▶ Stored, at the origin ──────────────────────────────────────────▶ Stored, at home
//!                            │  ▲                                                               ▲
//!             fault, prefetch│  │ unchanged: no write                                           │ written
//!             [fetched]      ▼  │                                            changed            │
//!                          Resident ──▶ Leaving ───────────────────────────────────────▶ Leaving, not stored
//! ```
//! Invariant: a page with [`Flag::Origin`] has [`Flag::InStore`], and the checksum on record is that of what the origin
//! has of it. So both flags go at the moment at which it is known that the page has another content
//! ([`Core::left_guest`]): what the origin has is old from then on, and must never be read again. Only a write of the
//! *same* content is under way while they stand, that which takes a page home: the origin has the page until that write
//! has ended well.
//!
//! Taking pages home is work that nobody waits for. It takes no frame that a fault could need, has a bounded number of
//! pages under way, and fewer still while a vCPU waits for a page. A page that is in RAM needs no copy of its own at
//! home: it is simply not stored any more, and is written if it ever leaves.
//!
//! Held pages stay there: a migration reads them at the origin. Or it reads at home what was there before the page was
//! given back, and a write would change that.
//!
//! [fetched]: Core::fetch_origin

use super::event::{IoId, Response, Ticket};
use super::state::ios::{Landing, Purpose};
use super::state::origin::{Fetch, Taking};
use super::{Action, Core, IO_PAGES_MAX};
use crate::api::Adopted;
use crate::error::{CommandError, IoError, IoErrorKind};
use crate::stats::TierState;
use crate::table::{Flag, PageState};
use crate::units::{PageNo, Run, Slot, SlotRun, TierId, runs_of};

/// Pages fetched for one request, and under way for all of them, at most: 2 MiB. A fault that comes meanwhile waits
/// behind their reads.
const FETCH_MAX: u32 = 512;
/// Under way while a vCPU waits for a page: the device has the next read there already, and a fault never waits for
/// more than these.
const FETCH_BESIDE_FAULTS: u32 = 2 * IO_PAGES_MAX;
/// Pages on their way home at a time, at most: 2 MiB.
const HOMEWARD_MAX: u32 = 512;
/// No more than one staging slot in so many for these.
const HOMEWARD_SHARE: u32 = 8;
/// Pages looked at in one step: some 50 us.
const LOOK_PAGES: u32 = 1 << 14;

const NO_ORIGIN: CommandError = CommandError::NotNow("this VM has no origin");

impl Core {
    // ── what is at the origin ────────────────────────────────────────────────────────────

    pub(super) fn adopt(&mut self, adopted: &Adopted) -> Result<Response, CommandError> {
        let Adopted { run, sums } = adopted;
        assert_eq!(run.len as usize, sums.len(), "one sum a page");
        self.check_adoptable(*run)?;
        self.table.adopt(*run);
        self.sums[run.indices()].copy_from_slice(sums);
        Ok(Response::Done)
    }

    pub(super) fn adopt_poisoned(&mut self, run: Run) -> Result<Response, CommandError> {
        self.check_adoptable(run)?;
        for page in run.pages() {
            self.table.set(page, PageState::Poisoned);
            self.lost.insert(page);
            self.waiters.end(page);
            self.actions.push_back(Action::Poison { page });
        }
        Ok(Response::Done)
    }

    fn check_adoptable(&self, run: Run) -> Result<(), CommandError> {
        self.checked_memory(run)?;
        if !self.tiers.have_origin() {
            return Err(NO_ORIGIN);
        }
        if self.receiving.is_some() {
            return Err(CommandError::NotNow(
                "the VM is being received: its pages come from the source alone",
            ));
        }
        let may = self.table.may_adopt(run);
        may.then_some(()).ok_or(CommandError::NotNow("only untouched pages can be said to be at the origin"))
    }

    /// A write of the page has ended: its home has it now, or something that is neither its old nor its new content.
    /// Then the origin has it still, if it had.
    pub(super) fn note_written(&mut self, page: PageNo, well: bool) {
        if well {
            self.table.put(page, Flag::InStore, true);
            self.table.put(page, Flag::Origin, false);
        } else if !self.table.has(page, Flag::Origin) {
            self.table.put(page, Flag::InStore, false);
        }
    }

    /// A read has ended; so many pages came right, this one among them.
    pub(super) fn read_at_origin(&mut self, io: IoId, tier: TierId, given: u64, good: Option<PageNo>) {
        self.origin.ended(io, given);
        self.origin.wake();
        if let Some(page) = good.filter(|_| tier == TierId::ORIGIN) {
            self.tiers.known_at_origin = Some((page, self.sums[page.index()]));
        }
    }

    // ── steps ────────────────────────────────────────────────────────────────────────────

    /// To be called when no move out of the guest is under way: then what leaves and is at the origin is on its way
    /// home.
    pub(super) fn step_origin(&mut self) {
        if !std::mem::take(&mut self.origin.looks) {
            return;
        }
        let mut look = LOOK_PAGES;
        self.step_fetch(&mut look);
        self.step_taking(&mut look);
    }

    /// The first page of the run that is stored at the origin alone, and those next to it, up to so many.
    fn find_at_origin(&self, part: Run, most: u32, may: impl Fn(PageNo) -> bool) -> Option<Run> {
        let there = |page: &PageNo| {
            let alone = self.table.state(*page) == PageState::Stored && self.table.has(*page, Flag::Origin);
            alone && may(*page)
        };
        let start = part.pages().find(there)?;
        let rest = Run::new(start, ((part.end().0 - start.0) as u32).min(most));
        Some(rest.part(0, rest.pages().take_while(there).count() as u32))
    }

    // ── fetching ─────────────────────────────────────────────────────────────────────────

    pub(super) fn fetch_origin(
        &mut self,
        ticket: Ticket,
        run: Run,
    ) -> Option<Result<Response, CommandError>> {
        if let Err(error) = self.checked(run) {
            return Some(Err(error));
        }
        if !self.tiers.have_origin() {
            return Some(Err(NO_ORIGIN));
        }
        self.origin.fetch(ticket, run);
        None
    }

    fn step_fetch(&mut self, look: &mut u32) {
        let mut fetches = std::mem::take(&mut self.origin.fetches);
        let mut under_way = fetches.iter().map(Fetch::under_way).sum();
        // Several at a time: small ones would keep the device idle between one and the next.
        for fetch in &mut fetches {
            self.fetch_more(fetch, &mut under_way, look);
            if fetch.next < fetch.end {
                break;
            }
        }
        fetches.retain(|fetch| {
            let ended = fetch.next >= fetch.end && fetch.ios.is_empty();
            if ended {
                let answer = Ok(Response::Count(fetch.came));
                self.actions.push_back(Action::Answer { ticket: fetch.ticket, answer });
            }
            !ended
        });
        self.origin.fetches = fetches;
    }

    /// Begins to read what is at the origin, as far as there are more frames than the engine keeps ready.
    fn fetch_more(&mut self, fetch: &mut Fetch, under_way: &mut u32, look: &mut u32) {
        while fetch.next < fetch.end {
            let page = fetch.next;
            let block = self.table.next_origin_block(page.block());
            // With a store that takes nothing, frames are for those who wait; and an origin that gives nothing is not
            // asked for more.
            let may =
                self.tiers.latched().is_none() && self.tiers.state(TierId::ORIGIN) == TierState::Working;
            let Some(block) = block.filter(|_| fetch.begun < FETCH_MAX && may) else { return fetch.stop() };
            // It goes on when one of these has ended. Some are brought whoever waits: the rest would never be.
            let most = if self.waiters.any() { FETCH_BESIDE_FAULTS } else { FETCH_MAX };
            if *under_way + IO_PAGES_MAX > most {
                return;
            }
            if block > page.block() {
                fetch.next = PageNo::first_of(block).min(fetch.end);
                continue;
            }
            if *look == 0 {
                self.origin.looks = true;
                return;
            }
            let to = page.next_block().min(fetch.end);
            let part = Run::new(page, (to.0 - page.0) as u32);
            *look = look.saturating_sub(part.len);
            let want = IO_PAGES_MAX.min(FETCH_MAX - fetch.begun);
            let Some(found) = self.find_at_origin(part, want, |_| true) else {
                fetch.next = to;
                continue;
            };
            let spare = self.frames.at_hand().saturating_sub(u64::from(self.frames.marks().goal()));
            let want = u64::from(found.len).min(spare) as u32;
            let Some(taken) = self.frames.take(want) else { return fetch.stop() };
            let run = found.part(0, taken.slots.len);
            fetch.ios.push((self.read(run, taken.slots, Landing::Guest { marker: None }), run.len));
            (fetch.begun, fetch.next) = (fetch.begun + run.len, run.end());
            *under_way += run.len;
        }
    }

    // ── taking pages home ────────────────────────────────────────────────────────────────

    pub(super) fn take_home(&mut self, ticket: Ticket, pages: u32) -> Option<Result<Response, CommandError>> {
        if !self.tiers.have_origin() {
            return Some(Err(NO_ORIGIN));
        }
        self.origin.take_home(ticket, pages);
        None
    }

    fn step_taking(&mut self, look: &mut u32) {
        let Some(mut taking) = self.origin.takings.pop_front() else { return };
        self.forget_arrived_home();
        let mut to_write = Vec::new();
        self.take_more(&mut taking, look, &mut to_write);
        // Back to standby: their frames are there.
        self.write(&to_write, Purpose::PageOut);
        if self.origin.homeward.is_empty() && !self.origin.looks {
            // There is no room, and none comes of what is under way: whoever asks may do something else meanwhile.
            taking.left = 0;
        }
        let early = mutant!(AnswersTakingEarly);
        if taking.left > 0 || !(self.origin.homeward.is_empty() || early) {
            return self.origin.takings.push_front(taking);
        }
        let answer = match taking.refused.filter(|_| !taking.begun) {
            Some(error) => Err(CommandError::Store(error)),
            None => Ok(Response::Count(self.table.origin_pages())),
        };
        self.actions.push_back(Action::Answer { ticket: taking.ticket, answer });
        // The next one has its turn.
        self.origin.wake();
    }

    /// Pages that are at home, or went another way, are on their way no longer. What the home did not take (it has been
    /// latched since) stays at the origin.
    fn forget_arrived_home(&mut self) {
        let mut homeward = std::mem::take(&mut self.origin.homeward);
        homeward.retain(|page| {
            let moves = matches!(self.table.state(*page), PageState::Arriving | PageState::Leaving);
            let on_its_way = moves && self.table.has(*page, Flag::Origin);
            let home = self.home_of(*page);
            let refused = on_its_way
                && self.table.state(*page) == PageState::Leaving
                && !self.table.has(*page, Flag::Writing)
                && !self.tiers.may_write(home)
                && !self.tiers.is_retrying(home);
            if refused {
                self.stays_at_origin(*page);
            }
            on_its_way && !refused
        });
        self.origin.homeward = homeward;
    }

    /// Its frame in staging is not needed: the origin has the same.
    fn stays_at_origin(&mut self, page: PageNo) {
        self.table.set(page, PageState::Stored);
        self.frames.unbind(page);
        self.note_dead(page);
    }

    /// Begins to take home what is at the hand, as far as there is room.
    fn take_more(&mut self, taking: &mut Taking, look: &mut u32, to_write: &mut Vec<(PageNo, Slot)>) {
        let pages = self.table.pages();
        while taking.left > 0 && taking.passed < pages {
            let page = self.origin.hand;
            let block = self.table.next_origin_block(page.block());
            if block != Some(page.block()) {
                self.pass(taking, block.map_or(PageNo(pages), PageNo::first_of));
                continue;
            }
            if *look == 0 {
                self.origin.looks = true;
                return;
            }
            let all = self.table.block_of(page);
            let part = Run::new(page, (all.end().0.max(page.0) - page.0) as u32);
            *look = look.saturating_sub(part.len);
            let home = self.home_of(page);
            let failed = self.tiers.get(home).failed().map(|latch| latch.error);
            if failed.is_some() || !self.tiers.is_open(home) {
                taking.refused = failed.or(taking.refused);
                self.pass(taking, page.next_block());
            } else if !self.take_of_block(taking, part, to_write) {
                return;
            }
        }
        taking.left = 0;
    }

    fn pass(&mut self, taking: &mut Taking, to: PageNo) {
        let (to, pages) = (to.0.min(self.table.pages()), self.table.pages());
        taking.passed += to - self.origin.hand.0;
        self.origin.hand = if to < pages { PageNo(to) } else { PageNo(0) };
    }

    /// The pages of a block from the hand on. False when there is no room for more.
    fn take_of_block(&mut self, taking: &mut Taking, part: Run, to_write: &mut Vec<(PageNo, Slot)>) -> bool {
        let mut next = part.start;
        while next < part.end() && taking.left > 0 {
            let page = next;
            next = page.plus(1);
            if !self.table.has(page, Flag::Origin) || self.table.has(page, Flag::Writing) {
                continue;
            }
            match self.table.state(page) {
                PageState::Resident | PageState::Sampled => self.needs_no_origin(page),
                // A migration reads it there, or reads at home what was there before.
                _ if !self.may_go_home(page) => {}
                PageState::Standby => {
                    if self.room_homeward(taking, page) == 0 {
                        self.pass(taking, page);
                        return false;
                    }
                    self.leave_standby(page);
                    self.table.set(page, PageState::Leaving);
                    to_write.push((page, self.frames.slot(page)));
                    self.origin.homeward.push(page);
                    (taking.left, taking.begun) = (taking.left - 1, true);
                }
                PageState::Stored => {
                    let want = self.room_homeward(taking, page).min(self.spare_frames()).min(IO_PAGES_MAX);
                    let rest = Run::new(page, (part.end().0 - page.0) as u32);
                    let found = self.find_at_origin(rest, want, |page| self.may_go_home(page));
                    let found = found.filter(|_| want > 0);
                    let taken = found.and_then(|found| self.frames.take(found.len));
                    let (Some(found), Some(taken)) = (found, taken) else {
                        self.pass(taking, page);
                        return false;
                    };
                    let run = found.part(0, taken.slots.len);
                    run.pages().for_each(|page| self.table.set(page, PageState::Arriving));
                    self.frames.bind_run(run, taken.slots);
                    self.start_read(run, taken.slots, Landing::Home);
                    self.origin.homeward.extend(run.pages());
                    (taking.left, taking.begun, next) = (taking.left - run.len, true, run.end());
                }
                // It is in motion: its turn comes when the hand comes by again.
                _ => {}
            }
        }
        let to = if next < part.end() { next } else { part.start.next_block() };
        self.pass(taking, to);
        true
    }

    fn may_go_home(&self, page: PageNo) -> bool {
        !self.table.has(page, Flag::Held) || mutant!(TakesHeldHome)
    }

    /// The frame of a page that is in RAM has all that is needed of it.
    fn needs_no_origin(&mut self, page: PageNo) {
        if mutant!(TakesResidentForHome) {
            return self.table.put(page, Flag::Origin, false);
        }
        self.table.unstore(page);
        self.note_dead(page);
    }

    /// How many more may start on their way to the home of this page.
    fn room_homeward(&self, taking: &Taking, page: PageNo) -> u32 {
        let most = HOMEWARD_MAX.min(self.frames.staging().slots() / HOMEWARD_SHARE);
        let most = if self.waiters.any() { most.min(IO_PAGES_MAX) } else { most };
        let room = most.saturating_sub(self.origin.homeward.len() as u32);
        room.min(taking.left).min(self.room_to_leave(page))
    }

    /// Frames that no fault will miss before they are back.
    fn spare_frames(&self) -> u32 {
        if self.waiters.any_deferred() || self.tiers.state(TierId::ORIGIN) != TierState::Working {
            return 0;
        }
        // As prefetch does: half of those that are always kept.
        let spare = self.frames.at_hand().saturating_sub(u64::from(self.frames.marks().low / 2));
        u32::try_from(spare).unwrap_or(u32::MAX)
    }

    /// None of a run could be read for that, because of one bad page, it may be: each half is read by itself. Else that
    /// page would keep all of them at the origin.
    pub(super) fn read_in_halves(&mut self, run: Run, slots: SlotRun, error: IoError) -> bool {
        let apart = run.len > 1
            && matches!(error.kind, IoErrorKind::Broken(_))
            && self.tiers.state(TierId::ORIGIN) == TierState::Working
            && !mutant!(LeavesNeighboursOfBadPages);
        if apart {
            let first = slots.start;
            let slot = |page: PageNo| first.plus((page.0 - run.start.0) as u32);
            // Not those that have been given back meanwhile.
            let mine: Vec<_> = run.pages().filter(|page| !self.frames.free_if_orphan(slot(*page))).collect();
            for part in runs_of(mine, run.len.div_ceil(2)) {
                self.start_read(part, SlotRun::new(slot(part.start), part.len), Landing::Home);
            }
        }
        apart
    }

    /// It has been read for that. Says whether it is to be written: not, if its home takes nothing by now.
    pub(super) fn goes_home(&mut self, page: PageNo) -> bool {
        let goes = self.tiers.may_write(self.home_of(page));
        if goes {
            self.table.set(page, PageState::Leaving);
        } else {
            self.stays_at_origin(page);
        }
        goes
    }
}
