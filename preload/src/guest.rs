//! The VM of this QEMU, driven over its QMP monitor.
//!
//! The device state travels through a socket pair whose other end QEMU is given: nothing of it is ever in a file system.
//! `x-ignore-shared` keeps guest memory out of it, because QEMU believes it to be a shared file.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmprocess::control::protocol::{GuestStat, State};
use vmprocess::failure::{Failure, Kind, chain};
use vmprocess::{Guest, GuestView, Newcomer, RunState};

use crate::farewell;
use crate::qmp::{Qmp, QmpError, Standing};
use crate::runstate;
use crate::throttle::Throttle;

/// For what QEMU does at once, unless a disk or the store keeps it waiting.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// For all of the device state to be written or read.
const STATE_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two looks at how that stands.
const STATE_POLL: Duration = Duration::from_millis(2);
/// Device state is some hundred KiB and the memory of displays.
const STATE_BYTES_MAX: usize = 1 << 30;
/// Of QEMU's migration: memory that others share is not its to send.
const IGNORE_SHARED: &str = "x-ignore-shared";
/// What QEMU calls the descriptor that it is given.
const STATE_FD: &str = "vmemd-state";
/// As fast as can be: the VM stands still, and nothing leaves this machine.
const BYTES_PER_SECOND: u64 = 1 << 40;
const DOWNTIME_LIMIT_MS: u64 = 1_000_000;

/// A QEMU that can be asked.
#[derive(Debug)]
pub(crate) struct Qemu {
    qmp: Qmp,
    standing: Standing,
    throttle: Option<Throttle>,
    vcpus: u32,
    workload: String,
    /// Its network may know the guest's addresses elsewhere: at the target that it did not go to.
    given_away: bool,
    /// It came and has not run yet, so its disks are not its own: a QEMU that gives them away once more ends there.
    disks_away: bool,
}

/// As a QEMU does by itself that takes a guest.
fn announcement() -> Value {
    json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 })
}

fn failure(error: QmpError) -> Failure {
    Failure::new(Kind::Vm, chain(&error))
}

impl Qemu {
    /// # Errors
    /// If it does not say what it is.
    pub(crate) fn new(mut qmp: Qmp) -> Result<Qemu, Failure> {
        let vcpus = qmp.ask("query-cpus-fast", Value::Null, COMMAND_TIMEOUT).map_err(failure)?;
        let program = std::env::current_exe().ok();
        let workload = program.as_deref().and_then(|path| path.file_name()).unwrap_or_default();
        let mut qemu = Qemu {
            standing: qmp.standing(),
            throttle: Throttle::find(),
            vcpus: vcpus.as_array().map_or(0, |list| list.len() as u32),
            workload: workload.to_string_lossy().into_owned(),
            given_away: false,
            disks_away: false,
            qmp,
        };
        qemu.status()?;
        Ok(qemu)
    }

    pub(crate) fn standing(&self) -> Standing {
        self.standing.clone()
    }

    /// For ending the conversation when QEMU ends.
    pub(crate) fn monitor(&self) -> Option<UnixStream> {
        self.qmp.monitor()
    }

    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, Failure> {
        self.qmp.ask(command, arguments, COMMAND_TIMEOUT).map_err(failure)
    }

    /// What the machine does now.
    fn status(&mut self) -> Result<RunState, Failure> {
        let answer = self.ask("query-status", Value::Null)?;
        self.standing.answered(&answer);
        Ok(self.standing.get())
    }

    /// Gives QEMU the other end of a connection for its device state, and sets what is to go over it.
    fn state_channel(&mut self, capabilities: &[&str]) -> Result<UnixStream, Failure> {
        let on: Vec<Value> =
            capabilities.iter().map(|name| json!({ "capability": name, "state": true })).collect();
        self.ask("migrate-set-capabilities", json!({ "capabilities": on }))?;
        let io = |error| Failure::io("a socket for QEMU's device state", &error);
        let (ours, theirs) = UnixStream::pair().map_err(io)?;
        self.qmp.give_fd(STATE_FD, theirs.as_fd(), COMMAND_TIMEOUT).map_err(failure)?;
        Ok(ours)
    }

