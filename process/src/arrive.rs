//! A VM that arrives: in a process that the daemon starts, in a session of its own, with four descriptors.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use migrate::limits::{STATE_IN_MEMORY, STREAM_TIMEOUT, scaled_for_tests};
use migrate::{
    DataStream, Received, RefuseKind, Registry, SessionHello, StateSpool, TargetLink, TargetMemory, TargetVm,
    VmError,
};
use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};

use crate::control::protocol::ArrivalStat;
use crate::control::rundir::{RunDir, SocketName};
use crate::facts::Facts;
use crate::failure::{Failure, FailureKind, chain};
use crate::granted::{Granted, Share};
use crate::hold::{AS_IT_CAME, Resumer, Whereabouts, may_resume};
use crate::host;
use crate::life::{self, End, RECEIVER};
use crate::live_vm::vm_error;
use crate::machine::Newcomer;
use crate::memory::{Memory, MemorySpec};
use crate::passing;
use crate::process::{Owner, Process};
use crate::vm::{Vm, VmEvent, Waiting};

/// A state leaves so much of `/var/tmp` free.
const LEFT_FREE: u64 = 256 << 20;

/// The settings that the daemon gives the process that it starts, as one JSON argument.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ArriveSettings {
    /// Where the daemon has bound the socket, and where the registry is.
    pub run_dir: PathBuf,
    /// What the source offers, but for its offer of a machine.
    pub hello: SessionHello,
    /// RAM budget that the daemon has granted, and tells the source.
    pub granted_ram_bytes: u64,
    /// The memory to receive into.
    pub memory: MemorySpec,
    /// Listen address of the daemon.
    pub daemon: String,
    /// Room on the store's disk that neither this VM nor another was promised.
    pub store_spare_bytes: u64,
    /// For the VM's way onward, in the words of this host. The hello's own is left out.
    pub offer: Option<String>,
    /// The source's control connection.
    pub control_fd: RawFd,
    /// Where the daemon passes the data streams on.
    pub streams_fd: RawFd,
    /// The VM's control socket, bound by the daemon under the run directory's lock.
    pub listener_fd: RawFd,
    /// The record of its RAM ([`crate::granted`]), made and locked by the daemon.
    pub granted_fd: RawFd,
}

/// The descriptors, owned.
struct Passed {
    control: TcpStream,
    streams: UnixStream,
    listener: OwnedFd,
    granted: OwnedFd,
}

fn take(settings: &ArriveSettings) -> Result<Passed, Failure> {
    let own = |fd: RawFd| {
        // SAFETY: F_SETFD only changes a flag of the descriptor, and fails on one that is not open.
        if fd <= libc::STDERR_FILENO || unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
            return Err(Failure::new(
                FailureKind::Usage,
                "`vmemd receive` is started by `vmemd serve`, not by hand",
            ));
        }
        // SAFETY: open, as just checked; the daemon left these four descriptors to this process, which takes each once
        // and before it opens any of its own.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    Ok(Passed {
        control: TcpStream::from(own(settings.control_fd)?),
        streams: UnixStream::from(own(settings.streams_fd)?),
        listener: own(settings.listener_fd)?,
        granted: own(settings.granted_fd)?,
    })
}

/// A VM on its way to this process.
#[derive(Debug)]
pub struct Arrival {
    settings: ArriveSettings,
    control: TcpStream,
    streams: UnixStream,
    registry: Registry,
}

impl Arrival {
    /// Takes over what the daemon holds for the VM, and serves its control socket. Call it before the process opens
    /// descriptors of its own.
    ///
    /// # Errors
    /// If the settings are not the daemon's, or the host lacks something. The source has been told if it could be.
    pub fn begin(settings: &ArriveSettings, owner: Owner) -> Result<(Process, Arrival), Failure> {
        let Passed { mut control, streams, listener, granted } = take(settings)?;
        match Arrival::serve(settings, listener, granted, owner) {
            Ok((process, registry)) => {
                Ok((process, Arrival { settings: settings.clone(), control, streams, registry }))
            }
            Err(failure) => {
                tell_refusal(&mut control, &failure);
                Err(failure)
            }
        }
    }

