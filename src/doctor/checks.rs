//! The requirements, one by one.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use vmprocess::host;
use vmprocess::medium::Medium;
use vmprocess::size::Size;

use super::check::Check;
use super::kernel;

const KERNEL: (u32, u32) = (6, 8);
const KERNEL_REMEDY: &str =
    "use Linux 6.8 or newer: Ubuntu 24.04, Debian 13 (or 12 with the backports kernel), Fedora 40, RHEL 10";
const UFFD_REMEDY: &str = "give the user access to /dev/userfaultfd (a udev rule: KERNEL==\"userfaultfd\", GROUP=\"kvm\", MODE=\"0660\"), or \
                           `sysctl vm.unprivileged_userfaultfd=1`, or run as root";
const KVM_REMEDY: &str = "load kvm_intel or kvm_amd (modprobe), and enable virtualisation in the firmware (in a VM: nested \
                          virtualisation)";
const KVM_GROUP_REMEDY: &str =
    "add the user to the group kvm (usermod -aG kvm USER, then log in again), or run as root";
const URING_REMEDY: &str =
    "`sysctl kernel.io_uring_disabled=0`, and allow io_uring_setup in the container's seccomp profile";
const LANDLOCK_REMEDY: &str = "add landlock to the kernel's lsm= parameter: it keeps the processes of VMs from files that are not theirs";
const DIRECT_REMEDY: &str =
    "choose a --store on ext4, xfs or btrfs on a local SSD (not tmpfs, overlay or a network file system)";
const LOCK_REMEDY: &str =
    "raise it (memlock in /etc/security/limits.conf, LimitMEMLOCK=infinity in a unit), or run with --no-lock";
const HUGE_REMEDY: &str = "`echo madvise >/sys/kernel/mm/transparent_hugepage/enabled`: guests whose memory fits their --ram run faster";
pub(super) fn all(store: &Path) -> Vec<Check> {
    let mut checks = vec![kernel_version()];
    checks.extend(userfaultfd());
    checks.push(device_kvm());
    checks.push(io_uring());
    checks.push(medium(store));
    checks.push(direct_io(store));
    checks.push(landlock());
    checks.push(lock_limit());
    checks.push(huge_pages());
    checks.push(free_ram());
    checks.push(free_disk(store));
    checks
}

fn check(name: &'static str, needed: bool, outcome: Result<String, String>, remedy: &str) -> Check {
    let found = outcome.is_ok();
    let (Ok(detail) | Err(detail)) = outcome;
    Check { name, needed, found, detail, remedy: (!found).then(|| remedy.to_owned()) }
}

fn kernel_version() -> Check {
    let outcome = match kernel::version() {
        Some((version, text)) if version >= KERNEL => Ok(text),
        Some((_, text)) => Err(format!("{text} is older than {}.{}", KERNEL.0, KERNEL.1)),
        None => Err("unknown version".to_owned()),
    };
    check("kernel", true, outcome, KERNEL_REMEDY)
}

fn userfaultfd() -> [Check; 2] {
    let uffd = kernel::userfaultfd();
    let permission = match &uffd {
        Ok(_) => Ok("allowed".to_owned()),
        Err(error) => Err(format!("refused: {error}")),
    };
    let has_move = match uffd.as_ref().map(kernel::has_move) {
        Ok(Ok(true)) => Ok("offered".to_owned()),
        Ok(Ok(false)) => Err("this kernel does not offer it".to_owned()),
        Ok(Err(error)) => Err(format!("the kernel does not say: {error}")),
        Err(_) => Err("cannot be asked without userfaultfd".to_owned()),
    };
    [check("userfaultfd", true, permission, UFFD_REMEDY), check("UFFDIO_MOVE", true, has_move, KERNEL_REMEDY)]
}

fn device_kvm() -> Check {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => check("/dev/kvm", true, Ok("usable".to_owned()), KVM_REMEDY),
        Err(error) => {
            let denied = error.kind() == std::io::ErrorKind::PermissionDenied;
            let remedy = if denied { KVM_GROUP_REMEDY } else { KVM_REMEDY };
            check("/dev/kvm", true, Err(error.to_string()), remedy)
        }
    }
}

