//! Where a stream's pages go: straight from the socket into the engine's staging frames, or into plain memory.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use swapd::digest::page_sum;
use swapd::{ArrivedRun, PAGE_SIZE, PendingAnswer, Run, SlotRun, answered};
use tokio_uring::buf::BoundedBuf;

use super::ledger::Ledger;
use super::plain::PlainMemory;
use crate::link::error::SessionError;
use crate::link::state::SessionState;
use crate::outside::{EngineHandle, TcpStream, planted};
use crate::region::{Pages, Region};
use crate::wire::record::MAX_RECORD_PAGES;

/// Frames that a stream asks for at once.
const GRANT_SLOTS: u32 = MAX_RECORD_PAGES;
/// Answers to arrivals that may be open; they come at once, so these are only kept to hear of errors.
const MAX_OPEN_ARRIVALS: usize = 2 * MAX_RECORD_PAGES as usize;

const DURING: &str = "receiving pages";

/// A stream's connection and what belongs to the whole session.
pub(crate) struct StreamInput {
    pub(crate) socket: TcpStream,
    pub(crate) session_state: Rc<SessionState>,
    pub(crate) ledger: Rc<RefCell<Ledger>>,
}

/// A record's pages: their runs, and one checksum a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batch<'a> {
    pub(crate) runs: &'a [Run],
    pub(crate) sums: &'a [[u8; 8]],
}

pub(crate) enum Sink {
    Engine(EngineSink),
    Plain(PlainSink),
}

impl Sink {
    pub(crate) async fn pages(&mut self, input: &StreamInput, batch: Batch<'_>) -> Result<(), SessionError> {
        match self {
            Sink::Engine(sink) => sink.pages(input, batch).await,
            Sink::Plain(sink) => sink.pages(input, batch).await,
        }
    }

    pub(crate) async fn zeros(&mut self, input: &StreamInput, runs: &[Run]) -> Result<(), SessionError> {
        for run in runs {
            match self {
                Sink::Engine(sink) => sink.sent(sink.handle.arrive_zero_async(*run)).await?,
                Sink::Plain(sink) => sink.zero(&input.ledger.borrow(), *run)?,
            }
            input.ledger.borrow_mut().arrived_zero(*run);
        }
        Ok(())
    }

    pub(crate) async fn poisoned(&mut self, input: &StreamInput, runs: &[Run]) -> Result<(), SessionError> {
        for run in runs {
            match self {
                Sink::Engine(sink) => sink.sent(sink.handle.arrive_poisoned_async(*run)).await?,
                Sink::Plain(_) => {
                    let text = "the VM has poisoned pages, which memory without an engine cannot keep";
                    return Err(SessionError::Unable(text.to_string()));
                }
            }
            input.ledger.borrow_mut().arrived(*run);
        }
        Ok(())
    }

    /// End of a round on this data stream. Frames that were granted and not used go back now: another stream may need
    /// them to finish the same round, and this stream gets no more pages until every stream has finished it. To keep
    /// them would be a deadlock.
    pub(crate) async fn rest(&mut self) -> Result<(), SessionError> {
        match self {
            Sink::Engine(sink) => sink.rest().await,
            Sink::Plain(_) => Ok(()),
        }
    }
}

pub(crate) struct EngineSink {
    handle: EngineHandle,
    /// Granted and not used yet.
    spare: Option<SlotRun>,
    /// Asked for ahead of need.
    coming: Option<PendingAnswer<SlotRun>>,
    arrivals: VecDeque<PendingAnswer<()>>,
}

impl EngineSink {
    pub(crate) fn new(handle: EngineHandle) -> EngineSink {
        EngineSink { handle, spare: None, coming: None, arrivals: VecDeque::with_capacity(MAX_OPEN_ARRIVALS) }
    }

