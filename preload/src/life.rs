//! The VM's life in the process of its QEMU: from the first memory backend to the end of the process.
//!
//! The engine is never stopped: QEMU touches guest memory until its last moment. The kernel takes everything at the
//! end; only the files that stand for the VM (control socket, QMP socket) are removed, by an exit handler.

use std::ffi::CString;
use std::net::Shutdown;
use std::os::fd::FromRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use libc::c_int;
use swapd::{Engine, EngineConfig, EngineHandle};
use tracing::{error, info};
use tracing_subscriber::EnvFilter;
use vmprocess::control::protocol::EngineKind;
use vmprocess::control::rundir::RunDir;
use vmprocess::failure::{Failure, FailureKind, chain};
use vmprocess::qemu::{Backend, PreloadSettings, QmpAddress, Role};
use vmprocess::{Arrival, End, Facts, Machine, Memory, NameHold, Owner, Process};

use crate::backends::{Backends, Keeper, Part};
use crate::farewell::{self, GOODBYE_LIMIT};
use crate::guest::{Incoming, Qemu};
use crate::interpose::{BACKENDS, NOT_MEANT};
use crate::qmp::{HeardState, Qmp, QmpError, lock};
use crate::restored::{Opened, Saved};
use crate::settings::{self, Found};
use crate::started;

/// From the first memory backend of a VM that arrives to a machine that answers. Large disks take their time to be
/// opened; the daemon has less patience.
const SET_UP_TIMEOUT: Duration = Duration::from_secs(300);
/// A QEMU that its user starts may wait for a client of a serial line as long as it likes, and ends by itself if it
/// fails: ten years.
const NO_LIMIT: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// A QEMU that somebody else has started answers within this, or the log says that it does not.
const GREETING_USUAL: Duration = Duration::from_secs(10);
/// What the log shows; `VMEMD_LOG` may ask for more.
const LOG_DEFAULT: &str = "info";

/// In QEMU's place before its `main`: if this is the QEMU meant, its backends are known from here on.
pub(crate) fn prepare() {
    if settings::answer() {
        return;
    }
    // SAFETY: the dynamic linker runs this before `main`; the program has no other thread yet.
    let mut settings = match unsafe { settings::take() } {
        Found::Ours(settings) => *settings,
        Found::NotMeant(why) => return drop(NOT_MEANT.set(why)),
        Found::Unreadable(why) => end(FailureKind::Usage, &why),
    };
    start_logging();
    // Before any other: it runs behind all of them.
    // SAFETY: the handler may run at any exit of the process.
    unsafe { libc::atexit(at_last) };
    if let Role::Arriving(arrive) = &settings.role {
        farewell::expect(arrive);
    }
    if let (Role::New { stays, .. }, Some(printed)) = (&mut settings.role, &settings.args) {
        let words = started::own_words().unwrap_or_else(|error| {
            end(FailureKind::Host, &format!("cannot read this process's command line: {error}"))
        });
        *stays = stays.take().or_else(|| started::otherwise(&words, printed));
    }
    let path = |backend: &Backend| CString::new(backend.path.as_os_str().as_bytes()).unwrap_or_default();
    let files: Vec<_> =
        settings.backends.iter().map(|backend| (path(backend), backend.bytes as usize)).collect();
    let keeper = EngineKeeper { settings, engine: OnceLock::new() };
    match Backends::new(files, Box::new(keeper)) {
        Ok(backends) => drop(BACKENDS.set(backends)),
        Err(error) => end(FailureKind::Host, &format!("no memfd for guest memory: {error}")),
    }
}

/// Ends the process before QEMU's `main`: nothing has been set up.
fn end(kind: FailureKind, why: &str) -> ! {
    eprintln!("vmemd: {why}");
    // SAFETY: ends the process at once.
    unsafe { libc::_exit(i32::from(kind.exit_code())) }
}

