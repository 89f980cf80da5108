//! The hand-over at the source: stop, send the rest, and let go, in two phases.
//!
//! ```text
//!   name given up ──▶ paused ──▶ prepared there ──▶ commit sent ──▶ running there
//!        ▲             │               │                │
//!        └── resumed ──┴───────────────┘                ▼ link lost
//!        └──────────── not there, burned ◀──────── in doubt: asked ───▶ running there
//!                                                       ▼ no answer
//!                                                  paused here, and said so
//! ```
//! From the commit on, the VM is resumed only if the target says that it did not and will not start it.

use std::time::Duration;

use swapd::Placed;

use super::error::SendError;
use super::moving::{Failed, Moving, said};
use super::pace::Standing;
use super::state_sink::{self, Unsent};
use crate::cancel::is_cancelled;
use crate::limits::{
    CANCEL_POLL, PLACEMENT_LIMIT, RESOLVE_EVERY, RESOLVE_LIMIT, RUNNING_LIMIT, SILENCE_LIMIT, patience,
};
use crate::link::error::SessionError;
use crate::outside::{Instant, pause, planted, timeout, timeout_at};
use crate::progress::Phase;
use crate::registry::Outcome;
use crate::report::{DowntimeParts, Placement, Report};
use crate::resolve::resolve;
use crate::vm::VmError;
use crate::wait::Wait;
use crate::wire::control::Control;

/// What became of a commit.
enum Committed {
    Running {
        downtime: Duration,
    },
    /// The target says that it did not start the VM.
    NotStarted(String),
    Unknown,
}

pub(super) fn run(moving: &mut Moving<'_, '_>, standing: &Standing) -> Result<Report, Failed> {
    let stopped_at = Instant::now();
    let paused = moving.vm.pause();
    // Not before: it would write at full speed once more.
    moving.set_throttle(0);
    let mut parts = DowntimeParts { stop_ms: milliseconds(stopped_at.elapsed()), ..DowntimeParts::default() };
    if let Err(error) = paused {
        // It may have been paused half-way.
        return Err(resume(moving, said(moving, error)));
    }
    let prepared = in_time(moving, stopped_at).and_then(|()| prepare(moving, stopped_at, &mut parts));
    let placed = prepared.map_err(|failed| resume(moving, failed))?;
    // The last moment at which it is certain that the VM runs nowhere else.
    let here = moving.rounds.guard.check("handing over");
    let certain = moving.checked(here).and_then(|()| in_time(moving, stopped_at));
    certain.map_err(|failed| resume(moving, failed))?;
    moving.vm.may_start_there();
    match commit(moving, stopped_at, &mut parts) {
        Committed::Running { downtime } => {
            let placement = placement(moving);
            let report = report(moving, Some(placed), downtime);
            let missed = missed(moving, standing, downtime, &parts);
            Ok(Report { placement, downtime_parts: Some(parts), downtime_missed: missed, ..report })
        }
        Committed::NotStarted(text) => Err(take_back(moving, SessionError::GaveUp(text))),
        Committed::Unknown if planted!(ResumesAfterTheCommit) => {
            Err(take_back(moving, SessionError::Cancelled))
        }
        Committed::Unknown => match ask(moving) {
            Some(Outcome::RunningThere) => {
                let downtime = stopped_at.elapsed();
                let missed = (downtime > moving.options.downtime_target)
                    .then(|| "the link broke during the hand-over".to_string());
                Ok(Report { downtime_missed: missed, ..report(moving, None, downtime) })
            }
            Some(Outcome::NotThere) => {
                let source = std::io::ErrorKind::ConnectionAborted.into();
                Err(take_back(moving, SessionError::Link { during: "handing over", source }))
            }
            None => Err(Failed::Said(SendError::InDoubt {
                session: moving.session,
                to: moving.options.to.clone(),
            })),
        },
    }
}

/// Whether the VM may stand still for longer. Before the commit it need not.
fn in_time(moving: &Moving<'_, '_>, stopped_at: Instant) -> Result<(), Failed> {
    match moving.options.max_downtime {
        Some(max) if stopped_at.elapsed() > max => Err(stood_too_long(moving, max)),
        _ => Ok(()),
    }
}

