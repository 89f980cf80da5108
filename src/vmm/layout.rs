//! Where things are in the guest's memory. Every offset is one into its RAM, which is also the guest's virtual
//! address; only physical addresses make way for the hole below 4 GiB.
//!
//! ```text
//! 0x0000 unused       0x2000 GDT, TSS     0x8000 a page a vCPU    0x20000 page tables   ledger   data ...
//! 0x1000 header       0x3000 program      0x10000 zipf table              │               │        │
//!                                                    PML4, PDPTs, a PD a GiB   u32 a page, from page 0
//! ```

use std::ops::Range;

use vmprocess::size::Size;

use crate::vmm::config::MachineConfig;
use crate::vmm::content::PAGE_BYTES;
use crate::vmm::error::VmmError;
use crate::vmm::limits::{MEMORY_MAX, MEMORY_MIN, MEMORY_STEP, VCPUS_MAX};

pub(super) const PAGE: u64 = PAGE_BYTES as u64;
pub(super) const HEADER: u64 = 0x1000;
pub(super) const GDT: u64 = 0x2000;
pub(super) const TSS: u64 = 0x2400;
pub(super) const PROGRAM: u64 = 0x3000;
pub(super) const BLOCKS: u64 = 0x8000;
pub(super) const ZIPF_TABLE: u64 = 0x1_0000;
pub(super) const TABLES: u64 = 0x2_0000;

/// RAM below the hole, and where RAM goes on above it.
pub(super) const HOLE_START: u64 = 3 << 30;
pub(super) const HOLE_END: u64 = 4 << 30;

/// Address space that a page directory maps, and a directory pointer table.
pub(super) const DIRECTORY_SPAN: u64 = 1 << 30;
pub(super) const POINTERS_SPAN: u64 = 512 << 30;

const _: () = assert!(BLOCKS + VCPUS_MAX as u64 * PAGE <= ZIPF_TABLE);
const _: () = assert!(ZIPF_TABLE + (super::zipf::TABLE_ENTRIES as u64) * 4 <= TABLES);
const _: () = assert!(MEMORY_MAX.0 / PAGE <= 1 << 32);
const _: () = assert!((MEMORY_MAX.0 - HOLE_START) / PAGE < (1 << 31) - 1);

/// The sizes and places that depend on how much memory there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) memory_bytes: u64,
    pub(super) pointers: u64,
    pub(super) directories: u64,
    pub(super) ledger: u64,
    pub(super) data: u64,
}

/// A contiguous part of memory in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) first: u64,
    pub(super) pages: u64,
}

impl Layout {
    pub(super) fn new(memory_bytes: u64) -> Result<Layout, VmmError> {
        let given = Size(memory_bytes);
        if given < MEMORY_MIN {
            return Err(VmmError::TooLittleMemory { given, least: MEMORY_MIN });
        }
        if given > MEMORY_MAX {
            return Err(VmmError::TooMuchMemory { given, most: MEMORY_MAX });
        }
        if !memory_bytes.is_multiple_of(MEMORY_STEP.0) {
            return Err(VmmError::UnevenMemory(given));
        }
        let pointers = TABLES + PAGE;
        let directories = pointers + memory_bytes.div_ceil(POINTERS_SPAN) * PAGE;
        let ledger = directories + memory_bytes.div_ceil(DIRECTORY_SPAN) * PAGE;
        let data = (ledger + memory_bytes / PAGE * 4).next_multiple_of(PAGE);
        Ok(Layout { memory_bytes, pointers, directories, ledger, data })
    }

    /// The part of memory that workloads use.
    pub(super) fn data_range(&self) -> Range<u64> {
        self.data..self.memory_bytes
    }

