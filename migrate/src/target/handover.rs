//! The hand-over at the target: prepared, commit, start; and what the VM touches after that.
//!
//! ```text
//!   prepared ──▶ commit recorded ──▶ started ──▶ running (──▶ placement checked)
//!       │               │
//!       ▼               ▼ could not start
//!    discarded       revoked, the source has it back
//! ```

use std::time::Duration;

use swapd::{Placed, Run};

use super::{Failed, ReceiveError, Session, TargetLink, TargetMemory};
use crate::bitmap::Bitmap;
use crate::limits::{PLACEMENT_WINDOW, RESOLVE_EVERY};
use crate::link::trouble::Trouble;
use crate::outside::{EngineHandle, Instant, pause, planted, sleep};
use crate::progress::{Phase, Progress};
use crate::registry::RegistryError;
use crate::report::{Placement, Received};
use crate::vm::TargetVm;
use crate::wait::Wait;
use crate::wire::control::Control;

/// From a VM that is complete here to one that runs here.
pub(super) fn run(
    session: &mut Session<'_>,
    link: &TargetLink<'_>,
    memory: &TargetMemory,
    vm: &mut dyn TargetVm,
    placed: Placed,
) -> Result<Received, Failed> {
    let check = match memory {
        TargetMemory::Engine(handle) if link.hello.check_placement => Some(handle),
        _ => None,
    };
    session.watch.resume();
    let outbox = session.control.outbox().clone();
    session.runtime.block_on(outbox.deliver(Control::Prepared(placed)));
    // While the source gives up the name: nothing moves now, so this is what is resident at the start.
    let resident = check.map(before_start).transpose().map_err(|error| Failed::Said(error.into()))?;
    let (control, watch) = (&mut session.control, &session.watch);
    (link.progress)(Progress::waiting(Phase::HandOver, link.hello.memory_bytes, Wait::Commit));
    let word = session.runtime.block_on(watch.wait_for(Wait::Commit, control.next()));
    let word = word.map_err(|trouble| fail(session, trouble))?;
    let Control::Commit { paused } = word else {
        return Err(fail(session, Trouble::Peer("something else than a commit or an abort".to_string())));
    };
    if planted!(StartsBeforeTheRecord) {
        let _ = vm.start(paused);
    }
    if let Err(error) = commit(link).and_then(|()| Ok(vm.start(paused)?)) {
        give_up(link, Duration::ZERO);
        // Only this message, or the registry's record, gives the VM back to the source.
        session.runtime.block_on(outbox.deliver(Control::NotStarted(error.chain())));
        return Err(Failed::Said(error));
    }
    session.runtime.block_on(outbox.deliver(Control::Running));
    let mut received = Received::new(link.hello.name.clone(), link.hello.session, placed);
    if let (Some(handle), Some(resident)) = (check, resident) {
        // The VM runs, so nothing here is a failure of the migration.
        match placement(session, handle, &resident) {
            Ok(placement) => {
                session.runtime.block_on(outbox.deliver(Control::Placement(placement)));
                received.placement = Some(placement);
            }
            Err(error) => tracing::warn!(%error, "the placement could not be checked"),
        }
    }
    Ok(received)
}

fn fail(session: &Session<'_>, trouble: Trouble) -> Failed {
    session.watch.failed(trouble);
    Failed::Trouble
}

/// Records that the VM may run here. If that fails it does not, whatever the record says: what could not be flushed may be gone when
/// it is asked for.
fn commit(link: &TargetLink<'_>) -> Result<(), ReceiveError> {
    match link.registry.commit(link.hello.session) {
        Err(error) if !planted!(IgnoresAFailedRecord) => Err(error.into()),
        _ => Ok(()),
    }
}

/// Records that the VM never starts here, also if a commit was recorded: a source that asks shall hear it. A disk that fails is tried
/// again.
pub(super) fn give_up(link: &TargetLink<'_>, limit: Duration) {
    let deadline = Instant::now() + limit;
    while !planted!(ForgetsToRevoke)
        && let Err(error) = link.registry.revoke(link.hello.session)
    {
        tracing::error!(%error, session = %link.hello.session, "that a VM does not start here could not be recorded");
        if !matches!(error, RegistryError::Io { .. }) || Instant::now() >= deadline {
            return;
        }
        pause(RESOLVE_EVERY);
    }
}

/// What is resident now. From here on only what is touched comes in.
fn before_start(handle: &EngineHandle) -> Result<Vec<Run>, swapd::CommandError> {
    handle.set_prefetch(false)?;
    handle.resident_map()
}

/// What the VM touches in [`PLACEMENT_WINDOW`], and how much of that was in RAM when it started.
fn placement(
    session: &Session<'_>,
    handle: &EngineHandle,
    resident: &[Run],
) -> Result<Placement, swapd::CommandError> {
    // Behind the start, because the first scan takes its time; what is touched before it is touched again or not counted.
    handle.track_writes(true)?;
    session.runtime.block_on(async { sleep(PLACEMENT_WINDOW).await });
    let touched = handle.collect_written();
    handle.track_writes(false)?;
    handle.set_prefetch(true)?;
    let mut in_ram = Bitmap::new(swapd::units::pages_in(handle.memory_bytes()));
    resident.iter().for_each(|run| in_ram.set_run(*run));
    let mut placement = Placement::default();
    for run in touched? {
        placement.touched_pages += u64::from(run.len);
        placement.touched_in_ram += u64::from(in_ram.count_run(run));
    }
    Ok(placement)
}
