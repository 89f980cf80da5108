//! The `vmemd` command: from the command line to the right mechanism, and the exit code.

use clap::Parser;
use vmprocess::control::rundir::RunDir;
use vmprocess::failure::{Failure, FailureKind};

use super::args::{CheckpointArgs, Cli, Command, PkiCommand};
use super::settings::{qemu_settings, restore_settings, run_settings, serve_settings};
use super::values::{self, default_store};
use super::{bench, checkpoint, checkpoints, migrate, resolve, stat, terminal, vms};
use crate::{daemon, doctor, pki, qemu, restore, run};

/// Runs the command and returns the process's exit code.
pub fn main() -> u8 {
    let cli = Cli::parse();
    let long_running = matches!(
        cli.command,
        Command::Run(_) | Command::Restore(_) | Command::Serve(_) | Command::Receive { .. }
    );
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
        Command::Restore(args) => {
            let json = args.json.json;
            restore::restore(&restore_settings(args, run_dir)?, move |started| {
                // One line: programs wait for it.
                if let (true, Ok(text)) = (json, serde_json::to_string(started)) {
                    terminal::print(&text);
                }
            })
        }
        Command::QemuArgs(args) => {
            let settings = qemu_settings(args.name, args.limits, args.qemu, run_dir)?;
            let text = qemu::run::arguments(&settings, args.format.into())?;
            terminal::print(text.trim_end());
            Ok(())
        }
        Command::Serve(args) => daemon::serve::serve(serve_settings(args, run_dir)?),
        Command::Receive { settings } => {
            let settings = serde_json::from_str(&settings).map_err(|error| {
                Failure::new(
                    FailureKind::Usage,
                    format!("`vmemd receive` is started by `vmemd serve`: {error}"),
                )
            })?;
            run::receive(&settings)
        }
        Command::Migrate(args) => migrate::migrate(&RunDir::open(&run_dir)?, args),
        Command::Checkpoint(CheckpointArgs { command: Some(command), .. }) => {
            checkpoints::run(command, &run_dir)
        }
        Command::Checkpoint(CheckpointArgs { make: Some(args), .. }) => {
            checkpoint::checkpoint(&RunDir::open(&run_dir)?, &args)
        }
        Command::Checkpoint(CheckpointArgs { make: None, command: None }) => {
            Err(Failure::new(FailureKind::Usage, "name a VM, or say what is to be done with an archive"))
        }
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
