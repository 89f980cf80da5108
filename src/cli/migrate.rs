//! `vmemd migrate`: asks the VM's process to move, and shows how it goes.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use migrate::DowntimeParts;
use serde_json::Value;
use vmprocess::control::client::VmClient;
use vmprocess::control::protocol::{MigrateRequest, MigrationStat, Request};
use vmprocess::control::rundir::{RunDir, SocketName};
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::signals;
use vmprocess::size::Size;

use super::args::MigrateArgs;
use super::terminal::{bar, print, print_json};

/// Highest share of time for which a guest is held back so that the migration ends.
const THROTTLE_MAX: u8 = 99;
/// How long a VM that does not exist is waited for.
const START_GRACE: Duration = Duration::from_secs(1);
/// How long the process of a VM that has moved may take to end.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a cancelled migration may take to end.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(20);
const FIND_POLL: Duration = Duration::from_millis(50);

pub(super) fn migrate(dir: &RunDir, args: MigrateArgs) -> Result<(), Failure> {
    signals::install()?;
    let request = Request::Migrate(MigrateRequest {
        to: args.to.clone(),
        ram_bytes: args.ram.map(Size::bytes),
        downtime_target_ms: (args.downtime_target.as_millis() as u64).max(1),
        max_downtime_ms: args.max_downtime.map(|max| (max.as_millis() as u64).max(1)),
        streams: args.streams,
        max_rounds: args.max_rounds,
        max_throttle: if args.no_throttle { 0 } else { THROTTLE_MAX },
        check_placement: args.check_placement,
        trust: args.trust.read()?,
    });
    let mut vm = find(dir, &args.name)?;
    let bar = Bar::new(&args.name);
    let answer = vm.ask_long(&request, &mut |progress| bar.show(&progress));
    bar.end();
    match answer {
        Err(failure) if failure.kind == FailureKind::Interrupted && signals::caught().is_some() => {
            Err(cancelled(&args.name, vm))
        }
        Err(failure) => Err(failure),
        Ok(report) => {
            if args.json.json {
                print_json(&report)?;
            } else {
                print(&summary(&report));
            }
            // What it still holds, such as a monitor's socket, would be in the way of a VM that comes back.
            let _ = vm.wait_for_end(LEAVE_TIMEOUT);
            Ok(())
        }
    }
}

/// Finds the VM, which somebody may be starting at this moment (`vmemd run … &` on the line above), or which may be
/// arriving and change its place.
fn find(dir: &RunDir, name: &str) -> Result<VmClient, Failure> {
    let deadline = Instant::now() + START_GRACE;
    let connect = |socket: SocketName| VmClient::connect_to(dir, &socket);
    loop {
        match dir.find(name).and_then(connect) {
            Err(failure) if failure.kind == FailureKind::Name && Instant::now() < deadline => {
                signals::check()?;
                std::thread::sleep(FIND_POLL);
            }
            found => return found,
        }
    }
}

/// Cancels, waits until the VM's process has seen that, and says where the VM is.
fn cancelled(name: &str, mut vm: VmClient) -> Failure {
    let text = match vm.cancel(CANCEL_TIMEOUT) {
        Ok(_) => format!("too late to cancel: {name:?} has moved"),
        Err(failure) if failure.kind == FailureKind::InDoubt => {
            return Failure::new(FailureKind::InDoubt, format!("{failure}: see `vmemd resolve {name}`"));
        }
        // It says where the VM is.
        Err(failure) if failure.kind != FailureKind::Other => return failure,
        // Closing the connection cancels as well, but is not answered.
        Err(failure) => format!("asked to cancel, but {name:?} may still be migrating ({failure})"),
    };
    Failure::new(FailureKind::Interrupted, text)
}

/// The report of a migration for a person.
fn summary(report: &Value) -> String {
    let number = |field: &str| report[field].as_u64().unwrap_or(0);
    let float = |field: &str| report[field].as_f64().unwrap_or(0.0);
    let size = |bytes: u64| format!("{:#}", Size(bytes));
    let pages = |field: &str| size(swapd::units::bytes_of(number(field)));
    let mut text = format!(
        "{} moved to {}\n  sent       {} of {} memory, in {} rounds\n  duration   {:.2} s, downtime {:.1} ms\n  placed     {} RAM, {} store, {} zero\n  paging     {} page-ins, {} page-outs while it arrived",
        report["name"].as_str().unwrap_or("?"),
        report["to"].as_str().unwrap_or("?"),
        size(number("bytes_sent")),
        size(number("bytes_total")),
        number("rounds"),
        float("duration_ms") / 1000.0,
        float("downtime_ms"),
        pages("pages_ram"),
        pages("pages_store"),
        pages("pages_zero"),
        number("pageins_during"),
        number("pageouts_during"),
    );
    if let Ok(parts) = serde_json::from_value::<DowntimeParts>(report["downtime_parts"].clone()) {
        let parts = parts.named().map(|(part, took)| format!("{part} {took:.1}")).join(", ");
        text += &format!("\n  downtime   {parts} ms");
    }
    if let Some(why) = report["downtime_missed"].as_str() {
        text +=
            &format!("\n  missed     the downtime target of {:.0} ms: {why}", float("downtime_target_ms"));
    }
    if number("pages_lost") > 0 {
        text += &format!("\n  lost       {} pages: the store did not give them back", number("pages_lost"));
    }
    if number("throttle_max_percent") > 0 {
        text += &format!("\n  throttle   up to {} %", number("throttle_max_percent"));
    }
    let placement = &report["placement"];
    if let (Some(touched), Some(in_ram)) =
        (placement["touched_pages"].as_u64(), placement["touched_in_ram"].as_u64())
    {
        let share = if touched == 0 { 100.0 } else { in_ram as f64 * 100.0 / touched as f64 };
        text += &format!(
            "\n  placement  {share:.1} % of {touched} pages touched in the first second were in RAM"
        );
    }
    text
}

/// The progress bar, on stderr if that is a terminal.
struct Bar(ProgressBar);

impl Bar {
    fn new(name: &str) -> Bar {
        Bar(bar(name))
    }

    fn show(&self, progress: &MigrationStat) {
        self.0.set_length(progress.bytes_total.max(1));
        self.0.set_position(progress.bytes_done.min(progress.bytes_total));
        let mut message =
            format!("{:#}/s  {}", Size(progress.bytes_per_second), progress.phase.replace('_', " "));
        if progress.round > 1 {
            message += &format!(", round {}, {:#} left", progress.round, Size(progress.bytes_left));
        }
        if let Some(left) = progress.bytes_left.checked_div(progress.bytes_per_second) {
            message += &format!(", {left} s");
        }
        if progress.throttle_percent > 0 {
            message += &format!(", guest held back {} %", progress.throttle_percent);
        }
        self.0.set_message(message);
    }

    fn end(&self) {
        self.0.finish_and_clear();
    }
}
