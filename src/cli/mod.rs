//! The `vmemd` command: raw arguments, resolved settings, the right mechanism, output, exit code.

mod args;
mod bench;
mod migrate;
mod resolve;
mod stat;
pub mod terminal;
pub mod values;
mod vms;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;
use vmprocess::MemorySpec;
use vmprocess::control::protocol::EngineKind;
use vmprocess::control::rundir::{RunDir, check_name};
use vmprocess::failure::{Failure, Kind};
use vmprocess::medium::need_disk;
use vmprocess::size::Size;

use crate::daemon::door::DoorSettings;
use crate::daemon::serve::ServeSettings;
use crate::qemu::rules::Rules;
use crate::qemu::run::QemuSettings;
use crate::run::{self, RunSettings};
use crate::{daemon, doctor, pki, qemu};
use args::{Cli, Command, LimitArgs, PkiCommand, RunArgs, ServeArgs};
use terminal::print;
use values::{check_sizes, default_store};

/// Runs the command and returns the process's exit code.
pub fn main() -> u8 {
    let cli = Cli::parse();
    let long_running = matches!(cli.command, Command::Run(_) | Command::Serve(_) | Command::Receive { .. });
    terminal::start_logging(if long_running { "info" } else { "warn" });
    terminal::exit_code(dispatch(cli))
}

fn dispatch(cli: Cli) -> Result<(), Failure> {
    let run_dir = values::run_dir(cli.run_dir.clone());
    match cli.command {
        Command::Run(mut args) if !args.qemu.is_empty() => {
            let words = std::mem::take(&mut args.qemu);
            match qemu::run::run(&qemu_settings(args.name, args.limits, words, run_dir)?)? {}
        }
        Command::Run(args) => run::run(&run_settings(args, run_dir)?),
        Command::QemuArgs(args) => {
            let settings = qemu_settings(args.name, args.limits, args.qemu, run_dir)?;
            let text = qemu::run::arguments(&settings, args.format.into())?;
            print(text.trim_end());
            Ok(())
        }
        Command::Serve(args) => daemon::serve::serve(serve_settings(args, run_dir)?),
        Command::Receive { settings } => {
            let settings = serde_json::from_str(&settings).map_err(|error| {
                Failure::new(Kind::Usage, format!("`vmemd receive` is started by `vmemd serve`: {error}"))
            })?;
            run::receive(&settings)
        }
        Command::Migrate(args) => migrate::migrate(&RunDir::open(&run_dir)?, args),
        Command::Pki(PkiCommand::Init(args)) => pki::init(&args.into()),
        Command::Pki(PkiCommand::Issue(args)) => pki::issue(&args.into()),
        Command::List(json) => vms::list(&RunDir::open(&run_dir)?, json.json),
        Command::Stat(args) => stat::stat(&RunDir::open(&run_dir)?, &args),
        Command::Set(args) => vms::set(&RunDir::open(&run_dir)?, &args),
        Command::Pause(args) => vms::pause(&RunDir::open(&run_dir)?, &args),
        Command::Resume(args) => vms::resume(&RunDir::open(&run_dir)?, &args),
        Command::Resolve(args) => resolve::resolve(&RunDir::open(&run_dir)?, &args),
        Command::Stop(args) => vms::stop(&RunDir::open(&run_dir)?, &args),
        Command::Doctor(args) => doctor::doctor(&args.store.unwrap_or_else(default_store), args.json.json),
        Command::Bench { args } => match bench::bench(cli.run_dir, args)? {},
    }
}

fn run_settings(args: RunArgs, run_dir: PathBuf) -> Result<RunSettings, Failure> {
    check_name(&args.name)?;
    let limits = args.limits;
    // Clap has seen to it.
    let memory = args.memory.ok_or_else(|| Failure::new(Kind::Usage, "--memory is missing"))?;
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

fn qemu_settings(
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

/// A store directory that is missing is made; a device or file must be there. It is to be on a disk.
fn make_store(store: &std::path::Path, in_ram: bool) -> Result<(), Failure> {
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

fn serve_settings(args: ServeArgs, run_dir: PathBuf) -> Result<ServeSettings, Failure> {
    let minimum = Size(swapd::Engine::MIN_BUDGET_BYTES);
    if args.ram < minimum {
        return Err(Failure::new(
            Kind::Usage,
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
