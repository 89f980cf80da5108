//! What a VM's process does when it is asked over its control socket.

use std::sync::Arc;
use std::sync::mpsc::channel;

use serde_json::{Value, json};
use tracing::info;

use crate::control::protocol::Request;
use crate::control::server::{Client, Service};
use crate::failure::{Failure, Kind};
use crate::size::Size;
use crate::vm::{Event, PINNED_BY, Phase, Vm};

/// The VM's control socket. Holds the VM from two sides: threads of a migration need it longer than a request.
#[derive(Debug)]
pub(crate) struct Control(pub(crate) Arc<Vm>);

impl Service for Control {
    fn serve(&self, request: Request, client: &mut Client<'_>) -> Result<Value, Failure> {
        let vm = &self.0;
        match request {
            Request::Stat => {
                serde_json::to_value(vm.stat()?).map_err(|error| Failure::new(Kind::Other, error.to_string()))
            }
            Request::Pause => vm.pause(),
            Request::Resume => vm.resume(),
            Request::Resolve { force } => crate::doubt::resolve(vm, force),
            Request::SetRam { ram_bytes } => vm.set_ram(ram_bytes),
            Request::RecordFaults { seconds } => crate::record::record_faults(vm, seconds, client),
            Request::Migrate(request) => crate::leave::migrate(vm, &request, client),
            Request::Stop => vm.stop(),
            // During a migration its own connection hears of it: see `leave`.
            Request::Cancel => {
                Err(Failure::new(Kind::Name, format!("no migration of {:?} is under way", vm.facts.name)))
            }
        }
    }
}

impl Vm {
    /// Refuses unless the VM is here, and neither coming nor going.
    pub(crate) fn must_be_here(&self, to_do: &str) -> Result<(), Failure> {
        let name = &self.facts.name;
        let why = self.core(|core| match &core.phase {
            Phase::Here => None,
            Phase::Arriving => Some("it is still arriving".to_owned()),
            Phase::Migrating => {
                Some("it is migrating; cancel that first (Ctrl-C of `vmemd migrate`)".to_owned())
            }
            Phase::InDoubt { to, .. } => Some(format!("it may run at {to}; see `vmemd resolve {name}`")),
            Phase::Moved { to } => Some(format!("it has moved to {to}")),
        });
        match why {
            None => Ok(()),
            Some(why) => Err(Failure::new(Kind::Name, format!("cannot {to_do} {name:?}: {why}"))),
        }
    }

    fn pause(&self) -> Result<Value, Failure> {
        self.must_be_here("pause")?;
        self.guest(|guest| guest.pause())?;
        self.core(|core| core.paused = true);
        info!(vm = %self.facts.name, "paused");
        self.done("paused")
    }

    fn resume(&self) -> Result<Value, Failure> {
        if self.core(|core| matches!(core.phase, Phase::InDoubt { .. })) {
            return crate::doubt::resume(self);
        }
        self.must_be_here("resume")?;
        // Even if it cannot go on yet: it is to, as soon as it can.
        let stalled = self.core(|core| {
            core.paused = false;
            core.stalled.is_some()
        });
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
        self.guest(|guest| {
            // Under the guest's lock, so that a migration which begins now pauses it later than this.
            self.must_be_here("resume")?;
            guest.resume()
        })?;
        self.core(|core| (core.stalled, core.paused) = (None, false));
        info!(vm = %self.facts.name, "resumed");
        self.done("running")
    }

    /// Has the VM end, and says what became of it when that is known: it may have moved meanwhile.
    fn stop(&self) -> Result<Value, Failure> {
        let (tell, told) = channel();
        self.core(|core| match &core.end {
            Some(end) => drop(tell.send(end.clone())),
            None => core.stoppers.push(tell),
        });
        let _ = self.events.send(Event::Stop);
        let ended = |_| Failure::new(Kind::Vm, format!("{:?} ended by itself", self.facts.name));
        told.recv().map_err(ended)?
    }

    fn set_ram(&self, ram_bytes: u64) -> Result<Value, Failure> {
        self.must_be_here("change the budget of")?;
        let engine = self.memory()?.engine()?;
        let before = engine.stats()?.ram_budget_bytes;
        if ram_bytes > before {
            crate::host::need_free_ram(ram_bytes - before, "a larger budget")?;
        }
        // On record before it is taken, and for as long as it may be held.
        if ram_bytes > before {
            self.note_budget(ram_bytes);
        }
        let set = engine.set_budget(ram_bytes);
        if let Ok(stats) = engine.stats() {
            self.note_budget(stats.ram_budget_bytes.max(stats.frames_bytes));
        }
        set.map_err(|error| match error {
            swapd::CommandError::Store(reason) => {
                let text = format!("{reason}; its RAM shrinks to the new budget when the store takes writes");
                Failure::new(Kind::Resources, text)
            }
            swapd::CommandError::StillAbove { budget, held, pinned } => {
                let [budget, held, pinned] = [budget, held, pinned].map(Size);
                let text = format!(
                    "{:?} still holds {held:#} of RAM: {pinned:#} cannot leave it ({PINNED_BY}). The budget is {budget:#} from now on, and \
                     is kept when that is let go of",
                    self.facts.name
                );
                Failure::new(Kind::Resources, text)
            }
            error => error.into(),
        })?;
        info!(vm = %self.facts.name, ram_bytes, "budget changed");
        Ok(json!({ "name": self.facts.name, "ram_budget_bytes": engine.stats()?.ram_budget_bytes }))
    }

    pub(crate) fn done(&self, state: &str) -> Result<Value, Failure> {
        Ok(json!({ "name": self.facts.name, "state": state }))
    }
}
