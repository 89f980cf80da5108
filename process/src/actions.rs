//! The requests of the control socket, carried out: pause, resume, stop, a new budget.

use std::sync::Arc;
use std::sync::mpsc::channel;

use checkpoint::format::DiskVersion;
use serde_json::{Value, json};
use tracing::info;

use crate::control::protocol::{Request, State};
use crate::control::server::{Client, Service};
use crate::failure::{Failure, FailureKind};
use crate::hold::{Resumer, Whereabouts, may_resume};
use crate::life::BY_STOP;
use crate::machine::Machine;
use crate::size::Size;
use crate::vm::{PINNED_BY, Vm, VmEvent, VmState, lock};

/// Answers on the VM's control socket. Holds the VM from two sides: threads of a migration need it longer than a
/// request.
#[derive(Debug)]
pub(crate) struct VmService(pub(crate) Arc<Vm>);

impl Service for VmService {
    fn serve(&self, request: Request, client: &mut Client<'_>) -> Result<Value, Failure> {
        let vm = &self.0;
        match request {
            Request::Stat => serde_json::to_value(vm.stat()?).map_err(|error| Failure::other(&error)),
            Request::Pause => vm.pause(),
            Request::Resume => vm.resume(),
            Request::Resolve { force } => crate::doubt::resolve(vm, force),
            Request::SetRam { ram_bytes } => vm.set_ram(ram_bytes),
            Request::RecordFaults { seconds } => crate::record::record_faults(vm, seconds, client),
            Request::Migrate(request) => crate::leave::migrate(vm, &request, client),
            Request::Checkpoint(request) => crate::checkpoint::checkpoint(vm, &request, client),
            Request::RemoveSnapshot { file, snapshot } => vm.remove_snapshot(&file, &snapshot),
            Request::Stop => vm.stop(),
            // During a migration its own connection hears of it: see `leave`.
            Request::Cancel => Err(Failure::new(
                FailureKind::Name,
                format!("no migration of {:?} is under way", vm.facts.name),
            )),
            // Only where it is waited for: see `checkpoint`.
            Request::Checkpointed { .. } => Err(Failure::new(
                FailureKind::Name,
                format!("no checkpoint of {:?} waits for that", vm.facts.name),
            )),
        }
    }
}

impl Vm {
    /// Refuses unless the VM is here, and neither coming nor going.
    pub(crate) fn must_be_here(&self, to_do: &str) -> Result<(), Failure> {
        let name = &self.facts.name;
        let why = self.locked(|state| state.whereabouts.elsewhere(name));
        match why {
            None => Ok(()),
            Some(why) => Err(Failure::new(FailureKind::Name, format!("cannot {to_do} {name:?}: {why}"))),
        }
    }

    fn pause(&self) -> Result<Value, Failure> {
        self.must_be_here("pause")?;
        let already = self.machine(|machine| {
            // Under the machine's lock, so that a migration which begins now finds it as it is to be.
            self.must_be_here("pause")?;
            let stood = !machine.runs()?;
            machine.pause()?;
            Ok(self.locked(|state| state.hold.pause(stood)))
        })?;
        info!(vm = %self.facts.name, already, "paused");
        self.told(already)
    }

    fn resume(&self) -> Result<Value, Failure> {
        if self.locked(|state| matches!(state.whereabouts, Whereabouts::InDoubt { .. })) {
            return crate::doubt::resume(self);
        }
        self.operator_may_resume()?;
        // Even if it cannot go on yet: it is to, as soon as it can.
        let (paused, stalled) = self.locked(|state| (state.hold.unpause(), state.hold.is_stalled()));
        if let Ok(engine) = self.memory()?.engine()
            && let Err(error) = engine.retry_store()
            && stalled
        {
            let failure = Failure::from(error);
            let text = format!(
                "{:?} still cannot go on: {failure}; it does by itself when its store takes writes",
                self.facts.name
            );
            return Err(Failure::new(failure.kind, text));
        }
        let resumed = self.machine(|machine| {
            // Under the machine's lock, so that a migration which begins now pauses it later than this.
            self.operator_may_resume()?;
            // A guest that has failed may go on all the same: a disk was mended.
            let ran = machine.runs().is_ok_and(|runs| runs);
            if ran && machine.run_state().is_some_and(|now| now.state == State::Running) {
                return Ok(true);
            }
            machine.resume()?;
            match machine.runs()? {
                false if machine.run_state().is_some() => Err(self.stands_still(machine)),
                _ => Ok(ran && paused.is_none() && !stalled),
            }
        });
        let still_paused = |state: &mut VmState| paused.into_iter().for_each(|by| state.hold.pause_by(by));
        let already = resumed.inspect_err(|_| self.locked(still_paused))?;
        self.locked(|state| state.hold.free());
        info!(vm = %self.facts.name, already, "resumed");
        self.told(already)
    }

