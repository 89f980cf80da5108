//! A VM as its process sees it: what it is, what state it is in, and what it tells about itself.

use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Sender;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::Instant;

use migrate::SessionId;
use swapd::{Notice, Stats};
use tracing::{info, warn};

use super::memory::MemoryView;
use crate::control::protocol::{ArrivalStat, EngineKind, GuestStat, MigrationStat, State, VmStat};
use crate::control::rundir::Claim;
use crate::failure::{Failure, Kind};
use crate::vmm::{GuestCounters, Machine, RunState};

/// What the process's main loop is told.
#[derive(Debug)]
pub(super) enum Event {
    Notice(Notice),
    Signal(i32),
    Stop,
    Moved,
    /// The receiving has ended; the VM runs here, or never will.
    Arrived(Result<(), Failure>),
}

/// What does not change in a VM's life here.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) name: String,
    pub(super) memory_bytes: u64,
    pub(super) budget_bytes: u64,
    pub(super) engine: EngineKind,
    /// Listen address of the daemon that received it.
    pub(super) daemon: Option<String>,
}

/// Where the VM is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Arriving,
    Here,
    Migrating,
    InDoubt { session: SessionId, to: String },
    Moved { to: String },
}

/// What changes, under one lock. Nothing slow is done while it is held.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) phase: Phase,
    /// By the user.
    pub(super) paused: bool,
    /// The store's failure that made it stand still.
    pub(super) stalled: Option<String>,
    pub(super) migration: Option<MigrationStat>,
    pub(super) arrival: Option<ArrivalStat>,
    pub(super) claim: Option<Claim>,
}

/// The machine's last known account, for when it is busy being paused.
#[derive(Clone, Debug, Default)]
struct LastSeen {
    counters: GuestCounters,
    failed: Option<String>,
    vcpus: u32,
    workload: String,
}

#[derive(Debug)]
pub(super) struct Vm {
    pub(super) facts: Facts,
    pub(super) memory: OnceLock<MemoryView>,
    pub(super) events: Sender<Event>,
    /// Cancels the migration under way.
    pub(super) cancel: AtomicBool,
    /// Its faults are being recorded.
    pub(super) recording: AtomicBool,
    machine: Mutex<Option<Machine>>,
    core: Mutex<Core>,
    last_seen: Mutex<LastSeen>,
    started: Instant,
}

impl Vm {
    pub(super) fn new(facts: Facts, phase: Phase, claim: Claim, events: Sender<Event>) -> Vm {
        let core =
            Core { phase, paused: false, stalled: None, migration: None, arrival: None, claim: Some(claim) };
        Vm {
            facts,
            memory: OnceLock::new(),
            events,
            cancel: AtomicBool::new(false),
            recording: AtomicBool::new(false),
            machine: Mutex::new(None),
            core: Mutex::new(core),
            last_seen: Mutex::default(),
            started: Instant::now(),
        }
    }

    /// Looks at, or changes, what changes. For short work only.
    pub(super) fn core<T>(&self, work: impl FnOnce(&mut Core) -> T) -> T {
        work(&mut lock(&self.core))
    }

    /// Works with the name's claim, which may wait for the run directory's lock, without holding up `stat`.
    pub(super) fn claim(&self, work: impl FnOnce(&mut Claim) -> Result<(), Failure>) -> Result<(), Failure> {
        let Some(mut claim) = self.core(|core| core.claim.take()) else {
            return Err(Failure::new(Kind::Name, "this process is ending"));
        };
        let result = work(&mut claim);
        self.core(|core| core.claim = Some(claim));
        result
    }

    pub(super) fn set_machine(&self, machine: Machine) {
        *lock(&self.machine) = Some(machine);
    }

    /// Ends the vCPUs.
    pub(super) fn drop_machine(&self) {
        let machine = lock(&self.machine).take();
        drop(machine);
    }

    /// Works with the machine; waits for its turn.
    pub(super) fn machine<T>(
        &self,
        work: impl FnOnce(&mut Machine) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        match lock(&self.machine).as_mut() {
            Some(machine) => work(machine),
            None => Err(Failure::new(
                Kind::Name,
                format!("{:?} has not arrived yet: its vCPUs are not here", self.facts.name),
            )),
        }
    }