    /// Waits until QEMU's own migration has ended one way or the other.
    fn settle(&mut self, deadline: Instant) -> Result<(), Failure> {
        loop {
            let answer = self.ask("query-migrate", Value::Null)?;
            match answer["status"].as_str().unwrap_or_default() {
                "completed" => return Ok(()),
                "failed" | "cancelled" | "none" | "" => {
                    let why = answer["error-desc"].as_str().unwrap_or("it does not say why");
                    return Err(Failure::new(Kind::Vm, format!("QEMU's device state: {why}")));
                }
                status if Instant::now() >= deadline => {
                    let text = format!("QEMU's device state is still {status:?} after {STATE_TIMEOUT:?}");
                    return Err(Failure::new(Kind::Vm, text));
                }
                _ => std::thread::sleep(STATE_POLL),
            }
        }
    }

    fn write_state(&mut self) -> Result<Vec<u8>, Failure> {
        let parameters = json!({ "max-bandwidth": BYTES_PER_SECOND, "downtime-limit": DOWNTIME_LIMIT_MS });
        self.ask("migrate-set-parameters", parameters)?;
        let channel = self.state_channel(&[IGNORE_SHARED])?;
        let deadline = Instant::now() + STATE_TIMEOUT;
        self.ask("migrate", json!({ "uri": format!("fd:{STATE_FD}") }))?;
        let state = read_all(channel, deadline)?;
        self.settle(deadline)?;
        Ok(state)
    }

    fn read_state(&mut self, state: &[u8]) -> Result<(), Failure> {
        // Disks stay the source's until the guest is to run: it may be resumed there.
        let mut channel = self.state_channel(&[IGNORE_SHARED, "late-block-activate"])?;
        let deadline = Instant::now() + STATE_TIMEOUT;
        self.ask("migrate-incoming", json!({ "uri": format!("fd:{STATE_FD}") }))?;
        let io = |error| Failure::io("QEMU does not take its device state", &error);
        channel.set_write_timeout(Some(STATE_TIMEOUT)).map_err(io)?;
        // If it does not take all of it, it says why.
        let written = channel.write_all(state).map_err(io);
        drop(channel);
        self.settle(deadline)?;
        written
    }

    /// QEMU may still be at it: it can go on with the guest only when it is not.
    fn give_state_up(&mut self) {
        let cancelled = self.ask("migrate_cancel", Value::Null);
        let settled = cancelled.and_then(|_| self.settle(Instant::now() + COMMAND_TIMEOUT));
        if let Err(error) = settled {
            tracing::info!(%error, "the saving of the device state was given up");
        }
    }
}

impl Guest for Qemu {
    fn drain(&mut self) -> Result<(), Failure> {
        // Whatever a transaction is made of, it begins by waiting for all I/O under way.
        self.ask("transaction", json!({ "actions": [] })).map(|_| ())
    }

    fn pause(&mut self) -> Result<(), Failure> {
        let now = self.status()?;
        if now.state == State::Suspended {
            // It would not stand still: it wakes up by itself. It can be stopped for good all the same.
            return Err(Failure::new(Kind::Name, now.why.unwrap_or_default()));
        }
        self.ask("stop", Value::Null)?;
        if now.state == State::Running {
            self.standing.set(runstate::PAUSED, false);
        }
        Ok(())
    }

    fn runs(&mut self) -> Result<bool, Failure> {
        let now = self.status()?;
        if let Some(why) = runstate::why_over(&now.word) {
            return Err(Failure::new(Kind::Vm, why));
        }
        // A guest that sleeps wakes up by itself.
        let runs = matches!(now.state, State::Running | State::Suspended);
        self.disks_away &= !runs;
        Ok(runs)
    }

