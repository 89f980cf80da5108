//! A simulated engine, as its handle promises it to be and no better: answers take their time, pages that are not held
//! wander between memory and the store, a scan may name pages that did not change, the store cannot read some pages,
//! and has spoilt others.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use swapd::digest::page_sum;
use swapd::units::{bytes_of, runs_of};
use swapd::{
    ArrivedRun, BLOCK_PAGES, CommandError, Copies, DirtyPages, IoError, IoErrorKind, PAGE_SIZE, PageNo,
    PendingAnswer, Piece, Place, Placed, Run, Slot, SlotRun, TierId, answered,
};
use tokio::sync::oneshot;

use super::runtime::sleep;
use super::world::world;
use crate::region::{Pages, Region};

const NO_SPACE: IoError = IoError { tier: TierId::STORE, write: true, kind: IoErrorKind::Full };
const COMMAND: Duration = Duration::from_micros(400);
const DEVICE: Duration = Duration::from_millis(3);
const SLOTS: u32 = 600;
/// Commands waiting; a session that has more under way has no bound.
const QUEUE_MAX: usize = 4096;

/// So many contents a page can have. One of them is zeros.
const CONTENTS: u64 = 11;

/// Whether the guest's `generation`th write leaves zeros. 0: never written.
fn is_bare(generation: u64) -> bool {
    generation.is_multiple_of(CONTENTS)
}