fn start_logging() {
    let filter = EnvFilter::try_from_env("VMEMD_LOG").unwrap_or_else(|_| EnvFilter::new(LOG_DEFAULT));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_target(false);
    // A log that cannot be written (nobody reads this stderr any more) is no reason to panic in QEMU.
    let builder = builder.log_internal_errors(false);
    if let Err(error) = builder.with_writer(std::io::stderr).try_init() {
        eprintln!("vmemd: no log: {error}");
    }
}

/// Holds the VM's memory for [`Backends`].
struct EngineKeeper {
    settings: PreloadSettings,
    /// Once the first backend is mapped.
    engine: OnceLock<EngineHandle>,
}

impl Keeper for EngineKeeper {
    fn attach(&self, index: usize, address: usize, _bytes: usize) -> Result<(), c_int> {
        let name = self.settings.role.name();
        let attached = self.engine().and_then(|engine| {
            // SAFETY: Backends has just mapped the region so, as long as the settings say (the engine was started with
            // the same sizes), and never unmaps it; QEMU has no pointer to it yet, and Rust code none at all.
            unsafe { engine.attach(index, address as *mut u8) }.map_err(Failure::from)
        });
        attached.map_err(|failure| {
            error!(vm = name, "QEMU gets no memory: {failure}");
            libc::ENOMEM
        })
    }

    fn discard(&self, part: Part) {
        let Some(engine) = self.engine.get() else { return };
        for run in engine.runs_in(part.address as *const u8, part.bytes) {
            if let Err(error) = engine.discard(run) {
                error!(%error, "what the guest gave back stays where it is");
            }
        }
    }
}

impl EngineKeeper {
    /// The running engine. Called by one thread at a time.
    fn engine(&self) -> Result<&EngineHandle, Failure> {
        if let Some(engine) = self.engine.get() {
            return Ok(engine);
        }
        let _blocked = BlockedSignals::new();
        let engine = start(&self.settings)?;
        Ok(self.engine.get_or_init(|| engine))
    }
}

/// Claims the VM's name, starts its engine and the thread that serves both.
fn start(settings: &PreloadSettings) -> Result<EngineHandle, Failure> {
    let spec = settings.role.memory();
    if spec.engine != EngineKind::Vmemd {
        return Err(Failure::new(
            FailureKind::Usage,
            "plain memory is what QEMU has without vmemd: start it so",
        ));
    }
    let here = |run_dir: &Path, name: &str, offer: &str| {
        vmprocess::host::need_free_ram(spec.budget_bytes, "this VM")?;
        let place = RunDir::open(run_dir)?.claim_name(name)?;
        let facts = Facts {
            name: name.to_owned(),
            memory_bytes: spec.memory_bytes,
            budget_bytes: spec.budget_bytes,
            engine: spec.engine,
            daemon: None,
            offer: Some(offer.to_owned()).filter(|offer| !offer.is_empty()),
        };
        Process::begin(facts, place, Owner::Embedder)
    };
    let mut origin = None;
    let (process, begins) = match &settings.role {
        Role::New { run_dir, name, offer, .. } => (here(run_dir, name, offer)?, Begins::New),
        Role::Arriving(arrive) => {
            farewell::taken();
            let (process, arrival) = Arrival::begin(arrive, Owner::Embedder)?;
            (process, Begins::Arrives(Box::new(arrival)))
        }
        Role::Restoring(restore) => {
            let opened = Opened::open(restore)?;
            let process = here(&restore.run_dir, &restore.name, &restore.offer)?;
            let (saved, layers) = opened.split();
            origin = Some(layers);
            (process, Begins::Again(Box::new(saved)))
        }
    };
    let regions: Vec<u64> = settings.backends.iter().map(|backend| backend.bytes).collect();
    let config = EngineConfig { origin, ..spec.engine_config() };
    let engine = match Engine::start_external(config, &regions, Box::new(process.notices())) {
        Ok(engine) => engine,
        Err(error) => {
            let failure = Failure::from(error);
            if let Begins::Arrives(arrival) = begins {
                arrival.refuse(&failure);
            }
            return Err(failure);
        }
    };
    let handle = engine.handle();
    // It serves as long as the process lives.
    std::mem::forget(engine);
    Leftovers::remove_at_exit(process.name_hold(), &settings.qmp);
    let (settings, memory) = (settings.clone(), handle.clone());
    std::thread::Builder::new()
        .name("vmemd-life".to_owned())
        .spawn(move || live(&settings, process, begins, memory))
        .map_err(|error| Failure::io("cannot start the VM's thread", &error))?;
    Ok(handle)
}

