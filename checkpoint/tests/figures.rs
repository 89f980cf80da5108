//! How fast a checkpoint is, beside what the disk does by itself. Prints figures, and asserts none: a time alone means
//! nothing on a machine that others use. `VMEMD_LONG=1`, built with `--release`.

#[macro_use]
extern crate testkit;

testkit::main!();

#[path = "../../migrate/tests/common/vm.rs"]
#[allow(dead_code, unreachable_pub, reason = "migrations use more of it")]
mod vm;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use checkpoint::save::{Files, SaveOptions, Saved, save};
use migrate::LiveVm;
use swapd::{Engine, EngineConfig, PAGE_SIZE, PageNo, Run, StoreConfig, TierId};
use testkit::{OrSkip, Reason, TempDir, skip};
use vm::Writer;

const MEMORY: u64 = 1 << 30;
const TIMES: usize = 3;

fn place() -> TempDir {
    if std::env::var_os("VMEMD_LONG").is_none() {
        skip(Reason::Long, "writes a few GiB: VMEMD_LONG=1");
    }
    testkit::directory_in(env!("CARGO_TARGET_TMPDIR"), "figures")
}

fn direct(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true).custom_flags(libc::O_DIRECT);
    options.open(path).unwrap()
}

/// A VM all of whose pages have content that is like no other's.
fn engine(place: &TempDir, budget_bytes: u64) -> Engine {
    let config = EngineConfig {
        memory_bytes: MEMORY,
        budget_bytes,
        store: StoreConfig { path: place.path().to_path_buf(), overcommit: false, encrypt: false },
        origin: None,
        prealloc: false,
        lock: true,
        sampling: false,
    };
    let engine = Engine::start(config, Box::new(|_| {})).or_skip(Reason::Uffd);
    let base = engine.memory_base() as usize;
    for page in 0..MEMORY / PAGE_SIZE as u64 {
        for word in 0..PAGE_SIZE / 8 {
            let value = (page << 9 | word as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
            // SAFETY: within the engine's memory, which nobody else uses.
            unsafe { ((base + page as usize * PAGE_SIZE) as *mut u64).add(word).write_volatile(value) };
        }
    }
    engine
}

/// Writes as much as the memory, one buffer after the other, and makes it durable.
fn raw(path: &Path, bytes: u64) -> Duration {
    const BUFFER: usize = 2 << 20;
    let mut buffer = memmap2::MmapMut::map_anon(BUFFER).unwrap();
    for (at, byte) in buffer.iter_mut().enumerate() {
        *byte = (at as u32).wrapping_mul(0x9E37_79B9).to_le_bytes()[3];
    }
    let file = direct(path);
    let began = Instant::now();
    for at in (0..bytes).step_by(BUFFER) {
        file.write_all_at(&buffer, at).unwrap();
    }
    file.sync_all().unwrap();
    let took = began.elapsed();
    std::fs::remove_file(path).unwrap();
    took
}

/// Saves, and makes it durable.
fn saved(engine: &Engine, vm: &mut Writer, to: &TempDir) -> (Saved, Duration) {
    let at = |name| to.path().join(name);
    let image = direct(&at("image"));
    let again = image.try_clone().unwrap();
    let files =
        Files { image, map: File::create(at("map")).unwrap(), state: File::create(at("state")).unwrap() };
    let began = Instant::now();
    let options = SaveOptions::default();
    let saved = save(&engine.handle(), vm, files, None, &options, &|_| {}, &AtomicBool::new(false)).unwrap();
    again.sync_all().unwrap();
    let took = began.elapsed();
    std::fs::remove_file(at("image")).unwrap();
    (saved, took)
}

fn told(what: &str, bytes: u64, times: &mut [Duration]) {
    times.sort();
    let median = times[times.len() / 2].as_secs_f64();
    let worst = times[times.len() - 1].as_secs_f64();
    println!("{what:<34} {median:>7.3} s, worst {worst:>7.3} s, {:>6.0} MB/s", bytes as f64 / 1e6 / median);
}

#[test]
fn a_paused_vm_all_resident_against_the_raw_disk() {
    let (place, to) = (place(), place());
    let here = engine(&place, MEMORY);
    let mut vm = Writer::start(here.memory_base() as usize, 0..1);
    vm.pause().unwrap();
    let (mut disk, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..TIMES {
        disk.push(raw(&to.path().join("raw"), MEMORY));
        let (saved, took) = saved(&here, &mut vm, &to);
        vm.pause().unwrap();
        println!("{saved:?}");
        ours.push(took);
    }
    told("raw, 2 MiB at a time", MEMORY, &mut disk);
    told("1 GiB, all resident", MEMORY, &mut ours);
}

#[test]
fn stored_pages_read_and_written_against_copied_by_the_kernel() {
    let (place, to) = (place(), place());
    let here = engine(&place, MEMORY / 4);
    let handle = here.handle();
    let all = Run::new(PageNo(0), (MEMORY / PAGE_SIZE as u64) as u32);
    handle.evict(all).unwrap();
    let mut vm = Writer::start(here.memory_base() as usize, 0..1);
    vm.pause().unwrap();
    let (mut ours, mut kernel) = (Vec::new(), Vec::new());
    let mut bytes = 0;
    for _ in 0..TIMES {
        let (saved, took) = saved(&here, &mut vm, &to);
        vm.pause().unwrap();
        println!("{saved:?}");
        ours.push(took);
        let pieces = handle.hold(all).unwrap();
        let stored = pieces.iter().filter(|piece| piece.place == swapd::Place::Stored);
        let runs: Vec<Run> = stored.map(|piece| piece.run).collect();
        bytes = runs.iter().map(|run| run.bytes() as u64).sum();
        let image = direct(&to.path().join("image"));
        image.set_len(MEMORY).unwrap();
        let began = Instant::now();
        let cloned = handle.stored_reader().clone_into(TierId::STORE, &image, &runs).unwrap();
        image.sync_all().unwrap();
        kernel.push(began.elapsed());
        println!("{cloned:?}");
        handle.release(all).unwrap();
        std::fs::remove_file(to.path().join("image")).unwrap();
    }
    told("stored, read and written", bytes, &mut ours);
    told("stored, copied by the kernel", bytes, &mut kernel);
}

#[test]
fn the_pause_of_a_vm_that_rewrites_a_quarter_of_its_memory() {
    let (place, to) = (place(), place());
    let here = engine(&place, MEMORY);
    let mut vm = Writer::start(here.memory_base() as usize, 0..MEMORY / PAGE_SIZE as u64 / 4);
    for _ in 0..TIMES {
        let (before, began) = (vm.writes(), Instant::now());
        std::thread::sleep(Duration::from_millis(500));
        let alone = (vm.writes() - before) as f64 / began.elapsed().as_secs_f64();
        let (before, began) = (vm.writes(), Instant::now());
        let (saved, took) = saved(&here, &mut vm, &to);
        let during = (vm.writes() - before) as f64 / began.elapsed().as_secs_f64();
        println!("{saved:?}");
        println!(
            "pause {:.1} ms, {} rounds, throttle {} %, {:.3} s, the guest at {:.2} of its speed",
            saved.pause_ms,
            saved.rounds,
            saved.throttle_max_percent,
            took.as_secs_f64(),
            during / alone
        );
    }
}
