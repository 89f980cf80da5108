//! The store: operations under way, and what follows from their results.

use super::event::{Action, IoError, IoId, Response};
use super::{Core, Mutant};
use crate::policy::probation::HEAT_RETURNED;
use crate::staging::Use;
use crate::table::{Flag, PageState};
use crate::units::{PageNo, Run, Slot, SlotRun};

/// How often a page that somebody waits for is read before it is given up.
pub(super) const READ_ATTEMPTS: u8 = 3;

/// Where pages go once they are read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Landing {
    /// Into the guest, except the marker.
    Guest { marker: Option<PageNo> },
    /// They wait in staging for a touch.
    Staging,
}

/// Why pages are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Purpose {
    PageOut,
    /// Received in a migration and placed in the store.
    Placement,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Read { landing: Landing, attempt: u8 },
    Write(Purpose),
}

#[derive(Clone, Copy, Debug)]
struct Io {
    kind: Kind,
    run: Run,
    slots: SlotRun,
}

/// Operations under way, by number; numbers are used again.
#[derive(Debug, Default)]
pub(super) struct Ios {
    entries: Vec<Option<Io>>,
    vacant: Vec<u32>,
}

impl Ios {
    fn start(&mut self, io: Io) -> IoId {
        let id = self.vacant.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() as u32 - 1
        });
        self.entries[id as usize] = Some(io);
        IoId(id)
    }

    fn end(&mut self, id: IoId) -> Io {
        self.vacant.push(id.0);
        self.entries[id.0 as usize].take().expect("an operation ends once")
    }
}

impl Core {
    /// Reads stored pages into frames just taken.
    pub(super) fn read(&mut self, run: Run, slots: SlotRun, landing: Landing) {
        run.pages().for_each(|page| self.table.set(page, PageState::Arriving));
        self.bind_run(run, slots);
        self.counts.pages_read += u64::from(run.len);
        self.start_read(run, slots, landing, 1);
    }

    fn start_read(&mut self, run: Run, slots: SlotRun, landing: Landing, attempt: u8) {
        let io = self.ios.start(Io { kind: Kind::Read { landing, attempt }, run, slots });
        self.actions.push_back(Action::Read { io, run, slots });
    }

    pub(super) fn read_done(&mut self, io: IoId, result: Result<&[u64], IoError>) {
        let Io { kind: Kind::Read { landing, attempt }, run, slots } = self.ios.end(io) else {
            panic!("{io:?} is not a read");
        };
        self.counts.read_errors += u64::from(result.is_err());
        if matches!(landing, Landing::Guest { marker: Some(_) }) && !self.probation.admit(run, self.budget) {
            run.pages().for_each(|page| self.table.warm(page, HEAT_RETURNED));
        }
        let mut arrived = std::mem::take(&mut self.scratch);
        for (nth, (page, slot)) in run.pages().zip(slots.slots()).enumerate() {
            if self.staging.used(slot) == Use::Orphan {
                self.staging.free(slot);
                continue;
            }
            let good = result
                .as_ref()
                .is_ok_and(|sums| sums[nth] == self.sums[page.index()] || self.mutant(Mutant::TrustsReads));
            if !good {
                self.counts.mismatches += u64::from(result.is_ok());
                self.bad_read(page, slot, attempt);
                continue;
            }
            let wanted = self.waiting.contains_key(&page);
            match landing {
                Landing::Staging if !wanted => {
                    self.table.put(page, Flag::Prefetched, true);
                    self.enter_standby(page, slot);
                }
                Landing::Guest { marker } if marker == Some(page) && !wanted => {
                    self.enter_standby(page, slot)
                }
                _ => arrived.push((page, slot)),
            }
        }
        self.move_in(arrived.drain(..));
        self.scratch = arrived;
    }

