//! The run directory: which VMs exist on this host, and who holds which name.
//!
//! A name is held by a socket that somebody listens on; there is no other record of it. The file's name tells the role:
//! ```text
//!   run ─────────▶ NAME.sock ──give_up_name──▶ NAME.leaving-ID.sock ──▶ gone
//!   serve ──▶ NAME.arriving-ID.sock ──take_name──▶ NAME.sock
//! ```
//! Renaming may wait for a disk, so neither is done while the VM stands still: the one comes before, the other behind
//! the start. Every change is made under one flock, so that source and target may share a directory. A socket that
//! refuses connections belongs to a dead process and is removed. Sockets are addressed through `/proc/self/fd`, which
//! keeps long directory names within the 107 bytes of a socket address.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use migrate::wire::opening::{NAME_MAX, NAME_ROLES, is_name};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::geteuid;

use crate::failure::{Failure, FailureKind};

/// Hexadecimal digits of a session id in a socket's file name: room for them in a socket address is short.
const ID_DIGITS: usize = 8;
const LOCK_FILE: &str = ".lock";
const ADDRESS_MAX: usize = 107;
const _: () = assert!(
    "/proc/self/fd/1234567/".len() + NAME_MAX + NAME_ROLES[0].len() + ID_DIGITS + ".sock".len()
        <= ADDRESS_MAX + 2
);

/// Checks a VM's name: it becomes a file name. The rule is the one of all hosts, [`is_name`].
///
/// # Errors
/// [`FailureKind::Usage`] with the rule.
pub fn check_name(name: &str) -> Result<(), Failure> {
    if is_name(name) {
        return Ok(());
    }
    let text = format!(
        "{name:?} is not a name for a VM: use 1 to {NAME_MAX} letters, digits, '.', '_' or '-', not beginning with a dot, \
         and without {:?} or {:?}",
        NAME_ROLES[0], NAME_ROLES[1]
    );
    Err(Failure::new(FailureKind::Usage, text))
}

/// The file name of one VM's socket in the run directory, which says where the VM is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SocketName {
    /// `NAME.sock`: the VM has its name, and nobody else may take it.
    Here(String),
    /// `NAME.leaving-ID.sock`: the VM has given up its name for the session whose id begins so.
    Leaving(String, String),
    /// `NAME.arriving-ID.sock`: the VM is received in the session whose id begins so, and takes the name at its end.
    Arriving(String, String),
}

impl SocketName {
    /// The socket's name of a VM that leaves, by the whole id of its session.
    pub fn leaving(name: &str, session: &str) -> SocketName {
        SocketName::Leaving(name.to_owned(), short(session))
    }

    /// The socket's name of a VM that arrives, by the whole id of its session.
    pub fn arriving(name: &str, session: &str) -> SocketName {
        SocketName::Arriving(name.to_owned(), short(session))
    }

    /// The VM's name, whether or not this socket holds it.
    pub fn name(&self) -> &str {
        match self {
            SocketName::Here(name) | SocketName::Leaving(name, _) | SocketName::Arriving(name, _) => name,
        }
    }

    fn file_name(&self) -> String {
        match self {
            SocketName::Here(name) => format!("{name}.sock"),
            SocketName::Leaving(name, id) => format!("{name}.leaving-{id}.sock"),
            SocketName::Arriving(name, id) => format!("{name}.arriving-{id}.sock"),
        }
    }

    fn parse(file_name: &str) -> Option<SocketName> {
        let stem = file_name.strip_suffix(".sock")?;
        let socket = if let Some((name, id)) = stem.rsplit_once(".leaving-") {
            SocketName::leaving(name, id)
        } else if let Some((name, id)) = stem.rsplit_once(".arriving-") {
            SocketName::arriving(name, id)
        } else {
            SocketName::Here(stem.to_owned())
        };
        check_name(socket.name()).is_ok().then_some(socket)
    }
}

/// Why a user cannot rely on a directory that has these owners (of its name, and its own) and this mode. Root may look
/// after the VMs of others.
fn untrusted(own: u32, owners: [u32; 2], mode: u32) -> Option<String> {
    if let Some(other) = owners.iter().find(|owner| own != 0 && **owner != own && **owner != 0) {
        return Some(format!("belongs to another user ({other})"));
    }
    (mode & 0o022 != 0).then(|| "can be written by others (`chmod 700` it)".to_owned())
}

fn short(session: &str) -> String {
    session.chars().filter(char::is_ascii_hexdigit).take(ID_DIGITS).collect()
}

/// An open run directory.
#[derive(Clone, Debug)]
pub struct RunDir {
    path: PathBuf,
    dir: Arc<File>,
}

