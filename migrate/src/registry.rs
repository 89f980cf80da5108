//! Who may run a VM after a hand-over: one decision a session, made once, at the target's host.
//!
//! ```text
//!   (nothing) ── begin ──▶ begun ── commit ──▶ committed      "it may run here; the source must not"
//!                            │                    │
//!                            └────── burn ──▶ burned ◀── revoke (the VM could not start)
//! ```
//! While a hand-over is decided the VM stands still, and nothing may wait for a disk. So a session has two files:
//!
//! - its *record*, in the run directory, outlasts a crash of the host. `begin` writes it in the state *begun* and
//!   flushes it, long before the pause; it names this boot and the place of the other file. It is written once more
//!   when the decision has been made and nobody stands still: *committed* behind the VM's start, *burned* before
//!   anybody is told so.
//! - its *decision*, on a file system that is memory (`outside::in_memory`), outlasts the death of a process. `commit`
//!   writes eight bytes into it, and nothing else happens in the pause. The file goes when the record has been flushed
//!   with the same word.
//!
//! Both files are changed under the record's `flock` alone. (One exception: the flush behind the start,
//! [`Kept::flush`]. Whoever writes the record of a committed session writes the same word.) A process that commits
//! keeps the lock until the VM has started or the commit is revoked. So whoever gets the lock sees a decision that
//! stands.
//!
//! A record that says *committed* or *burned* counts by itself. A record that says *begun* counts only together with
//! its decision, and only within the boot that it names. What is found, and what that means:
//!
//! | what happens | found | meaning |
//! |---|---|---|
//! | the target's process dies before the commit, or gives up | decision open | not started; burned, can never start |
//! | it dies between commit and start | decision committed | counts as running: nobody can tell it from the next |
//! | it dies behind the start, record not flushed | decision committed | it ran here; whoever asks records that |
//! | the VM cannot start | decision burned | the source may have it back; the record follows |
//! | no flush succeeds behind the start | decision committed | runs here; tried again while the process lives |
//! | no flush succeeds behind a burn | decision burned | will not start; whoever asks hears nothing until one does |
//! | the host goes down, record begun | record of another boot | nobody can say whether it ran. It does not now |
//! | somebody removes the decision, record begun | no decision | nobody can say, and the VM may run here |
//! | the daemon is started anew | as before | nothing is kept in its memory |
//!
//! Where nobody can say, no answer is given: the VM stays paused at its source, and its operator decides. The VM never
//! runs at both sides: it starts only behind a decision *committed*, and whoever answers *not there* has burned that
//! decision before, under the lock, in the one boot in which it could still be committed. Nor is it said to run where
//! it does not: *running there* is only said of a committed session.
//!
//! A file system in memory may be swapped out as any memory may, and then the commit reads a page back.

use std::fs::TryLockError;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::limits::{LOCK_RETRY, RESOLVE_CALL_LIMIT, scaled_for_tests};
use crate::outside::{
    File, FileExt, Instant, OpenOptions, boot_id, in_memory, make_own, pause, planted, remove_file, vouch_for,
};
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

