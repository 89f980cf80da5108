//! A VM's engine as its process sees it: its settings, its start, its handle, its stop.

use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use super::discard::Discarder;
use super::latency::LatencyBook;
use super::mailbox::Mailbox;
use super::memory::Memory;
use super::ring::Ring;
use super::sealer::Sealer;
use super::uffd::Faults;
use super::{Driver, locking, store};
use crate::cipher::Cipher;
use crate::error::{BudgetError, HostError, StartError};
use crate::handle::EngineHandle;
use crate::notice::Notice;
use crate::origin::{Layers, Origin};
use swapcore::core::{BUDGET_MIN, Core, CoreConfig, WalkStep, staging_blocks, staging_slots};
use swapcore::units::{BLOCK_PAGES, PAGE_SIZE, PageNo, bytes_of, pages_in};

/// Where a VM's store is, and what it is to be like.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// A directory (the store is a nameless sparse file in it) or a block device.
    pub path: PathBuf,
    /// Start even if the file system has less room than the VM could need. A store that fills up is latched as one
    /// whose write failed: see [`Notice::StoreFailed`].
    pub overcommit: bool,
    /// Encrypt the store, with a key that only this engine knows.
    pub encrypt: bool,
}

/// What an engine is started with. [`StartError`] says which of it does not fit the VM or the host.
#[derive(Debug)]
pub struct EngineConfig {
    /// The VM's memory; a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// RAM budget, at least [`Engine::MIN_BUDGET_BYTES`], at most the memory.
    pub budget_bytes: u64,
    /// Where pages go that are not in RAM.
    pub store: StoreConfig,
    /// Where pages come from that are [adopted](EngineHandle::adopt), until they have been written.
    pub origin: Option<Origin>,
    /// Take all frames at start; of external memory, when it is attached. Not with an origin: pages are to be untouched
    /// when they are adopted. Behind that, [`EngineHandle::fill_async`] takes them.
    pub prealloc: bool,
    /// Lock frames against the host's own swap.
    pub lock: bool,
    /// Sample which resident pages are in use while there is no memory pressure.
    pub sampling: bool,
}

/// A VM's memory and the thread that serves it.
#[derive(Debug)]
pub struct Engine {
    handle: EngineHandle,
    memory: Arc<Memory>,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// The smallest RAM budget.
    pub const MIN_BUDGET_BYTES: u64 = BUDGET_MIN * PAGE_SIZE as u64;

    /// What a region of so many bytes takes of a VM's memory; None if that is more than there are addresses.
    pub fn rounded(region_bytes: u64) -> Option<u64> {
        region_bytes.checked_next_multiple_of(bytes_of(u64::from(BLOCK_PAGES)))
    }

    /// Bytes that are locked of a VM of so much memory at least, unless it does without.
    pub fn locked_bytes(memory_bytes: u64) -> u64 {
        locked_bytes(memory_bytes, true)
    }

    /// Whether this process may lock the memory of such a VM; raises its limit as far as that takes no privilege.
    ///
    /// # Errors
    /// It may not, and what to do about it.
    pub fn check_lock(memory_bytes: u64) -> Result<(), StartError> {
        Ok(locking::allow(Self::locked_bytes(memory_bytes))?)
    }

    /// Reserves the memory, opens the store and starts the thread.
    ///
    /// # Errors
    /// A setting that cannot be, or a host that lacks something; nothing is left behind.
    pub fn start(config: EngineConfig, notify: Box<dyn Fn(Notice) + Send>) -> Result<Engine, StartError> {
        check(&config)?;
        let staging = StagingSize::of(config.memory_bytes, few_blocks(&config));
        let memory = Memory::reserve(config.memory_bytes, staging.all_slots(), config.lock);
        Self::start_with(config, memory?, staging, notify)
    }

