//! One simulated world: a clock, processes with threads in them, and what happens when. All of it on one thread of the
//! test, so the same seed gives the same run.
//!
//! A simulated thread is a coroutine. It runs until it waits for something; then the next one that can go on is drawn
//! by lot. When none can, the clock jumps to the next event. A process that is killed has its threads unwound from
//! where they wait.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::BinaryHeap;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};

use super::random::Random;

/// No world lives longer: something in it does not end.
const END: Duration = Duration::from_secs(4 * 3600);
/// Of what happened, told when a seed fails.
const TRACE_LINES: usize = 60;
const STACK_BYTES: usize = 512 << 10;

type DeathHook = Box<dyn Fn(ProcessId)>;
type Thread = Coroutine<(), (), (), DefaultStack>;

#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub struct ProcessId(pub usize);

/// What a thread of a killed process is unwound with.
struct Killed;

struct Actor {
    process: ProcessId,
    thread: Option<Thread>,
    yielder: *const Yielder<(), ()>,
    /// Tasks of its runtime that can go on.
    tasks: Vec<usize>,
    ready: bool,
}

struct Process {
    name: String,
    alive: bool,
}

struct Event {
    at: u64,
    tie: u64,
    act: Box<dyn FnOnce()>,
}

impl PartialEq for Event {
    fn eq(&self, other: &Event) -> bool {
        (self.at, self.tie) == (other.at, other.tie)
    }
}

impl Eq for Event {}

impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Event) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Event {
    /// The heap has the greatest on top: the earliest.
    fn cmp(&self, other: &Event) -> std::cmp::Ordering {
        (other.at, other.tie).cmp(&(self.at, self.tie))
    }
}

pub struct World {
    pub random: Random,
    now: Cell<u64>,
    events: RefCell<BinaryHeap<Event>>,
    actors: RefCell<Vec<Actor>>,
    ready: RefCell<Vec<usize>>,
    current: Cell<Option<usize>>,
    processes: RefCell<Vec<Process>>,
    /// Called when a process has died, before its threads are unwound: the kernel closes what it had open.
    on_death: RefCell<Vec<DeathHook>>,
    trace: RefCell<Vec<(u64, String)>>,
    panic: RefCell<Option<Box<dyn Any + Send>>>,
}

thread_local! {
    static WORLD: RefCell<Option<Rc<World>>> = const { RefCell::new(None) };
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// The world that this thread is in.
pub fn world() -> Rc<World> {
    current().expect("a simulation runs on this thread")
}

pub(super) fn current() -> Option<Rc<World>> {
    WORLD.with(|world| world.borrow().clone())
}

/// Wakes a task of an actor's runtime, or (task 0) the actor itself.
struct Alarm {
    actor: usize,
    task: usize,
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // A world that has ended wakes nobody.
        if let Some(world) = current() {
            world.wake(self.actor, self.task);
        }
    }
}

impl World {
    /// Runs `begin` in a fresh world, and then all that it started, until `done`. Panics are the seed's failure.
    pub fn run(seed: u64, begin: impl FnOnce(), done: impl Fn() -> bool) -> Result<(), String> {
        let world = Rc::new(World {
            random: Random::new(seed),
            now: Cell::new(0),
            events: RefCell::default(),
            actors: RefCell::default(),
            ready: RefCell::default(),
            current: Cell::new(None),
            processes: RefCell::default(),
            on_death: RefCell::default(),
            trace: RefCell::default(),
            panic: RefCell::new(None),
        });
        WORLD.with(|slot| *slot.borrow_mut() = Some(world.clone()));
        let result = catch_unwind(AssertUnwindSafe(|| {
            begin();
            world.turn(&done);
        }));
        // Whatever is left is unwound, as if everything had been killed.
        let left = world.processes.borrow().len();
        let ended =
            catch_unwind(AssertUnwindSafe(|| (0..left).for_each(|process| world.kill(ProcessId(process)))));
        world.events.borrow_mut().clear();
        let result = result.and(ended).map_err(|panic| format!("{}{}", text_of(&*panic), world.told()));
        world.on_death.borrow_mut().clear();
        WORLD.with(|slot| *slot.borrow_mut() = None);
        result
    }

    fn turn(&self, done: &impl Fn() -> bool) {
        while !done() {
            let ready = self.ready.borrow().len() as u64;
            if ready > 0 {
                let chosen = self.ready.borrow_mut().swap_remove(self.random.below(ready) as usize);
                self.actors.borrow_mut()[chosen].ready = false;
                self.resume(chosen);
                continue;
            }
            let event = self.events.borrow_mut().pop();
            let event = event.expect("nothing is ready, nothing will happen, and it is not done");
            self.now.set(event.at.max(self.now.get()));
            assert!(self.now() < END, "after {END:?} of virtual time something still goes on");
            (event.act)();
        }
    }

    fn resume(&self, actor: usize) {
        let thread = self.actors.borrow_mut()[actor].thread.take();
        let Some(mut thread) = thread else { return };
        let before = self.current.replace(Some(actor));
        let result = thread.resume(());
        self.current.set(before);
        match result {
            CoroutineResult::Yield(()) => self.actors.borrow_mut()[actor].thread = Some(thread),
            CoroutineResult::Return(()) => {
                STACKS.with(|stacks| stacks.borrow_mut().push(thread.into_stack()))
            }
        }
        if let Some(panic) = self.panic.borrow_mut().take() {
            resume_unwind(panic);
        }
    }

