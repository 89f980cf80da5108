//! The engine's core: events in, actions out. No I/O, no clock, no lock; the same events give the same actions.
//!
//! One file a concern: `fault` (a vCPU waits), `pageout` (frames ahead of need), `io` (the store answers),
//! `tiers` (which of them answer), `latch` (one that takes no writes), `space` (room that comes back there), `pins`
//! (pages that something holds), `frames` (where frames come from), `source` and `receive` (the two ends of a
//! migration), `origin` (pages that are where the VM was before), `walk` (requests that look at all of memory), `huge`
//! (huge pages put together). Each is an `impl Core`.
//! What a concern keeps between events is a type of its own in `state`, which knows nothing of the core.
//!
//! Invariants, checked by the simulation after every step:
//! - frames in the guest + frames in staging = `taken`, and `taken` ≤ budget unless the budget was just lowered;
//! - a page's newest content is in exactly one of: its frame in the guest, its slot in staging, the store;
//! - every waiting vCPU's page is arriving, being written, or in the queue for a frame.

mod checks;
mod event;
mod fault;
mod figures;
mod frames;
mod huge;
mod io;
mod latch;
mod origin;
#[cfg(test)]
mod origin_tests;
mod pageout;
mod pins;
mod receive;
mod source;
mod space;
mod state;
#[cfg(test)]
mod tests;
mod tiers;
#[cfg(test)]
mod tiers_tests;
mod walk;
#[cfg(test)]
mod walk_tests;

use std::collections::{BTreeSet, VecDeque};

pub use crate::error::{IoError, IoErrorKind};
pub use event::{Action, DropResult, Event, IoId, PageOut, Request, Response, TICK_MS, Ticket};
pub use state::page_map::{PageHasher, PageMap};
pub use state::walks::WalkStep;

use crate::error::CommandError;
use crate::policy::clock::Clock;
use crate::policy::prefetch::{Plan, Prefetcher, WINDOW_MAX};
use crate::policy::probation::Probation;
use crate::policy::sampler::Sampler;
use crate::staging::Use;
use crate::stats::TierState;
use crate::table::{PageState, PageTable};
use crate::units::{BLOCK_PAGES, PageNo, Run, Slot, SlotRun, TIERS_MAX, TierId};
use state::dirty::DirtyTracking;
use state::evictions::Evictions;
use state::frames::Frames;
use state::ios::Ios;
use state::origin::Origin;
use state::pass::Pass;
use state::pins::Pins;
use state::receiving::Receiving;
use state::shrinking::Shrinking;
use state::space::Space;
use state::tiers::{BadReads, Tiers};
use state::waiters::Waiters;
use state::walks::Walks;

/// Pages in one read or write of the store at most: 256 KiB.
pub const IO_PAGES_MAX: u32 = 64;
/// Pages under way to the store at most: 8 MiB.
const LEAVING_MAX: u32 = 2048;
/// Smallest budget, in frames: 16 MiB.
pub const BUDGET_MIN: u64 = 4096;
/// Ticks in an epoch: heat halves every ten seconds, so that a sample outlives a pass of the sampler over some GiB.
const EPOCH_TICKS: u64 = 100;
/// Ticks between two looks while there is nothing to do.
pub const IDLE_TICKS: u64 = 10;
const SLOTS_MIN: u64 = 2048;
const SLOTS_MAX: u64 = 131_072;
/// One staging slot for so many pages of memory.
const SLOT_SHARE: u64 = 16;

const _: () = assert!(SLOTS_MIN >= 4 * IO_PAGES_MAX as u64, "staging must hold several batches");
const _: () = assert!(BUDGET_MIN >= SLOTS_MIN, "the smallest budget must cover a full staging area");

/// Blocks of slots for samples of huge pages: 4 GiB can be out at once, which takes some 20 ms to put back.
const BLOCKS_MAX: u64 = 2048;
/// As many where address space that counts as locked is short.
const BLOCKS_FEW: u64 = 16;

/// Staging slots for a memory of so many pages: whole blocks of them.
pub fn staging_slots(pages: u64) -> u32 {
    ((pages / SLOT_SHARE).clamp(SLOTS_MIN, SLOTS_MAX) as u32).next_multiple_of(BLOCK_PAGES)
}

/// Blocks of slots beside them, for huge pages; `few`: no more than it takes to see anything.
pub fn staging_blocks(pages: u64, few: bool) -> u32 {
    (pages / u64::from(BLOCK_PAGES)).min(if few { BLOCKS_FEW } else { BLOCKS_MAX }) as u32
}

