//! The hand-over at the source: stop, send the rest, and let go, in two phases.
//!
//! ```text
//!   running here ──▶ paused ──▶ prepared there ──▶ name given up, commit sent ──▶ running there
//!        ▲             │               │                       │
//!        └── resumed ──┴───────────────┘                       ▼ link lost
//!        └──────────────── not there, burned ◀─────────── in doubt: asked ───▶ running there
//!                                                              ▼ no answer
//!                                                         paused here, and said so
//! ```
//! From the commit on, the VM is resumed only if the target says that it did not and will not start it.

use std::time::Duration;

use swapd::Placed;

use super::{Failed, Moving, SendError};
use crate::cancel::is_cancelled;
use crate::limits::{
    CANCEL_POLL, PLACEMENT_LIMIT, PLACEMENT_WINDOW, RESOLVE_EVERY, RESOLVE_LIMIT, RUNNING_LIMIT,
    SILENCE_LIMIT, patience,
};
use crate::link::trouble::Trouble;
use crate::outside::{Instant, pause, planted, timeout, timeout_at};
use crate::progress::Phase;
use crate::registry::Outcome;
use crate::report::{Placement, Report};
use crate::resolve::resolve;
use crate::vm::VmError;
use crate::wait::Wait;
use crate::wire::control::{Control, MAX_STATE_BYTES, state_parts};

/// What became of a commit.
enum Committed {
    Running {
        downtime: Duration,
    },
    /// The target says that it did not start the VM.
    NotStarted(String),
    Unknown,
}

pub(super) fn run(moving: &mut Moving<'_, '_>) -> Result<Report, Failed> {
    let stopped_at = Instant::now();
    let paused = moving.vm.pause();
    // Not before: it would write at full speed once more.
    moving.set_throttle(0);
    if let Err(error) = paused {
        // It may have been paused half-way.
        return Err(resume(moving, said(moving, error)));
    }
    let prepared = prepare(moving);
    let placed = prepared.map_err(|failed| resume(moving, failed))?;
    if let Err(error) = moving.vm.give_up_name(moving.session) {
        moving.vm.take_name_back();
        return Err(resume(moving, said(moving, error)));
    }
    // The last moment at which it is certain that the VM runs nowhere else.
    if let Err(trouble) = moving.rounds.watch.check("handing over") {
        moving.rounds.watch.failed(trouble);
        moving.vm.take_name_back();
        return Err(resume(moving, Failed::Trouble));
    }
    match commit(moving, stopped_at) {
        Committed::Running { downtime } => {
            let placement = placement(moving);
            let report = report(moving, Some(placed), downtime);
            Ok(Report { placement, ..report })
        }
        Committed::NotStarted(text) => Err(take_back(moving, Trouble::GaveUp(text))),
        Committed::Unknown if planted!(ResumesAfterTheCommit) => Err(take_back(moving, Trouble::Cancelled)),
        Committed::Unknown => match ask(moving) {
            Some(Outcome::RunningThere) => Ok(report(moving, None, stopped_at.elapsed())),
            Some(Outcome::NotThere) => {
                let source = std::io::ErrorKind::ConnectionAborted.into();
                Err(take_back(moving, Trouble::Link { during: "handing over", source }))
            }
            None => Err(Failed::Said(SendError::InDoubt {
                session: moving.session,
                to: moving.options.to.clone(),
            })),
        },
    }
}

/// From a paused VM to one that is complete at the target.
fn prepare(moving: &mut Moving<'_, '_>) -> Result<Placed, Failed> {
    let state = moving.vm.save().map_err(|error| said(moving, error))?;
    if state.len() > MAX_STATE_BYTES {
        let text = format!("its state of {} bytes is more than {MAX_STATE_BYTES}", state.len());
        return Err(said(moving, VmError(text)));
    }
    let rounds = &mut moving.rounds;
    let prepared = moving.runtime.block_on(async {
        for part in state_parts(&state) {
            let sent = rounds.control.outbox().send(part);
            rounds.watch.wait("sending the VM's state", SILENCE_LIMIT, sent).await?;
        }
        rounds.last().await?;
        // Behind a large state the queue may be full, and the link silent.
        let word = rounds.control.outbox().send(Control::Final(rounds.ship.totals()));
        rounds.watch.wait("sending the VM's state", SILENCE_LIMIT, word).await?;
        match rounds.hear(Wait::Prepared).await? {
            Control::Prepared(placed) => Ok(placed),
            other => Err(Trouble::Peer(format!("{other:?} instead of a word that it is prepared"))),
        }
    });
    moving.checked(prepared)
}

