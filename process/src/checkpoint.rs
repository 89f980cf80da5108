//! A checkpoint of the VM, on behalf of a client that has the archive: this process must not open files, so it is
//! passed them.
//!
//! ```text
//!   asked ──▶ files passed ──▶ saving ──▶ saved: the VM goes on ──▶ durable, named: told by the client ──▶ answered
//!     │             │            │                    │
//!     └── refused   └── no ──────┴── failed, cancelled┴── cancelled, client gone: goes on as before
//! ```
//! From `saved` on the client may have given the checkpoint its name, whatever is heard of it. So only its own word
//! that there is none (`cancel`) takes the disks' versions away: a connection that is lost leaves them, for the
//! checkpoint may need them.

use std::cell::Cell;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant, UNIX_EPOCH};

use checkpoint::format::sealed::read_map;
use checkpoint::format::{Disk, DiskVersion};
use checkpoint::key::ChainKey;
use checkpoint::save::{Base, Failed, Files, Phase, Progress, SaveError, SaveOptions, Saved, save_at_once};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use serde_json::{Value, json};
use swapd::{EngineHandle, TierId};
use tracing::{info, warn};

use crate::checkpointing::{Checkpointing, LastCheckpoint};
use crate::control::protocol::{CheckpointBase, CheckpointRequest, CheckpointStat, Request};
use crate::control::server::Client;
use crate::failure::{Failure, FailureKind};
use crate::hold::{FOR_ITS_CHECKPOINT, Whereabouts};
use crate::life::CAUGHT;
use crate::live_vm::Saving;
use crate::vm::Vm;

/// How often it is looked whether whoever asked is still there.
const CLIENT_POLL: Duration = Duration::from_millis(100);
/// Files that are written: image, map, state.
const WRITTEN_FILES: usize = 3;
/// Over which time the speed is measured.
const SPEED_WINDOW: Duration = Duration::from_millis(500);

enum Step {
    Progress(CheckpointStat),
    Ended(Result<(Saved, Vec<Disk>), Failure>),
}

/// The VM is marked as one that is being saved, until this is dropped.
struct Begun<'a>(&'a Vm);

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        self.0.locked(|state| state.checkpoint = None);
        self.0.go_on();
    }
}

/// Saves the VM into files of the client's. Answers when the client has said what became of them; cancels if the client
/// goes away.
pub(crate) fn checkpoint(
    vm: &Arc<Vm>,
    request: &CheckpointRequest,
    client: &mut Client<'_>,
) -> Result<Value, Failure> {
    vm.memory()?.engine()?;
    let begun = begin(vm)?;
    let disks = may_be_saved(vm, request)?;
    may_be_plain(vm, request)?;
    let mut files = client.files(request.files())?;
    let key = files.pop_if(|_| request.encrypted).map(take_key).transpose()?;
    may_be_used(&files, vm.memory()?.engine()?)?;
    let mut files = files.into_iter();
    let mut next = || files.next().expect("as many as were asked for");
    let into = Files { image: next(), map: next(), state: next() };
    let base = request.base.map(|base| read_base(&next(), key.as_ref(), base)).transpose()?;
    let options = options(request, key);
    let (saved, taken) = run(vm, options, disks.snapshot, (into, base), client)?;
    vm.locked(|state| state.checkpoint.iter_mut().for_each(|now| now.saved = true));
    info!(vm = %vm.facts.name, pause_ms = saved.pause_ms, rounds = saved.rounds, bytes = saved.bytes_written, "saved");
    let became = durable(vm, &saved, (&taken, disks.left_out), client);
    if request.stop && !matches!(became, Became::Named(_)) {
        stays_after_all(vm);
    }
    let answer = match became {
        Became::Named(name) => Ok(json!({ "name": vm.facts.name, "checkpoint": name })),
        Became::Nothing(failure) => {
            forget(vm, &taken);
            Err(failure)
        }
        Became::Unheard => {
            keep(vm, &taken);
            Err(cancelled())
        }
    };
    drop(begun);
    answer
}

