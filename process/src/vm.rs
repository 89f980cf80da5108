//! A VM as its process sees it: what it is, what state it is in, and what it tells about itself.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use migrate::Wait;
use swapd::{Notice, Stats};
use tracing::{info, warn};

use crate::checkpointing::{Checkpointing, LastCheckpoint};
use crate::control::protocol::{ArrivalStat, MigrationStat, RestoreStat, State, VmStat, WaitStat};
use crate::control::rundir::Claim;
use crate::facts::Facts;
use crate::failure::{Failure, FailureKind};
use crate::granted::Granted;
use crate::halt::Halt;
use crate::hold::{BY_ITS_MONITOR, DID_NOT_GO_ON, Hold, Resumer, Want, Whereabouts, may_resume};
use crate::machine::{GuestView, Machine, RunState};
use crate::memory::MemoryView;
use crate::size::Size;

/// Messages to the process's main loop.
#[derive(Debug)]
pub(crate) enum VmEvent {
    Notice(Notice),
    Signal(i32),
    Stop,
    Moved,
    /// The receiving has ended; the VM runs here, or never will.
    Arrived(Result<(), Failure>),
}

/// For a user: what may hold pages in RAM.
pub(crate) const PINNED_BY: &str =
    "pinned by something: I/O under way, or buffers that are registered with io_uring, VFIO or RDMA";
/// Without an answer for so long, `stat` says that the store does not give one.
const STORE_SILENCE_MS: u64 = 5000;
/// Between two looks at whether the machine is free.
const MACHINE_POLL: Duration = Duration::from_millis(10);

/// The changing part of a VM, under one lock. Nothing slow is done while the lock is held.
#[derive(Debug)]
pub(crate) struct VmState {
    pub(crate) whereabouts: Whereabouts,
    /// Why it stands still, if it does.
    pub(crate) hold: Hold,
    pub(crate) migration: Option<MigrationStat>,
    pub(crate) checkpoint: Option<Checkpointing>,
    pub(crate) last_checkpoint: Option<LastCheckpoint>,
    /// A checkpoint has failed, and its disk still has something of it.
    pub(crate) closing: bool,
    pub(crate) waiting: Option<Waiting>,
    pub(crate) arrival: Option<ArrivalStat>,
    pub(crate) restore: Option<RestoreStat>,
    pub(crate) claim: Option<Claim>,
    /// It is to end, and who wants that.
    pub(crate) ender: Option<&'static str>,
    /// The program whose process this is ends by itself, and why.
    pub(crate) ended: Option<Failure>,
    /// Channels of those who have asked it to stop and wait to hear how it ended; and the answer, once there is one.
    pub(crate) stoppers: Vec<Sender<Told>>,
    pub(crate) end: Option<Told>,
}

impl VmState {
    /// A checkpoint is at work on it.
    pub(crate) fn is_being_saved(&self) -> bool {
        self.checkpoint.as_ref().is_some_and(|now| !now.saved)
    }

    /// It has been told to stand still for a checkpoint, and goes on behind it.
    fn stands_for_checkpoint(&self) -> bool {
        self.checkpoint.as_ref().is_some_and(|now| now.stopped)
    }
}

/// The answer to those who stop a VM.
pub(crate) type Told = Result<serde_json::Value, Failure>;

/// A wait: for something, since some time, up to a limit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    what: &'static str,
    limit: (&'static str, Duration),
    since: Instant,
}

