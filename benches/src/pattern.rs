//! Which pages a thread of a job touches, in which order: a function of the job, its seed and the thread alone.
//!
//! A *unit* is what an order chooses: the pages of one block, or one page if blocks are smaller than that. An
//! *operation* covers one block: one touch in each of its pages, or one touch at the block's own offset in a page.
//! Sequential orders go through the thread's own contiguous share of the working set, with the stride counted in
//! units and all units touched once a pass; random ones choose among all units of the working set.

use swapd::{PAGE_SIZE, Run};
use vmemd::vmm::zipf;

use super::job::{Access, Job, Order};

/// Bytes that a touch reads or writes.
pub(crate) const LINE_BYTES: u64 = 64;
const LINES: u64 = PAGE_SIZE as u64 / LINE_BYTES;

/// One access to one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Touch {
    /// Number of the page in the VM's memory.
    pub(crate) page: u64,
    /// Index of the line within the page.
    pub(crate) line: u16,
    pub(crate) write: bool,
    /// This touch is the last one of its operation.
    pub(crate) ends: bool,
}

/// The endless sequence of touches of one thread of a job.
#[derive(Clone, Debug)]
pub(crate) struct Pattern {
    /// First page and pages of the working set.
    first: u64,
    pages: u64,
    unit_pages: u64,
    /// Operations in a unit: more than one if a page holds several blocks.
    blocks: u64,
    read_percent: u64,
    chooser: Chooser,
    random: Random,
    /// What is left of the current operation.
    rest: Rest,
    pass_operations: u64,
}

/// Pages of the operation under way that are still to be touched.
#[derive(Clone, Copy, Debug, Default)]
struct Rest {
    page: u64,
    end: u64,
    line: u64,
    write: bool,
}

#[derive(Clone, Debug)]
enum Chooser {
    Sequential(Walk),
    Uniform { units: u64 },
    Zipf { quantiles: Vec<u32>, scatter: Scatter },
}

impl Pattern {
    /// The touches of the job's thread `thread`, which may be any below [`Job::threads`]; `area` is the job's, in
    /// pages of the VM.
    pub(crate) fn new(job: &Job, area: Run, thread: u32) -> Pattern {
        let page_bytes = PAGE_SIZE as u64;
        let pages = (job.working_set_bytes / page_bytes).clamp(1, u64::from(area.len));
        let unit_pages = (job.block_bytes / page_bytes).clamp(1, pages);
        let blocks = (page_bytes / job.block_bytes.max(LINE_BYTES)).max(1);
        let units = pages.div_ceil(unit_pages);
        let (thread, threads) = (u64::from(thread), u64::from(job.threads.max(1)));
        let share = |thread: u64| units * thread / threads;
        let share_units = (share(thread + 1) - share(thread)).max(1);
        let chooser = match job.order {
            Order::Sequential => {
                let start = share(thread).min(units - 1);
                Chooser::Sequential(Walk::new(start, share_units, u64::from(job.stride_pages), blocks))
            }
            Order::Uniform => Chooser::Uniform { units },
            Order::Zipf(theta) => Chooser::Zipf {
                quantiles: zipf::quantiles(units, theta),
                scatter: Scatter::new(units, job.seed),
            },
        };
        Pattern {
            first: area.start.0,
            pages,
            unit_pages,
            blocks,
            read_percent: match job.access {
                Access::Read => 100,
                Access::Write => 0,
                Access::Mixed => u64::from(job.read_percent),
            },
            chooser,
            random: Random::new(mixed(job.seed) ^ mixed(thread + 1)),
            rest: Rest::default(),
            pass_operations: share_units * blocks,
        }
    }

    /// This thread's part of one pass over the working set, in operations.
    pub(crate) fn pass_operations(&self) -> u64 {
        self.pass_operations
    }

    pub(crate) fn next_touch(&mut self) -> Touch {
        if self.rest.page == self.rest.end {
            self.rest = self.operation();
        }
        let Rest { page, end, line, write } = self.rest;
        self.rest.page += 1;
        // Whole pages are touched at a line of their own, so that not all of them share the sets of a CPU's caches.
        let line = if self.blocks > 1 { line } else { page % LINES };
        Touch { page, line: line as u16, write, ends: page + 1 == end }
    }

    fn operation(&mut self) -> Rest {
        let (unit, block) = match &mut self.chooser {
            Chooser::Sequential(walk) => walk.step(),
            Chooser::Uniform { units } => (self.random.below(*units), self.random.below(self.blocks)),
            Chooser::Zipf { quantiles, scatter } => {
                let rank = zipf::rank(quantiles, self.random.next());
                (scatter.place(u64::from(rank)), self.random.below(self.blocks))
            }
        };
        let start = unit * self.unit_pages;
        let end = (start + self.unit_pages).min(self.pages);
        let write = self.read_percent < 100 && self.random.below(100) >= self.read_percent;
        let line = block * (LINES / self.blocks);
        Rest { page: self.first + start, end: self.first + end, line, write }
    }
}

