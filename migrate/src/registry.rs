//! Who may run a VM after a hand-over: one decision a session, made once, at the target's host.
//!
//! ```text
//!   (nothing) ── begin ──▶ open ── commit ──▶ committed      "it may run here; the source must not"
//!       │                    │                    │
//!       └───── burn ─────────┴──────▶ burned ◀────┘ revoke (the VM could not start, or the record not be flushed)
//! ```
//! `commit` is called by the process that received the VM, before the VM starts; `burn` by that process
//! when it gives up, and by the daemon when the source asks ([`crate::answer_resolve`]). Whichever comes first stands.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::outside::{File, FileExt, OpenOptions, create_dir_all, planted};
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
    #[error("the record {path} of a session is damaged")]
    Damaged { path: PathBuf },
    #[error("could not {what} {path}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

/// Every method is atomic against the others, also between processes, and lasting when it returns.
pub trait Registry {
    /// A session is being received. Called long before the downtime: do the slow part here.
    fn begin(&self, session: SessionId) -> Result<(), RegistryError>;
    /// The source's commit arrived: from now on the VM may run here. Part of the downtime.
    fn commit(&self, session: SessionId) -> Result<(), RegistryError>;
    /// The VM must not start here any more, unless it was committed: says which of them it is. Who knows nothing of the session
    /// must not answer: its record may have been lost, with the answer in it.
    fn burn(&self, session: SessionId) -> Result<Outcome, RegistryError>;
    /// The session's VM does not start here, whatever was recorded of it, and no vCPU has run: the source may have it back.
    fn revoke(&self, session: SessionId) -> Result<(), RegistryError>;
}

/// One small file a session in a directory, named by the session; changed in place under a lock, so that a
/// commit is one write and one flush of data alone.
#[derive(Debug, Clone)]
pub struct FileRegistry {
    directory: PathBuf,
}

/// What such a file says, in 8 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Decision {
    Open,
    Committed,
    Burned,
}

const MARK_BYTES: usize = 8;

impl Decision {
    const ALL: [Decision; 3] = [Decision::Open, Decision::Committed, Decision::Burned];

    fn mark(self) -> [u8; MARK_BYTES] {
        *match self {
            Decision::Open => b"OPEN   \n",
            Decision::Committed => b"COMMIT \n",
            Decision::Burned => b"BURNED \n",
        }
    }
}

impl FileRegistry {
    /// # Errors
    /// If the directory cannot be made.
    pub fn new(directory: &Path) -> Result<FileRegistry, RegistryError> {
        let path = directory.to_path_buf();
        match create_dir_all(directory) {
            Ok(()) => Ok(FileRegistry { directory: path }),
            Err(source) => Err(RegistryError::Io { what: "create", path, source }),
        }
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
                && self.change(session, |decision| Ok((decision, decision)))? == Decision::Burned
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

    /// Reads a session's decision, and writes what `decide` makes of it: (what to write, what to return).
    fn change<T>(
        &self,
        session: SessionId,
        decide: impl FnOnce(Decision) -> Result<(Decision, T), RegistryError>,
    ) -> Result<T, RegistryError> {
        let path = self.directory.join(session.to_string());
        let failed = |what| {
            let path = path.clone();
            move |source| RegistryError::Io { what, path, source }
        };
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(RegistryError::Unknown(session));
            }
            Err(error) => return Err(failed("open")(error)),
        };
        lock(&file).map_err(failed("lock"))?;
        let mut mark = [0; MARK_BYTES];
        let length = file.metadata().map_err(failed("read"))?.len();
        let found = match length {
            // Just created, by us or by a process that died before it wrote.
            0 => Decision::Open,
            _ => {
                file.read_exact_at(&mut mark, 0).map_err(failed("read"))?;
                let known = Decision::ALL.into_iter().find(|known| known.mark() == mark);
                known.ok_or_else(|| RegistryError::Damaged { path: path.clone() })?
            }
        };
        let (decision, result) = decide(found)?;
        if decision != found || length == 0 {
            file.write_all_at(&decision.mark(), 0).map_err(failed("write"))?;
            file.sync_data().map_err(failed("flush"))?;
        }
        if length == 0 {
            File::open(&self.directory)
                .and_then(|directory| directory.sync_all())
                .map_err(failed("flush"))?;
        }
        Ok(result)
    }
}

/// Waits for the lock, which others hold for a few writes at most. It goes when the file is closed.
fn lock(file: &File) -> io::Result<()> {
    loop {
        match file.lock() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

impl Registry for FileRegistry {
    fn begin(&self, session: SessionId) -> Result<(), RegistryError> {
        // A file that is there already belongs to an earlier attempt.
        let path = self.directory.join(session.to_string());
        match File::create_new(&path) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(RegistryError::Exists(session));
            }
            Err(source) => return Err(RegistryError::Io { what: "create", path, source }),
        }
        self.change(session, |decision| match decision {
            Decision::Open => Ok((Decision::Open, ())),
            Decision::Committed | Decision::Burned => Err(RegistryError::Exists(session)),
        })
    }

    fn commit(&self, session: SessionId) -> Result<(), RegistryError> {
        self.change(session, |decision| match decision {
            Decision::Open => Ok((Decision::Committed, ())),
            Decision::Committed => Err(RegistryError::Exists(session)),
            Decision::Burned => Err(RegistryError::Burned(session)),
        })
    }

    fn burn(&self, session: SessionId) -> Result<Outcome, RegistryError> {
        self.change(session, |decision| match decision {
            Decision::Committed => Ok((Decision::Committed, Outcome::RunningThere)),
            Decision::Open if planted!(AnswersWithoutBurning) => Ok((Decision::Open, Outcome::NotThere)),
            Decision::Open | Decision::Burned => Ok((Decision::Burned, Outcome::NotThere)),
        })
    }

    fn revoke(&self, session: SessionId) -> Result<(), RegistryError> {
        self.change(session, |_| Ok((Decision::Burned, ())))
    }
}
