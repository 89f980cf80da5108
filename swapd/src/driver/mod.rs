//! The real driver: one thread a VM that feeds the core from userfaultfd, io_uring and the mailbox, and does what it
//! says.
//!
//! ```text
//!  userfaultfd ─┐                        ┌─▶ MOVE, POISON, PAGEMAP_SCAN
//!  eventfd ─────┼─▶ ring ─▶ Core ─▶ Action ─▶ reads and writes on the same ring
//!  completions ─┘                        └─▶ answers, notices
//! ```
//! Invariant: actions are executed in the order of issue, each before the next event is read; so the core's
//! table and the kernel's page tables agree whenever an event is handled.

mod discard;
pub(crate) mod engine;
mod errno;
mod latency;
pub(crate) mod locking;
pub(crate) mod mailbox;
pub(crate) mod memory;
mod recorder;
mod regions;
mod ring;
mod sealer;
mod silence;
pub(crate) mod store;
mod uffd;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::StartError;
use crate::notice::Notice;
use crate::origin::Layers;
use discard::Discarder;
use latency::LatencyBook;
use mailbox::{Command, Mailbox};
use memory::Memory;
use recorder::Recorder;
use ring::{Completion, Operation, Ring};
use sealer::Sealer;
use silence::Silent;
use swapcore::api::Copies;
use swapcore::core::{
    Action, Core, DropResult, Event, IDLE_TICKS, IoError, IoErrorKind, IoId, PageOut, Request, Response,
    TICK_MS, Ticket,
};
use swapcore::digest::{is_zero, page_sum};
use swapcore::error::CommandError;
use swapcore::moves::{HASTY, Moved, PATIENT};
use swapcore::units::{BLOCK_PAGES, PAGE_SIZE, PageNo, Run, Slot, SlotRun, TierId, bytes_of, pages_in};
use uffd::Faults;

type Reply = Box<dyn FnOnce(Result<Response, CommandError>) -> bool + Send>;

/// The loop's own state.
struct Driver {
    core: Core,
    faults: Faults,
    ring: Ring,
    origin: Option<Arc<Layers>>,
    memory: Arc<Memory>,
    mailbox: Arc<Mailbox>,
    /// If the store is encrypted.
    sealer: Option<Sealer>,
    notify: Box<dyn Fn(Notice) + Send>,
    latencies: LatencyBook,
    recorder: Recorder,
    replies: HashMap<Ticket, (Reply, Option<Run>)>,
    next_ticket: u64,
    page_outs: Vec<PageOut>,
    sums: Vec<u64>,
    /// Of faults that are read together; kept, so that no reading allocates.
    faulted: Vec<PageNo>,
    /// When a read that failed was last logged: a disk that is gone fails all of them.
    read_error_told: Option<Instant>,
    /// If the store is a block device.
    discarder: Option<Discarder>,
    /// Drops under way, and since when.
    drops: Vec<(IoId, Instant)>,
    /// When a drop that failed was last logged.
    drop_error_told: Option<Instant>,
    silent: Silent,
    /// Take frames for memory when it is mapped.
    prealloc: bool,
}

/// Reads that fail are not logged more often than this.
const READ_ERROR_EVERY: Duration = Duration::from_secs(1);
/// Tries to move a frame of the bay.
const BAY_TRIES: u32 = 1000;

/// Answers to requests that nobody asked the driver for.
const NO_TICKET: Ticket = Ticket(0);

