//! The VM: a guest at the source, what each side's process does with it, and who watches that it runs at one place
//! only.

use std::cell::{Cell, RefCell};
use std::io::{Read, Write};
use std::ops::Deref;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use swapd::{PAGE_SIZE, PageNo};

use super::engine::content;
use super::fs;
use super::guest::{Chore, Guest};
use super::runtime::pause;
use super::world::{ProcessId, world};
use crate::session::SessionId;
use crate::target::{PlainMemory, TargetMemory};
use crate::vm::{LiveVm, SourceVm, TargetVm, VmError};

pub(crate) const SESSIONS: &str = "/sessions";
/// Between two reads of the state, at most.
const LOAD_STEP: Duration = Duration::from_millis(2);

/// The VM, wherever it is.
pub(crate) struct Vm {
    guest: Rc<Guest>,
    pub(crate) named: Cell<bool>,
    /// Where it was let run, or taken over to stand still: once, for ever.
    pub(crate) started: Cell<Option<(SessionId, ProcessId)>>,
    /// The commit is recorded, and the VM starts now.
    pub(crate) on_start: RefCell<Option<Rc<dyn Fn()>>>,
}

impl Deref for Vm {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        &self.guest
    }
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
        Rc::new(Vm {
            guest: Guest::new(process, pages),
            named: Cell::new(true),
            started: Cell::new(None),
            on_start: RefCell::new(None),
        })
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
        self.gone.set(true);
    }

    fn compare(&self, memory: &TargetMemory) {
        let (truth, lost) = (self.truth(), self.lost());
        for page in (0..self.pages).map(PageNo) {
            let generation = truth[page.index()];
            if generation == 0 && matches!(memory, TargetMemory::Engine(engine) if engine.is_zero(page)) {
                continue;
            }
            let found = match memory {
                TargetMemory::Engine(engine) => engine.look(page),
                TargetMemory::Plain(memory) => Some(look_at(memory, page)),
            };
            match found {
                None => assert!(lost.contains(&page), "{page} is poisoned at the target, and was not lost"),
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
        self.0.guest.drain()
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.0.guest.pause()
    }

    fn stood_still(&self) -> bool {
        self.0.stood_still
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.0.goes_on_here();
        Ok(())
    }

    fn save(&mut self, to: &mut dyn Write) -> Result<(), VmError> {
        self.0.guest.save(to)
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
            pause(world().delay(LOAD_STEP));
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
