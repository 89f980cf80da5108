//! A "VM" for tests: an engine whose memory this process touches itself.
#![allow(dead_code, unreachable_pub)]

use std::path::{Path, PathBuf};

use swapd::{Engine, EngineConfig, EngineHandle, PAGE_SIZE, PageNo, StartError, Stats, StoreConfig};
use testkit::{Reason, pages, skip};

pub fn config(memory_bytes: u64, budget_bytes: u64, store: PathBuf, prealloc: bool) -> EngineConfig {
    EngineConfig {
        memory_bytes,
        budget_bytes,
        store: StoreConfig { path: store, overcommit: false, encrypt: false },
        origin: None,
        prealloc,
        lock: true,
        sampling: true,
    }
}

/// A directory on a real disk: the build's own.
pub fn store_directory() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
}

/// What was started. Ends the test on a host that cannot run an engine.
pub fn started<T: std::fmt::Debug>(started: Result<T, StartError>) -> T {
    match started {
        Err(StartError::Host(reason)) => skip(Reason::Uffd, reason),
        started => started.unwrap(),
    }
}

pub struct Vm {
    engine: Engine,
    base: usize,
    pages: u64,
}

/// Ends the test on a host that cannot run an engine.
pub fn start(memory: u64, budget: u64) -> Vm {
    Vm::start(memory, budget, false)
}

impl Vm {
    pub fn start(memory: u64, budget: u64, prealloc: bool) -> Vm {
        let notify = Box::new(|notice| println!("notice: {notice:?}"));
        Vm::of(started(Engine::start(config(memory, budget, store_directory(), prealloc), notify)))
    }

    /// With a store in this directory, or on this device, which may have less room than the VM could need.
    pub fn start_in(memory: u64, budget: u64, store: &Path, encrypt: bool) -> Vm {
        let mut config = config(memory, budget, store.into(), false);
        (config.store.overcommit, config.store.encrypt) = (true, encrypt);
        Vm::of(started(Engine::start(config, Box::new(|notice| println!("notice: {notice:?}")))))
    }

    pub fn of(engine: Engine) -> Vm {
        let base = engine.memory_base() as usize;
        let pages = engine.handle().memory_bytes() / PAGE_SIZE as u64;
        Vm { engine, base, pages }
    }

    pub fn handle(&self) -> EngineHandle {
        self.engine.handle()
    }

    pub fn stats(&self) -> Stats {
        self.handle().stats().expect("the engine lives")
    }

    pub fn heat(&self) -> Vec<u8> {
        self.handle().heat_async().blocking_recv().expect("the engine lives").expect("heat is always known")
    }

    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Where its memory is.
    pub fn addresses(&self) -> std::ops::Range<usize> {
        self.base..self.base + self.pages as usize * PAGE_SIZE
    }

    fn word(&self, page: PageNo, nth: usize) -> *mut u64 {
        assert!(page.0 < self.pages && nth < PAGE_SIZE / 8);
        (self.base + page.offset() as usize + nth * 8) as *mut u64
    }

    pub fn write(&self, page: PageNo, round: u64) {
        for nth in 0..PAGE_SIZE / 8 {
            // SAFETY: within the engine's guest memory, which lives as long as `self`; volatile, for other threads and
            // the engine work on it too.
            unsafe { self.word(page, nth).write_volatile(pages::word(page.0, round, nth)) };
        }
    }

    pub fn is_right(&self, page: PageNo, round: u64) -> bool {
        (0..PAGE_SIZE / 8).all(|nth| {
            // SAFETY: as above.
            unsafe { self.word(page, nth).read_volatile() == pages::word(page.0, round, nth) }
        })
    }

    pub fn is_zero(&self, page: PageNo) -> bool {
        (0..PAGE_SIZE / 8).all(|nth| {
            // SAFETY: as above.
            unsafe { self.word(page, nth).read_volatile() == 0 }
        })
    }

    /// Whether the kernel fails to copy from the page.
    pub fn is_unreadable(&self, page: PageNo) -> bool {
        let null = std::fs::OpenOptions::new()
            .write(true)
            .open("/proc/self/coredump_filter")
            .expect("proc is there");
        let (null, word) = (std::os::fd::AsRawFd::as_raw_fd(&null), self.word(page, 0));
        // SAFETY: the kernel checks the range and fails with EFAULT instead of a signal.
        let result = unsafe { libc::write(null, word.cast(), 8) };
        result < 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EFAULT)
    }

    pub fn touch(&self, page: PageNo) {
        // SAFETY: as above.
        unsafe { self.word(page, 0).read_volatile() };
    }

    pub fn write_all(&self, round: u64) {
        (0..self.pages).for_each(|page| self.write(PageNo(page), round));
    }

    pub fn mismatches(&self, round: u64) -> u64 {
        (0..self.pages).filter(|page| !self.is_right(PageNo(*page), round)).count() as u64
    }
}