impl Driver {
    fn run(&mut self) {
        let tick = Duration::from_millis(TICK_MS);
        let mut last_tick = Instant::now();
        let mut completions = Vec::new();
        let mut commands = Vec::new();
        let mut closed = false;
        while !closed || self.ring.in_flight() > 0 {
            let next_tick = last_tick + tick * self.core.ticks_to_sleep() as u32;
            // Victims that were pinned are replaced by others at once, but behind what has come meanwhile.
            // The same holds for the steps of a walk over all of memory.
            let patience = match self.core.looks_for_others() || self.core.is_walking() {
                true => Duration::ZERO,
                false => next_tick.saturating_duration_since(Instant::now()),
            };
            self.ring.wait(patience, &mut completions);
            // The clock is put right before what has come is handled: whoever begins to wait now would else seem to
            // have waited since the last tick, which is seconds ago in an idle VM, and a store that was asked for
            // nothing would be taken for silent. While somebody does wait the thread never sleeps for longer than that
            // many ticks, so no time of a silent store is left out.
            let slept = last_tick.elapsed().as_millis() as u64 / TICK_MS;
            let woken = !completions.is_empty() && slept > IDLE_TICKS;
            if woken {
                last_tick += tick * slept as u32;
                self.core.slept(slept);
            }
            // Faults first: the device is to work on their reads while the rest is dealt with.
            if completions.iter().any(|completion| matches!(completion, Completion::Faults)) {
                self.read_faults();
            }
            for completion in completions.drain(..) {
                match completion {
                    Completion::Faults => {}
                    Completion::Commands => closed |= self.mailbox.take(&mut commands),
                    Completion::Io { io, operation, result } => self.io_done(io, operation, result),
                    Completion::Dropped { io, result } => self.dropped(io, result),
                }
            }
            for command in commands.drain(..) {
                self.command(command);
            }
            let passed = last_tick.elapsed().as_millis() as u64 / TICK_MS;
            if woken || passed >= self.core.ticks_to_sleep() {
                last_tick += tick * passed as u32;
                self.event(Event::Tick { ticks: passed });
            }
            if self.core.is_walking() {
                self.event(Event::Step);
            }
            self.core.make_ready();
            self.perform_all();
        }
    }

    fn event(&mut self, event: Event<'_>) {
        self.core.handle(event);
        self.perform_all();
    }

    fn perform_all(&mut self) {
        while let Some(action) = self.core.next_action() {
            self.perform(action);
        }
    }

    fn read_faults(&mut self) {
        let now = Instant::now();
        let mut pages = std::mem::take(&mut self.faulted);
        let read = self.faults.read(|address| pages.extend(self.memory.page_at(address)));
        if let Err(error) = read {
            tracing::error!(%error, "cannot read faults");
        }
        pages.iter().for_each(|page| self.latencies.fault(*page, now));
        self.core.handle_faults(pages.drain(..));
        self.faulted = pages;
        self.perform_all();
    }

    fn io_done(&mut self, io: IoId, operation: Operation, result: std::io::Result<()>) {
        let Operation { tier, run, slots, sealed, .. } = operation;
        let failed = |error: std::io::Error| {
            let kind = IoErrorKind::of(&error);
            (IoError { tier, write: slots.is_none(), kind }, error)
        };
        let error = result.err().map(failed);
        let Some(slots) = slots else {
            if let (Some(sealer), Some(copy)) = (&mut self.sealer, sealed) {
                sealer.written(copy);
            }
            return self
                .event(Event::WriteDone { io, result: error.map_or(Ok(()), |(error, _)| Err(error)) });
        };
        if let Some((error, cause)) = error {
            if self.read_error_told.is_none_or(|told| told.elapsed() >= READ_ERROR_EVERY) {
                tracing::error!(first = run.start.0, pages = run.len, %cause, "{error}");
                self.read_error_told = Some(Instant::now());
            }
            return self.event(Event::ReadDone { io, result: Err(error) });
        }
        let mut sums = std::mem::take(&mut self.sums);
        sums.clear();
        // SAFETY: the read has completed, the slots are bound to its pages, and only the engine moves frames.
        let bytes = unsafe { self.memory.slot_bytes_mut(slots) };
        let cipher = match tier {
            TierId::STORE => self.sealer.as_ref().map(Sealer::cipher),
            _ => self.origin.as_ref().and_then(|origin| origin.cipher()),
        };
        if let Some(cipher) = cipher {
            cipher.decrypt(run, bytes);
        }
        sums.extend(
            run.pages().zip(bytes.chunks_exact(PAGE_SIZE)).map(|(page, bytes)| page_sum(page, bytes)),
        );
        self.event(Event::ReadDone { io, result: Ok(&sums) });
        self.sums = sums;
    }