impl Waiting {
    pub(crate) fn new(what: &'static str, limit: (&'static str, Duration)) -> Waiting {
        Waiting { what, limit, since: Instant::now() }
    }

    fn stat(&self) -> WaitStat {
        let (limit, time) = self.limit;
        WaitStat {
            what: self.what.to_owned(),
            limit: limit.to_owned(),
            limit_ms: time.as_millis() as u64,
            elapsed_ms: self.since.elapsed().as_millis() as u64,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) facts: Facts,
    pub(crate) memory: OnceLock<MemoryView>,
    pub(crate) events: Sender<VmEvent>,
    /// Cancels the migration or the checkpoint under way: there is only one of them.
    pub(crate) cancel: AtomicBool,
    /// Ends work beside the VM, which nobody needs once it is to end.
    pub(crate) halt: Arc<Halt>,
    /// Its faults are being recorded.
    pub(crate) recording: AtomicBool,
    /// One at a time looks at the budget, and changes what is on record of it.
    pub(crate) budgeting: Mutex<()>,
    /// One at a time asks what became of a hand-over, and draws the conclusion.
    pub(crate) resolving: Mutex<()>,
    machine: Mutex<Option<Box<dyn Machine>>>,
    /// Until this process gives everything up.
    pub(crate) granted: Mutex<Option<Granted>>,
    state: Mutex<VmState>,
    /// The machine's last known account, for when it is busy being paused.
    last_seen: Mutex<(GuestView, Option<RunState>)>,
    started: Instant,
    /// Told how the VM has ended, before its guest is told to quit: where that ends the process, nothing can be said
    /// behind it.
    pub(crate) on_end: OnceLock<OnEnd>,
}

/// See [`Process::on_end`](crate::Process::on_end).
pub type OnEnd = fn(name: &str, result: &Result<(), Failure>);

impl Vm {
    pub(crate) fn new(
        facts: Facts,
        whereabouts: Whereabouts,
        (claim, granted): (Claim, Granted),
        events: Sender<VmEvent>,
    ) -> Vm {
        let state = VmState {
            whereabouts,
            hold: Hold::Free,
            migration: None,
            checkpoint: None,
            last_checkpoint: None,
            closing: false,
            waiting: None,
            arrival: None,
            restore: None,
            claim: Some(claim),
            ender: None,
            ended: None,
            stoppers: Vec::new(),
            end: None,
        };
        Vm {
            facts,
            memory: OnceLock::new(),
            events,
            cancel: AtomicBool::new(false),
            halt: Arc::default(),
            recording: AtomicBool::new(false),
            budgeting: Mutex::default(),
            resolving: Mutex::default(),
            machine: Mutex::new(None),
            granted: Mutex::new(Some(granted)),
            state: Mutex::new(state),
            last_seen: Mutex::default(),
            started: Instant::now(),
            on_end: OnceLock::new(),
        }
    }

    /// How the VM's life has ended, to whoever wants to tell it.
    pub(crate) fn tell_end(&self, result: &Result<(), Failure>) {
        if let Some(tell) = self.on_end.get() {
            tell(&self.facts.name, result);
        }
    }

    /// Looks at, or changes, what changes. For short work only.
    pub(crate) fn locked<T>(&self, work: impl FnOnce(&mut VmState) -> T) -> T {
        work(&mut lock(&self.state))
    }