    /// A page that could not be read, or came back with another content.
    fn bad_read(&mut self, page: PageNo, slot: Slot, attempt: u8) {
        if !self.waiting.contains_key(&page) {
            // Nobody asked for it: whoever does will find out for himself.
            self.table.set(page, PageState::Stored);
            self.unbind(page);
        } else if attempt < READ_ATTEMPTS {
            let landing = Landing::Guest { marker: None };
            self.start_read(Run::one(page), SlotRun::new(slot, 1), landing, attempt + 1);
        } else {
            self.table.set(page, PageState::Poisoned);
            self.table.put(page, Flag::Stored, false);
            self.unbind(page);
            self.waiting.remove(&page);
            self.actions.push_back(Action::Poison { page });
            self.actions.push_back(Action::PagePoisoned(page));
        }
    }

    /// Writes pages whose new sums are on record, as few operations as they are contiguous on both sides.
    pub(super) fn write(&mut self, pages: &[(PageNo, Slot)], purpose: Purpose) {
        let mut pages = pages.iter().copied().peekable();
        while let Some((page, slot)) = pages.next() {
            let (mut run, mut slots) = (Run::one(page), SlotRun::new(slot, 1));
            while run.len < super::IO_PAGES_MAX
                && pages
                    .next_if(|(page, slot)| *page == run.end() && *slot == slots.start.plus(slots.len))
                    .is_some()
            {
                run.len += 1;
                slots.len += 1;
            }
            for page in run.pages() {
                self.table.put(page, Flag::Stored, false);
                self.table.put(page, Flag::Writing, true);
            }
            let io = self.ios.start(Io { kind: Kind::Write(purpose), run, slots });
            self.actions.push_back(Action::Write { io, run, slots });
        }
    }

    pub(super) fn write_done(&mut self, io: IoId, result: Result<(), IoError>) {
        let Io { kind: Kind::Write(purpose), run, slots } = self.ios.end(io) else {
            panic!("{io:?} is not a write");
        };
        let result = if self.mutant(Mutant::TrustsFailedWrites) { Ok(()) } else { result };
        let mut rescued = Vec::new();
        let mut to_write = Vec::new();
        for (page, slot) in run.pages().zip(slots.slots()) {
            self.table.put(page, Flag::Writing, false);
            let state = self.table.state(page);
            if self.staging.used(slot) == Use::Orphan {
                self.staging.free(slot);
                match state {
                    // A newer version waits for this write to end.
                    PageState::Leaving => to_write.push((page, self.slots_of[&page])),
                    PageState::Untouched => {}
                    _ => self.table.put(page, Flag::Stored, result.is_ok()),
                }
                continue;
            }
            self.table.put(page, Flag::Stored, result.is_ok());
            if self.waiting.contains_key(&page) {
                self.table.set(page, PageState::Arriving);
                rescued.push((page, slot));
            } else if result.is_ok() {
                match purpose {
                    Purpose::PageOut => self.enter_standby(page, slot),
                    Purpose::Placement => {
                        self.table.set(page, PageState::Stored);
                        self.unbind(page);
                    }
                }
            }
        }
        match result {
            Ok(()) if purpose == Purpose::PageOut => self.counts.written += u64::from(run.len),
            Ok(()) => {}
            Err(error) => self.latch_store(error),
        }
        self.move_in(rescued);
        self.write(&to_write, purpose);
    }

    fn latch_store(&mut self, error: IoError) {
        self.counts.write_errors += 1;
        if self.store_failed.is_none() {
            self.store_failed = Some(error.0.clone());
            self.actions.push_back(Action::StoreFailed(error.0));
        }
    }

    /// Writes again what a failed store left in staging.
    pub(super) fn retry_store(&mut self) -> Response {
        if self.store_failed.take().is_some() {
            // They are among those found below.
            self.unwritten.clear();
            let unwritten: Vec<_> = (0..self.staging.all_slots())
                .map(Slot)
                .filter_map(|slot| match self.staging.used(slot) {
                    Use::Bound(page) => Some((page, slot)),
                    _ => None,
                })
                .filter(|(page, _)| {
                    self.table.state(*page) == PageState::Leaving && !self.table.has(*page, Flag::Writing)
                })
                .collect();
            let purpose = if self.receiving.is_some() { Purpose::Placement } else { Purpose::PageOut };
            self.write(&unwritten, purpose);
            self.actions.push_back(Action::StoreRecovered);
        }
        Response::Done
    }
}
