//! The mappings of a VM: guest memory (the engine's own, or regions that its owner maps) and staging. All anonymous,
//! locked alike.
//!
//! ```text
//! staging:  slots for single frames │ blocks of slots for huge pages │ the bay
//! ```
//! Only the bay, a 2 MiB block that is empty between two uses, may get a huge page by being touched. While the budget
//! covers all memory, guest memory is advised to have huge pages too (`MADV_HUGEPAGE`): not so that a fault takes
//! one, which userfaultfd forbids, but so that the kernel makes no page table for single frames where a vCPU faults.
//! Where there is one, no huge page can be moved to.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::{MmapMut, MmapOptions};

use super::locking::lock_on_fault;
use super::regions::Regions;
use super::uffd::Faults;
use crate::error::{MemoryError, StartError};
use swapcore::units::{BLOCK_PAGES, PAGE_SIZE, PageNo, Run, Slot, SlotRun};

/// Bytes of a huge page.
const BLOCK: usize = BLOCK_PAGES as usize * PAGE_SIZE;
/// Guest memory of the engine's own and staging start on such a boundary, so that their 2 MiB blocks are the page
/// tables' own.
const ALIGN: usize = BLOCK;

/// Address space that is reserved; it gets frames by faults and moves alone.
#[derive(Debug)]
struct Area {
    // Kept for its Drop. All access is by address.
    _map: MmapMut,
    base: usize,
    len: usize,
}

impl Area {
    fn reserve(len: usize) -> io::Result<Self> {
        let map = MmapOptions::new().len(len + ALIGN).no_reserve_swap().map_anon()?;
        let base = (map.as_ptr() as usize).next_multiple_of(ALIGN);
        Ok(Area { _map: map, base, len })
    }
}