    /// The same, if nobody is at it now.
    pub(crate) fn try_locked<T>(&self, work: impl FnOnce(&mut VmState) -> T) -> Option<T> {
        match self.state.try_lock() {
            Ok(mut state) => Some(work(&mut state)),
            Err(TryLockError::Poisoned(state)) => Some(work(&mut state.into_inner())),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Notes what a migration's session waits for, with the time at which that began.
    pub(crate) fn waits(&self, wait: Option<Wait>) {
        let waiting = wait.map(|wait| Waiting::new(wait.what(), wait.limit()));
        self.locked(|state| {
            if state.waiting.map(|old| old.what) != waiting.map(|new| new.what) {
                state.waiting = waiting;
            }
        });
    }

    /// Works with the name's claim, which may wait for the run directory's lock, without holding up `stat`.
    pub(crate) fn claim(&self, work: impl FnOnce(&mut Claim) -> Result<(), Failure>) -> Result<(), Failure> {
        let Some(mut claim) = self.locked(|state| state.claim.take()) else {
            return Err(Failure::new(FailureKind::Name, "this process is ending"));
        };
        let result = work(&mut claim);
        self.locked(|state| state.claim = Some(claim));
        result
    }

    pub(crate) fn set_machine(&self, machine: Box<dyn Machine>) {
        *lock(&self.machine) = Some(machine);
    }

    /// Ends the machine, if there is one yet. Says whether it was told.
    pub(crate) fn quit_machine(&self) -> Result<bool, Failure> {
        let machine = lock(&self.machine).take();
        machine.map_or(Ok(false), |machine| machine.quit().map(|()| true))
    }

    /// Works with the machine; waits for its turn.
    pub(crate) fn machine<T>(
        &self,
        work: impl FnOnce(&mut dyn Machine) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        match lock(&self.machine).as_mut() {
            Some(machine) => work(&mut **machine),
            None => Err(self.no_machine()),
        }
    }

    /// Works with the machine, if its turn comes within `limit`. None: somebody keeps it.
    pub(crate) fn machine_within<T>(
        &self,
        limit: Duration,
        work: impl FnOnce(&mut dyn Machine) -> Result<T, Failure>,
    ) -> Option<Result<T, Failure>> {
        let deadline = Instant::now() + limit;
        loop {
            let kept = match self.machine.try_lock() {
                Ok(kept) => Some(kept),
                Err(TryLockError::Poisoned(kept)) => Some(kept.into_inner()),
                Err(TryLockError::WouldBlock) => None,
            };
            match kept {
                Some(mut kept) => {
                    return Some(
                        kept.as_mut().map_or_else(|| Err(self.no_machine()), |kept| work(&mut **kept)),
                    );
                }
                None if Instant::now() >= deadline => return None,
                // A lock has no wait with a limit.
                None => std::thread::sleep(MACHINE_POLL),
            }
        }
    }

    fn no_machine(&self) -> Failure {
        let text = format!("{:?} has not arrived yet: its vCPUs are not here", self.facts.name);
        Failure::new(FailureKind::Name, text)
    }

    /// It is to end, by this: a migration or a checkpoint under way ends, and knows why. Does not wait for anything.
    pub(crate) fn cancel_to_end(&self, by: &'static str) {
        self.locked(|state| {
            state.ender.get_or_insert(by);
        });
        self.cancel.store(true, Ordering::SeqCst);
    }

    /// The machine, for as long as the caller keeps it: nobody else stops it meanwhile, nor lets it go on.
    pub(crate) fn keep_machine(&self) -> MutexGuard<'_, Option<Box<dyn Machine>>> {
        lock(&self.machine)
    }

    pub(crate) fn memory(&self) -> Result<&MemoryView, Failure> {
        self.memory.get().ok_or_else(|| {
            Failure::new(FailureKind::Name, format!("{:?} is still being set up: try again", self.facts.name))
        })
    }

    /// The VM's RAM budget as it is now.
    fn budget(&self) -> u64 {
        let engine = self.memory.get().and_then(|memory| memory.engine().ok()?.stats().ok());
        engine.map_or(self.facts.budget_bytes, |stats| stats.ram_budget_bytes)
    }

    /// Puts on record what RAM the VM may have: whoever promises RAM on this host counts it.
    pub(crate) fn note_budget(&self, bytes: u64) {
        if let Some(granted) = lock(&self.granted).as_mut()
            && let Err(error) = granted.set_budget(bytes)
        {
            warn!(vm = %self.facts.name, %error, "the record of its RAM is not that of now");
        }
    }

    fn seen(&self) -> (GuestView, Option<RunState>) {
        let mut last = lock(&self.last_seen);
        if let Ok(machine) = self.machine.try_lock()
            && let Some(machine) = machine.as_ref()
        {
            *last = (machine.view(), machine.run_state());
        }
        last.clone()
    }

    /// Why the guest failed, if it did.
    pub(crate) fn guest_failure(&self) -> Option<String> {
        self.seen().0.failed
    }

    pub(crate) fn mismatched_pages(&self) -> u64 {
        self.seen().0.guest.mismatched_pages
    }

    /// Why the VM ends by itself, if it does.
    pub(crate) fn ended(&self) -> Option<Failure> {
        self.locked(|state| state.ended.clone()).or_else(|| self.machine.try_lock().ok()?.as_ref()?.ended())
    }

    /// Why its guest will not go on, if it has failed or shut down.
    pub(crate) fn over(&self) -> Option<String> {
        let (view, run_state) = self.seen();
        view.failed.or_else(|| run_state.filter(|now| now.state == State::Shutdown)?.why)
    }

    /// Why it cannot move as it stands: its guest is [over](Self::over), or sleeps and might wake up at any moment.
    pub(crate) fn unmovable(&self) -> Option<String> {
        let sleeps = || self.seen().1.filter(|now| now.state == State::Suspended)?.why;
        self.over().or_else(sleeps)
    }

    /// The VM's state as `stat` shows it, and why it does not run if it does not.
    pub(crate) fn state(&self) -> (State, Option<String>) {
        let (view, run_state) = self.seen();
        self.locked(|state| state_of(state, view.failed, run_state.as_ref(), &Stats::default()))
    }

    /// How it stays here that was to leave.
    pub(crate) fn stays(&self) -> &'static str {
        let (_, run_state) = self.seen();
        if self.guest_failure().is_some() {
            return "stays here, failed";
        }
        let (stalled, paused) = self.locked(|state| (state.hold.is_stalled(), state.hold.paused().is_some()));
        match run_state.map(|run_state| run_state.state) {
            _ if stalled => "stays here, stalled",
            Some(State::Shutdown) => "stays here, shut down",
            Some(State::Running | State::Suspended) => "runs on here",
            Some(_) => "stays paused here",
            None if paused => "stays paused here",
            None => "runs on here",
        }
    }