    fn dropped(&mut self, io: IoId, result: std::io::Result<()>) {
        let nth = self.drops.iter().position(|(drop, _)| *drop == io).expect("a drop ends once");
        let took_us = self.drops.swap_remove(nth).1.elapsed().as_micros() as u64;
        let result = match result {
            Ok(()) => DropResult::Done,
            Err(error) if discard::is_unsupported(&error) => {
                tracing::info!(%error, "the store does not give space back: what the VM frees stays taken there");
                DropResult::Unsupported
            }
            Err(error) => {
                if self.drop_error_told.is_none_or(|told| told.elapsed() >= READ_ERROR_EVERY) {
                    tracing::warn!(%error, "space in the store cannot be given back; it is tried again");
                    self.drop_error_told = Some(Instant::now());
                }
                DropResult::Failed
            }
        };
        self.event(Event::DropDone { io, result, took_us });
    }

    fn command(&mut self, command: Command) {
        let (request, reply) = match command {
            Command::Ask { request, reply } => (request, reply),
            Command::Attach { region, base, reply } => {
                // Who asked and does not wait any more needs no answer.
                let _ = reply.send(self.attach(region, base));
                return;
            }
            Command::CloseOrigin { reply } => {
                let _ = reply.send(self.close_origin());
                return;
            }
            Command::Collapsed { run } => return self.collapsed(run),
            Command::Dropped { io, result } => return self.dropped(io, result),
        };
        let held = match &request {
            Request::RecordFaults(on) => {
                reply(Ok(Response::Faults(self.recorder.record(*on))));
                return;
            }
            // Received pages need a place to be moved to.
            Request::StartReceiving(_) if !self.memory.is_whole() => {
                reply(Err(CommandError::NotNow("not all of the VM's memory is mapped yet")));
                return;
            }
            Request::Adopt(adopted)
                if self.origin.as_ref().is_some_and(|origin| origin.lacks(adopted.run)) =>
            {
                reply(Err(CommandError::NotNow("no layer of the origin has one of these pages")));
                return;
            }
            Request::Hold(run) => Some(*run),
            _ => None,
        };
        self.next_ticket += 1;
        let ticket = Ticket(self.next_ticket);
        self.replies.insert(ticket, (reply, held));
        self.event(Event::Request { ticket, request });
    }

    /// Nothing of the VM is there any more, nor will be: no page is ever adopted again. A read of a page that has been given
    /// back meanwhile may be under way, and comes to its end.
    fn close_origin(&mut self) -> Result<(), CommandError> {
        if self.core.table().origin_pages() > 0 {
            return Err(CommandError::NotNow("pages are at the origin still"));
        }
        if let Some(origin) = &self.origin {
            report(origin.close(), "close the origin's files");
            report(self.ring.forget_origin(origin.files().len()), "close the origin's files");
        }
        Ok(())
    }

