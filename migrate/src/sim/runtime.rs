//! Time, tasks and threads of the simulated world, in the shape of tokio's and the standard library's.

use std::any::Any;
use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::ops::{Add, Sub};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::mpsc::RecvTimeoutError;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::world::{self, world};

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Instant(Duration);

impl Instant {
    /// Beside the simulation, in a unit test that has no world, time stands still.
    pub fn now() -> Instant {
        Instant(world::current().map_or(Duration::ZERO, |world| world.now()))
    }

    pub fn elapsed(self) -> Duration {
        world().now() - self.0
    }

    pub fn saturating_duration_since(self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;

    fn add(self, time: Duration) -> Instant {
        Instant(self.0 + time)
    }
}

impl Sub for Instant {
    type Output = Duration;

    fn sub(self, other: Instant) -> Duration {
        self.0 - other.0
    }
}

pub async fn sleep(time: Duration) {
    sleep_until(world().now() + time).await;
}

async fn sleep_until(deadline: Duration) {
    let mut set = false;
    poll_fn(|context| {
        if world().now() >= deadline {
            return Poll::Ready(());
        }
        if !std::mem::replace(&mut set, true) {
            let waker = context.waker().clone();
            world().at(deadline, move || waker.wake());
        }
        Poll::Pending
    })
    .await;
}

#[derive(Debug)]
pub struct Elapsed;

pub async fn timeout<T>(limit: Duration, work: impl Future<Output = T>) -> Result<T, Elapsed> {
    timeout_at(Instant::now() + limit, work).await
}

pub async fn timeout_at<T>(deadline: Instant, work: impl Future<Output = T>) -> Result<T, Elapsed> {
    let mut work = pin!(work);
    let mut over = pin!(sleep_until(deadline.0));
    poll_fn(|context| match work.as_mut().poll(context) {
        Poll::Ready(result) => Poll::Ready(Ok(result)),
        Poll::Pending => over.as_mut().poll(context).map(|()| Err(Elapsed)),
    })
    .await
}

/// As `std::thread::sleep`.
pub fn pause(time: Duration) {
    world().block(sleep(time));
}

/// Lets others go first.
pub async fn yield_to_ring() {
    sleep(world().delay(Duration::from_micros(50))).await;
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// An executor for one simulated thread.
pub struct Runtime;

thread_local! {
    /// Tasks of every runtime: by owner, and slot. Empty slots are of tasks that have ended.
    static TASKS: RefCell<Vec<(super::world::ProcessId, Vec<Option<Task>>)>> = const { RefCell::new(Vec::new()) };
}

fn with_tasks<T>(act: impl FnOnce(&mut Vec<Option<Task>>) -> T) -> T {
    let me = world().me();
    TASKS.with(|all| {
        let mut all = all.borrow_mut();
        let own = all.iter_mut().find(|(owner, _)| *owner == me);
        act(&mut own.expect("a task is spawned on a runtime").1)
    })
}

pub fn runtime() -> io::Result<Runtime> {
    let me = world().me();
    TASKS.with(|all| {
        let mut all = all.borrow_mut();
        assert!(all.iter().all(|(owner, _)| *owner != me), "a process has one runtime at a time");
        // Task 0 is what `block_on` runs.
        all.push((me, vec![None]));
    });
    Ok(Runtime)
}

impl Runtime {
    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        let world = world();
        let mut work = pin!(work);
        world.waker(0).wake_by_ref();
        loop {
            let Some(task) = world.next_task() else {
                world.park();
                continue;
            };
            let waker = world.waker(task);
            let mut context = Context::from_waker(&waker);
            if task == 0 {
                if let Poll::Ready(result) = work.as_mut().poll(&mut context) {
                    return result;
                }
            } else if let Some(mut running) = with_tasks(|tasks| tasks.get_mut(task).and_then(Option::take))
                && running.as_mut().poll(&mut context).is_pending()
            {
                with_tasks(|tasks| tasks[task] = Some(running));
            }
        }
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        let me = world().me();
        let own = TASKS.with(|all| {
            let mut all = all.borrow_mut();
            let at = all.iter().position(|(owner, _)| *owner == me);
            all.swap_remove(at.expect("it was made")).1
        });
        // Outside of the borrow: what the tasks drop may look for its runtime.
        drop(own);
    }
}

struct Outcome<T> {
    result: Option<T>,
    ended: bool,
    waiting: Option<Waker>,
}

pub struct JoinHandle<T> {
    task: usize,
    outcome: Rc<RefCell<Outcome<T>>>,
}

impl<T> std::fmt::Debug for JoinHandle<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "task {}", self.task)
    }
}