/// Settings that do not change.
#[derive(Clone, Copy, Debug)]
pub struct CoreConfig {
    /// The VM's memory, in pages. The last block need not be whole.
    pub pages: u64,
    /// The RAM budget at the start, in frames.
    pub budget_frames: u64,
    /// No budget may be set below this many frames.
    pub budget_min: u64,
    /// Size of the staging area.
    pub slots: u32,
    /// Blocks of slots behind it, for huge pages.
    pub blocks: u32,
    /// Whether resident pages are sampled while there is no memory pressure, to see which of them are in use.
    pub sampling: bool,
    /// How much of memory one step of a walk looks at; a fault that comes meanwhile waits for its end.
    pub walk: WalkStep,
}

/// One VM's engine, without hands.
#[derive(Debug)]
pub struct Core {
    config: CoreConfig,
    table: PageTable,
    /// Checksum of what the store has, valid where the page's `Stored` flag is set, or a write is in flight.
    sums: Vec<u64>,
    frames: Frames,
    clock: Clock,
    probation: Probation,
    prefetcher: Prefetcher,
    sampler: Sampler,
    collapse: Pass,
    ios: Ios,
    waiters: Waiters,
    dirty: DirtyTracking,
    walks: Walks,
    origin: Origin,
    receiving: Option<Receiving>,
    tiers: Tiers,
    space: Space,
    pins: Pins,
    /// Pages of which a reading failed, until one succeeds or the page is lost.
    bad_reads: PageMap<BadReads>,
    /// Poisoned pages.
    lost: BTreeSet<PageNo>,
    shrinking: Shrinking,
    evictions: Evictions,
    tick: u64,
    counts: Counts,
    actions: VecDeque<Action>,
    scratch: Scratch,
}

/// Lists that are empty between events. They are kept so that no event allocates.
#[derive(Debug)]
struct Scratch {
    runs: Vec<Run>,
    plans: Vec<Plan>,
    pages: Vec<(PageNo, Slot)>,
}

/// What the core counts beside the page table's own counts.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    zero: u64,
    rescue: u64,
    store: u64,
    prefetched: u64,
    prefetch_used: u64,
    prefetch_wasted: u64,
    pages_read: u64,
    victims: u64,
    written: u64,
    dropped: u64,
    pinned: u64,
    sampled: u64,
    samples_touched: u64,
    read_errors: u64,
    write_errors: u64,
    mismatches: u64,
}

impl Core {
    /// # Panics
    /// If the budget is below the minimum: the caller checks what users give.
    pub fn new(config: CoreConfig) -> Self {
        assert!(config.budget_frames >= config.budget_min, "budget below the minimum");
        Core {
            config,
            table: PageTable::new(config.pages),
            sums: vec![0; config.pages as usize],
            frames: Frames::new(config.budget_frames, config.pages, config.slots, config.blocks),
            clock: Clock::default(),
            probation: Probation::new(config.pages),
            prefetcher: Prefetcher::new(config.pages),
            sampler: Sampler::default(),
            collapse: Pass::default(),
            ios: Ios::default(),
            waiters: Waiters::default(),
            dirty: DirtyTracking::default(),
            walks: Walks::default(),
            origin: Origin::default(),
            receiving: None,
            tiers: Tiers::new(1),
            space: Space::new(config.pages),
            pins: Pins::default(),
            bad_reads: PageMap::default(),
            lost: BTreeSet::new(),
            shrinking: Shrinking::default(),
            evictions: Evictions::default(),
            tick: 0,
            counts: Counts::default(),
            actions: VecDeque::with_capacity(256),
            scratch: Scratch {
                runs: Vec::with_capacity(64),
                plans: Vec::with_capacity(8),
                pages: Vec::with_capacity(WINDOW_MAX as usize),
            },
        }
    }

    /// The same where some blocks have fewer pages of memory: see [`PageTable::with_short_blocks`].
    #[must_use]
    pub fn with_short_blocks(mut self, short: Vec<Run>) -> Self {
        self.table = self.table.with_short_blocks(short);
        self.frames.set_memory(self.table.memory_pages());
        self
    }

