//! The simulated tiers: each falls silent or fails at everything for a while, by itself, and comes back. Else they are
//! as one disk: it delays, reorders, cuts short, fails, tears, loses, misdirects and rots.
//!
//! What the device does to the content of a page without saying so is that page's *damage*, until the page is written
//! anew. The checks excuse a lost page by its damage, and by nothing else.

use super::Sim;
use super::coverage::{Fault, Outcome};
use crate::core::{DropResult, Event, IoError, IoErrorKind, IoId};
use crate::errno;
use crate::table::{Flag, PageState};
use crate::transfer::Transfer;
use crate::units::{PAGE_SIZE, PageNo, Run, Slot, SlotRun, TIERS_MAX, TierId};

/// Somebody has waited for a silent tier for so many ticks: that has been told.
const SILENCE_TOLD_TICKS: u64 = 120;

/// Errors in a row that pass: one more, and the core is right to give the page up.
const PASSING_ERRORS: u8 = 3;

#[derive(Debug)]
pub(super) struct Flight {
    io: IoId,
    pub(super) tier: TierId,
    pub(super) run: Run,
    pub(super) slots: SlotRun,
    transfer: Transfer,
    due: u64,
    spiked: bool,
    drop: bool,
    /// It waited while its tier was silent, or ended no drops.
    silenced: Option<Fault>,
}

/// A whole tier is away, and what it has stays as it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Trouble {
    /// Nothing ends.
    Silence,
    /// Everything fails, as this errno.
    Outage(i32),
    /// No drop ends. All else does.
    Drops,
}

/// What a tier that is away may say.
const AWAY: &[i32] = &[
    errno::EIO,
    errno::EIO,
    errno::ENOLINK,
    errno::ETIMEDOUT,
    errno::ENODEV,
    errno::ESHUTDOWN,
    errno::ENOMEM,
];

impl Flight {
    pub(super) fn is_write(&self) -> bool {
        self.transfer.write && !self.drop
    }

    /// What is still to be transferred.
    fn rest(&self) -> (Run, SlotRun) {
        let done = (self.transfer.done / PAGE_SIZE) as u32;
        (self.run.part(done, self.run.len - done), self.slots.part(done, self.run.len - done))
    }
}

/// The *places* of the homes come first, one a page; behind them are those of the origin.
#[derive(Debug)]
pub(super) struct Disk {
    pages: usize,
    pub(super) content: Vec<u64>,
    /// What was done to the place's content, if it is not what the device was given, or cannot be read.
    pub(super) damage: Vec<Option<Fault>>,
    failed_reads: Vec<u8>,
    pub(super) allocated: Vec<bool>,
    /// Pages that can be written for the first time.
    pub(super) room: u64,
    /// Writes here fail.
    pub(super) bad_writes: Option<Run>,
    pub(super) flights: Vec<Flight>,
    /// It knows no drops.
    pub(super) keeps_all: bool,
    /// Why the last write failed.
    pub(super) failure: Option<Fault>,
    /// Of each tier, and until when.
    pub(super) trouble: [Option<(Trouble, u64)>; TIERS_MAX],
    /// Whether the tier has done anything since it was last said not to answer.
    pub(super) answered: [bool; TIERS_MAX],
    /// The tier of which a read has ended last.
    pub(super) read_last: TierId,
}

impl Disk {
    pub(super) fn new(pages: usize, room: u64, keeps_all: bool) -> Self {
        Disk {
            pages,
            content: vec![0xDEAD; 2 * pages],
            damage: vec![None; 2 * pages],
            failed_reads: vec![0; 2 * pages],
            allocated: vec![false; pages],
            room,
            bad_writes: None,
            flights: Vec::new(),
            keeps_all,
            failure: None,
            trouble: [None; TIERS_MAX],
            answered: [false; TIERS_MAX],
            read_last: TierId::STORE,
        }
    }

    /// Where the tier has the page.
    pub(super) fn place(&self, tier: TierId, page: PageNo) -> usize {
        if tier == TierId::ORIGIN { self.pages + page.index() } else { page.index() }
    }

    pub(super) fn is_dropping(&self) -> bool {
        self.flights.iter().any(|flight| flight.drop)
    }
}

impl Sim {
    pub(super) fn start_io(&mut self, io: IoId, tier: TierId, write: bool, run: Run, slots: SlotRun) {
        self.start_flight(io, tier, write, false, run, slots);
    }

