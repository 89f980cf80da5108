//! A VM that begins from a checkpoint: its pages are adopted where they are, its state is loaded, and it runs.
//!
//! ```text
//!   adopt ──▶ (--eager: bring all) ──▶ load the state ──▶ run ──▶ homing: bring what is hot, then take all home
//! ```
//! One thread does all of it, so that the control socket answers meanwhile. Until the VM runs, `stat` calls it
//! arriving, and an end of it is an end of the thread. From then on the thread is only work beside the VM:
//! [`homing`](crate::homing).

use std::collections::VecDeque;
use std::fmt;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use checkpoint::restore::{Hold, Image};
use serde::Serialize;
use swapd::{CommandError, EngineHandle, PendingAnswer};
use tracing::{error, info, warn};

use crate::control::protocol::{RestorePhase, RestoreStat, State};
use crate::failure::{Failure, FailureKind};
use crate::halt::Halted;
use crate::hold::{AS_SAVED, BY_RESTORE, Resumer, Whereabouts, may_resume};
use crate::homing::{self, Homing, RestoreOptions, stopped};
use crate::life::{self, CAUGHT, End};
use crate::machine::Newcomer;
use crate::memory::Memory;
use crate::process::Process;
use crate::vm::{Vm, VmEvent};

/// Adoptions under way: enough that the engine always has the next one, each with half a MiB of sums at most.
const ADOPTIONS: usize = 16;

/// A checkpoint that is open, and what is to be made of it.
pub struct Restoration {
    /// For people: which one.
    pub from: String,
    /// Its memory.
    pub image: Image,
    /// The locks that keep its files from being removed.
    pub hold: Hold,
    /// vCPUs and devices, as they were saved. Checked already.
    pub state: Box<dyn Read + Send>,
    /// The machine was paused by its user's will when it was saved.
    pub was_paused: bool,
    /// The machine that takes the state.
    pub newcomer: Box<dyn Newcomer>,
    /// How.
    pub options: RestoreOptions,
    /// Called when the VM runs, or stands still as it is to.
    pub started: Box<dyn FnOnce(&Restored) + Send>,
}

impl fmt::Debug for Restoration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Restoration").field("from", &self.from).field("options", &self.options).finish()
    }
}

/// How a VM has begun from a checkpoint.
#[derive(Clone, Debug, Serialize)]
pub struct Restored {
    /// What it is called here.
    pub name: String,
    /// Which checkpoint.
    pub from: String,
    /// Running, or paused.
    pub state: State,
    /// Why it is paused, if it is.
    pub reason: Option<String>,
    /// Bytes of its memory that are in the checkpoint.
    pub adopted_bytes: u64,
    /// Pages whose content was lost before they were saved.
    pub lost_pages: u64,
    /// Until all pages were adopted.
    pub adopt_us: u64,
    /// From then until the machine had its state; of an eager restore, until all of its memory was here, too.
    pub load_us: u64,
}

impl Process {
    /// Lives with a VM that begins from a checkpoint, until it is stopped or moves away. The memory is an engine with
    /// the checkpoint's files as its origin.
    pub fn restore(&self, memory: Memory, restoration: Restoration) -> End {
        let vm = &self.vm;
        let _ = vm.memory.set(memory.view());
        match start(vm, restoration) {
            Ok(work) => {
                let ended = life::live(vm, &self.events);
                vm.halt.end();
                life::finish(vm, memory, &self.server, Some(work), ended)
            }
            Err(failure) => {
                memory.stop();
                self.give_up();
                let end = End::failed(failure);
                vm.tell_end(&end.result);
                end
            }
        }
    }
}

fn start(vm: &Arc<Vm>, restoration: Restoration) -> Result<JoinHandle<()>, Failure> {
    let engine = vm.memory()?.engine()?.clone();
    vm.locked(|state| {
        state.restore = Some(RestoreStat {
            from: restoration.from.clone(),
            phase: RestorePhase::Loading,
            fetched_bytes: 0,
            rate_bytes: restoration.options.rate,
            waits: None,
        });
    });
    let vm = vm.clone();
    std::thread::Builder::new()
        .name("restore".to_owned())
        .spawn(move || {
            let begun = begin(&vm, &engine, restoration);
            let (result, homing) = match begun {
                Ok(homing) => (Ok(()), Some(homing)),
                Err(failure) => (Err(failure), None),
            };
            let _ = vm.events.send(VmEvent::Arrived(result));
            let Some(homing) = homing else { return };
            // From here on the VM can do without this thread: a bug of it is told, and nothing else.
            CAUGHT.set(true);
            if catch_unwind(AssertUnwindSafe(|| homing.run())).is_err() {
                error!(vm = %vm.facts.name, "its pages stay in the checkpoint: see the panic above");
                homing::note(
                    &vm,
                    RestorePhase::Kept,
                    Some("a bug in vmemd ended the taking home: see its log".to_owned()),
                );
            }
        })
        .map_err(|error| Failure::io("cannot start the restoring thread", &error))
}

