//! A "VM" for the source: a thread that writes to an engine's memory.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use migrate::{LiveVm, SessionId, SourceOptions, SourceVm, VmError};
use swapd::digest::page_sum;
use swapd::{
    Adopted, Engine, EngineConfig, LayerOf, Origin, OriginLayer, PAGE_SIZE, PageNo, Run, StartError,
    StoreConfig,
};
use testkit::{Reason, TempDir, skip, until};

pub const MEMORY: u64 = 64 << 20;
pub const PAGES: u64 = MEMORY / PAGE_SIZE as u64;

/// Ends the test on a host that cannot run an engine.
pub fn engine(place: &TempDir, budget_bytes: u64) -> Engine {
    engine_with(place, budget_bytes, false)
}

/// The same, perhaps with an encrypted store.
pub fn engine_with(place: &TempDir, budget_bytes: u64, encrypt: bool) -> Engine {
    start(place, budget_bytes, encrypt, None)
}

/// The same, perhaps with pages at an origin.
pub fn start(place: &TempDir, budget_bytes: u64, encrypt: bool, origin: Option<Origin>) -> Engine {
    let config = EngineConfig {
        memory_bytes: MEMORY,
        budget_bytes,
        store: StoreConfig { path: place.path().to_path_buf(), overcommit: false, encrypt },
        origin,
        prealloc: false,
        lock: true,
        sampling: false,
    };
    match Engine::start(config, Box::new(|notice| println!("notice: {notice:?}"))) {
        Err(StartError::Host(reason)) => skip(Reason::Uffd, reason),
        started => started.unwrap(),
    }
}

/// A VM with the content that [`fill`] gives, restored from an image in two layers: a part of its pages has been
/// written anew since, and is in RAM or in the store; the rest is at the origin still. The path is that of the second
/// layer, which has the pages with an odd number.
pub fn restored(place: &TempDir, encrypt: bool) -> (Engine, PathBuf) {
    let paths = ["even", "odd"].map(|name| place.path().join(name));
    let files = paths.each_ref().map(|path| {
        let file = File::create(path).unwrap();
        file.set_len(MEMORY).unwrap();
        file
    });
    let mut sums = Vec::new();
    for page in 0..PAGES / 2 {
        let mut words = [0; PAGE_SIZE / 8];
        (words[0], words[1], words[511]) = (mix(page, 0), 0, !mix(page, 0));
        let bytes: Vec<u8> = words.iter().flat_map(|word: &u64| word.to_le_bytes()).collect();
        sums.push(page_sum(PageNo(page), &bytes));
        files[page as usize % 2].write_all_at(&bytes, page * PAGE_SIZE as u64).unwrap();
    }
    files.iter().for_each(|file| file.sync_all().unwrap());
    let layers = paths.iter().map(|path| OriginLayer::open(path).unwrap()).collect();
    let layer_of = LayerOf::PerPage((0..PAGES).map(|page| (page % 2) as u8).collect());
    let engine = start(place, MEMORY / 2, encrypt, Some(Origin { layers, layer_of, cipher: None }));
    let handle = engine.handle();
    handle.adopt(Adopted { run: Run::new(PageNo(0), (PAGES / 2) as u32), sums }).unwrap();
    let base = engine.memory_base() as usize;
    // Rows of ten pages, in some of which a run that is stored changes from one tier to the other.
    (0..PAGES / 2).filter(|page| page / 10 % 3 == 0).for_each(|page| write(base, page, 3));
    handle.evict(Run::new(PageNo(1000), 5000)).unwrap();
    (engine, paths[1].clone())
}

