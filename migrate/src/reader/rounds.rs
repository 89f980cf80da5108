//! The reader itself: its survey, its rounds, and the scans meanwhile.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use swapd::units::runs_of;
use swapd::{BLOCK_PAGES, PageNo, Piece, Place, Run, answered};

use super::dirty_rate::DirtyRate;
use super::error::ReadError;
use super::filler;
use super::hold::Hold;
use super::order::{self, BlockFacts};
use super::outside::{DirtySubscription, EngineHandle, Instant, JoinSet, PORTION_PAGES, sleep};
use super::shared::{Shared, pages_of};
use super::sink::{Closed, Found, MAX_RUNS, Sink};
use super::watch::Watch;
use crate::limits::{MOVING_RETRIES, MOVING_RETRY, SCAN_EVERY};

/// Fillers a queue. Each has at most one buffer: a sink needs more than so many, or nothing is filled while it works.
pub const FILLERS: usize = 2;
/// Pages looked at in one step of the survey: 256 MiB.
const SURVEY_PAGES: u32 = 64 << 10;
/// A VM is read in about so many portions, each of [`PORTION_PAGES`] at least: between two of them devices are drained,
/// and more of what the guest writes can be told from the rest.
const PORTIONS: u64 = 32;

const _: () = assert!(SURVEY_PAGES.is_multiple_of(BLOCK_PAGES));

/// Reads a VM's memory into a sink. [`close`](Self::close) it, whatever happens.
///
/// Its futures may be dropped half-way; then nothing but `close` may follow.
#[allow(missing_debug_implementations, reason = "the sink need not have one")]
pub struct Reader<S> {
    shared: Rc<Shared<S>>,
    dirty: DirtySubscription,
    fillers: JoinSet<Result<(), ReadError>>,
    /// As the engine told it at the start.
    engine_heat: Vec<u8>,
    survey: Survey,
    /// What is known of blocks that are not tracked yet.
    watch: Watch,
    /// Where the next look is. None: one has ended.
    look_from: Option<u64>,
    /// Of the last round: how often it may still begin again, for pages that were just moving.
    tries_left: Option<u32>,
    dirty_rate: DirtyRate,
    last_scan: Instant,
    scan_took: Duration,
}

/// How far the survey has come, and what it has found.
struct Survey {
    /// Where it still has to look.
    rest: VecDeque<Run>,
    /// By queue, not given to the sink yet.
    zeros: Vec<Vec<Run>>,
    /// By block: some of it is in the store.
    stored: Vec<bool>,
}

/// What a scan has found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Scanned {
    /// Pages that a scan saw written, and had never seen written before.
    pub new: u64,
}

impl<S: Sink> Reader<S> {
    /// A reader to which all pages are still to be read. `dirty` has been told of every write since before the call.
    /// Must be called on the runtime.
    ///
    /// # Errors
    /// The store cannot be opened.
    pub fn new(handle: &EngineHandle, dirty: DirtySubscription, sink: S) -> Result<Reader<S>, ReadError> {
        Reader::start(handle, dirty, sink, true)
    }

    /// The same of a subscription that has nothing tracked yet: memory is read in [portions](Self::next_portion).
    ///
    /// # Errors
    /// The store cannot be opened.
    pub fn in_portions(
        handle: &EngineHandle,
        dirty: DirtySubscription,
        sink: S,
    ) -> Result<Reader<S>, ReadError> {
        Reader::start(handle, dirty, sink, false)
    }

    fn start(
        handle: &EngineHandle,
        dirty: DirtySubscription,
        sink: S,
        tracked: bool,
    ) -> Result<Reader<S>, ReadError> {
        let pages = swapd::units::pages_in(handle.memory_bytes());
        let shared = Shared::new(handle, sink, tracked)?;
        let all = Run::new(PageNo(0), if tracked { pages as u32 } else { 0 });
        let blocks = shared.tracker.borrow().blocks();
        let survey = Survey {
            rest: parts(all).collect(),
            zeros: vec![Vec::new(); shared.sink.queues() as usize],
            stored: vec![false; blocks as usize],
        };
        Ok(Reader {
            shared: Rc::new(shared),
            dirty,
            fillers: JoinSet::new(),
            engine_heat: vec![0; pages as usize],
            survey,
            watch: Watch::new(blocks),
            look_from: None,
            tries_left: None,
            dirty_rate: DirtyRate::default(),
            last_scan: Instant::now(),
            scan_took: Duration::ZERO,
        })
    }