impl Iterator for Pattern {
    type Item = Touch;

    fn next(&mut self) -> Option<Touch> {
        Some(self.next_touch())
    }
}

/// Round and round through a share: units 0, s, 2s, … then 1, s + 1, … and each unit's blocks in order.
#[derive(Clone, Debug)]
struct Walk {
    start: u64,
    units: u64,
    stride: u64,
    blocks: u64,
    unit: u64,
    block: u64,
}

impl Walk {
    fn new(start: u64, units: u64, stride: u64, blocks: u64) -> Walk {
        Walk { start, units, stride: stride.clamp(1, units), blocks, unit: 0, block: 0 }
    }

    fn step(&mut self) -> (u64, u64) {
        let found = (self.start + self.unit, self.block);
        self.block += 1;
        if self.block == self.blocks {
            self.block = 0;
            let next = self.unit + self.stride;
            self.unit = if next < self.units { next } else { (self.unit % self.stride + 1) % self.stride };
        }
        found
    }
}

/// A permutation of `0..count` that leaves no neighbours together.
///
/// Steps that each permute the numbers of so many bits (adding a key, multiplying by an odd number, folding the high
/// half onto the low one), repeated until the result is below the count: "cycle walking", Black and Rogaway 2002.
#[derive(Clone, Copy, Debug)]
struct Scatter {
    count: u64,
    bits: u32,
    key: u64,
}

impl Scatter {
    const ROUNDS: u32 = 3;

    fn new(count: u64, seed: u64) -> Scatter {
        Scatter { count, bits: u64::BITS - (count - 1).max(1).leading_zeros(), key: mixed(seed ^ 0x5ca7) }
    }

