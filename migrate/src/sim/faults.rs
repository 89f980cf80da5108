//! What goes wrong, and when: at a step of the protocol, there at once, some bytes or some time later.

use std::time::Duration;

use super::guest::Chore;

/// How far a session has come, by what was said last.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub(crate) enum Step {
    Connecting,
    Offered,
    Accepted,
    HeatSent,
    FirstRound,
    LaterRounds,
    StateSent,
    LastRound,
    FinalSent,
    Prepared,
    CommitSent,
    Recorded,
    Answered,
    Asked,
    Resolved,
}

impl Step {
    pub(crate) const ALL: [Step; 15] = [
        Step::Connecting,
        Step::Offered,
        Step::Accepted,
        Step::HeatSent,
        Step::FirstRound,
        Step::LaterRounds,
        Step::StateSent,
        Step::LastRound,
        Step::FinalSent,
        Step::Prepared,
        Step::CommitSent,
        Step::Recorded,
        Step::Answered,
        Step::Asked,
        Step::Resolved,
    ];
}

/// A kind of fault, as the coverage table has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub(crate) enum Class {
    /// One connection breaks, or all.
    Cut,
    /// Nothing gets through any more, one way or both: somebody's time runs out.
    Silence,
    SourceDies,
    /// The process that receives.
    TargetDies,
    /// The daemon, or its whole host.
    HostDies,
    /// The VM, an engine, the disk or a user says no, at either side.
    Refusal,
}

impl Class {
    pub(crate) const ALL: [Class; 6] =
        [Class::Cut, Class::Silence, Class::SourceDies, Class::TargetDies, Class::HostDies, Class::Refusal];
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    Cut {
        all: bool,
    },
    Silence {
        silent: [bool; 2],
        lasts: Duration,
    },
    SourceDies,
    TargetDies,
    DaemonDies,
    HostCrashes,
    /// Somebody removes files that are in memory.
    Swept,
    Fails(Chore),
    EngineFails {
        source: bool,
    },
    Cancel {
        source: bool,
    },
    Disk {
        skip: u32,
        count: u32,
    },
    Turned(crate::wire::opening::RefuseKind),
    /// A byte is spoilt on its way.
    Spoilt {
        after: u64,
    },
    /// A connection comes twice.
    Twice,
}

impl Fault {
    pub(crate) fn class(self) -> Option<Class> {
        Some(match self {
            Fault::Cut { .. } => Class::Cut,
            Fault::Silence { .. } => Class::Silence,
            Fault::SourceDies => Class::SourceDies,
            Fault::TargetDies => Class::TargetDies,
            Fault::DaemonDies | Fault::HostCrashes => Class::HostDies,
            Fault::Spoilt { .. } | Fault::Twice | Fault::Swept => return None,
            _ => Class::Refusal,
        })
    }
}

/// How long after its step a fault comes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Later {
    Now,
    Bytes { side: usize, count: u64 },
    Time(Duration),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Planned {
    pub(crate) step: Step,
    pub(crate) later: Later,
    pub(crate) fault: Fault,
}

/// Why a cell of the table cannot be reached.
pub(crate) fn is_impossible(step: Step, class: Class) -> bool {
    match class {
        // There is no such process yet.
        Class::TargetDies => step < Step::Accepted,
        // All has been said.
        Class::Refusal => step == Step::Resolved,
        _ => false,
    }
}
