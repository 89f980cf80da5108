//! `vmemd bench replay`: arguments, settings, output.

use clap::Args;
use serde::Serialize;
use swapd::replay::Pace;

use super::args::JsonArg;
use crate::bench::trace::replay::{self, Policy, Row};
use crate::bench::trace::synthetic::{Synthetic, SyntheticSettings};
use crate::failure::Failure;
use crate::size::Size;

#[derive(Debug, Args)]
pub(super) struct ReplayArgs {
    /// What to touch: random, zipf[:THETA], seq, loop[:TIMES-THE-RAM] or stride:PAGES, after every page was written once
    #[arg(long, value_name = "WHAT")]
    synthetic: Synthetic,
    /// Memory of the VM
    #[arg(long, value_name = "SIZE", default_value = "4G")]
    memory: Size,
    /// RAM that it may use
    #[arg(long, value_name = "SIZE")]
    ram: Size,
    /// How many, after a tenth as many that do not count; as in 500K or 20M
    #[arg(long, value_name = "N", default_value = "20M", value_parser = parse_count)]
    touches: u64,
    /// Threads that take turns
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: u32,
    /// Share of reads among them, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    reads: u8,
    #[command(flatten)]
    how: HowArgs,
}

/// What to play touches on.
#[derive(Debug, Args)]
struct HowArgs {
    /// Who chooses what stays in RAM
    #[arg(long, value_enum, value_delimiter = ',', default_value = "vmemd,lru,fifo,clock,s3-fifo,optimum")]
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

#[derive(Debug, Serialize)]
struct Report {
    what: String,
    memory_bytes: u64,
    ram_bytes: u64,
    policies: Vec<Row>,
}

pub(super) fn replay(args: &ReplayArgs) -> Result<(), Failure> {
    super::check_sizes(args.memory, args.ram)?;
    let touches = SyntheticSettings {
        what: args.synthetic,
        memory: args.memory,
        ram: args.ram,
        touches: args.touches,
        threads: args.threads,
        read_percent: args.reads,
    }
    .make()?;
    let pace = Pace { io: args.how.io_time, tick: args.how.tick };
    let frames = args.ram.bytes() / swapd::PAGE_SIZE as u64;
    let play = |policy: &Policy| replay::replay(&touches, frames, *policy, pace);
    let report = Report {
        what: args.synthetic.to_string(),
        memory_bytes: args.memory.bytes(),
        ram_bytes: args.ram.bytes(),
        policies: args.how.policy.iter().map(play).collect(),
    };
    if args.how.json.json {
        return super::print_json(&report);
    }
    super::print(&format!(
        "{}, {} in {}: {} touches after {} that do not count; counts a touch\n{}",
        report.what,
        args.memory,
        args.ram,
        touches.counted(),
        touches.count_from,
        replay::table(&report.policies)
    ));
    Ok(())
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
