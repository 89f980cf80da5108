//! The source's side of a migration: the VM leaves this process, or stays.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use migrate::{Progress, Report, SendError, SourceOptions, VmError};
use serde_json::Value;
use swapd::Engine;
use tracing::{info, warn};

use crate::control::protocol::{MigrateRequest, MigrationStat, State};
use crate::control::server::Client;
use crate::doubt;
use crate::failure::{Failure, FailureKind};
use crate::hold::Whereabouts;
use crate::life::CAUGHT;
use crate::live_vm::vm_error;
use crate::size::Size;
use crate::source_vm::Leaving;
use crate::vm::{Vm, VmEvent};

/// How often it is looked whether whoever asked is still there.
const CLIENT_POLL: Duration = Duration::from_millis(100);

/// How long a migration waits for its VM to be set up (with all of its RAM, if that was asked for).
const SET_UP_GRACE: Duration = Duration::from_secs(60);

/// Over which time the speed of sending is measured.
const SPEED_WINDOW: Duration = Duration::from_millis(500);

enum Step {
    Progress(MigrationStat),
    Ended(Result<Report, SendError>),
}

/// Moves the VM away. Answers when it has moved, or stays; cancels if the client goes away.
pub(crate) fn migrate(
    vm: &Arc<Vm>,
    request: &MigrateRequest,
    client: &mut Client<'_>,
) -> Result<Value, Failure> {
    let mut options = options(vm, request)?;
    wait_until_set_up(vm, client);
    vm.memory()?.engine()?;
    begin(vm, &request.to)?;
    let may_move = vm.machine(|machine| machine.may_move()).and_then(|()| vm.offer());
    if let Err(failure) = may_move.map(|offer| options.offer = offer) {
        vm.locked(|state| (state.whereabouts, state.migration) = (Whereabouts::Here, None));
        vm.go_on();
        return Err(stays(vm, failure));
    }
    let (steps, progress) = channel();
    let (mover, name) = (vm.clone(), vm.facts.name.clone());
    let spawned = std::thread::Builder::new().name("migrate".to_owned()).spawn(move || {
        let mut leaving = Leaving::begin(&mover);
        CAUGHT.set(true);
        let sent = catch_unwind(AssertUnwindSafe(|| send(&mut leaving, &options, &steps)));
        CAUGHT.set(false);
        let result = sent.unwrap_or_else(|_| Err(leaving.after_panic(&options.to)));
        note_where(&mover, &options, &result);
        let _ = steps.send(Step::Ended(result));
        doubt::ask_until_known(&mover);
    });
    if let Err(error) = spawned {
        vm.locked(|state| (state.whereabouts, state.migration) = (Whereabouts::Here, None));
        vm.go_on();
        return Err(Failure::io("cannot start the migration's thread", &error));
    }
    loop {
        match progress.recv_timeout(CLIENT_POLL) {
            Ok(Step::Progress(stat)) => {
                if client.progress(stat).is_err() || client.gone() || client.cancels() {
                    vm.cancel.store(true, Ordering::SeqCst);
                }
            }
            Ok(Step::Ended(result)) => return report(vm, &request.to, result),
            Err(RecvTimeoutError::Timeout) if client.gone() || client.cancels() => {
                vm.cancel.store(true, Ordering::SeqCst)
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Failure::new(
                    FailureKind::Vm,
                    format!("the migration of {name:?} ended without a word: see its log"),
                ));
            }
        }
    }
}

/// A VM that was started a moment ago may be asked to move at once.
fn wait_until_set_up(vm: &Vm, client: &Client<'_>) {
    let deadline = Instant::now() + SET_UP_GRACE;
    let setting_up =
        || vm.facts.daemon.is_none() && vm.locked(|state| matches!(state.whereabouts, Whereabouts::Arriving));
    while setting_up() && !client.gone() && Instant::now() < deadline {
        std::thread::sleep(CLIENT_POLL);
    }
}

