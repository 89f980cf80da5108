//! The RAM that each VM of this host was granted, on record for whoever promises RAM to others: it counts for as long
//! as the VM's process lives, whether or not that answers.
//!
//! `RUN_DIR/.ram/ID` holds one line of JSON and is locked (flock) by the process, from its start to its end however it
//! ends. A process that a daemon starts inherits file and lock, so there is no moment at which its RAM is on nobody's
//! record. A file that nobody has locked is that of a dead process; whoever sees it removes it. Files are made, and
//! those of the dead removed, under the run directory's lock.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::control::protocol::EngineKind;
use crate::control::rundir::RunDir;
use crate::facts::Facts;
use crate::failure::{Failure, FailureKind};

/// How often a record is read that makes no sense.
const READ_TRIES: u32 = 100;
/// Records have one length, so that one write replaces all of another.
const RECORD_BYTES: usize = 512;

/// The RAM and memory of one VM, as on record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// What the VM is called. During a move two records may have the same name: they are told apart by an id.
    pub name: String,
    /// Its process; 0 while that is being started.
    pub pid: u32,
    /// Listen address of the daemon that granted it.
    pub daemon: Option<String>,
    /// What holds its memory: a plain VM has no store to count.
    pub engine: EngineKind,
    /// All of its memory: what exceeds the budget may have to go to the store.
    pub memory_bytes: u64,
    /// RAM that it may use, whether or not it has taken it.
    pub ram_budget_bytes: u64,
}

impl Share {
    pub(crate) fn of(facts: &Facts) -> Share {
        Share {
            name: facts.name.clone(),
            pid: std::process::id(),
            daemon: facts.daemon.clone(),
            engine: facts.engine,
            memory_bytes: facts.memory_bytes,
            ram_budget_bytes: facts.budget_bytes,
        }
    }

    /// The part of the budget that the VM has not taken from the host yet.
    pub fn untaken_bytes(&self) -> u64 {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.pid)).unwrap_or_default();
        let pages = statm.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
        self.ram_budget_bytes.saturating_sub(swapd::units::bytes_of(pages))
    }
}

/// A record that this process answers for. Removed when dropped.
#[derive(Debug)]
pub struct Granted {
    file: File,
    path: PathBuf,
    share: Share,
    ours: bool,
}

fn fail(path: &Path) -> impl Fn(io::Error) -> Failure {
    let path = path.to_owned();
    move |error| Failure::io(format!("cannot record the VM's RAM in {}", path.display()), &error)
}

impl Granted {
    /// Makes the record `id`, and locks it.
    ///
    /// # Errors
    /// If the record cannot be made.
    pub fn new(dir: &RunDir, id: &str, share: Share) -> Result<Granted, Failure> {
        let path = dir.grants_dir()?.join(id);
        let _lock = dir.lock()?;
        let mut options = OpenOptions::new();
        let options = options.create(true).truncate(false).read(true).write(true).mode(0o600);
        let file = options.open(&path).map_err(fail(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Failure::new(FailureKind::Name, format!("{} is another VM's", path.display())));
            }
            Err(TryLockError::Error(error)) => return Err(fail(&path)(error)),
        }
        Granted { file, path, share, ours: true }.written()
    }

    /// Takes over a record that another process has made and whose file, with its lock, it has passed to this one.
    ///
    /// # Errors
    /// If the record cannot be written.
    pub(crate) fn adopt(dir: &RunDir, id: &str, file: OwnedFd, share: Share) -> Result<Granted, Failure> {
        let path = dir.grants_dir()?.join(id);
        Granted { file: File::from(file), path, share, ours: true }.written()
    }

    fn written(self) -> Result<Granted, Failure> {
        self.write().map_err(fail(&self.path))?;
        Ok(self)
    }

    fn write(&self) -> io::Result<()> {
        let mut line = serde_json::to_vec(&self.share)?;
        if line.len() >= RECORD_BYTES {
            return Err(io::Error::other("it is too long"));
        }
        line.resize(RECORD_BYTES - 1, b' ');
        line.push(b'\n');
        self.file.write_all_at(&line, 0)
    }

    pub(crate) fn set_budget(&mut self, bytes: u64) -> io::Result<()> {
        self.share.ram_budget_bytes = bytes;
        self.write()
    }

    /// Another process answers for it from now on.
    pub fn hand_over(mut self, pid: u32) {
        self.ours = false;
        self.share.pid = pid;
        if let Err(error) = self.write() {
            warn!(vm = %self.share.name, %error, "the record of its RAM lacks its process");
        }
    }
}

