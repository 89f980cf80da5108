//! Puts records together: holds a block, takes what is to be sent of it from where it is, and lets go.
//!
//! Several fillers work on each stream, so that while one waits for the engine or the store another copies. They never
//! work on the same page in one round: a page is taken from the tracker before anything else happens to it.

use std::rc::Rc;

use swapd::{CommandError, IoError, IoErrorKind, PageNo, Piece, Place, Run, TierId, answered};
use tokio::sync::mpsc;

use super::record::{Content, Record};
use super::send_state::{Lane, Outgoing, SendState};
use super::tracker::Tracker;
use crate::limits::{BROKEN_TRIES, REREAD_EVERY, STORE_LIMIT, patience};
use crate::link::error::SessionError;
use crate::outside::{Instant, planted, sleep, yield_to_ring};
use crate::wire::record::{Kind, MAX_RECORD_RUNS};

/// Pages that are asked for to see whether the store gives any.
const PROBES: usize = 16;

/// One record in the making, and the pages found on the way that have no content.
struct Filler {
    ship: Rc<SendState>,
    stream: usize,
    record: Record,
    zeros: Vec<Run>,
    poisoned: Vec<Run>,
}

/// Held pages of a tier, with their checksums.
struct Stored {
    tier: TierId,
    run: Run,
    sums: Vec<u64>,
}

impl Stored {
    fn sums_of(&self, part: Run) -> &[u64] {
        let from = (part.start.0 - self.run.start.0) as usize;
        &self.sums[from..from + part.len as usize]
    }
}

/// Works until the stream has no more blocks in this round.
pub(crate) async fn run(ship: Rc<SendState>, stream: usize, out: mpsc::Sender<Outgoing>) {
    loop {
        let lane = &ship.lanes[stream];
        let Some(record) = ship.session_state.unless_failed(lane.take_record()).await else { return };
        let mut filler =
            Filler { ship: ship.clone(), stream, record, zeros: Vec::new(), poisoned: Vec::new() };
        let more = match filler.fill().await {
            Ok(more) => more,
            Err(trouble) => return ship.session_state.fail(trouble),
        };
        if filler.ship_off(&out).await.is_err() || !more {
            return;
        }
        yield_to_ring().await;
    }
}

impl Filler {
    fn lane(&self) -> &Lane {
        &self.ship.lanes[self.stream]
    }

    /// Fills the record; says whether there may be more to do.
    async fn fill(&mut self) -> Result<bool, SessionError> {
        while self.has_room() {
            let Some(block) = self.lane().next_block() else { return Ok(false) };
            let Some(cover) = self.ship.tracker.borrow().cover(block) else { continue };
            let pieces = answered(self.ship.handle.hold_async(cover)).await?;
            let result = self.take_pieces(&pieces).await;
            // The engine's answer says nothing new, so nobody waits for it.
            if !planted!(KeepsPagesHeld) {
                drop(self.ship.handle.release_async(cover));
            }
            result?;
            if self.ship.tracker.borrow().cover(block).is_some() {
                self.lane().put_back(block);
            }
        }
        Ok(true)
    }

    fn has_room(&self) -> bool {
        let bare = self.zeros.len().max(self.poisoned.len()) as u32;
        // A block adds at most a run for every other page.
        self.record.room() > 0 && bare + swapd::BLOCK_PAGES / 2 <= MAX_RECORD_RUNS
    }

    async fn take_pieces(&mut self, pieces: &[Piece]) -> Result<(), SessionError> {
        for piece in pieces {
            match piece.place {
                Place::Memory => self.take_memory(piece.run),
                Place::Stored => self.take_stored(piece.tier, piece.run).await?,
                Place::Staged => self.take_staged(piece.run).await?,
                Place::Zero => self.take_zero(piece.run),
                Place::Moving => {
                    self.each(piece.run, |filler, page| filler.ship.tracker.borrow_mut().defer(page))
                }
                Place::Poisoned => self.each(piece.run, |filler, page| {
                    let mut tracker = filler.ship.tracker.borrow_mut();
                    tracker.take(page);
                    tracker.unsent(page);
                    drop(tracker);
                    push(&mut filler.poisoned, page);
                }),
            }
        }
        Ok(())
    }

    /// Every page of the run that is to be sent now.
    fn each(&mut self, run: Run, mut visit: impl FnMut(&mut Filler, PageNo)) {
        let mut rest = run;
        loop {
            let Some(page) = self.ship.tracker.borrow().first_in(rest) else { return };
            visit(self, page);
            rest = behind(run, page);
        }
    }

