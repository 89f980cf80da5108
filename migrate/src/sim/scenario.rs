//! One seed's story: a VM that is to move from one host to another, up to three times, with a daemon at the other host as `vmemd serve`
//! is one, and faults on the way. The last attempt has none.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};
use std::time::Duration;

use super::coverage::Coverage;
use super::engine::EngineHandle;
use super::faults::{Class, Fault, Later, Planned, Step, is_impossible};
use super::net::{self, Countdown, Said, StdStream};
use super::runtime::{pause, timeout};
use super::vm::{Chore, Coming, Leaving, SESSIONS, Vm, record_of};
use super::world::{ProcessId, World, world};
use super::{fs, memory};
use crate::cancel::CancelFlag;
use crate::hello::{Hello, RefuseKind, SessionHello, read_hello, refuse};
use crate::registry::{FileRegistry, Outcome, Registry};
use crate::resolve::{answer_resolve, resolve};
use crate::session::SessionId;
use crate::source::{SendError, SourceOptions, send};
use crate::target::{DataStream, PlainMemory, TargetLink, TargetMemory, receive};
use crate::tls::Security;
use crate::wire::record::{FLAG_LAST, Kind};

const SOURCE: usize = 0;
const TARGET: usize = 1;
const ATTEMPTS: u32 = 3;
/// As the VM's process has it.
const STREAM_TIMEOUT: Duration = Duration::from_secs(20);
const REBOOT: Duration = Duration::from_secs(40);
/// A silence that outlasts every limit.
const LONG: Duration = Duration::from_secs(1800);
/// Between two questions of the VM's user, or two attempts.
const PATIENCE: Duration = Duration::from_secs(45);
/// No session takes longer, whatever happens to it.
const SESSION_MAX: Duration = Duration::from_secs(360);
/// What a session may take of this process's memory, besides the VM's own: records and messages on their way.
const MEMORY_MAX: usize = 96 << 20;

/// A receiving process.
struct Receiver {
    process: ProcessId,
    streams: Rc<RefCell<Handed>>,
    cancel: Rc<CancelFlag>,
    engine: Option<EngineHandle>,
    /// Its session has ended.
    ended: bool,
}

/// Connections that the daemon has passed on.
#[derive(Default)]
struct Handed {
    queue: VecDeque<DataStream>,
    waiting: Option<Waker>,
    daemon: Option<ProcessId>,
}

