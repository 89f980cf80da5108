//! A control group of its own for each VM that arrives, inside the daemon's: whoever ends the daemon by ending all
//! processes of its group leaves the VMs alone, and each VM's share of the host shows under its name.
//!
//! Only where the daemon's group is left to it (systemd's `Delegate=yes`, which systemd notes in an extended attribute
//! of the group's directory); elsewhere VMs stay in the daemon's group, and only a unit with `KillMode=process` lets
//! them live on.

use std::ffi::CStr;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{io, thread};

use tracing::{debug, info, warn};

/// systemd's own hierarchy (v1), and the only one (v2).
const HIERARCHIES: [(&str, &str); 2] = [("cgroup", "name=systemd"), ("cgroup2", "")];
const DELEGATED: [&CStr; 2] = [c"trusted.delegate", c"user.delegate"];
const PREFIX: &str = "vmemd-";
/// Of a session's number, in a group's name.
const ID_DIGITS: usize = 8;

/// How long the removal of a group is tried that nobody is in, and how often.
const BUSY_LIMIT: Duration = Duration::from_secs(1);
const BUSY_RETRY: Duration = Duration::from_millis(10);

/// The groups that this daemon may divide: one a hierarchy, none if it may not.
#[derive(Debug)]
pub(super) struct Groups(Vec<PathBuf>);

/// A VM's own, one a hierarchy. Removed when dropped, if nobody is in it any more.
#[derive(Debug)]
pub(super) struct Group(Vec<(PathBuf, File)>);

impl Groups {
    pub(super) fn of_this_process() -> Groups {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let own = own_groups(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"));
        // The daemon may be in a group of its own within that which is left to it (`DelegateSubgroup=`).
        let outer = |dir: PathBuf| dir.ancestors().take(2).find(|dir| is_delegated(dir)).map(Path::to_owned);
        let groups = Groups(own.into_iter().filter_map(outer).collect());
        for dir in &groups.0 {
            info!(group = %dir.display(), "VMs get control groups of their own in it");
            remove_empty(dir);
        }
        groups
    }

    /// None, with a word in the log, if it cannot be made: the VM may come all the same.
    pub(super) fn make(&self, vm: &str, session: &str) -> Option<Group> {
        let name = format!("{PREFIX}{vm}-{}", session.get(..ID_DIGITS).unwrap_or(session));
        let mut group = Group(Vec::new());
        self.0.iter().for_each(|dir| remove_empty(dir));
        for dir in self.0.iter().map(|dir| dir.join(&name)) {
            let made = fs::create_dir(&dir);
            match made.and_then(|()| File::options().write(true).open(dir.join("cgroup.procs"))) {
                Ok(procs) => group.0.push((dir, procs)),
                Err(error) => {
                    warn!(vm, group = %dir.display(), %error, "it stays in the daemon's control group")
                }
            }
        }
        (!group.0.is_empty()).then_some(group)
    }
}

impl Group {
    /// What [`enter`] takes.
    pub(super) fn entrances(&self) -> Vec<RawFd> {
        self.0.iter().map(|(_, procs)| procs.as_raw_fd()).collect()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for (dir, _) in &self.0 {
            if let Err(error) = remove(dir) {
                debug!(group = %dir.display(), %error, "it stays, with who is in it");
            }
        }
    }
}

/// Puts this process into the groups, as far as that is possible. Between fork and exec: allocates nothing.
pub(super) fn enter(entrances: &[RawFd]) {
    for procs in entrances {
        // SAFETY: the kernel reads one byte of a constant.
        let _ = unsafe { libc::write(*procs, c"0".as_ptr().cast(), 1) };
    }
}

/// The kernel lets go of a group some moments after its last process.
fn remove(dir: &Path) -> io::Result<()> {
    let deadline = Instant::now() + BUSY_LIMIT;
    loop {
        let removed = fs::remove_dir(dir);
        let busy = removed.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy);
        let deserted = || fs::read_to_string(dir.join("cgroup.procs")).is_ok_and(|procs| procs.is_empty());
        if !busy || !deserted() || Instant::now() >= deadline {
            return removed;
        }
        thread::sleep(BUSY_RETRY);
    }
}

/// Groups of VMs that have ended while there was no daemon.
fn remove_empty(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().as_bytes().starts_with(PREFIX.as_bytes()) {
            // The kernel keeps those that somebody is in.
            let _ = remove(&entry.path());
        }
    }
}

fn is_delegated(dir: &Path) -> bool {
    DELEGATED.iter().any(|name| {
        let mut value = [0u8; 8];
        rustix::fs::getxattr(dir, *name, &mut value).is_ok_and(|length| length >= 1 && value[0] == b'1')
    })
}

/// Directories of the groups that a process is in, by its `mountinfo` and `cgroup`.
fn own_groups(mounts: &str, groups: &str) -> Vec<PathBuf> {
    let within = |controllers: &str| {
        groups.lines().find_map(|line| {
            let (names, path) = line.split_once(':')?.1.split_once(':')?;
            (names == controllers).then_some(path)
        })
    };
    let mounted = |kind: &str, controllers: &str| {
        mounts.lines().find_map(|line| {
            let (place, what) = line.split_once(" - ")?;
            let mut what = what.split(' ');
            let fits = what.next()? == kind
                && (controllers.is_empty() || what.nth(1)?.split(',').any(|option| option == controllers));
            let mut place = place.split(' ').skip(3);
            fits.then_some((place.next()?, place.next()?))
        })
    };
    let dirs = HIERARCHIES.iter().filter_map(|(kind, controllers)| {
        let (root, at) = mounted(kind, controllers)?;
        // A container sees part of the hierarchy.
        let path = Path::new(within(controllers)?).strip_prefix(root).ok()?;
        Some(Path::new(at).join(path))
    });
    dirs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
24 20 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw
25 24 0:23 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
26 24 0:24 / /sys/fs/cgroup/systemd rw,nosuid - cgroup cgroup rw,xattr,name=systemd
27 24 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";

    #[test]
    fn a_process_is_found_in_each_hierarchy() {
        let groups =
            "9:name=systemd:/system.slice/vmemd.service\n4:memory:/\n0::/system.slice/vmemd.service\n";
        let found = own_groups(MOUNTS, groups);
        let at = |path: &str| PathBuf::from(path);
        assert_eq!(
            found,
            [
                at("/sys/fs/cgroup/systemd/system.slice/vmemd.service"),
                at("/sys/fs/cgroup/unified/system.slice/vmemd.service")
            ]
        );
        let v2 = "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(own_groups(v2, "0::/user.slice/a b\n"), [at("/sys/fs/cgroup/user.slice/a b")]);
        let part = "30 20 0:26 /docker/1 /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(own_groups(part, "0::/docker/1/x\n"), [at("/sys/fs/cgroup/x")]);
        assert!(own_groups(part, "0::/elsewhere\n").is_empty());
        assert!(own_groups("", "0::/\n").is_empty());
    }

    #[test]
    fn what_nobody_has_left_to_us_is_not_divided() {
        assert!(!is_delegated(Path::new("/sys/fs/cgroup")));
        assert!(!is_delegated(Path::new("/nowhere")));
        assert!(Groups(Vec::new()).make("web", "1234567890").is_none());
    }
}
