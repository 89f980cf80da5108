//! Output of vmemd's programs: results on stdout, everything else on stderr. A reader that has gone away is no error.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
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

/// A progress bar, on stderr if that is a terminal: what, how much of how much, for how long, and a message.
pub(super) fn bar(what: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr_with_hz(10));
    let style = ProgressStyle::with_template(
        "{prefix} {bar:30} {percent:>3} %  {binary_bytes} of {binary_total_bytes}  {elapsed}  {msg}",
    );
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_prefix(what.to_owned());
    bar
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
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        .with_target(false)
        // It would be told on stderr, which panics if it is stderr that cannot be written.
        .log_internal_errors(false)
        .init();
}