    async fn pages(&mut self, input: &StreamInput, batch: Batch<'_>) -> Result<(), SessionError> {
        let total = batch.sums.len();
        let mut done = 0;
        let mut runs = batch.runs.iter().copied().collect::<VecDeque<Run>>();
        while done < total {
            let slots = self.grant(input, (total - done) as u32).await?;
            let sums = &batch.sums[done..done + slots.len as usize];
            let part = take_runs(&mut runs, slots.len);
            let frames = self.handle.slot_address(slots);
            // SAFETY: granted frames are ours until they arrive or go back, which happens below, behind the read; the
            // handle keeps the engine's staging area mapped as far as its owner lets it (it stops the engine only after
            // us).
            let region = unsafe { Region::new(frames, slots.bytes(), self.handle.clone()) };
            if let Err(error) = receive_checked(input, region, &part, sums).await {
                self.give_back(slots).await;
                return Err(error);
            }
            self.arrive(input, &part, slots, sums).await?;
            done += slots.len as usize;
        }
        Ok(())
    }

    async fn arrive(
        &mut self,
        input: &StreamInput,
        runs: &[Run],
        slots: SlotRun,
        sums: &[[u8; 8]],
    ) -> Result<(), SessionError> {
        let mut at = 0;
        for run in runs {
            let mut rest = *run;
            while rest.len > 0 {
                let stretch = input.ledger.borrow().stretch(rest);
                let len = stretch.run.len;
                let arrival = ArrivedRun {
                    run: stretch.run,
                    slots: slots.part(at, len),
                    sums: sums[at as usize..][..len as usize]
                        .iter()
                        .map(|sum| u64::from_le_bytes(*sum))
                        .collect(),
                    again: stretch.again,
                };
                self.sent(self.handle.arrive_async(arrival)).await?;
                rest = rest.part(len, rest.len - len);
                at += len;
            }
            input.ledger.borrow_mut().arrived(*run);
        }
        Ok(())
    }

    /// Keeps an answer until it is certainly there, so that its error is not lost.
    async fn sent(&mut self, answer: PendingAnswer<()>) -> Result<(), SessionError> {
        if self.arrivals.len() == MAX_OPEN_ARRIVALS {
            self.await_arrivals(MAX_OPEN_ARRIVALS / 2).await?;
        }
        self.arrivals.push_back(answer);
        Ok(())
    }

    async fn await_arrivals(&mut self, leave: usize) -> Result<(), SessionError> {
        while self.arrivals.len() > leave
            && let Some(answer) = self.arrivals.pop_front()
        {
            answered(answer).await?;
        }
        Ok(())
    }

    /// Up to `want` granted frames. More are asked for ahead, so that a stream seldom waits.
    async fn grant(&mut self, input: &StreamInput, want: u32) -> Result<SlotRun, SessionError> {
        let granted = match self.spare.take() {
            Some(slots) => slots,
            None => {
                let coming = match self.coming.take() {
                    Some(coming) => coming,
                    None => self.handle.grant_frames_async(GRANT_SLOTS),
                };
                // If the session fails meanwhile, the engine takes back what nobody waits for any more.
                let granted = input.session_state.unless_failed(answered(coming)).await;
                let granted = granted.ok_or_else(|| SessionError::Link {
                    during: DURING,
                    source: std::io::ErrorKind::ConnectionAborted.into(),
                })??;
                self.coming = Some(self.handle.grant_frames_async(GRANT_SLOTS));
                granted
            }
        };
        let len = granted.len.min(want);
        self.spare = (granted.len > len).then(|| granted.part(len, granted.len - len));
        Ok(granted.part(0, len))
    }

    async fn give_back(&self, slots: SlotRun) {
        if let Err(error) = answered(self.handle.return_frames_async(slots)).await {
            tracing::warn!(%error, "frames could not be returned");
        }
    }

    async fn rest(&mut self) -> Result<(), SessionError> {
        if let Some(mut coming) = self.coming.take() {
            coming.close();
            // It may have been answered before it was closed.
            if let Ok(Ok(slots)) = coming.try_recv() {
                self.give_back(slots).await;
            }
        }
        if let Some(slots) = self.spare.take() {
            self.give_back(slots).await;
        }
        self.await_arrivals(0).await
    }
}

