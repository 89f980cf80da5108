//! Who may run a VM after a hand-over: one decision a session, made once, at the target's host.
//!
//! ```text
//!   (nothing) ── begin ──▶ open ── commit ──▶ flushing ──▶ committed   "it may run here; the source must not"
//!                            │                   │            │
//!                            └─────── burn ──────┴──▶ burned ◀┘ revoke (the VM could not start)
//! ```
//! `commit` is called by the process that received the VM, before the VM starts, and keeps the record locked until it has; `burn`
//! by that process when it gives up, and by the daemon when the source asks ([`crate::answer_resolve`]). Whichever comes first stands.
//!
//! A record found unlocked in *flushing* is one whose flush failed, or whose process died meanwhile: its VM has not started. Unless
//! the host has been started anew since, for what followed the flush may be lost then: nobody can say.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::outside::{File, FileExt, OpenOptions, boot_id, create_dir_all, planted};
use crate::session::SessionId;

/// Where a VM whose hand-over was in doubt may run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The target has committed: it runs the VM, the source must not.
    RunningThere,
    /// The target has not, and never will: the source may run the VM on.
    NotThere,
}

#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error("session {0} was given up before the source's commit arrived")]
    Burned(SessionId),
    #[error(
        "session {0} has no record here: it was never begun, or the record is lost (this host was started anew, or it was given up over a week ago)"
    )]
    Unknown(SessionId),
    #[error("session {0} exists here already")]
    Exists(SessionId),
    #[error(
        "this host went down while session {0} was handed over, and its record does not say whether the VM ran here: it runs here no \
         longer, so decide whether it goes on where it was (`vmemd resolve NAME --force run-here`)"
    )]
    Lost(SessionId),
    #[error("the record {path} of a session is damaged")]
    Damaged { path: PathBuf },
    #[error("could not {what} {path}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

/// One small file a session in a directory, named by the session; changed in place under a lock, so that a
/// commit is two writes and one flush of data alone. Every method is atomic against the others, also between processes, and
/// lasting when it returns.
#[derive(Debug, Clone)]
pub struct Registry {
    directory: PathBuf,
}

/// What such a file begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mark {
    Open,
    /// A commit, of which it is not known that it lasts. Behind it stands the boot that it is of.
    Flushing,
    Committed,
    Burned,
}

const MARK_BYTES: usize = 8;
/// As the kernel writes it, with the line's end.
const BOOT_ID_BYTES: usize = 37;

impl Mark {
    const ALL: [Mark; 4] = [Mark::Open, Mark::Flushing, Mark::Committed, Mark::Burned];

    fn bytes(self) -> [u8; MARK_BYTES] {
        *match self {
            Mark::Open => b"OPEN   \n",
            Mark::Flushing => b"COMMIT?\n",
            Mark::Committed => b"COMMIT \n",
            Mark::Burned => b"BURNED \n",
        }
    }
}

impl Registry {
    /// # Errors
    /// If the directory cannot be made.
    pub fn new(directory: &Path) -> Result<Registry, RegistryError> {
        let path = directory.to_path_buf();
        match create_dir_all(directory) {
            Ok(()) => Ok(Registry { directory: path }),
            Err(source) => Err(RegistryError::Io { what: "create", path, source }),
        }
    }

