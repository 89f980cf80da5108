//! A control group of a test: limits that the kernel sets to a process, by cgroups of either version.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A limit of a group.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Limit<'a> {
    /// Bytes of memory, with the page cache that the processes fill.
    Memory(u64),
    /// Bytes a second, each way, of the device with these numbers.
    Disk { device: &'a str, bytes_per_s: u64 },
}

/// Removed when dropped; what is in it must have ended by then.
#[derive(Debug)]
pub(crate) struct Group(PathBuf);

impl Group {
    /// # Errors
    /// Why this host or this user makes no such groups.
    pub(crate) fn new(name: &str, limit: Limit<'_>) -> Result<Group, String> {
        let controller = match limit {
            Limit::Memory(_) => "memory",
            Limit::Disk { .. } => "blkio",
        };
        let (one, two) = (Path::new("/sys/fs/cgroup").join(controller), Path::new("/sys/fs/cgroup"));
        let version_one = one.join("cgroup.procs").exists();
        let write = |path: PathBuf, text: String| {
            fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))
        };
        if !version_one {
            let name = if controller == "blkio" { "io" } else { controller };
            write(two.join("cgroup.subtree_control"), format!("+{name}"))?;
        }
        let root = if version_one { &one } else { two };
        let group = Group(root.join(format!("{name}-{}", std::process::id())));
        fs::create_dir(&group.0).map_err(|error| format!("{}: {error}", group.0.display()))?;
        match limit {
            Limit::Memory(bytes) if version_one => group.set("memory.limit_in_bytes", bytes.to_string())?,
            Limit::Memory(bytes) => group.set("memory.max", bytes.to_string())?,
            Limit::Disk { device, bytes_per_s } if version_one => {
                group.set("blkio.throttle.read_bps_device", format!("{device} {bytes_per_s}"))?;
                group.set("blkio.throttle.write_bps_device", format!("{device} {bytes_per_s}"))?;
            }
            Limit::Disk { device, bytes_per_s } => {
                group.set("io.max", format!("{device} rbps={bytes_per_s} wbps={bytes_per_s}"))?;
            }
        }
        Ok(group)
    }

    fn set(&self, file: &str, text: String) -> Result<(), String> {
        let path = self.0.join(file);
        fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// Puts a process into it, with all of its threads.
    pub(crate) fn take(&self, pid: u32) {
        self.set("cgroup.procs", pid.to_string()).expect("a process may be put into a group");
    }

    pub(crate) fn path(&self) -> std::path::Display<'_> {
        self.0.display()
    }

    /// The number of times that an allocation met the limit of its memory.
    pub(crate) fn pressure(&self) -> u64 {
        let read = |file: &str| fs::read_to_string(self.0.join(file)).unwrap_or_default();
        let one = read("memory.failcnt").trim().parse().unwrap_or(0);
        let two = read("memory.events");
        let two = two.lines().find_map(|line| line.strip_prefix("max ")?.parse().ok());
        two.unwrap_or(one)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Those that were killed are in it until the kernel has let go of their memory.
        let deadline = Instant::now() + Duration::from_secs(20);
        while fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
