//! Who may run a VM after a hand-over: one decision a session, made once, at the target's host.
//!
//! ```text
//!   (nothing) ── begin ──▶ open ── commit ──▶ committed      "it may run here; the source must not"
//!                            │                    │
//!                            └───── burn ──▶ burned ◀── revoke (the VM could not start)
//! ```
//! `commit` is called by the process that received the VM, before the VM starts; `burn` by that process
//! when it gives up, and by the daemon when the source asks ([`crate::answer_resolve`]). Whichever comes first stands.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

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
    #[error("session {0} was never begun here")]
    Unknown(SessionId),
    #[error("session {0} exists here already")]
    Exists(SessionId),
    #[error("the record {path} of a session is damaged")]
    Damaged { path: PathBuf },
    #[error("could not {what} {path}")]
    Io { what: &'static str, path: PathBuf, source: std::io::Error },
}

/// Every method is atomic against the others, also between processes, and lasting when it returns.
pub trait Registry {
    /// A session is being received. Called long before the downtime: do the slow part here.
    fn begin(&self, session: SessionId) -> Result<(), RegistryError>;
    /// The source's commit arrived: from now on the VM may run here. Part of the downtime.
    fn commit(&self, session: SessionId) -> Result<(), RegistryError>;
    /// The VM must not start here any more, unless it was committed: says which of them it is.
    fn burn(&self, session: SessionId) -> Result<Outcome, RegistryError>;
    /// A committed session's VM failed to start, and no vCPU has run: the source may have it back.
    fn revoke(&self, session: SessionId) -> Result<(), RegistryError>;
}

/// One small file a session in a directory, named by the session.
#[derive(Debug, Clone)]
pub struct FileRegistry {
    directory: PathBuf,
}

impl FileRegistry {
    /// # Errors
    /// If the directory cannot be made.
    pub fn new(directory: &Path) -> Result<FileRegistry, RegistryError> {
        std::fs::create_dir_all(directory).map_err(|source| RegistryError::Io {
            what: "create",
            path: directory.to_path_buf(),
            source,
        })?;
        Ok(FileRegistry { directory: directory.to_path_buf() })
    }
}
