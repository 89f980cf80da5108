//! The guest: it writes, its devices write without a trace, its pages wander. And what its machine does when it is
//! asked to stand still and to save its state.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io::Write;
use std::rc::Rc;
use std::time::Duration;

use swapd::PageNo;

use super::engine::EngineHandle;
use super::runtime::pause;
use super::world::{ProcessId, world};
use crate::vm::VmError;

/// Pages that the guest writes to, of all.
const HOT_PAGES: u64 = 24;
const TICK: Duration = Duration::from_millis(120);
/// No device takes longer to write what it has begun to.
const DMA_MAX: Duration = Duration::from_secs(2);
const VM_STEP: Duration = Duration::from_millis(20);
/// Half of a state comes in so many pieces at most: a machine that takes a minute by itself is given up, and rightly.
const STATE_PIECES: usize = 256;

/// What a VM's owner is told to fail at, the next time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Chore {
    Drain,
    Pause,
    Save,
    GiveUpName,
    Load,
    Start,
    Resume,
}

/// The guest, and the machine around it.
pub struct Guest {
    pub process: ProcessId,
    pub engine: EngineHandle,
    pub pages: u64,
    /// What the guest, or a device, wrote last.
    truth: RefCell<Vec<u64>>,
    /// What the store has lost.
    lost: RefCell<BTreeSet<PageNo>>,
    /// Processors may be in the guest.
    pub runs: Cell<bool>,
    pub stood_still: bool,
    pub throttle: Cell<u8>,
    dma: bool,
    /// Pages that devices will still write to.
    pinned: RefCell<Vec<PageNo>>,
    /// What was saved last.
    pub state: RefCell<Vec<u8>>,
    /// It is elsewhere.
    pub gone: Cell<bool>,
    pub failing: Cell<Option<Chore>>,
}

impl Guest {
    pub fn new(process: ProcessId, pages: u64) -> Rc<Guest> {
        let random = &world().random;
        let engine = EngineHandle::new(pages);
        let guest = Rc::new(Guest {
            process,
            engine,
            pages,
            truth: RefCell::new(vec![0; pages as usize]),
            lost: RefCell::default(),
            runs: Cell::new(true),
            stood_still: random.one_in(8),
            throttle: Cell::new(0),
            dma: random.one_in(4),
            pinned: RefCell::default(),
            state: RefCell::default(),
            gone: Cell::new(false),
            failing: Cell::new(None),
        });
        guest.runs.set(!guest.stood_still);
        // What was there before: some in memory, some in the store, some of that no longer readable.
        for _ in 0..20 + random.below(60) {
            guest.write(guest.any_page());
        }
        for _ in 0..random.below(80) {
            guest.wander();
        }
        let touched = Rc::downgrade(&guest);
        guest.engine.on_touch(Rc::new(move |page| {
            if let Some(guest) = touched.upgrade()
                && guest.runs.get()
                && world().random.one_in(12)
            {
                guest.write(page);
            }
        }));
        guest.clone().live();
        guest
    }

    /// What each page has: the generation of its content.
    pub fn truth(&self) -> Vec<u64> {
        self.truth.borrow().clone()
    }

    /// Pages that the store has lost.
    pub fn lost(&self) -> BTreeSet<PageNo> {
        self.lost.borrow().clone()
    }

    pub fn lose_some(&self) {
        let random = &world().random;
        if random.one_in(2) {
            self.engine.be_away(random.below(200));
        }
        for _ in 0..200 {
            let page = self.any_page();
            if self.engine.spoil(page) {
                self.lost.borrow_mut().insert(page);
            }
        }
    }

    pub fn has_lost(&self) -> bool {
        !self.lost.borrow().is_empty()
    }

    fn any_page(&self) -> PageNo {
        let random = &world().random;
        // Hot pages lie in each block, so that every stream has some.
        let hot = random.below(HOT_PAGES) * (self.pages / HOT_PAGES);
        PageNo(if random.one_in(4) { random.below(self.pages) } else { hot })
    }

