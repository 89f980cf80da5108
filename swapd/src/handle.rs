//! The requests that other threads may make of a VM's engine: one command queue into its loop, one answer to each
//! command.
//!
//! Every call here sends a request and waits for its answer. Calls that end in `_async` return the answer as a
//! future; the others block the calling thread and must not be used on an async runtime, nor in a notice (on the
//! engine's own thread), nor by a thread that holds a lock which somebody may hold while touching guest memory.

use std::sync::Arc;

use tokio::sync::oneshot;

use crate::cipher::Cipher;
use crate::driver::mailbox::{Command, Mailbox};
use crate::driver::memory::Memory;
use crate::driver::store::Store;
use crate::error::{HostError, StartError};
use crate::origin::Layers;
use crate::reader::StoredReader;
use swapcore::api::{Adopted, ArrivedRun, Copies, DirtyPages, FaultsSeen, Piece, Placed, SubscriberId};
use swapcore::core::{Request, Response};
use swapcore::error::CommandError;
use swapcore::stats::Stats;
use swapcore::units::{PageNo, Run, SlotRun, pages_in};

/// Pages of one run of a request: a run has no more than 32 bits of them.
const TRACK_PAGES: u32 = 1 << 30;

/// A way to ask an engine, from any thread. Cheap to clone.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) store: Arc<Store>,
    pub(crate) cipher: Option<Arc<Cipher>>,
    pub(crate) origin: Option<Arc<Layers>>,
}

fn done(response: Response) {
    assert!(matches!(response, Response::Done), "{response:?} instead of done");
}

macro_rules! picker {
    ($name:ident, $variant:ident, $type:ty) => {
        fn $name(response: Response) -> $type {
            match response {
                Response::$variant(value) => value.into(),
                other => unreachable!("{other:?} instead of {}", stringify!($variant)),
            }
        }
    };
}

picker!(runs, Runs, Vec<Run>);
picker!(dirty, Dirty, DirtyPages);
picker!(subscribed, Subscribed, SubscriberId);
picker!(pieces, Pieces, Vec<Piece>);
picker!(sums, Sums, Vec<u64>);
picker!(copies, Copies, Copies);
picker!(heat, Heat, Vec<u8>);
picker!(frames, Frames, SlotRun);
picker!(placed, Placed, Placed);
picker!(faults, Faults, FaultsSeen);
picker!(count, Count, u64);

fn stats(response: Response) -> Stats {
    match response {
        Response::Stats(stats) => *stats,
        other => unreachable!("{other:?} instead of statistics"),
    }
}

/// The answer to a command that has been sent.
pub type PendingAnswer<T> = oneshot::Receiver<Result<T, CommandError>>;

/// Waits for an answer on an async runtime.
///
/// # Errors
/// The engine's refusal, or [`CommandError::Gone`] if it ended.
pub async fn answered<T>(answer: PendingAnswer<T>) -> Result<T, CommandError> {
    answer.await.unwrap_or(Err(CommandError::Gone))
}

