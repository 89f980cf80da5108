//! Rights that a VM's process of our own gives up before it has any thread: it serves one VM, and nobody who takes it
//! over shall get further.
//!
//! Files by Landlock, system calls by seccomp. A list of what is denied, as systemd's and QEMU's are: a list of what is
//! allowed would end VMs with the next C library. A QEMU is confined by its own `-sandbox`, and by whoever starts it.

use std::collections::BTreeMap;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope, path_beneath_rules,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use tracing::{debug, warn};
use vmprocess::failure::{Failure, FailureKind};

/// Read, and nothing else: libraries, host names, facts about the host.
const READABLE: [&str; 9] = [
    "/etc",
    "/usr",
    "/lib",
    "/lib64",
    "/proc",
    "/sys",
    "/run/systemd/resolve",
    "/run/nscd",
    "/run/resolvconf",
];
const DEVICES: [&str; 5] = ["/dev/kvm", "/dev/userfaultfd", "/dev/null", "/dev/urandom", "/dev/tty"];
/// What the newest kernel known here can deny; an older one denies what it can.
const LANDLOCK: ABI = ABI::V6;

/// New programs, other processes, other hosts' worth of rights, the kernel's own state.
const DENIED: [libc::c_long; 59] = [
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kcmp,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_process_madvise,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_fsconfig,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_reboot,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_syslog,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
];

/// Gives up, for this thread and all that it will start, everything but one VM's business: `written` are the
/// directories (or the device) of its store and its sockets.
///
/// # Errors
/// If the kernel refuses a filter; a kernel without Landlock is only told of in the log.
pub(crate) fn enter(written: &[&Path]) -> Result<(), Failure> {
    let denied = |what: &str, error: &dyn std::fmt::Display| {
        Failure::new(
            FailureKind::Host,
            format!("cannot give up {what}: {error}; `vmemd doctor` tells what is missing"),
        )
    };
    confine_files(written).map_err(|error| denied("access to files", &error))?;
    let filters = filters().map_err(|error| denied("system calls", &error))?;
    for filter in &filters {
        seccompiler::apply_filter(filter).map_err(|error| denied("system calls", &error))?;
    }
    debug!("confined");
    Ok(())
}

fn confine_files(written: &[&Path]) -> Result<(), landlock::RulesetError> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let own = AccessFs::from_all(LANDLOCK) & !(AccessFs::Execute | AccessFs::MakeBlock | AccessFs::MakeChar);
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?
        .add_rules(path_beneath_rules(READABLE, read))?
        .add_rules(path_beneath_rules(DEVICES, device))?
        .add_rules(path_beneath_rules(written, own))?
        .restrict_self()?;
    if status.ruleset == RulesetStatus::NotEnforced {
        warn!("this kernel has no Landlock: the VM's process may use all files that its user may");
    }
    Ok(())
}

/// Two filters, for each has one answer to what it denies. The C library starts threads in the older way when told that
/// the newer does not exist, and of that the filter sees the flags.
fn filters() -> Result<[BpfProgram; 2], seccompiler::BackendError> {
    let thread = libc::CLONE_THREAD as u64;
    let no_thread = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(thread), 0)?;
    let mut denied: BTreeMap<_, _> = DENIED.into_iter().map(|call| (call, Vec::new())).collect();
    denied.insert(libc::SYS_clone, vec![SeccompRule::new(vec![no_thread])?]);
    let unknown = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    Ok([filter(denied, libc::EPERM)?, filter(unknown, libc::ENOSYS)?])
}

fn filter(
    rules: BTreeMap<libc::c_long, Vec<SeccompRule>>,
    errno: i32,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = rules.into_iter().collect();
    let arch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno as u32), arch)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// In a thread of its own: the others of this test process stay as they are.
    fn confined<T: Send + 'static>(dir: &Path, work: impl FnOnce() -> T + Send + 'static) -> T {
        let dir = dir.to_owned();
        let thread = std::thread::spawn(move || {
            enter(&[&dir]).unwrap();
            work()
        });
        thread.join().unwrap()
    }

    #[test]
    fn what_a_vm_does_still_works_and_the_rest_does_not() {
        let [dir, others] = ["sandbox", "outside"].map(testkit::directory);
        let (inside, outside) = (dir.path().join("file"), others.path().join("file"));
        let results = confined(dir.path(), move || {
            std::fs::write(&inside, "x").unwrap();
            std::fs::read("/etc/passwd").unwrap();
            let listener = std::os::unix::net::UnixListener::bind(inside.with_extension("sock"));
            // Inherited by the threads that it starts.
            let thread = std::thread::spawn(move || {
                let files = std::fs::write(&outside, "x");
                (
                    files,
                    Command::new("/bin/true").status().map(drop),
                    std::net::TcpListener::bind("127.0.0.1:0").map(drop),
                )
            });
            (listener.map(drop), thread.join().unwrap())
        });
        let (socket, (files, program, port)) = results;
        socket.unwrap();
        let denied =
            |result: std::io::Result<()>| result.unwrap_err().kind() == std::io::ErrorKind::PermissionDenied;
        assert!(denied(program));
        match crate::doctor::lacks(Path::new("/"), &["landlock"]) {
            None => assert!(denied(files) && denied(port)),
            Some(why) => testkit::skip_part(testkit::Reason::Kernel, why),
        }
    }
}
