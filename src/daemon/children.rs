//! Starting the process that receives a VM, in a session of its own, so that it outlives the daemon.

use std::net::TcpStream;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tracing::warn;
use vmprocess::ArriveSettings;
use vmprocess::failure::Failure;
use vmprocess::qemu::Role;

use super::groups::{self, Group};
use super::machine::{MachineChoice, Qemu};
use crate::qemu::inherit::inherit;
use crate::qemu::launch::{Launch, launch};

/// The descriptors that the child gets besides its settings.
#[derive(Debug)]
pub(super) struct Descriptors<'a> {
    pub(super) control: &'a TcpStream,
    pub(super) streams: &'a UnixStream,
    pub(super) listener: &'a UnixListener,
    pub(super) granted: BorrowedFd<'a>,
}

/// Starts `vmemd receive`, or the VM's QEMU. `settings`' descriptor numbers are filled in here.
///
/// # Errors
/// If no process can be started, or its log cannot be opened.
pub(super) fn start(
    mut settings: ArriveSettings,
    machine: MachineChoice,
    descriptors: &Descriptors<'_>,
    log_dir: Option<&Path>,
    group: Option<&Group>,
) -> Result<Child, Failure> {
    let Descriptors { control, streams, listener, granted } = descriptors;
    let fds = [control.as_raw_fd(), streams.as_raw_fd(), listener.as_raw_fd(), granted.as_raw_fd()];
    [settings.control_fd, settings.streams_fd, settings.listener_fd, settings.granted_fd] = fds;
    let log = log_dir.map(|dir| log_path(dir, &settings.hello.name));
    let mut launch = match machine {
        MachineChoice::Reference => Launch::from(receive(&settings)?),
        MachineChoice::Qemu(qemu) => {
            let Qemu { binary, plan, .. } = *qemu;
            launch(&binary, plan, Role::Arriving(Box::new(settings)))?
        }
    };
    launch.notes.iter().for_each(|note| warn!("{note}"));
    let command = &mut launch.command;
    command.stdin(Stdio::null()).stdout(Stdio::null());
    if let Some(path) = log {
        // The end of it is read, to tell the source why its QEMU ended.
        let file = std::fs::File::options().create(true).append(true).read(true).open(&path);
        command.stderr(
            file.map_err(|error| Failure::io(format!("cannot open the log {}", path.display()), &error))?,
        );
    }
    let entrances: Vec<RawFd> = group.map(Group::entrances).unwrap_or_default();
    // SAFETY: between fork and exec the closure only makes async-signal-safe system calls and allocates nothing.
    unsafe { command.pre_exec(move || prepare(&fds, &entrances)) };
    let program = command.get_program().to_owned();
    command.spawn().map_err(|error| Failure::io(format!("cannot start {}", program.display()), &error))
}

/// Where the standard error of a VM's process goes, if that has a directory.
pub(super) fn log_path(dir: &Path, vm: &str) -> PathBuf {
    dir.join(format!("{vm}.log"))
}

fn receive(settings: &ArriveSettings) -> Result<Command, Failure> {
    let text = serde_json::to_string(settings).map_err(|error| Failure::other(&error))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("vmemd").arg("receive").arg(text);
    Ok(command)
}

/// In the child: a session and control groups of its own, and the descriptors kept over exec.
fn prepare(fds: &[RawFd], entrances: &[RawFd]) -> std::io::Result<()> {
    groups::enter(entrances);
    rustix::process::setsid()?;
    inherit(fds)
}