/// Why a session could not be begun, committed or burned on record, or why nobody can say what became of it.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The session was given up before the commit arrived: the VM must not start here.
    #[error("session {0} was given up before the source's commit arrived")]
    Burned(SessionId),
    /// There is no record. Nobody may answer *not there* then: the record that is lost may have said *committed*.
    #[error(
        "session {0} has no record here: it was never begun, or the record is lost (this host was \
         started anew, or it was given up over a week ago)"
    )]
    Unknown(SessionId),
    /// The session was begun, or committed, before: neither is done twice.
    #[error("session {0} exists here already")]
    Exists(SessionId),
    /// The record is undecided and of an earlier boot. Its decision went with the memory that it was in, so only the
    /// operator can say.
    #[error(
        "this host went down while session {0} was handed over, and its record does not say whether the VM \
         ran here: it runs here no longer, so decide whether it goes on where it was (`vmemd resolve NAME --force \
         run-here`)"
    )]
    Lost(SessionId),
    /// The record is undecided and of this boot, but its decision has been removed: the VM may run here.
    #[error(
        "what was decided of session {session} stood in {path}, which somebody has removed: look whether \
         the VM runs here, and decide where it was (`vmemd resolve NAME --force run-here` or `--force gone`)"
    )]
    Gone {
        /// The session in question.
        session: SessionId,
        /// Where the decision stood.
        path: PathBuf,
    },
    /// The record stays locked: a commit whose VM has not started yet, or a process that stands still. Worth asking
    /// again.
    #[error("session {0} is being decided: whoever decides it does not come to an end; ask again")]
    Busy(SessionId),
    /// A record or decision holds something that is never written there, so nothing is believed of it.
    #[error("the record {path} of a session is damaged")]
    Damaged {
        /// The record or the decision.
        path: PathBuf,
    },
    /// A file or directory of the registry could not be used.
    #[error("could not {what} {path}")]
    Io {
        /// The step that failed, as a verb for the message: `create`, `flush`.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

/// One small file a session in a directory, named by the session, and another one in memory until the first is settled.
/// Every method is atomic against the others, also between processes.
#[derive(Debug, Clone)]
pub struct Registry {
    directory: PathBuf,
    /// Where the decisions of sessions are that begin here.
    decisions: PathBuf,
}

/// What a record begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mark {
    /// Just created; of a process that died before it wrote, or of a former version.
    Open,
    /// Behind it stand the boot that it is of and the place of the decision.
    Begun,
    /// A commit of a former version, of which it is not known that it lasts. Behind it stands the boot that it is of.
    Flushing,
    Committed,
    Burned,
}

const MARK_BYTES: usize = 8;
/// As the kernel writes it, with the line's end.
const BOOT_ID_BYTES: usize = 37;
/// Names that are tried for a decision.
const NAME_TRIES: u32 = 10_000;
/// Longest place of a decision.
const PLACE_BYTES_MAX: usize = 4096;

impl Mark {
    const ALL: [Mark; 5] = [Mark::Open, Mark::Begun, Mark::Flushing, Mark::Committed, Mark::Burned];

    fn bytes(self) -> [u8; MARK_BYTES] {
        *match self {
            Mark::Open => b"OPEN   \n",
            Mark::Begun => b"BEGUN  \n",
            Mark::Flushing => b"COMMIT?\n",
            Mark::Committed => b"COMMIT \n",
            Mark::Burned => b"BURNED \n",
        }
    }

    fn of(bytes: [u8; MARK_BYTES]) -> Option<Mark> {
        Mark::ALL.into_iter().find(|known| known.bytes() == bytes)
    }
}