    pub(super) fn start_drop(&mut self, io: IoId, tier: TierId, run: Run) {
        self.start_flight(io, tier, true, true, run, SlotRun::new(Slot(0), 0));
    }

    fn start_flight(&mut self, io: IoId, tier: TierId, write: bool, drop: bool, run: Run, slots: SlotRun) {
        assert!(!write || tier != TierId::ORIGIN, "the origin is written, or dropped from: {run:?}");
        for (nth, page) in (0..).zip(run.pages()) {
            let home = self.core.table().home(page.block());
            assert!(tier == TierId::ORIGIN || home == tier, "{page} is at home elsewhere");
            let wanted = !drop && self.core.slot_of(page) == Some(slots.start.plus(nth));
            let stored_at = self.core.table().stored_at(page);
            assert!(write || !wanted || stored_at == tier, "{page} is stored elsewhere");
            let held = !drop && write && stored_at == TierId::ORIGIN && self.oracle.is_read_at_origin(page);
            assert!(!held, "{page} is taken home, and a migration was told that it is at the origin");
        }
        let same = |flight: &&Flight| (flight.tier == TierId::ORIGIN) == (tier == TierId::ORIGIN);
        let mut flights = self.disk.flights.iter().filter(same);
        let clash = flights.find(|flight| run.pages().any(|page| self.clashes(flight, page, write)));
        if let Some(clash) = clash {
            self.trace.suspect.set(run.pages().find(|page| self.clashes(clash, *page, write)));
            panic!("two operations on the same page at once: {run:?} (write: {write}) and {clash:?}");
        }
        let transfer = Transfer { write, offset: run.start.offset(), address: 0, len: run.bytes(), done: 0 };
        let (due, spiked) = self.delay();
        let silenced = None;
        self.disk.flights.push(Flight { io, tier, run, slots, transfer, due, spiked, drop, silenced });
    }

    /// Two writes of a page have no order, nor have a write and a read, unless nobody waits for what is read.
    fn clashes(&self, flight: &Flight, page: PageNo, write: bool) -> bool {
        let Some(nth) = page.0.checked_sub(flight.run.start.0).filter(|_| flight.run.contains(page)) else {
            return false;
        };
        if flight.drop {
            // That comes to light by what is there afterwards.
            return false;
        }
        let wanted = self.core.slot_of(page) == Some(flight.slots.start.plus(nth as u32));
        if flight.is_write() { true } else { write && wanted }
    }

    /// When an operation ends. Most are quick, some overtake others, a few take as long as a device that resets itself.
    fn delay(&mut self) -> (u64, bool) {
        if self.random.one_in(self.odds.spike) {
            self.coverage.injected(Fault::LatencySpike);
            return (self.trace.now + 100 + self.random.below(500), true);
        }
        let longest = if self.random.one_in(4) { 60 } else { 8 };
        (self.trace.now + self.random.below(longest), false)
    }

    /// One of the operations that are due ends.
    pub(super) fn complete_io(&mut self) {
        let count = self.disk.flights.len();
        if count == 0 {
            return;
        }
        let first = self.random.below(count as u64) as usize;
        for trouble in &mut self.disk.trouble {
            trouble.take_if(|(_, until)| *until <= self.trace.now);
        }
        let silent = |flight: &Flight| match self.disk.trouble[flight.tier.index()] {
            Some((Trouble::Silence, _)) => true,
            Some((Trouble::Drops, _)) => flight.drop,
            _ => false,
        };
        let due = |nth: &usize| {
            let flight = &self.disk.flights[*nth];
            flight.due <= self.trace.now && !silent(flight)
        };
        let Some(nth) = (first..count).chain(0..first).find(due) else { return };
        let mut flight = self.disk.flights.swap_remove(nth);
        self.oracle.hungry_ticks = 0;
        if let Some(fault) = flight.silenced.take() {
            self.coverage.outcome(fault, Outcome::Served);
        }
        let outage = match self.disk.trouble[flight.tier.index()] {
            Some((Trouble::Outage(errno), _)) => Some(errno),
            _ => None,
        };
        if flight.drop {
            return self.device_drops(&flight, outage.is_some());
        }
        let result = if let Some(errno) = outage {
            self.disk.failure = if flight.is_write() { Some(Fault::Outage) } else { self.disk.failure };
            -errno
        } else if flight.is_write() {
            self.device_writes(&flight)
        } else {
            self.device_reads(&flight)
        };
        let Some(result) = flight.transfer.completed(result) else {
            // The rest is submitted anew.
            let fault = if result < 0 { Fault::TryAgain } else { Fault::ShortTransfer };
            self.coverage.injected(fault);
            self.coverage.outcome(fault, Outcome::WentOn);
            self.trace.add("the device did a part of it", flight.run, Some(flight.slots), None);
            (flight.due, _) = self.delay();
            return self.disk.flights.push(flight);
        };
        if flight.spiked {
            self.coverage.outcome(Fault::LatencySpike, Outcome::Served);
        }
        let (tier, write) = (flight.tier, flight.is_write());
        self.disk.answered[tier.index()] |= result.is_ok();
        let result = result.map_err(|error| IoError { tier, write, kind: IoErrorKind::of(&error) });
        if flight.is_write() { self.written(&flight, result) } else { self.was_read(&flight, result) }
    }

