//! A VM's process from the moment that its control socket exists to its end.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;
use tracing::{error, info, warn};

use crate::control::rundir::SocketName;
use crate::control::server::Server;
use crate::failure::{Failure, FailureKind};
use crate::hold::Whereabouts;
use crate::machine::Machine;
use crate::memory::Memory;
use crate::signals;
use crate::vm::{Told, Vm, VmEvent, VmState};

/// How often the guest is looked at without an event: only to log that it failed.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// The same while the VM is ending.
const LOOK_EVERY_ENDING: Duration = Duration::from_millis(100);
/// How long a migration or a checkpoint may take to notice that it is cancelled.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(20);
/// Longer than this nobody is at work on what changes of a VM.
const LOCK_LIMIT: Duration = Duration::from_millis(200);
/// How long clients may take to fetch their answers.
const ANSWERS_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a VM that ends waits for whoever keeps its machine: longer than a pause takes that ends at all.
const MACHINE_TIMEOUT: Duration = Duration::from_secs(10);

/// Who ends a VM, in words.
pub(crate) const BY_STOP: &str = "`vmemd stop`";

/// The thread that receives: what it leaves behind when it panics is put in order where it is started.
pub(crate) const RECEIVER: &str = "receive";

thread_local! {
    /// Whoever runs this thread's code catches its panics and puts in order what they leave behind.
    pub(crate) static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Why the VM's process ends.
#[derive(Debug)]
pub(crate) enum Ended {
    Stopped,
    Signal(i32),
    Moved { to: String },
    NotArrived(Failure),
}

/// Makes the process the VM's own. Signals become events. A signal before there is memory ends the process at once:
/// nothing is there to unwind but the socket, and setting memory up cannot be interrupted.
pub(crate) fn take_process_over(vm: &Arc<Vm>) -> Result<(), Failure> {
    signals::install()?;
    die_on_panic(vm.clone());
    let vm = vm.clone();
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            let signal = loop {
                signals::wait();
                if let Some(signal) = signals::caught() {
                    break signal;
                }
            };
            if vm.memory.get().is_none() {
                drop(vm.locked(|state| state.claim.take()));
                std::process::exit(i32::from(FailureKind::Interrupted.exit_code()));
            }
            // Not by the main loop alone, which may be waiting for the machine.
            vm.cancel_to_end(signals::name(signal));
            let _ = vm.events.send(VmEvent::Signal(signal));
        })
        .map(|_| ())
        .map_err(|error| Failure::io("cannot start the signal thread", &error))
}

/// A panic on any thread ends the process, behind its last words: a VM with one of its threads missing would hang
/// rather than fail. Except while a thread receives or sends: the VM can do without that thread, which catches its own
/// panic and knows at which side the VM is then.
fn die_on_panic(vm: Arc<Vm>) {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        if std::thread::current().name() == Some(RECEIVER) || CAUGHT.get() {
            return;
        }
        std::process::exit(i32::from(vm.crashed().exit_code()));
    }));
}

/// Serves the VM's events until it is to end.
pub(crate) fn live(vm: &Vm, events: &Receiver<VmEvent>) -> Ended {
    let mut ending: Option<(Ended, Instant)> = None;
    let mut failure_told = false;
    loop {
        let patience = if ending.is_some() { LOOK_EVERY_ENDING } else { LOOK_EVERY };
        match events.recv_timeout(patience) {
            Ok(VmEvent::Notice(notice)) => vm.notice(notice),
            Ok(VmEvent::Arrived(Ok(()))) | Err(RecvTimeoutError::Timeout) => {}
            Ok(VmEvent::Arrived(Err(failure))) => return Ended::NotArrived(failure),
            Ok(VmEvent::Stop) => ending = Some(vm.is_to_end(Ended::Stopped, BY_STOP)),
            Ok(VmEvent::Signal(signal)) => {
                ending = Some(vm.is_to_end(Ended::Signal(signal), signals::name(signal)))
            }
            Ok(VmEvent::Moved) => {}
            // The VM itself holds a sender.
            Err(RecvTimeoutError::Disconnected) => unreachable!("the VM holds a sender of its events"),
        }
        let (whereabouts, saving) = vm.locked(|state| (state.whereabouts.clone(), state.is_being_saved()));
        if let Whereabouts::Moved { to } = whereabouts {
            return Ended::Moved { to };
        }
        if let Some((end, deadline)) = ending.take() {
            vm.cancel.store(true, std::sync::atomic::Ordering::SeqCst);
            let settled = !saving && matches!(whereabouts, Whereabouts::Here | Whereabouts::InDoubt { .. });
            if settled || Instant::now() >= deadline {
                return end;
            }
            ending = Some((end, deadline));
        }
        if let Some(reason) = vm.guest_failure().filter(|_| !failure_told) {
            error!(vm = %vm.facts.name, %reason, "the guest has failed; it stays for `vmemd stat` until `vmemd stop`");
            failure_told = true;
        }
    }
}