    pub fn process(&self, name: impl Into<String>) -> ProcessId {
        let mut processes = self.processes.borrow_mut();
        processes.push(Process { name: name.into(), alive: true });
        ProcessId(processes.len() - 1)
    }

    pub fn is_alive(&self, process: ProcessId) -> bool {
        self.processes.borrow()[process.0].alive
    }

    pub fn on_death(&self, hook: impl Fn(ProcessId) + 'static) {
        self.on_death.borrow_mut().push(Box::new(hook));
    }

    /// `kill -9`, not from within the process itself.
    pub fn kill(&self, process: ProcessId) {
        if !std::mem::replace(&mut self.processes.borrow_mut()[process.0].alive, false) {
            return;
        }
        self.note(|| format!("{} dies", self.processes.borrow()[process.0].name));
        self.on_death.borrow().iter().for_each(|hook| hook(process));
        let threads: Vec<usize> = {
            let actors = self.actors.borrow();
            (0..actors.len()).filter(|actor| actors[*actor].process == process).collect()
        };
        for actor in threads {
            assert_ne!(self.current.get(), Some(actor), "a process is killed from outside");
            self.resume(actor);
        }
    }

    /// A new thread of a process.
    pub fn spawn(&self, process: ProcessId, work: impl FnOnce() + 'static) {
        if !self.is_alive(process) {
            return;
        }
        let actor = self.actors.borrow().len();
        let stack = STACKS.with(|stacks| stacks.borrow_mut().pop());
        let stack = stack.unwrap_or_else(|| DefaultStack::new(STACK_BYTES).expect("memory for a stack"));
        let body = move |yielder: &Yielder<(), ()>, ()| {
            let world = world();
            world.actors.borrow_mut()[actor].yielder = yielder;
            if !world.is_alive(process) {
                return;
            }
            if let Err(panic) = catch_unwind(AssertUnwindSafe(work))
                && !panic.is::<Killed>()
            {
                *world.panic.borrow_mut() = Some(panic);
            }
        };
        self.actors.borrow_mut().push(Actor {
            process,
            thread: Some(Coroutine::with_stack(stack, body)),
            yielder: std::ptr::null(),
            tasks: Vec::new(),
            ready: true,
        });
        self.ready.borrow_mut().push(actor);
    }

    /// The process whose thread runs.
    pub fn me(&self) -> ProcessId {
        self.actors.borrow()[self.current.get().expect("called on a simulated thread")].process
    }

    /// Waits until somebody wakes this thread.
    pub fn park(&self) {
        assert!(!std::thread::panicking(), "a thread that unwinds waits for nothing");
        let actor = self.current.get().expect("only a simulated thread waits");
        let (yielder, process) = {
            let actors = self.actors.borrow();
            (actors[actor].yielder, actors[actor].process)
        };
        // SAFETY: the coroutine whose yielder this is runs at this moment, and suspends itself.
        unsafe { (*yielder).suspend(()) };
        if !self.is_alive(process) {
            resume_unwind(Box::new(Killed));
        }
    }

    fn wake(&self, actor: usize, task: usize) {
        let mut actors = self.actors.borrow_mut();
        let woken = &mut actors[actor];
        if !woken.tasks.contains(&task) {
            woken.tasks.push(task);
        }
        if !std::mem::replace(&mut woken.ready, true) {
            self.ready.borrow_mut().push(actor);
        }
    }

    /// Wakes that task of the thread that runs.
    pub fn waker(&self, task: usize) -> Waker {
        let actor = self.current.get().expect("only a simulated thread waits");
        Waker::from(Arc::new(Alarm { actor, task }))
    }

    /// A task of the running thread's runtime that can go on, by lot.
    pub fn next_task(&self) -> Option<usize> {
        let actor = self.current.get().expect("a runtime is on a simulated thread");
        let tasks = &mut self.actors.borrow_mut()[actor].tasks;
        (!tasks.is_empty()).then(|| tasks.swap_remove(self.random.below(tasks.len() as u64) as usize))
    }

    /// Makes a thread wait for something.
    pub fn block<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        let waker = self.waker(usize::MAX);
        loop {
            if let Poll::Ready(result) = work.as_mut().poll(&mut Context::from_waker(&waker)) {
                return result;
            }
            self.park();
        }
    }

    pub fn now(&self) -> Duration {
        Duration::from_nanos(self.now.get())
    }

    pub fn at(&self, when: Duration, act: impl FnOnce() + 'static) {
        // Events of the same moment happen in any order, but for those of one connection, which are apart in time.
        let tie = self.random.next();
        self.events.borrow_mut().push(Event { at: when.as_nanos() as u64, tie, act: Box::new(act) });
    }

    pub fn after(&self, delay: Duration, act: impl FnOnce() + 'static) {
        self.at(self.now() + delay, act);
    }

    /// Somewhat less than `most`, mostly much less.
    pub fn delay(&self, most: Duration) -> Duration {
        let share = self.random.below(1 << 16);
        Duration::from_nanos((most.as_nanos() as u64 >> 16) * ((share * share) >> 16))
    }

    pub fn note(&self, text: impl FnOnce() -> String) {
        let mut trace = self.trace.borrow_mut();
        if trace.len() >= 2 * TRACE_LINES {
            trace.drain(..TRACE_LINES);
        }
        trace.push((self.now.get(), text()));
    }

    fn told(&self) -> String {
        let trace = self.trace.borrow();
        let lines = trace[trace.len().saturating_sub(TRACE_LINES)..]
            .iter()
            .map(|(at, text)| format!("\n  {:>12.6} s  {text}", *at as f64 / 1e9));
        lines.collect()
    }
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without words").to_string()
}