/// A page's content, as the guest's `generation`th write leaves it. Now and then it is zeros, or what it was before.
pub fn content(page: PageNo, generation: u64) -> [u8; PAGE_SIZE] {
    let mut bytes = [0; PAGE_SIZE];
    if !is_bare(generation) {
        let generation = generation % CONTENTS;
        let mix = (page.0 << 32 ^ generation).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        for (word, value) in [(0, mix), (1, generation), (511, !mix)] {
            bytes[word * 8..word * 8 + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Bad {
    /// The first attempt fails.
    Once,
    Unreadable,
    Rotten,
}

type GrantReply = oneshot::Sender<Result<SlotRun, CommandError>>;
type Command = Box<dyn FnOnce(&mut State)>;

/// A subscription to dirty pages.
struct Tracking {
    id: u32,
    /// Blocks that are tracked.
    tracked: BTreeSet<usize>,
    written: BTreeSet<PageNo>,
}

struct State {
    pages: u64,
    memory: Rc<Pages>,
    staging: Rc<Pages>,
    place: Vec<Place>,
    held: Vec<bool>,
    /// Devices have them in use: they cannot move.
    pinned: BTreeSet<PageNo>,
    store: BTreeMap<PageNo, u64>,
    bad: BTreeMap<PageNo, Bad>,
    dirty: Vec<Tracking>,
    next_subscriber: u32,
    /// So many reads of the store fail, whatever they are of.
    store_away: u64,
    receiving: bool,
    free: BTreeSet<u32>,
    granted: BTreeSet<u32>,
    grants: VecDeque<(u32, GrantReply)>,
    queue: VecDeque<Command>,
    busy: bool,
    failed: bool,
    /// The guest has a chance to write.
    touch: Option<Rc<dyn Fn(PageNo)>>,
}

#[derive(Clone)]
pub struct EngineHandle(Rc<RefCell<State>>);

impl std::fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a simulated engine")
    }
}

impl State {
    /// # Panics
    /// If the page is not there: nobody may look.
    fn bytes(&self, page: PageNo) -> *mut u8 {
        assert!(page.0 < self.pages);
        // SAFETY: within the allocation, as just checked.
        unsafe { self.memory.base().add(page.index() * PAGE_SIZE) }
    }

    fn put(&mut self, page: PageNo, bytes: &[u8; PAGE_SIZE]) {
        // SAFETY: a page of our own allocation, to which nobody holds a reference.
        unsafe { self.bytes(page).copy_from_nonoverlapping(bytes.as_ptr(), PAGE_SIZE) };
    }

    /// It is written, or comes in. Where nobody has it tracked, nobody is told.
    fn mark(&mut self, page: PageNo) {
        let told = self.dirty.iter_mut().filter(|tracking| tracking.tracked.contains(&page.block()));
        told.for_each(|tracking| tracking.written.extend([page]));
    }

    /// It leaves: that is told of any page.
    fn mark_left(&mut self, page: PageNo) {
        self.dirty.iter_mut().for_each(|tracking| tracking.written.extend([page]));
    }

    fn take_slots(&mut self, count: u32) -> Option<SlotRun> {
        let first = *self.free.first()?;
        let len = (first..first + count).take_while(|slot| self.free.contains(slot)).count() as u32;
        for slot in first..first + len {
            self.free.remove(&slot);
            self.granted.insert(slot);
        }
        Some(SlotRun::new(Slot(first), len))
    }

    fn give_slots(&mut self, slots: SlotRun) {
        for slot in slots.slots() {
            assert!(self.granted.remove(&slot.0), "{slot:?} was not granted");
            self.free.insert(slot.0);
        }
    }

    fn serve_grants(&mut self) {
        while !self.grants.is_empty() {
            let answer = if self.failed {
                Err(CommandError::Store(NO_SPACE))
            } else {
                let count = self.grants[0].0;
                let Some(slots) = self.take_slots(count) else { return };
                Ok(slots)
            };
            let (_, reply) = self.grants.pop_front().expect("just looked at");
            // Nobody waits for it any more.
            if let Err(Ok(slots)) = reply.send(answer) {
                self.give_slots(slots);
            }
        }
    }

    fn need_receiving(&self) -> Result<(), CommandError> {
        if self.receiving { Ok(()) } else { Err(CommandError::NotNow("the VM is not being received")) }
    }
}

impl EngineHandle {
    pub fn new(pages: u64) -> EngineHandle {
        EngineHandle(Rc::new(RefCell::new(State {
            pages,
            memory: Pages::new(bytes_of(pages) as usize),
            staging: Pages::new(SLOTS as usize * PAGE_SIZE),
            place: vec![Place::Zero; pages as usize],
            held: vec![false; pages as usize],
            pinned: BTreeSet::new(),
            store: BTreeMap::new(),
            bad: BTreeMap::new(),
            dirty: Vec::new(),
            next_subscriber: 0,
            store_away: 0,
            receiving: false,
            free: (0..SLOTS).collect(),
            granted: BTreeSet::new(),
            grants: VecDeque::new(),
            queue: VecDeque::new(),
            busy: false,
            failed: false,
            touch: None,
        })))
    }

    // ── what the simulation does ────────────────────────────────────────────────────────

    pub fn on_touch(&self, touch: Rc<dyn Fn(PageNo)>) {
        self.0.borrow_mut().touch = Some(touch);
    }

    pub fn fail(&self, failed: bool) {
        self.0.borrow_mut().failed = failed;
        self.0.borrow_mut().serve_grants();
    }

    /// The guest writes; false if the page cannot be had just now.
    pub fn write(&self, page: PageNo, generation: u64) -> bool {
        let mut state = self.0.borrow_mut();
        if matches!(state.place[page.index()], Place::Staged | Place::Moving | Place::Poisoned)
            || state.bad.contains_key(&page)
        {
            return false;
        }
        state.put(page, &content(page, generation));
        state.place[page.index()] = Place::Memory;
        state.mark(page);
        true
    }

    /// A device takes a page for a write of its own: that counts as one, and what it writes later leaves no trace.
    pub fn pin(&self, page: PageNo) -> bool {
        let mut state = self.0.borrow_mut();
        if state.place[page.index()] != Place::Memory {
            return false;
        }
        state.mark(page);
        state.pinned.insert(page)
    }

    pub fn write_by_device(&self, page: PageNo, generation: u64) {
        let mut state = self.0.borrow_mut();
        assert!(state.pinned.remove(&page) && state.place[page.index()] == Place::Memory);
        state.put(page, &content(page, generation));
    }

    /// Pages the page out or in, if it is not held.
    pub fn wander(&self, page: PageNo, generation: u64) {
        let mut state = self.0.borrow_mut();
        let at = page.index();
        if state.held[at] || state.pinned.contains(&page) || state.bad.contains_key(&page) {
            return;
        }
        match state.place[at] {
            // No engine stores zeros.
            Place::Memory if is_bare(generation) => {
                state.place[at] = Place::Zero;
                state.mark_left(page);
            }
            Place::Memory => {
                let at_hand = world().random.one_in(2);
                state.place[at] = if at_hand { Place::Staged } else { Place::Moving };
                state.mark_left(page);
                state.store.insert(page, generation);
                let handle = self.clone();
                world().after(world().delay(DEVICE), move || {
                    handle.0.borrow_mut().place[page.index()] = Place::Stored;
                });
            }
            Place::Stored => {
                state.put(page, &content(page, generation));
                state.place[at] = Place::Memory;
                state.mark(page);
            }
            _ => {}
        }
    }

    /// The store has lost a page that it has. Says whether it is lost for good.
    pub fn spoil(&self, page: PageNo) -> bool {
        let mut state = self.0.borrow_mut();
        if state.place[page.index()] != Place::Stored {
            return false;
        }
        let bad = world().random.pick(&[Bad::Once, Bad::Unreadable, Bad::Rotten]);
        state.bad.insert(page, bad);
        bad != Bad::Once
    }

    /// The store is away for so many reads, and comes back as it was.
    pub fn be_away(&self, reads: u64) {
        self.0.borrow_mut().store_away = reads;
    }

    /// What the store's blocks have of the page, and whether they can be read just now: whoever shares them does not
    /// look. The page must be held.
    pub fn stored(&self, page: PageNo) -> ([u8; PAGE_SIZE], bool) {
        let state = self.0.borrow();
        assert!(state.held[page.index()], "{page} is taken from the store and not held");
        let mut bytes = content(page, state.store.get(&page).copied().unwrap_or_default());
        let bad = state.bad.get(&page);
        match bad {
            Some(Bad::Rotten) => bytes[0] ^= 0x10,
            Some(Bad::Unreadable) => bytes.fill(0xEE),
            Some(Bad::Once) | None => {}
        }
        (bytes, state.store_away == 0 && matches!(bad, None | Some(Bad::Rotten)))
    }

    pub fn is_zero(&self, page: PageNo) -> bool {
        self.0.borrow().place[page.index()] == Place::Zero
    }

    /// What the guest would find in the page; None: poison.
    pub fn look(&self, page: PageNo) -> Option<[u8; PAGE_SIZE]> {
        let state = self.0.borrow();
        match state.place[page.index()] {
            Place::Zero => Some([0; PAGE_SIZE]),
            Place::Memory => {
                let mut bytes = [0; PAGE_SIZE];
                // SAFETY: a page of our own allocation.
                unsafe { state.bytes(page).copy_to_nonoverlapping(bytes.as_mut_ptr(), PAGE_SIZE) };
                Some(bytes)
            }
            Place::Stored | Place::Staged => Some(content(page, state.store[&page])),
            Place::Moving => unreachable!("nothing moves in memory that was received"),
            Place::Poisoned => None,
        }
    }

    /// Nothing of a session is left behind: no page held, no frame granted, no writes tracked.
    pub fn assert_at_rest(&self) {
        let mut state = self.0.borrow_mut();
        // What was asked last, and nobody waits for.
        while let Some(command) = state.queue.pop_front() {
            command(&mut state);
        }
        state.grants.clear();
        let held = state.held.iter().filter(|held| **held).count();
        assert_eq!(held, 0, "pages are still held");
        assert_eq!(state.granted.len(), 0, "frames are still granted");
        assert!(state.dirty.is_empty(), "writes are still tracked");
    }

    fn turn(&self) {
        let command = self.0.borrow_mut().queue.pop_front();
        if let Some(command) = command {
            let mut state = self.0.borrow_mut();
            command(&mut state);
            state.serve_grants();
        }
        let again = !self.0.borrow().queue.is_empty();
        self.0.borrow_mut().busy = again;
        if again {
            self.later();
        }
    }

    fn later(&self) {
        let handle = self.clone();
        world().after(world().delay(COMMAND), move || handle.turn());
    }

    fn push(&self, command: Command) {
        let idle = {
            let mut state = self.0.borrow_mut();
            state.queue.push_back(command);
            assert!(state.queue.len() < QUEUE_MAX, "a session has no end of commands under way");
            !std::mem::replace(&mut state.busy, true)
        };
        if idle {
            self.later();
        }
    }

    fn ask<T: 'static>(
        &self,
        work: impl FnOnce(&mut State) -> Result<T, CommandError> + 'static,
    ) -> PendingAnswer<T> {
        let (reply, answer) = oneshot::channel();
        self.push(Box::new(move |state| {
            let failed = state.failed;
            let _ = reply.send(if failed { Err(CommandError::Store(NO_SPACE)) } else { work(state) });
        }));
        answer
    }

    /// What an engine that has failed does all the same.
    fn ask_always<T: 'static>(&self, work: impl FnOnce(&mut State) -> T + 'static) -> PendingAnswer<T> {
        let (reply, answer) = oneshot::channel();
        self.push(Box::new(move |state| drop(reply.send(Ok(work(state))))));
        answer
    }

    fn call<T>(&self, answer: PendingAnswer<T>) -> Result<T, CommandError> {
        // A process that dies does not wait.
        if std::thread::panicking() { Err(CommandError::Gone) } else { world().block(answered(answer)) }
    }

    // ── the handle as the sessions know it ──────────────────────────────────────────────

    pub fn memory_bytes(&self) -> u64 {
        bytes_of(self.0.borrow().pages)
    }

    pub fn page_address(&self, page: PageNo) -> *mut u8 {
        let touch = self.0.borrow().touch.clone();
        if let Some(touch) = touch {
            touch(page);
        }
        let state = self.0.borrow();
        assert!(state.held[page.index()], "{page} is looked at and not held");
        assert_eq!(state.place[page.index()], Place::Memory, "{page} is looked at");
        state.bytes(page)
    }

    pub fn slot_address(&self, slots: SlotRun) -> *mut u8 {
        let state = self.0.borrow();
        assert!(slots.slots().all(|slot| state.granted.contains(&slot.0)), "{slots:?} is not granted");
        // SAFETY: within the allocation: only such slots are granted.
        unsafe { state.staging.base().add(slots.start.offset()) }
    }

    pub fn subscribe_dirty(&self) -> Result<DirtySubscription, CommandError> {
        self.call(self.subscribe_dirty_async())
    }

    pub fn subscribe_dirty_async(&self) -> PendingAnswer<DirtySubscription> {
        let blocks = self.0.borrow().pages.div_ceil(u64::from(BLOCK_PAGES)) as usize;
        self.subscribe((0..blocks).collect())
    }

    pub fn subscribe_dirty_in_parts(&self) -> Result<DirtySubscription, CommandError> {
        self.call(self.subscribe(BTreeSet::new()))
    }

    fn subscribe(&self, tracked: BTreeSet<usize>) -> PendingAnswer<DirtySubscription> {
        let handle = self.clone();
        let (reply, answer) = oneshot::channel();
        self.push(Box::new(move |state| {
            // Nobody is left to hold the subscription, and it could not end while the engine is at this.
            if reply.is_closed() {
                return;
            }
            let id = state.next_subscriber;
            state.next_subscriber += 1;
            state.dirty.push(Tracking { id, tracked, written: BTreeSet::new() });
            let _ = reply.send(Ok(DirtySubscription { handle, id }));
        }));
        answer
    }

    pub fn set_prefetch_async(&self, _: bool) -> PendingAnswer<()> {
        self.ask(|_| Ok(()))
    }

    pub fn resident_map(&self) -> Result<Vec<Run>, CommandError> {
        self.call(self.resident_map_async())
    }

    pub fn resident_map_async(&self) -> PendingAnswer<Vec<Run>> {
        self.map_of(Place::Memory)
    }

    pub fn stored_map_async(&self) -> PendingAnswer<Vec<Run>> {
        self.map_of(Place::Stored)
    }

    fn map_of(&self, place: Place) -> PendingAnswer<Vec<Run>> {
        self.ask(move |state| {
            let there = (0..state.pages).map(PageNo).filter(|page| state.place[page.index()] == place);
            Ok(runs_of(there, u32::MAX).collect())
        })
    }

    pub fn hold_async(&self, run: Run) -> PendingAnswer<Vec<Piece>> {
        self.ask(move |state| {
            let mut pieces: Vec<Piece> = Vec::new();
            for page in run.pages() {
                assert!(!std::mem::replace(&mut state.held[page.index()], true), "{page} is held twice");
                let place = state.place[page.index()];
                match pieces.last_mut() {
                    Some(piece) if piece.place == place => piece.run.len += 1,
                    _ => pieces.push(Piece { run: Run::one(page), place, tier: TierId::STORE }),
                }
            }
            Ok(pieces)
        })
    }

    pub fn release_async(&self, run: Run) -> PendingAnswer<()> {
        self.ask_always(move |state| run.pages().for_each(|page| state.held[page.index()] = false))
    }

    pub fn sums_async(&self, run: Run) -> PendingAnswer<Vec<u64>> {
        self.ask(move |state| {
            let sum = |page| {
                state.store.get(&page).map_or(0, |generation| page_sum(page, &content(page, *generation)))
            };
            Ok(run.pages().map(sum).collect())
        })
    }

    pub fn staged_async(&self, pages: Vec<PageNo>) -> PendingAnswer<Copies> {
        self.ask(move |state| {
            let mut copies = Copies::default();
            for page in pages {
                if state.place[page.index()] == Place::Staged {
                    copies.pages.push(page);
                    copies.bytes.extend(content(page, state.store[&page]));
                }
            }
            Ok(copies)
        })
    }

    pub fn heat_async(&self) -> PendingAnswer<Vec<u8>> {
        self.ask(|state| Ok((0..state.pages).map(|_| world().random.next() as u8).collect()))
    }

    pub fn start_receiving_async(&self, heat: Vec<u8>) -> PendingAnswer<()> {
        self.ask(move |state| {
            assert_eq!(heat.len() as u64, state.pages);
            assert!(!std::mem::replace(&mut state.receiving, true), "received into twice");
            Ok(())
        })
    }

    pub fn update_heat_async(&self, heat: Vec<u8>) -> PendingAnswer<()> {
        self.ask(move |state| {
            assert_eq!(heat.len() as u64, state.pages);
            state.need_receiving()
        })
    }

    pub fn grant_frames_async(&self, count: u32) -> PendingAnswer<SlotRun> {
        let (reply, answer) = oneshot::channel();
        self.push(Box::new(move |state| state.grants.push_back((count.max(1), reply))));
        answer
    }

    pub fn return_frames_async(&self, slots: SlotRun) -> PendingAnswer<()> {
        self.ask_always(move |state| state.give_slots(slots))
    }

    pub fn arrive_async(&self, arrival: ArrivedRun) -> PendingAnswer<()> {
        let (reply, answer) = oneshot::channel();
        self.push(Box::new(move |state| {
            let failed = state.failed || !state.receiving;
            for (page, slot) in arrival.run.pages().zip(arrival.slots.slots()) {
                // SAFETY: two pages of two allocations of ours.
                unsafe {
                    let from = state.staging.base().add(slot.offset());
                    state.bytes(page).copy_from_nonoverlapping(from, PAGE_SIZE);
                }
                state.place[page.index()] = Place::Memory;
            }
            state.give_slots(arrival.slots);
            let answer = if failed { Err(CommandError::Store(NO_SPACE)) } else { Ok(()) };
            let _ = reply.send(answer);
        }));
        answer
    }

    pub fn arrive_zero_async(&self, run: Run) -> PendingAnswer<()> {
        self.arrive_as(run, Place::Zero)
    }

    pub fn arrive_poisoned_async(&self, run: Run) -> PendingAnswer<()> {
        self.arrive_as(run, Place::Poisoned)
    }

    fn arrive_as(&self, run: Run, place: Place) -> PendingAnswer<()> {
        self.ask(move |state| {
            state.need_receiving()?;
            state.place[run.indices()].fill(place);
            Ok(())
        })
    }

    pub fn settle_receiving_async(&self) -> PendingAnswer<()> {
        self.ask(|state| state.need_receiving())
    }

    pub fn finish_receiving_async(&self) -> PendingAnswer<Placed> {
        self.ask(|state| {
            state.need_receiving()?;
            assert_eq!(state.granted.len(), 0, "the receiving is finished with frames on their way");
            state.receiving = false;
            let count = |place| state.place.iter().filter(|is| **is == place).count() as u64;
            Ok(Placed {
                pages_ram: count(Place::Memory),
                pages_zero: count(Place::Zero),
                ..Placed::default()
            })
        })
    }
}

