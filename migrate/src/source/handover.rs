//! The hand-over at the source: stop, send the rest, and let go, in two phases.
//!
//! ```text
//!   name given up ──▶ stopped ──▶ prepared there ──▶ commit sent ──▶ running there
//!        ▲             │               │                │
//!        └── resumed ──┴───────────────┘                ▼ link lost
//!        └──────────── not there, burned ◀──────── in doubt: asked ───▶ running there
//!                                                       ▼ no answer
//!                                                  paused here, and said so
//! ```
//! From the commit on, the VM is resumed only if the target says that it did not and will not start it.

use std::time::Duration;

use swapd::Placed;

use super::copying::Converged;
use super::downtime::{missed, stood_too_long};
use super::error::SendError;
use super::rounds::Rounds;
use super::session::{Failed, Session};
use super::state_sink::{self, Unsent};
use super::steps::{Step, TargetTimes, milliseconds};
use crate::cancel::is_cancelled;
use crate::limits::{
    CANCEL_POLL, PLACEMENT_LIMIT, RESOLVE_EVERY, RESOLVE_LIMIT, RUNNING_LIMIT, SILENCE_LIMIT,
    scaled_for_tests,
};
use crate::link::error::SessionError;
use crate::outside::{Instant, pause, planted, timeout, timeout_at};
use crate::pace::longest_load;
use crate::registry::Outcome;
use crate::report::{Placement, Report};
use crate::resolve::resolve;
use crate::vm::VmError;
use crate::wait::Wait;
use crate::wire::control::Control;

/// The VM stands still here, and can be resumed at any time.
pub(super) struct Stopped<'a> {
    converged: Converged<'a>,
    /// When it was asked to stop.
    at: Instant,
    /// Of the state that was sent.
    state_bytes: u64,
    target: TargetTimes,
}

/// The VM stands still here, and is complete at the target, which may not start it yet.
pub(super) struct Prepared<'a> {
    stopped: Stopped<'a>,
    placed: Placed,
}

/// The commit was sent, and nothing was heard of it: the VM may run at the target.
struct InDoubt<'a> {
    stopped: Stopped<'a>,
}

/// The VM runs at the target.
pub(super) struct Committed<'a> {
    stopped: Stopped<'a>,
    /// What the target has told; nothing if its host was asked later.
    placed: Option<Placed>,
    downtime: Duration,
}

/// What became of a commit.
enum CommitOutcome {
    Running {
        downtime: Duration,
    },
    /// The target says that it did not start the VM.
    NotStarted(String),
    Unknown,
}

impl<'a> Converged<'a> {
    /// Stops the VM: the downtime begins.
    ///
    /// # Errors
    /// The VM stays here as it was, and runs.
    pub(super) fn stop(self) -> Result<Stopped<'a>, SendError> {
        let mut converged = self;
        let at = Instant::now();
        let throttle = std::mem::take(&mut converged.copying.throttle);
        let paused = converged.copying.session.step(Step::Stop, |session| {
            let paused = session.vm.pause();
            // Not before the VM stands still: it would write at full speed once more.
            if throttle != 0 {
                session.vm.throttle(0);
            }
            paused.map_err(|error| session.vm_failed(error))
        });
        let stopped = Stopped { converged, at, state_bytes: 0, target: TargetTimes::default() };
        match paused {
            Ok(()) => Ok(stopped),
            // A VM that could not be paused may have been paused half-way.
            Err(failed) => Err(stopped.go_on_as_before(failed)),
        }
    }
}

impl<'a> Stopped<'a> {
    /// The VM does not leave after all, and runs on.
    fn resume(self, failed: Failed) -> SendError {
        let Converged { copying, .. } = self.converged;
        let failed = match copying.session.vm.resume() {
            Ok(()) => failed,
            Err(error) => copying.session.vm_failed(VmError::NotResumed(Box::new(error))),
        };
        copying.stay(failed)
    }

    /// The same for a VM that could not be paused. What keeps a machine from that may keep it from going on, too: it
    /// sleeps, or has failed. Then it stands still as it did before, and nobody has stopped it.
    fn go_on_as_before(self, failed: Failed) -> SendError {
        if !matches!(failed, Failed::Said(SendError::Vm(VmError::CannotMove(_)))) {
            return self.resume(failed);
        }
        let Converged { copying, .. } = self.converged;
        if let Err(error) = copying.session.vm.resume() {
            tracing::info!(%error, "it stands still as it did before");
        }
        copying.stay(failed)
    }

