//! `vmemd bench replay`: one list of touches, on the engine's policies, on others, and on the optimum.

use serde::Serialize;
use swapd::PageNo;
use swapd::core::{BUDGET_MIN, CoreConfig, WalkStep, staging_blocks, staging_slots};
use swapd::replay::{Counts, Pace, Replay};

use super::reference::{Clock, Fifo, Lfu, Lru, S3Fifo, TouchOutcome};
use super::touches::Touches;
use crate::optimum::{WRITE, optimum};

/// The policy that decides which pages are in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Policy {
    /// The engine: its real core, with prefetch, and with the frames that it keeps free
    Vmemd,
    /// Least recently used
    Lru,
    /// First in, first out
    Fifo,
    /// FIFO with a second chance
    Clock,
    /// Least frequently used, counted from the start
    Lfu,
    /// S3-FIFO: a queue on probation, a main one, ghosts
    S3Fifo,
    /// Belady's MIN, which knows the future
    Optimum,
}

/// How a policy did on the touches that count. All figures are numbers of pages or events, but for `hit_rate`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Row {
    policy: Policy,
    touches: u64,
    /// One less the pages read a touch, so that prefetch in vain counts against a policy.
    hit_rate: f64,
    pages_read: u64,
    /// Pages of `pages_read` that were read ahead of need.
    pages_prefetched: u64,
    pages_written: u64,
    /// Touches that had to wait for the device.
    waits: u64,
    /// Touches that found the page's frame on its way out, or waiting to prove itself.
    rescues: u64,
}

impl Row {
    fn of(policy: Policy, counts: &Counts) -> Row {
        Row {
            policy,
            touches: counts.touches,
            hit_rate: 1.0 - counts.pages_read() as f64 / counts.touches.max(1) as f64,
            pages_read: counts.pages_read(),
            pages_prefetched: counts.read_prefetch,
            pages_written: counts.written,
            waits: counts.faults_store,
            rescues: counts.faults_rescue,
        }
    }

    /// The figures of a policy without prefetch.
    fn by_demand(policy: Policy, touches: u64, read: u64, written: u64) -> Row {
        let counts = Counts { touches, faults_store: read, read_demand: read, written, ..Counts::default() };
        Row::of(policy, &counts)
    }
}

/// Bytes that replays need at most, beside the list itself.
pub(crate) fn needs_bytes(touches: &Touches) -> u64 {
    /// The optimum keeps the time of the next use, and a bit.
    const PER_TOUCH: u64 = 5;
    /// The engine's table, sums and versions, and room for its maps.
    const PER_PAGE: u64 = 20;
    touches.list.len() as u64 * PER_TOUCH + touches.pages * PER_PAGE
}

/// Plays the touches with so many frames.
pub(crate) fn replay(touches: &Touches, frames: u64, policy: Policy, pace: Pace) -> Row {
    let pages = touches.pages as usize;
    match policy {
        Policy::Vmemd => engine(touches, frames, pace),
        Policy::Lru => by_demand(touches, policy, Lru::new(pages, frames as usize)),
        Policy::Fifo => by_demand(touches, policy, Fifo::new(pages, frames as usize)),
        Policy::Clock => by_demand(touches, policy, Clock::new(pages, frames as usize)),
        Policy::Lfu => by_demand(touches, policy, Lfu::new(pages, frames as usize)),
        Policy::S3Fifo => by_demand(touches, policy, S3Fifo::new(pages, frames as usize)),
        Policy::Optimum => {
            let (fill, list) = touches.list.split_at(touches.filling());
            let fill: Vec<_> = fill.iter().map(|touch| touch & !WRITE).collect();
            let count_from = touches.count_from - fill.len();
            let done = optimum(list, &fill, frames as usize, count_from, |_| {});
            Row::by_demand(policy, done.touched, done.misses, done.evicted_dirty)
        }
    }
}

fn engine(touches: &Touches, frames: u64, pace: Pace) -> Row {
    let mut replay = Replay::new(
        CoreConfig {
            pages: touches.pages,
            budget_frames: frames,
            budget_min: BUDGET_MIN,
            slots: staging_slots(touches.pages),
            blocks: staging_blocks(touches.pages, false),
            sampling: true,
            walk: WalkStep::default(),
        },
        pace,
    );
    let mut before = None;
    for (page, write, counts) in touches.all() {
        if counts && before.is_none() {
            before = Some(replay.counts());
        }
        replay.touch(PageNo(u64::from(page)), write);
    }
    let after = replay.counts();
    Row::of(Policy::Vmemd, &after.since(&before.unwrap_or(after)))
}

/// Pages that were never written have no content: they are neither read nor written.
fn by_demand(touches: &Touches, policy: Policy, mut choice: impl super::reference::Policy) -> Row {
    let mut dirty = vec![false; touches.pages as usize];
    let mut has_content = dirty.clone();
    let (mut touched, mut read, mut written) = (0, 0, 0);
    for (page, write, counts) in touches.all() {
        let counted = u64::from(counts);
        touched += counted;
        if let TouchOutcome::Miss(victim) = choice.touch(page) {
            read += counted * u64::from(has_content[page as usize]);
            let lost = victim.is_some_and(|victim| std::mem::take(&mut dirty[victim as usize]));
            written += counted * u64::from(lost);
        }
        dirty[page as usize] |= write;
        has_content[page as usize] |= write;
    }
    Row::by_demand(policy, touched, read, written)
}

/// The rows as people read them.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<8} {:>9} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "policy", "hit rate", "read", "prefetched", "written", "waits", "rescues"
    );
    for row in rows {
        let share = |count: u64| count as f64 / row.touches.max(1) as f64;
        let name = clap::ValueEnum::to_possible_value(&row.policy).expect("every policy has a name");
        text.push_str(&format!(
            "\n{:<8} {:>8.2}% {:>10.4} {:>10.4} {:>10.4} {:>10.4} {:>10.4}",
            name.get_name(),
            row.hit_rate * 100.0,
            share(row.pages_read),
            share(row.pages_prefetched),
            share(row.pages_written),
            share(row.waits),
            share(row.rescues),
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::synthetic::{Synthetic, SyntheticSettings};
    use vmprocess::size::Size;

    #[test]
    fn every_policy_on_a_small_zipf() {
        let settings = SyntheticSettings {
            what: Synthetic::Zipf(0.99),
            memory: Size(64 << 20),
            ram: Size(32 << 20),
            touches: 100_000,
            threads: 2,
            read_percent: 50,
        };
        let touches = settings.make().unwrap();
        let play = |policy| replay(&touches, (32 << 20) / 4096, policy, Pace { io: 0, tick: 20_000 });
        let optimum = play(Policy::Optimum);
        for policy in [Policy::Vmemd, Policy::Lru, Policy::Fifo, Policy::Clock, Policy::Lfu, Policy::S3Fifo] {
            let row = play(policy);
            assert_eq!(row.touches, 100_000);
            assert!(row.hit_rate > 0.5 && row.hit_rate <= optimum.hit_rate, "{row:?} against {optimum:?}");
        }
        assert_eq!(table(&[play(Policy::S3Fifo), optimum]).lines().count(), 3);
    }
}