fn options(vm: &Vm, request: &MigrateRequest) -> Result<SourceOptions, Failure> {
    // A VM that is smaller than the least budget gets that.
    let most = vm.facts.memory_bytes.max(Engine::MIN_BUDGET_BYTES);
    if let Some(ram) = request.ram_bytes.filter(|ram| *ram > most) {
        let [ram, memory, most] = [ram, vm.facts.memory_bytes, most].map(Size);
        let text = format!(
            "a RAM budget of {ram} is above the VM's memory of {memory}: give {most}, or leave --ram out"
        );
        return Err(Failure::new(FailureKind::Usage, text));
    }
    let mut options = SourceOptions::new(&vm.facts.name, &request.to);
    options.security = request.trust.security()?;
    options.ram_bytes = request.ram_bytes;
    options.streams = request.streams;
    options.downtime_target = Duration::from_millis(request.downtime_target_ms);
    options.max_downtime = request.max_downtime_ms.map(Duration::from_millis);
    options.max_rounds = request.max_rounds;
    options.max_throttle = request.max_throttle;
    options.check_placement = request.check_placement;
    Ok(options)
}

/// Running → migrating, in one step, so that two requests cannot both.
fn begin(vm: &Vm, to: &str) -> Result<(), Failure> {
    let name = &vm.facts.name;
    let cannot = |why: String| Failure::new(FailureKind::CannotMove, format!("{name:?} cannot move: {why}"));
    if let Some(reason) = vm.guest_failure() {
        return Err(cannot(format!("its guest has failed: {reason}")));
    }
    if let (State::Shutdown | State::Incoming, Some(reason)) = vm.state() {
        return Err(cannot(reason));
    }
    vm.locked(|state| {
        let why = match &state.whereabouts {
            // Whoever ends it is told that it is stopped, so it must not go anywhere.
            Whereabouts::Here if state.ender.is_some() || state.end.is_some() => "it is ending",
            Whereabouts::Here if state.checkpoint.is_some() => "a checkpoint of it is being made",
            Whereabouts::Here => {
                vm.cancel.store(false, Ordering::SeqCst);
                state.whereabouts = Whereabouts::Migrating;
                state.migration = Some(MigrationStat {
                    to: to.to_owned(),
                    phase: "connecting".to_owned(),
                    ..Default::default()
                });
                return Ok(());
            }
            Whereabouts::Arriving => "it is still arriving",
            Whereabouts::Migrating => "it is migrating already",
            Whereabouts::InDoubt { .. } => "a former hand-over is in doubt: `vmemd resolve` it first",
            Whereabouts::Moved { .. } => "it has moved already",
        };
        Err(Failure::new(FailureKind::Name, format!("{name:?} cannot move: {why}")))
    })
}

fn send(
    leaving: &mut Leaving<'_>,
    options: &SourceOptions,
    steps: &Sender<Step>,
) -> Result<Report, SendError> {
    let vm = leaving.vm;
    let handle = match vm.memory().and_then(|memory| memory.engine()) {
        Ok(handle) => handle.clone(),
        Err(failure) => return Err(SendError::Vm(vm_error(failure))),
    };
    let started = Instant::now();
    let speed = Speed::new(started);
    let progress = |progress: Progress| {
        let mut stat = stat_of(&options.to, &progress, started);
        stat.bytes_per_second = speed.of(progress.bytes_sent);
        vm.locked(|state| state.migration = Some(stat.clone()));
        vm.waits(progress.waiting);
        let _ = steps.send(Step::Progress(stat));
    };
    info!(vm = %options.name, to = %options.to, "migration begins");
    migrate::send(&handle, leaving, options, &progress, &vm.cancel)
}

fn stat_of(to: &str, progress: &Progress, started: Instant) -> MigrationStat {
    let phase = serde_json::to_value(progress.phase).ok().and_then(|phase| phase.as_str().map(str::to_owned));
    MigrationStat {
        to: to.to_owned(),
        phase: phase.unwrap_or_default(),
        round: progress.round,
        bytes_sent: progress.bytes_sent,
        bytes_done: progress.bytes_done,
        bytes_left: progress.bytes_left,
        bytes_total: progress.bytes_total,
        bytes_per_second: 0,
        throttle_percent: progress.throttle_percent,
        elapsed_ms: started.elapsed().as_millis() as u64,
    }
}