fn stood_too_long(moving: &Moving<'_, '_>, max: Duration) -> Failed {
    let max_ms = max.as_millis();
    let text =
        format!("it has stood still for the {max_ms} ms that --max-downtime allows, and is not there yet");
    refrain(moving, text)
}

/// The VM is not stopped: it would stand still for too long.
pub(super) fn too_long(moving: &Moving<'_, '_>, standing: &Standing) -> Failed {
    let max_ms = moving.options.max_downtime.unwrap_or_default().as_millis();
    let expected_ms = standing.expected().as_millis();
    let text = format!(
        "it would stand still for about {expected_ms} ms, where --max-downtime allows {max_ms} ms: {}",
        did_not_fit(moving, standing)
    );
    refrain(moving, text)
}

fn refrain(moving: &Moving<'_, '_>, text: String) -> Failed {
    moving.rounds.guard.failed(SessionError::Unable(text.clone()));
    Failed::Said(SendError::Downtime(text))
}

/// How things stood when no further round was allowed.
fn did_not_fit(moving: &Moving<'_, '_>, standing: &Standing) -> String {
    let megabytes = |pages: f64| pages * swapd::PAGE_SIZE as f64 / 1e6;
    let held_back = match (moving.options.max_throttle, standing.throttle) {
        (0, _) => " (--no-throttle)".to_string(),
        (_, 0) => String::new(),
        (_, percent) => format!(" held back by {percent} %"),
    };
    format!(
        "after {} rounds (--max-rounds) {:.1} MB were left to send; the guest writes {:.1} MB/s{held_back}, the link carries {:.1} MB/s",
        standing.rounds,
        megabytes(standing.left_pages as f64),
        megabytes(standing.written_per_s),
        megabytes(standing.sent_per_s),
    )
}

/// Why the downtime was more than it should be, if it was.
fn missed(
    moving: &Moving<'_, '_>,
    standing: &Standing,
    downtime: Duration,
    parts: &DowntimeParts,
) -> Option<String> {
    let target = moving.options.downtime_target;
    if downtime <= target {
        return None;
    }
    let expected = standing.expected();
    if standing.rounds >= moving.options.max_rounds && expected > target {
        return Some(did_not_fit(moving, standing));
    }
    let (part, took) = parts.named().into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("there are parts");
    Some(format!("{} ms were expected; the longest part was {part}, {took:.1} ms", expected.as_millis()))
}

/// From a paused VM to one that is complete at the target.
fn prepare(
    moving: &mut Moving<'_, '_>,
    stopped_at: Instant,
    parts: &mut DowntimeParts,
) -> Result<Placed, Failed> {
    let began = Instant::now();
    state_sink::save(moving, stopped_at).map_err(|unsent| match unsent {
        Unsent::Vm(error) => said(moving, error),
        Unsent::Session(trouble) => {
            moving.rounds.guard.failed(trouble);
            Failed::SessionError
        }
        Unsent::TooLong => stood_too_long(moving, moving.options.max_downtime.unwrap_or_default()),
    })?;
    parts.state_ms = milliseconds(began.elapsed());
    in_time(moving, stopped_at)?;
    let rounds = &mut moving.rounds;
    let work = async {
        let began = Instant::now();
        rounds.last().await?;
        parts.pages_ms = milliseconds(began.elapsed());
        let began = Instant::now();
        // Behind a large state the queue may be full, and the link silent.
        let word = rounds.control.outbox().send(Control::Final(rounds.ship.totals()));
        rounds.guard.wait("sending the VM's state", SILENCE_LIMIT, word).await?;
        match rounds.hear(Wait::Prepared).await? {
            Control::Prepared { placed, took } => {
                let [place, load] = took.map(Duration::from);
                (parts.place_ms, parts.load_ms) = (milliseconds(place), milliseconds(load));
                parts.link_ms = milliseconds(began.elapsed().saturating_sub(place + load));
                Ok(placed)
            }
            other => Err(SessionError::Peer(format!("{other:?} instead of a word that it is prepared"))),
        }
    };
    let max = moving.options.max_downtime;
    let prepared = moving.runtime.block_on(async {
        match max {
            Some(max) => timeout_at(stopped_at + max, work).await.ok(),
            None => Some(work.await),
        }
    });
    match prepared {
        Some(prepared) => moving.checked(prepared),
        None => Err(stood_too_long(moving, max.unwrap_or_default())),
    }
}