    fn write(&self, page: PageNo) {
        let generation = self.truth.borrow()[page.index()] + 1;
        if !self.pinned.borrow().contains(&page) && self.engine.write(page, generation) {
            self.truth.borrow_mut()[page.index()] = generation;
        }
    }

    pub fn wander(&self) {
        let page = self.any_page();
        let generation = self.truth.borrow()[page.index()];
        self.engine.wander(page, generation);
    }

    /// A device begins to write to memory; it gets its data later.
    fn begin_dma(self: &Rc<Self>) {
        let page = self.any_page();
        if self.engine.pin(page) {
            self.pinned.borrow_mut().push(page);
            let vm = self.clone();
            world().after(world().delay(DMA_MAX), move || vm.end_dma(page));
        }
    }

    fn end_dma(&self, page: PageNo) {
        let pinned = self.pinned.borrow().contains(&page);
        if pinned && world().is_alive(self.process) {
            self.pinned.borrow_mut().retain(|other| *other != page);
            let generation = self.truth.borrow()[page.index()] + 1;
            self.engine.write_by_device(page, generation);
            self.truth.borrow_mut()[page.index()] = generation;
        }
    }

    /// The guest goes on for as long as it may.
    fn live(self: Rc<Self>) {
        let next = TICK * (1 + u32::from(self.throttle.get()) / 20);
        world().after(world().delay(next), move || {
            if !world().is_alive(self.process) || self.gone.get() {
                return;
            }
            let random = &world().random;
            if self.runs.get() {
                (0..random.below(4)).for_each(|_| self.write(self.any_page()));
                if self.dma && random.one_in(3) {
                    self.begin_dma();
                }
            }
            (0..random.below(4)).for_each(|_| self.wander());
            self.live();
        });
    }

    /// What devices have begun has ended.
    pub fn drain(&self) -> Result<(), VmError> {
        let begun = self.pinned.borrow().clone();
        self.fails(Chore::Drain)?;
        begun.into_iter().for_each(|page| self.end_dma(page));
        Ok(())
    }

    /// Stands still, even if that fails half-way.
    pub fn pause(&self) -> Result<(), VmError> {
        let half_way = self.fails(Chore::Pause);
        let pinned = self.pinned.borrow().clone();
        pinned.into_iter().for_each(|page| self.end_dma(page));
        self.runs.set(false);
        half_way
    }

    /// Writes a state that is like no other.
    pub fn save(&self, to: &mut dyn Write) -> Result<(), VmError> {
        let random = &world().random;
        // More than a queue of messages and a connection hold, now and then.
        let bytes = if random.one_in(8) { 4_500_000 + random.below(500_000) } else { random.below(3000) };
        let start = random.next();
        // No part of it is like another.
        let words =
            (0..bytes.div_ceil(8)).map(|word| start.wrapping_add(word).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let mut state: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        state.truncate(bytes as usize);
        *self.state.borrow_mut() = state;
        // It takes its time, and may fail half-way.
        let state = self.state.borrow();
        let (before, behind) = state.split_at(state.len() / 2);
        for (part, chore) in [(before, true), (behind, false)] {
            let piece_bytes = 1 + random.below(1 << 20) as usize;
            for piece in part.chunks(piece_bytes.max(part.len() / STATE_PIECES)) {
                pause(world().delay(VM_STEP));
                let written = to.write_all(piece);
                written.map_err(|source| VmError::Io { doing: "writing its state", source })?;
            }
            if chore {
                self.fails(Chore::Save)?;
            }
        }
        Ok(())
    }

    pub fn fails(&self, chore: Chore) -> Result<(), VmError> {
        pause(world().delay(VM_STEP));
        if self.failing.get() == Some(chore) {
            self.failing.set(None);
            world().note(|| format!("{chore:?} fails"));
            return Err(VmError::Machine(format!("no {chore:?} today")));
        }
        Ok(())
    }
}