    fn take_zero(&mut self, run: Run) {
        self.each(run, |filler, page| {
            filler.ship.tracker.borrow_mut().take(page);
            if filler.ship.tracker.borrow_mut().differs_from_sent_zero(page) {
                push(&mut filler.zeros, page);
            }
        });
    }

    fn take_memory(&mut self, run: Run) {
        let ship = self.ship.clone();
        let mut tracker = ship.tracker.borrow_mut();
        let mut rest = run;
        while self.record.room() > 0
            && let Some(page) = tracker.first_in(rest)
        {
            rest = behind(run, page);
            // SAFETY: the page is held and in memory, so it stays mapped until we release it.
            unsafe { self.take_page(&mut tracker, page, ship.handle.page_address(page)) };
        }
    }

    /// # Safety
    /// As for [`Record::copy`].
    unsafe fn take_page(&mut self, tracker: &mut Tracker, page: PageNo, from: *const u8) {
        tracker.take(page);
        // SAFETY: by the caller's promise.
        match unsafe { self.record.copy(page, from) } {
            Content::Zero => {
                if tracker.differs_from_sent_zero(page) {
                    push(&mut self.zeros, page);
                }
            }
            Content::Sum(sum) => {
                if tracker.differs_from_sent(page, sum) {
                    self.record.keep(page, sum);
                }
            }
        }
    }

    /// Copies pages on their way to the store, or from it, out of the frames in which they wait. Those that wait there no more stay
    /// to be sent.
    async fn take_staged(&mut self, run: Run) -> Result<(), SessionError> {
        let room = self.record.room() as usize;
        let wanted: Vec<_> = self.ship.tracker.borrow().pages_in(run).take(room).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let copies = answered(self.ship.handle.staged_async(wanted)).await?;
        let ship = self.ship.clone();
        let mut tracker = ship.tracker.borrow_mut();
        for (page, bytes) in copies.iter() {
            // Not if a scan has found it written meanwhile.
            if tracker.first_in(Run::one(page)).is_some() {
                // SAFETY: a page of bytes, which are ours.
                unsafe { self.take_page(&mut tracker, page, bytes.as_ptr()) };
            }
        }
        Ok(())
    }