    fn resume(&mut self) -> Result<(), Failure> {
        if self.qmp.has_ended() {
            return Err(failure(QmpError::Closed));
        }
        // QEMU takes the word, and does not follow it.
        if let Some(why) = runstate::why_no_cont(&self.standing.get().word) {
            return Err(Failure::new(Kind::Name, why));
        }
        self.qmp.ask("cont", Value::Null, COMMAND_TIMEOUT).map_err(|error| match error {
            QmpError::Refused { .. } => failure(error),
            // It may have been heard, and be carried out later.
            error => Failure::new(Kind::InDoubt, chain(&error)),
        })?;
        self.standing.set(runstate::RUNNING, true);
        self.disks_away = false;
        if std::mem::take(&mut self.given_away)
            && let Err(error) = self.ask("announce-self", announcement())
        {
            tracing::info!(%error, "bridges learn where the guest is when it sends next");
        }
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, Failure> {
        if self.disks_away {
            let text =
                "it has not run since it arrived, so its disks are not its own yet: `vmemd resume` it first";
            return Err(Failure::new(Kind::Vm, text));
        }
        self.given_away = true;
        self.write_state().inspect_err(|_| self.give_state_up())
    }

    fn throttle(&mut self, percent: u8) {
        match self.throttle {
            Some(throttle) => throttle.set(percent),
            None if percent > 0 => tracing::warn!(
                "this QEMU exports no cpu_throttle_set: a guest that writes faster than the network carries is not held back"
            ),
            None => {}
        }
    }

    fn view(&self) -> GuestView {
        let RunState { state, why, .. } = self.standing.get();
        let failed = why.filter(|_| state == State::Failed);
        GuestView { vcpus: self.vcpus, workload: self.workload.clone(), guest: GuestStat::default(), failed }
    }

    fn run_state(&self) -> Option<RunState> {
        self.qmp.look_again();
        Some(self.standing.get())
    }

    fn ended(&self) -> Option<Failure> {
        self.qmp.has_ended().then(|| self.standing.last_words()).flatten()
    }

    fn quit(mut self: Box<Self>) -> Result<(), Failure> {
        match self.qmp.ask("quit", Value::Null, COMMAND_TIMEOUT) {
            // It may be gone before it has answered.
            Ok(_) | Err(QmpError::Closed) => Ok(()),
            Err(error) => Err(failure(error)),
        }
    }
}

/// A QEMU that was started with `-incoming defer` and waits for its device state.
#[derive(Debug)]
pub(crate) struct Incoming(pub(crate) Qemu);

impl Newcomer for Incoming {
    fn load(self: Box<Self>, state: &[u8]) -> Result<Box<dyn Guest>, Failure> {
        let mut qemu = self.0;
        match qemu.read_state(state).and_then(|()| qemu.status()) {
            Ok(_) => {
                farewell::over();
                qemu.disks_away = true;
                Ok(Box::new(qemu))
            }
            // QEMU ends when it does not understand its state.
            Err(failure) => Err(farewell::reason().map_or(failure, |why| Failure::new(Kind::Vm, why))),
        }
    }
}

fn read_all(mut channel: UnixStream, deadline: Instant) -> Result<Vec<u8>, Failure> {
    let io = |error| Failure::io("QEMU's device state", &error);
    let left = deadline.saturating_duration_since(Instant::now()).max(STATE_POLL);
    channel.set_read_timeout(Some(left)).map_err(io)?;
    let mut state = Vec::new();
    (&mut channel).take(STATE_BYTES_MAX as u64 + 1).read_to_end(&mut state).map_err(io)?;
    if state.len() > STATE_BYTES_MAX {
        let text = format!(
            "QEMU's device state is larger than {STATE_BYTES_MAX} bytes: is its memory really shared?"
        );
        return Err(Failure::new(Kind::Vm, text));
    }
    Ok(state)
}

#[cfg(test)]
#[path = "guest_tests.rs"]
mod tests;
