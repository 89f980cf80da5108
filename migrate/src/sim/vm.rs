//! The VM: a guest that writes at the source, what each side's process does with it, and who watches that it runs at
//! one place only.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use swapd::{PAGE_SIZE, PageNo};

use super::engine::{EngineHandle, content};
use super::fs;
use super::runtime::pause;
use super::world::{ProcessId, world};
use crate::session::SessionId;
use crate::target::{PlainMemory, TargetMemory};
use crate::vm::{LiveVm, SourceVm, TargetVm, VmError};

pub(crate) const SESSIONS: &str = "/sessions";
/// Pages that the guest writes to, of all.
const HOT_PAGES: u64 = 24;
const TICK: Duration = Duration::from_millis(120);
/// No device takes longer to write what it has begun to.
const DMA_MAX: Duration = Duration::from_secs(2);
const VM_STEP: Duration = Duration::from_millis(20);

/// What a VM's owner is told to fail at, the next time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Chore {
    Drain,
    Pause,
    Save,
    GiveUpName,
    Load,
    Start,
}

/// The VM, wherever it is.
pub(crate) struct Vm {
    pub(crate) process: ProcessId,
    pub(crate) engine: EngineHandle,
    pub(crate) pages: u64,
    /// What the guest, or a device, wrote last.
    truth: RefCell<Vec<u64>>,
    /// What the store at the source has lost.
    lost: RefCell<BTreeSet<PageNo>>,
    /// Processors may be in the guest at the source.
    pub(crate) runs: Cell<bool>,
    pub(crate) stood_still: bool,
    pub(crate) named: Cell<bool>,
    throttle: Cell<u8>,
    dma: bool,
    /// Pages that devices will still write to.
    pinned: RefCell<Vec<PageNo>>,
    state: RefCell<Vec<u8>>,
    /// Where it was let run, or taken over to stand still: once, for ever.
    pub(crate) started: Cell<Option<(SessionId, ProcessId)>>,
    pub(crate) failing: Cell<Option<Chore>>,
    /// The commit is recorded, and the VM starts now.
    pub(crate) on_start: RefCell<Option<Rc<dyn Fn()>>>,
}

pub(crate) fn says(record: Option<Vec<u8>>, what: &[u8]) -> bool {
    record.is_some_and(|bytes| bytes.starts_with(what))
}

/// Whoever asks hears that it runs here.
pub(crate) fn is_committed(session: SessionId) -> bool {
    let decision =
        fs::in_memory(&PathBuf::new()).expect("there is one").join(format!("{session}-0.decision"));
    let record = fs::content(&record_of(session));
    says(record.clone(), b"COMMIT \n")
        || (says(record, b"BEGUN") && says(fs::content(&decision), b"COMMIT \n"))
}

pub(crate) fn record_of(session: SessionId) -> PathBuf {
    PathBuf::from(SESSIONS).join(session.to_string())
}

impl Vm {
    pub(crate) fn new(process: ProcessId, pages: u64) -> Rc<Vm> {
        let random = &world().random;
        let engine = EngineHandle::new(pages);
        let vm = Rc::new(Vm {
            process,
            engine,
            pages,
            truth: RefCell::new(vec![0; pages as usize]),
            lost: RefCell::default(),
            runs: Cell::new(true),
            stood_still: random.one_in(8),
            named: Cell::new(true),
            throttle: Cell::new(0),
            dma: random.one_in(4),
            pinned: RefCell::default(),
            state: RefCell::default(),
            started: Cell::new(None),
            failing: Cell::new(None),
            on_start: RefCell::new(None),
        });
        vm.runs.set(!vm.stood_still);
        // What was there before: some in memory, some in the store, some of that no longer readable.
        for _ in 0..20 + random.below(60) {
            vm.write(vm.any_page());
        }
        for _ in 0..random.below(80) {
            vm.wander();
        }
        let touched = Rc::downgrade(&vm);
        vm.engine.on_touch(Rc::new(move |page| {
            if let Some(vm) = touched.upgrade()
                && vm.runs.get()
                && world().random.one_in(12)
            {
                vm.write(page);
            }
        }));
        vm.clone().live();
        vm
    }

