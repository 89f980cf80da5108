//! Microbenchmarks of the engine on this host: `cargo bench --bench engine`.
//!
//! They show what one mechanism costs, not how a VM fares: for that see `vmemd bench migrate`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use swapd::digest::{is_zero, page_sum};
use swapd::{Engine, EngineConfig, PAGE_SIZE, PageNo, Run, StoreConfig};

const MIB: u64 = 1 << 20;

struct Vm {
    engine: Engine,
    pages: u64,
}

impl Vm {
    /// None on a host without userfaultfd or io_uring.
    fn start(memory: u64, budget: u64) -> Option<Vm> {
        let store = StoreConfig {
            path: PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
            overcommit: false,
            encrypt: false,
        };
        let config = EngineConfig {
            memory_bytes: memory,
            budget_bytes: budget,
            store,
            origin: None,
            prealloc: false,
            lock: true,
            sampling: false,
        };
        match Engine::start(config, Box::new(|_| {})) {
            Ok(engine) => Some(Vm { engine, pages: memory / PAGE_SIZE as u64 }),
            Err(error) => {
                println!("skipped: {error}");
                None
            }
        }
    }

    /// Changes one word of a page, as a guest would.
    fn touch(&self, page: u64) {
        let at = self.engine.memory_base().wrapping_add((page as usize) * PAGE_SIZE).cast::<u64>();
        // SAFETY: within the engine's guest memory, which lives as long as `self`.
        unsafe { at.write_volatile(at.read_volatile().wrapping_add(page + 1)) };
    }

    fn touch_all(&self) {
        (0..self.pages).for_each(|page| self.touch(page));
    }
}

fn digests(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("page");
    let page = vec![7u8; PAGE_SIZE];
    let zeros = vec![0u8; PAGE_SIZE];
    group.throughput(Throughput::Bytes(PAGE_SIZE as u64));
    group.bench_function("checksum", |bench| bench.iter(|| page_sum(PageNo(1), std::hint::black_box(&page))));
    group.bench_function("zero test of zeros", |bench| bench.iter(|| is_zero(std::hint::black_box(&zeros))));
    group.finish();
}

fn paging(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("paging");
    group.sample_size(10).measurement_time(Duration::from_secs(10));
    if let Some(vm) = Vm::start(1024 * MIB, 512 * MIB) {
        vm.touch_all();
        group.throughput(Throughput::Bytes(1024 * MIB));
        group.bench_function("sequential rewrite, 1G in 512M", |bench| bench.iter(|| vm.touch_all()));
    }
    if let Some(vm) = Vm::start(512 * MIB, 64 * MIB) {
        vm.touch_all();
        let mut page = 1;
        group.throughput(Throughput::Elements(1));
        group.bench_function("random touch, 512M in 64M", |bench| {
            bench.iter(|| {
                page = (page * 48_271) % 131_071;
                vm.touch(page);
            });
        });
    }
    if let Some(vm) = Vm::start(512 * MIB, 512 * MIB) {
        vm.touch_all();
        let handle = vm.engine.handle();
        group.bench_function("first touch after page-out, 16M, sequential", |bench| {
            bench.iter_custom(|times| {
                (0..times)
                    .map(|_| {
                        handle.evict(Run::new(PageNo(0), 4096)).expect("the engine lives");
                        let start = Instant::now();
                        (0..4096).for_each(|page| vm.touch(page));
                        start.elapsed()
                    })
                    .sum()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, digests, paging);
criterion_main!(benches);
