//! What all stages of a source's session share, and the one place where steps are timed and logged.
//!
//! The stages themselves are types that consume themselves, so that only the right order of calls compiles:
//!
//! ```text
//!   Connected ─▶ Copying ─▶ Converged ─▶ Stopped ─▶ Prepared ─▶ Committed ─▶ report
//!                   │           │           │          │            ▲
//!                   │           │           │          └─ no word ─▶ InDoubt ─▶ paused here, and that is said
//!                   ▼           ▼           ▼          ▼               │
//!                 stay ◀───────────────── resume ◀─────── not there ───┘
//! ```
//! A stage that fails consumes itself, too, and hands back the error: `stay` undoes what was done to a running VM (its
//! throttle, its name), `resume` first lets a stopped one run on. Callers have nothing to undo.

use std::rc::Rc;

use super::connect::Connected;
use super::error::SendError;
use super::options::SourceOptions;
use super::rounds::Rounds;
use super::steps::{Step, Times};
use crate::cancel::CancelFlag;
use crate::link::error::SessionError;
use crate::link::state::SessionState;
use crate::outside::{EngineHandle, Instant, Runtime, runtime};
use crate::progress::Progress;
use crate::session::SessionId;
use crate::vm::{SourceVm, VmError};
use crate::wire::control::state_limit;

/// Why a step failed.
pub(super) enum Failed {
    /// The session's [`SessionState`] has the error: the first one of all its tasks.
    Session,
    /// This error, whatever else the session came to know.
    Said(SendError),
}

/// A session whose tasks run.
pub(super) struct Session<'a> {
    pub(super) runtime: Runtime,
    pub(super) rounds: Rounds<'a>,
    pub(super) vm: &'a mut dyn SourceVm,
    pub(super) options: &'a SourceOptions,
    pub(super) id: SessionId,
    /// Most bytes of state that the target takes.
    pub(super) state_most: Option<u64>,
    pub(super) started: Instant,
    pub(super) times: Times,
}

impl<'a> Session<'a> {
    pub(super) fn start(
        handle: &EngineHandle,
        vm: &'a mut dyn SourceVm,
        options: &'a SourceOptions,
        progress: &'a dyn Fn(Progress),
        cancel: &'a CancelFlag,
        (connected, started): (Connected, Instant),
    ) -> Result<Session<'a>, SendError> {
        let runtime = runtime().map_err(|error| SendError::Options(crate::target::no_ring(&error)))?;
        let dirty = handle.subscribe_dirty()?;
        let session_state = Rc::new(SessionState::default());
        let (id, state_most) = (connected.session, state_limit(connected.version));
        let rounds = runtime
            .block_on(async { Rounds::start(handle, dirty, connected, &session_state, cancel, progress) })?;
        Ok(Session { runtime, rounds, vm, options, id, state_most, started, times: Times::default() })
    }

    /// Takes a step: tells the owner of it, has it done, and notes and logs how long it took.
    pub(super) fn step<T>(
        &mut self,
        step: Step,
        work: impl FnOnce(&mut Session<'a>) -> Result<T, Failed>,
    ) -> Result<T, Failed> {
        if let Some(phase) = step.phase() {
            self.rounds.enter(phase);
        }
        let began = Instant::now();
        let result = work(self);
        let took = began.elapsed();
        self.times.note(step, took);
        tracing::debug!(session = %self.id, ?step, ?took, done = result.is_ok(), "a step has ended");
        result
    }

    /// Has something done on the runtime.
    pub(super) fn on_rounds<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut Rounds<'a>) -> Result<T, SessionError>,
    ) -> Result<T, Failed> {
        let result = self.runtime.block_on(work(&mut self.rounds));
        self.checked(result)
    }

    /// Tells the session's [`SessionState`] of an error before anything else can.
    pub(super) fn checked<T>(&self, result: Result<T, SessionError>) -> Result<T, Failed> {
        result.map_err(|error| {
            self.rounds.guard.failed(error);
            Failed::Session
        })
    }

    /// The VM has done, or not done, what it was asked, and the link was left alone meanwhile. If it failed, the target
    /// hears of it as well.
    pub(super) fn asked<T>(&self, result: Result<T, VmError>) -> Result<T, Failed> {
        self.rounds.guard.resume();
        result.map_err(|error| self.vm_failed(error))
    }

    /// The VM failed: the target hears of it as well.
    pub(super) fn vm_failed(&self, error: VmError) -> Failed {
        self.rounds.guard.failed(SessionError::GaveUp(format!("the VM failed: {}", error.chain())));
        Failed::Said(error.into())
    }

    /// The session ends well.
    pub(super) fn end(self) {
        self.runtime.block_on(self.rounds.close(None));
    }

    /// The session ends without a move. The target is told why.
    pub(super) fn fail(self, failed: Failed) -> SendError {
        let session_state = self.rounds.guard.session_state.clone();
        // What the tasks say when their sockets are shut down comes too late to count.
        let last_word = self.vm.ended().or_else(|| session_state.farewell());
        self.runtime.block_on(self.rounds.close(last_word));
        match failed {
            Failed::Session => session_state.take_error().unwrap_or(SessionError::Cancelled).into(),
            Failed::Said(error) => error,
        }
    }
}