    /// The same for memory that somebody else maps, in regions of so many bytes: each whole pages, and together the
    /// VM's memory when each has been rounded up to 2 MiB ([`Engine::rounded`]), by pages that nobody ever touches.
    /// Page numbers run on over them. Each region serves the VM once it is attached ([`EngineHandle::attach`]); until
    /// then its pages are untouched.
    ///
    /// # Errors
    /// As [`Engine::start`].
    pub fn start_external(
        config: EngineConfig,
        regions: &[u64],
        notify: Box<dyn Fn(Notice) + Send>,
    ) -> Result<Engine, StartError> {
        check(&config)?;
        check_regions(&config, regions)?;
        let staging = StagingSize::of(config.memory_bytes, few_blocks(&config));
        let memory = Memory::external(regions, staging.all_slots(), config.lock);
        Self::start_with(config, memory?, staging, notify)
    }

    fn start_with(
        config: EngineConfig,
        memory: Memory,
        staging: StagingSize,
        notify: Box<dyn Fn(Notice) + Send>,
    ) -> Result<Engine, StartError> {
        let pages = pages_in(config.memory_bytes);
        assert_eq!(Memory::staging_bytes(staging.all_slots()), memory.staging_len(), "every slot is mapped");
        memory.allow_huge(pages_in(config.budget_bytes) >= memory.mapped_pages());
        let memory = Arc::new(memory);
        let faults = Faults::open()?;
        faults.register_staging(memory.staging_base() as *mut u8, memory.staging_len())?;
        if let Some(base) = memory.own_base() {
            memory.map_in(&faults, 0, base)?;
        }
        let outside = config.memory_bytes.saturating_sub(config.budget_bytes);
        let needed = if config.store.overcommit { 0 } else { outside };
        let store = Arc::new(store::open(&config.store.path, config.memory_bytes, needed)?);
        let prealloc = config.prealloc && config.origin.is_none();
        let origin = config.origin.map(|origin| Layers::check(origin, pages)).transpose()?.map(Arc::new);
        if let Some(cipher) = origin.as_ref().and_then(|origin| origin.cipher()).filter(|_| config.lock) {
            cipher.lock().map_err(|source| HostError::Key { source })?;
        }
        let mailbox = Arc::new(Mailbox::new().map_err(|source| HostError::Eventfd { source })?);
        let cipher = config.store.encrypt.then(|| Cipher::random(config.lock)).transpose();
        let cipher = cipher.map_err(|source| HostError::Key { source })?.map(Arc::new);
        let handle = EngineHandle {
            mailbox: mailbox.clone(),
            memory: memory.clone(),
            store: store.clone(),
            cipher: cipher.clone(),
            origin: origin.clone(),
        };
        let discarder = Discarder::of(&store, &mailbox)
            .map_err(|source| HostError::Thread { what: "a thread", source })?;
        let core = Core::new(CoreConfig {
            pages,
            budget_frames: pages_in(config.budget_bytes),
            budget_min: BUDGET_MIN,
            slots: staging.slots,
            blocks: staging.blocks,
            sampling: config.sampling,
            walk: WalkStep::default(),
        })
        .with_short_blocks(memory.short_blocks());
        let core = if origin.is_some() { core.with_origin() } else { core };
        let (started, start) = mpsc::channel();
        let thread_memory = memory.clone();
        let run = move || {
            // The ring belongs to the thread that makes it.
            let ring = match Ring::new(store, origin.clone(), faults.fd(), mailbox.fd()) {
                Ok(ring) => ring,
                Err(error) => return drop(started.send(Err(error))),
            };
            let mut driver = Driver {
                core,
                faults,
                ring,
                origin,
                memory: thread_memory,
                mailbox,
                sealer: cipher.map(Sealer::new),
                notify,
                latencies: LatencyBook::new(),
                recorder: Default::default(),
                replies: Default::default(),
                next_ticket: 0,
                page_outs: Vec::new(),
                sums: Vec::new(),
                faulted: Vec::new(),
                read_error_told: None,
                discarder,
                drops: Vec::new(),
                drop_error_told: None,
                silent: Default::default(),
                prealloc,
            };
            if driver.prealloc && driver.memory.is_whole() {
                driver.memory.runs_of(0).for_each(|run| driver.prealloc(run));
            }
            let _ = started.send(Ok(()));
            let _end = AbortOnPanic;
            driver.run();
        };
        let thread = std::thread::Builder::new()
            .name("vmemd-engine".into())
            .spawn(run)
            .map_err(|source| HostError::Thread { what: "the engine's thread", source })?;
        match start.recv() {
            Ok(Ok(())) => Ok(Engine { handle, memory, thread: Some(thread) }),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(HostError::ThreadEnded.into()),
        }
    }