    /// The pages of the working set and of the rest of the data.
    pub(super) fn split(&self, config: &MachineConfig) -> Result<(Share, Share), VmmError> {
        let usable = self.memory_bytes - self.data;
        let wanted = config.workload.working_set.map_or(usable, |size| size.0);
        if wanted > usable {
            return Err(VmmError::WorkingSetTooLarge {
                wanted: Size(wanted),
                memory: Size(self.memory_bytes),
                usable: Size(usable),
            });
        }
        let least = u64::from(config.vcpus) * PAGE;
        if wanted < least {
            return Err(VmmError::WorkingSetTooSmall { wanted: Size(wanted), least: Size(least) });
        }
        let set = Share { first: self.data / PAGE, pages: wanted / PAGE };
        let rest = Share { first: set.first + set.pages, pages: usable / PAGE - set.pages };
        Ok((set, rest))
    }
}

impl Share {
    /// The contiguous part of one vCPU; the last takes what the division leaves over.
    pub(super) fn part(self, vcpu: u32, vcpus: u32) -> Share {
        let each = self.pages / u64::from(vcpus);
        let before = each * u64::from(vcpu);
        let pages = if vcpu + 1 == vcpus { self.pages - before } else { each };
        Share { first: self.first + before, pages }
    }
}

/// The guest-physical address of an offset into RAM.
pub(super) fn physical(offset: u64) -> u64 {
    if offset < HOLE_START { offset } else { offset - HOLE_START + HOLE_END }
}

/// Bytes of a memory of that size that the guest needs for itself; the rest is usable as working set.
pub fn overhead_bytes(memory_bytes: u64) -> Result<u64, VmmError> {
    Layout::new(memory_bytes).map(|layout| layout.data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::workload::Workload;

    fn config(memory: &str, vcpus: u32, workload: &str) -> MachineConfig {
        let workload: Workload = workload.parse().unwrap();
        MachineConfig { memory_bytes: memory.parse::<Size>().unwrap().0, vcpus, workload }
    }

    #[test]
    fn shares_cover_the_set_once() {
        for vcpus in 1..=VCPUS_MAX {
            let config = config("64M", vcpus, "rewrite:working-set=1001K");
            let (set, rest) = Layout::new(config.memory_bytes).unwrap().split(&config).unwrap();
            for share in [set, rest] {
                let mut next = share.first;
                for vcpu in 0..vcpus {
                    let part = share.part(vcpu, vcpus);
                    assert_eq!(part.first, next);
                    next += part.pages;
                }
                assert_eq!(next, share.first + share.pages);
            }
            assert_eq!((rest.first + rest.pages) * PAGE, config.memory_bytes);
        }
    }

    #[test]
    fn own_structures_stay_small() {
        for memory in ["32M", "1G", "4G", "1T", "8T"] {
            let bytes = memory.parse::<Size>().unwrap().0;
            let overhead = overhead_bytes(bytes).unwrap();
            assert!(overhead <= (256 << 10) + bytes / 512, "{memory}: {overhead}");
        }
    }

    #[test]
    fn refuses_impossible_sizes() {
        assert!(matches!(Layout::new(16 << 20), Err(VmmError::TooLittleMemory { .. })));
        assert!(matches!(Layout::new(16 << 40), Err(VmmError::TooMuchMemory { .. })));
        assert!(matches!(Layout::new((64 << 20) + 4096), Err(VmmError::UnevenMemory(_))));
        let large = config("64M", 1, "rewrite:working-set=64M");
        let error = Layout::new(64 << 20).unwrap().split(&large).unwrap_err();
        assert!(error.to_string().contains("of 64M the guest can use"), "{error}");
        let small = config("64M", 4, "rewrite:working-set=8K");
        let error = Layout::new(64 << 20).unwrap().split(&small).unwrap_err();
        assert!(error.to_string().contains("at least 16K"), "{error}");
    }

    #[test]
    fn the_hole_is_skipped() {
        assert_eq!(physical(HOLE_START - 4096), HOLE_START - 4096);
        assert_eq!(physical(HOLE_START), HOLE_END);
    }
}