impl AsFd for Granted {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Granted {
    fn drop(&mut self) {
        if self.ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// The records of the living VMs of this host. Removes those of dead ones.
///
/// # Errors
/// If the directory cannot be read, or a living VM's record: nobody could tell what it may have.
pub fn all(dir: &RunDir) -> Result<Vec<Share>, Failure> {
    let grants = dir.grants_dir()?;
    let _lock = dir.lock()?;
    let cannot = |error| Failure::io(format!("cannot read {}", grants.display()), &error);
    let mut shares = Vec::new();
    for entry in std::fs::read_dir(&grants).map_err(cannot)? {
        let path = entry.map_err(cannot)?.path();
        let mut file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file.map_err(cannot)?,
        };
        if file.try_lock().is_ok() {
            let _ = std::fs::remove_file(&path);
            continue;
        }
        shares.push(read(&mut file, &path)?);
    }
    Ok(shares)
}

/// The VM's process may be writing it just now.
fn read(file: &mut File, path: &Path) -> Result<Share, Failure> {
    let cannot = |error| Failure::io(format!("cannot read {}", path.display()), &error);
    let mut tries = 0;
    loop {
        let mut line = String::new();
        file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_string(&mut line)).map_err(cannot)?;
        match serde_json::from_str(&line) {
            Ok(share) => return Ok(share),
            Err(_) if tries < READ_TRIES => tries += 1,
            Err(error) => {
                let text = format!("{} of a living VM cannot be read: {error}", path.display());
                return Err(Failure::new(FailureKind::Other, text));
            }
        }
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(name: &str, ram: u64) -> Share {
        Share {
            name: name.to_owned(),
            pid: std::process::id(),
            daemon: Some("127.0.0.1:7070".to_owned()),
            engine: EngineKind::Vmemd,
            memory_bytes: ram,
            ram_budget_bytes: ram,
        }
    }

    fn run_dir(name: &str) -> (testkit::TempDir, RunDir) {
        let path = testkit::directory(name);
        let dir = RunDir::open(&path.path().join("run")).unwrap();
        (path, dir)
    }

    #[test]
    fn what_was_granted_counts_until_the_process_ends() {
        let (_path, dir) = run_dir("counts");
        let mut one = Granted::new(&dir, "1", share("one", 1 << 30)).unwrap();
        let two = Granted::new(&dir, "2", share(&"n".repeat(64), u64::MAX)).unwrap();
        assert!(Granted::new(&dir, "1", share("other", 1)).is_err(), "it is another's");
        one.set_budget(3 << 30).unwrap();
        let mut found = all(&dir).unwrap();
        found.sort_by_key(|share| share.ram_budget_bytes);
        assert_eq!(found[0], Share { ram_budget_bytes: 3 << 30, ..share("one", 1 << 30) });
        assert_eq!(found[1].ram_budget_bytes, u64::MAX);
        // As in a process that is killed: nothing removes the file, the kernel the lock.
        two.hand_over(7);
        assert_eq!(all(&dir).unwrap().len(), 1);
        assert_eq!(
            std::fs::read_dir(dir.grants_dir().unwrap()).unwrap().count(),
            1,
            "the dead one's is gone"
        );
        drop(one);
        assert_eq!(all(&dir).unwrap(), []);
    }

    #[test]
    fn a_record_is_held_by_whoever_inherits_it() {
        let (_path, dir) = run_dir("inherited");
        let granted = Granted::new(&dir, "1", share("one", 1 << 30)).unwrap();
        let inherited = granted.as_fd().try_clone_to_owned().unwrap();
        granted.hand_over(7);
        assert_eq!(all(&dir).unwrap(), [Share { pid: 7, ..share("one", 1 << 30) }]);
        let adopted = Granted::adopt(&dir, "1", inherited, share("one", 1 << 30)).unwrap();
        assert_eq!(all(&dir).unwrap()[0].pid, std::process::id());
        drop(adopted);
        assert_eq!(all(&dir).unwrap(), []);
    }
}