/// In one step, so that two requests cannot both.
fn begin(vm: &Vm) -> Result<Begun<'_>, Failure> {
    let name = &vm.facts.name;
    if let Some(reason) = vm.guest_failure() {
        let text = format!("{name:?} cannot be saved: its guest has failed: {reason}");
        return Err(Failure::new(FailureKind::CannotMove, text));
    }
    vm.locked(|state| {
        let why = match state.whereabouts.elsewhere(name) {
            Some(why) => why,
            None if state.ender.is_some() || state.end.is_some() => "it is ending".to_owned(),
            None if state.closing => {
                "what is left of a former checkpoint waits for its disk, which does not answer".to_owned()
            }
            None if state.checkpoint.is_some() => {
                "a checkpoint of it is being made already; cancel that first (Ctrl-C of `vmemd checkpoint`)"
                    .to_owned()
            }
            None => {
                vm.cancel.store(false, Ordering::SeqCst);
                state.checkpoint = Some(Checkpointing::default());
                return Ok(Begun(vm));
            }
        };
        Err(Failure::new(FailureKind::Name, format!("{name:?} cannot be saved: {why}")))
    })
}

/// A checkpoint's disks.
struct Disks {
    /// The name of the snapshots that they are to have; None: the checkpoint is made without disks.
    snapshot: Option<String>,
    /// Those of which it has nothing, with the user's knowledge.
    left_out: Vec<String>,
}

/// Refuses what a checkpoint could not have.
fn may_be_saved(vm: &Vm, request: &CheckpointRequest) -> Result<Disks, Failure> {
    vm.machine(|machine| {
        machine.may_move()?;
        if request.without_disks {
            return Ok(Disks { snapshot: None, left_out: machine.written_disks()? });
        }
        let snapshot = DiskVersion::snapshot_at(UNIX_EPOCH.elapsed().unwrap_or_default().as_millis());
        machine.disks(&snapshot)?;
        Ok(Disks { snapshot: Some(snapshot), left_out: Vec::new() })
    })
}

/// There is no checkpoint that the disks' versions belong to.
fn forget(vm: &Vm, disks: &[Disk]) {
    if disks.is_empty() {
        return;
    }
    if let Err(error) = vm.machine(|machine| machine.forget_disks(disks)) {
        warn!(vm = %vm.facts.name, %error, "snapshots of a checkpoint that was not made stay in its disks");
    }
}

/// There may be a checkpoint that the disks' versions belong to.
fn keep(vm: &Vm, disks: &[Disk]) {
    let snapshots = disks.iter().filter_map(|disk| match &disk.version {
        DiskVersion::Snapshot(snapshot) => Some(format!("{snapshot} in {}", disk.file)),
        DiskVersion::InState => None,
    });
    let snapshots = snapshots.collect::<Vec<_>>().join(", ");
    if !snapshots.is_empty() {
        warn!(
            vm = %vm.facts.name, %snapshots,
            "whoever made a checkpoint is gone: these snapshots stay, for it may have got its name; `vmemd checkpoint list` shows that"
        );
    }
}

/// What is encrypted at rest is not made readable by the way.
fn may_be_plain(vm: &Vm, request: &CheckpointRequest) -> Result<(), Failure> {
    let encrypted = vm.memory()?.engine()?.stored_reader().is_encrypted();
    if !encrypted || request.encrypted || request.plain {
        return Ok(());
    }
    let text = format!(
        "the store of {:?} is encrypted: name a key (--encrypt-to KEYFILE), and its checkpoint is encrypted as well; or \
         give --plain to have its memory written as it is, to a disk that is encrypted itself",
        vm.facts.name
    );
    Err(Failure::new(FailureKind::Usage, text))
}