    fn answer(&mut self, ticket: Ticket, mut answer: Result<Response, CommandError>) {
        let Some((reply, held)) = self.replies.remove(&ticket) else { return };
        if let Ok(Response::Stats(stats)) = &mut answer {
            stats.latency_us = self.latencies.figures();
            stats.bookkeeping_bytes += ring::BYTES;
            let drops = self.drops.iter().map(|(_, started)| started.elapsed());
            stats.store.oldest_ms =
                drops.fold(self.ring.oldest(TierId::STORE), Duration::max).as_millis() as u64;
        }
        let granted = match &answer {
            Ok(Response::Frames(slots)) => Some(*slots),
            _ => None,
        };
        let taken = reply(answer);
        // A session that ended before its answer came holds nothing.
        if !taken && let Some(slots) = granted {
            self.core.handle(Event::Request { ticket: NO_TICKET, request: Request::ReturnFrames(slots) });
        }
        if !taken && let Some(run) = held {
            self.core.handle(Event::Request { ticket: NO_TICKET, request: Request::Release(run) });
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::MoveIn { run, slots } => self.move_in(run, slots),
            Action::CopyIn { page, slot } => {
                let copied = self.faults.copy_page(self.memory.page(page), self.memory.slot(slot));
                self.core.handle(Event::CopiedIn { page, slot, copied });
            }
            Action::MoveOut { run, slots, digest } => self.move_out(run, slots, digest),
            Action::Prepare { slots, fresh } => self.memory.zero_slots(slots, fresh),
            Action::FillBlock { run } => self.fill_block(run),
            Action::Collapse { run } => self.collapse(run),
            Action::Split { page } => self.split(page),
            Action::HugePages(allowed) => self.memory.allow_huge(allowed),
            Action::Copy { from, to } => self.memory.copy_slot(from, to),
            Action::CopyOut { ticket, pages } => self.copy_out(ticket, &pages),
            Action::Read { io, tier, run, slots } => {
                self.ring.read(io, tier, run, slots, self.memory.slot(slots.start));
            }
            Action::Write { io, tier, run, slots } => {
                assert_eq!(tier, TierId::STORE, "the only one that takes pages");
                self.write(io, run, slots);
            }
            Action::Drop { io, tier, run } => {
                assert_eq!(tier, TierId::STORE, "the only one that gives space back");
                self.drops.push((io, Instant::now()));
                match &mut self.discarder {
                    Some(discarder) => discarder.start(io, run),
                    None => self.ring.start_hole(io, run),
                }
            }
            Action::DropGuest { run } => report(self.memory.drop_guest(run), "give frames back"),
            Action::ReleaseFrames { slots } => report(self.memory.release_slots(slots), "give frames back"),
            Action::Poison { page } => {
                self.latencies.forget(page);
                report(self.faults.poison(self.memory.page(page), PAGE_SIZE), "poison a page");
            }
            Action::Wake { page } => {
                self.latencies.forget(page);
                self.faults.wake(self.memory.page(page), PAGE_SIZE);
            }
            Action::Resolved { page, kind } => {
                self.latencies.resolved(page, kind);
                self.recorder.note(page, kind);
            }
            Action::ArmTracking { run } => {
                report(self.scan(run, |_| {}), "track writes");
            }
            Action::ScanDirty { run } => self.scan_dirty(run),
            Action::EndTracking { run } => {
                for (part, at) in self.memory.mapped_parts(run) {
                    self.faults.end_tracking(at, part.bytes());
                }
            }
            Action::Answer { ticket, answer } => self.answer(ticket, answer),
            Action::StoreFailed(error) => (self.notify)(Notice::StoreFailed(error.to_string())),
            Action::StoreRecovered(_) => (self.notify)(Notice::StoreRecovered),
            Action::Starved(error) => (self.notify)(Notice::Starved(error.to_string())),
            Action::Relieved => (self.notify)(Notice::Relieved),
            Action::TierUnreachable(error) => {
                self.silent.falls(error.tier);
                (self.notify)(Notice::Unreachable(error.to_string()));
            }
            Action::TierReachable(tier) => {
                if self.silent.answers(tier) {
                    (self.notify)(Notice::Reachable);
                }
            }
            Action::Short { pinned } => (self.notify)(Notice::Short { pinned_bytes: bytes_of(pinned) }),
            Action::Enough => (self.notify)(Notice::Enough),
            Action::PagePoisoned(page) => (self.notify)(Notice::Poisoned(page)),
        }
    }

