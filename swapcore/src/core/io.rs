//! The store: operations under way, and what follows from their results.

use super::Core;
use super::event::{Action, IoId};
use super::state::io_end::{ReadEnd, WriteEnd, Written, read_end, write_end};
use super::state::ios::{Io, IoKind, Landing, Purpose};
use super::state::tiers::Verdict;
use super::tiers::PROBES_MAX;
use crate::error::{IoError, IoErrorKind};
use crate::policy::probation::HEAT_RETURNED;
use crate::table::{Flag, PageState};
use crate::units::{PageNo, Run, Slot, SlotRun, TierId};

const _: () = assert!(super::IO_PAGES_MAX <= u64::BITS, "one bit a page");

impl Core {
    /// Reads stored pages into frames just taken.
    pub(super) fn read(&mut self, run: Run, slots: SlotRun, landing: Landing) -> IoId {
        run.pages().for_each(|page| self.table.set(page, PageState::Arriving));
        self.frames.bind_run(run, slots);
        if matches!(landing, Landing::Guest { .. }) {
            self.probation.note_back(run, self.frames.budget());
        }
        self.counts.pages_read += u64::from(run.len);
        self.start_read(run, slots, landing)
    }

    /// One operation for each tier that has a part of it. Returns the last of them.
    pub(super) fn start_read(&mut self, run: Run, slots: SlotRun, landing: Landing) -> IoId {
        let mut done = 0;
        loop {
            let rest = run.part(done, run.len - done);
            let tier = self.tier_of(rest.start);
            let len = rest.pages().take_while(|page| self.tier_of(*page) == tier).count() as u32;
            let last = len == rest.len;
            let (run, slots) = (rest.part(0, len), slots.part(done, len));
            let kind = IoKind::Read { landing };
            let io = self.ios.start(Io { kind, tier, run, slots, outdated: 0 });
            self.actions.push_back(Action::Read { io, tier, run, slots });
            done += len;
            if last {
                return io;
            }
        }
    }

    /// Where what is stored of the page is, and is read.
    pub(super) fn tier_of(&self, page: PageNo) -> TierId {
        if mutant!(ReadsOriginAtHome) { self.home_of(page) } else { self.table.stored_at(page) }
    }

    /// Where new content of the page goes.
    pub(super) fn home_of(&self, page: PageNo) -> TierId {
        self.table.home(page.block())
    }

    pub(super) fn read_done(&mut self, io: IoId, result: Result<&[u64], IoError>) {
        let Io { kind, tier, run, slots, .. } = self.ios.end(io);
        assert!(result.is_ok() || result.is_err_and(|error| error.tier == tier), "{result:?} of {tier}");
        self.counts.read_errors += u64::from(result.is_err());
        let landing = match kind {
            IoKind::Read { landing } => landing,
            IoKind::Probe { more } => return self.probed(tier, run.start, slots.start, more, result),
            IoKind::Write(_) | IoKind::Drop => panic!("{io:?} is not a read"),
        };
        if let (Landing::Home, Err(error)) = (landing, result)
            && self.read_in_halves(run, slots, error)
        {
            return;
        }
        if matches!(landing, Landing::Guest { marker: Some(_) })
            && !self.probation.admit(run, self.frames.budget())
        {
            run.pages().for_each(|page| self.table.warm(page, HEAT_RETURNED));
        }
        let mut arrived = std::mem::take(&mut self.scratch.pages);
        let mut given = 0;
        let mut homeward = Vec::new();
        let mut last_good = None;
        for (nth, (page, slot)) in run.pages().zip(slots.slots()).enumerate() {
            let orphan = self.frames.free_if_orphan(slot);
            let content = self.content_read(page, nth, result);
            let end = read_end(orphan, content, self.waiters.wait_for(page), page, landing);
            match end {
                ReadEnd::Elsewhere => continue,
                ReadEnd::Bad(_) if landing == Landing::Home && mutant!(TakesHomeUnread) => {
                    self.table.set(page, PageState::Leaving);
                    homeward.push((page, slot));
                }
                ReadEnd::Bad(kind) => {
                    self.counts.mismatches += u64::from(result.is_ok());
                    self.bad_read(page, slot, kind);
                    continue;
                }
                ReadEnd::IntoGuest => arrived.push((page, slot)),
                ReadEnd::Standby { prefetched } => {
                    self.enter_standby(page, slot);
                    self.table.put(page, Flag::Prefetched, prefetched);
                }
                ReadEnd::GoesHome => {
                    if self.goes_home(page) {
                        homeward.push((page, slot));
                    }
                }
            }
            (given, last_good) = (given + 1, Some(page));
            if !self.bad_reads.is_empty() {
                self.bad_reads.remove(&page);
            }
        }
        match arrived[..] {
            [(page, slot)] if run.len == 1 => self.copy_or_move_in(page, slot),
            _ => self.move_in(arrived.iter().copied()),
        }
        arrived.clear();
        self.scratch.pages = arrived;
        if self.tiers.have_origin() {
            self.read_at_origin(io, tier, given, last_good);
            self.write(&homeward, Purpose::TakenHome);
        }
        if given > 0 {
            self.tiers.gave(tier, given, run.start);
            self.tier_answers(tier);
        }
    }