impl Vm {
    /// From now on a migration that ends knows why. Until when it is waited for.
    fn is_to_end(&self, end: Ended, by: &'static str) -> (Ended, Instant) {
        let migrating = self.locked(|state| {
            state.ender = Some(by);
            matches!(state.whereabouts, Whereabouts::Migrating)
        });
        self.halt.end();
        if migrating {
            info!(vm = %self.facts.name, by, "it is to end here: its migration is cancelled, if it is not too late for that");
        }
        (end, Instant::now() + CANCEL_TIMEOUT)
    }

    /// Tells whoever stopped the VM, or does so from now on, what became of it.
    pub(crate) fn has_ended(&self, told: &Told) {
        self.locked(|state| {
            state.end.get_or_insert_with(|| told.clone());
            state.stoppers.drain(..).for_each(|stopper| drop(stopper.send(told.clone())));
        });
    }

    pub(crate) fn stopped(&self) -> Told {
        Ok(json!({ "name": self.facts.name, "state": "stopped" }))
    }

    /// Where a VM may run whose process ends in the middle of a hand-over.
    pub(crate) fn may_run_at(&self) -> Option<String> {
        self.locked(|state| {
            may_run_elsewhere(state)
                .then(|| state.migration.as_ref().map_or_else(String::new, |stat| stat.to.clone()))
        })
    }

