//! `vmemd bench record` and `vmemd bench replay`: arguments, settings, output.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use swapd::replay::Pace;
use vmemd::cli::terminal::{print, print_json, warn};
use vmemd::cli::values::{JsonArg, check_sizes};
use vmprocess::control::client::VmClient;
use vmprocess::control::rundir::RunDir;
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::host;
use vmprocess::size::Size;

use crate::trace::record::{self, Recorded};
use crate::trace::replay::{self, Policy, Row};
use crate::trace::synthetic::{Synthetic, SyntheticSettings};
use crate::trace::touches::Touches;

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("touched").required(true).args(["trace", "synthetic"])))]
pub(super) struct ReplayArgs {
    /// A trace file of `vmemd bench record`
    #[arg(conflicts_with_all = ["memory", "touches", "threads", "reads"])]
    trace: Option<PathBuf>,
    /// Instead of a trace: random, zipf[:THETA], seq, loop[:TIMES-THE-RAM] or stride:PAGES, after every page was
    /// written once
    #[arg(long, value_name = "WHAT")]
    synthetic: Option<Synthetic>,
    /// Memory of the VM [default: 4G]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,
    /// RAM that it may use [default: what the VM had when the trace was recorded; half of --memory]
    #[arg(long, value_name = "SIZE")]
    ram: Option<Size>,
    /// How many, after a tenth as many that do not count; as in 500K or 20M [default: 20M]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    touches: Option<u64>,
    /// Threads that take turns [default: 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: Option<u32>,
    /// Share of reads among them, in percent [default: 50]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    reads: Option<u8>,
    /// Who chooses what stays in RAM
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "vmemd,lru,fifo,clock,lfu,s3-fifo,optimum"
    )]
    policy: Vec<Policy>,
    /// Time that a read or write takes, in touches
    #[arg(long, value_name = "TOUCHES", default_value_t = 0)]
    io_time: u64,
    /// Touches between two ticks of the engine (100 ms)
    #[arg(long, value_name = "TOUCHES", default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..))]
    tick: u64,
    #[command(flatten)]
    json: JsonArg,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("source").required(true).args(["jobs", "vm"])))]
pub(super) struct RecordArgs {
    /// A job file: what its jobs touch
    #[arg(value_name = "FILE.fio")]
    jobs: Option<PathBuf>,
    /// A running VM: the faults that its engine serves
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// How long a VM is recorded
    #[arg(long, value_name = "N", default_value_t = 10, conflicts_with = "jobs")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// How many touches of a job file, after a tenth as many that do not count; as in 500K or 20M
    #[arg(long, value_name = "N", default_value = "20M", conflicts_with = "vm", value_parser = parse_count)]
    touches: u64,
    /// The trace file
    #[arg(short, long, value_name = "TRACE")]
    output: PathBuf,
    #[command(flatten)]
    json: JsonArg,
}

#[derive(Debug, Serialize)]
struct Report {
    what: String,
    memory_bytes: u64,
    ram_bytes: u64,
    policies: Vec<Row>,
}

/// What is played, with its name and the RAM to play it with.
fn touches(args: &ReplayArgs) -> Result<(String, Touches, Size), Failure> {
    let page_bytes = swapd::PAGE_SIZE as u64;
    let Some(what) = args.synthetic else {
        let path = args.trace.as_deref().expect("clap wants one of the two");
        let (header, mut touches) = Touches::load(path)?;
        if header.dropped > 0 {
            let name = path.display();
            warn(&format!("{name}: {} faults are missing, for they came too fast", header.dropped));
        }
        touches.pages = touches.pages.next_multiple_of(u64::from(swapd::BLOCK_PAGES));
        let recorded = Some(Size(header.ram_pages * page_bytes)).filter(|ram| ram.bytes() > 0);
        let ram = args.ram.or(recorded).ok_or_else(|| {
            Failure::new(FailureKind::Usage, "the trace does not say how much RAM there was: give --ram")
        })?;
        return Ok((path.display().to_string(), touches, ram));
    };
    let memory = args.memory.unwrap_or(Size(4 << 30));
    let ram = args.ram.unwrap_or(Size(memory.bytes() / 2));
    check_sizes(memory, ram)?;
    let settings = SyntheticSettings {
        what,
        memory,
        ram,
        touches: args.touches.unwrap_or(20_000_000),
        threads: args.threads.unwrap_or(4),
        read_percent: args.reads.unwrap_or(50),
    };
    Ok((what.to_string(), settings.make()?, ram))
}