pub(crate) struct Story {
    vm: Rc<Vm>,
    registry: FileRegistry,
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
    let registry = FileRegistry::new(Path::new(SESSIONS)).expect("a directory");
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
        if (source_alive && !self.done.get()) || !self.is_quiet() {
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
            self.draw_faults(target);
            if world().random.one_in(10) {
                self.vm.lose_some();
            }
        }
        self.reached(Step::Connecting);
    }

    fn options(&self) -> SourceOptions {
        let random = &world().random;
        SourceOptions {
            streams: 1 + random.below(3) as u32,
            downtime_target: Duration::from_millis(random.below(50)),
            max_rounds: 1 + random.below(5) as u32,
            max_throttle: random.pick(&[0, 60, 99]),
            check_placement: random.one_in(3),
            security: Security::Plain,
            ..SourceOptions::new("web", net::address_of(TARGET).to_string())
        }
    }

    /// One attempt, to its end. True: the VM is not here any more.
    fn attempt(&self, last: bool) -> bool {
        let (began, options) = (world().now(), self.options());
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
                use crate::vm::SourceVm;
                let mut leaving = Leaving(self.vm.clone());
                leaving.take_name_back();
                leaving.resume().expect("it can go on");
                self.vm.assert_stays();
                false
            }
        }
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

    // ── the target's daemon ─────────────────────────────────────────────────────────────

    fn serve(self: &Rc<Self>) {
        let world = world();
        let daemon = world.process("the daemon");
        net::place(daemon, TARGET);
        self.daemon.set(Some(daemon));
        let story = self.clone();
        world.spawn(daemon, move || {
            let port = net::listen(TARGET, net::PORT);
            loop {
                let (socket, story) = (port.accept(), story.clone());
                super::world::world().spawn(daemon, move || story.greet(socket, daemon));
            }
        });
    }

    fn greet(self: Rc<Self>, mut socket: StdStream, daemon: ProcessId) {
        match read_hello(&mut socket) {
            Ok(Hello::Session(hello)) => self.admit(socket, hello, daemon),
            Ok(Hello::Stream(hello)) => {
                let receivers = self.receivers.borrow();
                let taker =
                    receivers.get(&hello.session).filter(|it| !it.ended && world().is_alive(it.process));
                let handed = taker.filter(|it| it.streams.borrow().daemon == Some(daemon));
                if let Some(receiver) = handed {
                    socket.pass_to(receiver.process);
                    let mut handed = receiver.streams.borrow_mut();
                    handed.queue.push_back(DataStream { index: hello.index, socket });
                    handed.waiting.take().into_iter().for_each(Waker::wake);
                    return;
                }
                drop(receivers);
                refuse(&mut socket, RefuseKind::Other, "this session is not being received here");
            }
            Ok(Hello::Resolve { session }) => {
                let _ = answer_resolve(&mut socket, session, &self.registry);
            }
            Err(error) => world().note(|| format!("the daemon closed a connection: {error:?}")),
        }
    }

    fn admit(self: &Rc<Self>, mut control: StdStream, hello: SessionHello, daemon: ProcessId) {
        if let Some(kind) = self.turned.take() {
            return refuse(&mut control, kind, "not today");
        }
        if !self.is_quiet() || self.vm.started.get().is_some() {
            return refuse(&mut control, RefuseKind::NameTaken, "it is arriving");
        }
        let world = world();
        let process = world.process("the target");
        net::place(process, TARGET);
        control.pass_to(process);
        // Without an engine no page can be poisoned.
        let memory = if world.random.one_in(4) && !self.vm.has_lost() {
            TargetMemory::Plain(PlainMemory::new(hello.memory_bytes).expect("address space"))
        } else {
            TargetMemory::Engine(EngineHandle::new(swapd::units::pages_in(hello.memory_bytes)))
        };
        let receiver = Receiver {
            process,
            streams: Rc::new(RefCell::new(Handed { daemon: Some(daemon), ..Handed::default() })),
            cancel: Rc::default(),
            engine: match &memory {
                TargetMemory::Engine(engine) => Some(engine.clone()),
                TargetMemory::Plain(_) => None,
            },
            ended: false,
        };
        let (streams, cancel) = (receiver.streams.clone(), receiver.cancel.clone());
        let session = hello.session;
        // A session that came before is another's, also if it has the same name.
        self.receivers.borrow_mut().entry(session).or_insert(receiver);
        let story = self.clone();
        world.spawn(process, move || story.arrive(control, hello, memory, &streams, &cancel));
    }

    fn arrive(
        self: Rc<Self>,
        control: StdStream,
        hello: SessionHello,
        memory: TargetMemory,
        streams: &RefCell<Handed>,
        cancel: &CancelFlag,
    ) {
        let (began, session, me) = (world().now(), hello.session, world().me());
        let mut streams = || next_stream(streams);
        let link = TargetLink {
            control,
            granted_ram_bytes: hello.memory_bytes,
            hello,
            streams: &mut streams,
            registry: &self.registry,
            progress: &|_| {},
            cancel,
        };
        let mut coming = Coming { vm: self.vm.clone(), session, memory: memory.clone() };
        let result = receive(link, memory, &mut coming);
        world().note(|| format!("the target's session has ended: {result:?}"));
        let took = world().now() - began;
        assert!(took < SESSION_MAX, "the target's session took {took:?}");
        let started = self.vm.started.get() == Some((session, me));
        let how = match &result {
            Ok(_) => "arrived".to_string(),
            Err(error) => super::coverage::summary(error),
        };
        self.coverage.borrow_mut().target(how);
        let record = fs::content(&record_of(session));
        let committed = record.as_deref() == Some(b"COMMIT \n".as_slice());
        assert!(started || !committed, "it has not been started, and is recorded as running here");
        assert_eq!(
            result.is_ok(),
            started,
            "{result:?}, and it was {}started here",
            if started { "" } else { "not " }
        );
        if let TargetMemory::Engine(engine) = &coming.memory {
            engine.assert_at_rest();
        }
        if let Some(receiver) = self.receivers.borrow_mut().get_mut(&session).filter(|it| it.process == me) {
            receiver.ended = true;
            receiver.streams.borrow_mut().queue.clear();
        }
        if !started {
            // The process ends.
            let story = self.clone();
            world().after(Duration::ZERO, move || {
                world().kill(me);
                story.reap(session);
            });
        }
    }

    /// The daemon notices that a receiving process is no more.
    fn reap(self: &Rc<Self>, session: SessionId) {
        if let Some(daemon) = self.daemon.get() {
            let story = self.clone();
            world().spawn(daemon, move || drop(story.registry.burn(session)));
        }
    }

    // ── what goes wrong ─────────────────────────────────────────────────────────────────

    fn heard(self: &Rc<Self>, said: Said) {
        const SESSION: u8 = 1;
        const STREAM: u8 = 2;
        const RESOLVE: u8 = 3;
        const ACCEPTED: u8 = 65;
        const RESOLVED: u8 = 67;
        let to_target = said.end.side == 0;
        let kind = |kind: Kind| said.kind == kind as u8;
        let step = match said.purpose {
            RESOLVE if said.kind == RESOLVE => Step::Asked,
            RESOLVE if said.kind == RESOLVED => Step::Resolved,
            STREAM if kind(Kind::RoundEnd) && said.flags & FLAG_LAST != 0 => Step::LastRound,
            SESSION if said.kind == SESSION => Step::Offered,
            SESSION if said.kind == ACCEPTED => Step::Accepted,
            SESSION if to_target && kind(Kind::Heat) => Step::HeatSent,
            SESSION if to_target && kind(Kind::State) => Step::StateSent,
            SESSION if to_target && kind(Kind::Final) => Step::FinalSent,
            SESSION if to_target && kind(Kind::Commit) => Step::CommitSent,
            SESSION if kind(Kind::HeatTaken) => Step::FirstRound,
            SESSION if kind(Kind::RoundDone) => Step::LaterRounds,
            SESSION if kind(Kind::Prepared) => Step::Prepared,
            SESSION if kind(Kind::Running) || kind(Kind::NotStarted) => Step::Answered,
            _ => return,
        };
        self.reached(step);
    }

    fn reached(self: &Rc<Self>, step: Step) {
        if step < self.step.get() || (step == self.step.get() && step != Step::Connecting) {
            return;
        }
        self.step.set(step);
        let due: Vec<Planned> =
            self.plan.borrow_mut().extract_if(.., |planned| planned.step == step).collect();
        for Planned { later, fault, .. } in due {
            let story = self.clone();
            let strike = move || story.strike(fault);
            match later {
                Later::Now => world().after(Duration::ZERO, strike),
                Later::Time(time) => world().after(time, strike),
                Later::Bytes { side, count } => {
                    let countdown = Countdown { side, left: count, then: Box::new(strike) };
                    net::with(|net| net.countdown = Some(countdown));
                }
            }
        }
    }

    fn receiving(&self) -> Option<(SessionId, ProcessId)> {
        let receivers = self.receivers.borrow();
        let alive = receivers.iter().filter(|(_, it)| world().is_alive(it.process));
        alive.map(|(session, it)| (*session, it.process)).max_by_key(|(_, process)| *process)
    }

    fn strike(self: &Rc<Self>, fault: Fault) {
        if self.done.get() && self.is_quiet() {
            return;
        }
        world().note(|| format!("{fault:?} at {:?}", self.step.get()));
        if let Some(class) = fault.class() {
            self.coverage.borrow_mut().fault(self.step.get(), class);
        }
        match fault {
            Fault::Cut { all } => net::cut(all),
            Fault::Silence { silent, lasts } => {
                net::silence(silent);
                world().after(lasts, || net::silence([false; 2]));
            }
            Fault::SourceDies => {
                self.killed.set(self.killed.get() || self.vm.started.get().is_none());
                world().kill(self.vm.process);
            }
            Fault::TargetDies => {
                if let Some((session, process)) = self.receiving() {
                    self.target_dies(process);
                    self.reap(session);
                }
            }
            Fault::DaemonDies => self.daemon_dies(Duration::from_secs(5)),
            Fault::HostCrashes => {
                net::crash(TARGET);
                net::silence([true; 2]);
                let alive: Vec<ProcessId> = self.receivers.borrow().values().map(|it| it.process).collect();
                alive
                    .into_iter()
                    .filter(|process| world().is_alive(*process))
                    .for_each(|process| self.target_dies(process));
                self.daemon_dies(REBOOT);
                fs::crash();
                world().after(REBOOT, || net::silence([false; 2]));
            }
            Fault::Fails(chore) => self.vm.failing.set(Some(chore)),
            Fault::EngineFails { source: true } => {
                self.vm.engine.fail(true);
                let engine = self.vm.engine.clone();
                world().after(PATIENCE, move || engine.fail(false));
            }
            Fault::EngineFails { source: false } => {
                self.receivers
                    .borrow()
                    .values()
                    .filter_map(|it| it.engine.as_ref())
                    .for_each(|engine| engine.fail(true));
            }
            Fault::Cancel { source: true } => self.cancel.borrow().store(true, Ordering::Relaxed),
            Fault::Cancel { source: false } => {
                self.receivers.borrow().values().for_each(|it| it.cancel.store(true, Ordering::Relaxed));
            }
            Fault::Disk { skip, count } => fs::fail(skip, count),
            Fault::Turned(kind) => self.turned.set(Some(kind)),
            Fault::Spoilt { after } => net::with(|net| net.spoil = Some(after)),
            Fault::Twice => net::with(|net| net.twice = 1),
        }
    }

    fn target_dies(&self, process: ProcessId) {
        // Its source may have given the VM up already, or be about to.
        self.killed.set(true);
        world().kill(process);
    }

    /// And is started again.
    fn daemon_dies(self: &Rc<Self>, away: Duration) {
        if let Some(daemon) = self.daemon.take() {
            for receiver in self.receivers.borrow().values() {
                let mut handed = receiver.streams.borrow_mut();
                handed.daemon = None;
                handed.waiting.take().into_iter().for_each(Waker::wake);
            }
            world().kill(daemon);
            let story = self.clone();
            world().after(away, move || story.serve());
        }
    }

    // ── the plan ────────────────────────────────────────────────────────────────────────

    fn draw_faults(&self, target: Option<(Step, Class)>) {
        let random = &world().random;
        let mut plan = Vec::new();
        if let Some((step, class)) = target.filter(|(step, class)| !is_impossible(*step, *class)) {
            if step >= Step::Asked {
                // Something must make the source ask.
                let fault = random.pick(&[Fault::Cut { all: true }, Fault::TargetDies]);
                let step = random.pick(&[Step::CommitSent, Step::Recorded]);
                plan.push(Planned { step, later: Later::Now, fault });
            }
            let later = if random.one_in(2) { Later::Now } else { later() };
            plan.push(Planned { step, later, fault: self.draw(class, step) });
        }
        if target.is_none() && random.one_in(2) {
            let step = random.pick(&[Step::Connecting, Step::Accepted]);
            plan.push(Planned { step, later: Later::Now, fault: Fault::Twice });
        }
        if random.one_in(8) {
            // What one stream has of the last round, and nothing else, is lost.
            plan.push(Planned { step: Step::LastRound, later: Later::Now, fault: Fault::Cut { all: false } });
        }
        while random.one_in(3) {
            let step = random.pick(&Step::ALL);
            let class = random.pick(&Class::ALL);
            let fault = match random.below(4) {
                0 => Fault::Twice,
                1 => Fault::Spoilt { after: random.below(300_000) },
                _ => self.draw(class, step),
            };
            plan.push(Planned { step, later: later(), fault });
        }
        if random.one_in(8) && !plan.iter().any(|planned| matches!(planned.fault, Fault::Disk { .. })) {
            // The commit may come when it has been asked for already, and still in time.
            plan.push(Planned {
                step: Step::CommitSent,
                later: Later::Now,
                fault: Fault::Silence { silent: [true, false], lasts: Duration::from_secs(14) },
            });
        }
        world().note(|| format!("planned: {plan:?}"));
        *self.plan.borrow_mut() = plan;
    }

    fn draw(&self, class: Class, step: Step) -> Fault {
        let random = &world().random;
        match class {
            Class::Cut => Fault::Cut { all: random.one_in(3) },
            Class::Silence => {
                let silent = random.pick(&[[true, true], [true, false], [false, true]]);
                // Just long enough that the source asks while its commit is still on its way.
                let [short, middle] = [14, 25].map(Duration::from_secs);
                let lasts = if step == Step::CommitSent {
                    random.pick(&[short, short, LONG])
                } else {
                    random.pick(&[Duration::from_secs(1), short, middle, LONG, LONG])
                };
                Fault::Silence { silent, lasts }
            }
            Class::SourceDies => Fault::SourceDies,
            Class::TargetDies => Fault::TargetDies,
            Class::HostDies => random.pick(&[Fault::DaemonDies, Fault::HostCrashes]),
            Class::Refusal => draw_refusal(step),
        }
    }
}