/// How fast bytes are sent, over the last moments (the migration's own estimate is one a round).
struct Speed {
    /// When it was looked at last, how much had been sent by then, and how fast it was before that.
    mark: Cell<(Instant, u64, u64)>,
}

impl Speed {
    fn new(started: Instant) -> Speed {
        Speed { mark: Cell::new((started, 0, 0)) }
    }

    fn of(&self, sent: u64) -> u64 {
        let (then, sent_then, before) = self.mark.get();
        let seconds = then.elapsed().as_secs_f64();
        let now = ((sent - sent_then.min(sent)) as f64 / seconds.max(f64::EPSILON)) as u64;
        if then.elapsed() >= SPEED_WINDOW {
            self.mark.set((Instant::now(), sent, now));
        }
        if before == 0 || then.elapsed() >= SPEED_WINDOW { now } else { before }
    }
}

/// Notes where the VM is now.
fn note_where(vm: &Vm, options: &SourceOptions, result: &Result<Report, SendError>) {
    let SourceOptions { to, security, .. } = options;
    let whereabouts = match result {
        Ok(_) => Whereabouts::Moved { to: to.clone() },
        Err(SendError::InDoubt { session, to }) => return doubt::begin(vm, *session, to, security),
        Err(_) => Whereabouts::Here,
    };
    vm.locked(|state| (state.whereabouts, state.migration, state.waiting) = (whereabouts, None, None));
    vm.go_on();
    // Only now: whatever becomes of the log, the VM is where it is.
    let name = &vm.facts.name;
    match result {
        Ok(report) => {
            let _ = vm.events.send(VmEvent::Moved);
            info!(vm = %name, to, downtime_ms = report.downtime_ms, "moved");
            if let Some(why) = &report.downtime_missed {
                warn!(vm = %name, downtime_ms = report.downtime_ms, target_ms = report.downtime_target_ms, %why, "the downtime target was missed");
            }
            if report.pages_lost > 0 {
                warn!(vm = %name, pages = report.pages_lost, "lost: the store did not give them back, and a touch of them is a memory error there");
            }
        }
        Err(error) => match vm.ended() {
            Some(ended) => warn!(to, "{}", gone(vm, &ended)),
            None => warn!(vm = %name, to, %error, "not moved: it stays here"),
        },
    }
}

fn report(vm: &Vm, to: &str, result: Result<Report, SendError>) -> Result<Value, Failure> {
    match result {
        Ok(report) => {
            let mut value = serde_json::to_value(report).map_err(|error| Failure::other(&error))?;
            value["to"] = to.into();
            Ok(value)
        }
        // No failure of the VM's: it is told as it would have been before a byte moved.
        Err(SendError::Vm(error @ (VmError::CannotMove(_) | VmError::TooMuchState { .. }))) => {
            Err(stays(vm, Failure::new(FailureKind::CannotMove, error.to_string())))
        }
        Err(error) if error.still_here() => Err(stays(vm, Failure::from(error))),
        Err(error) => Err(Failure::from(error)),
    }
}

/// Says what became of a VM that has not left.
fn stays(vm: &Vm, failure: Failure) -> Failure {
    if let Some(ended) = vm.ended() {
        return Failure::new(ended.kind, gone(vm, &ended));
    }
    let name = &vm.facts.name;
    let text = match vm.locked(|state| state.ender) {
        Some(by) => format!("{} by {by}: {name:?} has not moved, and ends here", failure.text),
        None => format!("{}; {name:?} {}", failure.text, vm.stays()),
    };
    Failure { text, ..failure }
}

/// Of a VM whose program ended while it was moving.
fn gone(vm: &Vm, ended: &Failure) -> String {
    format!("{:?} did not move: {ended} while it was moving; nothing is left to move", vm.facts.name)
}