/// Straight to the kernel: a process whose guest memory is its own may intercept `madvise` to hear what the guest
/// gives back, and the engine's own calls are no news to it.
fn advise(at: usize, len: usize, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: the callers pass parts of mappings that the engine has for itself, and advice that keeps them mapped.
    // No Rust reference to their content exists.
    match unsafe { libc::syscall(libc::SYS_madvise, at, len, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A VM's memory in this process.
#[derive(Debug)]
pub(crate) struct Memory {
    regions: Regions,
    /// Guest memory, unless its owner maps it.
    own: Option<Area>,
    staging: Area,
    lock: bool,
    /// The host's administrator allows huge pages. It has to be looked at here, because `MADV_COLLAPSE` ignores that
    /// setting.
    collapses: bool,
    /// Whether guest memory may have huge pages.
    huge: AtomicBool,
}

impl Memory {
    /// Guest memory of `bytes`, reserved here but not mapped in yet, and `slots` staging slots; takes no frame.
    pub(super) fn reserve(bytes: u64, slots: u32, lock: bool) -> Result<Self, MemoryError> {
        let mut memory = Self::external(&[bytes], slots, lock)?;
        memory.own = Some(reserve(bytes as usize, "guest memory")?);
        Ok(memory)
    }

    /// Guest memory that its owner maps in regions of such sizes.
    pub(super) fn external(regions: &[u64], slots: u32, lock: bool) -> Result<Self, MemoryError> {
        let staging = reserve(Self::staging_bytes(slots), "staging")?;
        prepare(staging.base, staging.len, lock, libc::MADV_NOHUGEPAGE)?;
        let memory = Memory {
            regions: Regions::new(regions),
            own: None,
            staging,
            lock,
            collapses: huge_page_mode().is_some_and(|mode| mode != "never"),
            huge: AtomicBool::new(false),
        };
        // A kernel without huge pages refuses the advice, and the bay is filled with single frames.
        let _ = advise(memory.bay(), BLOCK, libc::MADV_HUGEPAGE);
        Ok(memory)
    }

    /// Bytes of address space of staging with so many slots.
    pub(super) fn staging_bytes(slots: u32) -> usize {
        slots as usize * PAGE_SIZE + BLOCK
    }

    /// The engine's own guest memory, which is the only region then.
    pub(super) fn own_base(&self) -> Option<usize> {
        self.own.as_ref().map(|area| area.base)
    }

    /// From now on `region` is at `base`, which has passed `check`; it is empty, and its faults come to `faults`.
    pub(super) fn map_in(&self, faults: &Faults, region: usize, base: usize) -> Result<(), StartError> {
        let len = self.regions.len_of(region).unwrap_or(0);
        faults.register_guest(base as *mut u8, len)?;
        // Frames that the region has by now are not counted, and are given back. It is registered before that, so
        // that no new ones come.
        let emptied = drop_frames(base, len);
        let emptied = emptied.map_err(|source| MemoryError::NotMapped { base, bytes: len, source });
        if let Err(error) = emptied.and_then(|()| prepare(base, len, self.lock, self.huge_advice())) {
            faults.unregister(base as *mut u8, len);
            return Err(error.into());
        }
        self.regions.set_base(region, base);
        Ok(())
    }

    fn huge_advice(&self) -> libc::c_int {
        if self.huge.load(Ordering::Relaxed) { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE }
    }

    /// Whether guest memory may have huge pages from now on. Those that it has, it keeps.
    pub(super) fn allow_huge(&self, allowed: bool) {
        self.huge.store(allowed, Ordering::Relaxed);
        for (part, at) in self.pages().flat_map(|run| self.mapped_parts(run)) {
            let _ = advise(at, part.bytes(), self.huge_advice());
        }
    }

    /// Has the host put huge pages in the place of single frames, as far as it has some. The guest may touch them
    /// meanwhile, and waits for as long as one is copied; the engine may move them.
    pub(super) fn collapse(&self, at: usize, len: usize) {
        const MADV_COLLAPSE: libc::c_int = 25;
        if self.collapses {
            // A kernel before 6.1 cannot; none can where a page is pinned.
            let _ = advise(at, len, MADV_COLLAPSE);
        }
    }

    /// The bay, filled with zeros fresh from the host, in one huge page if it has one.
    pub(super) fn fill_bay(&self) -> usize {
        if advise(self.bay(), BLOCK, libc::MADV_POPULATE_WRITE).is_err() {
            // As with single frames. Whatever is there already reads as zeros.
            // SAFETY: the bay belongs to the engine's thread, which calls this.
            unsafe { std::ptr::write_bytes(self.bay() as *mut u8, 0, BLOCK) };
        }
        self.bay()
    }

    pub(super) fn empty_bay(&self) -> io::Result<()> {
        drop_frames(self.bay(), BLOCK)
    }

    pub(super) fn bay(&self) -> usize {
        self.staging.base + self.staging.len - BLOCK
    }

    /// Whether the region may be mapped in at `base`, or why not.
    pub(super) fn check(&self, region: usize, base: usize) -> Result<(), MemoryError> {
        let Some(len) = self.regions.len_of(region) else {
            return Err(MemoryError::NoRegion { region });
        };
        if let Some(base) = self.regions.base_of(region) {
            return Err(MemoryError::AttachedAlready { region, base });
        }
        if base == 0 || !base.is_multiple_of(PAGE_SIZE) || base.checked_add(len).is_none() {
            return Err(MemoryError::NoPageAddress { region, base });
        }
        let staging = self.staging.base < base + len && base < self.staging.base + self.staging.len;
        if staging || self.regions.overlap(base, len) {
            return Err(MemoryError::Overlaps { region, base, bytes: len });
        }
        Ok(())
    }

    /// Bytes of guest memory with the pages that fill up its last blocks.
    pub(crate) fn guest_len(&self) -> usize {
        self.regions.bytes()
    }

    /// Pages of guest memory, without those that fill up blocks.
    pub(super) fn mapped_pages(&self) -> u64 {
        self.pages().map(|run| u64::from(run.len)).sum()
    }

    /// The pages of each block that is only partly memory.
    pub(super) fn short_blocks(&self) -> Vec<Run> {
        self.regions.short_blocks()
    }

    /// All pages of guest memory.
    pub(super) fn pages(&self) -> impl Iterator<Item = Run> {
        self.regions.all()
    }

    /// All pages of a region; none if there is no such region.
    pub(super) fn runs_of(&self, region: usize) -> impl Iterator<Item = Run> + use<> {
        self.regions.runs_of(region)
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.regions.are_all_mapped()
    }

    pub(super) fn staging_base(&self) -> usize {
        self.staging.base
    }

    pub(super) fn staging_len(&self) -> usize {
        self.staging.len
    }

    /// # Panics
    /// If it is in a region that is not mapped: such a page is untouched, so there is no cause to go to it.
    pub(crate) fn page(&self, page: PageNo) -> usize {
        self.first_part(Run::one(page)).1
    }

    /// The run, cut at the borders of regions, each part with its address, without those of regions that are not
    /// mapped.
    pub(super) fn mapped_parts(&self, run: Run) -> impl Iterator<Item = (Run, usize)> {
        self.regions.mapped_parts(run)
    }

    /// The first part of a run of which every page has been touched.
    ///
    /// # Panics
    /// As [`Memory::page`].
    pub(super) fn first_part(&self, run: Run) -> (Run, usize) {
        let first = self.mapped_parts(run).next().filter(|(part, _)| part.start == run.start);
        first.unwrap_or_else(|| panic!("{run:?} is not in mapped guest memory"))
    }

    pub(crate) fn slot(&self, slot: Slot) -> usize {
        self.staging.base + slot.offset()
    }

    /// The page that an address of guest memory belongs to.
    pub(crate) fn page_at(&self, address: usize) -> Option<PageNo> {
        self.regions.page_at(address)
    }

    /// The pages that lie wholly within an address range.
    pub(crate) fn runs_in(&self, address: usize, len: usize) -> Vec<Run> {
        self.regions.runs_in(address, len)
    }

    /// The content of staging slots whose frames are the engine's at this moment.
    ///
    /// # Safety
    /// The slots must hold frames, and nobody (guest, device, receiving session) may change them for the slice's life.
    pub(super) unsafe fn slot_bytes(&self, slots: SlotRun) -> &[u8] {
        // SAFETY: within the staging mapping by construction of slot numbers; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.slot(slots.start) as *const u8, slots.bytes()) }
    }

    /// The content of staging slots, to be changed.
    ///
    /// # Safety
    /// As for [`Memory::slot_bytes`], and nobody may read them either.
    #[expect(clippy::mut_from_ref, reason = "the slots belong to the caller, not to this")]
    pub(super) unsafe fn slot_bytes_mut(&self, slots: SlotRun) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.slot(slots.start) as *mut u8, slots.bytes()) }
    }

    pub(super) fn copy_slot(&self, from: Slot, to: Slot) {
        // SAFETY: two different slots of the staging mapping; the device may read `from` at the same time, which is
        // no write.
        unsafe {
            std::ptr::copy_nonoverlapping(self.slot(from) as *const u8, self.slot(to) as *mut u8, PAGE_SIZE);
        }
    }

    /// Makes the frames in `slots` read as zeros. Fresh ones are taken from the host, all at once.
    pub(super) fn zero_slots(&self, slots: SlotRun, fresh: bool) {
        let at = self.slot(slots.start);
        // If the host refuses to populate, the first touch below takes the frames one by one.
        if fresh && advise(at, slots.bytes(), libc::MADV_POPULATE_WRITE).is_ok() {
            return;
        }
        // SAFETY: slots of the staging mapping that the core has just taken: nobody else uses them.
        unsafe { std::ptr::write_bytes(at as *mut u8, 0, slots.bytes()) };
    }

    /// Gives the frames of staging slots back to the host.
    pub(super) fn release_slots(&self, slots: SlotRun) -> io::Result<()> {
        drop_frames(self.slot(slots.start), slots.bytes())
    }

    /// Gives the guest's frames back to the host; the range is missing afterwards.
    pub(super) fn drop_guest(&self, run: Run) -> io::Result<()> {
        self.mapped_parts(run).try_for_each(|(part, at)| drop_frames(at, part.bytes()))
    }
}

