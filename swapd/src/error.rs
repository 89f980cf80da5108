//! Why an engine cannot start: the kinds, each with its facts, and the words for the operator.
//!
//! The text of an error here is whole: it says what to do, and names the cause where the cause helps. `source` has the
//! cause for programs; whoever prints it behind the text prints it twice.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use crate::origin::OriginError;
use swapcore::error::CommandError;

/// Why an engine could not start. Each text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The memory or the RAM budget asked for cannot be had.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// No permission, or no such feature in this kernel.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The store cannot be opened, or has too little room.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The files that pages are to come from do not fit the VM.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// The VM's memory cannot be mapped, or is not what an engine can serve.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// What is wrong with the memory or the RAM budget asked for.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the texts say what the fields are")]
pub enum BudgetError {
    /// The memory is not whole blocks.
    #[error("a memory of {memory_bytes} bytes is not a multiple of 2 MiB; choose one that is")]
    NotBlocks { memory_bytes: u64 },
    /// A budget that no VM can work with.
    #[error(
        "a RAM budget of {budget_bytes} bytes is below the minimum of {minimum_bytes}; give the VM at least 16M"
    )]
    TooSmall { budget_bytes: u64, minimum_bytes: u64 },
    /// A budget that no VM of this size can use.
    #[error(
        "a RAM budget of {budget_bytes} bytes is above the VM's memory of {memory_bytes}; lower one or raise the other"
    )]
    AboveMemory { budget_bytes: u64, memory_bytes: u64 },
    /// The host has not got the budget.
    #[error(
        "a RAM budget of {needed_bytes} bytes is more than the {available_bytes} bytes that this host has available; \
         lower the budget or free some memory"
    )]
    AboveHost { needed_bytes: u64, available_bytes: u64 },
    /// A region of external memory is not whole pages.
    #[error("a memory region of {region_bytes} bytes is not a multiple of 4 KiB; choose one that is")]
    NotPages { region_bytes: u64 },
    /// The regions of external memory are not the VM's memory.
    #[error(
        "memory regions of {regions:?} bytes are not the VM's memory of {memory_bytes} bytes; give each of its \
         regions once"
    )]
    NotTheMemory { regions: Vec<u64>, memory_bytes: u64 },
}