/// The key that the client has passed. It is in the pipe by now: a client that has passed something else is not waited
/// for.
fn take_key(pipe: File) -> Result<ChainKey, Failure> {
    let taken = fcntl_setfl(&pipe, OFlags::NONBLOCK).map_err(std::io::Error::from);
    let key = taken.and_then(|()| ChainKey::from_pipe(pipe));
    key.map_err(|error| {
        Failure::new(FailureKind::Usage, format!("the client does not pass the key: {error}"))
    })
}

/// Refuses descriptors that a checkpoint must not be written into, or cannot be: the image, the map and the state, and
/// the base's map behind these. The client may pass any that it has.
fn may_be_used(files: &[File], engine: &EngineHandle) -> Result<(), Failure> {
    let looking = |error: std::io::Error| Failure::io("looking at a file of the checkpoint", &error);
    let id = |file: &File| file.metadata().map(|found| (found.dev(), found.ino())).map_err(looking);
    let refused =
        |why: &str| Err(Failure::new(FailureKind::Usage, format!("what the client has passed {why}")));
    let stored = engine.stored_reader();
    let mut taken = Vec::new();
    for tier in [TierId::STORE, TierId::ORIGIN] {
        for file in stored.files(tier).map_err(looking)? {
            taken.push(id(&file)?);
        }
    }
    for (nth, file) in files.iter().enumerate() {
        if !file.metadata().map_err(looking)?.is_file() {
            return refused("is no regular file");
        }
        let flags = fcntl_getfl(file).map_err(|error| looking(error.into()))?;
        let mode = flags & OFlags::ACCMODE;
        let wanted = if nth < WRITTEN_FILES { OFlags::WRONLY } else { OFlags::RDONLY };
        if mode != wanted && mode != OFlags::RDWR {
            return refused("is not open for what it is for");
        }
        if flags.contains(OFlags::APPEND) {
            return refused("is open to append, where everything has its place");
        }
        let id = id(file)?;
        if taken.contains(&id) {
            return refused("is one file twice, or the VM's own store");
        }
        taken.push(id);
    }
    Ok(())
}

fn read_base(map: &File, key: Option<&ChainKey>, base: CheckpointBase) -> Result<Base, Failure> {
    let map = read_map(map, key).map_err(|error| {
        Failure::new(FailureKind::Usage, format!("the base's map: {}", crate::failure::chain(&error)))
    })?;
    Ok(Base { map, cloned: base == CheckpointBase::Cloned })
}

fn options(request: &CheckpointRequest, key: Option<ChainKey>) -> SaveOptions {
    SaveOptions {
        downtime_target: Duration::from_millis(request.downtime_target_ms),
        max_rounds: request.max_rounds,
        max_throttle: request.max_throttle,
        rate: request.rate,
        stop: request.stop,
        key,
        ..SaveOptions::default()
    }
}

/// Has the VM saved on a thread of its own, and tells the client how it goes.
fn run(
    vm: &Arc<Vm>,
    options: SaveOptions,
    snapshot: Option<String>,
    files: (Files, Option<Base>),
    client: &mut Client<'_>,
) -> Result<(Saved, Vec<Disk>), Failure> {
    let (steps, progress) = channel();
    let saver = vm.clone();
    let spawned = std::thread::Builder::new().name("checkpoint".to_owned()).spawn(move || {
        CAUGHT.set(true);
        let mut saving = Saving::begin(&saver, snapshot);
        let saved = catch_unwind(AssertUnwindSafe(|| session(&mut saving, files, &options, &steps)));
        CAUGHT.set(false);
        let result = match saved {
            Ok(Ok(saved)) => {
                if options.stop {
                    saving.stays();
                }
                Ok((saved, saving.disks()))
            }
            Ok(Err(failure)) => Err(failure),
            Err(_) => Err(saving.after_panic()),
        };
        let unused = saving.disks();
        drop(saving);
        forget(&saver, &unused);
        let _ = steps.send(Step::Ended(result));
    });
    spawned.map_err(|error| Failure::io("cannot start the checkpoint's thread", &error))?;
    loop {
        match progress.recv_timeout(CLIENT_POLL) {
            Ok(Step::Progress(stat)) => {
                if client.saving(stat).is_err() || client.gone() || client.cancels() {
                    vm.cancel.store(true, Ordering::SeqCst);
                }
            }
            Ok(Step::Ended(result)) => return result.map_err(|failure| stays(vm, failure)),
            Err(RecvTimeoutError::Timeout) if client.gone() || client.cancels() => {
                vm.cancel.store(true, Ordering::SeqCst);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                let text = format!("the checkpoint of {:?} ended without a word: see its log", vm.facts.name);
                return Err(Failure::new(FailureKind::Vm, text));
            }
        }
    }
}