fn io_uring() -> Check {
    let outcome = match kernel::io_uring() {
        Ok(()) => Ok("usable".to_owned()),
        Err(error) => {
            let sysctl = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
            Err(match sysctl.trim() {
                "" | "0" => error.to_string(),
                value => format!("{error} (kernel.io_uring_disabled={value})"),
            })
        }
    };
    check("io_uring", true, outcome, URING_REMEDY)
}

fn landlock() -> Check {
    let outcome = kernel::landlock().map(|version| format!("version {version} of its interface"));
    check("landlock", false, outcome.map_err(|error| error.to_string()), LANDLOCK_REMEDY)
}

/// The directory itself, or the nearest one above it that exists.
fn existing(store: &Path) -> PathBuf {
    store.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/")).to_owned()
}

fn medium(store: &Path) -> Check {
    let dir = existing(store);
    let shown = dir.display();
    let (needed, outcome, remedy) = match Medium::of(&dir) {
        Medium::Disk => (true, Ok(format!("{shown} is on a disk of this host")), ""),
        Medium::Ram(what) => (
            true,
            Err(format!("{shown} is in RAM ({what}): pages that leave RAM would stay in it")),
            "choose a --store on a disk, or give --store-in-ram for a trial",
        ),
        Medium::Network(what) => (
            false,
            Err(format!("{shown} is on {what}: every page waits for a server or another process")),
            "choose a --store on a local SSD: a VM stands still as long as its store does not answer",
        ),
    };
    check("the store's medium", needed, outcome, remedy)
}

fn direct_io(store: &Path) -> Check {
    let dir = existing(store);
    let open = |flags| File::options().read(true).write(true).custom_flags(flags).open(&dir);
    let outcome = match open(libc::O_TMPFILE | libc::O_DIRECT) {
        Ok(_) => Ok(format!("works in {}", dir.display())),
        Err(error) if dir.is_dir() && error.raw_os_error() == Some(libc::EINVAL) => {
            Err(format!("the file system of {} does not offer it", dir.display()))
        }
        Err(error) => Err(format!("{}: {error}", dir.display())),
    };
    check("O_DIRECT of the store", true, outcome, DIRECT_REMEDY)
}

fn lock_limit() -> Check {
    let least = swapd::Engine::locked_bytes(swapd::Engine::MIN_BUDGET_BYTES);
    let outcome = match swapd::lock_limit() {
        None => Ok("none for this user".to_owned()),
        Some(bytes) if bytes >= least => Ok(format!(
            "{:#}: all of a VM's memory and a little more must fit it, whatever its --ram",
            Size(bytes)
        )),
        Some(bytes) => Err(format!("{:#}, less than any VM takes", Size(bytes))),
    };
    check("memory-lock limit", false, outcome, LOCK_REMEDY)
}

fn huge_pages() -> Check {
    let outcome = match swapd::huge_page_mode().as_deref() {
        Some("never") => Err("switched off".to_owned()),
        Some(mode) => Ok(mode.to_owned()),
        None => Err("not in this kernel".to_owned()),
    };
    check("huge pages", false, outcome, HUGE_REMEDY)
}

fn free_ram() -> Check {
    let outcome = match host::available_ram() {
        Ok(bytes) if bytes >= swapd::Engine::MIN_BUDGET_BYTES => Ok(format!("{:#}", Size(bytes))),
        Ok(bytes) => Err(format!("{:#}", Size(bytes))),
        Err(failure) => Err(failure.text),
    };
    check("free RAM", true, outcome, "end something: the smallest VM budget is 16M")
}

fn free_disk(store: &Path) -> Check {
    let dir = existing(store);
    let outcome = match host::free_disk(&dir) {
        Ok(0) => Err(format!("none in {}", dir.display())),
        Ok(bytes) => Ok(format!("{:#} in {}", Size(bytes), dir.display())),
        Err(failure) => Err(failure.text),
    };
    check("free disk", true, outcome, "make room, or choose another --store")
}