    fn write(&mut self, io: IoId, run: Run, slots: SlotRun) {
        // SAFETY: pages on their way to the store are in staging, where the core lets nobody write to them.
        let seal = |sealer: &mut Sealer| sealer.seal(run, unsafe { self.memory.slot_bytes(slots) });
        let sealed = self.sealer.as_mut().map(seal);
        let at = sealed.as_ref().map_or(self.memory.slot(slots.start), |copy| copy.as_ptr() as usize);
        self.ring.write(io, run, at, sealed);
    }

    fn copy_out(&mut self, ticket: Ticket, pages: &[(PageNo, Slot)]) {
        let mut copies = Copies::default();
        copies.bytes.reserve_exact(pages.len() * PAGE_SIZE);
        for (page, slot) in pages {
            copies.pages.push(*page);
            // SAFETY: the core has just said that the page's content is in this slot, where nobody writes to it and
            // only the engine moves frames.
            copies.bytes.extend_from_slice(unsafe { self.memory.slot_bytes(SlotRun::new(*slot, 1)) });
        }
        self.answer(ticket, Ok(Response::Copies(copies)));
    }

    fn move_in(&mut self, run: Run, slots: SlotRun) {
        let mut moved = 0;
        while moved < run.len {
            let (part, to) = self.memory.first_part(run.part(moved, run.len - moved));
            let from = self.memory.slot(slots.part(moved, part.len).start);
            match self.faults.move_pages(to, from, part.bytes(), PATIENT) {
                Moved::All => moved += part.len,
                Moved::Pinned(bytes) => {
                    moved += pages_in(bytes as u64) as u32;
                    break;
                }
            }
        }
        self.core.handle(Event::MovedIn { run, slots, moved });
    }

    fn fill_block(&mut self, run: Run) {
        let (part, to) = self.memory.first_part(run);
        let (from, len) = (self.memory.fill_bay(), part.bytes());
        let (mut moved, mut tries) = (0, 0);
        while let Moved::Pinned(more) = self.faults.move_pages(to + moved, from + moved, len - moved, PATIENT)
        {
            (moved, tries) = (moved + more, tries + 1);
            assert!(tries < BAY_TRIES, "a frame that nobody else has ever seen cannot be moved");
        }
        self.core.handle(Event::Filled { run, huge: self.faults.is_huge(to, len) });
    }

    /// By a thread for it alone: on a busy host a huge page takes its time.
    fn collapse(&mut self, run: Run) {
        let parts: Vec<_> = self.memory.mapped_parts(run).map(|(part, at)| (at, part.bytes())).collect();
        // Pages that are protected since they were tracked would stay as they are.
        parts.iter().for_each(|(at, len)| self.faults.end_tracking(*at, *len));
        let (memory, mailbox) = (self.memory.clone(), self.mailbox.clone());
        let work = move || {
            parts.iter().for_each(|(at, len)| memory.collapse(*at, *len));
            mailbox.send(Command::Collapsed { run });
        };
        if let Err(error) = std::thread::Builder::new().name("vmemd-huge".into()).spawn(work) {
            tracing::debug!(%error, "no thread to put huge pages together");
            self.collapsed(run);
        }
    }

    fn collapsed(&mut self, run: Run) {
        for block in (0..run.len).step_by(BLOCK_PAGES as usize).map(|start| run.part(start, BLOCK_PAGES)) {
            let huge = self.faults.is_huge(self.memory.page(block.start), block.bytes());
            self.event(Event::Collapsed { block, huge });
        }
    }

    /// The page goes to the bay, and is given back from there. If it is pinned by I/O, its huge page stays whole, and
    /// the host has what is given back of it when it runs short of memory.
    fn split(&self, page: PageNo) {
        if self.faults.move_pages(self.memory.bay(), self.memory.page(page), PAGE_SIZE, HASTY) == Moved::All {
            report(self.memory.empty_bay(), "give a frame back");
        }
    }

