//! Output of vmemd's programs: results on stdout, everything else on stderr. A reader that has gone away is no error.

use std::io::Write;

use serde::Serialize;
use tracing_subscriber::EnvFilter;
use vmprocess::failure::Failure;

/// Prints to stdout.
pub fn print(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Prints a value as JSON.
///
/// # Errors
/// If it cannot be written as JSON.
pub fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Failure::other(&error))?;
    print(&text);
    Ok(())
}

/// Tells how it goes, on stderr.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Says on stderr what is not as it should be, and who says so.
pub fn warn(text: &str) {
    say(&format!("vmemd: {text}"));
}

/// The exit code of a program that ends so; a failure is told on stderr.
pub fn exit_code(ended: Result<(), Failure>) -> u8 {
    match ended {
        Ok(()) => 0,
        Err(failure) => {
            warn(&failure.to_string());
            failure.kind.exit_code()
        }
    }
}

/// To stderr; `VMEMD_LOG` sets what (`debug`, `vmemd::daemon=trace`), instead of this default.
pub fn start_logging(default: &str) {
    let filter = EnvFilter::try_from_env("VMEMD_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        .with_target(false)
        // It would be told on stderr, which panics if it is stderr that cannot be written.
        .log_internal_errors(false)
        .init();
}