pub(super) fn replay(args: &ReplayArgs) -> Result<(), Failure> {
    let (what, touches, ram) = touches(args)?;
    let memory = Size(touches.pages * swapd::PAGE_SIZE as u64);
    check_sizes(memory, ram)?;
    host::need_free_ram(replay::needs_bytes(&touches), "this replay")?;
    let pace = Pace { io: args.io_time, tick: args.tick };
    let frames = ram.bytes() / swapd::PAGE_SIZE as u64;
    let policies = args.policy.iter().map(|policy| replay::replay(&touches, frames, *policy, pace)).collect();
    let report = Report { what, memory_bytes: memory.bytes(), ram_bytes: ram.bytes(), policies };
    if args.json.json {
        return print_json(&report);
    }
    print(&format!(
        "{}, {memory} in {ram}: {} touches after {} that do not count; counts a touch\n{}",
        report.what,
        touches.counted(),
        touches.count_from,
        replay::table(&report.policies)
    ));
    Ok(())
}

pub(super) fn record(run_dir: &Path, args: &RecordArgs) -> Result<(), Failure> {
    let recorded = match (&args.jobs, &args.vm) {
        (Some(jobs), _) => record::of_jobs(jobs, args.touches, &args.output)?,
        (None, Some(name)) => {
            let mut vm = VmClient::connect(&RunDir::open(run_dir)?, name)?;
            let bar = bar(args.seconds);
            let started = Instant::now();
            let recorded = record::of_vm(&mut vm, args.seconds, &args.output, &|faults| {
                bar.set_position(started.elapsed().as_secs().min(args.seconds));
                bar.set_message(format!("{faults} faults"));
            });
            bar.finish_and_clear();
            recorded?
        }
        (None, None) => unreachable!("clap wants one of the two"),
    };
    if args.json.json {
        return print_json(&recorded);
    }
    let Recorded { entries, dropped, file_bytes } = recorded;
    let what = if args.vm.is_some() { "faults" } else { "touches" };
    print(&format!("{}: {entries} {what}, {:#}", args.output.display(), Size(file_bytes)));
    if dropped > 0 {
        warn(&format!("{dropped} more faults came too fast to be recorded"));
    }
    Ok(())
}

fn bar(seconds: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("recording {bar:30} {pos}/{len} s, {msg}");
    let target = ProgressDrawTarget::stderr_with_hz(4);
    ProgressBar::with_draw_target(Some(seconds), target).with_style(style.expect("the template is constant"))
}

/// A count as people write it: 5000, 500K, 20M.
fn parse_count(text: &str) -> Result<u64, String> {
    let (number, scale) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 1000),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 1_000_000),
        _ => (text, 1),
    };
    let count = number.parse::<u64>().ok().and_then(|number| number.checked_mul(scale));
    count.filter(|count| *count > 0).ok_or_else(|| "write a number, such as 500K or 20M".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_as_people_write_them() {
        assert_eq!(parse_count("5000"), Ok(5000));
        assert_eq!(parse_count("500K"), Ok(500_000));
        assert_eq!(parse_count("20m"), Ok(20_000_000));
        for text in ["", "0", "M", "-1", "1.5M", "20G", "99999999999999999M", "ж"] {
            assert!(parse_count(text).is_err(), "{text}");
        }
    }
}