    fn move_out(&mut self, run: Run, slots: SlotRun, digest: bool) {
        // Page-out is work for the time in which the device reads what somebody waits for.
        self.ring.submit_now();
        self.page_outs.clear();
        // Page tables of a huge page that is tracked for writes are for single frames. Such a page would fall to pieces
        // on its way, and leave a page table where none must be.
        let falls_apart =
            run.len == BLOCK_PAGES && !self.faults.is_huge(self.memory.page(run.start), run.bytes());
        if falls_apart {
            self.page_outs.resize(run.len as usize, PageOut::Pinned);
        }
        while (self.page_outs.len() as u32) < run.len {
            let done = self.page_outs.len() as u32;
            let (rest, from) = self.memory.first_part(run.part(done, run.len - done));
            let rest_slots = slots.part(done, rest.len);
            let to = self.memory.slot(rest_slots.start);
            let (moved, pinned) = match self.faults.move_pages(to, from, rest.bytes(), HASTY) {
                Moved::All => (rest.len, false),
                Moved::Pinned(bytes) => (pages_in(bytes as u64) as u32, true),
            };
            for (page, slot) in rest.pages().zip(rest_slots.slots()).take(moved as usize) {
                let out = if digest { self.digest(page, SlotRun::new(slot, 1)) } else { NO_DIGEST };
                self.page_outs.push(out);
            }
            // A sample is not worth a try for each page: those of a huge page are pinned together.
            let left_alone =
                if pinned && !digest { run.len as usize - self.page_outs.len() } else { usize::from(pinned) };
            self.page_outs.extend(std::iter::repeat_n(PageOut::Pinned, left_alone));
        }
        self.core.handle(Event::MovedOut { run, slots, pages: &self.page_outs });
    }

    fn digest(&self, page: PageNo, slot: SlotRun) -> PageOut {
        // SAFETY: the frame has just left the guest; in staging only the engine has it.
        let bytes = unsafe { self.memory.slot_bytes(slot) };
        PageOut::Moved { sum: page_sum(page, bytes), zero: is_zero(bytes) }
    }

    fn scan_dirty(&mut self, run: Run) {
        let mut dirty = Vec::new();
        if let Err(error) = self.scan(run, |part| dirty.push(part)) {
            tracing::error!(%error, "cannot scan for dirty pages");
            // Nothing is known, so everything counts as written.
            dirty.clear();
            dirty.extend(self.memory.mapped_parts(run).map(|(part, _)| part));
        }
        self.core.handle(Event::Scanned { run, dirty: &dirty });
    }

    /// Finds those of the run's pages that have been written since they were last protected, and protects them again.
    fn scan(&mut self, run: Run, mut found: impl FnMut(Run)) -> std::io::Result<()> {
        for (part, base) in self.memory.mapped_parts(run) {
            self.faults.scan_dirty(base, part.bytes(), |at, bytes| {
                found(part.part(pages_in((at - base) as u64) as u32, pages_in(bytes as u64) as u32));
            })?;
        }
        Ok(())
    }

    /// Takes over a region of memory that its owner has mapped. Until then its pages are untouched, and nobody can
    /// touch them.
    fn attach(&mut self, region: usize, base: usize) -> Result<(), StartError> {
        self.memory.check(region, base)?;
        self.memory.map_in(&self.faults, region, base)?;
        if self.prealloc {
            self.memory.runs_of(region).for_each(|run| self.prealloc(run));
        }
        Ok(())
    }

    /// Takes the budget from the host before the VM runs, as far as the run's pages need it, but for what is kept free.
    fn prealloc(&mut self, run: Run) {
        for start in (0..run.len).step_by(BLOCK_PAGES as usize) {
            let request = Request::Fill(run.part(start, BLOCK_PAGES.min(run.len - start)));
            self.event(Event::Request { ticket: NO_TICKET, request });
        }
    }
}

const NO_DIGEST: PageOut = PageOut::Moved { sum: 0, zero: false };

fn report(result: std::io::Result<()>, what: &str) {
    if let Err(error) = result {
        tracing::error!(%error, "cannot {what}");
    }
}