    /// Where the pages go.
    pub fn sink(&self) -> &S {
        &self.shared.sink
    }

    /// The VM's memory.
    pub fn memory_bytes(&self) -> u64 {
        self.shared.handle.memory_bytes()
    }

    /// Asks the engine how hot each page is. The first round reads cold blocks first; without this, all are cold.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn ask_heat(&mut self) -> Result<&[u8], ReadError> {
        self.engine_heat = answered(self.shared.handle.heat_async()).await?;
        Ok(&self.engine_heat)
    }

    /// The heat of each page, by what the engine has told and by what the scans have seen written since.
    pub fn known_heat(&self) -> Vec<u8> {
        let mut heat = self.shared.tracker.borrow().heat(&self.engine_heat);
        for (block, pages) in heat.chunks_mut(BLOCK_PAGES as usize).enumerate() {
            let changes = self.watch.changes(block as u32);
            pages.iter_mut().for_each(|heat| *heat = order::raise_for_changes(*heat, changes));
        }
        heat
    }

    /// Looks at the next 256 MiB of what is not tracked yet: where its pages are, and whether a few of them have
    /// changed since the last look. True: this look has not ended. It costs the guest nothing.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn look(&mut self) -> Result<bool, ReadError> {
        let pages = swapd::units::pages_in(self.memory_bytes());
        let part = {
            let tracker = self.shared.tracker.borrow();
            let rest = (self.look_from.unwrap_or(0)..pages).step_by(SURVEY_PAGES as usize);
            let mut parts = rest.map(|from| part_at(from, pages));
            parts.find(|part| tracker.unread.count_run(*part) > 0)
        };
        let Some(part) = part else {
            self.look_from = None;
            return Ok(false);
        };
        let (hold, pieces) = Hold::take(&self.shared.handle, part).await?;
        self.watch.look(part, &pieces, &self.shared.handle);
        drop(hold);
        self.look_from = Some(part.end().0).filter(|end| *end < pages);
        Ok(self.look_from.is_some())
    }

    /// Blocks that looks have seen to change.
    pub fn blocks_changing(&self) -> usize {
        self.watch.changing()
    }

    /// What is to be tracked and read next, by what the looks have found: the coldest blocks of which that has not been
    /// done. None: it has, for all of memory. A VM that writes nothing is one portion.
    ///
    /// Its owner has the portion [tracked](Self::track), drains devices, [opens](Self::open) it, and reads it as a
    /// [first round](Self::begin_first_round), with a [survey](Self::survey) before.
    pub fn next_portion(&self) -> Option<Vec<Run>> {
        let tracker = self.shared.tracker.borrow();
        let facts: Vec<_> = tracker.unread_blocks().map(|block| self.facts(block)).collect();
        let pages = match self.watch.changing() {
            0 => u64::MAX,
            _ => (self.watch.touched_pages() / PORTIONS).max(PORTION_PAGES),
        };
        let blocks = order::portion(facts, pages);
        let pages = blocks.into_iter().flat_map(|block| pages_of(block).map(|page| PageNo(page as u64)));
        Some(runs_of(pages, u32::MAX).collect()).filter(|runs: &Vec<Run>| !runs.is_empty())
    }

    fn facts(&self, block: u32) -> BlockFacts {
        BlockFacts {
            block,
            stored: self.watch.is_stored(block) || self.survey.stored[block as usize],
            heat: order::mean_heat(&self.engine_heat[pages_of(block)]),
            changes: self.watch.changes(block),
            touched: self.watch.touched(block),
        }
    }

    /// Has writes to a portion noted. I/O of devices that was started before may still write to it, without a trace: it
    /// must have ended before the portion is read.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn track(&mut self, portion: Vec<Run>) -> Result<(), ReadError> {
        Ok(answered(self.dirty.track_async(portion)).await?)
    }

    /// The portion, which is tracked, is to be surveyed and read.
    ///
    /// # Panics
    /// If the one before has not been read to its end, or this one has been opened before.
    pub fn open(&mut self, portion: &[Run]) {
        assert_eq!(self.pages_in_round(), 0, "a portion begins before the last has ended");
        let mut tracker = self.shared.tracker.borrow_mut();
        portion.iter().for_each(|run| tracker.tracked(*run));
        self.survey.rest = portion.iter().copied().flat_map(parts).collect();
    }

    fn pages_in_round(&self) -> u64 {
        self.shared.tracker.borrow().todo.count()
    }

    /// Looks where the next 256 MiB are, and gives the sink those pages that were never touched. True: there is more to
    /// look at. Done before the first round.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn survey(&mut self) -> Result<bool, ReadError> {
        let Some(part) = self.survey.rest.pop_front() else { return Ok(false) };
        let (hold, pieces) = Hold::take(&self.shared.handle, part).await?;
        drop(hold);
        pieces.into_iter().for_each(|piece| self.note(piece));
        let more = !self.survey.rest.is_empty();
        for queue in 0..self.shared.sink.queues() {
            let zeros = &mut self.survey.zeros[queue as usize];
            while zeros.len() >= MAX_RUNS as usize || (!more && !zeros.is_empty()) {
                let rest = zeros.split_off(zeros.len().min(MAX_RUNS as usize));
                let found = Found::Zeros(std::mem::replace(zeros, rest));
                self.shared.sink.take(queue, found).await.map_err(|Closed| ReadError::Closed)?;
            }
        }
        Ok(more)
    }

    fn note(&mut self, piece: Piece) {
        for run in by_blocks(piece.run) {
            let block = run.start.block();
            match piece.place {
                Place::Zero => {
                    self.shared.tracker.borrow_mut().sent_untouched(run);
                    let queue = self.shared.sink.queue_of(block as u32);
                    self.survey.zeros[queue as usize].push(run);
                }
                Place::Stored | Place::Staged => self.survey.stored[block] = true,
                Place::Memory | Place::Moving | Place::Poisoned => {}
            }
        }
    }

    /// Begins the first round, or that of a portion: all pages but those that the survey has found untouched.
    ///
    /// # Panics
    /// If the survey is not complete.
    pub fn begin_first_round(&mut self) {
        assert!(self.survey.rest.is_empty(), "the first round begins before the survey has ended");
        let facts = self.shared.open_blocks().into_iter().map(|block| self.facts(block));
        self.shared.assign(order::first_round(facts.collect()));
        self.start_fillers();
    }

    /// Begins a later round: the pages that were found dirty before it.
    ///
    /// # Panics
    /// If the round before has not ended.
    pub fn begin_round(&mut self) {
        self.shared.tracker.borrow_mut().begin_round();
        self.shared.assign(self.shared.open_blocks());
        self.start_fillers();
    }

    /// Begins the last round, while the VM stands still: it does not end before the sink has been given all.
    ///
    /// # Panics
    /// If the round before has not ended.
    pub fn begin_last_round(&mut self) {
        self.tries_left = Some(MOVING_RETRIES);
        self.begin_round();
    }

    fn start_fillers(&mut self) {
        for queue in 0..self.shared.sink.queues() {
            for _ in 0..FILLERS {
                self.fillers.spawn_local(filler::run(self.shared.clone(), queue));
            }
        }
    }

    /// Waits until the round has come further. False: the sink has been given all pages of the round.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn step(&mut self) -> Result<bool, ReadError> {
        match self.fillers.join_next().await {
            Some(Ok(ended)) => return ended.map(|()| true),
            Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
            None => {}
        }
        // What is left at the end of the last round are pages that the engine was just moving.
        let Some(tries_left) = self.tries_left.filter(|_| self.pages_for_next() > 0) else {
            return Ok(false);
        };
        if tries_left <= 1 {
            return Err(ReadError::Restless);
        }
        sleep(MOVING_RETRY).await;
        self.tries_left = Some(tries_left - 1);
        self.begin_round();
        Ok(true)
    }

    /// Asks the engine for the pages that were written since the last scan. They are read in the next round.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn scan(&mut self) -> Result<Scanned, ReadError> {
        let began = Instant::now();
        let found = answered(self.dirty.collect_async()).await?;
        let mut tracker = self.shared.tracker.borrow_mut();
        found.departed.iter().for_each(|run| tracker.departed(*run));
        let new = found.seen.iter().map(|run| tracker.found_dirty(*run)).sum();
        drop(tracker);
        self.scan_took = began.elapsed();
        let pages = found.seen.iter().chain(&found.departed).map(|run| u64::from(run.len)).sum();
        self.dirty_rate.scan(pages, self.last_scan.elapsed());
        self.last_scan = Instant::now();
        Ok(Scanned { new })
    }

    /// The last scan is so long ago that another is due. While a round goes on, scans show what the guest writes, and
    /// keep pages from being read that would have to be read again.
    pub fn scan_is_due(&self) -> bool {
        self.last_scan.elapsed() >= SCAN_EVERY
    }

    /// How long the last scan took.
    pub fn scan_took(&self) -> Duration {
        self.scan_took
    }

    /// Pages written a second, by the last few scans; None before the first.
    pub fn dirty_per_s(&self) -> Option<f64> {
        self.dirty_rate.per_s()
    }

    /// The VM is slowed down, or runs faster again: the rate of before says nothing any more.
    pub fn forget_dirty_rate(&mut self) {
        self.dirty_rate.forget();
    }

    /// Pages that are still to be read in this round: of all portions, if there are several.
    pub fn pages_left(&self) -> u64 {
        let tracker = self.shared.tracker.borrow();
        tracker.todo.count() + tracker.unread.count()
    }

    /// Pages that are to be read in the next round, as far as scans have found them.
    pub fn pages_for_next(&self) -> u64 {
        self.shared.tracker.borrow().next.count()
    }

    /// Pages with content that the sink has been given so far.
    pub fn pages_given(&self) -> u64 {
        self.shared.pages_given.get()
    }

    /// Pages of those 2 MiB blocks in which a scan has seen any page written.
    pub fn pages_around_dirty(&self) -> u64 {
        self.shared.tracker.borrow().pages_around_dirty()
    }

    /// Ends the reading, waits until nothing is in flight and no page is held, and gives the sink back. If fillers may
    /// be waiting for the sink, it must have been closed first: they end when it says so.
    pub async fn close(mut self) -> S {
        while let Some(done) = self.fillers.join_next().await {
            // Whatever they say comes too late.
            if let Err(error) = done {
                std::panic::resume_unwind(error.into_panic());
            }
        }
        let Ok(shared) = Rc::try_unwrap(self.shared) else {
            unreachable!("only fillers share it, and they have ended")
        };
        shared.sink
    }
}

/// The parts of a run that are looked at in one step each.
fn parts(run: Run) -> impl Iterator<Item = Run> {
    (run.start.0..run.end().0).step_by(SURVEY_PAGES as usize).map(move |from| part_at(from, run.end().0))
}

fn part_at(from: u64, end: u64) -> Run {
    Run::new(PageNo(from), u64::from(SURVEY_PAGES).min(end - from) as u32)
}

/// Cuts a run at the borders of 2 MiB blocks.
fn by_blocks(run: Run) -> impl Iterator<Item = Run> {
    let mut rest = run;
    std::iter::from_fn(move || {
        (rest.len > 0).then(|| {
            let to_border = BLOCK_PAGES - (rest.start.0 % u64::from(BLOCK_PAGES)) as u32;
            let part = rest.part(0, rest.len.min(to_border));
            rest = rest.part(part.len, rest.len - part.len);
            part
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_at_blocks() {
        let cut: Vec<_> = by_blocks(Run::new(PageNo(510), 1000)).map(|run| (run.start.0, run.len)).collect();
        assert_eq!(cut, [(510, 2), (512, 512), (1024, 486)]);
    }
}