    pub(crate) fn stat(&self) -> Result<VmStat, Failure> {
        let memory = match self.memory.get() {
            Some(memory) => memory.stats()?,
            None => Stats {
                memory_bytes: self.facts.memory_bytes,
                ram_budget_bytes: self.facts.budget_bytes,
                untouched_bytes: self.facts.memory_bytes,
                ..Stats::default()
            },
        };
        let (seen, run_state) = self.seen();
        Ok(self.locked(|vm| {
            let (state, reason) = state_of(vm, seen.failed, run_state.as_ref(), &memory);
            VmStat {
                name: self.facts.name.clone(),
                state,
                reason,
                run_state: run_state.map(|run_state| run_state.word),
                pid: std::process::id(),
                engine: self.facts.engine,
                vcpus: seen.vcpus,
                workload: seen.workload,
                uptime_ms: self.started.elapsed().as_millis() as u64,
                daemon: self.facts.daemon.clone(),
                memory,
                guest: seen.guest,
                waiting: vm.waiting.as_ref().map(Waiting::stat),
                migration: vm.migration.clone(),
                checkpoint: vm.checkpoint.as_ref().map(|now| now.stat.clone()),
                last_checkpoint: vm.last_checkpoint.as_ref().map(LastCheckpoint::stat),
                arrival: vm.arrival.clone(),
                restore: vm.restore.clone(),
            }
        }))
    }

    /// The engine has something to say.
    pub(crate) fn notice(&self, notice: Notice) {
        let name = &self.facts.name;
        match notice {
            Notice::StoreFailed(reason) => {
                warn!(vm = %name, "{reason}: what the VM changes stays in RAM, and is written as soon as that works");
            }
            Notice::StoreRecovered => info!(vm = %name, "the store takes writes again: nothing was lost"),
            Notice::Starved(reason) => {
                warn!(vm = %name, "{reason}: the VM is paused, for it needs RAM and nothing can leave it; it goes on by itself when that works again");
                self.stall(Want::Frames, reason);
            }
            Notice::Unreachable(reason) => {
                warn!(vm = %name, "{reason}: the VM is paused, for it needs what is there; it goes on by itself when that answers, and nothing is lost");
                self.stall(Want::Pages, reason);
            }
            Notice::Reachable => {
                info!(vm = %name, "what it waited for answers");
                self.ease(Want::Pages);
            }
            Notice::Relieved => self.ease(Want::Frames),
            Notice::Short { pinned_bytes } => {
                let (pinned, budget) = (Size(pinned_bytes), Size(self.budget()));
                warn!(vm = %name, "it waits for RAM: of its {budget:#}, {pinned:#} are {PINNED_BY}; let go of these, or give it more: `vmemd set {name} --ram SIZE`");
            }
            Notice::Enough => info!(vm = %name, "it has RAM again"),
            Notice::Poisoned(page) => {
                warn!(vm = %name, page = page.0, "lost: the store does not give back what was written; the guest gets a memory error if it touches that page");
            }
        }
    }