    /// From a VM that stands still to one that is complete at the target.
    ///
    /// # Errors
    /// The VM stays here as it was, and runs.
    pub(super) fn prepare(mut self) -> Result<Prepared<'a>, SendError> {
        match self.send_the_rest() {
            Ok(placed) => Ok(Prepared { stopped: self, placed }),
            Err(failed) => Err(self.resume(failed)),
        }
    }

    fn send_the_rest(&mut self) -> Result<Placed, Failed> {
        self.in_time()?;
        let at = self.at;
        self.state_bytes = self.session_mut().step(Step::SaveState, |session| {
            state_sink::save(session, at).map_err(|unsent| match unsent {
                Unsent::Vm(error) => session.vm_failed(error),
                Unsent::Session(error) => {
                    session.rounds.guard.failed(error);
                    Failed::Session
                }
                Unsent::TooLong => stood_too_long(session, session.options.max_downtime.unwrap_or_default()),
            })
        })?;
        self.in_time()?;
        self.before_deadline(Step::LastPages, async |rounds| rounds.last().await)?;
        let loading = longest_load(self.state_bytes);
        let (placed, took) = self.before_deadline(Step::Prepare, async |rounds| {
            // Behind a large state the queue may be full, and the link silent.
            let word = rounds.control.outbox().send(Control::Final(rounds.sent.totals()));
            rounds.guard.wait("sending the VM's state", SILENCE_LIMIT, word).await?;
            match rounds.receive_word_later(Wait::Prepared, loading).await? {
                Control::Prepared { placed, took } => Ok((placed, took)),
                other => Err(SessionError::Peer(format!("{other:?} instead of a word that it is prepared"))),
            }
        })?;
        [self.target.place, self.target.load] = took.map(Duration::from);
        Ok(placed)
    }

    /// A step that ends when the VM has stood still for as long as it may.
    fn before_deadline<T>(
        &mut self,
        step: Step,
        work: impl AsyncFnOnce(&mut Rounds<'a>) -> Result<T, SessionError>,
    ) -> Result<T, Failed> {
        let (at, max) = (self.at, self.session().options.max_downtime);
        self.session_mut().step(step, |session| {
            let work = work(&mut session.rounds);
            let done = session.runtime.block_on(async {
                match max {
                    Some(max) => timeout_at(at + max, work).await.map_err(|_| max),
                    None => Ok(work.await),
                }
            });
            match done {
                Ok(result) => session.checked(result),
                Err(max) => Err(stood_too_long(session, max)),
            }
        })
    }

    /// Whether the VM may stand still for longer. Before the commit it need not.
    fn in_time(&self) -> Result<(), Failed> {
        match self.session().options.max_downtime {
            Some(max) if self.at.elapsed() > max => Err(stood_too_long(self.session(), max)),
            _ => Ok(()),
        }
    }

    fn session(&self) -> &Session<'a> {
        &self.converged.copying.session
    }

    fn session_mut(&mut self) -> &mut Session<'a> {
        &mut self.converged.copying.session
    }
}

impl<'a> Prepared<'a> {
    /// Hands the VM over. From here on it may run there, until the target's word says otherwise.
    ///
    /// # Errors
    /// The VM stays here as it was, and runs. Only in doubt it stays paused.
    pub(super) fn commit(self) -> Result<Committed<'a>, SendError> {
        let Prepared { mut stopped, placed } = self;
        // The last moment at which it is certain that the VM runs nowhere else.
        let here = stopped.session().rounds.guard.check("handing over");
        if let Err(failed) = stopped.session().checked(here).and_then(|()| stopped.in_time()) {
            return Err(stopped.resume(failed));
        }
        stopped.session_mut().vm.may_start_there();
        match stopped.send_commit() {
            CommitOutcome::Running { downtime } => Ok(Committed { stopped, placed: Some(placed), downtime }),
            // Said as it is: the session's `SessionState` knows only that the link broke.
            CommitOutcome::NotStarted(text) => Err(stopped.resume(said(SessionError::GaveUp(text)))),
            CommitOutcome::Unknown if planted!(ResumesAfterTheCommit) => {
                Err(stopped.resume(said(SessionError::Cancelled)))
            }
            CommitOutcome::Unknown => InDoubt { stopped }.resolve(),
        }
    }
}

impl<'a> Stopped<'a> {
    fn send_commit(&mut self) -> CommitOutcome {
        let (at, mut told) = (self.at, TargetTimes::default());
        let outcome = self.session_mut().step(Step::Commit, |session| {
            let paused = session.vm.stood_still();
            let rounds = &mut session.rounds;
            rounds.waits(Some(Wait::Running));
            let limit = Instant::now() + scaled_for_tests(RUNNING_LIMIT);
            Ok(session.runtime.block_on(async {
                // A cancel comes too late, and a broken link shows in the time limit or in the session's failure.
                let session_state = rounds.guard.session_state.clone();
                let outbox = rounds.control.outbox().clone();
                let word = session_state.unless_failed(async {
                    outbox.send(Control::Commit { paused }).await;
                    rounds.control.next().await
                });
                match timeout_at(limit, word).await {
                    Ok(Some(Control::Running { took })) => {
                        [told.record, told.start] = took.map(Duration::from);
                        CommitOutcome::Running { downtime: at.elapsed() }
                    }
                    Ok(Some(Control::NotStarted(text))) => CommitOutcome::NotStarted(text),
                    _ => CommitOutcome::Unknown,
                }
            }))
        });
        self.target = TargetTimes { record: told.record, start: told.start, ..self.target };
        outcome.unwrap_or(CommitOutcome::Unknown)
    }
}

