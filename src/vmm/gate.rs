//! Whether vCPUs may be in the guest: one gate for all of them, with two bolts.
//!
//! ```text
//!            resume             throttle on
//!   Paused ─────────▶ Running ◀────────────▶ Running, held        any ──drop──▶ Ended
//!      ▲                 │         off
//!      └── pause, failure┘
//! ```
//! A vCPU thread parks when the goal is not Running; pausing waits until all are parked. Whoever closes the gate
//! does so before kicking, and a thread looks at the gate after forgetting kicks (see `kick.rs`).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The state that the machine's owner wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Goal {
    Paused,
    Running,
    Ended,
}

#[derive(Debug)]
struct Inner {
    goal: Goal,
    held: bool,
    parked: u32,
    failure: Option<String>,
}

#[derive(Debug)]
pub(super) struct Gate {
    /// Goal is Running and nothing holds: what a vCPU thread looks at before each entry into the guest.
    open: AtomicBool,
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Gate {
    /// A closed gate.
    pub(super) fn new() -> Gate {
        let inner = Inner { goal: Goal::Paused, held: false, parked: 0, failure: None };
        Gate { open: AtomicBool::new(false), inner: Mutex::new(inner), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, inner: &Inner) {
        self.open.store(inner.goal == Goal::Running && !inner.held, Ordering::SeqCst);
        self.changed.notify_all();
    }

    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }

    pub(super) fn goal(&self) -> Goal {
        self.lock().goal
    }

    pub(super) fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// Sets the goal, unless a vCPU has failed and it is to run.
    pub(super) fn set_goal(&self, goal: Goal) -> Result<(), String> {
        let mut inner = self.lock();
        if let Some(failure) = inner.failure.as_ref().filter(|_| goal == Goal::Running) {
            return Err(failure.clone());
        }
        inner.goal = goal;
        self.publish(&inner);
        Ok(())
    }

    /// Holds vCPUs or lets them go on, as the throttle does.
    pub(super) fn hold(&self, held: bool) {
        let mut inner = self.lock();
        inner.held = held;
        self.publish(&inner);
    }

    /// A vCPU cannot go on: all stop. The first reason is kept.
    pub(super) fn fail(&self, reason: String) {
        let mut inner = self.lock();
        inner.failure.get_or_insert(reason);
        if inner.goal == Goal::Running {
            inner.goal = Goal::Paused;
        }
        self.publish(&inner);
    }

    /// Waits until that many vCPUs are parked; false if they are not in time.
    pub(super) fn wait_parked(&self, vcpus: u32, timeout: Duration) -> bool {
        let waiting = |inner: &mut Inner| inner.parked < vcpus;
        let inner = self.lock();
        let result = self.changed.wait_timeout_while(inner, timeout, waiting);
        !result.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Parks the calling vCPU thread until it is to run (true) or to end (false).
    pub(super) fn park(&self) -> bool {
        let mut inner = self.lock();
        inner.parked += 1;
        self.changed.notify_all();
        let waiting = |inner: &mut Inner| inner.goal == Goal::Paused;
        inner = self.changed.wait_while(inner, waiting).unwrap_or_else(PoisonError::into_inner);
        inner.parked -= 1;
        inner.goal == Goal::Running
    }

    /// Waits while the goal is Running and something holds.
    pub(super) fn wait_held(&self) {
        let waiting = |inner: &mut Inner| inner.goal == Goal::Running && inner.held;
        drop(self.changed.wait_while(self.lock(), waiting));
    }

    /// Waits while the goal is Running, at most until then.
    pub(super) fn sleep(&self, until: Option<Instant>) {
        let waiting = |inner: &mut Inner| inner.goal == Goal::Running;
        match until.map(|until| until.saturating_duration_since(Instant::now())) {
            Some(Duration::ZERO) => {}
            Some(timeout) => drop(self.changed.wait_timeout_while(self.lock(), timeout, waiting)),
            None => drop(self.changed.wait_while(self.lock(), waiting)),
        }
    }
}
