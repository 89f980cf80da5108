//! `vmemd stat`: what a VM's memory does, once or every second.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::time::{Duration, Instant};

use swapd::stats::Percentiles;
use vmprocess::control::client::VmClient;
use vmprocess::control::protocol::VmStat;
use vmprocess::control::rundir::RunDir;
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::size::Size;

use super::args::StatArgs;
use super::terminal::{print, print_json};

const WATCH_EVERY: Duration = Duration::from_secs(1);

pub(super) fn stat(dir: &RunDir, args: &StatArgs) -> Result<(), Failure> {
    if args.watch {
        return watch(dir, args);
    }
    let stat = VmClient::connect(dir, &args.name)?.stat()?;
    if args.json.json {
        return print_json(&stat);
    }
    print(table(&stat, None).trim_end());
    Ok(())
}

/// Shows it every second, with what happened in between, until the VM ends.
fn watch(dir: &RunDir, args: &StatArgs) -> Result<(), Failure> {
    let redraw = std::io::stdout().is_terminal() && !args.json.json;
    let mut vm = VmClient::connect(dir, &args.name)?;
    let mut before: Option<(Instant, VmStat)> = None;
    let mut lines = 0;
    loop {
        let now = Instant::now();
        let stat = match vm.stat() {
            Ok(stat) => stat,
            // It moved away or was stopped: another may hold the name, as the arrived VM does on one host.
            Err(_) if before.is_some() => match VmClient::connect(dir, &args.name) {
                Ok(other) => {
                    (vm, before) = (other, None);
                    continue;
                }
                Err(failure) if failure.kind == FailureKind::Name => return Ok(()),
                Err(failure) => return Err(failure),
            },
            Err(failure) => return Err(failure),
        };
        let text = if args.json.json {
            serde_json::to_string(&stat).map_err(|error| Failure::other(&error))? + "\n"
        } else {
            let since =
                before.as_ref().map(|(then, stat)| Since { stat, seconds: (now - *then).as_secs_f64() });
            table(&stat, since) + if redraw { "" } else { "\n" }
        };
        let mut out = std::io::stdout().lock();
        // Up by as many lines as were drawn, and clear from there.
        let up = if redraw && lines > 0 { format!("\x1b[{lines}A\x1b[J") } else { String::new() };
        lines = text.lines().count();
        if out
            .write_all(up.as_bytes())
            .and_then(|()| out.write_all(text.as_bytes()))
            .and_then(|()| out.flush())
            .is_err()
        {
            return Ok(());
        }
        drop(out);
        before = Some((now, stat));
        std::thread::sleep(WATCH_EVERY.saturating_sub(now.elapsed()));
    }
}

/// The figures of `stat` of some seconds ago.
struct Since<'a> {
    stat: &'a VmStat,
    seconds: f64,
}