impl Registry {
    /// Opens the registry in `directory`, which is made if it is missing, and finds the place in memory for decisions.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn new(directory: &Path) -> Result<Registry, RegistryError> {
        let failed = |source| RegistryError::Io { what: "create", path: directory.to_path_buf(), source };
        // Records name places in it, for whoever asks, wherever that process is.
        let path = std::path::absolute(directory).map_err(failed)?;
        make_own(&path).map_err(failed)?;
        let decisions = in_memory(&path).map_err(failed)?;
        Ok(Registry { directory: path, decisions })
    }

    /// A directory, beside the registry's own, in which a process that begins sessions must be able to write.
    pub fn decisions(&self) -> &Path {
        &self.decisions
    }

    /// A session is being received. Called long before the downtime: all that is slow is done here.
    ///
    /// # Errors
    /// If there has been such a session, or it cannot be recorded.
    pub fn begin(&self, session: SessionId) -> Result<Begun, RegistryError> {
        // A file that is there already belongs to an earlier attempt.
        let path = self.directory.join(session.to_string());
        match File::create_new(&path) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(RegistryError::Exists(session));
            }
            Err(source) => return Err(RegistryError::Io { what: "create", path, source }),
        }
        let record = self.record(session)?.locked()?;
        if record.read()? != Mark::Open {
            return Err(RegistryError::Exists(session));
        }
        let decision = Decision::create(session, &self.decisions)?;
        let recorded = || {
            // A decision that cannot be found is to fail now, while the VM runs, and not at the commit.
            Decision::find(session, decision.path.clone())?;
            let boot = boot_id().map_err(record.failed("read the boot id for"))?;
            record.write(&[&Mark::Begun.bytes()[..], boot.as_bytes(), decision.place_bytes()].concat())?;
            record.flush()?;
            File::open(&self.directory)
                .and_then(|directory| directory.sync_all())
                .map_err(|error| record.failed("flush")(error))?;
            // Dropping `record` gives its lock back, so the file is opened anew. Here, and not at the commit: to find a
            // file may take a read from a disk.
            self.record(session)
        };
        match recorded() {
            Ok(record) => Ok(Begun { record, decision }),
            Err(error) => {
                // It has not begun, and never will: pruned one day.
                if record.write(&Mark::Burned.bytes()).is_ok() {
                    decision.remove();
                }
                Err(error)
            }
        }
    }

    /// Sees to it that the VM never starts here, unless the session was committed, and says which of the two it is. A
    /// host that knows nothing of the session must not answer: the record may have been lost, with the answer in it.
    ///
    /// # Errors
    /// If the outcome is not known, or cannot be recorded.
    pub fn burn(&self, session: SessionId) -> Result<Outcome, RegistryError> {
        let record = self.record(session)?.locked_soon(session)?;
        let decision = match record.read()? {
            Mark::Committed => return Ok(Outcome::RunningThere),
            Mark::Open | Mark::Flushing if planted!(AnswersWithoutBurning) => return Ok(Outcome::NotThere),
            Mark::Flushing if !record.is_of_this_boot()? => return Err(RegistryError::Lost(session)),
            // Burned once more: whether an earlier flush succeeded is not known.
            Mark::Open | Mark::Flushing | Mark::Burned => None,
            Mark::Begun if !record.is_of_this_boot()? => match planted!(ForgetsTheCrash) {
                true => None,
                false => return Err(RegistryError::Lost(session)),
            },
            Mark::Begun => match Decision::find(session, record.place()?) {
                Err(RegistryError::Gone { .. }) if planted!(TakesALostDecisionForNone) => None,
                found => Some(found?),
            },
        };
        if let Some(decision) = decision {
            match decision.read()? {
                Mark::Committed => {
                    // The process that was to record the commit may be dead.
                    match record.put(Mark::Committed) {
                        Ok(()) => decision.remove(),
                        Err(error) => {
                            tracing::warn!(%error, %session, "a commit is not recorded for good yet")
                        }
                    }
                    return Ok(Outcome::RunningThere);
                }
                Mark::Open if planted!(BelievesTheUndecided) => return Ok(Outcome::RunningThere),
                Mark::Open if planted!(AnswersWithoutBurning) => return Ok(Outcome::NotThere),
                _ if planted!(BurnsTheRecordAlone) => {
                    return record.put(Mark::Burned).map(|()| Outcome::NotThere);
                }
                _ => decision.write(Mark::Burned)?,
            }
            record.put(Mark::Burned)?;
            decision.remove();
        } else {
            record.put(Mark::Burned)?;
        }
        Ok(Outcome::NotThere)
    }

    /// Forgets sessions that were burned long ago: their sources have had their answers, or keep their VMs paused until
    /// somebody decides. Committed sessions stay for ever, because their sources may ask at any later time; undecided
    /// ones stay, too.
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
                && let Err(error) = self.forget_burned(session)
            {
                // The others are not to stay because of this one.
                tracing::warn!(%error, %session, "a record of a session stays");
            }
        }
        Ok(())
    }

    fn forget_burned(&self, session: SessionId) -> Result<(), RegistryError> {
        let record = self.record(session)?.locked_soon(session)?;
        if record.read()? == Mark::Burned {
            remove_file(&record.path).map_err(record.failed("remove"))?;
        }
        Ok(())
    }

    fn record(&self, session: SessionId) -> Result<Record, RegistryError> {
        let path = self.directory.join(session.to_string());
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => Ok(Record { file, path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(RegistryError::Unknown(session)),
            Err(source) => Err(RegistryError::Io { what: "open", path, source }),
        }
    }
}

