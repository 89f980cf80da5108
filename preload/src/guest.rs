//! The VM of this QEMU, driven over its QMP monitor.
//!
//! The device state travels through a socket pair whose other end QEMU is given, as QEMU makes it and as QEMU takes it.
//! `x-ignore-shared` keeps guest memory out of it, because QEMU believes it to be a shared file. QEMU's migration is
//! also its user's: before ours, it is asked whether it is free and whether the machine can move; afterwards it is set
//! as before.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmprocess::control::protocol::{GuestStat, State};
use vmprocess::failure::{Failure, FailureKind, chain};
use vmprocess::qemu::Backend;
use vmprocess::{Disk, GuestView, Machine, Newcomer, RunState};

use crate::devices;
use crate::farewell;
use crate::inventory::Inventory;
use crate::qmp::{HeardState, Qmp, QmpError};
use crate::runstate;
use crate::throttle::Throttle;
use crate::tuning::{self, Tuning};

/// Limit for a command that QEMU carries out at once, unless a disk or the store keeps it waiting.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// Limit for QEMU to write or take any of its device state, and to end its migration behind that.
const STATE_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two looks at how that stands.
const STATE_POLL: Duration = Duration::from_millis(2);
/// Device state is some hundred KiB and the memory of displays. So much of it is carried on at once.
const STATE_PART_BYTES: usize = 256 << 10;
/// Of QEMU's migration: memory that others share is not its to send.
const IGNORE_SHARED: &str = "x-ignore-shared";
/// QEMU's name for the descriptor that it is given.
const STATE_FD: &str = "vmemd-state";
/// Of QEMU's migration: disks are opened when the guest is to run, not when its state has come.
const LATE_BLOCK_ACTIVATE: &str = "late-block-activate";
/// Of QEMU's migration: what was written to a disk since, for a backup (a bitmap that is in no image).
const DIRTY_BITMAPS: &str = "dirty-bitmaps";
/// The questions to QEMU before the VM moves, besides its inventory.
const OBSTACLES: [&str; 4] = ["query-migrate", "query-status", "query-jobs", "query-block-exports"];

/// A QEMU that can be asked.
#[derive(Debug)]
pub(crate) struct Qemu {
    qmp: Qmp,
    heard_state: HeardState,
    throttle: Option<Throttle>,
    vcpus: u32,
    workload: String,
    /// The parts that it was made of when it was started: its target is made of the same.
    started_with: Inventory,
    /// Why it does not move, whatever its state, if its command line is the reason.
    stays: Option<String>,
    /// QEMU's ids of its guest memory.
    memory: Vec<String>,
    /// Its directory in /proc.
    process: PathBuf,
    /// The user's settings of QEMU's migration, while they are not set.
    set_aside: Option<Tuning>,
    /// Its device state was saved for a target that it may not have gone to. Bridges may have learnt there where the
    /// guest's addresses are, so it announces them again when it runs on here.
    given_away: bool,
    /// It came and has not run yet, so its disks are not its own: a QEMU that gives them away once more ends there.
    disks_away: bool,
}

/// As a QEMU does by itself that takes a guest.
fn announcement() -> Value {
    json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 })
}

/// Whether QEMU's migration is under way, in its words.
fn is_busy(status: &str) -> bool {
    !matches!(status, "" | "none" | "completed" | "failed" | "cancelled")
}

/// The obstacles to a move of the machine as it is now, from QEMU's answers to [`OBSTACLES`].
fn obstacles(answers: &[Value]) -> Vec<String> {
    let [migration, status, jobs, exports] = answers else { return Vec::new() };
    let mut found = Vec::new();
    let at = migration["status"].as_str().unwrap_or_default();
    if is_busy(at) {
        found.push(format!(
            "QEMU is at a migration that vmemd did not start ({at}): wait for its end, or cancel it"
        ));
    }
    match status["status"].as_str().unwrap_or_default() {
        "suspended" => found.push("the guest sleeps (suspend to RAM): wake it first".to_owned()),
        "postmigrate" if !is_busy(at) => found.push(
            "its state was given away and it has not run since (postmigrate): `vmemd resume` it first, if it runs nowhere else"
                .to_owned(),
        ),
        _ => {}
    }
    let list = |value: &'_ Value| value.as_array().cloned().unwrap_or_default();
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    found.extend(list(&migration["blocked-reasons"]).iter().map(word));
    let over = ["concluded", "null"];
    for job in list(jobs).iter().filter(|job| !over.contains(&word(&job["status"]).as_str())) {
        found.push(format!(
            "job {} ({}) is {}: wait for its end, or cancel it",
            word(&job["id"]),
            word(&job["type"]),
            word(&job["status"])
        ));
    }
    for export in list(exports) {
        let (id, node) = (word(&export["id"]), word(&export["node-name"]));
        found
            .push(format!("block node {node} is exported ({}, {id}): end that first", word(&export["type"])));
    }
    found
}