    fn serve(
        settings: &ArriveSettings,
        listener: OwnedFd,
        granted: OwnedFd,
        owner: Owner,
    ) -> Result<(Process, Registry), Failure> {
        let hello = &settings.hello;
        let dir = RunDir::open(&settings.run_dir)?;
        let claimed = dir.adopt(SocketName::arriving(&hello.name, &hello.session.to_string()), listener);
        let facts = Facts {
            name: hello.name.clone(),
            memory_bytes: settings.memory.memory_bytes,
            budget_bytes: settings.memory.budget_bytes,
            engine: settings.memory.engine,
            daemon: Some(settings.daemon.clone()),
            offer: settings.offer.clone(),
        };
        let granted = Granted::adopt(&dir, &hello.session.to_string(), granted, Share::of(&facts))?;
        let process = Process::begin_granted(facts, claimed, granted, owner)?;
        let registry = Registry::new(&dir.sessions_dir()).map_err(|error| Failure::other(&error))?;
        Ok((process, registry))
    }

    /// Tells the source that the VM cannot come.
    pub fn refuse(mut self, failure: &Failure) {
        tell_refusal(&mut self.control, failure);
    }

    /// Starts receiving, on a thread of its own. Its end is an event of the VM.
    pub(crate) fn start(
        self,
        vm: &Arc<Vm>,
        memory: TargetMemory,
        newcomer: Box<dyn Newcomer>,
    ) -> Result<JoinHandle<()>, Failure> {
        // A word to the daemon: it takes a process that does not come so far for one that hangs.
        if let Err(error) = (&self.streams).write_all(&[1]) {
            warn!(vm = %vm.facts.name, %error, "the daemon does not hear that its process is up");
        }
        let vm = vm.clone();
        std::thread::Builder::new()
            .name(RECEIVER.to_owned())
            .spawn(move || {
                let ran = catch_unwind(AssertUnwindSafe(|| self.run(&vm, memory, newcomer)));
                let result = match ran {
                    Ok(result) => result,
                    Err(_) if vm.locked(|state| matches!(state.whereabouts, Whereabouts::Here)) => {
                        take_name(&vm);
                        Ok(())
                    }
                    Err(_) => Err(Failure::new(
                        FailureKind::Vm,
                        "a bug in vmemd ended the arrival: see the panic above",
                    )),
                };
                let _ = vm.events.send(VmEvent::Arrived(result));
            })
            .map_err(|error| Failure::io("cannot start the receiving thread", &error))
    }

    fn run(self, vm: &Vm, memory: TargetMemory, newcomer: Box<dyn Newcomer>) -> Result<(), Failure> {
        let Arrival { settings, control, streams, registry } = self;
        let mut streams = || {
            let limit = scaled_for_tests(STREAM_TIMEOUT);
            let waiting = Waiting::new("the source's data connections", ("STREAM_TIMEOUT", limit));
            vm.locked(|state| state.waiting = Some(waiting));
            let (fd, index) = passing::receive_fd(&streams, limit)?;
            Ok(DataStream { index, socket: TcpStream::from(fd) })
        };
        let spool = spool_of(&settings);
        let link = TargetLink {
            control,
            hello: settings.hello,
            granted_ram_bytes: settings.granted_ram_bytes,
            streams: &mut streams,
            spool,
            registry: &registry,
            progress: &|progress| vm.waits(progress.waiting),
            cancel: &vm.cancel,
        };
        let mut target = Target { vm, newcomer: Some(newcomer) };
        let received = migrate::receive(link, memory, &mut target);
        vm.waits(None);
        match received {
            Ok(received) => {
                info!(vm = %vm.facts.name, bytes = received.bytes_received, "arrived");
                vm.locked(|state| state.arrival = Some(arrival_of(&received)));
                Ok(())
            }
            // The VM runs here, whatever went wrong afterwards (the source left while the placement was measured).
            Err(error) if vm.locked(|state| matches!(state.whereabouts, Whereabouts::Here)) => {
                warn!(vm = %vm.facts.name, error = %chain(&error), "arrived, but the session did not end well");
                Ok(())
            }
            Err(error) => {
                let failure = Failure::from(error);
                Err(Failure::new(
                    failure.kind,
                    format!("{:?} did not arrive: {}", vm.facts.name, failure.text),
                ))
            }
        }
    }
}

