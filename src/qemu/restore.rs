//! `vmemd restore` of a QEMU VM: a QEMU that is the one of the checkpoint, with the disks of the checkpoint's moment.
//!
//! ```text
//!   offer, or the words after -- ──▶ checked: memory, machine, processor, what is missing here
//!   disks ──▶ as the user said: copies, in place, or left as they are ──▶ names in the command line
//!   the same addresses as a VM that runs? ──▶ refused by name, unless that is meant
//! ```
//! All of that is told before anything is changed, and so is what is wrong with the checkpoint, with a disk's snapshot
//! or with QEMU itself. Then disks are made, and this process becomes QEMU.
//!
//! QEMU's process opens the checkpoint once more, since what was read of it does not live over exec. It inherits the
//! locks of the first time until it has its own: nobody removes the checkpoint behind the disks that were put back.

use std::os::fd::{AsRawFd, OwnedFd};

use checkpoint::archive::{Archive, Entry};
use checkpoint::format::VmFacts;
use tracing::{info, warn};
use vmprocess::control::protocol::EngineKind;
use vmprocess::control::rundir::{RunDir, name_taken};
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::qemu::{self, Role};
use vmprocess::size::Size;
use vmprocess::{MemorySpec, host};

use super::ask::Really;
use super::budget::check_ram;
use super::cpu::Cpu;
use super::disk_versions::{self, Work};
use super::launch::{self, Launch};
use super::offer::{Accepted, Offer};
use super::options::{self, CommandLine};
use super::resources::ThisHost;
use super::rules::Rules;
use super::twice;
use super::{binary, generation, resources};
use crate::restore_settings::RestoreSettings;