    // ── reads ────────────────────────────────────────────────────────────────────────────

    /// What io_uring says of the rest of a read: pages, or an error.
    fn device_reads(&mut self, flight: &Flight) -> i32 {
        let (run, slots) = flight.rest();
        if self.random.one_in(self.odds.again) {
            return -errno::EAGAIN;
        }
        // Of the origin, the same pages some way behind.
        let behind = self.disk.place(flight.tier, PageNo(0));
        let place = |page: PageNo| behind + page.index();
        let bad = |page: &PageNo| self.disk.damage[place(*page)] == Some(Fault::BadSector);
        let mut count = run.len;
        if let Some(nth) = run.pages().position(|page| bad(&page)) {
            // Some devices say how far they came.
            if nth == 0 || self.random.one_in(2) {
                // Also those that came: to the core, none has.
                flight.run.pages().for_each(|page| self.disk.failed_reads[place(page)] += 1);
                return -errno::EIO;
            }
            count = nth as u32;
        }
        let passes = |page: PageNo| self.disk.failed_reads[place(page)] < PASSING_ERRORS;
        if self.random.one_in(self.odds.read_error) && flight.run.pages().all(passes) {
            self.coverage.injected(Fault::ReadError);
            flight.run.pages().for_each(|page| self.disk.failed_reads[place(page)] += 1);
            return -errno::EIO;
        }
        count = self.cut_short(count);
        for (page, slot) in run.pages().zip(slots.slots()).take(count as usize) {
            self.kernel.staging[slot.index()] = Some(self.disk.content[place(page)]);
        }
        let victim = run.start.plus(self.random.below(u64::from(count)) as u32);
        if self.random.one_in(self.odds.misread) && self.disk.failed_reads[place(victim)] < PASSING_ERRORS {
            let slot = slots.start.plus((victim.0 - run.start.0) as u32);
            self.misread(victim, place(victim), slot);
        }
        (count as usize * PAGE_SIZE) as i32
    }

    /// The page next door, or a bit that flipped on the way.
    fn misread(&mut self, page: PageNo, place: usize, slot: Slot) {
        let right = self.disk.content[place];
        let neighbour = self.disk.content[(place + 1) % self.disk.content.len()];
        let wrong = if neighbour != right { neighbour } else { right ^ 1 };
        self.kernel.staging[slot.index()] = Some(wrong);
        self.disk.failed_reads[place] += 1;
        self.coverage.injected(Fault::Misread);
        self.trace.page("the device misreads", page, Some(wrong));
    }

    fn was_read(&mut self, flight: &Flight, result: Result<(), IoError>) {
        self.kernel.set_busy(flight.slots, false);
        let what = if result.is_ok() { "read done" } else { "read failed" };
        self.trace.add(what, flight.run, Some(flight.slots), None);
        let mut bad = Vec::new();
        let mut sums = Vec::with_capacity(flight.run.len as usize);
        for (page, slot) in flight.run.pages().zip(flight.slots.slots()) {
            let value = self.kernel.staging[slot.index()].expect("a read takes frames");
            sums.push(super::sum_of(page, value));
            let place = self.disk.place(flight.tier, page);
            let right = self.disk.damage[place].is_none() && value == self.disk.content[place];
            if result.is_ok() && right {
                self.disk.failed_reads[place] = 0;
            } else {
                let away = matches!(self.disk.trouble[flight.tier.index()], Some((Trouble::Outage(_), _)));
                let passing = match result {
                    Err(_) if away => Fault::Outage,
                    Err(_) => Fault::ReadError,
                    Ok(()) => Fault::Misread,
                };
                let mine = self.core.slot_of(page) == Some(slot);
                let damage = self.disk.damage[place].filter(|_| mine && !away);
                bad.push((page, mine, damage.unwrap_or(passing)));
            }
        }
        self.disk.read_last = flight.tier;
        self.event(Event::ReadDone { io: flight.io, result: result.map(|()| &sums[..]) });
        for (page, mine, fault) in bad {
            let outcome = match self.core.table().state(page) {
                _ if !mine => Outcome::NotWanted,
                PageState::Arriving => Outcome::ReadAgain,
                PageState::Stored if self.core.is_waited_for(page) => Outcome::ReadLater,
                PageState::Stored => Outcome::GivenUp,
                // Counted where the page's end is announced.
                _ => continue,
            };
            self.coverage.outcome(fault, outcome);
            if matches!(outcome, Outcome::GivenUp | Outcome::NotWanted) {
                let place = self.disk.place(flight.tier, page);
                self.disk.failed_reads[place] = 0;
            }
        }
    }