    /// Deletes the snapshot of a checkpoint that is gone, if it has a disk in that file.
    fn remove_snapshot(&self, file: &str, snapshot: &str) -> Result<Value, Failure> {
        if !DiskVersion::is_snapshot(snapshot) {
            let text = format!("{snapshot:?} is no snapshot of a checkpoint: it is not vmemd's to delete");
            return Err(Failure::new(FailureKind::Usage, text));
        }
        let removed = self.machine(|machine| machine.remove_snapshot(file, snapshot))?;
        if removed {
            info!(vm = %self.facts.name, %file, %snapshot, "deleted the snapshot of a checkpoint that is gone");
        }
        Ok(json!({ "name": self.facts.name, "removed": removed }))
    }

    /// What another host has to be told to make its machine, as it is now.
    pub(crate) fn offer(&self) -> Result<Option<String>, Failure> {
        let offer = self.facts.offer.as_deref();
        offer.map(|offer| self.machine(|machine| machine.offer(offer))).transpose()
    }

    fn operator_may_resume(&self) -> Result<(), Failure> {
        let may = |state: &mut VmState| may_resume(Resumer::Operator, &state.whereabouts, &state.hold);
        if self.locked(may) { Ok(()) } else { self.must_be_here("resume") }
    }

    /// It took the word to go on, and did not.
    fn stands_still(&self, machine: &dyn Machine) -> Failure {
        let now = machine.run_state();
        let why = now.map(|now| now.why.unwrap_or(now.word)).unwrap_or_default();
        Failure::new(FailureKind::Vm, format!("{:?} was told to run, and does not: {why}", self.facts.name))
    }

    /// Has the VM end, and says what became of it when that is known: it may have moved meanwhile.
    fn stop(&self) -> Result<Value, Failure> {
        let (tell, told) = channel();
        self.locked(|state| match &state.end {
            Some(end) => drop(tell.send(end.clone())),
            None => state.stoppers.push(tell),
        });
        // Not by the main loop alone, which may be waiting for the machine.
        self.cancel_to_end(BY_STOP);
        let _ = self.events.send(VmEvent::Stop);
        let ended = |_| Failure::new(FailureKind::Vm, format!("{:?} ended by itself", self.facts.name));
        told.recv().map_err(ended)?
    }

    fn set_ram(&self, ram_bytes: u64) -> Result<Value, Failure> {
        self.must_be_here("change the budget of")?;
        let engine = self.memory()?.engine()?;
        {
            let _alone = lock(&self.budgeting);
            let before = engine.stats()?.ram_budget_bytes;
            if ram_bytes > before {
                crate::host::need_free_ram(ram_bytes - before, "a larger budget")?;
                // On record before it is taken, and for as long as it may be held.
                self.note_budget(ram_bytes);
            }
        }
        // May take as long as its store needs; another one that is asked for meanwhile counts instead.
        let set = engine.set_budget(ram_bytes);
        {
            let _alone = lock(&self.budgeting);
            if let Ok(stats) = engine.stats() {
                self.note_budget(stats.ram_budget_bytes.max(stats.frames_bytes));
            }
        }
        set.map_err(|error| match error {
            swapd::CommandError::Store(reason) => {
                let text = format!("{reason}; its RAM shrinks to the new budget when the store takes writes");
                Failure::new(FailureKind::Resources, text)
            }
            swapd::CommandError::StillAbove { budget, held, pinned } => {
                let [budget, held, pinned] = [budget, held, pinned].map(Size);
                let text = format!(
                    "{:?} still holds {held:#} of RAM: {pinned:#} cannot leave it ({PINNED_BY}). The budget is {budget:#} from now on, and \
                     is kept when that is let go of",
                    self.facts.name
                );
                Failure::new(FailureKind::Resources, text)
            }
            error => error.into(),
        })?;
        info!(vm = %self.facts.name, ram_bytes, "budget changed");
        Ok(json!({ "name": self.facts.name, "ram_budget_bytes": engine.stats()?.ram_budget_bytes }))
    }

    /// The answer with the VM's state now. `already`: the VM did so before it was asked.
    fn told(&self, already: bool) -> Result<Value, Failure> {
        let (state, reason) = self.state();
        Ok(json!({ "name": self.facts.name, "state": state, "reason": reason, "already": already }))
    }

    pub(crate) fn done(&self, state: &str) -> Result<Value, Failure> {
        Ok(json!({ "name": self.facts.name, "state": state }))
    }
}