impl Process {
    /// Receives a VM, and lives with it until it is stopped or moves on.
    pub fn receive(&self, arrival: Arrival, memory: Memory, newcomer: Box<dyn Newcomer>) -> End {
        let _ = self.vm.memory.set(memory.view());
        match arrival.start(&self.vm, memory.target(), newcomer) {
            Ok(work) => {
                let ended = life::live(&self.vm, &self.events);
                life::finish(&self.vm, memory, &self.server, Some(work), ended)
            }
            Err(failure) => {
                memory.stop();
                self.give_up();
                let end = End::failed(failure);
                self.vm.tell_end(&end.result);
                end
            }
        }
    }
}

/// A state that is too large for memory is kept where the VM's pages are kept. If the store is a block device, it is
/// kept where files are that are large and have no name, and encrypted: the device may be one that encrypts.
fn spool_of(settings: &ArriveSettings) -> StateSpool {
    let memory = &settings.memory;
    let in_store = memory.store.is_dir();
    let directory = if in_store { memory.store.clone() } else { PathBuf::from("/var/tmp") };
    let elsewhere = host::free_disk(&directory).unwrap_or_default().saturating_sub(LEFT_FREE);
    StateSpool {
        directory,
        memory_bytes: STATE_IN_MEMORY,
        disk_bytes: if in_store { settings.store_spare_bytes } else { elsewhere },
        encrypt: memory.store_encrypt || !in_store,
        lock: memory.lock,
    }
}

fn tell_refusal(control: &mut TcpStream, failure: &Failure) {
    let kind = if failure.kind == FailureKind::Resources { RefuseKind::NoRoom } else { RefuseKind::Other };
    migrate::refuse(control, kind, &failure.text);
}

fn arrival_of(received: &Received) -> ArrivalStat {
    ArrivalStat {
        session: received.session.to_string(),
        bytes_received: received.bytes_received,
        pages_ram: received.pages_ram,
        pages_store: received.pages_store,
        pages_zero: received.pages_zero,
        pageins_during: received.pageins_during,
        pageouts_during: received.pageouts_during,
    }
}

/// Of a VM that is here, whether or not it has the name already.
fn take_name(vm: &Vm) {
    if let Err(failure) = vm.claim(|claim| claim.take_name()) {
        error!(vm = %vm.facts.name, %failure, "the name could not be taken: the VM runs as one that is arriving");
    }
}

/// The VM as a migration's target sees it.
struct Target<'a> {
    vm: &'a Vm,
    /// Until its state has come.
    newcomer: Option<Box<dyn Newcomer>>,
}

impl TargetVm for Target<'_> {
    fn load(&mut self, state: &mut dyn Read) -> Result<(), VmError> {
        let newcomer = self.newcomer.take().expect("a state comes once");
        let machine = newcomer.load(state).map_err(vm_error)?;
        self.vm.set_machine(machine);
        Ok(())
    }

    fn start(&mut self, paused: bool) -> Result<(), VmError> {
        // The commit is decided, so the source will not run the VM again. From here on any end of this thread, a panic
        // too, leaves the VM marked as this host's. Only the failure below, where the guest provably did not start,
        // takes that back.
        let go = self.vm.locked(|state| {
            (state.whereabouts, state.waiting) = (Whereabouts::Here, None);
            if paused {
                state.hold.pause_by(AS_IT_CAME);
            }
            may_resume(Resumer::Target, &state.whereabouts, &state.hold)
        });
        let started = self
            .vm
            .claim(|claim| claim.is_free())
            .and_then(|()| if go { self.vm.machine(|machine| machine.resume()) } else { Ok(()) });
        match started {
            Err(failure) if failure.kind == FailureKind::InDoubt => {
                warn!(vm = %self.vm.facts.name, %failure, "told to run, without an answer: if it stands still, `vmemd resume`");
                Ok(())
            }
            Err(failure) => {
                self.vm.locked(|state| state.whereabouts = Whereabouts::Arriving);
                Err(vm_error(failure))
            }
            Ok(()) => Ok(()),
        }
    }

    fn take_name(&mut self) {
        take_name(self.vm);
    }
}