/// Whether the answer to `query-named-block-nodes` has bitmaps that are in no image.
fn has_loose_bitmaps(nodes: &Value) -> bool {
    let mut nodes = nodes.as_array().into_iter().flatten();
    nodes.any(|node| {
        let mut bitmaps = node["dirty-bitmaps"].as_array().into_iter().flatten();
        bitmaps.any(|bitmap| bitmap["name"].is_string() && bitmap["persistent"] != true)
    })
}

fn failure(error: QmpError) -> Failure {
    Failure::new(FailureKind::Vm, chain(&error))
}

impl Qemu {
    /// # Errors
    /// If it does not say what it is.
    pub(crate) fn new(mut qmp: Qmp, backends: &[Backend]) -> Result<Qemu, Failure> {
        let vcpus = qmp.ask("query-cpus-fast", Value::Null, COMMAND_TIMEOUT).map_err(failure)?;
        let program = std::env::current_exe().ok();
        let started_with = inventory(&mut qmp)?;
        let memory = guest_memory(&mut qmp, backends)?;
        let workload = program.as_deref().and_then(|path| path.file_name()).unwrap_or_default();
        let mut qemu = Qemu {
            heard_state: qmp.heard_state(),
            throttle: Throttle::find(),
            vcpus: vcpus.as_array().map_or(0, |list| list.len() as u32),
            workload: workload.to_string_lossy().into_owned(),
            started_with,
            stays: None,
            memory,
            process: Path::new("/proc/self").to_owned(),
            set_aside: None,
            given_away: false,
            disks_away: false,
            qmp,
        };
        qemu.status()?;
        Ok(qemu)
    }

    pub(crate) fn heard_state(&self) -> HeardState {
        self.heard_state.clone()
    }

    /// For ending the conversation when QEMU ends.
    pub(crate) fn monitor(&self) -> Option<UnixStream> {
        self.qmp.monitor()
    }

    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, Failure> {
        self.ask_for(command, arguments, COMMAND_TIMEOUT).map_err(failure)
    }

    /// The same with a limit of its own.
    pub(crate) fn ask_for(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        self.qmp.ask(command, arguments, limit)
    }

    /// The machine's state now.
    fn status(&mut self) -> Result<RunState, Failure> {
        let answer = self.ask("query-status", Value::Null)?;
        self.heard_state.answered(&answer);
        Ok(self.heard_state.get())
    }

    /// Never moves, for that reason.
    pub(crate) fn stays(self, why: Option<String>) -> Qemu {
        Qemu { stays: why, ..self }
    }