    /// Whether the nth page of a read has the content on record; if not, what is wrong.
    fn content_read(
        &self,
        page: PageNo,
        nth: usize,
        result: Result<&[u64], IoError>,
    ) -> Result<(), IoErrorKind> {
        match result {
            Ok(sums) if sums[nth] == self.sums[page.index()] || self.believes(page, nth) => Ok(()),
            Ok(_) => Err(IoErrorKind::Mismatch),
            Err(_) if mutant!(TrustsFailedReads) => Ok(()),
            Err(error) => Err(error.kind),
        }
    }

    /// For planted bugs: what is read is believed whatever its checksum is.
    fn believes(&self, page: PageNo, nth: usize) -> bool {
        mutant!(TrustsReads)
            || (nth > 0 && mutant!(ChecksFirstPageOnly))
            || (mutant!(TrustsRereads) && self.bad_reads.contains_key(&page))
    }

    /// A page that could not be read, or came back with another content.
    fn bad_read(&mut self, page: PageNo, slot: Slot, kind: IoErrorKind) {
        if !self.waiters.wait_for(page) {
            // Nobody asked for it: whoever does will find out for himself.
            self.table.set(page, PageState::Stored);
            self.frames.unbind(page);
            return;
        }
        match self.judge(page, kind) {
            Verdict::ReadNow => {
                self.start_read(Run::one(page), SlotRun::new(slot, 1), Landing::Guest { marker: None });
            }
            Verdict::ReadLater => {
                self.table.set(page, PageState::Stored);
                self.frames.orphan(page);
                self.probe(self.tier_of(page), slot, PROBES_MAX);
            }
            Verdict::Lost => {
                self.bad_reads.remove(&page);
                self.table.set(page, PageState::Poisoned);
                self.table.unstore(page);
                self.frames.unbind(page);
                self.waiters.end(page);
                self.lost.insert(page);
                self.actions.push_back(Action::Poison { page });
                self.actions.push_back(Action::PagePoisoned(page));
            }
        }
    }

    /// Reads some page of the tier into a frame that is nobody's, to see whether it gives anything.
    fn probe(&mut self, tier: TierId, slot: Slot, left: u32) {
        let found = if left > 0 { self.find_probe(tier) } else { None };
        self.tiers.get_mut(tier).wants_sown |= found.is_none() && left == PROBES_MAX;
        let Some(page) = found.filter(|_| !mutant!(NeverProbes)) else {
            return self.frames.free_orphan(slot);
        };
        let (run, slots) = (Run::one(page), SlotRun::new(slot, 1));
        let io = self.ios.start(Io { kind: IoKind::Probe { more: left - 1 }, tier, run, slots, outdated: 0 });
        self.actions.push_back(Action::Read { io, tier, run, slots });
    }

    fn probed(&mut self, tier: TierId, page: PageNo, slot: Slot, more: u32, result: Result<&[u64], IoError>) {
        // If it has been written meanwhile, it may be neither the old nor the new content: that says nothing. The origin
        // has what it had, whatever the page is now.
        let known = |sum| tier == TierId::ORIGIN && self.tiers.known_at_origin == Some((page, sum));
        if result.is_ok_and(|sums| sums[0] == self.sums[page.index()] || known(sums[0])) {
            self.frames.free_orphan(slot);
            self.tiers.gave(tier, 1, page);
            self.tier_answers(tier);
        } else {
            self.probe(tier, slot, more);
        }
    }