fn session(
    saving: &mut Saving<'_>,
    (files, base): (Files, Option<Base>),
    options: &SaveOptions,
    steps: &Sender<Step>,
) -> Result<Saved, Failure> {
    let vm = saving.vm;
    let handle = match vm.memory().and_then(|memory| memory.engine()) {
        Ok(handle) => handle.clone(),
        Err(failure) => return Err(SaveError::from(crate::live_vm::vm_error(failure)).into()),
    };
    let started = Instant::now();
    let speed = Speed::new(started);
    let progress = |progress: Progress| {
        let stat = CheckpointStat {
            phase: progress.phase,
            round: progress.round,
            bytes_written: progress.bytes_written,
            bytes_done: progress.bytes_done,
            bytes_left: progress.bytes_left,
            bytes_total: progress.bytes_total,
            bytes_per_second: speed.of(&progress),
            throttle_percent: progress.throttle_percent,
            elapsed_ms: started.elapsed().as_millis() as u64,
        };
        vm.locked(|state| state.checkpoint.iter_mut().for_each(|now| now.stat = stat.clone()));
        let _ = steps.send(Step::Progress(stat));
    };
    info!(vm = %vm.facts.name, "a checkpoint begins");
    let saved = save_at_once(&handle, saving, files, base, options, &progress, &vm.cancel);
    let Failed { error, rest } = match saved {
        Ok(saved) => return Ok(saved),
        Err(failed) => failed,
    };
    let failure = Failure::from(error);
    if let Some(rest) = rest {
        // The client hears at once, and the VM may be stopped meanwhile. Only one of these is to be at a time.
        warn!(vm = %vm.facts.name, %failure, "a disk does not answer: what is left of the checkpoint waits for it");
        vm.locked(|state| state.closing = true);
        let _ = steps.send(Step::Ended(Err(failure.clone())));
        rest.close();
        vm.locked(|state| state.closing = false);
        info!(vm = %vm.facts.name, "nothing is left of the checkpoint that failed");
    }
    Err(failure)
}

/// How fast memory is dealt with, over the last moments: what is left of a round goes down by it.
struct Speed {
    /// When it was looked at last, at what that was then, in which round, and how fast it was before that.
    mark: Cell<(Instant, u64, u32, u64)>,
}

impl Speed {
    fn new(started: Instant) -> Speed {
        Speed { mark: Cell::new((started, 0, 0, 0)) }
    }

    fn of(&self, progress: &Progress) -> u64 {
        let (then, left_then, round, before) = self.mark.get();
        if round != progress.round || progress.phase == Phase::Finishing {
            self.mark.set((Instant::now(), progress.bytes_left, progress.round, before));
            return before;
        }
        let took = then.elapsed();
        if took < SPEED_WINDOW {
            return before;
        }
        let now = (left_then.saturating_sub(progress.bytes_left) as f64 / took.as_secs_f64()) as u64;
        self.mark.set((Instant::now(), progress.bytes_left, round, now));
        now
    }
}

