//! The two mappings of a VM: guest memory and staging. Both anonymous, locked alike, without huge pages.

use std::io;

use memmap2::{MmapMut, MmapOptions};

use crate::units::{PAGE_SIZE, PageNo, Run, Slot, SlotRun};

/// Guest memory starts on such a boundary, so that its 2 MiB blocks are the page tables' own.
const ALIGN: usize = 2 << 20;

/// Reserved address space; frames come to it by faults and moves alone.
#[derive(Debug)]
struct Area {
    // Held for its Drop; all access is by address.
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

    fn advise(&self, advice: libc::c_int) -> io::Result<()> {
        advise(self.base, self.len, advice)
    }
}

fn advise(at: usize, len: usize, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: the callers pass parts of mappings that this module owns, and advice that keeps them mapped. No Rust
    // reference to their content exists.
    match unsafe { libc::madvise(at as *mut libc::c_void, len, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A VM's memory in this process.
#[derive(Debug)]
pub(crate) struct Memory {
    guest: Area,
    staging: Area,
}

impl Memory {
    /// Reserves guest memory of `bytes` and `slots` staging slots; takes no frame.
    pub(super) fn reserve(bytes: u64, slots: u32, lock: bool) -> Result<Self, String> {
        let reserve = |len: usize, what: &str| {
            Area::reserve(len).map_err(|error| {
                format!("cannot reserve {len} bytes of address space for {what} ({error}); see `ulimit -v`")
            })
        };
        let memory = Memory {
            guest: reserve(bytes as usize, "guest memory")?,
            staging: reserve(slots as usize * PAGE_SIZE, "staging")?,
        };
        for area in [&memory.guest, &memory.staging] {
            // A kernel without huge pages has none to switch off, one without dumps none to leave out.
            for advice in [libc::MADV_NOHUGEPAGE, libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
                let _ = area.advise(advice);
            }
            if lock {
                lock_on_fault(area)?;
            }
        }
        Ok(memory)
    }

    pub(crate) fn guest_base(&self) -> usize {
        self.guest.base
    }

    pub(crate) fn guest_len(&self) -> usize {
        self.guest.len
    }

    pub(super) fn staging_base(&self) -> usize {
        self.staging.base
    }

    pub(super) fn staging_len(&self) -> usize {
        self.staging.len
    }

    pub(crate) fn page(&self, page: PageNo) -> usize {
        self.guest.base + page.offset() as usize
    }

    pub(crate) fn slot(&self, slot: Slot) -> usize {
        self.staging.base + slot.offset()
    }

    /// The page that an address of guest memory belongs to.
    pub(super) fn page_at(&self, address: usize) -> Option<PageNo> {
        let offset = address.checked_sub(self.guest.base)?;
        (offset < self.guest.len).then(|| PageNo::from_offset(offset as u64))
    }

    /// The content of staging slots whose frames are the engine's at this moment.
    ///
    /// # Safety
    /// The slots must hold frames, and nobody (guest, device, receiving session) may change them for the slice's life.
    pub(super) unsafe fn slot_bytes(&self, slots: SlotRun) -> &[u8] {
        // SAFETY: within the staging mapping by construction of slot numbers; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.slot(slots.start) as *const u8, slots.bytes()) }
    }

    pub(super) fn copy_slot(&self, from: Slot, to: Slot) {
        // SAFETY: two different slots of the staging mapping; the device may read `from` at the same time, which is no write.
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
        drop_frames(self.page(run.start), run.bytes())
    }
}

/// Locked memory is not given up by MADV_DONTNEED, but by its variant of Linux 5.18.
fn drop_frames(at: usize, len: usize) -> io::Result<()> {
    const MADV_DONTNEED_LOCKED: libc::c_int = 24;
    advise(at, len, MADV_DONTNEED_LOCKED)
}

fn lock_on_fault(area: &Area) -> Result<(), String> {
    // SAFETY: the range is a mapping of this module; locking changes nothing of its content.
    let result = unsafe { libc::mlock2(area.base as *const libc::c_void, area.len, libc::MLOCK_ONFAULT) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    Err(format!(
        "cannot lock the VM's frames against the host's swap ({error}); raise the limit (`ulimit -l`, systemd's \
         LimitMEMLOCK=infinity), or give up locking with --no-lock"
    ))
}
