//! One seed's story: a VM that is to move from one host to another, up to three times, with a daemon at the other host
//! as `vmemd serve` is one, and faults on the way. The last attempt has none.

mod daemon;
mod plan;
mod strikes;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use daemon::Receiver;

use super::coverage::Coverage;
use super::faults::{Class, Planned, Step};
use super::net;
use super::runtime::pause;
use super::vm::{Leaving, SESSIONS, Vm, record_of, says};
use super::world::{ProcessId, World, world};
use super::{fs, memory};
use crate::cancel::CancelFlag;
use crate::registry::{Outcome, Registry};
use crate::resolve::{ResolveError, resolve};
use crate::session::SessionId;
use crate::source::{SendError, SourceOptions, send};
use crate::tls::Security;
use crate::wire::opening::RefuseKind;

const SOURCE: usize = 0;
const TARGET: usize = 1;
const ATTEMPTS: u32 = 3;
/// A silence that outlasts every limit.
const LONG: Duration = Duration::from_secs(1800);
/// Between two questions of the VM's user, or two attempts.
const PATIENCE: Duration = Duration::from_secs(45);
/// No session takes longer, whatever happens to it.
const SESSION_MAX: Duration = Duration::from_secs(360);
/// What a session may take of this process's memory, besides the VM's own: records and messages on their way.
const MEMORY_MAX: usize = 96 << 20;

pub(crate) struct Story {
    vm: Rc<Vm>,
    registry: Registry,
    daemon: Cell<Option<ProcessId>>,
    receivers: RefCell<BTreeMap<SessionId, Receiver>>,
    plan: RefCell<Vec<Planned>>,
    step: Cell<Step>,
    cancel: RefCell<Rc<CancelFlag>>,
    turned: Cell<Option<RefuseKind>>,
    done: Cell<bool>,
    /// The process that had the VM was killed, so nobody has it any more.
    killed: Cell<bool>,
    coverage: RefCell<Coverage>,
}

/// One seed, with everything checked on the way.
pub(crate) fn run(seed: u64, target: Option<(Step, Class)>, coverage: &mut Coverage) -> Result<(), String> {
    let story: Rc<RefCell<Option<Rc<Story>>>> = Rc::default();
    let (begun, ending) = (story.clone(), story.clone());
    let before = memory::in_use();
    memory::reset_peak();
    let result = World::run(
        seed,
        move || *begun.borrow_mut() = Some(begin(target)),
        move || ending.borrow().as_ref().is_some_and(|story| story.is_over()),
    );
    net::end();
    let story = story.borrow_mut().take();
    if let Some(story) = story {
        coverage.add(&story.coverage.borrow());
        // The world has ended: nothing of it is left in circles.
        story.vm.on_start.borrow_mut().take();
    }
    result?;
    let peak = memory::peak().saturating_sub(before);
    coverage.peak_bytes = coverage.peak_bytes.max(peak as u64);
    if peak > MEMORY_MAX { Err(format!("{peak} bytes of memory taken at once")) } else { Ok(()) }
}

fn begin(target: Option<(Step, Class)>) -> Rc<Story> {
    net::begin();
    fs::begin();
    let world = world();
    let source = world.process("the source");
    net::place(source, SOURCE);
    let pages = 512 * (2 + world.random.below(2));
    let vm = Vm::new(source, pages);
    let registry = Registry::new(Path::new(SESSIONS)).expect("a directory");
    let story = Rc::new(Story {
        vm,
        registry,
        daemon: Cell::new(None),
        receivers: RefCell::default(),
        plan: RefCell::default(),
        step: Cell::new(Step::Connecting),
        cancel: RefCell::default(),
        turned: Cell::new(None),
        done: Cell::new(false),
        killed: Cell::new(false),
        coverage: RefCell::default(),
    });
    let (watching, starting) = (Rc::downgrade(&story), Rc::downgrade(&story));
    net::with(|net| {
        net.watcher = Some(Rc::new(move |said| {
            if let Some(story) = watching.upgrade() {
                story.heard(said);
            }
        }));
    });
    *story.vm.on_start.borrow_mut() = Some(Rc::new(move || {
        if let Some(story) = starting.upgrade() {
            story.reached(Step::Recorded);
        }
    }));
    story.serve();
    let leaving = story.clone();
    world.spawn(source, move || leaving.leave(target));
    story
}

impl Story {
    fn is_over(&self) -> bool {
        let source_alive = world().is_alive(self.vm.process);
        if (source_alive && !self.done.get()) || !self.is_quiet() || !self.is_recorded() {
            return false;
        }
        self.check_the_end(source_alive);
        true
    }

    /// No session is being received.
    fn is_quiet(&self) -> bool {
        let receivers = self.receivers.borrow();
        receivers.values().all(|it| it.ended || !world().is_alive(it.process))
    }

    /// That it runs there is known after a crash of the host, too, as soon as the disk allows.
    fn is_recorded(&self) -> bool {
        let running = self.vm.started.get().filter(|(_, process)| world().is_alive(*process));
        running.is_none_or(|(session, _)| says(fs::flushed(&record_of(session)), b"COMMIT \n"))
    }

    fn check_the_end(&self, source_alive: bool) {
        let there = self.vm.started.get();
        let here = source_alive && self.vm.named.get();
        assert!(!(here && there.is_some()), "two have it in the end");
        if !here && there.is_none() {
            assert!(self.killed.get(), "nobody has it in the end, and nobody who had it was killed");
        }
    }

    // ── the source's process ────────────────────────────────────────────────────────────