/// The task was aborted: a panic of a task is the seed's failure at once.
#[derive(Debug)]
pub struct JoinError;

impl JoinError {
    pub fn into_panic(self) -> Box<dyn Any + Send> {
        Box::new("an aborted task was waited for")
    }
}

pub fn spawn<T: 'static>(work: impl Future<Output = T> + 'static) -> JoinHandle<T> {
    let outcome = Rc::new(RefCell::new(Outcome { result: None, ended: false, waiting: None }));
    let into = outcome.clone();
    let task: Task = Box::pin(async move {
        let result = work.await;
        let waiting = {
            let mut into = into.borrow_mut();
            (into.result, into.ended) = (Some(result), true);
            into.waiting.take()
        };
        if let Some(waker) = waiting {
            waker.wake();
        }
    });
    let task = with_tasks(|tasks| {
        tasks.push(Some(task));
        tasks.len() - 1
    });
    world().waker(task).wake();
    JoinHandle { task, outcome }
}

impl<T> JoinHandle<T> {
    pub fn is_finished(&self) -> bool {
        self.outcome.borrow().ended
    }

    pub fn abort(&self) {
        let task = with_tasks(|tasks| tasks[self.task].take());
        drop(task);
        self.outcome.borrow_mut().ended = true;
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = Result<T, JoinError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut outcome = self.outcome.borrow_mut();
        if outcome.ended {
            return Poll::Ready(outcome.result.take().ok_or(JoinError));
        }
        outcome.waiting = Some(context.waker().clone());
        Poll::Pending
    }
}

pub struct JoinSet<T>(Vec<JoinHandle<T>>);

impl<T: 'static> JoinSet<T> {
    pub fn new() -> JoinSet<T> {
        JoinSet(Vec::new())
    }

    pub fn spawn_local(&mut self, work: impl Future<Output = T> + 'static) {
        self.0.push(spawn(work));
    }

    pub async fn join_next(&mut self) -> Option<Result<T, JoinError>> {
        poll_fn(|context| {
            if self.0.is_empty() {
                return Poll::Ready(None);
            }
            for at in 0..self.0.len() {
                if let Poll::Ready(result) = Pin::new(&mut self.0[at]).poll(context) {
                    self.0.swap_remove(at);
                    return Poll::Ready(Some(result));
                }
            }
            Poll::Pending
        })
        .await
    }
}

/// What another thread of this process is working on.
pub struct Elsewhere<T>(RefCell<Option<tokio::sync::oneshot::Receiver<T>>>);

pub fn on_own_thread<T: 'static>(_: &str, work: impl FnOnce() -> T + 'static) -> io::Result<Elsewhere<T>> {
    let (done, result) = tokio::sync::oneshot::channel();
    world().spawn(world().me(), move || drop(done.send(work())));
    Ok(Elsewhere(RefCell::new(Some(result))))
}

impl<T> Elsewhere<T> {
    pub fn wait(&self, limit: Duration) -> Result<T, RecvTimeoutError> {
        let mut result = self.0.take().ok_or(RecvTimeoutError::Disconnected)?;
        match world().block(timeout(limit, &mut result)) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(_)) => Err(RecvTimeoutError::Disconnected),
            Err(Elapsed) => {
                self.0.replace(Some(result));
                Err(RecvTimeoutError::Timeout)
            }
        }
    }
}

/// Different in every world only by its seed.
pub fn random_bytes(into: &mut [u8]) -> io::Result<()> {
    thread_local!(static COUNT: std::cell::Cell<u64> = const { std::cell::Cell::new(0) });
    // Unit tests beside the simulation want them different, and have no world.
    COUNT.set(COUNT.get() + 1);
    let random = super::random::Random::new(COUNT.get());
    into.iter_mut().for_each(|byte| *byte = random.next() as u8);
    Ok(())
}