/// A session that is recorded for good, and undecided.
#[derive(Debug)]
pub struct Begun {
    record: Record,
    decision: Decision,
}

impl Begun {
    /// Decides that the VM is this host's, because the source's commit has arrived. The caller starts the VM while it
    /// has the result: nobody else can read the decision in that time. Part of the downtime: waits for no disk.
    ///
    /// # Errors
    /// If it was given up, or this cannot be recorded. Then it must not run here.
    pub fn commit(self) -> Result<Committed, RegistryError> {
        let Decision { session, path, .. } = self.decision;
        let record = self.record.locked()?;
        // Looked for anew, by its name, as whoever asks will look for it: it goes when the session is burned.
        let decision = match Decision::find(session, path) {
            Ok(decision) => decision,
            Err(RegistryError::Gone { .. }) if record.read()? == Mark::Burned => {
                return Err(RegistryError::Burned(session));
            }
            Err(error) => return Err(error),
        };
        match decision.read()? {
            Mark::Open => {}
            Mark::Burned => return Err(RegistryError::Burned(session)),
            _ => return Err(RegistryError::Exists(session)),
        }
        decision.write(Mark::Committed)?;
        Ok(Committed { record, decision })
    }
}

/// A decided commit. Nobody else reads the decision before this is dropped, or [unlocked](Self::started).
#[derive(Debug)]
#[must_use = "the VM is started while this is held"]
pub struct Committed {
    record: Record,
    decision: Decision,
}

impl Committed {
    /// Takes the commit back: the VM could not be started, no vCPU has run, and the source may have it. Waits for no
    /// disk; [`Registry::burn`] makes it last.
    ///
    /// # Errors
    /// If that cannot be written.
    pub fn revoke(&self) -> Result<(), RegistryError> {
        self.decision.write(Mark::Burned)
    }

    /// The VM runs: whoever asks may hear of it now. The record has still to be flushed, in no hurry.
    pub fn started(self) -> Kept {
        let Committed { record, decision } = self;
        record.unlock();
        Kept { record, decision }
    }
}

/// A VM that runs here, before the record says so for good.
#[derive(Debug)]
#[must_use = "the record is to last"]
pub struct Kept {
    record: Record,
    decision: Decision,
}

impl Kept {
    /// Makes the record last through a crash of the host: waits for the disk. To be tried again if it fails.
    ///
    /// # Errors
    /// If it cannot be written or flushed.
    pub fn flush(&self) -> Result<(), RegistryError> {
        if planted!(RemovesTheDecisionEarly) {
            self.decision.remove();
        }
        // No lock is needed, because nobody else changes the record of a committed session. The decision goes only
        // behind it: whoever has just read *begun* is to find the decision, too.
        self.record.put(Mark::Committed)?;
        self.record.lock()?;
        self.decision.remove();
        self.record.unlock();
        Ok(())
    }
}

/// What becomes of a session, in a file that is memory.
#[derive(Debug)]
struct Decision {
    session: SessionId,
    file: File,
    path: PathBuf,
}

impl Decision {
    /// Under a name that is free: one may have been left there by a session whose record went with its run directory.
    fn create(session: SessionId, directory: &Path) -> Result<Decision, RegistryError> {
        let mut tries = 0;
        let (file, path) = loop {
            let path = directory.join(format!("{session}-{tries}.decision"));
            match File::create_new(&path) {
                Ok(file) => break (file, path),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && tries < NAME_TRIES => {
                    tries += 1
                }
                Err(source) => return Err(RegistryError::Io { what: "create", path, source }),
            }
        };
        let decision = Decision { session, file, path };
        // Its memory is taken now: later there may be none.
        decision.write(Mark::Open)?;
        Ok(decision)
    }