    /// A session is being received. Called long before the downtime: the slow part is done here.
    ///
    /// # Errors
    /// If there has been such a session, or it cannot be recorded.
    pub fn begin(&self, session: SessionId) -> Result<(), RegistryError> {
        // A file that is there already belongs to an earlier attempt.
        let path = self.directory.join(session.to_string());
        match File::create_new(&path) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(RegistryError::Exists(session));
            }
            Err(source) => return Err(RegistryError::Io { what: "create", path, source }),
        }
        let record = self.record(session)?;
        if record.read()? != Mark::Open {
            return Err(RegistryError::Exists(session));
        }
        record.put(Mark::Open)?;
        File::open(&self.directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|error| record.failed("flush")(error))
    }

    /// The source's commit arrived: the VM may run here while the caller has the result, and for ever once it has dropped it.
    /// Part of the downtime.
    ///
    /// # Errors
    /// If it was given up, or this cannot be recorded. Then it must not run here.
    pub fn commit(&self, session: SessionId) -> Result<Committed, RegistryError> {
        let record = self.record(session)?;
        match record.read()? {
            Mark::Open => {}
            Mark::Flushing | Mark::Committed => return Err(RegistryError::Exists(session)),
            Mark::Burned => return Err(RegistryError::Burned(session)),
        }
        let boot = boot_id().map_err(record.failed("read the boot id for"))?;
        record.write(&[&Mark::Flushing.bytes()[..], boot.as_bytes()].concat())?;
        record.flush()?;
        record.write(&Mark::Committed.bytes())?;
        Ok(Committed(record))
    }

    /// The VM must not start here any more, unless it was committed: says which of them it is. Who knows nothing of the session
    /// must not answer: its record may have been lost, with the answer in it.
    ///
    /// # Errors
    /// If that is not known, or cannot be recorded.
    pub fn burn(&self, session: SessionId) -> Result<Outcome, RegistryError> {
        let record = self.record(session)?;
        match record.read()? {
            Mark::Committed => return Ok(Outcome::RunningThere),
            Mark::Flushing if planted!(BelievesUnflushedCommits) => return Ok(Outcome::RunningThere),
            Mark::Flushing if !record.is_of_this_boot()? && !planted!(ForgetsTheCrash) => {
                return Err(RegistryError::Lost(session));
            }
            Mark::Open if planted!(AnswersWithoutBurning) => return Ok(Outcome::NotThere),
            // Burned once more: that an earlier flush of it succeeded is not known.
            Mark::Open | Mark::Flushing | Mark::Burned => {}
        }
        record.put(Mark::Burned)?;
        Ok(Outcome::NotThere)
    }

    /// Forgets sessions that were given up, whose source has had its answer, or keeps its VM paused until somebody decides. A committed
    /// one stays for ever, because its source may ask at any later time, and one that is undecided stays too.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn prune(&self, older_than: Duration) -> Result<(), RegistryError> {
        let path = &self.directory;
        let entries = std::fs::read_dir(path).map_err(|source| RegistryError::Io {
            what: "list",
            path: path.clone(),
            source,
        })?;
        for entry in entries.flatten() {
            let session = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let age = entry.metadata().and_then(|meta| meta.modified()).ok().and_then(|at| at.elapsed().ok());
            if let (Some(session), Some(age)) = (session, age)
                && age > older_than
                && self.record(session)?.read()? == Mark::Burned
            {
                let path = entry.path();
                std::fs::remove_file(&path).map_err(|source| RegistryError::Io {
                    what: "remove",
                    path,
                    source,
                })?;
            }
        }
        Ok(())
    }

    /// Waits for the lock, which others hold for a few writes at most, and for the start of a VM.
    fn record(&self, session: SessionId) -> Result<Record, RegistryError> {
        let path = self.directory.join(session.to_string());
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(RegistryError::Unknown(session));
            }
            Err(source) => return Err(RegistryError::Io { what: "open", path, source }),
        };
        let record = Record { file, path };
        loop {
            match record.file.lock() {
                Ok(()) => return Ok(record),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(record.failed("lock")(error)),
            }
        }
    }
}

/// A commit that is recorded: nobody else reads the record before this is dropped.
#[derive(Debug)]
#[must_use = "the VM is started while this is held"]
pub struct Committed(Record);

impl Committed {
    /// The VM could not be started, and no vCPU has run: the source may have it back.
    ///
    /// # Errors
    /// If that cannot be recorded.
    pub fn revoke(&self) -> Result<(), RegistryError> {
        self.0.put(Mark::Burned)
    }

    /// The VM runs. That it does is known already; this has it known after a crash of the host, too.
    ///
    /// # Errors
    /// If it cannot be flushed.
    pub fn keep(self) -> Result<(), RegistryError> {
        self.0.flush()
    }
}

/// A session's file, locked for as long as it is open.
#[derive(Debug)]
struct Record {
    file: File,
    path: PathBuf,
}

impl Record {
    fn read(&self) -> Result<Mark, RegistryError> {
        if self.file.metadata().map_err(self.failed("read"))?.len() == 0 {
            // Just created, by us or by a process that died before it wrote.
            return Ok(Mark::Open);
        }
        let mut mark = [0; MARK_BYTES];
        self.file.read_exact_at(&mut mark, 0).map_err(self.failed("read"))?;
        let known = Mark::ALL.into_iter().find(|known| known.bytes() == mark);
        known.ok_or_else(|| RegistryError::Damaged { path: self.path.clone() })
    }

    fn is_of_this_boot(&self) -> Result<bool, RegistryError> {
        let mut boot = [0; BOOT_ID_BYTES];
        self.file.read_exact_at(&mut boot, MARK_BYTES as u64).map_err(self.failed("read"))?;
        Ok(boot == boot_id().map_err(self.failed("read the boot id for"))?.as_bytes())
    }

    fn put(&self, mark: Mark) -> Result<(), RegistryError> {
        self.write(&mark.bytes())?;
        self.flush()
    }

    fn write(&self, bytes: &[u8]) -> Result<(), RegistryError> {
        self.file.write_all_at(bytes, 0).map_err(self.failed("write"))
    }

    fn flush(&self) -> Result<(), RegistryError> {
        self.file.sync_data().map_err(self.failed("flush"))
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> RegistryError + use<> {
        let path = self.path.clone();
        move |source| RegistryError::Io { what, path, source }
    }
}