/// As the real one: on the runtime, of pages that are held.
pub struct StoredReader(EngineHandle);

impl StoredReader {
    pub fn of(handle: &EngineHandle) -> io::Result<StoredReader> {
        Ok(StoredReader(handle.clone()))
    }

    pub async fn read<K: Unpin + 'static>(
        &self,
        tier: TierId,
        run: Run,
        sums: &[u64],
        region: Region<K>,
    ) -> (Result<(), IoError>, Region<K>) {
        self.read_pages(tier, run, sums, region, true).await
    }

    /// As the real one: the page is not held.
    pub async fn probe<K: Unpin + 'static>(
        &self,
        tier: TierId,
        page: PageNo,
        sum: u64,
        region: Region<K>,
    ) -> Result<(), IoError> {
        self.read_pages(tier, Run::one(page), &[sum], region, false).await.0
    }

    async fn read_pages<K: Unpin + 'static>(
        &self,
        tier: TierId,
        run: Run,
        sums: &[u64],
        mut region: Region<K>,
        held: bool,
    ) -> (Result<(), IoError>, Region<K>) {
        assert_eq!(tier, TierId::STORE);
        sleep(world().delay(DEVICE)).await;
        let mut state = self.0.0.borrow_mut();
        let broken = IoError { tier, write: false, kind: IoErrorKind::Broken(libc::EIO) };
        if state.store_away > 0 {
            state.store_away -= 1;
            return (Err(broken), region);
        }
        for (page, into) in run.pages().zip(region.bytes_mut().as_chunks_mut().0) {
            assert!(!held || state.held[page.index()], "{page} is read from the store and not held");
            *into = content(page, state.store.get(&page).copied().unwrap_or_default());
            match state.bad.get(&page) {
                Some(Bad::Rotten) => into[usize::from(world().random.next() as u8)] ^= 0x10,
                Some(_) => {
                    // What fails only once has failed, for all that this read is about.
                    state.bad.retain(|page, bad| *bad != Bad::Once || !run.contains(*page));
                    return (Err(broken), region);
                }
                None => {}
            }
        }
        (swapd::verify(tier, run, sums, region.bytes()), region)
    }
}