    pub(super) fn memory(&self) -> Result<&MemoryView, Failure> {
        self.memory.get().ok_or_else(|| {
            Failure::new(Kind::Name, format!("{:?} is still being set up: try again", self.facts.name))
        })
    }

    fn seen(&self) -> LastSeen {
        match self.machine.try_lock() {
            Ok(machine) => {
                let mut last = lock(&self.last_seen);
                if let Some(machine) = machine.as_ref() {
                    *last = LastSeen {
                        counters: machine.counters(),
                        failed: match machine.state() {
                            RunState::Failed(reason) => Some(reason),
                            _ => None,
                        },
                        vcpus: machine.config().vcpus,
                        workload: machine.config().workload.to_string(),
                    };
                }
                last.clone()
            }
            Err(TryLockError::WouldBlock | TryLockError::Poisoned(_)) => lock(&self.last_seen).clone(),
        }
    }

    /// Why the guest failed, if it did.
    pub(super) fn guest_failure(&self) -> Option<String> {
        self.seen().failed
    }

    pub(super) fn mismatched_pages(&self) -> u64 {
        self.seen().counters.mismatched_pages
    }

    pub(super) fn stat(&self) -> Result<VmStat, Failure> {
        let memory = match self.memory.get() {
            Some(memory) => memory.stats()?,
            None => Stats {
                memory_bytes: self.facts.memory_bytes,
                ram_budget_bytes: self.facts.budget_bytes,
                untouched_bytes: self.facts.memory_bytes,
                ..Stats::default()
            },
        };
        let seen = self.seen();
        Ok(self.core(|core| {
            let (state, reason) = state_of(core, seen.failed);
            VmStat {
                name: self.facts.name.clone(),
                state,
                reason,
                pid: std::process::id(),
                engine: self.facts.engine,
                vcpus: seen.vcpus,
                workload: seen.workload,
                uptime_ms: self.started.elapsed().as_millis() as u64,
                daemon: self.facts.daemon.clone(),
                memory,
                guest: GuestStat {
                    rounds: seen.counters.rounds,
                    verified_pages: seen.counters.verified_pages,
                    mismatched_pages: seen.counters.mismatched_pages,
                    filled_pages: seen.counters.filled_pages,
                    rewritten_pages: seen.counters.rewritten_pages,
                    first_mismatch: seen.counters.first_mismatch,
                },
                migration: core.migration.clone(),
                arrival: core.arrival.clone(),
            }
        }))
    }

    /// The engine has something to say.
    pub(super) fn notice(&self, notice: Notice) {
        match notice {
            Notice::StoreFailed(reason) => {
                warn!(vm = %self.facts.name, %reason, "the store failed: the VM is paused; `vmemd resume` tries again");
                self.core(|core| core.stalled = Some(reason));
                // vCPUs whose faults cannot be served stop by themselves when they are: an error here is no news.
                if let Err(error) = self.machine(|machine| Ok(machine.pause()?)) {
                    info!(vm = %self.facts.name, %error, "while pausing the stalled VM");
                }
            }
            Notice::StoreRecovered => info!(vm = %self.facts.name, "the store works again"),
            Notice::Poisoned(page) => {
                warn!(vm = %self.facts.name, %page, "lost: the guest gets a memory error when it touches it");
            }
        }
    }
}

fn state_of(core: &Core, failed: Option<String>) -> (State, Option<String>) {
    match (&core.phase, failed, &core.stalled) {
        (Phase::Moved { .. }, _, _) => (State::Moved, None),
        (Phase::Arriving, _, _) => (State::Arriving, None),
        (Phase::InDoubt { session, to }, _, _) => (
            State::InDoubt,
            Some(format!(
                "it may run at {to} (session {session}): `vmemd resume` asks there and goes on if it does not"
            )),
        ),
        (_, Some(reason), _) => (State::Failed, Some(reason)),
        (_, None, Some(reason)) => (State::Stalled, Some(reason.clone())),
        (Phase::Migrating, None, None) => (State::Migrating, None),
        (Phase::Here, None, None) if core.paused => (State::Paused, None),
        (Phase::Here, None, None) => (State::Running, None),
    }
}

/// A panic elsewhere does not make what a lock protects unusable: every change under these locks is complete in itself.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