    /// The same with so many tiers beside the origin: at which of them each block of pages is at home.
    #[must_use]
    pub fn with_homes(mut self, tiers: u8, home: impl Fn(usize) -> TierId) -> Self {
        assert!((1..TIERS_MAX).contains(&usize::from(tiers)), "{tiers} tiers");
        self.tiers.set_count(usize::from(tiers));
        for block in 0..self.table.pages().div_ceil(u64::from(BLOCK_PAGES)) as usize {
            let tier = home(block);
            assert!(tier.0 < tiers, "{tier} is none of {tiers}");
            self.table.set_home(block, tier);
        }
        self
    }

    /// The same where pages may be at an origin: [`Request::Adopt`] says which are. Without, none can be.
    #[must_use]
    pub fn with_origin(mut self) -> Self {
        self.tiers.add_origin();
        self
    }

    /// What the tier does at present.
    pub fn tier_state(&self, tier: TierId) -> TierState {
        self.tiers.state(tier)
    }

    /// The next thing to do. Call after every event until it says none.
    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Does what the event asks for, and serves whoever waits for a frame.
    pub fn handle(&mut self, event: Event<'_>) {
        let may_evict = self.apply(event);
        self.balance(may_evict);
    }

    /// Handles faults that have been read together. Whoever waits for a frame is served once behind all of them, not
    /// behind each.
    pub fn handle_faults(&mut self, pages: impl IntoIterator<Item = PageNo>) {
        let mut may_evict = false;
        for page in pages {
            may_evict |= self.apply(Event::Fault(page));
        }
        self.balance(may_evict);
    }

    /// What the event itself brings about. Says whether new victims may be chosen behind it: only after a tick, a
    /// finished write, or a request. After `MovedOut`, a page that was just refused as pinned would be chosen again at
    /// once, for ever. After `MovedIn`, the page could leave before the vCPU that waited for it has run. After `Fault`,
    /// the next fault of the same batch may be for the very page that was chosen.
    pub(crate) fn apply(&mut self, event: Event<'_>) -> bool {
        let may_evict = matches!(event, Event::Tick { .. } | Event::WriteDone { .. } | Event::Request { .. })
            || (matches!(event, Event::Fault(_)) && mutant!(EvictsBetweenFaults));
        match event {
            Event::Fault(page) => self.fault(page),
            Event::Tick { ticks } => self.on_tick(ticks),
            Event::ReadDone { io, result } => self.read_done(io, result),
            Event::WriteDone { io, result } => self.write_done(io, result),
            Event::DropDone { io, result, took_us } => self.drop_done(io, result, took_us),
            Event::MovedIn { run, slots, moved } => self.moved_in(run, slots, moved),
            Event::CopiedIn { page, slot, copied } => self.copied_in(page, slot, copied),
            Event::MovedOut { run, slots, pages } => self.moved_out(run, slots, pages),
            Event::Filled { run, huge } => self.filled(run, huge),
            Event::Collapsed { block, huge } => self.collapsed(block, huge),
            Event::Scanned { run, dirty } => self.scanned(run, dirty),
            Event::Step => self.step(),
            Event::Request { ticket, request } => self.request(ticket, request),
        }
        may_evict
    }

    /// Ticks until there is something to do, if nothing else happens: an idle VM is to cost nothing. May shrink at any
    /// event.
    pub fn ticks_to_sleep(&self) -> u64 {
        // What met pinned pages is tried again; samples give way to victims.
        let waits = self.frames.any_refused()
            || self.waiters.any_deferred()
            || !self.bad_reads.is_empty()
            || self.ios.unwritten_count() > 0
            || self.evictions.any()
            || self.shrinking.is_awaited()
            || self.space.waits(self.tick)
            || self.room_may_come()
            || self.origin.is_busy()
            || self.sampler.gives_way(self.counts.victims);
        if waits || self.is_collapsing() {
            1
        } else if self.may_sample() && self.waiters.pages().len() == 0 {
            self.sampler.interval()
        } else {
            IDLE_TICKS.min(self.ticks_to_retry())
        }
    }

    /// So many ticks have passed in which nothing happened. To be called before what ends that is handed in; a tick
    /// follows behind it.
    pub fn slept(&mut self, ticks: u64) {
        let epoch = self.tick / EPOCH_TICKS;
        self.tick += ticks;
        if self.receiving.is_none() {
            // What the source has told holds until it tells something else.
            (epoch..self.tick / EPOCH_TICKS).for_each(|_| self.table.next_epoch());
        }
    }

