//! Facts about this host: RAM and room on a file system that are left, and the children of a process.

use std::path::Path;

use crate::failure::{Failure, FailureKind};
use crate::size::Size;

/// Bytes of RAM that the kernel thinks can be had without swapping (`MemAvailable`).
///
/// # Errors
/// If /proc/meminfo cannot be read.
pub fn available_ram() -> Result<u64, Failure> {
    meminfo("MemAvailable")
}

/// All of the host's RAM.
///
/// # Errors
/// If /proc/meminfo cannot be read.
pub fn total_ram() -> Result<u64, Failure> {
    meminfo("MemTotal")
}

fn meminfo(field: &str) -> Result<u64, Failure> {
    let text = std::fs::read_to_string("/proc/meminfo")
        .map_err(|error| Failure::io("cannot read /proc/meminfo", &error))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok())
        .map(|kib| kib << 10)
        .ok_or_else(|| Failure::new(FailureKind::Host, format!("/proc/meminfo has no {field}")))
}

/// The processes whose parent is `parent`, as far as /proc shows them.
pub fn children_of(parent: u32) -> Vec<u32> {
    let parent_of = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything; the parent is the second field behind it.
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse::<u32>().ok()
    };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| parent_of(*pid) == Some(parent)).collect()
}

/// Fails unless so much RAM is free.
///
/// # Errors
/// [`FailureKind::Resources`], saying how much there is.
pub fn need_free_ram(bytes: u64, what: &str) -> Result<(), Failure> {
    let free = available_ram()?;
    if bytes <= free {
        return Ok(());
    }
    Err(Failure::new(
        FailureKind::Resources,
        format!(
            "{what} needs {:#} of RAM, but this host has {:#} free: choose a smaller --ram, or end something else",
            Size(bytes),
            Size(free)
        ),
    ))
}

/// Bytes that this user can still write to the file system of `path`.
///
/// # Errors
/// If there is no such path.
pub fn free_disk(path: &Path) -> Result<u64, Failure> {
    let found = rustix::fs::statvfs(path).map_err(|error| {
        Failure::io(format!("cannot look at the file system of {}", path.display()), &error.into())
    })?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Fails unless a store of so many bytes has room beside `promised` bytes of others.
///
/// # Errors
/// [`FailureKind::Resources`], saying how much there is.
pub fn need_free_disk(path: &Path, bytes: u64, promised: u64) -> Result<(), Failure> {
    let free = free_disk(path)?.saturating_sub(promised);
    if bytes <= free {
        return Ok(());
    }
    Err(Failure::new(
        FailureKind::Resources,
        format!(
            "the store needs up to {:#} in {}, where {:#} is free: make room, choose another --store, or a larger --ram",
            Size(bytes),
            path.display(),
            Size(free)
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_ram_and_disk() {
        let (free, total) = (available_ram().unwrap(), total_ram().unwrap());
        assert!(0 < free && free <= total);
        assert!(free_disk(Path::new("/")).is_ok());
        assert!(free_disk(Path::new("/no/such/place")).is_err());
        need_free_ram(4096, "a page").unwrap();
        assert_eq!(need_free_ram(u64::MAX, "all").unwrap_err().kind, FailureKind::Resources);
        assert_eq!(need_free_disk(Path::new("/"), u64::MAX, 0).unwrap_err().kind, FailureKind::Resources);
    }
}