/// Where the VM comes from.
enum Begins {
    /// It starts.
    New,
    /// Another host.
    Arrives(Box<Arrival>),
    /// A checkpoint.
    Again(Box<Saved>),
}

/// Serves the VM until it ends, or the process does.
fn live(settings: &PreloadSettings, process: Process, begins: Begins, engine: EngineHandle) {
    let name = settings.role.name();
    let memory = Memory::external(engine.clone());
    let arrives = matches!(begins, Begins::Arrives(_));
    let meet = || {
        let mut qemu = meet(settings, arrives)?;
        let (stays, disks) = match &settings.role {
            Role::New { stays, disks, .. } => (stays.clone(), Some(disks)),
            Role::Restoring(restore) => (None, Some(&restore.disks)),
            Role::Arriving(_) => (None, None),
        };
        if let Some(disks) = disks {
            let why = stays.map_or_else(|| qemu.unnamed_disk(disks), |why| Ok(Some(why)))?;
            qemu = qemu.stays(why);
        }
        Leftovers::knows(&qemu);
        qemu.owns_memory(&settings.backends)?;
        if engine.is_attached() {
            info!(vm = name, "QEMU answers, and has its memory from vmemd");
            return Ok(qemu);
        }
        Err(Failure::new(
            FailureKind::Usage,
            "QEMU has not mapped all of its memory backends: see its command line",
        ))
    };
    process.on_end(tell_end);
    let end = match begins {
        Begins::New => process.run(memory, || Ok(Box::new(meet()?) as Box<dyn Machine>)),
        Begins::Again(saved) => match meet().and_then(|qemu| saved.into_restoration(&engine, Incoming(qemu)))
        {
            Ok(restoration) => process.restore(memory, restoration),
            Err(failure) => {
                process.give_up();
                tell_end(name, &Err(failure.clone()));
                End { result: Err(failure), quit: false }
            }
        },
        Begins::Arrives(arrival) => match meet() {
            Ok(qemu) => process.receive(*arrival, memory, Box::new(Incoming(qemu))),
            Err(failure) => {
                let failure = farewell::reason().map_or(failure, |why| Failure::new(FailureKind::Vm, why));
                arrival.refuse(&failure);
                process.give_up();
                tell_end(name, &Err(failure.clone()));
                End { result: Err(failure), quit: false }
            }
        },
    };
    let code = end.result.as_ref().map_or_else(|failure| failure.kind.exit_code(), |()| 0);
    if end.quit {
        // QEMU ends now; its exit handler gives the name up.
        std::mem::forget(process);
        return;
    }
    Leftovers::remove();
    // SAFETY: ends the process at once, with threads that wait for pages which never come.
    unsafe { libc::_exit(i32::from(code)) };
}

fn tell_end(name: &str, result: &Result<(), Failure>) {
    match result {
        Err(failure) if failure.kind == FailureKind::Moved => info!(vm = name, "{failure}"),
        Err(failure) => error!(vm = name, "{failure}"),
        Ok(()) => {}
    }
}

fn meet(settings: &PreloadSettings, arrives: bool) -> Result<Qemu, Failure> {
    let limit = if arrives { SET_UP_TIMEOUT } else { NO_LIMIT };
    let qmp = match &settings.qmp {
        QmpAddress::Socket(path) => Qmp::connect(path, GREETING_USUAL, limit),
        QmpAddress::Descriptor { ours, .. } => {
            // SAFETY: inherited for this alone; taken once, because a process has one life.
            let monitor = unsafe { UnixStream::from_raw_fd(*ours) };
            if arrives {
                farewell::coming(&monitor);
            }
            Qmp::over(monitor, limit)
        }
    };
    let kind = |error: &QmpError| {
        if matches!(error, QmpError::NoSocket { .. }) { FailureKind::Usage } else { FailureKind::Vm }
    };
    Qemu::new(qmp.map_err(|error| Failure::new(kind(&error), chain(&error)))?, &settings.backends)
}

