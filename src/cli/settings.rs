//! From raw arguments to resolved settings: defaults, sizes, and the store's directory, which is made.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Instant;

use vmprocess::control::protocol::EngineKind;
use vmprocess::control::rundir::check_name;
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::medium::need_disk;
use vmprocess::size::Size;
use vmprocess::{MemorySpec, RestoreOptions};

use super::args::{LimitArgs, RestoreArgs, RunArgs, ServeArgs};
use super::values::{check_sizes, default_store};
use crate::daemon::door::DoorSettings;
use crate::daemon::serve::ServeSettings;
use crate::qemu::disk_versions::DisksWanted;
use crate::qemu::rules::Rules;
use crate::qemu::run::QemuSettings;
use crate::restore_settings::RestoreSettings;
use crate::run::RunSettings;

pub(super) fn run_settings(args: RunArgs, run_dir: PathBuf) -> Result<RunSettings, Failure> {
    check_name(&args.name)?;
    let limits = args.limits;
    // Clap has seen to it.
    let memory = args.memory.ok_or_else(|| Failure::new(FailureKind::Usage, "--memory is missing"))?;
    let ram = limits.ram.unwrap_or(memory);
    check_sizes(memory, ram)?;
    let store = limits.store.unwrap_or_else(default_store);
    let engine = EngineKind::from(args.engine);
    if engine == EngineKind::Vmemd {
        make_store(&store, limits.store_in_ram)?;
    }
    Ok(RunSettings {
        run_dir,
        name: args.name,
        memory: MemorySpec {
            engine,
            memory_bytes: memory.bytes(),
            budget_bytes: ram.bytes(),
            store,
            store_overcommit: limits.store_overcommit,
            store_encrypt: limits.encrypt_store,
            prealloc: limits.prealloc,
            lock: !limits.no_lock,
        },
        vcpus: args.vcpus,
        workload: args.guest,
    })
}

pub(super) fn qemu_settings(
    name: String,
    limits: LimitArgs,
    words: Vec<OsString>,
    run_dir: PathBuf,
) -> Result<QemuSettings, Failure> {
    check_name(&name)?;
    let store = limits.store.unwrap_or_else(default_store);
    make_store(&store, limits.store_in_ram)?;
    let absolute = |path: PathBuf| {
        std::path::absolute(&path)
            .map_err(|error| Failure::io(format!("cannot use {}", path.display()), &error))
    };
    Ok(QemuSettings {
        run_dir: absolute(run_dir)?,
        name,
        ram: limits.ram,
        store: absolute(store)?,
        store_overcommit: limits.store_overcommit,
        store_encrypt: limits.encrypt_store,
        prealloc: limits.prealloc,
        lock: !limits.no_lock,
        words,
    })
}

pub(super) fn restore_settings(args: RestoreArgs, run_dir: PathBuf) -> Result<RestoreSettings, Failure> {
    let began = Instant::now();
    if let Some(rate) = args.rate.filter(|rate| rate.bytes() == 0) {
        let text = format!("--rate {rate}: nothing would ever move; give --keep-origin if that is meant");
        return Err(Failure::new(FailureKind::Usage, text));
    }
    if let Some(name) = &args.name {
        check_name(name)?;
    }
    let limits = args.limits;
    let store = limits.store.unwrap_or_else(default_store);
    make_store(&store, limits.store_in_ram)?;
    Ok(RestoreSettings {
        run_dir,
        archive: args.dir,
        checkpoint: args.checkpoint,
        key: args.key.read()?,
        name: args.name,
        ram: limits.ram,
        store,
        store_overcommit: limits.store_overcommit,
        store_encrypt: limits.encrypt_store,
        prealloc: limits.prealloc,
        lock: !limits.no_lock,
        options: RestoreOptions {
            paused: args.paused,
            eager: args.eager,
            rate: args.rate.map(Size::bytes),
            keep_origin: args.keep_origin,
            prealloc: limits.prealloc,
        },
        json: args.json.json,
        qemu: args.qemu,
        rules: args.disks.qemu_rules.as_deref().map(Rules::read).transpose()?,
        disks: match args.disks.disk_copies {
            Some(dir) => DisksWanted::Copies(absolute(&dir)?),
            None if args.disks.disks_back => DisksWanted::Back,
            None if args.disks.disks_as_they_are => DisksWanted::AsTheyAre,
            None => DisksWanted::Unsaid,
        },
        same_addresses: args.disks.same_addresses,
        began,
    })
}

/// A directory that is there, by a name that is good from anywhere.
fn absolute(dir: &Path) -> Result<PathBuf, Failure> {
    dir.canonicalize().map_err(|error| Failure::io(format_args!("looking at {}", dir.display()), &error))
}

/// A store directory that is missing is made; a device or file must be there. It is to be on a disk.
fn make_store(store: &Path, in_ram: bool) -> Result<(), Failure> {
    if !store.exists() {
        std::fs::create_dir_all(store).map_err(|error| {
            Failure::io(
                format!("cannot make the store directory {} (choose another with --store)", store.display()),
                &error,
            )
        })?;
    }
    need_disk(store, in_ram)
}

pub(super) fn serve_settings(args: ServeArgs, run_dir: PathBuf) -> Result<ServeSettings, Failure> {
    let minimum = Size(swapd::Engine::MIN_BUDGET_BYTES);
    if args.ram < minimum {
        return Err(Failure::new(
            FailureKind::Usage,
            format!("--ram {} is below the minimum of {minimum}", args.ram),
        ));
    }
    let engine = EngineKind::from(args.engine);
    if engine == EngineKind::Vmemd {
        make_store(&args.store, args.store_in_ram)?;
    }
    Ok(ServeSettings {
        run_dir,
        listen: args.listen,
        door: DoorSettings { tls: args.tls, peers: args.allow_peer },
        plain: args.plain,
        ram_bytes: args.ram.bytes(),
        store: args.store,
        engine,
        lock: !args.no_lock,
        encrypt_store: args.encrypt_store,
        log_dir: args.log_dir,
        qemu_rules: args.qemu_rules.as_deref().map(Rules::read).transpose()?,
        json: args.json.json,
    })
}
