//! The hand-over at the target: prepared, commit, start; and what the VM touches after that.
//!
//! ```text
//!   prepared ──▶ commit decided ──▶ started ──▶ running ──▶ name taken (──▶ placement checked)
//!       │               │                          └──▶ record flushed, beside all that
//!       ▼               ▼ could not start
//!    discarded       revoked, the source has it back
//! ```
//! Nothing up to *running* waits for a disk: the VM stands still until then.

use std::time::Duration;

use swapd::Placed;

use super::accepted::{TargetLink, TargetMemory};
use super::error::ReceiveError;
use super::placement::Check;
use super::session::{Failed, Session};
use crate::limits::{RESOLVE_EVERY, RESOLVE_LIMIT, scaled_for_tests};
use crate::link::error::SessionError;
use crate::outside::{Instant, on_own_thread, pause, planted};
use crate::progress::{Phase, Progress};
use crate::registry::{Begun, Kept, RegistryError};
use crate::report::Received;
use crate::vm::TargetVm;
use crate::wait::Wait;
use crate::wire::control::{Control, Micros};

/// A VM that is complete here.
pub(super) struct Prepared {
    pub(super) placed: Placed,
    /// For the last pages to come to their places, and for the state to be loaded.
    pub(super) took: [Micros; 2],
    pub(super) begun: Begun,
}

/// From a VM that is complete here to one that runs here.
pub(super) fn run(
    session: &mut Session<'_>,
    link: &TargetLink<'_>,
    memory: &TargetMemory,
    vm: &mut dyn TargetVm,
    prepared: Prepared,
) -> Result<Received, Failed> {
    let Prepared { placed, took, begun } = prepared;
    let check = match memory {
        TargetMemory::Engine(handle) if link.hello.check_placement => Some(handle),
        _ => None,
    };
    session.guard.resume();
    let outbox = session.control.outbox().clone();
    // Nothing moves now, so this is how it is at the start. The VM stands still: nobody waits for the answers yet.
    let check = check.map(Check::begin);
    // Noted first: the answer may be here before this thread goes on.
    (link.progress)(Progress::waiting(Phase::HandOver, link.hello.memory_bytes, Wait::Commit));
    session.runtime.block_on(outbox.deliver(Control::Prepared { placed, took }));
    let (control, guard) = (&mut session.control, &session.guard);
    let word = session.runtime.block_on(guard.wait_for(Wait::Commit, Duration::ZERO, control.next()));
    let word = word.map_err(|error| fail(session, error))?;
    let Control::Commit { paused } = word else {
        return Err(fail(
            session,
            SessionError::Peer("something else than a commit or an abort".to_string()),
        ));
    };
    if planted!(StartsBeforeTheRecord) {
        let _ = vm.start(paused);
    }
    let began = Instant::now();
    let committed = match begun.commit() {
        Ok(committed) => Some(committed),
        Err(_) if planted!(IgnoresAFailedRecord) => None,
        Err(error) => return Err(not_started(session, error.into())),
    };
    let recorded = began.elapsed();
    let committed = committed.filter(|_| !planted!(UnlocksTheRecordEarly));
    if let Err(error) = vm.start(paused) {
        let revoked = match &committed {
            Some(committed) if !planted!(ForgetsToRevoke) => committed.revoke(),
            _ => Ok(()),
        };
        // The source's word first: that it lasts is seen to by whoever ends the session.
        let failed = not_started(session, error.into());
        if let (Some(committed), Err(error)) = (&committed, revoked) {
            persist(link, error, || committed.revoke());
        }
        return Err(failed);
    }
    let took = [recorded, began.elapsed().saturating_sub(recorded)].map(Into::into);
    session.runtime.block_on(outbox.deliver(Control::Running { took }));
    if let Some(committed) = committed {
        keep(link, committed.started());
    }
    let mut received = Received::new(link.hello.name.clone(), link.hello.session, placed);
    // Behind the start, because the first scan takes its time. A page that is touched before it is touched again, or
    // not counted.
    let check = check.map(Check::started);
    vm.take_name();
    if let Some(check) = check {
        // The VM runs, so nothing here is a failure of the migration.
        match session.runtime.block_on(check.finish()) {
            Ok(placement) => {
                session.runtime.block_on(outbox.deliver(Control::Placement(placement)));
                received.placement = Some(placement);
            }
            Err(error) => tracing::warn!(%error, "the placement could not be checked"),
        }
    }
    Ok(received)
}

/// Flushes the record that the VM runs here, so that it outlasts a crash of this host: on a thread of its own, for as
/// long as the disk needs.
fn keep(link: &TargetLink<'_>, kept: Kept) {
    let session = link.hello.session;
    let flush = move || {
        let mut told = false;
        while let Err(error) = kept.flush() {
            if !std::mem::replace(&mut told, true) {
                tracing::error!(
                    %error,
                    %session,
                    "that the VM runs here may be forgotten if this host goes down; it is tried again"
                );
            }
            if planted!(FlushesOnce) {
                return;
            }
            pause(RESOLVE_EVERY);
        }
        if told {
            tracing::info!(%session, "that the VM runs here is recorded now");
        }
    };
    if let Err(error) = on_own_thread("vmemd-record", flush) {
        tracing::error!(%error, %session, "that the VM runs here may be forgotten if this host goes down: no thread");
    }
}

fn fail(session: &Session<'_>, error: SessionError) -> Failed {
    session.guard.failed(error);
    Failed::SessionError
}

/// Only this message, or the registry's record, gives the VM back to the source.
fn not_started(session: &Session<'_>, error: ReceiveError) -> Failed {
    let word = Control::NotStarted(error.chain());
    session.runtime.block_on(session.control.outbox().deliver(word));
    Failed::Said(error)
}

/// Records that the VM never starts here: a source that asks shall hear it.
pub(super) fn give_up(link: &TargetLink<'_>) {
    let burn = || link.registry.burn(link.hello.session).map(drop);
    if let Err(error) = burn() {
        persist(link, error, burn);
    }
}

/// A disk that fails is tried again for as long as a source asks.
fn persist(link: &TargetLink<'_>, mut error: RegistryError, record: impl Fn() -> Result<(), RegistryError>) {
    let deadline = Instant::now() + scaled_for_tests(RESOLVE_LIMIT);
    loop {
        tracing::error!(%error, session = %link.hello.session, "that a VM does not start here could not be recorded");
        if !matches!(error, RegistryError::Io { .. } | RegistryError::Busy(_)) || Instant::now() >= deadline {
            return;
        }
        pause(RESOLVE_EVERY);
        match record() {
            Ok(()) => return,
            Err(again) => error = again,
        }
    }
}