    /// Returns the migration capabilities that [`save`](Machine::save) needs. Fails if the machine cannot move as it is
    /// now: its command line is to make the same one at the target.
    fn check_move(&mut self) -> Result<Vec<&'static str>, Failure> {
        let cannot = |why: String| Failure::new(FailureKind::CannotMove, format!("cannot move: {why}"));
        if let Some(why) = &self.stays {
            return Err(Failure::new(FailureKind::CannotMove, why.clone()));
        }
        if self.disks_away {
            let text =
                "it has not run since it arrived, so its disks are not its own yet: `vmemd resume` it first";
            return Err(cannot(text.to_owned()));
        }
        let questions = [OBSTACLES.map(|command| (command, Value::Null)).to_vec(), Inventory::questions()];
        let answers = answers(&mut self.qmp, &questions.concat())?;
        let (state, machine) = answers.split_at(OBSTACLES.len());
        let mut why = obstacles(state);
        let changes = Inventory::new(machine).changes(&self.started_with);
        if !changes.is_empty() {
            why.push(format!(
                "it is not the machine that its command line makes: {}; undo that, or start it anew with a command line that says so",
                changes.join("; ")
            ));
        }
        if !why.is_empty() {
            return Err(cannot(why.join("; ")));
        }
        let mut on = vec![IGNORE_SHARED];
        on.extend(machine.iter().any(has_loose_bitmaps).then_some(DIRTY_BITMAPS));
        Ok(on)
    }

    /// Runs `work` with the capabilities in `on` and no others, and with parameters for a state that goes at once. The
    /// user's settings are put back behind it, also if it fails.
    fn with_capabilities<T>(
        &mut self,
        on: &[&str],
        work: impl FnOnce(&mut Qemu) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        struct PutBack<'a>(&'a mut Qemu);
        impl Drop for PutBack<'_> {
            fn drop(&mut self) {
                self.0.put_back();
            }
        }
        self.put_back();
        let qemu = PutBack(self);
        let questions = tuning::QUESTIONS.map(|command| (command, Value::Null));
        let now = answers(&mut qemu.0.qmp, &questions)?;
        let tuning = Tuning::new(&now[0], &now[1], on);
        let ours = tuning.ours();
        qemu.0.set_aside = Some(tuning);
        qemu.0.set(ours)?;
        work(&mut *qemu.0)
    }

    /// The arguments of [`tuning::COMMANDS`].
    fn set(&mut self, arguments: [Value; 2]) -> Result<(), Failure> {
        let commands: Vec<(&str, Value)> = tuning::COMMANDS.into_iter().zip(arguments).collect();
        let answers = self.qmp.ask_all(&commands, COMMAND_TIMEOUT).map_err(failure)?;
        answers.into_iter().try_for_each(|answer| answer.map(|_| ()).map_err(failure))
    }

    /// Sets what the user had set, if it is not.
    fn put_back(&mut self) {
        let Some(tuning) = self.set_aside.take().filter(|_| !self.qmp.has_ended()) else { return };
        if let Err(error) = self.set(tuning.theirs()) {
            tracing::warn!(%error, "the settings of QEMU's migration could not be put back: `savevm` may leave memory out");
            // Its migration may be ending still.
            self.set_aside = Some(tuning);
        }
    }

    /// Gives QEMU the other end of a connection for its device state.
    fn state_channel(&mut self) -> Result<UnixStream, Failure> {
        let io = |error| Failure::io("a socket for QEMU's device state", &error);
        let (ours, theirs) = UnixStream::pair().map_err(io)?;
        self.qmp.give_fd(STATE_FD, theirs.as_fd(), COMMAND_TIMEOUT).map_err(failure)?;
        Ok(ours)
    }

    /// Waits until QEMU's own migration has ended one way or the other.
    fn wait_for_end(&mut self, deadline: Instant) -> Result<(), Failure> {
        loop {
            let answer = self.ask("query-migrate", Value::Null)?;
            match answer["status"].as_str().unwrap_or_default() {
                "completed" => return Ok(()),
                "failed" | "cancelled" | "none" | "" => {
                    let why = answer["error-desc"].as_str().unwrap_or("it does not say why");
                    return Err(Failure::new(FailureKind::Vm, format!("QEMU's device state: {why}")));
                }
                status if Instant::now() >= deadline => {
                    let text = format!("QEMU's device state is still {status:?} after {STATE_TIMEOUT:?}");
                    return Err(Failure::new(FailureKind::Vm, text));
                }
                _ => std::thread::sleep(STATE_POLL),
            }
        }
    }

    fn write_state(&mut self, to: &mut dyn Write) -> Result<(), Failure> {
        let channel = self.state_channel()?;
        let begun = self.qmp.ask("migrate", json!({ "uri": format!("fd:{STATE_FD}") }), COMMAND_TIMEOUT);
        if let Err(error) = begun {
            // A migration that QEMU refuses has not begun: one that is under way then is somebody else's.
            if !matches!(error, QmpError::Refused { .. }) {
                self.give_state_up();
            }
            return Err(failure(error));
        }
        let passed = pass_on(channel, to).and_then(|()| self.wait_for_end(Instant::now() + STATE_TIMEOUT));
        passed.inspect_err(|_| self.give_state_up())
    }

    fn take_state(&mut self, state: &mut dyn Read) -> Result<(), Failure> {
        // Disks stay the source's until the guest is to run: it may be resumed there.
        let on = [IGNORE_SHARED, LATE_BLOCK_ACTIVATE, DIRTY_BITMAPS];
        self.with_capabilities(&on, |qemu| qemu.read_state(state))?;
        self.status().map(drop)
    }

    fn read_state(&mut self, state: &mut dyn Read) -> Result<(), Failure> {
        let channel = self.state_channel()?;
        self.ask("migrate-incoming", json!({ "uri": format!("fd:{STATE_FD}") }))?;
        // If it does not take all of it, it says why.
        let fed = feed(channel, state);
        self.wait_for_end(Instant::now() + STATE_TIMEOUT)?;
        fed
    }

    /// QEMU may still be at it: it can go on with the guest only when it is not.
    fn give_state_up(&mut self) {
        let given_up = self.ask("query-migrate", Value::Null).and_then(|answer| {
            if !is_busy(answer["status"].as_str().unwrap_or_default()) {
                return Ok(());
            }
            self.ask("migrate_cancel", Value::Null)?;
            self.wait_for_end(Instant::now() + COMMAND_TIMEOUT)
        });
        if let Err(error) = given_up {
            tracing::info!(%error, "the saving of the device state was given up");
        }
    }
}