/// After this, the VM may run there.
fn commit(moving: &mut Moving<'_, '_>, stopped_at: Instant) -> Committed {
    moving.rounds.enter(Phase::HandOver);
    let paused = moving.vm.stood_still();
    let (runtime, rounds) = (moving.runtime, &mut moving.rounds);
    rounds.waits(Some(Wait::Running));
    let limit = Instant::now() + patience(RUNNING_LIMIT);
    runtime.block_on(async {
        // A cancel comes too late, and a broken link shows in the time limit or in the session's failure.
        let life = rounds.watch.life.clone();
        let outbox = rounds.control.outbox().clone();
        let word = life.unless_failed(async {
            outbox.send(Control::Commit { paused }).await;
            rounds.control.next().await
        });
        match timeout_at(limit, word).await {
            Ok(Some(Control::Running)) => Committed::Running { downtime: stopped_at.elapsed() },
            Ok(Some(Control::NotStarted(text))) => Committed::NotStarted(text),
            _ => Committed::Unknown,
        }
    })
}

/// Asks the target's daemon until it answers, for a bounded time. A cancel ends only the asking.
fn ask(moving: &mut Moving<'_, '_>) -> Option<Outcome> {
    moving.rounds.waits(Some(Wait::Resolve));
    let deadline = Instant::now() + patience(RESOLVE_LIMIT);
    let enough = || Instant::now() >= deadline || is_cancelled(moving.rounds.watch.cancel);
    loop {
        match resolve(&moving.options.to, &moving.options.security, moving.session) {
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

/// The VM runs there; how much of what it touches is in RAM is a bonus.
fn placement(moving: &mut Moving<'_, '_>) -> Option<Placement> {
    if !moving.options.check_placement {
        return None;
    }
    let rounds = &mut moving.rounds;
    rounds.enter(Phase::Checking);
    rounds.waits(Some(Wait::Placement));
    moving.runtime.block_on(async {
        let life = rounds.watch.life.clone();
        let word = life.unless_failed(rounds.control.next());
        match timeout(PLACEMENT_WINDOW + PLACEMENT_LIMIT, word).await {
            Ok(Some(Control::Placement(placement))) => Some(placement),
            _ => None,
        }
    })
}

/// The VM did not leave after all.
fn take_back(moving: &mut Moving<'_, '_>, trouble: Trouble) -> Failed {
    if !planted!(ForgetsTheName) {
        moving.vm.take_name_back();
    }
    // Said as it is: the session's `Life` knows only that the link broke.
    resume(moving, Failed::Said(trouble.into()))
}

fn resume(moving: &mut Moving<'_, '_>, failed: Failed) -> Failed {
    match moving.vm.resume() {
        Ok(()) => failed,
        Err(error) => said(moving, VmError(format!("it could not be resumed: {error}"))),
    }
}

/// The VM failed: the target hears of it as well.
pub(super) fn said(moving: &Moving<'_, '_>, error: VmError) -> Failed {
    moving.rounds.watch.failed(Trouble::GaveUp(format!("the VM failed: {error}")));
    Failed::Said(error.into())
}

fn report(moving: &Moving<'_, '_>, placed: Option<Placed>, downtime: Duration) -> Report {
    let milliseconds = |time: Duration| time.as_secs_f64() * 1000.0;
    let counts = placed.unwrap_or_default();
    Report {
        name: moving.options.name.clone(),
        session: moving.session,
        bytes_total: moving.rounds.ship.handle.memory_bytes(),
        bytes_sent: moving.rounds.watch.life.bytes_sent(),
        rounds: moving.rounds.round as u32,
        duration_ms: milliseconds(moving.started.elapsed()),
        downtime_ms: milliseconds(downtime),
        pages_ram: counts.pages_ram,
        pages_store: counts.pages_store,
        pages_zero: counts.pages_zero,
        pages_lost: moving.rounds.ship.totals().poisoned,
        pageins_during: counts.pageins,
        pageouts_during: counts.pageouts,
        throttle_max_percent: moving.throttle_max,
        resolved_later: placed.is_none(),
        placement: None,
    }
}