/// Files that stand for the VM.
struct Leftovers {
    name: NameHold,
    qmp: Option<PathBuf>,
    /// A forked child that exits removes nothing.
    pid: u32,
    /// QEMU's monitor, and what was heard on it: from the moment on that QEMU answers.
    monitor: Option<(UnixStream, HeardState)>,
}

static LEFTOVERS: Mutex<Option<Leftovers>> = Mutex::new(None);

impl Leftovers {
    fn remove_at_exit(name: NameHold, qmp: &QmpAddress) {
        let qmp = match qmp {
            QmpAddress::Socket(path) => Some(path.clone()),
            QmpAddress::Descriptor { .. } => None,
        };
        *lock(&LEFTOVERS) = Some(Leftovers { name, qmp, pid: std::process::id(), monitor: None });
        // SAFETY: the handler may run at any exit of the process.
        unsafe { libc::atexit(at_exit) };
    }

    fn knows(qemu: &Qemu) {
        if let Some(leftovers) = lock(&LEFTOVERS).as_mut() {
            leftovers.monitor = qemu.monitor().map(|monitor| (monitor, qemu.heard_state()));
        }
    }

    /// QEMU exits: whoever moves the VM hears why.
    fn tell() {
        let (name, monitor) = match lock(&LEFTOVERS).as_mut() {
            Some(leftovers) if leftovers.pid == std::process::id() => {
                (leftovers.name.clone(), leftovers.monitor.take())
            }
            _ => return,
        };
        // Only of a VM that moves away: of one that arrives, [`farewell`] ends the conversation.
        let why = || {
            let said = monitor.and_then(|(monitor, heard_state)| {
                // QEMU answers nothing any more: what is asked now fails at once.
                let _ = monitor.shutdown(Shutdown::Both);
                heard_state.last_words()
            });
            said.unwrap_or_else(|| Failure::new(FailureKind::Vm, "its QEMU exited: see its log"))
        };
        name.ends(why, GOODBYE_LIMIT);
    }

    fn remove() {
        let Some(leftovers) = lock(&LEFTOVERS).take_if(|leftovers| leftovers.pid == std::process::id())
        else {
            return;
        };
        if let Some(kind) = leftovers.name.end() {
            END.store(kind.exit_code(), Ordering::SeqCst);
        }
        leftovers.name.release();
        if let Some(path) = leftovers.qmp {
            let _ = std::fs::remove_file(path);
        }
    }
}

extern "C" fn at_exit() {
    // There is nobody left to tell.
    let _ = std::panic::catch_unwind(|| {
        Leftovers::tell();
        Leftovers::remove();
    });
}

/// The exit code, if it is not QEMU's to say: the VM runs elsewhere, or may.
static END: AtomicU8 = AtomicU8::new(0);

/// QEMU was told to quit (or was ended in the middle of a hand-over) and knows nothing of where its guest went: whoever
/// started it is told by the exit code. By then its own exit handlers have run.
extern "C" fn at_last() {
    let code = END.load(Ordering::SeqCst);
    if code != 0 {
        // SAFETY: with a null argument all of the C library's streams are flushed; then the process ends at once.
        unsafe {
            libc::fflush(std::ptr::null_mut());
            libc::_exit(i32::from(code));
        }
    }
}

/// Blocks all signals of this thread for as long as it lives, so that threads started meanwhile never take one: QEMU
/// expects them on threads of its own.
struct BlockedSignals {
    before: libc::sigset_t,
}

impl BlockedSignals {
    fn new() -> BlockedSignals {
        // SAFETY: zero is a valid signal set; both outlive the calls.
        unsafe {
            let mut before: libc::sigset_t = std::mem::zeroed();
            let mut all: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            BlockedSignals { before }
        }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the set is the one that this thread had.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut()) };
    }
}