impl EngineHandle {
    fn ask<T: Send + 'static>(
        &self,
        request: Request,
        pick: impl FnOnce(Response) -> T + Send + 'static,
    ) -> PendingAnswer<T> {
        let (sender, answer) = oneshot::channel();
        let reply =
            Box::new(move |response: Result<Response, CommandError>| sender.send(response.map(pick)).is_ok());
        self.mailbox.send(Command::Ask { request, reply });
        answer
    }

    fn call<T: Send + 'static>(&self, request: Request, pick: fn(Response) -> T) -> Result<T, CommandError> {
        self.ask(request, pick).blocking_recv().unwrap_or(Err(CommandError::Gone))
    }

    /// The VM's memory, each region rounded up to whole blocks of 2 MiB.
    pub fn memory_bytes(&self) -> u64 {
        self.memory.guest_len() as u64
    }

    /// Address of guest page `page`. Only pages held and in [`Place::Memory`](swapcore::api::Place::Memory) may be
    /// read through it.
    ///
    /// # Panics
    /// If the page is not within the VM's memory, or in a region that is not attached: such a page is never in memory.
    pub fn page_address(&self, page: PageNo) -> *mut u8 {
        assert!(page.offset() < self.memory_bytes(), "{page} is beyond the VM's memory");
        self.memory.page(page) as *mut u8
    }

    /// Address of the first of `slots`, which must be granted to the caller.
    pub fn slot_address(&self, slots: SlotRun) -> *mut u8 {
        self.memory.slot(slots.start) as *mut u8
    }

    /// A reader of stored pages, for a caller that holds them.
    pub fn stored_reader(&self) -> StoredReader {
        StoredReader { store: self.store.clone(), cipher: self.cipher.clone(), origin: self.origin.clone() }
    }

    /// Bytes that may still be written to the store's file system; none of a device, which has a place for each page,
    /// and of a file system that does not tell. Waits for nothing but that.
    pub fn store_free_bytes(&self) -> Option<u64> {
        self.store.free_bytes()
    }

    /// A snapshot of the engine's figures.
    ///
    /// # Errors
    /// [`CommandError::Gone`] if the engine has ended.
    pub fn stats(&self) -> Result<Stats, CommandError> {
        self.call(Request::Stats, stats)
    }

    /// Changes the RAM budget. Answers when no more frames are held than the new budget allows.
    pub fn set_budget(&self, bytes: u64) -> Result<(), CommandError> {
        self.call(Request::SetBudget(bytes), done)
    }

    /// Discards pages that the guest gave back: they read as zeros from now on, and their frames return to the host.
    /// Waits for no I/O. After the answer there is nothing left for `madvise` to do.
    pub fn discard(&self, run: Run) -> Result<(), CommandError> {
        self.call(Request::Discard(run), done)
    }

    /// Pages out the resident pages of the run, and answers when they are stored.
    pub fn evict(&self, run: Run) -> Result<(), CommandError> {
        self.call(Request::Evict(run), done)
    }

    /// Takes frames from the host for those of the run's pages that are untouched, as long as there are more than are
    /// kept ready: their first touch is no fault.
    pub fn fill_async(&self, run: Run) -> PendingAnswer<()> {
        self.ask(Request::Fill(run), done)
    }

    /// With `on`, begins to record faults or goes on with it, and answers with the next faults that were recorded;
    /// without, ends the recording. There is one recording at a time: threads that share an engine must agree on
    /// which of them records.
    pub fn record_faults(&self, on: bool) -> Result<FaultsSeen, CommandError> {
        self.call(Request::RecordFaults(on), faults)
    }

    // ── memory that its owner maps ────────────────────────────────────────────────────────

    /// Hands over a region of external memory, which its owner has just mapped at `base`. From the answer on it
    /// serves the VM; what was in it is dropped, and forked children do not get it.
    ///
    /// # Errors
    /// It is attached already, `base` is no page's address, overlaps memory in use or is not all mapped, or the host
    /// refuses. Then the memory still is the owner's.
    ///
    /// # Safety
    /// All of the region's length from `base` on must be private, anonymous, readable and writable memory, to which
    /// there is no Rust reference: its content comes and goes. It stays mapped like that until the engine has ended.
    pub unsafe fn attach(&self, region: usize, base: *mut u8) -> Result<(), StartError> {
        let (reply, answer) = oneshot::channel();
        self.mailbox.send(Command::Attach { region, base: base as usize, reply });
        answer.blocking_recv().unwrap_or_else(|_| Err(HostError::Ended(CommandError::Gone).into()))
    }

    /// Whether every region is attached, so that the VM may run or be received.
    pub fn is_attached(&self) -> bool {
        self.memory.is_whole()
    }

    /// The guest's pages that lie wholly within an address range, in ascending runs: what a discard of the range gives
    /// back.
    pub fn runs_in(&self, address: *const u8, bytes: usize) -> Vec<Run> {
        self.memory.runs_in(address as usize, bytes)
    }

    // ── the source's side of a migration ──────────────────────────────────────────────────

    /// A subscription to the pages that the guest writes from the answer on, all of them: until then the guest's first
    /// write to each costs it a fault. Any number may be held at a time.
    ///
    /// # Errors
    /// [`CommandError::Gone`] if the engine has ended.
    pub fn subscribe_dirty(&self) -> Result<DirtySubscription, CommandError> {
        self.subscribe_dirty_async().blocking_recv().unwrap_or(Err(CommandError::Gone))
    }

    /// [`EngineHandle::subscribe_dirty`], not waited for.
    pub fn subscribe_dirty_async(&self) -> PendingAnswer<DirtySubscription> {
        let mut all = Vec::new();
        let (mut from, pages) = (0, pages_in(self.memory_bytes()));
        while from < pages {
            let len = (pages - from).min(u64::from(TRACK_PAGES));
            all.push(Run::new(PageNo(from), len as u32));
            from += len;
        }
        self.subscribe(all)
    }

    /// A subscription that is told of pages that leave the guest, and of no writes before it has them
    /// [tracked](DirtySubscription::track_async).
    ///
    /// # Errors
    /// [`CommandError::Gone`] if the engine has ended.
    pub fn subscribe_dirty_in_parts(&self) -> Result<DirtySubscription, CommandError> {
        self.subscribe(Vec::new()).blocking_recv().unwrap_or(Err(CommandError::Gone))
    }

    fn subscribe(&self, tracked: Vec<Run>) -> PendingAnswer<DirtySubscription> {
        let handle = self.clone();
        let joined = |response| DirtySubscription { handle, id: subscribed(response) };
        self.ask(Request::SubscribeDirty(tracked), joined)
    }

    /// Switches prefetch on or off. Without it only touched pages come in: for measurements of what a guest touches.
    pub fn set_prefetch_async(&self, on: bool) -> PendingAnswer<()> {
        self.ask(Request::Prefetch(on), done)
    }

    /// Holds the run's pages until they are released: none of them is paged out, while the guest's own page-ins go
    /// on. Answers with the place of each. Nothing is paged in for this. A page can be held once at a time.
    pub fn hold_async(&self, run: Run) -> PendingAnswer<Vec<Piece>> {
        self.ask(Request::Hold(run), pieces)
    }

    /// Ends the hold on the run's pages: they may leave the guest again, and the places that `hold` told are out of
    /// date.
    pub fn release_async(&self, run: Run) -> PendingAnswer<()> {
        self.ask(Request::Release(run), done)
    }

    /// Checksums of pages in [`Place::Stored`](swapcore::api::Place::Stored) (valid while they are held).
    pub fn sums_async(&self, run: Run) -> PendingAnswer<Vec<u64>> {
        self.ask(Request::Sums(run), sums)
    }

    /// Copies of those of the pages that are in a frame of staging at this moment, held or not. Writes of them that
    /// are under way are not waited for.
    pub fn staged_async(&self, pages: Vec<PageNo>) -> PendingAnswer<Copies> {
        self.ask(Request::Staged(pages), copies)
    }

    /// The heat of all pages, one byte each: 0 is cold or unknown.
    pub fn heat_async(&self) -> PendingAnswer<Vec<u8>> {
        self.ask(Request::Heat, heat)
    }

    // ── the target's side of a migration ──────────────────────────────────────────────────

    /// Enters the receiving state with the source's heat, one byte a page. The guest must not run.
    pub fn start_receiving_async(&self, heat: Vec<u8>) -> PendingAnswer<()> {
        self.ask(Request::StartReceiving(heat), done)
    }

    /// Replaces the heat by newer heat from the source; it counts for pages that are still to come.
    pub fn update_heat_async(&self, heat: Vec<u8>) -> PendingAnswer<()> {
        self.ask(Request::UpdateHeat(heat), done)
    }

    /// Up to `count` contiguous frames to receive into; answers when at least one is free.
    pub fn grant_frames_async(&self, count: u32) -> PendingAnswer<SlotRun> {
        self.ask(Request::GrantFrames(count), frames)
    }

    /// Gives back granted frames that were not received into. A frame that neither returns nor arrives is lost to
    /// the VM until its engine ends.
    pub fn return_frames_async(&self, slots: SlotRun) -> PendingAnswer<()> {
        self.ask(Request::ReturnFrames(slots), done)
    }

    /// Receives pages with content: each is placed in RAM or in the store, and replaces the former content. Answers
    /// at once; `settle_receiving` waits for the writes.
    pub fn arrive_async(&self, arrival: ArrivedRun) -> PendingAnswer<()> {
        self.ask(Request::Arrive(arrival), done)
    }

    /// Receives pages that are all zeros: they take no frame, and replace the former content.
    pub fn arrive_zero_async(&self, run: Run) -> PendingAnswer<()> {
        self.ask(Request::ArriveZero(run), done)
    }

    /// Receives pages that are lost at the source: a touch of them is a memory error here as well.
    pub fn arrive_poisoned_async(&self, run: Run) -> PendingAnswer<()> {
        self.ask(Request::ArrivePoisoned(run), done)
    }

    /// Answers when every page that has arrived is where it belongs: waits for the store.
    pub fn settle_receiving_async(&self) -> PendingAnswer<()> {
        self.ask(Request::SettleReceiving, done)
    }

    /// Ends the receiving: the VM may run. Answers at once, and the last pages go to the store while it runs. Every
    /// granted frame must have come back.
    pub fn finish_receiving_async(&self) -> PendingAnswer<Placed> {
        self.ask(Request::FinishReceiving, placed)
    }

    /// The pages that have a frame in guest memory now, in ascending runs.
    pub fn resident_map(&self) -> Result<Vec<Run>, CommandError> {
        self.call(Request::ResidentMap, runs)
    }

    /// [`EngineHandle::resident_map`], not waited for.
    pub fn resident_map_async(&self) -> PendingAnswer<Vec<Run>> {
        self.ask(Request::ResidentMap, runs)
    }

    /// The pages that are in the store, or on their way there, in ascending runs.
    pub fn stored_map_async(&self) -> PendingAnswer<Vec<Run>> {
        self.ask(Request::StoredMap, runs)
    }

    /// Writes again what a store refused, if it did, and answers when all of it is written.
    ///
    /// # Errors
    /// [`CommandError::Store`] if it is refused again.
    pub fn retry_store(&self) -> Result<(), CommandError> {
        self.call(Request::RetryStore, done)
    }

    // ── the origin ────────────────────────────────────────────────────────────────────────

    /// The content of untouched pages is at the origin from now on: each is read when it is touched, and goes to the
    /// store when it leaves RAM with another content. Takes well below a millisecond for 65 536 pages.
    ///
    /// # Errors
    /// [`CommandError::NotNow`], if the engine has no origin, a page is not untouched or is in no layer, or the VM is
    /// being received: then none of the pages is adopted. [`CommandError::OutOfRange`].
    ///
    /// # Panics
    /// If there are not as many checksums as pages.
    pub fn adopt(&self, adopted: Adopted) -> Result<(), CommandError> {
        self.adopt_async(adopted).blocking_recv().unwrap_or(Err(CommandError::Gone))
    }

    /// [`EngineHandle::adopt`], not waited for. The pages are adopted before the engine looks at any later request.
    ///
    /// # Panics
    /// As that.
    pub fn adopt_async(&self, adopted: Adopted) -> PendingAnswer<()> {
        let pages = adopted.run.len as usize;
        assert_eq!(adopted.sums.len(), pages, "one checksum a page");
        self.ask(Request::Adopt(adopted), done)
    }

    /// Closes the origin's files, for good: what is removed of them gives its room back to the disk. Nothing can be
    /// adopted afterwards.
    ///
    /// # Errors
    /// [`CommandError::NotNow`], if pages are there still.
    pub fn close_origin_async(&self) -> PendingAnswer<()> {
        let (reply, answer) = oneshot::channel();
        self.mailbox.send(Command::CloseOrigin { reply });
        answer
    }

    /// Untouched pages are lost, as they were where the VM comes from: a touch of them is a memory error here as well.
    ///
    /// # Errors
    /// As [`EngineHandle::adopt`].
    pub fn adopt_poisoned(&self, run: Run) -> Result<(), CommandError> {
        self.call(Request::AdoptPoisoned(run), done)
    }

    /// Brings pages of the run that are at the origin into RAM before anybody touches them, as long as frames are
    /// plentiful: some hundred at a time. Answers with how many have come; 0 says that there are none, or no frames.
    ///
    /// # Errors
    /// [`CommandError::NotNow`], if the engine has no origin. [`CommandError::OutOfRange`].
    pub fn fetch_origin(&self, run: Run) -> Result<u64, CommandError> {
        self.call(Request::FetchOrigin(run), count)
    }

    /// [`EngineHandle::fetch_origin`], not waited for.
    pub fn fetch_origin_async(&self, run: Run) -> PendingAnswer<u64> {
        self.ask(Request::FetchOrigin(run), count)
    }

    /// Moves the content of up to so many pages from the origin to the store, while the VM runs. Answers when it is
    /// written, with the number of pages that are at the origin still: at 0 the VM needs its origin no more. A number
    /// that has not fallen says that pages cannot move at this moment: they are in motion, or could not be read.
    ///
    /// # Errors
    /// [`CommandError::NotNow`], if the engine has no origin; [`CommandError::Store`], if the store takes nothing.
    pub fn take_home(&self, pages: u32) -> Result<u64, CommandError> {
        self.call(Request::TakeHome(pages), count)
    }

    /// [`EngineHandle::take_home`], not waited for.
    pub fn take_home_async(&self, pages: u32) -> PendingAnswer<u64> {
        self.ask(Request::TakeHome(pages), count)
    }

    /// [`EngineHandle::hold_async`], waited for.
    ///
    /// # Errors
    /// [`CommandError::OutOfRange`], or [`CommandError::Gone`] if the engine has ended.
    pub fn hold(&self, run: Run) -> Result<Vec<Piece>, CommandError> {
        self.call(Request::Hold(run), pieces)
    }

    /// [`EngineHandle::release_async`], waited for.
    ///
    /// # Errors
    /// [`CommandError::OutOfRange`], or [`CommandError::Gone`] if the engine has ended.
    pub fn release(&self, run: Run) -> Result<(), CommandError> {
        self.call(Request::Release(run), done)
    }
}