/// As the real one.
#[derive(Debug)]
pub struct DirtySubscription {
    handle: EngineHandle,
    id: u32,
}

impl DirtySubscription {
    pub fn track_async(&self, runs: Vec<Run>) -> PendingAnswer<()> {
        let id = self.id;
        self.handle.ask(move |state| {
            let own = state.dirty.iter_mut().find(|tracking| tracking.id == id);
            let own = own.expect("it lives as long as the subscription");
            own.tracked.extend(runs.iter().flat_map(|run| run.blocks()).map(|part| part.start.block()));
            Ok(())
        })
    }

    /// One page in three has left the guest's memory since it was written.
    pub fn collect_async(&self) -> PendingAnswer<DirtyPages> {
        let id = self.id;
        self.handle.ask(move |state| {
            let own = state.dirty.iter_mut().find(|tracking| tracking.id == id);
            let own = own.expect("it lives as long as the subscription");
            let (left, seen): (BTreeSet<_>, BTreeSet<_>) =
                std::mem::take(&mut own.written).into_iter().partition(|page| page.0.is_multiple_of(3));
            let [seen, left] = [seen, left].map(|pages| runs_of(pages, u32::MAX).collect());
            Ok(DirtyPages { seen, departed: left })
        })
    }
}

impl Drop for DirtySubscription {
    fn drop(&mut self) {
        let id = self.id;
        drop(self.handle.ask_always(move |state| state.dirty.retain(|tracking| tracking.id != id)));
    }
}