fn draw_refusal(step: Step) -> Fault {
    let random = &world().random;
    let disk = Fault::Disk { skip: random.below(3) as u32, count: 1 + random.below(4) as u32 };
    let anybody = [
        Fault::Cancel { source: true },
        Fault::Cancel { source: false },
        Fault::EngineFails { source: true },
        Fault::EngineFails { source: false },
    ];
    match step {
        Step::Connecting => {
            let kinds = [RefuseKind::Version, RefuseKind::NameTaken, RefuseKind::NoRoom, RefuseKind::Other];
            Fault::Turned(random.pick(&kinds))
        }
        Step::Offered => random.pick(&[disk, Fault::Cancel { source: true }]),
        Step::LaterRounds => random.pick(&[
            Fault::Fails(Chore::Drain),
            Fault::Fails(Chore::Pause),
            Fault::Fails(Chore::Save),
            anybody[0],
            anybody[2],
            anybody[3],
        ]),
        Step::StateSent | Step::LastRound | Step::FinalSent => random.pick(&[
            Fault::Fails(Chore::Load),
            Fault::Fails(Chore::GiveUpName),
            anybody[1],
            anybody[3],
            disk,
        ]),
        Step::Prepared | Step::CommitSent => {
            random.pick(&[Fault::Fails(Chore::Start), Fault::Fails(Chore::Start), disk, disk, anybody[1]])
        }
        Step::Recorded => random.pick(&[Fault::Fails(Chore::Start), Fault::Fails(Chore::Start), disk]),
        Step::Asked => random.pick(&[disk, Fault::Cancel { source: true }]),
        _ => random.pick(&anybody),
    }
}

fn later() -> Later {
    let random = &world().random;
    match random.below(3) {
        0 => Later::Now,
        1 => {
            let most = random.pick(&[40, 2000, 100_000]);
            Later::Bytes { side: random.below(2) as usize, count: 1 + random.below(most) }
        }
        _ => Later::Time(world().delay(random.pick(&[Duration::from_millis(20), Duration::from_secs(1)]))),
    }
}

fn next_stream(handed: &RefCell<Handed>) -> io::Result<DataStream> {
    let next = poll_fn(|context| {
        let mut handed = handed.borrow_mut();
        match handed.queue.pop_front() {
            Some(stream) => Poll::Ready(Ok(stream)),
            None if handed.daemon.is_none() => Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
            None => {
                handed.waiting = Some(context.waker().clone());
                Poll::Pending
            }
        }
    });
    world().block(timeout(STREAM_TIMEOUT, next)).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