    /// The exit code's kind if a bug ends this process. It tells whatever restarts failed VMs: nobody may who might
    /// have two then.
    fn crashed(&self) -> FailureKind {
        let kind = |state: &mut VmState| match state.whereabouts {
            Whereabouts::Moved { .. } => FailureKind::Moved,
            Whereabouts::InDoubt { .. } => FailureKind::InDoubt,
            _ if may_run_elsewhere(state) => FailureKind::InDoubt,
            _ => FailureKind::Vm,
        };
        let deadline = Instant::now() + LOCK_LIMIT;
        loop {
            match self.try_locked(kind) {
                Some(kind) => return kind,
                // It is the thread that panics that is at work on it.
                None if Instant::now() >= deadline => return FailureKind::InDoubt,
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

fn may_run_elsewhere(state: &VmState) -> bool {
    // From then on the target may start it.
    matches!(state.whereabouts, Whereabouts::Migrating)
        && state.claim.as_ref().is_none_or(|claim| matches!(claim.socket(), SocketName::Leaving(..)))
}

/// How a VM's life in this process has ended.
#[derive(Debug)]
pub struct End {
    /// Stopped, or why it ended otherwise ([`FailureKind::Moved`]: it has moved away): what the process's exit code
    /// says.
    pub result: Result<(), Failure>,
    /// The guest has been told to quit. If not, it does not end by itself: it had not come yet, or a vCPU of it waits
    /// for a page that never comes. The process must then be ended without it.
    pub quit: bool,
}

impl End {
    pub(crate) fn failed(failure: Failure) -> End {
        End { result: Err(failure), quit: false }
    }
}

/// Takes the VM apart and says how the process shall end. `work`: a thread that may still use the memory.
pub(crate) fn finish(
    vm: &Vm,
    memory: Memory,
    server: &Server,
    work: Option<JoinHandle<()>>,
    ended: Ended,
) -> End {
    let name = &vm.facts.name;
    let result = outcome(vm, &ended);
    vm.has_ended(&match (&ended, &result) {
        (Ended::Moved { to }, _) => Ok(json!({ "name": name, "state": "moved", "to": to })),
        (_, Err(failure)) if failure.kind == FailureKind::InDoubt => Err(failure.clone()),
        _ => vm.stopped(),
    });
    let mut quit = false;
    server.wait_answered(ANSWERS_TIMEOUT);
    let worker_done = work.is_none_or(|work| joined(work, CANCEL_TIMEOUT));
    let still = !matches!(ended, Ended::Stopped | Ended::Signal(_)) || stand_still(vm);
    vm.tell_end(&result);
    let busy = |state: &mut VmState| {
        matches!(state.whereabouts, Whereabouts::Migrating) || state.is_being_saved() || state.closing
    };
    if worker_done && still && !vm.locked(busy) {
        match vm.quit_machine() {
            Ok(told) => {
                quit = told;
                memory.stop();
            }
            Err(error) => {
                warn!(vm = %name, %error, "the guest cannot be told to quit");
                std::mem::forget(memory);
            }
        }
    } else {
        // vCPUs that wait for a page which never comes cannot be joined: the kernel takes all of it at exit.
        warn!(vm = %name, "ends without waiting for its vCPUs");
        std::mem::forget(memory);
    }
    End { result, quit }
}

fn outcome(vm: &Vm, ended: &Ended) -> Result<(), Failure> {
    let name = &vm.facts.name;
    let failed = vm.guest_failure();
    let mismatched = vm.mismatched_pages();
    match ended {
        Ended::Moved { to } => {
            info!(vm = %name, %to, "the VM has moved; this process ends");
            return Err(Failure::new(FailureKind::Moved, format!("{name} has moved to {to}")));
        }
        Ended::NotArrived(failure) => return Err(failure.clone()),
        Ended::Stopped | Ended::Signal(_) => {}
    }
    if let Some(reason) = failed {
        return Err(Failure::new(FailureKind::Vm, format!("the guest of {name:?} failed: {reason}")));
    }
    if mismatched > 0 {
        let text = format!("the guest of {name:?} found {mismatched} pages with the wrong content");
        return Err(Failure::new(FailureKind::Vm, text));
    }
    if let Whereabouts::InDoubt { session, to, .. } = vm.locked(|state| state.whereabouts.clone()) {
        let text = format!(
            "{name:?} was stopped here while it was in doubt whether it runs at {to} (session {session})"
        );
        return Err(Failure::new(FailureKind::InDoubt, text));
    }
    if let Some(to) = vm.may_run_at() {
        let text = format!(
            "{name:?} was stopped here in the middle of its hand-over to {to}, which may have happened: see `vmemd list` there before it \
             is started again"
        );
        return Err(Failure::new(FailureKind::InDoubt, text));
    }
    match ended {
        Ended::Signal(signal) => Err(signals::interrupted(*signal)),
        _ => Ok(()),
    }
}

fn stand_still(vm: &Vm) -> bool {
    let pause = |machine: &mut dyn Machine| {
        if machine.view().failed.is_some() { Ok(()) } else { machine.pause() }
    };
    match vm.machine_within(MACHINE_TIMEOUT, pause) {
        Some(Ok(())) => true,
        None => {
            warn!(vm = %vm.facts.name, "a checkpoint that has not ended keeps its machine");
            false
        }
        Some(Err(error)) => {
            info!(vm = %vm.facts.name, %error, "while stopping");
            // It is not here, or sleeps.
            error.kind == FailureKind::Name
        }
    }
}

fn joined(work: JoinHandle<()>, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    while !work.is_finished() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    work.join().is_ok()
}
