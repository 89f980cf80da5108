//! A QEMU with vmemd's engine in it: names for its memory, a monitor for us, the preload and its settings.
//!
//! What it needs besides its command line is inherited: a connected socket for its monitor. So nothing is left behind
//! however it ends.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use vmprocess::failure::{Failure, FailureKind};
use vmprocess::qemu::{Backend, LIBRARY, PreloadSettings, QmpAddress, Role, VARIABLE, VERSION, memory_file};

use super::inherit::inherit;
use super::loaded;
use super::rewrite::{self, LinePlan, Monitor, Rewritten, Settings};

const LD_PRELOAD: &str = "LD_PRELOAD";
/// Where a distribution's package puts the preload, from the command's directory.
const INSTALLED: &str = "../lib/vmemd";
/// Where `cargo test` leaves it, from the command's directory.
const TESTED: &str = "deps";

/// The shared object for `LD_PRELOAD`: beside the command, or where it is installed.
///
/// # Errors
/// If it is in none of these places, or in one that `LD_PRELOAD` cannot name.
pub fn library() -> Result<PathBuf, Failure> {
    let command =
        std::env::current_exe().map_err(|error| Failure::io("cannot tell where vmemd is", &error))?;
    let beside = command.parent().unwrap_or(Path::new("/"));
    let places = [beside.to_owned(), beside.join(INSTALLED), beside.join(TESTED)];
    let found = places.iter().filter_map(|dir| dir.join(LIBRARY).canonicalize().ok()).next();
    let found = found.ok_or_else(|| {
        let text = format!(
            "{LIBRARY} is neither in {} nor in {INSTALLED} from there: build it with `cargo build --release`, or install it",
            beside.display()
        );
        Failure::new(FailureKind::Host, text)
    })?;
    can_be_preloaded(&found)?;
    Ok(found)
}

/// Blanks and colons separate the names in `LD_PRELOAD`, and nothing quotes them: QEMU would start without it.
fn can_be_preloaded(library: &Path) -> Result<(), Failure> {
    if !library.as_os_str().as_bytes().iter().any(|byte| b" \t\n:".contains(byte)) {
        return Ok(());
    }
    let text = format!(
        "{LD_PRELOAD} cannot name {}, which has a blank or a colon in its path: install it elsewhere",
        library.display()
    );
    Err(Failure::new(FailureKind::Host, text))
}

/// A command that is ready to be started, and what it inherits.
#[derive(Debug)]
pub struct Launch {
    pub command: Command,
    /// What the user should know.
    pub notes: Vec<String>,
    /// Open until the command has been started.
    _inherited: Vec<OwnedFd>,
}

impl Launch {
    /// It has these descriptors as well, by the numbers that they have here.
    pub fn inherits(&mut self, more: Vec<OwnedFd>) {
        let numbers: Vec<RawFd> = more.iter().map(AsRawFd::as_raw_fd).collect();
        // SAFETY: between fork and exec the closure only makes async-signal-safe system calls and allocates nothing.
        unsafe { self.command.pre_exec(move || inherit(&numbers)) };
        self._inherited.extend(more);
    }
}

impl From<Command> for Launch {
    /// A command that inherits nothing of this.
    fn from(command: Command) -> Launch {
        Launch { command, notes: Vec::new(), _inherited: Vec::new() }
    }
}

/// Makes what a QEMU needs, with `role` for its preload.
///
/// # Errors
/// If the kernel gives no descriptor, or the preload is missing or does not get into this binary.
pub fn launch(binary: &Path, plan: LinePlan, role: Role) -> Result<Launch, Failure> {
    let paths = memory_files(&plan);
    let (theirs, ours) = UnixStream::pair().map_err(|error| Failure::io("no socket pair", &error))?;
    let backends = backends(&plan, &paths);
    let settings = Settings {
        files: &paths,
        monitor: Monitor::Descriptor(theirs.as_raw_fd()),
        role: match &role {
            Role::New { .. } => rewrite::Role::Start,
            Role::Arriving(_) | Role::Restoring(_) => rewrite::Role::Arrive,
        },
    };
    let Rewritten { args, notes, .. } = plan.rewrite(&settings)?;
    let qmp = QmpAddress::Descriptor { ours: ours.as_raw_fd(), theirs: theirs.as_raw_fd() };
    let (version, program) = (VERSION.to_owned(), program(binary)?);
    let preload = PreloadSettings { version, program, backends, qmp, args: None, role };
    let mut command = Command::new(binary);
    command.args(args).envs(environment(&preload)?);
    let inherited = vec![OwnedFd::from(theirs), OwnedFd::from(ours)];
    let numbers: Vec<RawFd> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: between fork and exec the closure only makes async-signal-safe system calls and allocates nothing.
    unsafe { command.pre_exec(move || inherit(&numbers)) };
    Ok(Launch { command, notes, _inherited: inherited })
}

/// The binary as the kernel names it to the process.
pub fn program(binary: &Path) -> Result<PathBuf, Failure> {
    binary
        .canonicalize()
        .map_err(|error| Failure::io(format_args!("looking at {}", binary.display()), &error))
}

/// The names by which QEMU asks the preload for the guest's memory.
pub fn memory_files(plan: &LinePlan) -> Vec<PathBuf> {
    (0..plan.backends.len()).map(memory_file).collect()
}

/// What the preload is to know of the guest's memory.
pub fn backends(plan: &LinePlan, files: &[PathBuf]) -> Vec<Backend> {
    let each = plan.backends.iter().zip(files);
    let mapped = |backend: &rewrite::Backend| backend.mapped().expect("checked when it was planned");
    each.map(|(backend, path)| Backend { path: path.clone(), bytes: mapped(backend) }).collect()
}

/// What has to be in QEMU's environment. It works: the binary was asked.
pub fn environment(settings: &PreloadSettings) -> Result<[(&'static str, OsString); 2], Failure> {
    let text = serde_json::to_string(settings).map_err(|error| {
        Failure::new(FailureKind::Usage, format!("the preload cannot be told what to do: {error}"))
    })?;
    let mut libraries = library()?.into_os_string();
    if let Some(others) = std::env::var_os(LD_PRELOAD).filter(|others| !others.is_empty()) {
        libraries.push(":");
        libraries.push(others);
    }
    let environment = [(LD_PRELOAD, libraries), (VARIABLE, text.into())];
    loaded::check(&settings.program, &environment)?;
    Ok(environment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_cannot_be_preloaded_is_refused() {
        can_be_preloaded(Path::new("/opt/vm-emd/lib.so")).unwrap();
        for path in ["/my programs/lib.so", "/a:b/lib.so"] {
            let refused = can_be_preloaded(Path::new(path)).unwrap_err();
            assert!(refused.kind == FailureKind::Host && refused.text.contains("elsewhere"), "{refused}");
        }
    }
}
