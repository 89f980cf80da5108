//! The hand-over at the target: prepared, commit, start; and what the VM touches after that.
//!
//! ```text
//!   prepared ──▶ commit decided ──▶ started ──▶ running ──▶ name taken (──▶ placement checked)
//!       │               │                          └──▶ record flushed, beside all that
//!       ▼               ▼ could not start
//!    discarded       revoked, the source has it back
//! ```
//! Nothing up to *running* waits for a disk: the VM stands still until then.

use swapd::{Placed, Run};

use super::accepted::{TargetLink, TargetMemory};
use super::error::ReceiveError;
use super::session::{Failed, Session};
use crate::bitmap::Bitmap;
use crate::limits::{PLACEMENT_WINDOW, RESOLVE_EVERY, RESOLVE_LIMIT, patience};
use crate::link::trouble::Trouble;
use crate::outside::{EngineHandle, Instant, elsewhere, pause, planted, sleep};
use crate::progress::{Phase, Progress};
use crate::registry::{Begun, Kept, RegistryError};
use crate::report::{Placement, Received};
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
    session.watch.resume();
    let outbox = session.control.outbox().clone();
    session.runtime.block_on(outbox.deliver(Control::Prepared { placed, took }));
    // While the source's commit is on its way: nothing moves now, so this is how it is at the start.
    let before = check.map(before_start).transpose().map_err(|error| Failed::Said(error.into()))?;
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
    // Behind the start, because the first scan takes its time; what is touched before it is touched again or not counted.
    let (tracked, since) = (check.map(|handle| handle.track_writes(true)), Instant::now());
    vm.settle();
    if let (Some(handle), Some(before), Some(tracked)) = (check, before, tracked) {
        // The VM runs, so nothing here is a failure of the migration.
        match tracked.and_then(|()| placement(session, handle, &before, since)) {
            Ok(placement) => {
                session.runtime.block_on(outbox.deliver(Control::Placement(placement)));
                received.placement = Some(placement);
            }
            Err(error) => tracing::warn!(%error, "the placement could not be checked"),
        }
    }
    Ok(received)
}

/// Has it known after a crash of this host, too, that the VM runs here: on a thread of its own, for as long as the disk needs.
fn keep(link: &TargetLink<'_>, kept: Kept) {
    let session = link.hello.session;
    let flush = move || {
        let mut told = false;
        while let Err(error) = kept.flush() {
            if !std::mem::replace(&mut told, true) {
                tracing::error!(%error, %session, "that the VM runs here may be forgotten if this host goes down; it is tried again");
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
    if let Err(error) = elsewhere("vmemd-record", flush) {
        tracing::error!(%error, %session, "that the VM runs here may be forgotten if this host goes down: no thread");
    }
}

fn fail(session: &Session<'_>, trouble: Trouble) -> Failed {
    session.watch.failed(trouble);
    Failed::Trouble
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
    let deadline = Instant::now() + patience(RESOLVE_LIMIT);
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

/// Where pages are before the VM starts.
struct Before {
    resident: Vec<Run>,
    stored: Vec<Run>,
}

/// What is where now. From here on only what is touched comes in.
fn before_start(handle: &EngineHandle) -> Result<Before, swapd::CommandError> {
    handle.set_prefetch(false)?;
    Ok(Before { resident: handle.resident_map()?, stored: handle.stored_map()? })
}

/// What the VM touches in [`PLACEMENT_WINDOW`], from the moment that it was watched, and how much of that was in RAM when it started.
fn placement(
    session: &Session<'_>,
    handle: &EngineHandle,
    before: &Before,
    since: Instant,
) -> Result<Placement, swapd::CommandError> {
    session.runtime.block_on(async { sleep(PLACEMENT_WINDOW.saturating_sub(since.elapsed())).await });
    let changed = handle.collect_written().and_then(|changed| Ok((changed, handle.resident_map()?)));
    handle.track_writes(false)?;
    handle.set_prefetch(true)?;
    let (changed, resident) = changed?;
    Ok(count(swapd::units::pages_in(handle.memory_bytes()), before, &changed, &resident))
}

/// `changed`: pages that were written, or came to the guest's memory, or left it. Those that left and did not come back have made room for
/// others: nobody has touched them. Those that were neither in RAM nor in the store are new to the guest: nobody had to place them.
fn count(pages: u64, before: &Before, changed: &[Run], resident: &[Run]) -> Placement {
    let set = |runs: &[Run]| {
        let mut set = Bitmap::new(pages);
        runs.iter().for_each(|run| set.set_run(*run));
        set
    };
    let (stored, in_ram, changed) = (set(&before.stored), set(&before.resident), set(changed));
    let mut placement = Placement::default();
    for page in resident.iter().flat_map(|run| changed.pages_in(*run)) {
        placement.touched_pages += u64::from(stored.get(page) || in_ram.get(page));
        placement.touched_in_ram += u64::from(in_ram.get(page));
    }
    placement
}

#[cfg(test)]
mod tests {
    use swapd::PageNo;

    use super::*;

    #[test]
    fn what_made_room_for_others_was_not_touched() {
        let run = |start, len| Run::new(PageNo(start), len);
        let before = Before { resident: vec![run(0, 20)], stored: vec![run(20, 20)] };
        // 0 to 3 were written; 4 was written and came back; 20 to 25 came in, for which 10 to 15 left; 50 is new.
        let changed = [run(0, 5), run(10, 6), run(20, 6), run(50, 1)];
        let resident = [run(0, 10), run(16, 4), run(20, 6), run(50, 1)];
        let placement = count(64, &before, &changed, &resident);
        assert_eq!(placement, Placement { touched_pages: 11, touched_in_ram: 5 });
    }
}