/// After this, the VM may run there.
fn commit(moving: &mut Moving<'_, '_>, stopped_at: Instant, parts: &mut DowntimeParts) -> Committed {
    moving.rounds.enter(Phase::HandOver);
    let paused = moving.vm.stood_still();
    let (runtime, rounds) = (moving.runtime, &mut moving.rounds);
    rounds.waits(Some(Wait::Running));
    let began = Instant::now();
    let limit = began + patience(RUNNING_LIMIT);
    runtime.block_on(async {
        // A cancel comes too late, and a broken link shows in the time limit or in the session's failure.
        let session_state = rounds.guard.session_state.clone();
        let outbox = rounds.control.outbox().clone();
        let word = session_state.unless_failed(async {
            outbox.send(Control::Commit { paused }).await;
            rounds.control.next().await
        });
        match timeout_at(limit, word).await {
            Ok(Some(Control::Running { took })) => {
                let [record, start] = took.map(Duration::from);
                (parts.record_ms, parts.start_ms) = (milliseconds(record), milliseconds(start));
                parts.link_ms += milliseconds(began.elapsed().saturating_sub(record + start));
                Committed::Running { downtime: stopped_at.elapsed() }
            }
            Ok(Some(Control::NotStarted(text))) => Committed::NotStarted(text),
            _ => Committed::Unknown,
        }
    })
}

/// Asks the target's daemon until it answers, for a bounded time. A cancel ends only the asking.
fn ask(moving: &mut Moving<'_, '_>) -> Option<Outcome> {
    moving.rounds.waits(Some(Wait::Resolve));
    let deadline = Instant::now() + patience(RESOLVE_LIMIT);
    let enough = || Instant::now() >= deadline || is_cancelled(moving.rounds.guard.cancel);
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
        let session_state = rounds.guard.session_state.clone();
        let word = session_state.unless_failed(rounds.control.next());
        match timeout(PLACEMENT_LIMIT, word).await {
            Ok(Some(Control::Placement(placement))) => Some(placement),
            _ => None,
        }
    })
}

/// The VM did not leave after all.
fn take_back(moving: &mut Moving<'_, '_>, trouble: SessionError) -> Failed {
    // Said as it is: the session's `SessionState` knows only that the link broke.
    resume(moving, Failed::Said(trouble.into()))
}

fn resume(moving: &mut Moving<'_, '_>, failed: Failed) -> Failed {
    match moving.vm.resume() {
        Ok(()) => failed,
        // What keeps such a machine from moving keeps it from going on: it sleeps, or has failed.
        Err(error) if matches!(failed, Failed::Said(SendError::Vm(VmError::CannotMove(_)))) => {
            tracing::info!(%error, "it stands still as it did before");
            failed
        }
        Err(error) => said(moving, VmError::NotResumed(Box::new(error))),
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn report(moving: &Moving<'_, '_>, placed: Option<Placed>, downtime: Duration) -> Report {
    let counts = placed.unwrap_or_default();
    Report {
        name: moving.options.name.clone(),
        session: moving.session,
        bytes_total: moving.rounds.ship.handle.memory_bytes(),
        bytes_sent: moving.rounds.guard.session_state.bytes_sent(),
        rounds: moving.rounds.round as u32,
        duration_ms: milliseconds(moving.started.elapsed()),
        downtime_ms: milliseconds(downtime),
        downtime_target_ms: milliseconds(moving.options.downtime_target),
        downtime_parts: None,
        downtime_missed: None,
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