/// Holds the directory's flock until dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl RunDir {
    /// Where it is unless the user says otherwise: `/run/vmemd` for root, else `$XDG_RUNTIME_DIR/vmemd`.
    pub fn default_path() -> PathBuf {
        let uid = geteuid().as_raw();
        match (uid, std::env::var_os("XDG_RUNTIME_DIR")) {
            (0, _) => PathBuf::from("/run/vmemd"),
            (_, Some(dir)) => Path::new(&dir).join("vmemd"),
            (_, None) => PathBuf::from(format!("/tmp/vmemd-{uid}")),
        }
    }

    /// Opens the directory, making it (for this user alone) if it is missing.
    ///
    /// # Errors
    /// If it cannot be made or opened.
    pub fn open(path: &Path) -> Result<RunDir, Failure> {
        let fail = |error| {
            Failure::io(
                format!("cannot use the run directory {} (choose another with --run-dir)", path.display()),
                &error,
            )
        };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(fail)?;
        let dir = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC)
            .open(path)
            .map_err(fail)?;
        let found = dir.metadata().map_err(fail)?;
        // The name as well: who owns a link may let it point elsewhere at any time.
        let name = std::fs::symlink_metadata(path).map_err(fail)?;
        let own = geteuid().as_raw();
        if let Some(why) = untrusted(own, [name.uid(), found.uid()], found.mode()) {
            return Err(Failure::new(
                FailureKind::Host,
                format!(
                    "the run directory {} {why}: whoever controls it controls the VMs; choose another with --run-dir",
                    path.display()
                ),
            ));
        }
        Ok(RunDir { path: path.to_owned(), dir: Arc::new(dir) })
    }

    /// Path of the directory as it was opened: it may be relative.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the fates of hand-overs are recorded.
    pub fn sessions_dir(&self) -> PathBuf {
        self.path.join(".sessions")
    }

    /// Where monitor sockets of QEMUs are that somebody else starts.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn monitors_dir(&self) -> Result<PathBuf, Failure> {
        self.private_dir(".monitors")
    }

    /// Where it is on record what RAM each VM may have: [`crate::granted`].
    ///
    /// # Errors
    /// If it cannot be made.
    pub(crate) fn grants_dir(&self) -> Result<PathBuf, Failure> {
        self.private_dir(".ram")
    }

    fn private_dir(&self, name: &str) -> Result<PathBuf, Failure> {
        let path = self.path.join(name);
        match std::fs::DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(Failure::io(format!("cannot make {}", path.display()), &error))
            }
            _ => Ok(path),
        }
    }

    /// Waits for the directory's flock.
    ///
    /// # Errors
    /// If the lock file cannot be made.
    pub fn lock(&self) -> Result<Lock, Failure> {
        let path = self.path.join(LOCK_FILE);
        let fail = |error| Failure::io(format!("cannot lock {}", path.display()), &error);
        let file = std::fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(fail)?;
        // Root may look at another user's VMs; the file is to stay that user's.
        let owner = self.dir.metadata().map_err(fail)?;
        if file.metadata().map_err(fail)?.uid() != owner.uid() {
            let _ = std::os::unix::fs::fchown(&file, Some(owner.uid()), Some(owner.gid()));
        }
        flock(&file).map_err(fail)?;
        Ok(Lock { _file: file })
    }

    fn address(&self, socket: &SocketName) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{}", self.dir.as_raw_fd(), socket.file_name()))
    }

    /// Connects to a VM's process.
    ///
    /// # Errors
    /// The kernel's: `NotFound` and `ConnectionRefused` mean that there is no such VM.
    pub fn connect(&self, socket: &SocketName) -> io::Result<UnixStream> {
        connect_at_once(&self.address(socket))
    }

    /// Every VM of this directory that lives, in order of name. Removes sockets of dead ones.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn sockets(&self) -> Result<Vec<SocketName>, Failure> {
        let _lock = self.lock()?;
        self.living(|_| true)
    }

    /// The sockets of the VMs of that name. The caller has the lock.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn holders(&self, _lock: &Lock, name: &str) -> Result<Vec<SocketName>, Failure> {
        self.living(|socket| socket.name() == name)
    }

    fn living(&self, wanted: impl Fn(&SocketName) -> bool) -> Result<Vec<SocketName>, Failure> {
        let fail =
            |error| Failure::io(format!("cannot read the run directory {}", self.path.display()), &error);
        let mut sockets = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(fail)? {
            let file_name = entry.map_err(fail)?.file_name();
            let Some(socket) = file_name.to_str().and_then(SocketName::parse) else { continue };
            if wanted(&socket) && self.lives(&socket) {
                sockets.push(socket);
            }
        }
        sockets.sort();
        Ok(sockets)
    }

    /// Whether somebody listens; removes the socket if nobody does. Under the lock.
    fn lives(&self, socket: &SocketName) -> bool {
        match self.connect(socket) {
            Ok(_) => true,
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                let _ = std::fs::remove_file(self.address(socket));
                false
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            // A full queue or a missing permission: somebody is there.
            Err(_) => true,
        }
    }

    /// Makes a socket and listens there. The caller has the lock and has checked the name's holders.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn claim(&self, _lock: &Lock, socket: SocketName) -> Result<(Claim, UnixListener), Failure> {
        let address = self.address(&socket);
        let _ = self.lives(&socket);
        let fail = |error| {
            Failure::io(
                format!("cannot make the socket {}", self.path.join(socket.file_name()).display()),
                &error,
            )
        };
        let listener = UnixListener::bind(&address).map_err(fail)?;
        let claim = Claim { dir: self.clone(), socket: socket.clone(), ours: true };
        std::fs::set_permissions(&address, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
        Ok((claim, listener))
    }

    /// Takes over a socket that another process has claimed and whose listener it has passed to this one.
    pub fn adopt(&self, socket: SocketName, listener: OwnedFd) -> (Claim, UnixListener) {
        (Claim { dir: self.clone(), socket, ours: true }, UnixListener::from(listener))
    }

    /// Claims the name for a VM that is to run here.
    ///
    /// # Errors
    /// [`FailureKind::Name`] if a living VM has it.
    pub fn claim_name(&self, name: &str) -> Result<(Claim, UnixListener), Failure> {
        check_name(name)?;
        let lock = self.lock()?;
        if let Some(socket) = self.holders(&lock, name)?.first() {
            return Err(name_taken(socket));
        }
        self.claim(&lock, SocketName::Here(name.to_owned()))
    }

    /// The socket at which to reach the VM of that name: where it runs, else where it is leaving or arriving.
    ///
    /// # Errors
    /// [`FailureKind::Name`] if there is none, with the names that there are.
    pub fn find(&self, name: &str) -> Result<SocketName, Failure> {
        check_name(name)?;
        let sockets = self.sockets()?;
        if let Some(socket) = sockets.iter().find(|socket| socket.name() == name) {
            return Ok(socket.clone());
        }
        let mut names: Vec<&str> = sockets.iter().map(SocketName::name).collect();
        names.dedup();
        let known = match names.as_slice() {
            [] => "no VM runs here".to_owned(),
            names => format!("there are: {}", names.join(", ")),
        };
        Err(Failure::new(
            FailureKind::Name,
            format!("no VM named {name:?} in {} ({known})", self.path.display()),
        ))
    }
}