    fn on_tick(&mut self, ticks: u64) {
        self.slept(ticks);
        for (run, slots) in self.frames.take_refused() {
            let again = self.frames.still_bound(run, slots);
            self.move_in(again);
        }
        if !self.bad_reads.is_empty() {
            self.reread();
        }
        self.copy_what_is_awaited();
        self.tick_latch();
        self.tick_tiers(ticks);
        self.tick_pins(ticks);
        self.collapse();
        self.sample();
        self.write_all_behind();
        self.sow_tiers();
        self.tick_space(ticks);
        self.origin.wake();
    }

    fn request(&mut self, ticket: Ticket, request: Request) {
        let answer = match request {
            Request::Stats => Some(Ok(Response::Stats(Box::new(self.stats())))),
            Request::SetBudget(bytes) => self.set_budget(ticket, bytes),
            Request::Discard(run) => self.discard_on_request(ticket, run),
            Request::Evict(run) => self.evict_on_request(ticket, run),
            Request::Fill(run) => Some(self.checked_memory(run).map(|()| self.fill_ahead(run))),
            Request::SubscribeDirty(runs) => match self.checked_runs(&runs) {
                Ok(()) => return self.subscribe_dirty(ticket, runs),
                Err(error) => Some(Err(error)),
            },
            Request::TrackDirty(id, runs) => match self.checked_runs(&runs) {
                Ok(()) => return self.track_dirty(ticket, id, runs),
                Err(error) => Some(Err(error)),
            },
            Request::UnsubscribeDirty(id) => Some(Ok(self.unsubscribe_dirty(id))),
            Request::Prefetch(on) => Some(Ok(self.set_prefetch(on))),
            Request::CollectDirty(id) => return self.collect_dirty(ticket, id),
            Request::Hold(run) => Some(self.checked(run).map(|()| self.hold(run))),
            Request::Release(run) => Some(self.checked(run).map(|()| self.release(run))),
            Request::Sums(run) => {
                Some(self.checked(run).map(|()| Response::Sums(self.sums[run.indices()].to_vec())))
            }
            Request::Staged(pages) => self.staged(ticket, pages),
            Request::Heat => return self.heat_map(ticket),
            Request::ResidentMap => return self.map_of(ticket, &[PageState::Resident]),
            Request::StoredMap => {
                return self.map_of(ticket, &[PageState::Leaving, PageState::Standby, PageState::Stored]);
            }
            Request::RetryStore => self.retry_on_request(ticket),
            Request::StartReceiving(heat) => self.start_receiving(ticket, heat),
            Request::UpdateHeat(heat) => self.update_heat(ticket, heat),
            Request::GrantFrames(count) => self.grant(ticket, count),
            Request::ReturnFrames(slots) => Some(Ok(self.return_frames(slots))),
            Request::Arrive(arrival) => {
                Some(self.checked_memory(arrival.run).and_then(|()| self.arrive(&arrival)))
            }
            Request::ArriveZero(run) => Some(self.checked(run).and_then(|()| self.arrive_zero(run))),
            Request::ArrivePoisoned(run) => {
                Some(self.checked_memory(run).and_then(|()| self.arrive_poisoned(run)))
            }
            Request::SettleReceiving => self.settle_receiving(ticket),
            Request::FinishReceiving => Some(self.finish_receiving()),
            Request::Adopt(adopted) => Some(self.adopt(&adopted)),
            Request::AdoptPoisoned(run) => Some(self.adopt_poisoned(run)),
            Request::FetchOrigin(run) => self.fetch_origin(ticket, run),
            Request::TakeHome(pages) => self.take_home(ticket, pages),
            Request::RecordFaults(_) => Some(Err(CommandError::NotNow("there is no clock here"))),
        };
        if let Some(answer) = answer {
            self.actions.push_back(Action::Answer { ticket, answer });
        }
    }

    fn checked(&self, run: Run) -> Result<(), CommandError> {
        match run.start.0.checked_add(u64::from(run.len)) {
            Some(end) if end <= self.table.pages() => Ok(()),
            _ => Err(CommandError::OutOfRange(run.start.plus(run.len.saturating_sub(1)))),
        }
    }

    fn checked_runs(&self, runs: &[Run]) -> Result<(), CommandError> {
        runs.iter().try_for_each(|run| self.checked(*run))
    }

    /// The same for what needs a place in memory.
    fn checked_memory(&self, run: Run) -> Result<(), CommandError> {
        self.checked(run)?;
        self.table.first_of_nobody(run).map_or(Ok(()), |page| Err(CommandError::OutOfRange(page)))
    }

    // ── moves ────────────────────────────────────────────────────────────────────────────