    /// A handle to this engine, for any thread. Its calls fail with [`CommandError::Gone`](crate::CommandError::Gone)
    /// once the engine has ended.
    pub fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }

    /// Address of guest page 0.
    ///
    /// # Panics
    /// If the memory is external, and its first region not attached.
    pub fn memory_base(&self) -> *mut u8 {
        self.memory.page(PageNo(0)) as *mut u8
    }

    /// Ends the thread and gives everything back. Nothing may touch the guest's memory any more: who does would
    /// read zeros.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.handle.mailbox.close();
        if let Some(thread) = self.thread.take() {
            // A panic there has ended the process.
            let _ = thread.join();
        }
    }
}

/// Ends the process when the engine's thread panics: the VM would hang for ever at its next fault, and nobody could
/// tell why.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(
                "the engine found its own state wrong; the VM ends here rather than with wrong memory"
            );
            std::process::abort();
        }
    }
}

/// The layout of staging, for the mapping and for the core alike. It is determined once: how many blocks of slots
/// there are depends on a limit of this host, which may have changed at a second look, and a slot beyond the mapping
/// would be somebody else's memory.
#[derive(Clone, Copy)]
struct StagingSize {
    slots: u32,
    blocks: u32,
}

impl StagingSize {
    fn of(memory_bytes: u64, few: bool) -> Self {
        let pages = pages_in(memory_bytes);
        StagingSize { slots: staging_slots(pages), blocks: staging_blocks(pages, few) }
    }

    fn all_slots(self) -> u32 {
        self.slots + self.blocks * BLOCK_PAGES
    }
}

fn locked_bytes(memory_bytes: u64, few: bool) -> u64 {
    memory_bytes + Memory::staging_bytes(StagingSize::of(memory_bytes, few).all_slots()) as u64
}

/// Whether this user may not lock the address space of all blocks for samples: the kernel counts locked address
/// space, whether it has frames or not.
fn few_blocks(config: &EngineConfig) -> bool {
    let limit = locking::lock_limit();
    config.lock && limit.is_some_and(|limit| limit < locked_bytes(config.memory_bytes, false))
}

fn check(config: &EngineConfig) -> Result<(), StartError> {
    let EngineConfig { memory_bytes, budget_bytes, .. } = *config;
    let block = bytes_of(u64::from(BLOCK_PAGES));
    if memory_bytes == 0 || !memory_bytes.is_multiple_of(block) {
        return Err(BudgetError::NotBlocks { memory_bytes }.into());
    }
    let minimum_bytes = Engine::MIN_BUDGET_BYTES;
    if budget_bytes < minimum_bytes {
        return Err(BudgetError::TooSmall { budget_bytes, minimum_bytes }.into());
    }
    if budget_bytes > memory_bytes.max(minimum_bytes) {
        return Err(BudgetError::AboveMemory { budget_bytes, memory_bytes }.into());
    }
    if let Some(available_bytes) = host_available_bytes()
        && budget_bytes > available_bytes
    {
        return Err(BudgetError::AboveHost { needed_bytes: budget_bytes, available_bytes }.into());
    }
    if config.lock { Engine::check_lock(memory_bytes) } else { Ok(()) }
}

fn check_regions(config: &EngineConfig, regions: &[u64]) -> Result<(), BudgetError> {
    let memory_bytes = config.memory_bytes;
    let pages = |bytes: u64| bytes != 0 && bytes.is_multiple_of(PAGE_SIZE as u64);
    if let Some(&region_bytes) = regions.iter().find(|bytes| !pages(**bytes)) {
        return Err(BudgetError::NotPages { region_bytes });
    }
    let together = regions.iter().try_fold(0u64, |sum, bytes| sum.checked_add(Engine::rounded(*bytes)?));
    if together != Some(memory_bytes) {
        return Err(BudgetError::NotTheMemory { regions: regions.to_vec(), memory_bytes });
    }
    Ok(())
}

/// Bytes of RAM that the host could give without swapping.
fn host_available_bytes() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
