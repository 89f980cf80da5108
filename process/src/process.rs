//! The process of one VM from the claim of its name to its end, for whoever makes the machine.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use swapd::Notice;

use crate::actions::VmService;
use crate::control::rundir::Claim;
use crate::control::server::Server;
use crate::facts::Facts;
use crate::failure::{Failure, FailureKind};
use crate::granted::{Granted, Share};
use crate::hold::Whereabouts;
use crate::life::{self, End};
use crate::machine::Machine;
use crate::memory::Memory;
use crate::vm::{OnEnd, Vm, VmEvent, lock};

/// How long a program that ends lets an answer under way be written: that of a migration that has just failed for the
/// same reason.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);
/// Between two looks at whether a migration has ended.
const SETTLE_POLL: Duration = Duration::from_millis(2);

/// Whose process a VM lives in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Ours: SIGINT, SIGTERM and SIGHUP end the VM, and a panic of any thread ends the process.
    Ours,
    /// Another program's: its signals, its panics and its end are left to it.
    Embedder,
}

/// A VM's process whose control socket is served. Holds the VM's name until it is dropped.
#[derive(Debug)]
pub struct Process {
    pub(crate) vm: Arc<Vm>,
    pub(crate) server: Server,
    pub(crate) events: Receiver<VmEvent>,
}

impl Process {
    /// Serves the control socket of a VM that is to come.
    ///
    /// # Errors
    /// If the kernel gives no thread, or no handler of signals.
    pub fn begin(
        facts: Facts,
        (claim, listener): (Claim, UnixListener),
        owner: Owner,
    ) -> Result<Process, Failure> {
        let granted =
            Granted::new(claim.dir(), &format!("{}-{}", facts.name, std::process::id()), Share::of(&facts))?;
        Process::begin_granted(facts, (claim, listener), granted, owner)
    }

    /// The same with RAM that is on record already.
    pub(crate) fn begin_granted(
        facts: Facts,
        (claim, listener): (Claim, UnixListener),
        granted: Granted,
        owner: Owner,
    ) -> Result<Process, Failure> {
        let (sender, events) = channel();
        let vm = Arc::new(Vm::new(facts, Whereabouts::Arriving, (claim, granted), sender));
        let name = NameHold { vm: vm.clone(), server: None };
        let serve = || {
            if owner == Owner::Ours {
                life::take_process_over(&vm)?;
            }
            Server::start(listener, Arc::new(VmService(vm.clone())))
        };
        match serve() {
            Ok(server) => Ok(Process { vm, server, events }),
            Err(failure) => {
                name.release();
                Err(failure)
            }
        }
    }

    /// The VM never came to be: tells whoever has stopped it meanwhile.
    pub fn give_up(&self) {
        self.vm.has_ended(&self.vm.stopped());
        self.server.wait_answered(GIVE_UP_ANSWER_LIMIT);
    }

    /// The listener to start the engine with: it passes the engine's notices to the main loop.
    pub fn notices(&self) -> impl Fn(Notice) + Send + 'static {
        let events = self.vm.events.clone();
        move |notice| {
            // The receiver is gone only when the process is ending.
            let _ = events.send(VmEvent::Notice(notice));
        }
    }

    /// Has it told how the VM's life has ended, before the guest is told to quit. For a guest that takes the process
    /// along, as a QEMU does: what is said behind that may never be heard.
    pub fn on_end(&self, tell: OnEnd) {
        let _ = self.vm.on_end.set(tell);
    }

    /// For exit handlers of a program that may end at any time.
    pub fn name_hold(&self) -> NameHold {
        NameHold { vm: self.vm.clone(), server: Some(self.server.clone()) }
    }

    /// Lives with a new VM, which `set_up` makes and lets run, until it is stopped or has moved away.
    pub fn run(&self, memory: Memory, set_up: impl FnOnce() -> Result<Box<dyn Machine>, Failure>) -> End {
        let vm = &self.vm;
        let _ = vm.memory.set(memory.view());
        match set_up() {
            Ok(machine) => {
                vm.set_machine(machine);
                vm.locked(|state| state.whereabouts = Whereabouts::Here);
            }
            Err(failure) => {
                memory.stop();
                self.give_up();
                let end = End::failed(failure);
                vm.tell_end(&end.result);
                return end;
            }
        }
        let ended = life::live(vm, &self.events);
        life::finish(vm, memory, &self.server, None, ended)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.name_hold().release();
    }
}

/// How long whoever stops a VM that never came to be may take to fetch the answer.
const GIVE_UP_ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// The VM's name, for letting go of it when the process ends by another way than [`Process`]'s.
#[derive(Clone, Debug)]
pub struct NameHold {
    vm: Arc<Vm>,
    server: Option<Server>,
}

impl NameHold {
    /// The program ends, and the VM with it: whoever moves or saves it is told why, and so is the target. Waits for
    /// that, at most `limit`.
    pub fn ends(&self, why: impl FnOnce() -> Failure, limit: Duration) {
        let migrates = || {
            self.vm
                .locked(|state| matches!(state.whereabouts, Whereabouts::Migrating) || state.is_being_saved())
        };
        let mut deadline = Instant::now() + limit.min(ANSWER_LIMIT);
        if migrates() {
            deadline = Instant::now() + limit;
            self.vm.locked(|state| state.ended = Some(why()));
            self.vm.cancel.store(true, Ordering::SeqCst);
        }
        while migrates() && Instant::now() < deadline {
            std::thread::sleep(SETTLE_POLL);
        }
        if let Some(server) = &self.server {
            server.wait_answered(deadline.saturating_duration_since(Instant::now()));
        }
    }

    /// Removes the control socket's file. Short, and harmless when repeated: fit for an `atexit` handler.
    pub fn release(&self) {
        drop(self.vm.locked(|state| state.claim.take()));
        drop(lock(&self.vm.granted).take());
    }

    /// How the process is to end, whatever its program makes of it: the VM runs elsewhere, or may, and is not to be
    /// started here again. Before [`NameHold::release`].
    pub fn end(&self) -> Option<FailureKind> {
        match self.vm.locked(|state| state.whereabouts.clone()) {
            Whereabouts::Moved { .. } => Some(FailureKind::Moved),
            Whereabouts::InDoubt { .. } => Some(FailureKind::InDoubt),
            _ => self.vm.may_run_at().map(|_| FailureKind::InDoubt),
        }
    }
}
