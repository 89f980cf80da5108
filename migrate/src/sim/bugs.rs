//! Deliberate bugs in the sessions, one of which may be planted: what finds none of them finds no others either.

use std::cell::Cell;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// The target lets the VM run, and then records the commit.
    StartsBeforeTheRecord,
    /// Records are written, but not flushed (planted in the file system).
    LeavesRecordsUnflushed,
    /// A commit that could not be recorded is taken for one that was.
    IgnoresAFailedRecord,
    /// The target's host says that a VM is not there, and does not see to it that it stays so.
    AnswersWithoutBurning,
    /// A session that nobody has decided counts as a commit when the source asks.
    BelievesTheUndecided,
    /// A session whose decision a crash of the host took away counts as one that was not committed.
    ForgetsTheCrash,
    /// The same for one whose decision somebody removed.
    TakesALostDecisionForNone,
    /// What is burned is only recorded, and can still be committed.
    BurnsTheRecordAlone,
    /// The decision goes before the record has it.
    RemovesTheDecisionEarly,
    /// A record that could not be flushed behind the start is left like that.
    FlushesOnce,
    /// A commit can be read before the VM has started.
    UnlocksTheRecordEarly,
    /// A VM that could not start stays recorded as one that runs.
    ForgetsToRevoke,
    /// The source goes on by itself when nothing is heard after its commit.
    ResumesAfterTheCommit,
    /// The source goes on without its name.
    ForgetsTheName,
    /// A data stream that breaks counts as one that has ended, and the totals are believed.
    BelievesLostStreams,
    /// A round counts as arrived before its pages have been taken from the stream.
    EndsRoundsEarly,
    /// What was written between the last scan and the pause is left behind.
    SkipsTheLastScan,
    /// A round begins while devices still write, without a trace, to pages that it sends.
    SkipsTheDrains,
    /// A page that is written while it waits to be sent is not sent in the next round.
    ForgetsDirtyPages,
    /// What was read from the store is not looked at.
    TrustsTheStore,
    /// Pages that the store does not give in time are lost, though it gives no others either.
    TakesSilenceForBroken,
    /// The content of pages is not compared with their checksums.
    TrustsTheWire,
    /// Pages stay held when they have been sent.
    KeepsPagesHeld,
    /// A peer that says nothing is waited for.
    WaitsForever,
    /// A part of the state that the disk did not take counts as kept.
    BelievesAFullSpool,
    /// What of the state does not stay in memory is lost.
    LosesWhatIsSpooled,
    /// What comes back from the disk counts as the state that was kept there.
    TrustsTheSpool,
    /// The state's parts on the disk are read before those in memory.
    ReadsTheSpoolFirst,
}

impl Bug {
    pub const ALL: [Bug; 28] = [
        Bug::StartsBeforeTheRecord,
        Bug::LeavesRecordsUnflushed,
        Bug::IgnoresAFailedRecord,
        Bug::AnswersWithoutBurning,
        Bug::BelievesTheUndecided,
        Bug::ForgetsTheCrash,
        Bug::TakesALostDecisionForNone,
        Bug::BurnsTheRecordAlone,
        Bug::RemovesTheDecisionEarly,
        Bug::FlushesOnce,
        Bug::UnlocksTheRecordEarly,
        Bug::ForgetsToRevoke,
        Bug::ResumesAfterTheCommit,
        Bug::ForgetsTheName,
        Bug::BelievesLostStreams,
        Bug::EndsRoundsEarly,
        Bug::SkipsTheLastScan,
        Bug::SkipsTheDrains,
        Bug::ForgetsDirtyPages,
        Bug::TrustsTheStore,
        Bug::TakesSilenceForBroken,
        Bug::TrustsTheWire,
        Bug::KeepsPagesHeld,
        Bug::WaitsForever,
        Bug::BelievesAFullSpool,
        Bug::LosesWhatIsSpooled,
        Bug::TrustsTheSpool,
        Bug::ReadsTheSpoolFirst,
    ];
}

thread_local!(static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) });

pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

pub fn is_planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Whether a deliberate bug is planted.
macro_rules! planted {
    ($bug:ident) => {
        $crate::sim::bugs::is_planted($crate::sim::bugs::Bug::$bug)
    };
}
pub(crate) use planted;