/// What became of the files that were saved.
enum Became {
    /// A checkpoint of that name.
    Named(String),
    /// No checkpoint, and never will: the client says so, or was not told of the files.
    Nothing(Failure),
    /// A checkpoint or not: the client is gone.
    Unheard,
}

fn cancelled() -> Failure {
    Failure::new(FailureKind::Interrupted, "cancelled before the checkpoint was durable")
}

/// Waits until the client has made the files durable.
fn durable(vm: &Vm, saved: &Saved, disks: (&[Disk], Vec<String>), client: &mut Client<'_>) -> Became {
    // By the client, behind the last look of the session: it waits for an answer, and reads nothing else.
    if vm.cancel.load(Ordering::SeqCst) {
        return Became::Nothing(cancelled());
    }
    let facts = match facts(vm, saved, disks) {
        Ok(facts) => facts,
        Err(failure) => return Became::Nothing(failure),
    };
    // A line that did not go out whole is none.
    if client.saved(json!({ "saved": saved, "vm": facts })).is_err() {
        return Became::Nothing(cancelled());
    }
    loop {
        match client.says(CLIENT_POLL) {
            Ok(None) if client.gone() => return Became::Unheard,
            Ok(None) => {}
            Ok(Some(Request::Checkpointed { name, bytes })) => {
                let last = LastCheckpoint::new(name.clone(), saved.made_at_ms, bytes);
                vm.locked(|state| state.last_checkpoint = Some(last));
                return Became::Named(name);
            }
            Ok(Some(Request::Cancel)) => return Became::Nothing(cancelled()),
            Ok(Some(_)) | Err(_) => return Became::Unheard,
        }
    }
}

/// What a restore must know before it reads the state.
fn facts(vm: &Vm, saved: &Saved, (disks, left_out): (&[Disk], Vec<String>)) -> Result<Value, Failure> {
    let stat = vm.stat()?;
    let facts = &vm.facts;
    Ok(json!({
        "name": facts.name,
        "memory_bytes": facts.memory_bytes,
        "budget_bytes": stat.memory.ram_budget_bytes,
        "vcpus": stat.vcpus,
        "workload": stat.workload,
        // Only a QEMU says what it does.
        "machine": if stat.run_state.is_some() { "qemu" } else { "reference" },
        "offer": vm.offer()?,
        "paused": saved.stood_still,
        "disks": disks,
        "without_disks": left_out,
    }))
}

/// It was to be stopped, and there is no checkpoint: it goes on as before.
fn stays_after_all(vm: &Vm) {
    let name = &vm.facts.name;
    let resumed = vm.machine(|machine| {
        // Under the machine's lock, as everybody who lets it go on.
        let ours = vm.locked(|state| {
            let ours = state.hold.paused() == Some(FOR_ITS_CHECKPOINT)
                && matches!(state.whereabouts, Whereabouts::Here)
                && state.ender.is_none();
            if ours {
                state.hold.unpause();
            }
            ours && !state.hold.is_stalled()
        });
        if ours { machine.resume() } else { Ok(()) }
    });
    if let Err(error) = resumed {
        warn!(vm = %name, %error, "it was to go on, and does not: `vmemd resume` it");
        vm.locked(|state| state.hold.pause_by(crate::hold::DID_NOT_GO_ON));
    }
}

/// Says what became of a VM of which there is no checkpoint.
fn stays(vm: &Vm, failure: Failure) -> Failure {
    let name = &vm.facts.name;
    if let Some(ended) = vm.ended() {
        let text = format!("there is no checkpoint of {name:?}: {ended} while it was being saved");
        return Failure::new(ended.kind, text);
    }
    let text = match vm.locked(|state| state.ender) {
        Some(by) => format!("{} by {by}: {name:?} ends, and there is no checkpoint of it", failure.text),
        None => format!("{}; {name:?} {}, and there is no new checkpoint of it", failure.text, vm.stays()),
    };
    Failure { text, ..failure }
}