    pub(crate) fn lose_some(&self) {
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

    pub(crate) fn has_lost(&self) -> bool {
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

    fn wander(&self) {
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
            if !world().is_alive(self.process) || self.started.get().is_some() {
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

    /// It goes on here: never again once it has been let run elsewhere.
    fn goes_on_here(&self) {
        assert!(world().is_alive(self.process));
        assert!(
            self.started.get().is_none(),
            "two: it goes on at the source, and has been started at the target"
        );
        self.runs.set(!self.stood_still);
        world().note(|| "the VM goes on at the source".to_string());
    }

    /// It is the target's from now on.
    fn starts_there(&self, session: SessionId, memory: &TargetMemory, paused: bool) {
        world().note(|| "the VM starts at the target".to_string());
        let source_alive = world().is_alive(self.process);
        assert!(
            !(source_alive && self.runs.get()),
            "two: it is started at the target, and runs at the source"
        );
        assert!(self.started.get().is_none(), "it is started twice");
        assert_eq!(paused, self.stood_still, "who stood still stays so, who ran goes on");
        assert!(!self.named.get(), "it is started with its name in use at the source");
        assert!(
            says(fs::flushed(&record_of(session)), b"BEGUN  \n"),
            "it is started with no record of it that outlasts a crash"
        );
        assert!(is_committed(session) || fs::was_swept(), "it is started before that is decided");
        self.compare(memory);
        self.started.set(Some((session, world().me())));
    }

    fn compare(&self, memory: &TargetMemory) {
        for page in (0..self.pages).map(PageNo) {
            let generation = self.truth.borrow()[page.index()];
            if generation == 0 && matches!(memory, TargetMemory::Engine(engine) if engine.is_zero(page)) {
                continue;
            }
            let found = match memory {
                TargetMemory::Engine(engine) => engine.look(page),
                TargetMemory::Plain(memory) => Some(look_at(memory, page)),
            };
            match found {
                None => assert!(
                    self.lost.borrow().contains(&page),
                    "{page} is poisoned at the target, and was not lost"
                ),
                Some(bytes) => {
                    assert!(
                        bytes == content(page, generation),
                        "{page} is not what the guest wrote last ({generation})"
                    );
                }
            }
        }
    }

    /// Still here, and as before.
    pub(crate) fn assert_stays(&self) {
        assert!(
            self.started.get().is_none(),
            "the source says that it stays, and it was started at the target"
        );
        assert_eq!(self.runs.get(), !self.stood_still, "it stays, but does not run");
        assert!(self.named.get(), "it stays without its name");
        assert_eq!(self.throttle.get(), 0, "it stays throttled");
    }

    fn fails(&self, chore: Chore) -> Result<(), VmError> {
        pause(world().delay(VM_STEP));
        if self.failing.get() == Some(chore) {
            self.failing.set(None);
            world().note(|| format!("{chore:?} fails"));
            return Err(VmError::Machine(format!("no {chore:?} today")));
        }
        Ok(())
    }
}

fn look_at(memory: &PlainMemory, page: PageNo) -> [u8; PAGE_SIZE] {
    let mut bytes = [0; PAGE_SIZE];
    // SAFETY: a page of the mapping, which nobody writes to before the VM starts.
    unsafe { memory.page_address(page).copy_to_nonoverlapping(bytes.as_mut_ptr(), PAGE_SIZE) };
    bytes
}

/// As the source's process sees it.
pub(crate) struct Leaving(pub(crate) Rc<Vm>);

impl LiveVm for Leaving {
    fn drain(&mut self) -> Result<(), VmError> {
        let begun = self.0.pinned.borrow().clone();
        self.0.fails(Chore::Drain)?;
        begun.into_iter().for_each(|page| self.0.end_dma(page));
        Ok(())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        let half_way = self.0.fails(Chore::Pause);
        let pinned = self.0.pinned.borrow().clone();
        pinned.into_iter().for_each(|page| self.0.end_dma(page));
        self.0.runs.set(false);
        half_way
    }

    fn stood_still(&self) -> bool {
        self.0.stood_still
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.0.goes_on_here();
        Ok(())
    }

    fn save(&mut self, to: &mut dyn Write) -> Result<(), VmError> {
        let random = &world().random;
        // More than a queue of messages and a connection hold, now and then.
        let bytes = if random.one_in(8) { 4_500_000 + random.below(500_000) } else { random.below(3000) };
        let start = random.next();
        // No part of it is like another.
        let words =
            (0..bytes.div_ceil(8)).map(|word| start.wrapping_add(word).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let mut state: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        state.truncate(bytes as usize);
        *self.0.state.borrow_mut() = state;
        // It takes its time, and may fail half-way.
        let state = self.0.state.borrow();
        let (before, behind) = state.split_at(state.len() / 2);
        for (part, chore) in [(before, true), (behind, false)] {
            for piece in part.chunks(1 + random.below(1 << 20) as usize) {
                pause(world().delay(VM_STEP));
                let written = to.write_all(piece);
                written.map_err(|source| VmError::Io { doing: "writing its state", source })?;
            }
            if chore {
                self.0.fails(Chore::Save)?;
            }
        }
        Ok(())
    }

    fn throttle(&mut self, percent: u8) {
        self.0.throttle.set(percent);
    }
}

impl SourceVm for Leaving {
    fn give_up_name(&mut self, _: SessionId) -> Result<(), VmError> {
        self.0.named.set(false);
        self.0.fails(Chore::GiveUpName)
    }

    fn take_name_back(&mut self) {
        self.0.named.set(true);
    }
}

/// As the target's process sees it.
pub(crate) struct Coming {
    pub(crate) vm: Rc<Vm>,
    pub(crate) session: SessionId,
    pub(crate) memory: TargetMemory,
}

impl TargetVm for Coming {
    fn load(&mut self, state: &mut dyn Read) -> Result<(), VmError> {
        self.vm.fails(Chore::Load)?;
        let (mut at, mut bytes) = (0, vec![0; 100_000]);
        loop {
            pause(world().delay(VM_STEP / 10));
            let read = state.read(&mut bytes);
            let count = read.map_err(|source| VmError::Io { doing: "reading its state", source })?;
            let saved = self.vm.state.borrow();
            let rest = saved.get(at..).unwrap_or_default();
            assert!(
                if count == 0 { rest.is_empty() } else { rest.starts_with(&bytes[..count]) },
                "the state is not what was saved"
            );
            if count == 0 {
                return Ok(());
            }
            at += count;
        }
    }

    fn start(&mut self, paused: bool) -> Result<(), VmError> {
        let on_start = self.vm.on_start.borrow().clone();
        if let Some(on_start) = on_start {
            on_start();
        }
        self.vm.fails(Chore::Start)?;
        self.vm.starts_there(self.session, &self.memory, paused);
        Ok(())
    }
}