fn mix(page: u64, generation: u64) -> u64 {
    (page << 24 | generation).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// The words of a page: a function of page and generation in the first and last, and the generation.
pub fn write(base: usize, page: u64, generation: u64) {
    let mix = mix(page, generation);
    for (word, value) in [(0, mix), (1, generation), (511, !mix)] {
        // SAFETY: within the engine's memory, which outlives the writer; volatile because others read it meanwhile.
        unsafe { ((base + page as usize * PAGE_SIZE) as *mut u64).add(word).write_volatile(value) };
    }
}

pub fn is_intact(base: usize, page: u64) -> bool {
    // SAFETY: as above.
    let word = |at| unsafe { ((base + page as usize * PAGE_SIZE) as *const u64).add(at).read_volatile() };
    let generation: u64 = word(1);
    let mix = mix(page, generation);
    let zero = [0, 1, 511].iter().all(|at| word(*at) == 0_u64);
    zero || (word(0), word(511)) == (mix, !mix)
}

#[derive(Default)]
pub struct Switch {
    /// (asked to stand still, stands still, ends)
    state: Mutex<(bool, bool, bool)>,
    changed: Condvar,
    throttle: AtomicU8,
    writes: AtomicU64,
}

/// A "VM": a thread that writes to some of its memory, round and round, and can be paused between two pages.
pub struct Writer {
    switch: Arc<Switch>,
    thread: Option<JoinHandle<()>>,
    pub named: Arc<AtomicBool>,
    pub fail_pause: bool,
}

impl Writer {
    pub fn start(base: usize, pages: std::ops::Range<u64>) -> Writer {
        let switch = Arc::new(Switch::default());
        let shared = switch.clone();
        let thread = std::thread::spawn(move || {
            for generation in 1.. {
                for page in pages.clone() {
                    let mut state = shared.state.lock().unwrap();
                    while state.0 && !state.2 {
                        state.1 = true;
                        shared.changed.notify_all();
                        state = shared.changed.wait(state).unwrap();
                    }
                    if state.2 {
                        return;
                    }
                    state.1 = false;
                    write(base, page, generation);
                    shared.writes.fetch_add(1, Ordering::Relaxed);
                    drop(state);
                    // A crude throttle: time spent outside of "the guest".
                    for _ in 0..u32::from(shared.throttle.load(Ordering::Relaxed)) * 20 {
                        std::hint::spin_loop();
                    }
                }
            }
        });
        Writer { switch, thread: Some(thread), named: Arc::new(AtomicBool::new(true)), fail_pause: false }
    }

    pub fn writes(&self) -> u64 {
        self.switch.writes.load(Ordering::Relaxed)
    }

    pub fn assert_runs_here(&self) {
        let before = self.writes();
        until("the VM writes on", || self.writes() > before + 100);
        assert!(self.named.load(Ordering::SeqCst), "it runs without its name");
        assert_eq!(self.switch.throttle.load(Ordering::SeqCst), 0, "it is still throttled");
    }
}

impl LiveVm for Writer {
    fn drain(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        let mut state = self.switch.state.lock().unwrap();
        state.0 = true;
        while !state.1 {
            state = self.switch.changed.wait(state).unwrap();
        }
        if self.fail_pause { Err(VmError::Machine("stuck".to_string())) } else { Ok(()) }
    }

    fn stood_still(&self) -> bool {
        false
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.switch.state.lock().unwrap().0 = false;
        self.switch.changed.notify_all();
        Ok(())
    }

    fn save(&mut self, to: &mut dyn Write) -> Result<(), VmError> {
        to.write_all(&[42; 300_000]).map_err(|source| VmError::Io { doing: "its state", source })
    }

    fn throttle(&mut self, percent: u8) {
        self.switch.throttle.store(percent, Ordering::SeqCst);
    }
}

impl SourceVm for Writer {
    fn give_up_name(&mut self, _: SessionId) -> Result<(), VmError> {
        self.named.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn take_name_back(&mut self) {
        self.named.store(true, Ordering::SeqCst);
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.switch.state.lock().unwrap().2 = true;
        self.switch.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the writer panicked");
        }
    }
}

pub fn options(to: impl ToString) -> SourceOptions {
    SourceOptions::new("web", to.to_string())
}

/// Half of the memory written, some of it stored, some of it zeros on purpose.
pub fn fill(source: &Engine) {
    let base = source.memory_base() as usize;
    (0..PAGES / 2).for_each(|page| write(base, page, 0));
    // Touched, but zero: found by content.
    let at = (base + (PAGES / 2) as usize * PAGE_SIZE) as *mut u64;
    // SAFETY: within the engine's memory.
    unsafe { at.write_volatile(0) };
    source.handle().evict(Run::new(PageNo(1000), 3000)).unwrap();
}

pub fn compare(source: &Engine, target_base: *mut u8) {
    let source_base = source.memory_base() as usize;
    for page in 0..PAGES as usize {
        // SAFETY: a page of each memory; both VMs stand still.
        let bytes = |base: usize| unsafe {
            std::slice::from_raw_parts((base + page * PAGE_SIZE) as *const u8, PAGE_SIZE)
        };
        assert!(bytes(source_base) == bytes(target_base as usize), "page {page} differs");
        assert!(is_intact(target_base as usize, page as u64), "page {page} is torn");
    }
}