impl<'a> InDoubt<'a> {
    /// Asks the target's host what became of the session, which makes the answer final.
    ///
    /// # Errors
    /// It is not there, so the VM runs on here; or nobody knows, so it stays paused.
    fn resolve(self) -> Result<Committed<'a>, SendError> {
        let InDoubt { mut stopped } = self;
        let outcome = stopped.session_mut().step(Step::Resolve, |session| Ok(ask(session)));
        match outcome {
            Ok(Some(Outcome::RunningThere)) => {
                let downtime = stopped.at.elapsed();
                Ok(Committed { stopped, placed: None, downtime })
            }
            Ok(Some(Outcome::NotThere)) => {
                let source = std::io::ErrorKind::ConnectionAborted.into();
                Err(stopped.resume(said(SessionError::Link { during: "handing over", source })))
            }
            // Neither resumed nor named: it may run there.
            Ok(None) | Err(_) => {
                let session = stopped.converged.copying.session;
                let error = SendError::InDoubt { session: session.id, to: session.options.to.clone() };
                Err(session.fail(Failed::Said(error)))
            }
        }
    }
}

impl Committed<'_> {
    /// Ends the session, and says how the migration was.
    pub(super) fn finish(mut self) -> Report {
        let placement = self.placement();
        let Committed { stopped, placed, downtime } = self;
        let Stopped { converged: Converged { copying, standing }, target, .. } = stopped;
        let (session, counts) = (copying.session, placed.unwrap_or_default());
        let parts = placed.map(|_| session.times.downtime_parts(&target));
        let report = Report {
            name: session.options.name.clone(),
            session: session.id,
            bytes_total: session.rounds.memory_bytes(),
            bytes_sent: session.rounds.guard.session_state.bytes_sent(),
            rounds: session.rounds.round as u32,
            duration_ms: milliseconds(session.started.elapsed()),
            downtime_ms: milliseconds(downtime),
            downtime_target_ms: milliseconds(session.options.downtime_target),
            downtime_parts: parts,
            downtime_missed: missed(&session, &standing, downtime, parts.as_ref()),
            pages_ram: counts.pages_ram,
            pages_store: counts.pages_store,
            pages_zero: counts.pages_zero,
            pages_lost: session.rounds.sent.totals().poisoned,
            pageins_during: counts.pageins,
            pageouts_during: counts.pageouts,
            throttle_max_percent: copying.throttle_max,
            resolved_later: placed.is_none(),
            placement,
        };
        session.end();
        report
    }

    /// Waits for the target's check of the placement. The VM runs there already, so a check that fails is no failure of
    /// the migration.
    fn placement(&mut self) -> Option<Placement> {
        if self.placed.is_none() || !self.stopped.session().options.check_placement {
            return None;
        }
        let looked = self.stopped.session_mut().step(Step::CheckPlacement, |session| {
            let rounds = &mut session.rounds;
            rounds.waits(Some(Wait::Placement));
            Ok(session.runtime.block_on(async {
                let session_state = rounds.guard.session_state.clone();
                let word = session_state.unless_failed(rounds.control.next());
                match timeout(PLACEMENT_LIMIT, word).await {
                    Ok(Some(Control::Placement(placement))) => Some(placement),
                    _ => None,
                }
            }))
        });
        looked.unwrap_or_default()
    }
}

/// Asks the target's daemon until it answers, for a bounded time. A cancel ends only the asking.
fn ask(session: &mut Session<'_>) -> Option<Outcome> {
    session.rounds.waits(Some(Wait::Resolve));
    let deadline = Instant::now() + scaled_for_tests(RESOLVE_LIMIT);
    let enough = || Instant::now() >= deadline || is_cancelled(session.rounds.guard.cancel);
    loop {
        match resolve(&session.options.to, &session.options.security, session.id) {
            Ok(outcome) => return Some(outcome),
            Err(error) => tracing::debug!(%error, "the outcome is not known yet"),
        }
        let until = Instant::now() + RESOLVE_EVERY;
        while Instant::now() < until && !enough() {
            pause(CANCEL_POLL);
        }
        if enough() {
            return None;
        }
    }
}

fn said(error: SessionError) -> Failed {
    Failed::Said(error.into())
}
