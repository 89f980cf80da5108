//! Why a command did not do what it was asked: a kind, which is the exit code, and a text that says what to do.

use std::fmt;

use checkpoint::archive::ArchiveError;
use checkpoint::key::KeyFileError;
use migrate::tls::TlsError;
use serde::{Deserialize, Serialize};

use crate::size::Size;

/// The kinds of failure. Each has one exit code, documented in `docs/operating.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// Something that has no kind of its own.
    Other,
    /// The command line, or a request, is wrong.
    Usage,
    /// The host lacks something: a kernel feature, a device, a permission.
    Host,
    /// There is no such VM, its name is taken, or it is not in a state for this.
    Name,
    /// RAM or store: not enough of it.
    Resources,
    /// The other side: unreachable, another version, rubbish, a broken link.
    Link,
    /// The VM itself failed, or found a page with the wrong content.
    Vm,
    /// A hand-over was interrupted and it is not known which side has the VM; or whether it runs is not known.
    InDoubt,
    /// The VM is one, or in a state, that cannot move to another host. Nothing of it has moved.
    CannotMove,
    /// The VM has moved away: it runs at another host, and is not to be started here again.
    Moved,
    /// It would have stood still for longer than it may.
    Downtime,
    /// A checkpoint, or something that it needs, is not what was saved.
    Damaged,
    /// A checkpoint was made, and is whole; what was to be done behind it was not.
    Behind,
    /// Ctrl-C or a termination signal.
    Interrupted,
}

impl FailureKind {
    /// Of an operating error of this machine.
    fn of_io(error: &std::io::Error) -> FailureKind {
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => FailureKind::Resources,
            std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
                FailureKind::Host
            }
            _ => FailureKind::Other,
        }
    }

    /// The exit code of a process that fails for this reason.
    pub const fn exit_code(self) -> u8 {
        match self {
            FailureKind::Other => 1,
            FailureKind::Usage => 2,
            FailureKind::Host => 3,
            FailureKind::Name => 4,
            FailureKind::Resources => 5,
            FailureKind::Link => 6,
            FailureKind::Vm => 7,
            FailureKind::InDoubt => 8,
            FailureKind::CannotMove => 9,
            FailureKind::Moved => 10,
            FailureKind::Downtime => 12,
            FailureKind::Damaged => 13,
            FailureKind::Behind => 14,
            FailureKind::Interrupted => 130,
        }
    }
}

/// A failure to report: to a person, or over a control socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// For programs: the exit code goes by it.
    pub kind: FailureKind,
    /// For people: what went wrong, and what to do. It stands without the kind.
    pub text: String,
}

impl Failure {
    /// A failure of this kind, with this text for people.
    pub fn new(kind: FailureKind, text: impl Into<String>) -> Failure {
        Failure { kind, text: text.into() }
    }

    /// An error that has no kind of its own, with its causes.
    pub fn other(error: &dyn std::error::Error) -> Failure {
        Failure::new(FailureKind::Other, chain(error))
    }

