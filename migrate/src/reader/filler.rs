//! Fills buffers: holds a block, takes what is to be read of it from where it is, and lets go.
//!
//! Several fillers work on each queue, so that one copies while another waits for the engine or the store. Two of them
//! never work on the same page in one round: a page is taken from the tracker before anything else happens to it.

use std::rc::Rc;

use swapd::{PageNo, Piece, Place, Run, TierId, answered};

use super::buffer::{Content, PageBuffer};
use super::error::ReadError;
use super::hold::Hold;
use super::outside::{planted, yield_to_ring};
use super::shared::Shared;
use super::sink::{Closed, Found, MAX_RUNS, Sink, StoredRun};
use super::stored::Stored;
use super::tracker::Tracker;

/// One buffer that is being filled, and the pages found on the way that have no content.
struct Filler<S> {
    shared: Rc<Shared<S>>,
    queue: u32,
    buffer: PageBuffer,
    zeros: Vec<Run>,
    lost: Vec<Run>,
}

/// Works until the queue has no more blocks in this round.
pub(super) async fn run<S: Sink>(shared: Rc<Shared<S>>, queue: u32) -> Result<(), ReadError> {
    loop {
        let buffer = shared.sink.buffer(queue).await.ok_or(ReadError::Closed)?;
        let mut filler =
            Filler { shared: shared.clone(), queue, buffer, zeros: Vec::new(), lost: Vec::new() };
        let more = filler.fill().await?;
        filler.hand_over().await.map_err(|Closed| ReadError::Closed)?;
        if !more {
            return Ok(());
        }
        yield_to_ring().await;
    }
}

impl<S: Sink> Filler<S> {
    /// Fills the buffer; says whether there may be more to do.
    async fn fill(&mut self) -> Result<bool, ReadError> {
        while self.has_room() {
            let Some(block) = self.shared.next_block(self.queue) else { return Ok(false) };
            let Some(cover) = self.shared.tracker.borrow().cover(block) else { continue };
            let (hold, pieces) = Hold::take(&self.shared.handle, cover).await?;
            let result = self.take_pieces(&pieces).await;
            if planted!(KeepsPagesHeld) {
                std::mem::forget(hold);
            } else {
                drop(hold);
            }
            result?;
            if self.shared.tracker.borrow().cover(block).is_some() {
                self.shared.put_back(self.queue, block);
            }
        }
        Ok(true)
    }

    fn has_room(&self) -> bool {
        let bare = self.zeros.len().max(self.lost.len()) as u32;
        // The next block adds at most a run for every other page.
        self.buffer.room() > 0 && bare + swapd::BLOCK_PAGES / 2 <= MAX_RUNS
    }

    async fn take_pieces(&mut self, pieces: &[Piece]) -> Result<(), ReadError> {
        for piece in pieces {
            match piece.place {
                Place::Memory => self.take_memory(piece.run),
                Place::Stored => self.take_stored(piece.tier, piece.run).await?,
                Place::Staged => self.take_staged(piece.run).await?,
                Place::Zero => self.take_zero(piece.run),
                Place::Moving => {
                    self.each(piece.run, |filler, page| filler.shared.tracker.borrow_mut().defer(page));
                }
                Place::Poisoned => self.each(piece.run, |filler, page| {
                    filler.shared.tracker.borrow_mut().take(page);
                    filler.lose(page);
                }),
            }
        }
        Ok(())
    }

    /// Every page of the run that is to be read now.
    fn each(&mut self, run: Run, mut visit: impl FnMut(&mut Filler<S>, PageNo)) {
        let mut rest = run;
        loop {
            let Some(page) = self.shared.tracker.borrow().first_in(rest) else { return };
            visit(self, page);
            rest = behind(run, page);
        }
    }

    fn take_zero(&mut self, run: Run) {
        self.each(run, |filler, page| {
            filler.shared.tracker.borrow_mut().take(page);
            if filler.shared.tracker.borrow_mut().differs_from_sent_zero(page) {
                push(&mut filler.zeros, page);
            }
        });
    }

    fn take_memory(&mut self, run: Run) {
        let shared = self.shared.clone();
        let mut tracker = shared.tracker.borrow_mut();
        let mut rest = run;
        while self.buffer.room() > 0
            && let Some(page) = tracker.first_in(rest)
        {
            rest = behind(run, page);
            // SAFETY: the page is held and in memory, so it stays mapped until we release it.
            unsafe { self.take_page(&mut tracker, page, shared.handle.page_address(page)) };
        }
    }