/// What this host lacks, or does not permit.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the texts say what the fields are")]
pub enum HostError {
    /// This user may lock less than the VM's address space.
    #[error(
        "the VM's memory cannot be locked against the host's swap: that takes {needed_bytes} bytes, and this user may \
         lock {available_bytes} (`ulimit -l`, in KiB); raise the limit (memlock in /etc/security/limits.conf, systemd's \
         LimitMEMLOCK=infinity), or do without by --no-lock"
    )]
    LockLimit { needed_bytes: u64, available_bytes: u64 },
    /// `/dev/userfaultfd` is there, and not for this user.
    #[error(
        "no permission to use userfaultfd ({}); give this user access to /dev/userfaultfd, or run as root",
        chain(&**.source)
    )]
    FaultsDevice { source: Box<dyn Error + Send + Sync> },
    /// There is no `/dev/userfaultfd`, and the system call is not for this user.
    #[error(
        "no permission to use userfaultfd ({}); run as root, give access to /dev/userfaultfd, or set the sysctl \
         vm.unprivileged_userfaultfd=1",
        chain(&**.source)
    )]
    FaultsPermission { source: Box<dyn Error + Send + Sync> },
    /// The kernel is older than the features that the engine needs.
    #[error(
        "this kernel's userfaultfd cannot move pages ({}); vmemd needs Linux 6.8 or newer (Ubuntu 24.04, Debian 13 or \
         12 with the backports kernel, Fedora 40, RHEL 10)",
        chain(&**.source)
    )]
    FaultsTooOld { source: Box<dyn Error + Send + Sync> },
    /// The kernel has been built without it.
    #[error("this kernel has no userfaultfd ({}); it needs CONFIG_USERFAULTFD", chain(&**.source))]
    FaultsMissing { source: Box<dyn Error + Send + Sync> },
    /// No userfaultfd, for a reason of which nothing else is known.
    #[error("cannot open a userfaultfd: {}", chain(&**.source))]
    Faults { source: Box<dyn Error + Send + Sync> },
    /// Memory that the kernel does not report faults of.
    #[error("cannot register memory with userfaultfd: {}", chain(&**.source))]
    Register { source: Box<dyn Error + Send + Sync> },
    /// The file in which the engine looks for moves that the kernel has forgotten.
    #[error("cannot open /proc/self/pagemap ({source}); is /proc mounted?")]
    Pagemap { source: io::Error },
    /// No io_uring, by the administrator's or a sandbox's will.
    #[error("io_uring is switched off on this host ({source}); set the sysctl kernel.io_uring_disabled=0")]
    RingOff { source: io::Error },
    /// No io_uring, or one without what the engine needs.
    #[error("cannot create an io_uring ({source}); vmemd needs Linux 6.8 or newer")]
    Ring { source: io::Error },
    /// The ring does not take the store's file.
    #[error("cannot register the store with io_uring: {source}")]
    RingStore { source: io::Error },
    /// No descriptor to wake the engine by.
    #[error("eventfd: {source}")]
    Eventfd { source: io::Error },
    /// No key for the store, or none that stays out of the host's swap.
    #[error(
        "cannot make a key for the store, or keep it out of the host's swap: {source}; see `ulimit -l`, or give up \
         locking with --no-lock"
    )]
    Key { source: io::Error },
    /// No thread for `what`.
    #[error("cannot start {what}: {source}")]
    Thread { what: &'static str, source: io::Error },
    /// The engine's thread has ended before it could say why it cannot run.
    #[error("the engine's thread ended at its start")]
    ThreadEnded,
    /// The engine has ended before it took over a region of memory.
    #[error(transparent)]
    Ended(CommandError),
}

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the texts say what the fields are")]
pub enum StoreError {
    /// Nothing that could be looked at is there.
    #[error("cannot use {} as store: {source}; create the directory, or name another one", .path.display())]
    Unusable { path: PathBuf, source: io::Error },
    /// A plain file, or another thing that is no store.
    #[error("{} is neither a directory nor a block device; name one as the store", .path.display())]
    NeitherKind { path: PathBuf },
    /// The file system does not say how much room it has.
    #[error("cannot ask for the free space of {}: {source}", .path.display())]
    FreeSpace { path: PathBuf, source: io::Error },
    /// Less room than the part of the VM that does not fit into RAM.
    #[error(
        "the store {} has {available_bytes} bytes free, and {needed_bytes} bytes of the VM do not fit into its RAM \
         budget; free some space, name another store, raise the budget, or start with --store-overcommit if it will \
         not touch all of its memory",
        .path.display()
    )]
    NoRoom { path: PathBuf, needed_bytes: u64, available_bytes: u64 },
    /// The file system refuses a file of the VM's size, sparse as it is.
    #[error("cannot make a sparse file of {needed_bytes} bytes in {}: {source}", .path.display())]
    SparseFile { path: PathBuf, needed_bytes: u64, source: io::Error },
    /// The block device is smaller than the VM's memory.
    #[error(
        "the device {} has {available_bytes} bytes, the VM needs {needed_bytes}; name a larger one",
        .path.display()
    )]
    SmallDevice { path: PathBuf, needed_bytes: u64, available_bytes: u64 },
    /// EINVAL: every transfer would go through the page cache.
    #[error(
        "the file system of {} cannot do direct I/O (O_DIRECT); name a store on ext4, xfs or btrfs, or a block device",
        .path.display()
    )]
    NoDirectIo { path: PathBuf, source: io::Error },
    /// EOPNOTSUPP or EISDIR: a file there would outlive the VM's process.
    #[error(
        "the file system of {} has no nameless files (O_TMPFILE); name a store on ext4, xfs or btrfs, or a block \
         device",
        .path.display()
    )]
    NoNamelessFiles { path: PathBuf, source: io::Error },
    /// EBUSY, and for longer than a VM that has just ended keeps a device.
    #[error("{} is in use (mounted, or the store of another VM); name a free device", .path.display())]
    InUse { path: PathBuf, source: io::Error },
    /// EACCES or EPERM.
    #[error("no permission to write in {}; change its owner, or name another store", .path.display())]
    NoPermission { path: PathBuf, source: io::Error },
    /// Any other refusal.
    #[error("cannot open a store in {}: {source}", .path.display())]
    Open { path: PathBuf, source: io::Error },
}