/// A subscription to the pages that the guest writes, until it is dropped. Each subscription collects for itself: no
/// other one misses a page because of it.
#[derive(Debug)]
pub struct DirtySubscription {
    handle: EngineHandle,
    id: SubscriberId,
}

impl DirtySubscription {
    /// Has writes noted, from the answer on, to each 2 MiB block of which these runs have a page. Blocks that are
    /// tracked already stay so, and lose no mark.
    pub fn track_async(&self, runs: Vec<Run>) -> PendingAnswer<()> {
        self.handle.ask(Request::TrackDirty(self.id, runs), done)
    }

    /// Pages that may have been written since they were tracked or since the last call.
    /// Never misses one; may name one that did not change (a page that was paged out or in meanwhile).
    ///
    /// # Errors
    /// [`CommandError::Gone`] if the engine has ended.
    pub fn collect_async(&self) -> PendingAnswer<DirtyPages> {
        self.handle.ask(Request::CollectDirty(self.id), dirty)
    }

    /// [`DirtySubscription::collect_async`], waited for, as ascending runs.
    ///
    /// # Errors
    /// [`CommandError::Gone`] if the engine has ended.
    pub fn collect(&self) -> Result<Vec<Run>, CommandError> {
        self.handle.call(Request::CollectDirty(self.id), dirty).map(DirtyPages::into_runs)
    }
}

impl Drop for DirtySubscription {
    fn drop(&mut self) {
        drop(self.handle.ask(Request::UnsubscribeDirty(self.id), done));
    }
}
