//! `vmemd receive`: a VM that arrives. Started by the daemon, in a session of its own, with three descriptors.

use std::net::TcpStream;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use migrate::{
    DataStream, FileRegistry, Received, RefuseKind, SessionHello, TargetLink, TargetMemory, TargetVm, VmError,
};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::actions::Control;
use super::life;
use super::memory::{Memory, MemorySpec};
use super::vm::{Event, Facts, Phase, Vm};
use crate::control::protocol::ArrivalStat;
use crate::control::rundir::{Place, RunDir};
use crate::control::server::Server;
use crate::daemon::passing;
use crate::failure::{Failure, Kind, chain};
use crate::vmm::Machine;

/// How long the next data stream may take to be passed on.
const STREAM_TIMEOUT: Duration = Duration::from_secs(20);

/// What the daemon tells the process that it starts, as one JSON argument.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ArriveSettings {
    pub run_dir: PathBuf,
    pub hello: SessionHello,
    pub granted_ram_bytes: u64,
    pub memory: MemorySpec,
    /// Listen address of the daemon.
    pub daemon: String,
    /// The source's control connection.
    pub control_fd: RawFd,
    /// Where the daemon passes the data streams on.
    pub streams_fd: RawFd,
    /// The VM's control socket, bound by the daemon under the run directory's lock.
    pub listener_fd: RawFd,
}

/// The descriptors, owned.
struct Passed {
    control: TcpStream,
    streams: UnixStream,
    listener: OwnedFd,
}

fn take(settings: &ArriveSettings) -> Result<Passed, Failure> {
    let own = |fd: RawFd| {
        // SAFETY: F_SETFD only changes a flag of the descriptor, and fails on one that is not open.
        if fd <= libc::STDERR_FILENO || unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
            return Err(Failure::new(
                Kind::Usage,
                "`vmemd receive` is started by `vmemd serve`, not by hand",
            ));
        }
        // SAFETY: open, as just checked; the daemon left these three descriptors to this process, which takes each once
        // and before it opens any of its own.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    Ok(Passed {
        control: TcpStream::from(own(settings.control_fd)?),
        streams: UnixStream::from(own(settings.streams_fd)?),
        listener: own(settings.listener_fd)?,
    })
}

/// Receives the VM, and lives with it until it is stopped or moves on.
///
/// # Errors
/// If it does not arrive, or ends other than by being stopped or moved.
pub fn receive(settings: &ArriveSettings) -> Result<(), Failure> {
    let Passed { mut control, streams, listener } = take(settings)?;
    let hello = &settings.hello;
    let dir = RunDir::open(&settings.run_dir)?;
    let (claim, listener) = dir.adopt(Place::arriving(&hello.name, &hello.session.to_string()), listener);
    let facts = Facts {
        name: hello.name.clone(),
        memory_bytes: settings.memory.memory_bytes,
        budget_bytes: settings.memory.budget_bytes,
        engine: settings.memory.engine,
        daemon: Some(settings.daemon.clone()),
    };
    let (events, received) = channel();
    let vm = Arc::new(Vm::new(facts, Phase::Arriving, claim, events));
    life::forward_signals(&vm)?;
    let server = Server::start(listener, Arc::new(Control(vm.clone())))?;
    let registry = FileRegistry::new(&crate::daemon::sessions_dir(&dir));
    let set_up = registry.map_err(|error| Failure::new(Kind::Other, chain(&error))).and_then(|registry| {
        Memory::start(&settings.memory, vm.events.clone()).map(|memory| (registry, memory))
    });
    let (registry, memory) = match set_up {
        Ok(set_up) => set_up,
        Err(failure) => {
            let kind = if failure.kind == Kind::Resources { RefuseKind::NoRoom } else { RefuseKind::Other };
            migrate::refuse(&mut control, kind, &failure.text);
            drop(vm.core(|core| core.claim.take()));
            return Err(failure);
        }
    };
    let _ = vm.memory.set(memory.view());
    let arrival =
        Arrival { vm: vm.clone(), memory: memory.target(), base: memory.base() as usize, registry, streams };
    let settings = settings.clone();
    let work = std::thread::Builder::new()
        .name("receive".to_owned())
        .spawn(move || arrival.run(&settings, control))
        .map_err(|error| Failure::io("cannot start the receiving thread", &error))?;
    let ended = life::live(&vm, &received);
    life::finish(&vm, memory, &server, Some(work), ended)
}

/// What the receiving thread works with.
struct Arrival {
    vm: Arc<Vm>,
    memory: TargetMemory,
    /// Address of guest page 0.
    base: usize,
    registry: FileRegistry,
    streams: UnixStream,
}

impl Arrival {
    fn run(self, settings: &ArriveSettings, control: TcpStream) {
        let vm = &self.vm;
        let mut streams = || {
            let (fd, index) = passing::receive_fd(&self.streams, STREAM_TIMEOUT)?;
            Ok(DataStream { index, socket: TcpStream::from(fd) })
        };
        let link = TargetLink {
            control,
            hello: settings.hello.clone(),
            granted_ram_bytes: settings.granted_ram_bytes,
            streams: &mut streams,
            registry: &self.registry,
            progress: &|_| {},
            cancel: &vm.cancel,
        };
        let mut target = Target { vm, base: self.base };
        let result = match migrate::receive(link, self.memory.clone(), &mut target) {
            Ok(received) => {
                info!(vm = %vm.facts.name, bytes = received.bytes_received, "arrived and running");
                vm.core(|core| core.arrival = Some(arrival_of(&received)));
                Ok(())
            }
            // The VM runs here, whatever went wrong afterwards (the source left while the placement was measured).
            Err(error) if vm.core(|core| core.phase == Phase::Here) => {
                warn!(vm = %vm.facts.name, error = %chain(&error), "arrived and running, but the session did not end well");
                Ok(())
            }
            Err(error) => {
                let failure = Failure::from(error);
                Err(Failure::new(
                    failure.kind,
                    format!("{:?} did not arrive: {}", vm.facts.name, failure.text),
                ))
            }
        };
        let _ = vm.events.send(Event::Arrived(result));
    }
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

/// The VM as a migration's target sees it.
struct Target<'a> {
    vm: &'a Vm,
    base: usize,
}

impl TargetVm for Target<'_> {
    fn load(&mut self, state: &[u8]) -> Result<(), VmError> {
        let machine = Machine::restore_sized(state, self.base as *mut u8, self.vm.facts.memory_bytes)
            .map_err(|error| VmError(chain(&error)))?;
        self.vm.set_machine(machine);
        Ok(())
    }

    fn start(&mut self) -> Result<(), VmError> {
        self.vm.claim(|claim| claim.settle()).map_err(|failure| VmError(failure.text))?;
        if let Err(failure) = self.vm.machine(|machine| Ok(machine.start()?)) {
            // The source is to have its name back.
            let _ = self.vm.claim(|claim| claim.leave("0"));
            return Err(VmError(failure.text));
        }
        self.vm.core(|core| core.phase = Phase::Here);
        Ok(())
    }
}