    /// Moves pages that are `Arriving`, with their frames in staging, into the guest, in as few actions as they
    /// are contiguous on both sides.
    fn move_in(&mut self, pages: impl IntoIterator<Item = (PageNo, Slot)>) {
        let mut pages = pages.into_iter().peekable();
        while let Some((page, slot)) = pages.next() {
            let (mut run, mut slots) = (Run::one(page), SlotRun::new(slot, 1));
            while pages
                .next_if(|(page, slot)| {
                    *page == run.end() && (*slot == slots.start.plus(slots.len) || mutant!(RescuesWrongSlot))
                })
                .is_some()
            {
                run.len += 1;
                slots.len += 1;
            }
            self.actions.push_back(Action::MoveIn { run, slots });
        }
    }

    /// A page that was read alone. A frame that leaves staging has to be flushed from the TLBs of all processors that
    /// run the VM, which takes longer than to copy a page. The copy takes one frame more, until that in staging is
    /// given back with others.
    pub(super) fn copy_or_move_in(&mut self, page: PageNo, slot: Slot) {
        if self.frames.may_copy() {
            self.actions.push_back(Action::CopyIn { page, slot });
        } else {
            self.move_in([(page, slot)]);
        }
    }

    /// If the host had no frame for a copy, that in staging goes.
    fn copied_in(&mut self, page: PageNo, slot: Slot, copied: bool) {
        if copied {
            self.frames.unbind(page);
            self.now_resident(page);
        } else {
            self.frames.returned();
            self.actions.push_front(Action::MoveIn { run: Run::one(page), slots: SlotRun::new(slot, 1) });
        }
    }

    fn moved_in(&mut self, run: Run, slots: SlotRun, moved: u32) {
        if self.frames.staging().lent_to(run.start.block()) == Some(slots) {
            if moved == run.len || mutant!(TrustsPartialBlocks) {
                self.frames.take_back(run.start.block());
                return run.pages().for_each(|page| self.now_resident(page));
            }
            self.split_sample(run.start);
        }
        for (page, slot) in run.pages().zip(slots.slots()).take(moved as usize) {
            self.frames.is_in_guest(page, slot);
            self.now_resident(page);
        }
        if moved < run.len && !mutant!(ForgetsPinnedMoves) {
            let rest = run.len - moved;
            self.frames.refuse(run.part(moved, rest), slots.part(moved, rest));
        }
    }

    /// Its frame is in the guest.
    fn now_resident(&mut self, page: PageNo) {
        self.table.set(page, PageState::Resident);
        self.may_give_way(page);
        if let Some(kind) = self.waiters.end(page) {
            self.actions.push_back(Action::Resolved { page, kind });
        }
    }

    fn moved_out(&mut self, run: Run, slots: SlotRun, pages: &[PageOut]) {
        if self.frames.staging().lent_to(run.start.block()) == Some(slots) && pages.contains(&PageOut::Pinned)
        {
            self.split_sample(run.start);
        }
        if self.table.state(run.start) == PageState::Sampled
            && pages.iter().all(|out| *out == PageOut::Pinned)
        {
            self.sampler.refused(run);
        }
        for ((page, slot), out) in run.pages().zip(slots.slots()).zip(pages) {
            match (self.frames.staging().used(slot), *out) {
                // The old version of a page that arrives anew: only its frame is wanted.
                (Use::Orphan, PageOut::Moved { .. }) => self.frames.free_orphan(slot),
                // It cannot be recycled, and must be gone before the new version comes.
                (Use::Orphan, PageOut::Pinned) => {
                    self.frames.vacate_orphan(slot);
                    self.actions.push_front(Action::DropGuest { run: Run::one(page) });
                }
                (_, PageOut::Pinned) => {
                    let victim = self.table.state(page) == PageState::Leaving;
                    self.counts.pinned += u64::from(victim);
                    self.table.set(page, PageState::Resident);
                    if victim {
                        self.give_up(page);
                    }
                    self.frames.is_in_guest(page, slot);
                }
                (_, PageOut::Moved { sum, zero }) => {
                    if !mutant!(LeavesUnseenByTracking) {
                        self.dirty.departed(page);
                    }
                    if self.table.state(page) == PageState::Leaving {
                        // Until the VM has arrived it pages nothing: the page is placed once more.
                        self.counts.victims += u64::from(self.receiving.is_none());
                        self.left_guest(page, slot, sum, zero);
                    }
                }
            }
        }
    }
}