/// From the checkpoint to a VM that runs.
fn begin(vm: &Arc<Vm>, engine: &EngineHandle, restoration: Restoration) -> Result<Homing, Failure> {
    let Restoration { from, image, hold, mut state, was_paused, newcomer, options, started } = restoration;
    let begun = Instant::now();
    adopt(vm, engine, &image)?;
    let adopted = Instant::now();
    let (adopted_pages, lost_pages) = (image.stored_pages(), image.lost_pages());
    let mut homing = Homing::new(vm.clone(), engine.clone(), image, hold, options);
    if options.eager {
        homing.bring_all().map_err(|stopped| stopped.failure(vm))?;
    }
    homing.prealloc().map_err(|stopped| stopped.failure(vm))?;
    let machine = newcomer.load(&mut *state).map_err(|failure| not_restored(vm, &from, failure))?;
    vm.set_machine(machine);
    let loaded = Instant::now();
    let paused = match (options.paused, was_paused) {
        (true, _) => Some(BY_RESTORE),
        (false, true) => Some(AS_SAVED),
        (false, false) => None,
    };
    run(vm, paused).map_err(|failure| not_restored(vm, &from, failure))?;
    let (state, reason) = vm.state();
    let restored = Restored {
        name: vm.facts.name.clone(),
        from,
        state,
        reason,
        adopted_bytes: swapd::units::bytes_of(adopted_pages),
        lost_pages,
        adopt_us: micros(adopted - begun),
        load_us: micros(loaded - adopted),
    };
    if lost_pages > 0 {
        warn!(vm = %restored.name, pages = lost_pages, "lost before they were saved: the guest gets a memory error if it touches them");
    }
    info!(vm = %restored.name, from = %restored.from, state = state.name(), adopt_us = restored.adopt_us, load_us = restored.load_us, "restored");
    started(&restored);
    Ok(homing)
}

fn micros(time: Duration) -> u64 {
    time.as_micros() as u64
}

fn not_restored(vm: &Vm, from: &str, failure: Failure) -> Failure {
    Failure::new(failure.kind, format!("{:?} is not restored from {from}: {}", vm.facts.name, failure.text))
}

/// Tells the engine what is at the origin. All the guest's pages are untouched until then.
fn adopt(vm: &Arc<Vm>, engine: &EngineHandle, image: &Image) -> Result<(), Failure> {
    let mut under_way: VecDeque<PendingAnswer<()>> = VecDeque::with_capacity(ADOPTIONS);
    let wait = |answer| match vm.halt.answer(answer) {
        Ok(answered) => answered.map_err(|error: CommandError| Failure::from(error)),
        Err(Halted) => Err(stopped(vm)),
    };
    for adopted in image.adoption() {
        if under_way.len() == ADOPTIONS
            && let Some(oldest) = under_way.pop_front()
        {
            wait(oldest)?;
        }
        under_way.push_back(engine.adopt_async(adopted));
    }
    under_way.into_iter().try_for_each(wait)?;
    image.lost().try_for_each(|run| Ok(engine.adopt_poisoned(run)?))
}

/// Lets it run, unless it is to stand still for this.
fn run(vm: &Vm, paused: Option<&'static str>) -> Result<(), Failure> {
    let go = vm.locked(|state| {
        if state.ender.is_some() {
            return Err(());
        }
        (state.whereabouts, state.waiting) = (Whereabouts::Here, None);
        if let Some(paused) = paused {
            state.hold.pause_by(paused);
        }
        Ok(may_resume(Resumer::Target, &state.whereabouts, &state.hold))
    });
    let go = go.map_err(|()| stopped(vm))?;
    let resumed = if go { vm.machine(|machine| machine.resume()) } else { Ok(()) };
    resumed.or_else(|failure| {
        if failure.kind == FailureKind::InDoubt {
            warn!(vm = %vm.facts.name, %failure, "told to run, without an answer: if it stands still, `vmemd resume`");
            return Ok(());
        }
        vm.locked(|state| state.whereabouts = Whereabouts::Arriving);
        Err(failure)
    })
}