    /// Reads from the store what is not known to be there already. No page comes in for it.
    async fn take_stored(&mut self, tier: TierId, run: Run) -> Result<(), SessionError> {
        if self.ship.tracker.borrow().first_in(run).is_none() {
            return Ok(());
        }
        let sums = answered(self.ship.handle.sums_async(run)).await?;
        let stored = Stored { tier, run, sums };
        let mut rest = run;
        while self.record.room() > 0 {
            let Some(wanted) = self.next_wanted(rest, &stored) else { break };
            rest = Run::new(wanted.end(), (run.end().0 - wanted.end().0) as u32);
            if self.read(wanted, &stored).await.is_err() {
                // One page that cannot be read does not spoil its neighbours.
                for page in wanted.pages() {
                    if !self.read_again(page, &stored).await? {
                        self.lose(page);
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes the next contiguous pages whose content the target does not have.
    fn next_wanted(&self, run: Run, stored: &Stored) -> Option<Run> {
        let mut tracker = self.ship.tracker.borrow_mut();
        let mut wanted: Option<Run> = None;
        let mut rest = run;
        while let Some(page) = tracker.first_in(rest) {
            match &mut wanted {
                Some(run) if page != run.end() || run.len == self.record.room() => break,
                _ => {}
            }
            rest = behind(run, page);
            tracker.take(page);
            if tracker.differs_from_sent(page, stored.sums_of(Run::one(page))[0]) {
                match &mut wanted {
                    Some(run) => run.len += 1,
                    None => wanted = Some(Run::one(page)),
                }
            } else if wanted.is_some() {
                break;
            }
        }
        wanted
    }

    /// Reads pages from the store behind the record's last.
    ///
    /// # Errors
    /// They are not there, or not all of them as they were written, and nothing was added.
    async fn read(&mut self, run: Run, stored: &Stored) -> Result<(), IoError> {
        let region = self.record.tail(run.len);
        let sums = stored.sums_of(run);
        let (result, _region) = self.ship.stored.read(stored.tier, run, sums, region).await;
        if let Err(error) = result {
            let mismatch = error.kind == IoErrorKind::Mismatch;
            if !mismatch && self.ship.patience.get() > 0 {
                tracing::warn!(?run, "{error}");
            }
            if !(mismatch && planted!(TrustsTheStore)) {
                return Err(error);
            }
        }
        run.pages().zip(sums).for_each(|(page, sum)| self.record.keep(page, *sum));
        self.ship.last_given.set(Some(run.start));
        Ok(())
    }

    /// Reads a page that was bad, again and again for a while, as the engine does: the device may have had a hiccup. False: its medium is
    /// broken, for [`BROKEN_TRIES`] readings of it have failed, and the store has given another page before each of them.
    ///
    /// # Errors
    /// The store gives nothing.
    async fn read_again(&mut self, page: PageNo, stored: &Stored) -> Result<bool, SessionError> {
        let deadline = Instant::now() + patience(STORE_LIMIT);
        let (mut counted, mut fair) = (0, false);
        loop {
            let Err(error) = self.read(Run::one(page), stored).await else { return Ok(true) };
            let of_medium = matches!(error.kind, IoErrorKind::Broken(_) | IoErrorKind::Mismatch);
            counted += u32::from(of_medium && fair);
            if counted == BROKEN_TRIES {
                return Ok(false);
            }
            fair = self.gives_another(page).await? || planted!(TakesSilenceForBroken);
            if !(fair && of_medium) && Instant::now() >= deadline {
                return Err(CommandError::Store(error).into());
            }
            match self.ship.patience.get() {
                // Where much is broken, what is left of it is lost without waiting, but not on less evidence.
                0 if fair && of_medium => {}
                0 => sleep(REREAD_EVERY).await,
                left => {
                    self.ship.patience.set(left - 1);
                    sleep(REREAD_EVERY).await;
                }
            }
        }
    }

    /// Whether the store gives any page but this one, as it was written. None of them is held, so that one that is just being changed
    /// does not count.
    async fn gives_another(&mut self, page: PageNo) -> Result<bool, SessionError> {
        if let Some(last) = self.ship.last_given.get()
            && last != page
            && self.gives(last).await?
        {
            return Ok(true);
        }
        // To know what is stored takes a look at all of memory.
        let stored = answered(self.ship.handle.stored_map_async()).await?;
        let count: u64 = stored.iter().map(|run| u64::from(run.len)).sum();
        for part in 0..PROBES as u64 {
            if let Some(other) = nth_page(&stored, part * count / PROBES as u64)
                && other != page
                && self.gives(other).await?
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn gives(&mut self, page: PageNo) -> Result<bool, SessionError> {
        let sums = answered(self.ship.handle.sums_async(Run::one(page))).await?;
        let given = self.ship.stored.probe(TierId::STORE, page, sums[0], self.record.tail(1)).await.is_ok();
        if given {
            self.ship.last_given.set(Some(page));
        }
        Ok(given)
    }

    /// The content is gone: the target poisons the page, as the engine here will when it is touched.
    fn lose(&mut self, page: PageNo) {
        // Where nearly everything is lost, a line for each would tell no more.
        if self.ship.patience.get() > 0 {
            tracing::warn!(%page, "the store does not give back what was written: it moves as a lost page");
        }
        self.ship.tracker.borrow_mut().unsent(page);
        push(&mut self.poisoned, page);
    }

    /// Sends what was found.
    async fn ship_off(
        mut self,
        out: &mpsc::Sender<Outgoing>,
    ) -> Result<(), mpsc::error::SendError<Outgoing>> {
        for (kind, runs) in [(Kind::Zeros, &mut self.zeros), (Kind::Poisoned, &mut self.poisoned)] {
            if !runs.is_empty() {
                runs.sort_unstable_by_key(|run| run.start);
                out.send(Outgoing::Bare(kind, std::mem::take(runs))).await?;
            }
        }
        let pages = u64::from(self.record.pages());
        if pages == 0 {
            self.ship.lanes[self.stream].give_back(self.record);
            return Ok(());
        }
        self.ship.pages_sent.set(self.ship.pages_sent.get() + pages);
        out.send(Outgoing::Pages(self.record)).await
    }
}

fn nth_page(runs: &[Run], nth: u64) -> Option<PageNo> {
    let mut before = 0;
    runs.iter().find_map(|run| {
        let at = nth - before;
        before += u64::from(run.len);
        (at < u64::from(run.len)).then(|| run.start.plus(at as u32))
    })
}

/// What of the run is behind the page.
fn behind(run: Run, page: PageNo) -> Run {
    Run::new(PageNo(page.0 + 1), (run.end().0 - page.0 - 1) as u32)
}

/// Adds a page to runs that stay within blocks.
fn push(runs: &mut Vec<Run>, page: PageNo) {
    match runs.last_mut() {
        Some(run) if run.end() == page && run.start.block() == page.block() => run.len += 1,
        _ => runs.push(Run::one(page)),
    }
}