/// The answers to all of it; null to what this QEMU refuses.
fn answers(qmp: &mut Qmp, questions: &[(&str, Value)]) -> Result<Vec<Value>, Failure> {
    let answers = qmp.ask_all(questions, COMMAND_TIMEOUT).map_err(failure)?;
    Ok(answers.into_iter().map(Result::unwrap_or_default).collect())
}

/// The ids of those backends of QEMU's that are `backends`. Others are the user's, for a device, and go with the state.
fn guest_memory(qmp: &mut Qmp, backends: &[Backend]) -> Result<Vec<String>, Failure> {
    let told = answers(qmp, &[("query-memdev", Value::Null)])?.remove(0);
    let id = |backend: &Value| backend["id"].as_str().map(str::to_owned);
    let ids: Vec<String> = told.as_array().into_iter().flatten().filter_map(id).collect();
    let file = |id: &String| ("qom-get", json!({ "path": format!("/objects/{id}"), "property": "mem-path" }));
    let files = answers(qmp, &ids.iter().map(file).collect::<Vec<_>>())?;
    let ours = |file: &Value| {
        file.as_str().is_some_and(|file| backends.iter().any(|backend| backend.path.as_os_str() == file))
    };
    Ok(ids.into_iter().zip(files).filter(|(_, file)| ours(file)).map(|(id, _)| id).collect())
}

fn inventory(qmp: &mut Qmp) -> Result<Inventory, Failure> {
    Ok(Inventory::new(&answers(qmp, &Inventory::questions())?))
}

impl Machine for Qemu {
    fn may_move(&mut self) -> Result<(), Failure> {
        self.check_move().map(drop)
    }

    fn written_disks(&mut self) -> Result<Vec<String>, Failure> {
        let told = answers(&mut self.qmp, &[("query-block", Value::Null)])?.remove(0);
        devices::written_disks(&told)
            .ok_or_else(|| Failure::new(FailureKind::Vm, "QEMU does not say which disks it has"))
    }

    fn state_bytes(&mut self) -> Option<u64> {
        let question = ("human-monitor-command", json!({ "command-line": "info ramblock" }));
        let told = answers(&mut self.qmp, &[question]).ok()?.remove(0);
        Some(devices::state_bytes(told.as_str()?, &self.memory, &self.process))
    }

    fn drain(&mut self) -> Result<(), Failure> {
        // Whatever a transaction is made of, it begins by waiting for all I/O under way.
        self.ask("transaction", json!({ "actions": [] })).map(|_| ())
    }

    fn pause(&mut self) -> Result<(), Failure> {
        let now = self.status()?;
        if now.state == State::Suspended {
            // It would not stand still: it wakes up by itself. It can be stopped for good all the same.
            return Err(Failure::new(FailureKind::Name, now.why.unwrap_or_default()));
        }
        self.ask("stop", Value::Null)?;
        if now.state == State::Running {
            self.heard_state.set(runstate::PAUSED, false);
        }
        Ok(())
    }

