//! From the command line to the measurement.

use clap::Parser;
use vmemd::cli::terminal::{self, print_json};
use vmemd::cli::values::{self, check_sizes, default_store};
use vmprocess::failure::{Failure, FailureKind};

use super::args::{Cli, Command, MigrateArgs};
use super::traces;
use crate::experiment::Settings;
use crate::{compare, migrate, output, worker};

/// Runs the command and returns the process's exit code.
pub fn main() -> u8 {
    let cli = Cli::parse();
    terminal::start_logging("warn");
    terminal::exit_code(dispatch(cli))
}

fn dispatch(cli: Cli) -> Result<(), Failure> {
    match cli.command {
        Command::Migrate(args) => migrate::migrate(&migrate_settings(args)?),
        Command::Replay(args) => traces::replay(&args),
        Command::Run(args) => compare::run(&args.settings()),
        Command::Report(args) => output::report(&args.settings()),
        Command::Worker { request } => worker(&request),
        Command::Record(args) => traces::record(&values::run_dir(cli.run_dir), &args),
    }
}

fn migrate_settings(args: MigrateArgs) -> Result<Settings, Failure> {
    check_sizes(args.memory, args.ram)?;
    Ok(Settings {
        memory: args.memory,
        ram: args.ram,
        targets: args.targets,
        repeat: args.repeat,
        guest: args.guest,
        tls: args.tls,
        store: args.store.unwrap_or_else(default_store),
        json: args.json.json,
    })
}

fn worker(request: &str) -> Result<(), Failure> {
    let request = serde_json::from_str(request).map_err(|error| {
        Failure::new(
            FailureKind::Usage,
            format!("`vmemd bench worker` is started by `vmemd bench run`: {error}"),
        )
    })?;
    print_json(&worker::main(&request)?)
}