/// Becomes the QEMU of a VM that begins from the checkpoint.
///
/// # Errors
/// Whatever keeps it from starting. What goes wrong afterwards, QEMU and its log say.
pub fn restore(
    settings: &RestoreSettings,
    archive: &Archive,
    entry: &Entry,
    name: &str,
) -> Result<std::convert::Infallible, Failure> {
    let vm = &entry.manifest().vm;
    if settings.json {
        let text = "--json: the process becomes QEMU, which prints its own words only: `vmemd stat --json` tells when the VM runs";
        return Err(Failure::new(FailureKind::Usage, text));
    }
    let dir = RunDir::open(&settings.run_dir)?;
    if let Ok(socket) = dir.find(name) {
        return Err(name_taken(&socket));
    }
    let saved = offer_of(vm)?;
    let wanted = match settings.qemu.is_empty() {
        true => anew(saved)?,
        false => given(settings, &saved, name != vm.name)?,
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let cpu = Cpu::of_this_host()?;
    let rules = settings.rules.clone().unwrap_or_default();
    let accept = |offer: &Offer, rules: &Rules| offer.accept(rules, &ThisHost, &Really, &path, &cpu);
    let Accepted { binary, plan, onward } = accept(&wanted, &rules)?;
    if plan.managed().bytes() != vm.memory_bytes {
        let text = format!(
            "its command line has {:#} of memory, the checkpoint {:#}",
            plan.managed(),
            Size(vm.memory_bytes)
        );
        return Err(Failure::new(FailureKind::Usage, text));
    }
    let ram = settings.ram.unwrap_or(Size(vm.budget_bytes));
    check_ram(Size(vm.memory_bytes), ram)?;
    host::need_free_ram(ram.bytes(), "this VM")?;
    let line = CommandLine::parse(&onward.args)?;
    if vm.name != name && dir.find(&vm.name).is_ok() && !settings.same_addresses {
        twice::check(&line, &vm.name)?;
    }
    if !settings.same_addresses {
        twice::check_running(&line, &dir)?;
    }
    let disks = here(vm, &rules);
    let work =
        disk_versions::plan((&disks, &vm.without_disks), &settings.disks, name, &resources::disks(&line)?)?;

    let opened = checkpoint::restore::open(archive, entry)?;
    let images = opened.hold.images().iter();
    let locks: Vec<OwnedFd> = images
        .map(|image| image.try_clone().map(OwnedFd::from))
        .collect::<Result<_, _>>()
        .map_err(|error| Failure::io("holding the checkpoint", &error))?;
    let key = entry.chain_key()?.map(|key| key.to_pipe()).transpose();
    let key = key.map_err(|error| Failure::io("passing the checkpoint's key on", &error))?;
    drop(opened);
    let archive = settings.archive.canonicalize();
    let archive = archive.map_err(|error| Failure::io("looking at the archive", &error))?;
    let memory = MemorySpec {
        engine: EngineKind::Vmemd,
        memory_bytes: vm.memory_bytes,
        budget_bytes: ram.bytes(),
        store: settings.store.clone(),
        store_overcommit: settings.store_overcommit,
        store_encrypt: settings.store_encrypt || entry.is_encrypted(),
        prealloc: settings.prealloc,
        lock: settings.lock,
    };
    // In the names of this host by now.
    let ready = |offer: &Offer| -> Result<Launch, Failure> {
        let Accepted { binary, plan, onward } = accept(offer, &Rules::default())?;
        let role = Role::Restoring(Box::new(qemu::RestoreSettings {
            run_dir: settings.run_dir.clone(),
            name: name.to_owned(),
            memory: memory.clone(),
            offer: serde_json::to_string(&onward).map_err(|error| Failure::other(&error))?,
            disks: resources::disks(&CommandLine::parse(&onward.args)?)?,
            archive: archive.clone(),
            checkpoint: entry.name().to_owned(),
            options: settings.options,
            locks: locks.iter().map(AsRawFd::as_raw_fd).collect(),
            key: key.as_ref().map(AsRawFd::as_raw_fd),
        }));
        launch::launch(&binary, plan, role)
    };
    let moved: Vec<(String, String)> = work.iter().filter_map(Work::renamed).collect();
    let mut launch = ready(&onward)?;
    let disks = disk_versions::check(&work, &binary, &path)?;
    // From here on disks are changed. Copies go again if QEMU does not start.
    let _made = disks.make()?;
    if !moved.is_empty() {
        let args = resources::with_other_disks(&line, &moved)?.print();
        launch = ready(&Offer { args, ..onward })?;
    }
    info!(vm = %name, from = %entry.path().display(), qemu = %binary.display(), "starting");
    launch.notes.iter().for_each(|note| warn!("{note}"));
    launch.inherits(locks.into_iter().chain(key.map(OwnedFd::from)).collect());
    let error = std::os::unix::process::CommandExt::exec(&mut launch.command);
    Err(Failure::io(format!("cannot start {}", binary.display()), &error))
}

/// The QEMU of the checkpoint, as it was told when it was saved.
fn offer_of(vm: &VmFacts) -> Result<Offer, Failure> {
    let unreadable = |why: String| {
        Failure::new(FailureKind::Usage, format!("the checkpoint does not say which QEMU it is of: {why}"))
    };
    let text = vm.offer.as_deref().ok_or_else(|| unreadable("it has no offer".to_owned()))?;
    serde_json::from_str(text).map_err(|error| unreadable(error.to_string()))
}

/// The same for another life: what must not be twice is made anew.
fn anew(saved: Offer) -> Result<Offer, Failure> {
    let mut line = CommandLine::parse(&saved.args)?;
    generation::anew(&mut line)?;
    Ok(Offer { args: line.print(), ..saved })
}

/// The QEMU that the user names, if it makes the machine of the checkpoint. What is not seen here (another device, in
/// another place) QEMU says when it loads the state.
fn given(settings: &RestoreSettings, saved: &Offer, second: bool) -> Result<Offer, Failure> {
    let (name, args) = settings.qemu.split_first().expect("there are words");
    let name = options::text(std::slice::from_ref(name))?.remove(0);
    let binary = binary::find(&name, &std::env::var_os("PATH").unwrap_or_default())?;
    binary::check(&binary)?;
    let mut line = CommandLine::parse(&options::text(args)?)?;
    let here = std::env::current_dir().map_err(|error| Failure::io("cannot tell the directory", &error))?;
    let given = Offer::of(&binary, &mut line, &here, &Really, Cpu::of_this_host)?;
    let unlike = unlike(saved, &given)?;
    if unlike.is_empty() {
        let (then, now) = (CommandLine::parse(&saved.args)?, CommandLine::parse(&given.args)?);
        if let Some(note) = generation::check(&then, &now, second)? {
            warn!("{note}");
        }
        return Ok(given);
    }
    let lines: String = unlike.iter().map(|line| format!("\n  {line}")).collect();
    let text = format!("the command line after -- does not make the machine of the checkpoint:{lines}");
    Err(Failure::new(FailureKind::Usage, text))
}

/// In what a given command line makes another machine than that of the checkpoint.
fn unlike(saved: &Offer, given: &Offer) -> Result<Vec<String>, Failure> {
    let mut lines = Vec::new();
    let (was, is) = (&saved.machine.machine, &given.machine.machine);
    if was != is {
        lines.push(format!("the machine is {is}, and was {was}: give -machine {was}"));
    }
    let (then, now) = (CommandLine::parse(&saved.args)?, CommandLine::parse(&given.args)?);
    let values = |line: &CommandLine, option: &str| -> Vec<String> {
        let words = line.words.iter().filter(|word| word.name() == option);
        words.filter_map(|word| word.value().map(str::to_owned)).collect()
    };
    for option in ["m", "smp", "cpu", "accel"] {
        let (was, is) = (values(&then, option), values(&now, option));
        if was != is {
            let said = |values: &[String]| {
                if values.is_empty() { "not given".to_owned() } else { values.join(", ") }
            };
            lines.push(format!("-{option} is {}, and was {}", said(&is), said(&was)));
        }
    }
    if let (Some(was), Some(is)) = (&saved.cpu, &given.cpu) {
        lines.extend(was.lost_on(is));
    }
    Ok(lines)
}

/// The checkpoint's disks in the names of this host.
fn here(vm: &VmFacts, rules: &Rules) -> Vec<checkpoint::format::Disk> {
    let mut disks = vm.disks.clone();
    for disk in &mut disks {
        if let Some(path) = rules.path(&disk.file) {
            disk.file = path;
        }
    }
    disks
}
