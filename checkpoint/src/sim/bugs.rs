//! Deliberate bugs in the session, one of which may be planted: what finds none of them finds no others either.

use std::cell::Cell;

use migrate::sim::bugs as readers;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Bug {
    /// What was written between the last scan and the pause is left behind.
    SkipsTheLastScan,
    /// A round begins while devices still write, without a trace, to pages that it reads.
    SkipsTheDrains,
    /// A portion is read while devices still write to it what they began before it was tracked.
    ReadsBeforeTheDrain,
    /// A portion is tracked when it has been read.
    TracksAfterReading,
    /// The VM runs again while its last pages are read.
    ResumesBeforeTheLastPages,
    /// The VM runs again while its last pages are on their way to the disk.
    ResumesBeforeTheDisk,
    /// A round begins while the one before it is being written.
    LetsRoundsOverlap,
    /// A write of the image that failed counts as done.
    IgnoresAWriteError,
    /// The same for the state.
    BelievesTheState,
    /// The same for the map.
    BelievesTheMap,
    /// Stored pages count as shared with the store though it could not be done.
    BelievesFailedClones,
    /// The store's blocks are shared with an image that is to be encrypted.
    SharesPlainBlocks,
    /// Pages are written plain into an image that is to be encrypted.
    WritesPlainPages,
    /// A page counts as the base's whatever it has become.
    BelievesTheBase,
    /// A page that was written over the base's clone still counts as the clone's.
    BelievesTheClone,
    /// What the image has of pages that have no content any more stays there.
    LeavesOldContent,
    /// A page that was written, and is zeros or lost by now, is in the map as before.
    ForgetsWhatIsBare,
    /// The map has the sum of the first version of each page: it was made before the last rounds.
    KeepsOldSums,
    /// A session that fails leaves its reader behind: pages are held, writes are tracked.
    KeepsTracking,
    /// A session that fails leaves the guest throttled.
    StaysThrottled,
    /// A session that fails while the VM stands still leaves it like that.
    StaysPaused,
    /// A disk that does not answer is waited for while the VM stands still.
    WaitsForever,
    /// A user who cancels is not heard.
    IgnoresCancel,
    /// The checkpoint gets its name before its parts are durable.
    NamesBeforeTheFlush,
}

/// A bug of the session, or one of the reader's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Any {
    Session(Bug),
    Reader(readers::Bug),
}

pub(crate) const ALL: [Any; 25] = [
    Any::Session(Bug::SkipsTheLastScan),
    Any::Session(Bug::SkipsTheDrains),
    Any::Session(Bug::ReadsBeforeTheDrain),
    Any::Session(Bug::TracksAfterReading),
    Any::Session(Bug::ResumesBeforeTheLastPages),
    Any::Session(Bug::ResumesBeforeTheDisk),
    Any::Session(Bug::LetsRoundsOverlap),
    Any::Session(Bug::IgnoresAWriteError),
    Any::Session(Bug::BelievesTheState),
    Any::Session(Bug::BelievesTheMap),
    Any::Session(Bug::BelievesFailedClones),
    Any::Session(Bug::SharesPlainBlocks),
    Any::Session(Bug::WritesPlainPages),
    Any::Session(Bug::BelievesTheBase),
    Any::Session(Bug::BelievesTheClone),
    Any::Session(Bug::LeavesOldContent),
    Any::Session(Bug::ForgetsWhatIsBare),
    Any::Session(Bug::KeepsOldSums),
    Any::Session(Bug::KeepsTracking),
    Any::Session(Bug::StaysThrottled),
    Any::Session(Bug::StaysPaused),
    Any::Session(Bug::WaitsForever),
    Any::Session(Bug::IgnoresCancel),
    Any::Session(Bug::NamesBeforeTheFlush),
    // A page that was written since counts as unchanged.
    Any::Reader(readers::Bug::ForgetsDirtyPages),
    Any::Reader(readers::Bug::KeepsPagesHeld),
    Any::Reader(readers::Bug::TrustsTheStore),
];

thread_local!(static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) });

pub(crate) fn plant(bug: Option<Any>) {
    PLANTED.set(None);
    readers::plant(None);
    match bug {
        Some(Any::Session(bug)) => PLANTED.set(Some(bug)),
        Some(Any::Reader(bug)) => readers::plant(Some(bug)),
        None => {}
    }
}

pub(crate) fn is_planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Whether a deliberate bug is planted.
macro_rules! planted {
    ($bug:ident) => {
        $crate::sim::bugs::is_planted($crate::sim::bugs::Bug::$bug)
    };
}
pub(crate) use planted;
