//! A VM's process from the moment that its control socket exists to its end.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::memory::Memory;
use super::vm::{Event, Phase, Vm};
use crate::control::server::Server;
use crate::failure::{Failure, Kind};
use crate::signals;

/// How often the guest is looked at without an event: only to log that it failed.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// The same while the VM is ending.
const LOOK_EVERY_ENDING: Duration = Duration::from_millis(100);
/// How long a migration may take to notice that it is cancelled.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(20);
/// How long clients may take to fetch their answers.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(3);

/// Why the VM's process ends.
#[derive(Debug)]
pub(super) enum Ended {
    Stopped,
    Signal(i32),
    Moved { to: String },
    NotArrived(Failure),
}

/// Turns signals into events. A signal before there is memory ends the process at once: nothing is there to unwind
/// but the socket, and setting memory up cannot be interrupted.
pub(super) fn forward_signals(vm: &Arc<Vm>) -> Result<(), Failure> {
    signals::install()?;
    die_on_panic();
    let vm = vm.clone();
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            let signal = loop {
                signals::wait_readable(-1, -1);
                if let Some(signal) = signals::caught() {
                    break signal;
                }
            };
            if vm.memory.get().is_none() {
                drop(vm.core(|core| core.claim.take()));
                std::process::exit(i32::from(Kind::Interrupted.exit_code()));
            }
            let _ = vm.events.send(Event::Signal(signal));
        })
        .map(|_| ())
        .map_err(|error| Failure::io("cannot start the signal thread", &error))
}

/// A VM with one of its threads missing would hang rather than fail: a panic ends the process, once it has been told.
fn die_on_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        std::process::exit(i32::from(Kind::Vm.exit_code()));
    }));
}

/// Serves the VM's events until it is to end.
pub(super) fn live(vm: &Vm, events: &Receiver<Event>) -> Ended {
    let mut ending: Option<(Ended, Instant)> = None;
    let mut failure_told = false;
    loop {
        let patience = if ending.is_some() { LOOK_EVERY_ENDING } else { LOOK_EVERY };
        match events.recv_timeout(patience) {
            Ok(Event::Notice(notice)) => vm.notice(notice),
            Ok(Event::Arrived(Ok(()))) | Err(RecvTimeoutError::Timeout) => {}
            Ok(Event::Arrived(Err(failure))) => return Ended::NotArrived(failure),
            Ok(Event::Stop) => ending = Some((Ended::Stopped, Instant::now() + CANCEL_TIMEOUT)),
            Ok(Event::Signal(signal)) => {
                ending = Some((Ended::Signal(signal), Instant::now() + CANCEL_TIMEOUT))
            }
            Ok(Event::Moved) => {}
            // The VM itself holds a sender.
            Err(RecvTimeoutError::Disconnected) => unreachable!("the VM holds a sender of its events"),
        }
        let phase = vm.core(|core| core.phase.clone());
        if let Phase::Moved { to } = phase {
            return Ended::Moved { to };
        }
        if let Some((end, deadline)) = ending.take() {
            vm.cancel.store(true, std::sync::atomic::Ordering::SeqCst);
            let settled = matches!(phase, Phase::Here | Phase::InDoubt { .. });
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

/// Takes the VM apart and says how the process shall end. `work`: a thread that may still use the memory.
pub(super) fn finish(
    vm: &Vm,
    memory: Memory,
    server: &Server,
    work: Option<JoinHandle<()>>,
    ended: Ended,
) -> Result<(), Failure> {
    let name = &vm.facts.name;
    let result = outcome(vm, &ended);
    server.drain(DRAIN_TIMEOUT);
    let worker_done = work.is_none_or(|work| joined(work, CANCEL_TIMEOUT));
    let still = !matches!(ended, Ended::Stopped | Ended::Signal(_)) || stand_still(vm);
    if worker_done && still && !vm.core(|core| core.phase == Phase::Migrating) {
        vm.drop_machine();
        memory.stop();
    } else {
        // vCPUs that wait for a page which never comes cannot be joined: the kernel takes all of it at exit.
        warn!(vm = %name, "ends without waiting for its vCPUs");
        std::mem::forget(memory);
    }
    drop(vm.core(|core| core.claim.take()));
    result
}

fn outcome(vm: &Vm, ended: &Ended) -> Result<(), Failure> {
    let name = &vm.facts.name;
    let failed = vm.guest_failure();
    let mismatched = vm.mismatched_pages();
    match ended {
        Ended::Moved { to } => {
            info!(vm = %name, %to, "the VM has moved; this process ends");
            return Ok(());
        }
        Ended::NotArrived(failure) => return Err(failure.clone()),
        Ended::Stopped | Ended::Signal(_) => {}
    }
    if let Some(reason) = failed {
        return Err(Failure::new(Kind::Vm, format!("the guest of {name:?} failed: {reason}")));
    }
    if mismatched > 0 {
        let text = format!("the guest of {name:?} found {mismatched} pages with the wrong content");
        return Err(Failure::new(Kind::Vm, text));
    }
    if let Phase::InDoubt { session, to } = vm.core(|core| core.phase.clone()) {
        let text = format!(
            "{name:?} was stopped here while it was in doubt whether it runs at {to} (session {session})"
        );
        return Err(Failure::new(Kind::InDoubt, text));
    }
    match ended {
        Ended::Signal(signal) => Err(signals::interrupted(*signal)),
        _ => Ok(()),
    }
}

fn stand_still(vm: &Vm) -> bool {
    match vm.machine(|machine| match machine.state() {
        crate::vmm::RunState::Failed(_) => Ok(()),
        _ => Ok(machine.pause()?),
    }) {
        Ok(()) => true,
        Err(error) => {
            info!(vm = %vm.facts.name, %error, "while stopping");
            error.kind == Kind::Name
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
