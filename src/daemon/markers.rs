//! The fate of each hand-over, as files: who asks after a broken link gets the one answer that stands.
//!
//! ```text
//!   ID.open                        accepted, undecided
//!   ID.open + ID.fate "started"    the VM started here: the source must never run it again
//!   ID.open + ID.fate "burned"     it will never start here: the source may go on
//! ```
//! `ID.fate` is written elsewhere and linked into place, so it appears once, whole, and the first writer wins: the
//! receiving process deciding to start and the daemon answering "not here" can never both happen.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::control::rundir::RunDir;
use crate::failure::Failure;

/// Markers older than this are removed: a source asks within seconds, a person within hours.
pub const KEEP: Duration = Duration::from_secs(24 * 3600);

/// What became of a hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Started,
    Burned,
}

impl Fate {
    const fn text(self) -> &'static str {
        match self {
            Fate::Started => "started",
            Fate::Burned => "burned",
        }
    }
}

/// The directory of markers.
#[derive(Clone, Debug)]
pub struct Markers {
    path: PathBuf,
}

impl Markers {
    /// Opens (and makes) the directory within a run directory.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn open(dir: &RunDir) -> Result<Markers, Failure> {
        let path = dir.path().join(".sessions");
        std::fs::create_dir_all(&path).map_err(|error| Failure::io(format!("cannot make {}", path.display()), &error))?;
        Ok(Markers { path })
    }

    fn file(&self, session: &str, suffix: &str) -> PathBuf {
        assert!(session.bytes().all(|byte| byte.is_ascii_hexdigit()), "a session id is hexadecimal: {session:?}");
        self.path.join(format!("{session}.{suffix}"))
    }

    /// Notes that a session was accepted.
    ///
    /// # Errors
    /// If the file cannot be written, or the session is known already.
    pub fn accept(&self, session: &str) -> Result<(), Failure> {
        let path = self.file(session, "open");
        std::fs::File::create_new(&path)
            .map(|_| ())
            .map_err(|error| Failure::io(format!("cannot note a session in {}", path.display()), &error))
    }

    /// Decides the session's fate unless it is decided, and returns the one that stands.
    ///
    /// # Errors
    /// If it can be neither written nor read.
    pub fn decide(&self, session: &str, fate: Fate) -> Result<Fate, Failure> {
        let path = self.file(session, "fate");
        let draft = self.file(session, &format!("draft-{}", fate.text()));
        let fail = |error| Failure::io(format!("cannot decide a session in {}", path.display()), &error);
        let linked = write_synced(&draft, fate.text()).and_then(|()| std::fs::hard_link(&draft, &path));
        let _ = std::fs::remove_file(&draft);
        match linked {
            Ok(()) => Ok(fate),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                self.fate(session).map_err(fail)?.ok_or_else(|| fail(std::io::ErrorKind::NotFound.into()))
            }
            Err(error) => Err(fail(error)),
        }
    }

    fn fate(&self, session: &str) -> std::io::Result<Option<Fate>> {
        match std::fs::read_to_string(self.file(session, "fate")) {
            Ok(text) => Ok([Fate::Started, Fate::Burned].into_iter().find(|fate| fate.text() == text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Answers a source that does not know: did the VM start here? If it has not, it never will.
    ///
    /// # Errors
    /// If the markers cannot be read or written: then there is no answer.
    pub fn resolve(&self, session: &str) -> Result<Fate, Failure> {
        // A session that was never accepted here, or given up here, cannot start here: nothing needs to be burned.
        if !self.file(session, "open").exists() {
            return Ok(Fate::Burned);
        }
        self.decide(session, Fate::Burned)
    }

    /// Forgets a session that ended without the VM starting here.
    pub fn forget(&self, session: &str) {
        if matches!(self.decide(session, Fate::Burned), Ok(Fate::Burned)) {
            let _ = std::fs::remove_file(self.file(session, "open"));
            let _ = std::fs::remove_file(self.file(session, "fate"));
        }
    }

    /// Removes markers older than [`KEEP`].
    pub fn clean(&self, now: SystemTime) {
        for entry in std::fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let age = entry.metadata().and_then(|meta| meta.modified()).map(|then| now.duration_since(then));
            if matches!(age, Ok(Ok(age)) if age > KEEP) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

fn write_synced(path: &Path, text: &str) -> std::io::Result<()> {
    let mut file = std::fs::File::create(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn markers(name: &str) -> (RunDir, Markers) {
        let path = std::env::temp_dir().join(format!("vmemd-markers-{}-{name}", std::process::id()));
        let dir = RunDir::open(&path).unwrap();
        let markers = Markers::open(&dir).unwrap();
        (dir, markers)
    }

    #[test]
    fn the_first_decision_stands() {
        let (dir, markers) = markers("first");
        markers.accept("aa").unwrap();
        assert_eq!(markers.decide("aa", Fate::Started).unwrap(), Fate::Started);
        assert_eq!(markers.resolve("aa").unwrap(), Fate::Started);
        markers.accept("bb").unwrap();
        assert_eq!(markers.resolve("bb").unwrap(), Fate::Burned);
        assert_eq!(markers.decide("bb", Fate::Started).unwrap(), Fate::Burned);
        std::fs::remove_dir_all(dir.path()).unwrap();
    }

    #[test]
    fn who_asks_for_what_never_was_leaves_nothing() {
        let (dir, markers) = markers("never");
        assert_eq!(markers.resolve("cc").unwrap(), Fate::Burned);
        assert_eq!(std::fs::read_dir(&markers.path).unwrap().count(), 0);
        std::fs::remove_dir_all(dir.path()).unwrap();
    }

    #[test]
    fn what_was_given_up_is_forgotten_and_what_is_old_is_removed() {
        let (dir, markers) = markers("forget");
        markers.accept("dd").unwrap();
        markers.forget("dd");
        assert_eq!(std::fs::read_dir(&markers.path).unwrap().count(), 0);
        markers.accept("ee").unwrap();
        markers.decide("ee", Fate::Started).unwrap();
        markers.forget("ee");
        assert_eq!(markers.resolve("ee").unwrap(), Fate::Started);
        markers.clean(SystemTime::now());
        assert_eq!(std::fs::read_dir(&markers.path).unwrap().count(), 2);
        markers.clean(SystemTime::now() + 2 * KEEP);
        assert_eq!(std::fs::read_dir(&markers.path).unwrap().count(), 0);
        std::fs::remove_dir_all(dir.path()).unwrap();
    }

    #[test]
    fn a_race_has_one_winner() {
        let (dir, markers) = markers("race");
        for number in 0..50 {
            let session = format!("{number:x}");
            markers.accept(&session).unwrap();
            let (a, b) = std::thread::scope(|scope| {
                let starter = scope.spawn(|| markers.decide(&session, Fate::Started).unwrap());
                let burner = scope.spawn(|| markers.resolve(&session).unwrap());
                (starter.join().unwrap(), burner.join().unwrap())
            });
            assert_eq!(a, b);
        }
        std::fs::remove_dir_all(dir.path()).unwrap();
    }
}