    /// An operating error of this machine, with what was being done.
    pub fn io(doing: impl fmt::Display, error: &std::io::Error) -> Failure {
        Failure::new(FailureKind::of_io(error), format!("{doing}: {error}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Failure {}

impl From<swapd::StartError> for Failure {
    fn from(error: swapd::StartError) -> Failure {
        let kind = match &error {
            swapd::StartError::Budget(_) => FailureKind::Usage,
            swapd::StartError::Host(_) => FailureKind::Host,
            swapd::StartError::Origin(_) => FailureKind::Damaged,
            swapd::StartError::Store(error) => kind_of_store(error),
            swapd::StartError::Memory(_) => FailureKind::Resources,
        };
        // Its text names the cause.
        Failure::new(kind, error.to_string())
    }
}

impl From<swapd::CommandError> for Failure {
    fn from(error: swapd::CommandError) -> Failure {
        use swapd::CommandError as E;
        let kind = match &error {
            E::BudgetTooSmall { .. } | E::BudgetTooLarge { .. } | E::OutOfRange(_) => FailureKind::Usage,
            E::Store(_) | E::StillAbove { .. } | E::Pinned { .. } => FailureKind::Resources,
            E::NotNow(_) => FailureKind::Name,
            E::Gone => FailureKind::Vm,
        };
        Failure::new(kind, chain(&error))
    }
}

impl From<ArchiveError> for Failure {
    fn from(error: ArchiveError) -> Failure {
        Failure::from(&error)
    }
}

impl From<&ArchiveError> for Failure {
    fn from(error: &ArchiveError) -> Failure {
        use ArchiveError as E;
        let kind = match error {
            E::NotEmpty { .. } | E::NotDirectory { .. } | E::IsCheckpoint { .. } | E::Name(_) => {
                FailureKind::Usage
            }
            E::KeyNeeded { .. } | E::WrongKey { .. } | E::NotEncrypted { .. } => FailureKind::Usage,
            E::KeyFile(KeyFileError::Io { source, .. }) => FailureKind::of_io(source),
            E::KeyFile(_) | E::BaseKey { .. } => FailureKind::Usage,
            E::NoRoom { path, need_bytes, free_bytes } => {
                let text = format!(
                    "no room in {}: it takes {:#}, and {:#} are free",
                    path.display(),
                    Size(*need_bytes),
                    Size(*free_bytes)
                );
                return Failure::new(FailureKind::Resources, text);
            }
            E::NoArchive { .. } | E::NoCheckpoint { .. } | E::Empty { .. } => FailureKind::Name,
            E::Busy { .. } | E::OtherVm { .. } | E::InUse { .. } | E::Removed { .. } => FailureKind::Name,
            E::IsBase { .. } | E::MayBeBase { .. } | E::TooDeep { .. } => FailureKind::Name,
            E::Io { source, .. } => FailureKind::of_io(source),
            E::NotFlushed { source, .. } => FailureKind::of_io(source),
            E::NotSafe { .. } => FailureKind::Host,
            E::Cancelled => FailureKind::Interrupted,
            E::Latest { source, .. } => Failure::from(&**source).kind,
            error if error.is_damage() => FailureKind::Damaged,
            // A newer format.
            _ => FailureKind::Other,
        };
        Failure::new(kind, chain(error))
    }
}

impl From<TlsError> for Failure {
    fn from(error: TlsError) -> Failure {
        let kind = if matches!(error, TlsError::Ours(_)) { FailureKind::Usage } else { FailureKind::Link };
        Failure::new(kind, chain(&error))
    }
}

/// An error with its causes, as one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

fn kind_of_store(error: &swapd::StoreError) -> FailureKind {
    use swapd::StoreError as E;
    match error {
        E::NeitherKind { .. } => FailureKind::Usage,
        E::NoDirectIo { .. } | E::NoNamelessFiles { .. } | E::NoPermission { .. } => FailureKind::Host,
        E::Unusable { source, .. } | E::FreeSpace { source, .. } | E::Open { source, .. } => {
            match FailureKind::of_io(source) {
                FailureKind::Host => FailureKind::Host,
                _ => FailureKind::Resources,
            }
        }
        E::NoRoom { .. } | E::SparseFile { .. } | E::SmallDevice { .. } | E::InUse { .. } => {
            FailureKind::Resources
        }
    }
}

fn kind_of(error: &migrate::VmError) -> FailureKind {
    use migrate::VmError as E;
    match error {
        E::CannotMove(_) | E::TooMuchState { .. } => FailureKind::CannotMove,
        E::Resources(_) => FailureKind::Resources,
        E::Io { source, .. } => FailureKind::of_io(source),
        E::Machine(_) | E::Ended(_) | E::NotResumed(_) | E::Bug => FailureKind::Vm,
    }
}

impl From<migrate::SendError> for Failure {
    fn from(error: migrate::SendError) -> Failure {
        use migrate::SendError as E;
        let kind = match &error {
            E::Unreachable { .. }
            | E::Version(_)
            | E::Link { .. }
            | E::Peer(_)
            | E::GaveUp(_)
            | E::Refused(_) => FailureKind::Link,
            E::Insecure { source: TlsError::Ours(_), .. } => FailureKind::Usage,
            E::Insecure { .. } => FailureKind::Link,
            E::Options(_) => FailureKind::Usage,
            E::NoRoom(_) => FailureKind::Resources,
            E::NameTaken(_) => FailureKind::Name,
            E::Cancelled => FailureKind::Interrupted,
            E::Downtime(_) => FailureKind::Downtime,
            E::Vm(error) => kind_of(error),
            E::Engine(_) => FailureKind::Vm,
            E::InDoubt { .. } => FailureKind::InDoubt,
        };
        Failure::new(kind, chain(&error))
    }
}

impl From<checkpoint::save::SaveError> for Failure {
    fn from(error: checkpoint::save::SaveError) -> Failure {
        use checkpoint::save::SaveError as E;
        let kind = match &error {
            E::Options(_) => FailureKind::Usage,
            E::Cancelled => FailureKind::Interrupted,
            E::Write { source, .. } => FailureKind::of_io(source),
            E::StoodTooLong(_) => FailureKind::Downtime,
            E::Vm(error) => kind_of(error),
            E::Engine(_) | E::Restless => FailureKind::Vm,
            E::Host { .. } => FailureKind::Host,
        };
        Failure::new(kind, chain(&error))
    }
}

impl From<migrate::ReceiveError> for Failure {
    fn from(error: migrate::ReceiveError) -> Failure {
        use migrate::ReceiveError as E;
        let kind = match &error {
            E::Cancelled => FailureKind::Interrupted,
            E::Vm(error) => kind_of(error),
            E::Engine(_) => FailureKind::Vm,
            E::Spool { source, .. } => FailureKind::of_io(source),
            E::Registry(_) => FailureKind::Other,
            _ => FailureKind::Link,
        };
        Failure::new(kind, chain(&error))
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use swapd::{BudgetError, HostError, MemoryError, StartError, StoreError};

    use super::*;

    #[test]
    fn why_an_engine_does_not_start_has_a_kind_and_says_its_cause_once() {
        let no_path = || ErrorKind::NotFound.into();
        let cases: [(StartError, FailureKind); 4] = [
            (BudgetError::NotBlocks { memory_bytes: 1 }.into(), FailureKind::Usage),
            (HostError::Eventfd { source: no_path() }.into(), FailureKind::Host),
            (StoreError::Unusable { path: "/srv".into(), source: no_path() }.into(), FailureKind::Resources),
            (MemoryError::Lock { bytes: 4096, source: no_path() }.into(), FailureKind::Resources),
        ];
        for (error, kind) in cases {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            let failure = Failure::from(error);
            assert_eq!(failure.kind, kind);
            assert!(cause.is_none_or(|cause| failure.text.matches(&cause).count() == 1), "{failure}");
        }
    }
}
