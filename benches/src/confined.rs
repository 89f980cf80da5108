//! Where the kernel's swap is measured: a swap file, and a memory cgroup for the processes that shall swap to it.

use std::fs::File;
use std::path::Path;

use vmprocess::failure::Failure;

use super::cgroup::MemoryCgroup;
use super::left::{PREFIX, SWAP_FILE};
use super::swapfile::SwapFile;

/// What the processes in the cgroup take besides the memory that is measured and its page tables: the daemon's and
/// the VM's own pages (7 MB measured), socket buffers.
pub(crate) const PROCESS_ALLOWANCE_BYTES: u64 = 16 << 20;
/// A page table entry of 8 bytes for each page of 4 KiB.
pub(crate) const PAGE_TABLE_SHARE: u64 = 512;

/// Dropped in this order: the cgroup with the processes in it, then what they were swapping to.
#[derive(Debug)]
pub(crate) struct Confined {
    cgroup: MemoryCgroup,
    _swap: SwapFile,
}

impl Confined {
    /// The swap file is made in `dir`; the cgroup's name ends with `label`.
    pub(crate) fn new(
        dir: &Path,
        label: &str,
        swap_bytes: u64,
        limit_bytes: u64,
    ) -> Result<Confined, Failure> {
        let swap = SwapFile::create(&dir.join(SWAP_FILE), swap_bytes)?;
        let name = format!("{PREFIX}{}-{label}", std::process::id());
        Ok(Confined { cgroup: MemoryCgroup::create(&name, limit_bytes)?, _swap: swap })
    }

    /// See [`MemoryCgroup::entrance`].
    pub(crate) fn entrance(&self) -> Result<File, Failure> {
        self.cgroup.entrance()
    }

    /// A failure of a process that may have run in it, with the kernel's part in it.
    pub(crate) fn explain(confined: Option<&Confined>, mut failure: Failure) -> Failure {
        if confined.is_some_and(|confined| confined.cgroup.oom_kills() > 0) {
            failure.text += " (the kernel killed it: it needed more memory than its cgroup allows)";
        }
        failure
    }
}