    fn find(session: SessionId, path: PathBuf) -> Result<Decision, RegistryError> {
        let opened = vouch_for(&path).and_then(|()| OpenOptions::new().read(true).write(true).open(&path));
        match opened {
            Ok(file) => Ok(Decision { session, file, path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(RegistryError::Gone { session, path })
            }
            Err(source) => Err(RegistryError::Io { what: "open", path, source }),
        }
    }

    fn place_bytes(&self) -> &[u8] {
        std::os::unix::ffi::OsStrExt::as_bytes(self.path.as_os_str())
    }

    fn read(&self) -> Result<Mark, RegistryError> {
        let mut mark = [0; MARK_BYTES];
        self.file.read_exact_at(&mut mark, 0).map_err(|source| self.failed("read", source))?;
        Mark::of(mark).ok_or_else(|| RegistryError::Damaged { path: self.path.clone() })
    }

    fn write(&self, mark: Mark) -> Result<(), RegistryError> {
        self.file.write_all_at(&mark.bytes(), 0).map_err(|source| self.failed("write", source))
    }

    /// The record says the same by now. One that stays takes a page of memory until the host is started anew.
    fn remove(&self) {
        if let Err(error) = remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "a decision stays");
        }
    }

    fn failed(&self, what: &'static str, source: io::Error) -> RegistryError {
        RegistryError::Io { what, path: self.path.clone(), source }
    }
}

/// A session's file. A lock on it lasts for as long as it is open.
#[derive(Debug)]
struct Record {
    file: File,
    path: PathBuf,
}

impl Record {
    /// Waits for the lock. Others hold it for a few writes, and during the start of a VM. It may be for long: a process
    /// that starts one can be made to stand still.
    fn locked_soon(self, session: SessionId) -> Result<Record, RegistryError> {
        // Who asks is to hear that, and waits no longer than this limit itself.
        let deadline = Instant::now() + scaled_for_tests(RESOLVE_CALL_LIMIT) / 2;
        loop {
            match self.file.try_lock() {
                Ok(()) => return Ok(self),
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => {
                    return Err(RegistryError::Busy(session));
                }
                Err(TryLockError::WouldBlock) => pause(LOCK_RETRY),
                Err(TryLockError::Error(error)) => return Err(self.failed("lock")(error)),
            }
        }
    }

    /// As [`Record::locked_soon`], without an end: for the process that has the session itself.
    fn locked(self) -> Result<Record, RegistryError> {
        self.lock()?;
        Ok(self)
    }

    fn lock(&self) -> Result<(), RegistryError> {
        loop {
            match self.file.lock() {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed("lock")(error)),
            }
        }
    }

    fn unlock(&self) {
        if let Err(error) = self.file.unlock() {
            tracing::warn!(%error, path = %self.path.display(), "the lock is kept until the flush");
        }
    }

    fn read(&self) -> Result<Mark, RegistryError> {
        if self.file.metadata().map_err(self.failed("read"))?.len() == 0 {
            return Ok(Mark::Open);
        }
        let mut mark = [0; MARK_BYTES];
        self.file.read_exact_at(&mut mark, 0).map_err(self.failed("read"))?;
        Mark::of(mark).ok_or_else(|| self.damaged())
    }

    fn is_of_this_boot(&self) -> Result<bool, RegistryError> {
        let mut boot = [0; BOOT_ID_BYTES];
        self.file.read_exact_at(&mut boot, MARK_BYTES as u64).map_err(self.failed("read"))?;
        Ok(boot == boot_id().map_err(self.failed("read the boot id for"))?.as_bytes())
    }

    /// Where the decision is.
    fn place(&self) -> Result<PathBuf, RegistryError> {
        let from = (MARK_BYTES + BOOT_ID_BYTES) as u64;
        let length = self.file.metadata().map_err(self.failed("read"))?.len().saturating_sub(from) as usize;
        if !(1..=PLACE_BYTES_MAX).contains(&length) {
            return Err(self.damaged());
        }
        let mut place = vec![0; length];
        self.file.read_exact_at(&mut place, from).map_err(self.failed("read"))?;
        Ok(PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(place)))
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

    fn damaged(&self) -> RegistryError {
        RegistryError::Damaged { path: self.path.clone() }
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> RegistryError + use<> {
        let path = self.path.clone();
        move |source| RegistryError::Io { what, path, source }
    }
}
