//! A memory cgroup of the benchmark's own, v1 or v2. Removed when dropped.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmprocess::failure::{Failure, FailureKind};

use super::left::{PREFIX, kill};

/// How long the kernel may take to let go of processes that were killed.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);
/// Bytes a second, several times as fast as a kernel here swaps out. A cgroup's statistics are read as often as its
/// limit could be swapped out at this pace.
const FASTEST_BYTES_PER_MS: u64 = 2 << 20;
const REFRESH_MS_MAX: u64 = 500;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The hierarchy in which the memory controller is.
fn controller() -> Result<(PathBuf, Version), Failure> {
    let mounts = fs::read_to_string("/proc/self/mounts")
        .map_err(|error| Failure::io("cannot read /proc/self/mounts", &error))?;
    find_controller(&mounts, |root| {
        fs::read_to_string(root.join("cgroup.controllers"))
            .is_ok_and(|all| all.split_whitespace().any(|one| one == "memory"))
    })
    .ok_or_else(|| {
        Failure::new(
            FailureKind::Host,
            "this host has no memory cgroups (mount cgroup2 with the memory controller)",
        )
    })
}

fn find_controller(mounts: &str, v2_has_memory: impl Fn(&Path) -> bool) -> Option<(PathBuf, Version)> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (root, kind, options) = (PathBuf::from(fields.next()?), fields.next()?, fields.next()?);
        match kind {
            "cgroup" if options.split(',').any(|option| option == "memory") => Some((root, Version::One)),
            "cgroup2" if v2_has_memory(&root) => Some((root, Version::Two)),
            _ => None,
        }
    })
}

/// A group whose processes may use so much memory together.
#[derive(Debug)]
pub struct MemoryCgroup {
    path: PathBuf,
}

impl MemoryCgroup {
    /// # Errors
    /// [`FailureKind::Host`] if this user may not, or there is no memory controller.
    pub fn create(name: &str, limit_bytes: u64) -> Result<MemoryCgroup, Failure> {
        let (root, version) = controller()?;
        let path = root.join(name);
        let fail = |error: std::io::Error| {
            Failure::new(
                FailureKind::Host,
                format!("cannot make the memory cgroup {} (needs root): {error}", path.display()),
            )
        };
        if version == Version::Two {
            fs::write(root.join("cgroup.subtree_control"), "+memory").map_err(fail)?;
        }
        fs::create_dir(&path).map_err(fail)?;
        let cgroup = MemoryCgroup { path: path.clone() };
        let limit = match version {
            Version::One => "memory.limit_in_bytes",
            Version::Two => "memory.max",
        };
        fs::write(path.join(limit), limit_bytes.to_string()).map_err(fail)?;
        let period = Duration::from_millis((limit_bytes / FASTEST_BYTES_PER_MS).clamp(1, REFRESH_MS_MAX));
        let kept = path.clone();
        std::thread::Builder::new().spawn(move || keep_fresh(&kept, period)).map_err(fail)?;
        Ok(cgroup)
    }

    /// How many of its processes the kernel has killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        // v1 and v2.
        let read = |file| fs::read_to_string(self.path.join(file)).unwrap_or_default();
        let text = read("memory.oom_control") + &read("memory.events");
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok());
        count.unwrap_or(0)
    }

    /// The file by which a process joins the group: whoever writes `0` to it is in.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn entrance(&self) -> Result<fs::File, Failure> {
        let path = self.path.join("cgroup.procs");
        fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .map_err(|error| Failure::io(format!("cannot open {}", path.display()), &error))
    }
}

/// Reads a cgroup's statistics again and again until the cgroup is gone: each reading makes the kernel add them up.
/// Otherwise the kernel does so every 2 s (Linux 6.18, `FLUSH_TIME`), and until then its reclaim goes by the old
/// number of inactive pages (`inactive_is_low`). In a cgroup of 32 MiB all inactive pages can be swapped out within
/// that time; the kernel then deactivates no others, finds nothing to reclaim, and kills a process although the swap
/// file is nearly empty.
fn keep_fresh(path: &Path, period: Duration) {
    while fs::read(path.join("memory.stat")).is_ok() {
        std::thread::sleep(period);
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            let _ = writeln!(
                std::io::stderr(),
                "vmemd: could not remove the cgroup {}: {error}",
                self.path.display()
            );
        }
    }
}

/// Kills all processes of a cgroup, and removes the cgroup.
fn remove(path: &Path) -> std::io::Result<()> {
    let deadline = Instant::now() + EMPTY_TIMEOUT;
    loop {
        for pid in fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default().lines() {
            if let Ok(pid) = pid.parse::<i32>() {
                kill(pid);
            }
        }
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

/// Removes cgroups whose name `is_left` says to be of a benchmark that is gone.
pub(super) fn remove_left(is_left: impl Fn(&str) -> bool) {
    let Ok((root, _)) = controller() else { return };
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(&is_left) {
            let _ = remove(&entry.path());
        }
    }
}

/// Whether this user can make memory cgroups and swap files, and how.
///
/// # Errors
/// [`FailureKind::Host`] with what is missing.
pub fn available() -> Result<String, Failure> {
    let (root, version) = controller()?;
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::new(FailureKind::Host, "memory cgroups and swap files need root"));
    }
    let probe = MemoryCgroup::create(&format!("{PREFIX}{}-probe", std::process::id()), 1 << 30)?;
    drop(probe);
    Ok(format!("cgroup {} at {}", if version == Version::One { "v1" } else { "v2" }, root.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_controller_is_found_in_either_version() {
        let v1 = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                  cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(find_controller(v1, |_| false), Some(("/sys/fs/cgroup/memory".into(), Version::One)));
        let v2 = "cgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n";
        assert_eq!(find_controller(v2, |_| true), Some(("/sys/fs/cgroup".into(), Version::Two)));
        assert_eq!(find_controller(v2, |_| false), None);
    }
}