    // ── writes ───────────────────────────────────────────────────────────────────────────

    /// What io_uring says of the rest of a write.
    fn device_writes(&mut self, flight: &Flight) -> i32 {
        let (run, slots) = flight.rest();
        if self.random.one_in(self.odds.again) {
            return -errno::EAGAIN;
        }
        if self.random.one_in(self.odds.write_error) {
            self.coverage.injected(Fault::WriteError);
            self.disk.failure = Some(Fault::WriteError);
            run.pages().zip(slots.slots()).for_each(|(page, slot)| self.write_halfway(page, slot));
            return -errno::EIO;
        }
        let mut count = self.cut_short(run.len);
        for (nth, (page, slot)) in (0..).zip(run.pages().zip(slots.slots())).take(count as usize) {
            let errno = self.write_page(page, slot);
            if errno == 0 {
                continue;
            }
            if nth == 0 {
                return -errno;
            }
            count = nth;
            break;
        }
        (count as usize * PAGE_SIZE) as i32
    }

    fn cut_short(&mut self, count: u32) -> u32 {
        if count > 1 && self.random.one_in(self.odds.short) {
            1 + self.random.below(u64::from(count) - 1) as u32
        } else {
            count
        }
    }

    /// The device says that the write failed: the page may be as before, new, or a bit of both.
    fn write_halfway(&mut self, page: PageNo, slot: Slot) {
        let value = self.kernel.staging[slot.index()].expect("the device reads a frame that is there");
        let old = self.disk.content[page.index()];
        let new = [old, value, super::mixed(old, value)][self.random.below(3) as usize];
        self.put(page, new, None);
    }

    /// Writes one page, with a fault that the device does not know of now and then. Returns an errno.
    fn write_page(&mut self, page: PageNo, slot: Slot) -> i32 {
        let index = page.index();
        if self.disk.bad_writes.is_some_and(|run| run.contains(page)) {
            self.disk.failure = Some(Fault::BadRegion);
            self.coverage.injected(Fault::BadRegion);
            return errno::EIO;
        }
        if !self.disk.allocated[index] {
            if self.disk.room == 0 {
                self.disk.failure = Some(Fault::DiskFull);
                self.coverage.injected(Fault::DiskFull);
                return errno::ENOSPC;
            }
            self.disk.room -= 1;
            self.disk.allocated[index] = true;
        }
        let value = self.kernel.staging[slot.index()].expect("the device reads a frame that is there");
        let old = self.disk.content[index];
        if old == value {
            self.put(page, value, None);
        } else if self.random.one_in(self.odds.torn) {
            self.put(page, super::mixed(old, value), Some(Fault::Torn));
        } else if self.random.one_in(self.odds.lost_write) {
            self.put(page, old, Some(Fault::LostWrite));
        } else if self.random.one_in(self.odds.misdirected) {
            self.put(page, old, Some(Fault::Misdirected));
            let other = PageNo((page.0 + 1 + self.random.below(self.pages - 1)) % self.pages);
            let home = |page: PageNo| self.core.table().home(page.block());
            if home(other) == home(page) {
                self.put(other, value, Some(Fault::Overwritten));
            }
        } else {
            self.put(page, value, None);
        }
        0
    }