    /// Pauses the VM rather than let it hang.
    fn stall(&self, want: Want, reason: String) {
        let name = &self.facts.name;
        // Before it is paused: who finds it so is to know why.
        let taken = self.locked(|state| {
            let begins = state.hold.stall(want, reason);
            // The checkpoint keeps the machine, for as long as its disk takes, and leaves the VM paused. Whoever waited
            // for it here would keep the main loop from everything else, such as the stop that cancels it.
            let pauses = begins && !state.stands_for_checkpoint();
            pauses.then_some(matches!(state.whereabouts, Whereabouts::Migrating))
        });
        // It is paused already.
        let Some(taken) = taken else { return };
        let paused = self.machine(|machine| {
            // Its user may have paused it by other means, such as a monitor. (A migration resumes what it has paused.)
            if !taken && machine.runs().is_ok_and(|runs| !runs) {
                self.locked(|state| state.hold.stood_before());
                return Ok(());
            }
            machine.pause()
        });
        // A vCPU that waits for a page stops behind that.
        if let Err(error) = paused {
            info!(vm = %name, %error, "while pausing the VM");
        }
    }

    /// It has that again.
    fn ease(&self, want: Want) {
        self.locked(|state| state.hold.ease(want));
        self.go_on();
    }

    /// Lets a VM go on that stood still for what its store did not do, and does again, unless somebody else has it or
    /// wants it to stand still.
    pub(crate) fn go_on(&self) {
        let over =
            |state: &mut VmState| state.hold.is_relieved() && matches!(state.whereabouts, Whereabouts::Here);
        // A checkpoint for which it stands still comes here itself when it lets go of the machine.
        if !self.locked(|state| over(state) && !state.stands_for_checkpoint()) {
            return;
        }
        let gone_on = self.machine(|machine| {
            // Under the machine's lock, so that a migration which begins now pauses it later than this.
            let go = self.locked(|state| {
                let go = may_resume(Resumer::Store, &state.whereabouts, &state.hold);
                if over(state) {
                    state.hold.end_stall();
                }
                go
            });
            if go { machine.resume().map(|()| true) } else { Ok(false) }
        });
        match gone_on {
            Ok(true) => info!(vm = %self.facts.name, "it goes on"),
            Ok(false) => {}
            Err(error) => {
                warn!(vm = %self.facts.name, %error, "it could go on, but does not: `vmemd resume` it");
                self.locked(|state| state.hold.pause_by(DID_NOT_GO_ON));
            }
        }
    }
}

fn state_of(
    state: &VmState,
    failed: Option<String>,
    run_state: Option<&RunState>,
    memory: &Stats,
) -> (State, Option<String>) {
    let stalled = state.hold.stall_reason();
    match (&state.whereabouts, failed) {
        (Whereabouts::Moved { .. }, _) => (State::Moved, None),
        (Whereabouts::Arriving, _) => (State::Arriving, None),
        (Whereabouts::InDoubt { session, to, said, .. }, _) => (
            State::InDoubt,
            Some(format!("it may run at {to} (session {session}; {said}): see `vmemd resolve`")),
        ),
        (_, Some(reason)) => (State::Failed, Some(reason)),
        (Whereabouts::Migrating, None) => (State::Migrating, stalled.or_else(|| memory_problem(memory))),
        (Whereabouts::Here, None) if stalled.is_some() => (State::Stalled, stalled),
        (Whereabouts::Here, None) => {
            let (state, why) = here_state(state.hold.paused(), run_state);
            let reasons: Vec<String> = why.into_iter().chain(memory_problem(memory)).collect();
            (state, Some(reasons.join("; ")).filter(|reasons| !reasons.is_empty()))
        }
    }
}