    /// Writes pages whose new sums are on record. Those whose places are being dropped at this moment wait for that:
    /// the device may do the one or the other first.
    pub(super) fn write(&mut self, pages: &[(PageNo, Slot)], purpose: Purpose) {
        if !self.space.is_anything_dropping() {
            return self.write_now(pages, purpose);
        }
        let (wait, now): (Vec<_>, Vec<_>) = pages.iter().partition(|(page, _)| self.space.is_dropping(*page));
        for (page, slot) in wait {
            self.table.put(page, Flag::Writing, false);
            self.space.waiting.push((page, slot));
        }
        self.write_now(&now, purpose);
    }

    /// As few operations as they are contiguous on both sides.
    fn write_now(&mut self, pages: &[(PageNo, Slot)], purpose: Purpose) {
        let mut pages = pages.iter().copied().peekable();
        while let Some((page, slot)) = pages.next() {
            let (mut run, mut slots) = (Run::one(page), SlotRun::new(slot, 1));
            let tier = if mutant!(WritesToOrigin) { self.tier_of(page) } else { self.home_of(page) };
            while run.len < super::IO_PAGES_MAX
                && pages
                    .next_if(|(page, slot)| {
                        let next = *page == run.end() && *slot == slots.start.plus(slots.len);
                        next && self.table.home(page.block()) == tier
                    })
                    .is_some()
            {
                run.len += 1;
                slots.len += 1;
            }
            for page in run.pages() {
                if mutant!(LeavesOriginTooEarly) {
                    self.table.put(page, Flag::Origin, false);
                } else if !self.table.has(page, Flag::Origin) {
                    self.table.put(page, Flag::InStore, false);
                }
                self.table.put(page, Flag::Writing, true);
                self.space.set_taken(page, true);
            }
            let io = self.ios.start(Io { kind: IoKind::Write(purpose), tier, run, slots, outdated: 0 });
            self.actions.push_back(Action::Write { io, tier, run, slots });
        }
    }

    pub(super) fn write_done(&mut self, io: IoId, result: Result<(), IoError>) {
        let Io { kind: IoKind::Write(purpose), tier, run, slots, outdated } = self.ios.end(io) else {
            panic!("{io:?} is not a write");
        };
        assert!(result.is_ok() || result.is_err_and(|error| error.tier == tier), "{result:?} of {tier}");
        let result = if mutant!(TrustsFailedWrites) { Ok(()) } else { result };
        let mut rescued = Vec::new();
        let mut to_write = Vec::new();
        for (nth, (page, slot)) in run.pages().zip(slots.slots()).enumerate() {
            self.table.put(page, Flag::Writing, false);
            let at_origin = self.table.has(page, Flag::Origin);
            let written = Written {
                at_origin,
                orphan: self.frames.free_if_orphan(slot),
                state: self.table.state(page),
                well: result.is_ok(),
                on_record: outdated >> nth & 1 == 0 || mutant!(TrustsReplacedVersions),
                waited_for: self.waiters.wait_for(page) && !mutant!(ForgetsWaitersOfWrite),
            };
            if !written.orphan {
                self.note_written(page, written.well);
            }
            match write_end(written, purpose) {
                WriteEnd::WriteNewer if mutant!(ForgetsNewerVersion) => {}
                WriteEnd::WriteNewer => to_write.push((page, self.frames.slot(page))),
                WriteEnd::Nothing | WriteEnd::Stays => {}
                WriteEnd::Elsewhere { has_copy } => {
                    self.note_written(page, has_copy);
                    self.may_give_way(page);
                }
                WriteEnd::Rescue => {
                    self.table.set(page, PageState::Arriving);
                    rescued.push((page, slot));
                }
                WriteEnd::Standby => self.enter_standby(page, slot),
                WriteEnd::Stored => {
                    self.table.set(page, PageState::Stored);
                    self.frames.unbind(page);
                }
            }
            if at_origin && !written.well {
                self.note_dead(page);
            }
        }
        self.origin.wake();
        match result {
            Ok(()) => {
                self.tiers.wrote(tier);
                self.counts.written += if purpose == Purpose::PageOut { u64::from(run.len) } else { 0 };
                let tier = self.tiers.get_mut(tier);
                if tier.latch.is_none() {
                    tier.backoff.reset();
                }
            }
            Err(error) => self.latch_store(error),
        }
        self.move_in(rescued);
        self.write(&to_write, purpose);
        self.end_retry(tier);
    }
}