    /// # Safety
    /// As for [`PageBuffer::copy`].
    unsafe fn take_page(&mut self, tracker: &mut Tracker, page: PageNo, from: *const u8) {
        tracker.take(page);
        // SAFETY: by the caller's promise.
        match unsafe { self.buffer.copy(page, from) } {
            Content::Zero => {
                if tracker.differs_from_sent_zero(page) {
                    push(&mut self.zeros, page);
                }
            }
            Content::Sum(sum) => {
                if tracker.differs_from_sent(page, sum) && !self.shared.sink.has(page, sum) {
                    self.buffer.keep(page, sum);
                }
            }
        }
    }

    /// Copies pages on their way to the store, or from it, out of the frames in which they wait. Pages that have left
    /// those frames by then stay to be read.
    async fn take_staged(&mut self, run: Run) -> Result<(), ReadError> {
        let room = self.buffer.room() as usize;
        let wanted: Vec<_> = self.shared.tracker.borrow().pages_in(run).take(room).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let copies = answered(self.shared.handle.staged_async(wanted)).await?;
        let shared = self.shared.clone();
        let mut tracker = shared.tracker.borrow_mut();
        for (page, bytes) in copies.iter() {
            // Not if a scan has found it dirty meanwhile.
            if tracker.first_in(Run::one(page)).is_some() {
                // SAFETY: a page of bytes, which are ours.
                unsafe { self.take_page(&mut tracker, page, bytes.as_ptr()) };
            }
        }
        Ok(())
    }

    /// Reads from the tier what the sink does not have already.
    async fn take_stored(&mut self, tier: TierId, run: Run) -> Result<(), ReadError> {
        if self.shared.tracker.borrow().first_in(run).is_none() {
            return Ok(());
        }
        let shared = self.shared.clone();
        let stored = shared.stored.look_up(tier, run).await?;
        let mut rest = run;
        while self.buffer.room() > 0 {
            let Some(wanted) = self.next_wanted(rest, &stored) else { break };
            rest = Run::new(wanted.end(), (run.end().0 - wanted.end().0) as u32);
            let straight = StoredRun { tier, run: wanted, sums: stored.sums_of(wanted) };
            if shared.sink.take_stored(straight).await.map_err(|Closed| ReadError::Closed)? {
                shared.pages_given.set(shared.pages_given.get() + u64::from(wanted.len));
                continue;
            }
            if shared.stored.read(wanted, &stored, &mut self.buffer).await.is_err() {
                // One page that cannot be read does not spoil its neighbours.
                for page in wanted.pages() {
                    if !shared.stored.read_again(page, &stored, &mut self.buffer).await? {
                        // Where nearly everything is lost, a line for each page would tell no more.
                        if !shared.stored.is_worn_out() {
                            tracing::warn!(
                                %page,
                                "{tier} does not give back what was written: it moves as a lost page"
                            );
                        }
                        self.lose(page);
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes the next neighbouring pages whose content the sink does not have.
    fn next_wanted(&self, run: Run, stored: &Stored) -> Option<Run> {
        let mut tracker = self.shared.tracker.borrow_mut();
        let mut wanted: Option<Run> = None;
        let mut rest = run;
        while let Some(page) = tracker.first_in(rest) {
            match &mut wanted {
                Some(run) if page != run.end() || run.len == self.buffer.room() => break,
                _ => {}
            }
            rest = behind(run, page);
            tracker.take(page);
            let sum = stored.sums_of(Run::one(page))[0];
            if tracker.differs_from_sent(page, sum) && !self.shared.sink.has(page, sum) {
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

    /// The content is gone, and the sink is told so: what it may have of the page is out of date.
    fn lose(&mut self, page: PageNo) {
        self.shared.tracker.borrow_mut().unsent(page);
        push(&mut self.lost, page);
    }

    /// Gives the sink what was found.
    async fn hand_over(mut self) -> Result<(), Closed> {
        let sink = &self.shared.sink;
        let bare: [fn(Vec<Run>) -> Found; 2] = [Found::Zeros, Found::Lost];
        for (kind, mut runs) in bare.into_iter().zip([self.zeros, self.lost]) {
            if !runs.is_empty() {
                runs.sort_unstable_by_key(|run| run.start);
                sink.take(self.queue, kind(runs)).await?;
            }
        }
        let pages = u64::from(self.buffer.pages());
        if pages == 0 {
            self.buffer.clear();
            sink.unused(self.queue, self.buffer);
            return Ok(());
        }
        self.shared.pages_given.set(self.shared.pages_given.get() + pages);
        sink.take(self.queue, Found::Pages(self.buffer)).await
    }
}

/// The part of the run that is behind the page.
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
