//! `vmemd restore`: a process of our own, with a VM in it that begins from a checkpoint.
//!
//! The checkpoint's files are opened, and locked, before the process gives up its rights: nothing else of the archive
//! can be reached from it afterwards.

use checkpoint::archive::{Archive, ArchiveError};
use checkpoint::format::Machine;
use checkpoint::restore;
use serde::Serialize;
use vmprocess::control::protocol::EngineKind;
use vmprocess::control::rundir::{RunDir, check_name};
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::size::Size;
use vmprocess::{Facts, Memory, MemorySpec, Owner, Process, Restoration, Restored, host};

use crate::qemu;
use crate::qemu::budget::check_ram;
use crate::reference::ReferenceNewcomer;
use crate::restore_settings::RestoreSettings;
use crate::sandbox;
use crate::vmm;

/// How a VM has begun from a checkpoint, and how long the command took for it.
#[derive(Clone, Debug, Serialize)]
pub struct Started {
    #[serde(flatten)]
    pub restored: Restored,
    pub pid: u32,
    /// From the command's start until the VM ran.
    pub command_us: u64,
    /// Of these, until the checkpoint was open.
    pub open_us: u64,
    /// Until its engine was there.
    pub engine_us: u64,
}

/// Runs the VM until it is stopped or has moved away. `tell` is called when it runs, or stands still as it is to.
///
/// # Errors
/// Whatever kept it from starting, or made it end other than by being stopped or moved.
pub fn restore(
    settings: &RestoreSettings,
    tell: impl FnOnce(&Started) + Send + 'static,
) -> Result<(), Failure> {
    let archive = Archive::open(&settings.archive)?.with_key(settings.key.clone());
    let entry = archive.find(settings.checkpoint.as_deref())?;
    if entry.chain_key()?.is_none() && settings.key.is_some() {
        return Err(ArchiveError::NotEncrypted { name: entry.name().to_owned() }.into());
    }
    let vm = &entry.manifest().vm;
    let name = settings.name.clone().unwrap_or_else(|| vm.name.clone());
    check_name(&name)?;
    if vm.machine == Machine::Qemu {
        match qemu::restore::restore(settings, &archive, &entry, &name) {
            Ok(never) => match never {},
            Err(failure) => return Err(name_is_taken(failure, settings)),
        }
    }
    let only_for_qemu = settings.only_for_qemu();
    if !only_for_qemu.is_empty() {
        let text =
            format!("{} is not of a QEMU VM: leave out {}", entry.path().display(), only_for_qemu.join(", "));
        return Err(Failure::new(FailureKind::Usage, text));
    }
    let ram = settings.ram.unwrap_or(Size(vm.budget_bytes));
    check_ram(Size(vm.memory_bytes), ram)?;
    vmm::check_kvm()?;
    host::need_free_ram(ram.bytes(), "this VM")?;
    let opened = restore::open(&archive, &entry)?;
    let open_us = settings.began.elapsed().as_micros() as u64;

    let dir = RunDir::open(&settings.run_dir)?;
    sandbox::enter(&[dir.path(), &settings.store])?;
    let claimed = dir.claim_name(&name).map_err(|failure| name_is_taken(failure, settings))?;
    let spec = MemorySpec {
        engine: EngineKind::Vmemd,
        memory_bytes: vm.memory_bytes,
        budget_bytes: ram.bytes(),
        store: settings.store.clone(),
        store_overcommit: settings.store_overcommit,
        store_encrypt: settings.store_encrypt || entry.is_encrypted(),
        prealloc: settings.prealloc,
        lock: settings.lock,
    };
    let facts = Facts {
        name,
        memory_bytes: spec.memory_bytes,
        budget_bytes: spec.budget_bytes,
        engine: spec.engine,
        daemon: None,
        // All of it is in the guest's state.
        offer: None,
    };
    let process = Process::begin(facts, claimed, Owner::Ours)?;
    let memory = Memory::start_from(&spec, opened.origin, process.notices())?;
    let engine_us = settings.began.elapsed().as_micros() as u64;
    let newcomer = ReferenceNewcomer { base: memory.base() as usize, memory_bytes: spec.memory_bytes };
    let began = settings.began;
    let restoration = Restoration {
        from: entry.path().display().to_string(),
        image: opened.image,
        hold: opened.hold,
        state: Box::new(opened.state),
        was_paused: vm.paused,
        newcomer: Box::new(newcomer),
        options: settings.options,
        started: Box::new(move |restored| {
            let command_us = began.elapsed().as_micros() as u64;
            tell(&Started {
                restored: restored.clone(),
                pid: std::process::id(),
                command_us,
                open_us,
                engine_us,
            });
        }),
    };
    process.restore(memory, restoration).result
}

fn name_is_taken(failure: Failure, settings: &RestoreSettings) -> Failure {
    match (failure.kind, &settings.name) {
        (FailureKind::Name, None) => {
            let text = format!("{failure}; a second life is another VM: give it another name with --as");
            Failure::new(failure.kind, text)
        }
        _ => failure,
    }
}
