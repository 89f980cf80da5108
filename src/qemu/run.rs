//! `vmemd run -- QEMU…` and `vmemd qemu-args -- QEMU…`: a new VM in a QEMU of the user's own.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;

use tracing::{info, warn};
use vmprocess::MemorySpec;
use vmprocess::control::protocol::EngineKind;
use vmprocess::control::rundir::{RunDir, name_taken};
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::host;
use vmprocess::qemu::{PreloadSettings, QmpAddress, Role, VERSION};
use vmprocess::size::Size;

use super::ask::Really;
use super::budget::check_ram;
use super::cpu::Cpu;
use super::launch;
use super::offer::Offer;
use super::options::{self, CommandLine};
use super::output::{self, Format};
use super::refuse::unmovable;
use super::rewrite::{self, LinePlan, Monitor, Settings};
use super::words::one_line;
use super::{binary, resources};

/// Why a domain of libvirt's does not move.
const LIBVIRTS: &str = "this VM cannot be moved: libvirt made most of its command line, which vmemd does not know, and another host's \
                        libvirt would know nothing of it; start it with `vmemd run` if it is to move";

/// The settings of `vmemd run` and `vmemd qemu-args` with a QEMU.
#[derive(Clone, Debug)]
pub struct QemuSettings {
    pub run_dir: PathBuf,
    pub name: String,
    /// All of QEMU's `-m` without it.
    pub ram: Option<Size>,
    pub store: PathBuf,
    pub store_overcommit: bool,
    pub store_encrypt: bool,
    /// Take all RAM at the start.
    pub prealloc: bool,
    pub lock: bool,
    /// The binary and its arguments.
    pub words: Vec<OsString>,
}

/// A QEMU that can be started.
struct Planned {
    /// As the user called it.
    name: String,
    binary: PathBuf,
    line: CommandLine,
    plan: LinePlan,
    role: Role,
}

fn plan(settings: &QemuSettings) -> Result<Planned, Failure> {
    let (name, args) = settings
        .words
        .split_first()
        .ok_or_else(|| Failure::new(FailureKind::Usage, "no QEMU is named after --"))?;
    let name = options::text(std::slice::from_ref(name))?.remove(0);
    let binary = binary::find(&name, &std::env::var_os("PATH").unwrap_or_default())?;
    binary::check(&binary)?;
    let mut line = CommandLine::parse(&options::text(args)?)?;
    let offer = Offer::of(&binary, &mut line, &here()?, &Really, Cpu::of_this_host)?;
    let plan = LinePlan::of(&line)?;
    // All of it, to the byte: what the engine rounds up takes no RAM.
    let ram = settings.ram.unwrap_or_else(|| plan.memory().max(Size(swapd::Engine::MIN_BUDGET_BYTES)));
    check_ram(plan.memory(), ram)?;
    let memory = plan.managed();
    let disks = resources::disks(&CommandLine::parse(&offer.args)?)?;
    let offer =
        serde_json::to_string(&offer).map_err(|error| Failure::new(FailureKind::Usage, error.to_string()))?;
    let role = Role::New {
        run_dir: settings.run_dir.clone(),
        name: settings.name.clone(),
        memory: MemorySpec {
            engine: EngineKind::Vmemd,
            memory_bytes: memory.bytes(),
            budget_bytes: ram.bytes(),
            store: settings.store.clone(),
            store_overcommit: settings.store_overcommit,
            store_encrypt: settings.store_encrypt,
            prealloc: settings.prealloc,
            lock: settings.lock,
        },
        offer,
        disks,
        stays: unmovable(&line).err().map(|failure| one_line(&failure.text)),
    };
    Ok(Planned { name, binary, line, plan, role })
}

fn here() -> Result<PathBuf, Failure> {
    std::env::current_dir().map_err(|error| Failure::io("cannot tell the directory", &error))
}

/// Becomes QEMU, which is the VM's process: nothing stands between it and whoever started it.
///
/// # Errors
/// Whatever keeps it from starting. What goes wrong afterwards, QEMU says, and ends.
pub fn run(settings: &QemuSettings) -> Result<std::convert::Infallible, Failure> {
    let Planned { name, binary, plan, role, .. } = plan(settings)?;
    let memory = role.memory();
    host::need_free_ram(memory.budget_bytes, "this VM")?;
    if memory.lock {
        swapd::Engine::check_lock(memory.memory_bytes)?;
    }
    // The preload claims the name; but by then QEMU would have to say why it ends.
    if let Ok(socket) = RunDir::open(&settings.run_dir)?.find(&settings.name) {
        return Err(name_taken(&socket));
    }
    info!(vm = %settings.name, memory = %Size(memory.memory_bytes), ram = %Size(memory.budget_bytes), qemu = %binary.display(), "starting");
    let mut launch = launch::launch(&binary, plan, role)?;
    launch.notes.iter().for_each(|note| warn!("{note}"));
    // By a name that ends with `kvm` QEMU prefers KVM.
    let error = launch.command.arg0(name).exec();
    Err(Failure::io(format!("cannot start {}", binary.display()), &error))
}

/// The arguments and the environment for somebody else to start QEMU with, as one text.
///
/// # Errors
/// If the command line cannot work.
pub fn arguments(settings: &QemuSettings, format: Format) -> Result<String, Failure> {
    let Planned { binary, mut line, mut role, .. } = plan(settings)?;
    resources::from_anywhere(&mut line, &here()?)?;
    let is_libvirt = format == Format::Libvirt;
    let plan = if is_libvirt { LinePlan::appended(&line)? } else { LinePlan::of(&line)? };
    if let Role::New { stays, .. } = &mut role
        && is_libvirt
    {
        *stays = Some(LIBVIRTS.to_owned());
    }
    let name = &settings.name;
    let files = launch::memory_files(&plan);
    let qmp = RunDir::open(&settings.run_dir)?.monitors_dir()?.join(format!("{name}.qmp"));
    let backends = launch::backends(&plan, &files);
    let made = plan.rewrite(&Settings {
        files: &files,
        monitor: Monitor::Socket(&qmp),
        role: rewrite::Role::Start,
    })?;
    let preload = PreloadSettings {
        version: VERSION.to_owned(),
        program: launch::program(&binary)?,
        backends,
        qmp: QmpAddress::Socket(qmp.clone()),
        args: (!is_libvirt).then(|| made.args.clone()),
        role,
    };
    let environment =
        launch::environment(&preload)?.map(|(name, value)| (name, value.to_string_lossy().into_owned()));
    made.notes.iter().for_each(|note| warn!("{note}"));
    Ok(output::print(format, &binary, &made, &environment))
}