/// Why memory cannot be a VM's.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the texts say what the fields are")]
pub enum MemoryError {
    /// No address space.
    #[error("cannot reserve {bytes} bytes of address space for {what} ({source}); see `ulimit -v`")]
    Reserve { what: &'static str, bytes: usize, source: io::Error },
    /// The kernel does not lock it, whatever the limit said.
    #[error(
        "cannot lock {bytes} bytes of the VM's memory against the host's swap ({source}); raise the limit \
         (`ulimit -l`, systemd's LimitMEMLOCK=infinity), or do without by --no-lock"
    )]
    Lock { bytes: usize, source: io::Error },
    /// A region is not all mapped, or not private and anonymous.
    #[error(
        "{bytes} bytes at {base:#x} cannot be guest memory ({source}); map all of them first, private and anonymous"
    )]
    NotMapped { base: usize, bytes: usize, source: io::Error },
    /// A number beyond the last region's.
    #[error("the VM's memory has no region {region}")]
    NoRegion { region: usize },
    /// A region has one place, until the engine ends.
    #[error("region {region} is attached already, at {base:#x}")]
    AttachedAlready { region: usize, base: usize },
    /// Where no page begins, or where the region's end would be no address.
    #[error("region {region} cannot be at {base:#x}: that is no page's address")]
    NoPageAddress { region: usize, base: usize },
    /// Staging or another region is there.
    #[error("region {region}, {bytes} bytes at {base:#x}, overlaps memory that is in use already")]
    Overlaps { region: usize, base: usize, bytes: usize },
}

/// An error with its causes, as one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error: &&(dyn Error + 'static)| (*error).source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(errno: i32) -> io::Error {
        io::Error::from_raw_os_error(errno)
    }

    /// The cause is in the text and behind `source`, at every depth of the kinds.
    #[test]
    fn an_error_says_what_to_do_and_keeps_its_cause() {
        let path = PathBuf::from("/srv/store");
        let cases: [(StartError, &str); 4] = [
            (
                StoreError::Unusable { path: path.clone(), source: refused(libc::ENOENT) }.into(),
                "cannot use /srv/store as store: No such file or directory (os error 2); create the directory, or name \
                 another one",
            ),
            (
                StoreError::InUse { path, source: refused(libc::EBUSY) }.into(),
                "/srv/store is in use (mounted, or the store of another VM); name a free device",
            ),
            (
                HostError::FaultsMissing { source: Box::new(refused(libc::ENOSYS)) }.into(),
                "this kernel has no userfaultfd (Function not implemented (os error 38)); it needs CONFIG_USERFAULTFD",
            ),
            (
                MemoryError::Lock { bytes: 4096, source: refused(libc::ENOMEM) }.into(),
                "cannot lock 4096 bytes of the VM's memory against the host's swap (Cannot allocate memory (os error \
                 12)); raise the limit (`ulimit -l`, systemd's LimitMEMLOCK=infinity), or do without by --no-lock",
            ),
        ];
        for (error, text) in cases {
            assert_eq!(error.to_string(), text);
            let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
            assert!(cause.is_some_and(|cause| cause.raw_os_error().is_some()), "{error:?}");
        }
    }
}