    fn runs(&mut self) -> Result<bool, Failure> {
        let now = self.status()?;
        if let Some(why) = runstate::why_over(&now.word) {
            return Err(Failure::new(FailureKind::Vm, why));
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
        if let Some(why) = runstate::why_no_cont(&self.heard_state.get().word) {
            return Err(Failure::new(FailureKind::Name, why));
        }
        self.qmp.ask("cont", Value::Null, COMMAND_TIMEOUT).map_err(|error| match error {
            QmpError::Refused { .. } => failure(error),
            // It may have been heard, and be carried out later.
            error => Failure::new(FailureKind::InDoubt, chain(&error)),
        })?;
        self.heard_state.set(runstate::RUNNING, true);
        self.disks_away = false;
        self.put_back();
        if std::mem::take(&mut self.given_away)
            && let Err(error) = self.ask("announce-self", announcement())
        {
            tracing::info!(%error, "bridges learn where the guest is when it sends next");
        }
        Ok(())
    }

    fn disks(&mut self, snapshot: &str) -> Result<Vec<Disk>, Failure> {
        self.disks_for(snapshot)
    }

    fn snapshot_disks(&mut self, snapshot: &str) -> Result<Vec<Disk>, Failure> {
        if self.given_away || self.disks_away {
            let text = "its disks are not its own until it runs: `vmemd resume` it first";
            return Err(Failure::new(FailureKind::CannotMove, text));
        }
        self.take_snapshots(snapshot)
    }

    fn forget_disks(&mut self, disks: &[Disk]) -> Result<(), Failure> {
        // A QEMU whose disks are not its own ends (an assertion) when one of their snapshots is deleted.
        if (self.given_away || self.disks_away) && !self.runs()? {
            return Err(Failure::new(FailureKind::CannotMove, Qemu::left_in(disks)));
        }
        self.drop_snapshots(disks)
    }

    fn remove_snapshot(&mut self, file: &str, snapshot: &str) -> Result<bool, Failure> {
        let Some(device) = self.device_of(file)? else { return Ok(false) };
        // As above.
        if (self.given_away || self.disks_away) && !self.runs()? {
            let text = "the disks are not the VM's own until it runs";
            return Err(Failure::new(FailureKind::CannotMove, text));
        }
        self.delete_snapshot(&device, snapshot).map(|()| true)
    }

    fn offer(&mut self, offer: &str) -> Result<String, Failure> {
        self.with_generation(offer)
    }

    fn save(&mut self, to: &mut dyn Write) -> Result<(), Failure> {
        // Once more: a monitor may have changed it while its memory went.
        let on = self.check_move()?;
        self.given_away = true;
        self.with_capabilities(&on, |qemu| qemu.write_state(to))
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
        let RunState { state, why, .. } = self.heard_state.get();
        let failed = why.filter(|_| state == State::Failed);
        GuestView { vcpus: self.vcpus, workload: self.workload.clone(), guest: GuestStat::default(), failed }
    }

    fn run_state(&self) -> Option<RunState> {
        self.qmp.look_again();
        Some(self.heard_state.get())
    }

    fn ended(&self) -> Option<Failure> {
        self.qmp.has_ended().then(|| self.heard_state.last_words()).flatten()
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
    fn load(self: Box<Self>, state: &mut dyn Read) -> Result<Box<dyn Machine>, Failure> {
        let mut qemu = self.0;
        match qemu.take_state(state) {
            Ok(()) => {
                farewell::over();
                qemu.disks_away = true;
                Ok(Box::new(qemu))
            }
            // QEMU ends when it does not understand its state.
            Err(failure) => Err(farewell::reason().map_or(failure, |why| Failure::new(FailureKind::Vm, why))),
        }
    }
}

/// Carries QEMU's device state on as QEMU makes it: at the speed of the slower of the two.
fn pass_on(mut channel: UnixStream, to: &mut dyn Write) -> Result<(), Failure> {
    let io = |error| Failure::io("QEMU's device state", &error);
    channel.set_read_timeout(Some(STATE_TIMEOUT)).map_err(io)?;
    let mut part = vec![0; STATE_PART_BYTES];
    loop {
        match channel.read(&mut part) {
            Ok(0) => return Ok(()),
            Ok(count) => to
                .write_all(&part[..count])
                .map_err(|error| Failure::io("QEMU's device state is not taken", &error))?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(io(error)),
        }
    }
}

/// Gives QEMU its device state as it takes it, and its end.
fn feed(mut channel: UnixStream, state: &mut dyn Read) -> Result<(), Failure> {
    let io = |error| Failure::io("QEMU does not take its device state", &error);
    channel.set_write_timeout(Some(STATE_TIMEOUT)).map_err(io)?;
    let mut part = vec![0; STATE_PART_BYTES];
    loop {
        match state.read(&mut part) {
            Ok(0) => return Ok(()),
            Ok(count) => channel.write_all(&part[..count]).map_err(io)?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(Failure::io("QEMU's device state does not come", &error)),
        }
    }
}

#[cfg(test)]
#[path = "guest_move_tests.rs"]
mod move_tests;
#[cfg(test)]
#[path = "guest_tests.rs"]
pub(crate) mod tests;