fn table(stat: &VmStat, since: Option<Since<'_>>) -> String {
    let rate = |value: fn(&VmStat) -> u64| match &since {
        Some(since) if since.seconds > 0.0 => {
            let per_second = value(stat).saturating_sub(value(since.stat)) as f64 / since.seconds;
            format!("{} ({per_second:.0}/s)", value(stat))
        }
        _ => value(stat).to_string(),
    };
    let size = |bytes: u64| format!("{:#}", Size(bytes));
    let memory = &stat.memory;
    // Rates take room.
    let width = if since.is_some() { 36 } else { 26 };
    let mut text = String::new();
    let mut row = |label: &str, cells: &[String]| {
        let cells: Vec<String> = cells.iter().map(|cell| format!("{cell:<width$}")).collect();
        let _ = writeln!(text, "{:<16} {}", label, cells.join(" ").trim_end());
    };
    row(
        &stat.name,
        &[
            match &stat.reason {
                Some(reason) => format!("{}: {reason}", stat.state.name()),
                None => stat.state.name().to_owned(),
            },
            format!("up {} s", stat.uptime_ms / 1000),
            format!("{} vCPU, {}", stat.vcpus, stat.workload),
        ],
    );
    row(
        "memory",
        &[
            size(memory.memory_bytes),
            format!("budget    {}", size(memory.ram_budget_bytes)),
            format!("untouched {}", size(memory.untouched_bytes)),
        ],
    );
    row(
        "resident",
        &[
            size(memory.resident_bytes),
            format!("stored    {}", size(memory.stored_bytes)),
            format!("frames    {}", size(memory.frames_bytes)),
        ],
    );
    row(
        "faults",
        &[
            rate(|stat| stat.memory.faults.total),
            format!("zero      {}", rate(|stat| stat.memory.faults.zero)),
            format!("rescue    {}", rate(|stat| stat.memory.faults.rescue)),
            format!("store {}", rate(|stat| stat.memory.faults.store)),
        ],
    );
    row(
        "prefetch",
        &[
            rate(|stat| stat.memory.prefetch.pages),
            format!("used      {}", rate(|stat| stat.memory.prefetch.used)),
            format!("wasted    {}", rate(|stat| stat.memory.prefetch.wasted)),
        ],
    );
    row(
        "evicted",
        &[
            format!("{} written", rate(|stat| stat.memory.evict.written)),
            format!("dropped   {}", rate(|stat| stat.memory.evict.dropped)),
        ],
    );
    let latency =
        |name: &str, p: Percentiles| format!("{name:<6} {:.0} / {:.0} / {:.0}", p.p50, p.p99, p.p999);
    row(
        "µs p50/p99/p999",
        &[
            latency("zero", memory.latency_us.zero),
            latency("rescue", memory.latency_us.rescue),
            latency("store", memory.latency_us.store),
        ],
    );
    row(
        "guest",
        &[
            format!("{} rounds", stat.guest.rounds),
            format!("verified  {}", rate(|stat| stat.guest.verified_pages)),
            format!("mismatched {}", stat.guest.mismatched_pages),
        ],
    );
    if memory.pinned_bytes > 0 {
        let waits = (memory.starved_ms > 0).then(|| format!("for RAM: {} s", memory.starved_ms / 1000));
        let cells = [Some(size(memory.pinned_bytes)), waits.map(|waits| format!("waits     {waits}"))];
        row("pinned", &cells.into_iter().flatten().collect::<Vec<_>>());
    }
    if memory.poisoned_pages > 0 {
        row("lost", &[lost(memory)]);
    }
    if let Some(waiting) = &stat.waiting {
        let seconds = |ms: u64| format!("{:.1} s", ms as f64 / 1000.0);
        let (elapsed, limit) = (seconds(waiting.elapsed_ms), seconds(waiting.limit_ms));
        row("waiting", &[format!("{elapsed} for {}, at most {limit} ({})", waiting.what, waiting.limit)]);
    }
    if let Some(restore) = &stat.restore {
        let there = format!("{} still there", size(memory.origin_bytes));
        let rate = restore.rate_bytes.map(|rate| format!(" at most {}/s", size(rate))).unwrap_or_default();
        let waits = restore.waits.as_ref().map(|why| format!(", waits: {why}")).unwrap_or_default();
        let now = format!("{}{rate}{waits}", restore.phase.words());
        row("restored", &[format!("from {}", restore.from), there, now]);
    }
    if let Some(migration) = &stat.migration {
        row(
            "migrating",
            &[
                format!("to {}", migration.to),
                format!("{} of {}", size(migration.bytes_done), size(migration.bytes_total)),
                format!("{}/s, round {}", size(migration.bytes_per_second), migration.round),
            ],
        );
    }
    if let Some(saving) = &stat.checkpoint {
        row(
            "checkpoint",
            &[
                format!("{} of {}", size(saving.bytes_done), size(saving.bytes_total)),
                format!("{}/s, round {}", size(saving.bytes_per_second), saving.round),
            ],
        );
    }
    if let Some(last) = &stat.last_checkpoint {
        row("last saved", &[last.name.clone(), format!("{} s ago", last.age_ms / 1000), size(last.bytes)]);
    }
    text
}

/// How many pages are lost, and which.
fn lost(memory: &swapd::Stats) -> String {
    const SHOWN: usize = 8;
    let shown = memory.lost.iter().take(SHOWN);
    let mut runs: Vec<String> = shown
        .map(|run| match run.pages {
            1 => run.first.to_string(),
            pages => format!("{}-{}", run.first, run.first + pages - 1),
        })
        .collect();
    if memory.lost.len() > SHOWN {
        runs.push("…".to_owned());
    }
    format!("{} pages: {}", memory.poisoned_pages, runs.join(", "))
}
