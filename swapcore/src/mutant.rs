//! Deliberate bugs, for the test that the simulation finds each of them (`docs/simulation.md`).
//!
//! `mutant!(Name)` is an expression at the place of the bug: true while that one is planted in this thread. Without the
//! feature `mutants` it is `false`, and nothing else of this file exists.

#[cfg(feature = "mutants")]
mod planted {
    use std::cell::Cell;

    macro_rules! mutants {
        ($($(#[doc = $what:literal])+ $name:ident,)+) => {
            /// What can be planted.
            #[derive(Clone, Copy, PartialEq, Eq, Debug)]
            pub enum Mutant { $($(#[doc = $what])+ $name,)+ }

            /// All of them, each with what is wrong with it.
            pub const MUTANTS: &[(Mutant, &str)] = &[$((Mutant::$name, concat!($($what),+)),)+];
        };
    }

    mutants! {
        // ── checksums ──
        /// A changed page is taken for an unchanged one, and not written.
        DropsChangedPages,
        /// Nobody looks at what was read.
        TrustsReads,
        /// Of a read of several pages only the first one is checked.
        ChecksFirstPageOnly,
        /// What comes back wrong twice is believed.
        TrustsRereads,
        /// A read that failed counts as a good one.
        TrustsFailedReads,
        // ── the store ──
        /// A write that failed counts as done.
        TrustsFailedWrites,
        /// A short read or write counts as whole.
        TrustsShortTransfers,
        /// A full store is no reason to stop, nor to write again.
        IgnoresFullStore,
        /// A page's store copy counts as good from the moment it is to be written.
        KeepsStoredBit,
        /// The first error of a read is the page's end.
        PoisonsAtFirstError,
        /// A page that was not given in time is taken for broken, whatever the store does otherwise.
        TakesSilenceForBroken,
        /// Nobody asks a store for another page when one cannot be read.
        NeverProbes,
        /// Nothing is written for a probe where the page that cannot be read is the only one.
        NeverSows,
        /// Nobody is told that a store does not answer.
        WaitsInSilence,
        /// Nobody is told that a store does not end a drop that writes wait for.
        ForgetsSilentDrops,
        /// A store counts as answering as soon as the page that it does not give has no frame to be read into.
        EndsSilenceForWantOfFrames,
        /// Nobody is told that a store answers again.
        ForgetsReachable,
        /// What is on its way to a tier that refuses or does not end its writes counts as frames to come, and more is
        /// sent there.
        CountsOnStalledTier,
        /// A store that works again gets only what leaves from now on.
        ForgetsUnwrittenOnRetry,
        /// A store that failed is tried again only when somebody asks.
        RetriesOnlyWhenAsked,
        /// Who asked for a retry that fails is not answered.
        ForgetsWhoAskedForRetry,
        /// Nobody is told that there are frames again.
        ForgetsRelief,
        /// A page that came back bad twice is not read again later.
        ForgetsRereads,
        // ── space in the store ──
        /// A page is written while the drop of its place is under way.
        DropPassesLaterWrite,
        /// What has been written since its place joined the batch is dropped with the others.
        DropsNewContent,
        /// A place is dropped while an older write to it is under way.
        DropsUnderWrite,
        /// Places that a migration reads are dropped.
        DropsHeldPlaces,
        /// What the guest has given back keeps its place.
        KeepsDeadPlaces,
        /// A full store keeps its copies of pages that are in RAM.
        KeepsCopiesInFullStore,
        // ── the origin ──
        /// What is stored of a page is read at its home, wherever it is.
        ReadsOriginAtHome,
        /// Pages are written where they are read.
        WritesToOrigin,
        /// What has changed since it was read at the origin counts as being there still.
        KeepsOldAtOrigin,
        /// A page counts as being at home as soon as its write there begins.
        LeavesOriginTooEarly,
        /// A page in RAM that was read at the origin counts as being at home.
        TakesResidentForHome,
        /// Where a page at the origin cannot be read, those beside it are not taken home either.
        LeavesNeighboursOfBadPages,
        /// Pages that a migration reads are taken home.
        TakesHeldHome,
        /// What could not be read at the origin is taken home.
        TakesHomeUnread,
        /// Places are dropped where the page is read.
        DropsAtOrigin,
        /// A page given back counts as being at the origin still.
        DiscardKeepsOrigin,
        /// It is said that pages have been taken home before they are there.
        AnswersTakingEarly,
        // ── pages under I/O ──
        /// The guest gets a frame that the device still reads from.
        RescuesUnderWrite,
        /// The same, of a row of pages of which the first is touched.
        RescuesRowUnderWrite,
        /// A page leaves a second time while its first version is being written.
        EvictsPagesUnderWrite,
        /// A page that has left twice before it is written is written from where it was the first time.
        WritesFromOldSlot,
        /// The copy for a page that is being written is not made.
        RescuesWithoutCopy,
        /// Frames that are not next to each other are moved as if they were.
        RescuesWrongSlot,
        /// A page leaves between a fault that is late and what is done about it.
        EvictsBetweenFaults,
        // ── memory given back ──
        /// A page given back frees its frame though the device reads from it.
        FreesFrameUnderWrite,
        /// A page given back frees its frame though the device writes to it.
        FreesFrameUnderRead,
        /// Who waits for a page that is given back is not woken.
        ForgetsWakeOnDiscard,
        /// A frame given back with its page still counts.
        MiscountsDiscards,
        /// A discard in steps is answered after its first step.
        AnswersDiscardEarly,
        /// What somebody waits for is left out of a discard.
        DiscardLeavesWhatIsAwaited,
        /// A page given back keeps its bit that the store has it.
        DiscardKeepsStoredBit,
        // ── waiting ──
        /// Who waits for a frame is forgotten when there is none.
        ForgetsDeferredFault,
        /// Who waits for a page that is being written is forgotten.
        ForgetsWaitersOfWrite,
        /// A move that met a pinned page is not tried again.
        ForgetsPinnedMoves,
        /// The frame of a page given back while its move waits is lost.
        LeaksPinnedOrphans,
        // ── budget ──
        /// One frame more is always to be had.
        OverspendsBudget,
        /// A block filled at once counts as one frame.
        MiscountsBlocks,
        /// A page that is copied to the guest takes no frame.
        MiscountsCopies,
        /// A lower budget is confirmed before it is kept.
        AnswersBudgetEarly,
        /// Frames above a lowered budget stay.
        KeepsFramesAboveBudget,
        // ── pages that something holds ──
        /// A victim that is pinned is chosen again and again.
        RetriesPinnedAtOnce,
        /// A victim that was pinned once is never chosen again.
        NeverRetriesPinned,
        /// Who wants a smaller budget is not told that pinned pages are in its way.
        WaitsForPinnedForEver,
        /// Nobody is told that all frames are pinned and the guest waits for one.
        StarvesInSilence,
        // ── huge pages ──
        /// Pages are taken out as samples while the host puts them together.
        SamplesWhileCollapsing,
        /// Of a sampled huge page that came back in part, all counts as back.
        TrustsPartialBlocks,
        /// A part of a sampled huge page is given back as if it had its slots one by one.
        ForgetsSplits,
        // ── migration ──
        /// Held pages leave the guest.
        EvictsHeldPages,
        /// A page that waits to be written is said to be in the store.
        HoldsLeavingAsStored,
        /// A page that is still being read is copied as if it had arrived.
        CopiesWhatArrives,
        /// Pages that leave the guest while writes are tracked are not reported.
        LeavesUnseenByTracking,
        /// One step of a scan for dirty pages forgets what has left elsewhere.
        ForgetsLeftOfOtherSteps,
        /// What one subscriber to dirty pages collects, the others are not told.
        OneCollectsForAll,
        /// Whoever ends a subscription to dirty pages ends all of them.
        EndsTrackingForAll,
        /// A block that another has had tracked is protected again, and marks that no scan has read are lost.
        ProtectsAgain,
        /// Scans look only at the blocks with which tracking began, not at those that came later.
        ScansFirstBlocksOnly,
        /// Pages given back while writes are tracked are not reported.
        DiscardUnseenByTracking,
        /// Two versions of an arriving page are written at once.
        WritesTwoVersionsAtOnce,
        /// The newer version of an arriving page is forgotten when the older one is written.
        ForgetsNewerVersion,
        /// Of three versions of an arriving page, the second one's frame is lost.
        LeaksReplacedVersions,
        /// An older version of an arriving page that is written counts as the newest.
        TrustsReplacedVersions,
        /// What gave way to a hotter page is never written.
        ForgetsWhatGaveWay,
        /// What is on its way to the store when the receiving ends is not counted.
        OverlooksWhatIsLeaving,
    }

    thread_local! {
        static PLANTED: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// Plants a bug in what this thread runs from now on, or removes it.
    pub fn plant(mutant: Option<Mutant>) {
        PLANTED.set(mutant);
    }

    pub(crate) fn is_planted(mutant: Mutant) -> bool {
        PLANTED.get() == Some(mutant)
    }
}

#[cfg(feature = "mutants")]
pub(crate) use planted::is_planted;
#[cfg(feature = "mutants")]
pub use planted::{MUTANTS, Mutant, plant};

/// False; a function, so that the lints do not find conditions with a constant in them.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub(crate) const fn none() -> bool {
    false
}

#[cfg(feature = "mutants")]
macro_rules! mutant {
    ($name:ident) => {
        crate::mutant::is_planted(crate::mutant::Mutant::$name)
    };
}

#[cfg(not(feature = "mutants"))]
macro_rules! mutant {
    ($name:ident) => {
        crate::mutant::none()
    };
}