    fn leave(self: Rc<Self>, target: Option<(Step, Class)>) {
        for attempt in 1..=ATTEMPTS {
            let last = attempt == ATTEMPTS;
            if last {
                self.heal();
            }
            self.begin_attempt(if attempt == 1 { target } else { None }, last);
            if self.attempt(last) {
                break;
            }
            self.plan.borrow_mut().clear();
            pause(world().delay(PATIENCE));
        }
        self.done.set(true);
    }

    /// Everything works again, and what was left of before has ended.
    fn heal(&self) {
        self.plan.borrow_mut().clear();
        // What is due has struck.
        pause(Duration::from_secs(2));
        // Each side's own limits end what is left.
        self.wait_until("a target does not give up", || self.is_quiet());
        net::with(|net| (net.countdown, net.spoil, net.twice) = (None, None, 0));
        net::silence([false; 2]);
        fs::heal();
        self.vm.engine.fail(false);
        self.vm.failing.set(None);
        self.turned.set(None);
        self.wait_until("no daemon", || self.is_quiet() && self.daemon.get().is_some());
        // Connections of before have noticed that the link is back.
        pause(PATIENCE);
    }

    fn wait_until(&self, what: &str, holds: impl Fn() -> bool) {
        let mut waited = Duration::ZERO;
        while !holds() {
            assert!(waited < SESSION_MAX, "{what}");
            pause(PATIENCE);
            waited += PATIENCE;
        }
    }

    fn begin_attempt(self: &Rc<Self>, target: Option<(Step, Class)>, last: bool) {
        *self.cancel.borrow_mut() = Rc::default();
        self.step.set(Step::Connecting);
        if !last {
            *self.plan.borrow_mut() = plan::draw(target);
            if world().random.one_in(10) {
                self.vm.lose_some();
            }
        }
        self.reached(Step::Connecting);
    }

    fn options(&self, last: bool) -> SourceOptions {
        let random = &world().random;
        SourceOptions {
            streams: 1 + random.below(3) as u32,
            downtime_target: Duration::from_millis(random.below(50)),
            max_downtime: (!last && random.one_in(6)).then(|| Duration::from_millis(10 + random.below(200))),
            max_rounds: 1 + random.below(5) as u32,
            max_throttle: random.pick(&[0, 60, 99]),
            check_placement: random.one_in(3),
            security: Security::Plain,
            ..SourceOptions::new("web", net::address_of(TARGET).to_string())
        }
    }

    /// One attempt, to its end. True: the VM is not here any more.
    fn attempt(&self, last: bool) -> bool {
        let (began, options) = (world().now(), self.options(last));
        let cancel = self.cancel.borrow().clone();
        let mut leaving = Leaving(self.vm.clone());
        let result = send(&self.vm.engine, &mut leaving, &options, &|_| {}, &cancel);
        let took = world().now() - began;
        world().note(|| format!("the source's session has ended: {result:?}"));
        assert!(took < SESSION_MAX, "the source's session took {took:?}");
        self.vm.engine.assert_at_rest();
        let how = match &result {
            Ok(report) if report.resolved_later => "moved, by asking".to_string(),
            Ok(_) => "moved".to_string(),
            Err(error) => crate::sim::coverage::summary(error),
        };
        self.coverage.borrow_mut().source(how);
        match result {
            Ok(report) => self.moved(report.session),
            Err(SendError::InDoubt { session, to }) => {
                assert!(!last, "in doubt, and nothing was wrong");
                return self.in_doubt(session, &to);
            }
            Err(error) => {
                assert!(!last, "not moved, and nothing was wrong: {error:?}");
                self.vm.assert_stays();
                return false;
            }
        }
        true
    }

    /// The VM stays paused until it is known.
    fn in_doubt(&self, session: SessionId, to: &str) -> bool {
        assert!(!self.vm.runs.get(), "in doubt, and it runs here");
        let outcome = loop {
            pause(PATIENCE);
            match resolve(to, &Security::Plain, session) {
                Ok(outcome) => break outcome,
                Err(ResolveError::Refused { text, .. }) if text.contains("--force run-here") => {
                    break self.decide(session);
                }
                Err(error) => world().note(|| format!("still in doubt: {error:?}")),
            }
        };
        world().note(|| format!("no longer in doubt: {outcome:?}"));
        self.coverage.borrow_mut().source(format!("in doubt, then {outcome:?}"));
        match outcome {
            Outcome::RunningThere => {
                self.moved(session);
                true
            }
            Outcome::NotThere => {
                use crate::vm::{LiveVm, SourceVm};
                let mut leaving = Leaving(self.vm.clone());
                leaving.take_name_back();
                leaving.resume().expect("it can go on");
                self.vm.assert_stays();
                false
            }
        }
    }

    /// As the operator does, whom nobody can tell what has been recorded.
    fn decide(&self, session: SessionId) -> Outcome {
        let alive = self.receivers.borrow().get(&session).is_some_and(|it| world().is_alive(it.process));
        assert!(!alive || fs::was_swept(), "the record is said to be lost, and whoever made it is alive");
        assert!(
            fs::has_crashed() || fs::was_swept(),
            "the record is said to be lost, and nothing took it away"
        );
        if self.vm.started.get().is_some() { Outcome::RunningThere } else { Outcome::NotThere }
    }

    /// The source gives it up: so the target has it, or had it when it was killed.
    fn moved(&self, session: SessionId) {
        assert!(!self.vm.runs.get(), "it has moved, and runs here");
        self.vm.named.set(false);
        let alive = self.receivers.borrow().get(&session).map(|it| world().is_alive(it.process));
        match self.vm.started.get() {
            Some((started, _)) => assert_eq!(started, session, "it has moved in another session"),
            // Recorded, and about to be started.
            None if alive == Some(true) => {}
            None => assert_eq!(alive, Some(false), "it has moved, and the target knows nothing of it"),
        }
    }
}