    fn put(&mut self, page: PageNo, value: u64, damage: Option<Fault>) {
        self.changed = true;
        self.forget_damage(page.index(), Outcome::WrittenAnew);
        self.disk.content[page.index()] = value;
        self.disk.damage[page.index()] = damage;
        self.trace.page("on the disk", page, Some(value));
        if let Some(fault) = damage {
            self.coverage.injected(fault);
            self.trace.page("damaged by the device", page, Some(value));
        }
    }

    /// The damaged content is nobody's any more.
    pub(super) fn forget_damage(&mut self, place: usize, outcome: Outcome) {
        if let Some(fault) = self.disk.damage[place].take() {
            self.coverage.outcome(fault, outcome);
        }
    }

    /// Nobody wants the stored content any more: unless it is a part of a write that goes on.
    pub(super) fn abandon(&mut self, page: PageNo, outcome: Outcome) {
        for tier in [TierId::STORE, TierId::ORIGIN] {
            let place = self.disk.place(tier, page);
            self.disk.failed_reads[place] = 0;
        }
        let in_flight = |flight: &Flight| flight.is_write() && flight.run.contains(page);
        if !self.disk.flights.iter().any(in_flight) {
            self.forget_damage(page.index(), outcome);
        }
    }

    fn written(&mut self, flight: &Flight, result: Result<(), IoError>) {
        self.kernel.set_busy(flight.slots, false);
        let failed = result.is_err();
        self.trace.add(
            if failed { "write failed" } else { "write done" },
            flight.run,
            Some(flight.slots),
            None,
        );
        self.oracle.closed.ended(flight, !failed);
        self.event(Event::WriteDone { io: flight.io, result });
        let Some(fault) = self.disk.failure.filter(|_| failed) else { return };
        for page in flight.run.pages() {
            let outcome = match self.core.table().state(page) {
                PageState::Stored if self.core.table().has(page, Flag::Origin) => Outcome::KeptAtOrigin,
                PageState::Leaving => Outcome::KeptInRam,
                PageState::Arriving | PageState::Resident => Outcome::Rescued,
                PageState::Untouched => Outcome::GivenBack,
                _ => continue,
            };
            self.coverage.outcome(fault, outcome);
        }
    }

    // ── drops ────────────────────────────────────────────────────────────────────────────

    /// The device forgets: what is read there from now on is anything but what was written.
    fn device_drops(&mut self, flight: &Flight, away: bool) {
        let Flight { io, run, .. } = *flight;
        let refused = away || self.random.one_in(self.odds.drop_error);
        // Of a drop that failed a part may have been done.
        let count = if refused { self.random.below(u64::from(run.len)) as u32 } else { run.len };
        let count = if self.disk.keeps_all || away { 0 } else { count };
        for page in run.part(0, count).pages() {
            let index = page.index();
            let garbage = super::mixed(self.disk.content[index], self.random.next());
            self.forget_damage(index, Outcome::GivenBack);
            self.put(page, garbage, None);
            self.disk.room += u64::from(std::mem::take(&mut self.disk.allocated[index]));
        }
        let result = match (self.disk.keeps_all, refused) {
            (true, _) => DropResult::Unsupported,
            (_, true) => DropResult::Failed,
            (_, false) => DropResult::Done,
        };
        if result == DropResult::Failed {
            self.coverage.injected(Fault::DropError);
            self.coverage.outcome(Fault::DropError, Outcome::WentOn);
        }
        self.disk.answered[flight.tier.index()] |= result != DropResult::Failed;
        self.trace.add(if result == DropResult::Done { "dropped" } else { "not dropped" }, run, None, None);
        let took_us = self.random.below(9000);
        self.oracle.closed.ended(flight, result != DropResult::Failed);
        self.event(Event::DropDone { io, result, took_us });
    }

    // ── a tier that is away ──────────────────────────────────────────────────────────────

    /// One of the tiers falls silent, or fails at everything, for a while.
    pub(super) fn begin_trouble(&mut self) {
        let at_origin = self.has_origin && self.random.one_in(2);
        let home = TierId(self.random.below(u64::from(self.tiers)) as u8);
        let tier = if at_origin { TierId::ORIGIN } else { home };
        let until = self.trace.now + 20 + self.random.below(600);
        let trouble = match self.random.below(4) {
            0 => Trouble::Silence,
            1 => Trouble::Drops,
            _ => Trouble::Outage(AWAY[self.random.below(AWAY.len() as u64) as usize]),
        };
        self.set_trouble(tier, trouble, until);
    }