    fn place(&self, number: u64) -> u64 {
        let mask = u64::MAX >> (u64::BITS - self.bits);
        let mut place = number;
        loop {
            for round in 0..Self::ROUNDS {
                place = place.wrapping_add(self.key.rotate_left(round * 21)) & mask;
                place = place.wrapping_mul(0x9E37_79B9_7F4A_7C15) & mask;
                place ^= place >> self.bits.div_ceil(2);
            }
            if place < self.count {
                return place;
            }
        }
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014).
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mixed(self.0)
    }

    /// Evenly, but for a bias of `bound` in 2^64.
    fn below(&mut self, bound: u64) -> u64 {
        if bound == 1 {
            return 0;
        }
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

/// A permutation of all 64-bit numbers that leaves no resemblance.
pub(crate) fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use swapd::PageNo;

    use super::*;
    use crate::job::Length;

    fn job(order: Order, pages: u64) -> Job {
        Job {
            name: "job".into(),
            size_bytes: pages * 4096,
            working_set_bytes: pages * 4096,
            access: Access::Mixed,
            read_percent: 50,
            order,
            stride_pages: 1,
            block_bytes: 4096,
            threads: 1,
            length: Length::Loops(1),
            ramp_ms: 0,
            prefill: true,
            seed: 7,
        }
    }

    fn area(start: u64, job: &Job) -> Run {
        Run::new(PageNo(start), (job.size_bytes / 4096) as u32)
    }

    /// What one pass of a thread touches.
    fn pass(pattern: &mut Pattern) -> Vec<Touch> {
        let (mut operations, mut touches) = (0, Vec::new());
        while operations < pattern.pass_operations() {
            let touch = pattern.next_touch();
            operations += u64::from(touch.ends);
            touches.push(touch);
        }
        touches
    }

    fn orders() -> impl Strategy<Value = Order> {
        prop_oneof![Just(Order::Sequential), Just(Order::Uniform), (0.1f64..2.0).prop_map(Order::Zipf)]
    }

    proptest! {
        #[test]
        fn the_passes_of_all_threads_touch_every_page_once(
            pages in 1u64..700, stride in 1u32..40, threads in 1u32..5, block_pages in 1u64..9, start in 0u64..1000,
        ) {
            prop_assume!(pages.div_ceil(block_pages) >= u64::from(threads));
            let job = job(Order::Sequential, pages);
            let job = Job { stride_pages: stride, threads, block_bytes: block_pages * 4096, ..job };
            let area = area(start, &job);
            let mut patterns: Vec<_> = (0..threads).map(|thread| Pattern::new(&job, area, thread)).collect();
            for _ in 0..2 {
                let mut seen: Vec<u64> = patterns.iter_mut().flat_map(pass).map(|touch| touch.page).collect();
                seen.sort_unstable();
                prop_assert!(seen.iter().copied().eq(start..start + pages), "{:?}", seen);
            }
        }

        #[test]
        fn touches_stay_within_the_working_set_and_come_again(
            order in orders(), pages in 1u64..500, rest in 0u64..500, threads in 1u32..5, block_shift in 6u32..16,
            seed: u64,
        ) {
            let job = Job {
                working_set_bytes: pages * 4096,
                threads,
                block_bytes: 1 << block_shift,
                seed,
                ..job(order, pages + rest)
            };
            for thread in 0..threads {
                let pattern = Pattern::new(&job, area(9, &job), thread);
                let touches: Vec<_> = pattern.clone().take(300).collect();
                prop_assert!(touches.iter().all(|touch| (9..9 + pages).contains(&touch.page) && touch.line < 64));
                prop_assert_eq!(touches, pattern.take(300).collect::<Vec<_>>());
            }
        }

        #[test]
        fn scattering_is_a_permutation(count in 1u64..3000, seed: u64) {
            let scatter = Scatter::new(count, seed);
            let mut places: Vec<_> = (0..count).map(|number| scatter.place(number)).collect();
            places.sort_unstable();
            prop_assert!(places.into_iter().eq(0..count));
        }
    }

    #[test]
    fn a_stride_leaves_no_page_out() {
        let job = Job { stride_pages: 3, access: Access::Read, ..job(Order::Sequential, 8) };
        let pages: Vec<_> = Pattern::new(&job, area(0, &job), 0).take(9).map(|touch| touch.page).collect();
        assert_eq!(pages, [0, 3, 6, 1, 4, 7, 2, 5, 0]);
    }

    #[test]
    fn blocks_below_a_page_are_lines_of_it() {
        let job = Job { block_bytes: 1024, ..job(Order::Sequential, 2) };
        let touches: Vec<_> =
            Pattern::new(&job, area(0, &job), 0).take(9).map(|touch| (touch.page, touch.line)).collect();
        assert_eq!(touches, [(0, 0), (0, 16), (0, 32), (0, 48), (1, 0), (1, 16), (1, 32), (1, 48), (0, 0)]);
    }

    #[test]
    fn operations_above_a_page_end_once() {
        let job = Job { block_bytes: 16384, ..job(Order::Uniform, 64) };
        for operation in Pattern::new(&job, area(0, &job), 0).take(400).collect::<Vec<_>>().chunks(4) {
            assert_eq!(operation.iter().filter(|touch| touch.ends).count(), 1);
            assert!(
                operation[3].ends && operation[0].page % 4 == 0 && operation[3].page == operation[0].page + 3
            );
            assert!(operation.iter().all(|touch| touch.write == operation[0].write));
        }
    }

    #[test]
    fn zipf_pages_are_hot_by_the_law_and_scattered() {
        let (pages, theta, draws) = (10_000u64, 0.99, 1_000_000);
        let job = job(Order::Zipf(theta), pages);
        let mut counts: HashMap<u64, u64> = HashMap::new();
        for touch in Pattern::new(&job, area(0, &job), 0).take(draws) {
            *counts.entry(touch.page).or_default() += 1;
        }
        let total: f64 = (1..=pages).map(|rank| (rank as f64).powf(-theta)).sum();
        let scatter = Scatter::new(pages, job.seed);
        for rank in [0, 1, 2, 9, 50] {
            let expected = draws as f64 * ((rank + 1) as f64).powf(-theta) / total;
            let found = counts[&scatter.place(rank)] as f64;
            assert!((found / expected - 1.0).abs() < 0.1, "rank {rank}: {found}, expected {expected}");
        }
        // The hottest hundred lie in many 2 MiB blocks.
        let blocks: std::collections::HashSet<_> = (0..100).map(|rank| scatter.place(rank) / 512).collect();
        assert!(blocks.len() >= 15, "{blocks:?}");
    }

    #[test]
    fn mixed_operations_keep_the_percentage() {
        let job = Job { read_percent: 70, ..job(Order::Uniform, 100) };
        let writes = Pattern::new(&job, area(0, &job), 0).take(100_000).filter(|touch| touch.write).count();
        assert!((29_000..31_000).contains(&writes), "{writes}");
        for (access, writes) in [(Access::Read, 0), (Access::Write, 1000)] {
            let job = Job { access, ..job.clone() };
            assert_eq!(
                Pattern::new(&job, area(0, &job), 0).take(1000).filter(|touch| touch.write).count(),
                writes
            );
        }
    }

    #[test]
    fn threads_of_a_random_job_differ() {
        let job = job(Order::Uniform, 1000);
        let pages = |thread| Pattern::new(&job, area(0, &job), thread).take(50).collect::<Vec<_>>();
        assert_ne!(pages(0), pages(1));
    }
}