/// Fails with `WouldBlock` if the listener's queue is full. A process that stands still leaves in it whoever has looked
/// whether it lives, and one look too many would wait for ever (with the directory's lock, which all others wait for).
fn connect_at_once(path: &Path) -> io::Result<UnixStream> {
    if path.as_os_str().len() > ADDRESS_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Waits for the file's exclusive lock. It goes with the file.
fn flock(file: &File) -> io::Result<()> {
    loop {
        match file.lock() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// The refusal of a name that is held.
pub fn name_taken(socket: &SocketName) -> Failure {
    let how = match socket {
        SocketName::Here(_) => "a VM of that name runs on this host",
        SocketName::Leaving(..) => "a VM of that name is leaving this host",
        SocketName::Arriving(..) => "a VM of that name is arriving at this host",
    };
    Failure::new(
        FailureKind::Name,
        format!("the name {:?} is taken: {how}; choose another, or stop it first", socket.name()),
    )
}

/// A socket file that this process answers for. Removed when dropped.
#[derive(Debug)]
pub struct Claim {
    dir: RunDir,
    socket: SocketName,
    /// Whether to remove the file at the end.
    ours: bool,
}

impl Claim {
    pub(crate) fn dir(&self) -> &RunDir {
        &self.dir
    }

    /// The socket's name now.
    pub fn socket(&self) -> &SocketName {
        &self.socket
    }

    /// Gives the name up, keeping the socket reachable.
    ///
    /// # Errors
    /// If the file cannot be renamed.
    pub fn leave(&mut self, session: &str) -> Result<(), Failure> {
        let lock = self.dir.lock()?;
        self.rename(&lock, SocketName::leaving(self.socket.name(), session))
    }

    /// Whether the name can be taken. Waits for no disk, and nobody but another VM of that name that is on its way
    /// itself can take it before [`take_name`](Self::take_name).
    ///
    /// # Errors
    /// [`FailureKind::Name`] if another VM has it now.
    pub fn is_free(&mut self) -> Result<(), Failure> {
        let here = SocketName::Here(self.socket.name().to_owned());
        match self.dir.connect(&here) {
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                Ok(())
            }
            _ if self.socket == here => Ok(()),
            _ => Err(name_taken(&here)),
        }
    }

    /// Takes the name, for the first time or back.
    ///
    /// # Errors
    /// [`FailureKind::Name`] if another VM has it now.
    pub fn take_name(&mut self) -> Result<(), Failure> {
        let lock = self.dir.lock()?;
        let here = SocketName::Here(self.socket.name().to_owned());
        if self.socket == here {
            return Ok(());
        }
        if self.dir.lives(&here) {
            return Err(name_taken(&here));
        }
        self.rename(&lock, here)
    }

    fn rename(&mut self, _lock: &Lock, to: SocketName) -> Result<(), Failure> {
        std::fs::rename(self.dir.address(&self.socket), self.dir.address(&to))
            .map_err(|error| Failure::io(format!("cannot rename the socket of {:?}", to.name()), &error))?;
        self.socket = to;
        Ok(())
    }

    /// Keeps the socket file: another process answers for it from now on.
    pub fn hand_over(mut self) {
        self.ours = false;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.ours {
            let _ = std::fs::remove_file(self.dir.address(&self.socket));
        }
    }
}

#[cfg(test)]
#[path = "rundir_tests.rs"]
mod tests;