/// Of a VM that is here and has not failed.
fn here_state(paused: Option<&'static str>, run_state: Option<&RunState>) -> (State, Option<String>) {
    match run_state {
        Some(RunState { state: State::Paused, why: None, .. }) => {
            (State::Paused, Some(paused.unwrap_or(BY_ITS_MONITOR).to_owned()))
        }
        Some(RunState { state, why, .. }) => (*state, why.clone()),
        None if paused.is_some() => (State::Paused, paused.map(str::to_owned)),
        None => (State::Running, None),
    }
}

/// A defect of the store, or a lack of RAM, with which the VM goes on for now.
fn memory_problem(memory: &Stats) -> Option<String> {
    let store = &memory.store;
    let [pinned, budget, held] =
        [memory.pinned_bytes, memory.ram_budget_bytes, memory.frames_bytes].map(Size);
    match &store.failed {
        None if memory.starved_ms > 0 => Some(format!(
            "it has waited for RAM for {} s: of its {budget:#}, {pinned:#} are {PINNED_BY}; it goes on when these are let go of, or \
             with more (`vmemd set … --ram SIZE`)",
            memory.starved_ms / 1000
        )),
        None if held > budget && pinned.bytes() > 0 => {
            Some(format!("it holds {held:#} of RAM, above its {budget:#}: {pinned:#} are {PINNED_BY}"))
        }
        Some(reason) => Some(format!("{reason}; as long as that lasts it has only its RAM")),
        None if store.oldest_ms >= STORE_SILENCE_MS => {
            Some(format!("the store has not answered for {} s", store.oldest_ms / 1000))
        }
        None => None,
    }
}

/// A panic elsewhere does not make what a lock protects unusable: every change under these locks is complete in itself.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned: PoisonError<_>| {
        mutex.clear_poison();
        poisoned.into_inner()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hold::{AS_IT_CAME, BY_VMEMD};

    #[test]
    fn what_the_machine_says_counts_and_who_paused_it_is_told() {
        let says =
            |state, why: Option<&str>| RunState { word: "x".to_owned(), state, why: why.map(str::to_owned) };
        let (runs, stands) = (says(State::Running, None), says(State::Paused, None));
        let launch = says(State::Paused, Some("-S"));
        let sleeps = says(State::Suspended, Some("sleeps"));
        let told = |paused, run_state: Option<&RunState>| {
            let (state, why) = here_state(paused, run_state);
            (state, why.unwrap_or_default())
        };
        let text = |text: &str| text.to_owned();
        for (paused, run_state, expected) in [
            (None, None, (State::Running, text(""))),
            (Some(BY_VMEMD), None, (State::Paused, text(BY_VMEMD))),
            // Let go on by its own monitor.
            (Some(BY_VMEMD), Some(&runs), (State::Running, text(""))),
            (Some(BY_VMEMD), Some(&stands), (State::Paused, text(BY_VMEMD))),
            (None, Some(&stands), (State::Paused, text(BY_ITS_MONITOR))),
            (Some(AS_IT_CAME), Some(&stands), (State::Paused, text(AS_IT_CAME))),
            (None, Some(&launch), (State::Paused, text("-S"))),
            (Some(BY_VMEMD), Some(&launch), (State::Paused, text("-S"))),
            (None, Some(&sleeps), (State::Suspended, text("sleeps"))),
        ] {
            assert_eq!(told(paused, run_state), expected, "{paused:?} {run_state:?}");
        }
    }
}