/// Gives frames back to the host. MADV_DONTNEED refuses locked memory; MADV_DONTNEED_LOCKED (Linux 5.18) does not.
fn drop_frames(at: usize, len: usize) -> io::Result<()> {
    const MADV_DONTNEED_LOCKED: libc::c_int = 24;
    advise(at, len, MADV_DONTNEED_LOCKED)
}

fn reserve(bytes: usize, what: &'static str) -> Result<Area, MemoryError> {
    Area::reserve(bytes).map_err(|source| MemoryError::Reserve { what, bytes, source })
}

/// Makes a mapping fit for frames to come and go by moves.
fn prepare(base: usize, len: usize, lock: bool, huge: libc::c_int) -> Result<(), MemoryError> {
    // A kernel without huge pages has none to switch on or off, one without dumps none to leave out.
    // Nor may the host merge pages (KSM), even if that is on for the whole process: a merged page cannot be moved.
    for advice in [huge, libc::MADV_DONTFORK, libc::MADV_DONTDUMP, libc::MADV_UNMERGEABLE] {
        let _ = advise(base, len, advice);
    }
    if lock { lock_on_fault(base, len) } else { Ok(()) }
}

/// What this host's administrator has set for transparent huge pages (`always`, `madvise`, `never`); none if its
/// kernel has none.
pub fn huge_page_mode() -> Option<String> {
    let modes = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    Some(modes.split_once('[')?.1.split_once(']')?.0.to_owned())
}