    pub(super) fn set_trouble(&mut self, tier: TierId, trouble: Trouble, until: u64) {
        self.disk.trouble[tier.index()] = Some((trouble, until));
        let (fault, what) = match trouble {
            Trouble::Silence => (Fault::Silence, "a tier is silent"),
            Trouble::Outage(_) => (Fault::Outage, "a tier fails at everything"),
            Trouble::Drops => (Fault::HungDrop, "a tier ends no drops"),
        };
        self.coverage.injected(fault);
        self.trace.note(what, u64::from(tier.0));
        let hangs = |flight: &&mut Flight| match trouble {
            Trouble::Silence => flight.tier == tier,
            Trouble::Drops => flight.tier == tier && flight.drop,
            Trouble::Outage(_) => false,
        };
        self.disk.flights.iter_mut().filter(hangs).for_each(|flight| flight.silenced = Some(fault));
    }

    /// Who waits for a tier that is silent is told of in time, and so is who waits for a frame while nothing at all ends.
    pub(super) fn check_silence(&mut self, ticks: u64) {
        let oracle = &mut self.oracle;
        oracle.hungry_ticks = if self.core.waits_for_frame() { oracle.hungry_ticks + ticks } else { 0 };
        let told = oracle.starved || oracle.short || oracle.silent.iter().any(|(_, told)| *told);
        assert!(
            oracle.hungry_ticks < SILENCE_TOLD_TICKS || told,
            "somebody waits for a frame, nothing ends, and nobody has been told"
        );
        for tier in self.all_tiers() {
            let silent = matches!(self.disk.trouble[tier.index()], Some((Trouble::Silence, _)));
            let waited_for = |flight: &Flight| {
                let mut pages = flight.run.pages().zip(flight.slots.slots());
                let wanted =
                    |(page, slot)| self.core.slot_of(page) == Some(slot) && self.core.is_waited_for(page);
                flight.tier == tier && pages.any(wanted)
            };
            let waits = silent && self.disk.flights.iter().any(waited_for);
            let (waited, told) = &mut self.oracle.silent[tier.index()];
            *waited = if waits { *waited + ticks } else { 0 };
            assert!(
                *waited < SILENCE_TOLD_TICKS || *told,
                "{tier} does not answer, and nobody has been told"
            );
        }
    }

    /// Nothing else of its tier can be read, so that nobody can tell whether the page or the tier is broken.
    pub(super) fn is_hopeless(&self, page: PageNo) -> bool {
        let table = self.core.table();
        let good = |other: &PageNo| {
            let undamaged = self.disk.damage[self.stored_place(*other)].is_none();
            let stored = table.has(*other, Flag::InStore) && undamaged;
            if table.stored_at(page) == TierId::ORIGIN || table.stored_at(*other) == TierId::ORIGIN {
                return *other != page && stored && table.stored_at(*other) == table.stored_at(page);
            }
            // It is written for that, unless it is zeros, or may not leave.
            use PageState::{Arriving, Leaving, Resident, Sampled};
            let in_ram = matches!(table.state(*other), Resident | Leaving | Sampled | Arriving)
                && !table.has(*other, Flag::Held)
                && !table.has(*other, Flag::Pinned)
                && self.oracle.truth[other.index()] != Some(0);
            *other != page && table.home(other.block()) == table.home(page.block()) && (stored || in_ram)
        };
        self.disk.damage[self.stored_place(page)].is_some() && !self.memory.iter().any(good)
    }

    // ── at rest ──────────────────────────────────────────────────────────────────────────

    /// Something happens to content that nobody touches.
    pub(super) fn decay(&mut self) {
        let fault = match (self.odds.rot > 0, self.odds.bad_sector > 0) {
            (true, true) if self.random.one_in(2) => Fault::Rot,
            (true, false) => Fault::Rot,
            (_, true) => Fault::BadSector,
            (false, false) => return,
        };
        let page = PageNo(self.random.below(self.pages));
        let index = self.stored_place(page);
        let is_there = index >= self.disk.pages || self.disk.allocated[index];
        if !is_there || self.disk.damage[index].is_some() {
            return;
        }
        self.changed = true;
        self.disk.damage[index] = Some(fault);
        self.coverage.injected(fault);
        if fault == Fault::Rot {
            self.disk.content[index] = super::mixed(self.disk.content[index], 1);
            self.trace.page("rots on the disk", page, Some(self.disk.content[index]));
        } else {
            self.trace.page("cannot be read any more", page, None);
        }
    }
}