pub(crate) struct PlainSink {
    memory: PlainMemory,
    /// Scattered pages come here first: one read for all of them.
    bounce: Rc<Pages>,
}

impl PlainSink {
    pub(crate) fn new(memory: PlainMemory) -> PlainSink {
        PlainSink { memory, bounce: Pages::new(MAX_RECORD_PAGES as usize * PAGE_SIZE) }
    }

    async fn pages(&mut self, input: &StreamInput, batch: Batch<'_>) -> Result<(), SessionError> {
        if let [run] = batch.runs {
            let start = self.memory.page_address(run.start);
            // SAFETY: within the mapping (`page_address` checks its start, the decoder its end), which the clone keeps;
            // nobody uses the memory of a VM that does not run yet, and streams own disjoint blocks.
            let region = unsafe { Region::new(start, run.bytes(), self.memory.clone()) };
            receive_checked(input, region, batch.runs, batch.sums).await?;
        } else {
            let bytes = batch.sums.len() * PAGE_SIZE;
            // SAFETY: this stream's own buffer, and the region is gone before the copying below.
            let region = unsafe { self.bounce.region(0, bytes) };
            let region = receive_checked(input, region, batch.runs, batch.sums).await?;
            let mut rest = region.bytes();
            for run in batch.runs {
                let (bytes, behind) = rest.split_at(run.bytes());
                // SAFETY: as above for the destination; the source is as long as the run, and they are different
                // allocations.
                unsafe {
                    self.memory.page_address(run.start).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
                }
                rest = behind;
            }
        }
        batch.runs.iter().for_each(|run| input.ledger.borrow_mut().arrived(*run));
        Ok(())
    }

    fn zero(&self, ledger: &Ledger, run: Run) -> Result<(), SessionError> {
        let mut rest = run;
        while rest.len > 0 {
            let stretch = ledger.stretch(rest);
            if stretch.again {
                self.memory.clear(stretch.run).map_err(SessionError::Memory)?;
            }
            rest = rest.part(stretch.run.len, rest.len - stretch.run.len);
        }
        Ok(())
    }
}

/// Cuts the first `pages` pages off a record's runs.
fn take_runs(runs: &mut VecDeque<Run>, pages: u32) -> Vec<Run> {
    let (mut taken, mut left) = (Vec::with_capacity(runs.len()), pages);
    while left > 0
        && let Some(run) = runs.pop_front()
    {
        let len = run.len.min(left);
        taken.push(run.part(0, len));
        if len < run.len {
            runs.push_front(run.part(len, run.len - len));
        }
        left -= len;
    }
    taken
}

/// Fills the region from the socket, and checks each page as soon as it is there, while it is in the cache.
async fn receive_checked<K: Unpin + 'static>(
    input: &StreamInput,
    mut region: Region<K>,
    runs: &[Run],
    sums: &[[u8; 8]],
) -> Result<Region<K>, SessionError> {
    let mut numbers = runs.iter().flat_map(|run| run.pages());
    let (mut filled, mut checked) = (0, 0);
    while checked < sums.len() {
        let (result, slice) = input.socket.read(region.slice(filled..)).await;
        region = slice.into_inner();
        match result {
            Ok(0) => {
                return Err(SessionError::Link {
                    during: DURING,
                    source: std::io::ErrorKind::UnexpectedEof.into(),
                });
            }
            Ok(count) => {
                input.session_state.received(count);
                filled += count;
            }
            Err(source) => return Err(SessionError::Link { during: DURING, source }),
        }
        let whole = &region.bytes()[checked * PAGE_SIZE..filled / PAGE_SIZE * PAGE_SIZE];
        for bytes in whole.chunks_exact(PAGE_SIZE) {
            let page = numbers.next().expect("as many pages as checksums");
            if page_sum(page, bytes).to_le_bytes() != sums[checked] && !planted!(TrustsTheWire) {
                return Err(SessionError::Peer(format!("the content of {page} does not match its checksum")));
            }
            checked += 1;
        }
    }
    Ok(region)
}
