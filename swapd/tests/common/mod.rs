//! A "VM" for tests: an engine whose memory this process touches itself.
#![allow(dead_code, unreachable_pub)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use swapd::{Engine, EngineConfig, EngineHandle, PAGE_SIZE, PageNo, Stats, StoreConfig};

pub fn config(memory_bytes: u64, budget_bytes: u64, store: PathBuf, prealloc: bool) -> EngineConfig {
    EngineConfig {
        memory_bytes,
        budget_bytes,
        store: StoreConfig { path: store, overcommit: false, encrypt: false },
        prealloc,
        lock: true,
        sampling: true,
    }
}

/// A directory on a real disk: the build's own.
pub fn store_directory() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
}

/// A directory of one test, which goes with it.
pub struct Directory(pub PathBuf);

impl Directory {
    pub fn new(name: &str) -> Directory {
        let path = store_directory().join(format!("{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory for the test");
        Directory(path)
    }

    /// The file of the store here, nameless as it is.
    pub fn store(&self) -> std::fs::File {
        use std::os::unix::fs::OpenOptionsExt;
        let directory = self.0.canonicalize().expect("the directory is there");
        let is_here =
            |fd: &PathBuf| std::fs::read_link(fd).is_ok_and(|target| target.starts_with(&directory));
        let mut open =
            std::fs::read_dir("/proc/self/fd").expect("proc is there").flatten().map(|fd| fd.path());
        let store = open.find(is_here).expect("a store is open here");
        let mut options = std::fs::OpenOptions::new();
        options
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(store)
            .expect("it can be opened again")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Says that a test cannot run here, and why, past the capture of a test's output.
pub fn skipped(why: &dyn std::fmt::Display) {
    use std::io::Write;
    let name = std::thread::current().name().unwrap_or("test").to_owned();
    let _ = writeln!(std::io::stderr(), "{name}: skipped: {why}");
}

pub struct Vm {
    engine: Engine,
    base: usize,
    pages: u64,
}

/// None, with the reason said, on a host that cannot run an engine.
pub fn start(memory: u64, budget: u64) -> Option<Vm> {
    Vm::start(memory, budget, false)
}

impl Vm {
    pub fn start(memory: u64, budget: u64, prealloc: bool) -> Option<Vm> {
        let notify = Box::new(|notice| println!("notice: {notice:?}"));
        match Engine::start(config(memory, budget, store_directory(), prealloc), notify) {
            Ok(engine) => Some(Vm::of(engine)),
            Err(swapd::StartError::Host(reason)) => {
                skipped(&reason);
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// With a store of its own, in which it can have more than there is room for.
    pub fn start_in(memory: u64, budget: u64, store: PathBuf, encrypt: bool) -> Option<Vm> {
        let mut config = config(memory, budget, store, false);
        (config.store.overcommit, config.store.encrypt) = (true, encrypt);
        match Engine::start(config, Box::new(|notice| println!("notice: {notice:?}"))) {
            Ok(engine) => Some(Vm::of(engine)),
            Err(swapd::StartError::Host(reason)) => {
                skipped(&reason);
                None
            }
            Err(error) => panic!("{error}"),
        }
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

    fn content(page: PageNo, round: u64, nth: usize) -> u64 {
        (page.0 << 32 | round).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(nth as u64)
    }

    pub fn write(&self, page: PageNo, round: u64) {
        for nth in 0..PAGE_SIZE / 8 {
            // SAFETY: within the engine's guest memory, which lives as long as `self`; volatile, for other threads and
            // the engine work on it too.
            unsafe { self.word(page, nth).write_volatile(Self::content(page, round, nth)) };
        }
    }

    pub fn is_right(&self, page: PageNo, round: u64) -> bool {
        (0..PAGE_SIZE / 8).all(|nth| {
            // SAFETY: as above.
            unsafe { self.word(page, nth).read_volatile() == Self::content(page, round, nth) }
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

/// Waits for a condition, not for a time.
pub struct Patience(Instant);

impl Default for Patience {
    fn default() -> Self {
        Patience(Instant::now() + Duration::from_secs(60))
    }
}

impl Patience {
    pub fn until<T>(&self, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
        loop {
            if let Some(result) = condition() {
                return result;
            }
            assert!(Instant::now() < self.0, "waited in vain until {what}");
            std::thread::yield_now();
        }
    }
}

/// One page, aligned for direct I/O.
#[repr(align(4096))]
pub struct Aligned([u8; PAGE_SIZE]);

impl Aligned {
    pub fn filled(byte: u8) -> Box<Self> {
        Box::new(Aligned([byte; PAGE_SIZE]))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}
