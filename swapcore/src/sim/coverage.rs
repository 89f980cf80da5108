//! What the seeds reached: transitions of the page table by what caused them, and faults by what became of them.

use crate::core::{Event, Request};
use crate::table::{LEGAL, PageState, STATES};

macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$about:meta])* $variant:ident,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $name { $($(#[$about])* $variant,)+ }

        impl $name {
            /// All of them, in the order of their numbers.
            pub const ALL: &[$name] = &[$($name::$variant,)+];
        }
    };
}

named! {
    /// What the core was told when a page changed its state; `Balance` and `MakeReady` are what it does behind every
    /// event, and when all events at hand are dealt with.
    Cause {
        /// A vCPU, or the kernel for it, waits for a page.
        Fault,
        /// Time has passed.
        Tick,
        /// A read has ended, and the device says that it is good.
        ReadDone,
        /// A read has failed.
        ReadFailed,
        /// A write has ended, and the device says that it is good.
        WriteDone,
        /// A write has failed.
        WriteFailed,
        /// Frames were moved into the guest, or copied.
        MovedIn,
        /// Frames were moved out of the guest, or refused.
        MovedOut,
        /// A block was given zeros at once.
        Filled,
        /// Behind every event: whoever waits for a frame is served, evictions go on.
        Balance,
        /// When all events at hand are dealt with: victims are chosen ahead of need.
        MakeReady,
        /// The RAM budget is changed.
        SetBudget,
        /// The guest gave memory back.
        Discard,
        /// Pages that were never touched are given frames.
        Fill,
        /// A request that looks at all of memory goes on by a step.
        Walk,
        /// A migration holds pages.
        Hold,
        /// Pages of an arriving VM are placed.
        Arrive,
        /// Pages of an arriving VM are zeros.
        ArriveZero,
        /// Pages of an arriving VM are lost.
        ArrivePoisoned,
        /// Pages are said to be at the origin.
        Adopt,
        /// Pages are lost there.
        AdoptPoisoned,
        /// All else: no page may change its state by it.
        Other,
    }
}

named! {
    /// What goes wrong, or goes otherwise than one would like.
    Fault {
        /// A read fails, and the next one may not.
        ReadError,
        /// A read gives the page next door, or a flipped bit; the medium is right.
        Misread,
        /// A page cannot be read until it is written again.
        BadSector,
        /// A write that is said to be done left a mixture of old and new.
        Torn,
        /// A write that is said to be done changed nothing.
        LostWrite,
        /// A write that is said to be done went to another page's place: of the page that was to be written.
        Misdirected,
        /// The same, of the page whose place was hit.
        Overwritten,
        /// Stored content changes by itself.
        Rot,
        /// A write fails: the page may be as before, new, or both.
        WriteError,
        /// Writes to some pages fail until that is mended.
        BadRegion,
        /// There is no room for pages that were not written before.
        DiskFull,
        /// A read or write does a part, and says so.
        ShortTransfer,
        /// The device answers `EAGAIN`.
        TryAgain,
        /// A read or write takes hundreds of steps.
        LatencySpike,
        /// A drop fails, having done a part.
        DropError,
        /// A page cannot be moved out of the guest for a while.
        PinnedOut,
        /// A page cannot be moved out of the guest, and no end of that is in sight.
        PinnedForGood,
        /// A frame cannot be moved into the guest yet.
        PinnedIn,
        /// The kernel does a part of a move, and asks for another call.
        MoveAgain,
        /// The host has no frame for a copy.
        NoFrame,
        /// A fault is read late, and comes a second time.
        LateFault,
        /// A session has ended before the frames that it asked for come.
        SessionGone,
        /// A tier ends nothing for a while.
        Silence,
        /// A tier fails at everything for a while.
        Outage,
        /// A tier ends no drop for a while.
        HungDrop,
    }
}

named! {
    /// What became of it.
    Outcome {
        /// The read was repeated at once.
        ReadAgain,
        /// Somebody waits for the page, and it is read again some ticks later.
        ReadLater,
        /// It was a prefetch, which is dropped.
        GivenUp,
        /// The page was given back during the read.
        NotWanted,
        /// The page is lost, and said to be.
        Poisoned,
        /// Damage that nobody met: the page was written again.
        WrittenAnew,
        /// Nobody needs the content any more: the guest gave the page back.
        GivenBack,
        /// Damage that nobody met until the end of the run.
        NeverNeeded,
        /// The page whose write failed is at the origin still.
        KeptAtOrigin,
        /// The page whose write failed keeps its frame.
        KeptInRam,
        /// The page whose write failed went back to the guest, which waited for it.
        Rescued,
        /// The store was tried again, and takes writes.
        Resumed,
        /// The rest was done by another call or operation.
        WentOn,
        /// The page stays where it is.
        StayedInGuest,
        /// It took longer, and nothing else.
        Served,
        /// The frames went back to the engine.
        Returned,
    }
}

/// Every outcome that a fault may have. Each must be seen, and no other.
pub const OUTCOMES: &[(Fault, &[Outcome])] = {
    use Outcome::*;
    &[
        (Fault::ReadError, &[ReadAgain, ReadLater, GivenUp, NotWanted]),
        (Fault::Misread, &[ReadAgain, ReadLater, GivenUp, NotWanted]),
        (Fault::BadSector, &[ReadAgain, ReadLater, GivenUp, Poisoned, WrittenAnew, GivenBack, NeverNeeded]),
        (Fault::Torn, &[ReadAgain, ReadLater, GivenUp, Poisoned, WrittenAnew, GivenBack, NeverNeeded]),
        (Fault::LostWrite, &[ReadAgain, ReadLater, GivenUp, Poisoned, WrittenAnew, GivenBack, NeverNeeded]),
        (Fault::Misdirected, &[ReadAgain, ReadLater, GivenUp, Poisoned, WrittenAnew, GivenBack, NeverNeeded]),
        (Fault::Overwritten, &[ReadAgain, ReadLater, GivenUp, Poisoned, WrittenAnew, GivenBack, NeverNeeded]),
        (Fault::Rot, &[ReadAgain, ReadLater, GivenUp, Poisoned, WrittenAnew, GivenBack, NeverNeeded]),
        (Fault::WriteError, &[KeptAtOrigin, KeptInRam, Rescued, GivenBack, Resumed]),
        (Fault::BadRegion, &[KeptAtOrigin, KeptInRam, Rescued, GivenBack, Resumed]),
        (Fault::DiskFull, &[KeptAtOrigin, KeptInRam, Rescued, GivenBack, Resumed]),
        (Fault::Silence, &[Served]),
        (Fault::HungDrop, &[Served]),
        (
            Fault::Outage,
            &[ReadAgain, ReadLater, GivenUp, NotWanted, KeptAtOrigin, KeptInRam, Rescued, GivenBack, Resumed],
        ),
        (Fault::ShortTransfer, &[WentOn]),
        (Fault::TryAgain, &[WentOn]),
        (Fault::LatencySpike, &[Served]),
        (Fault::DropError, &[WentOn]),
        (Fault::PinnedOut, &[StayedInGuest]),
        (Fault::PinnedForGood, &[StayedInGuest]),
        (Fault::PinnedIn, &[WentOn]),
        (Fault::MoveAgain, &[WentOn]),
        (Fault::NoFrame, &[WentOn]),
        (Fault::LateFault, &[Served]),
        (Fault::SessionGone, &[Returned]),
    ]
};

const CAUSES: usize = Cause::ALL.len();
const FAULTS: usize = Fault::ALL.len();
const KINDS: usize = Outcome::ALL.len();

/// Counts of one run, or of many.
#[derive(Clone, Debug)]
pub struct Coverage {
    transitions: Box<[[[u64; STATES]; STATES]; CAUSES]>,
    injected: [u64; FAULTS],
    outcomes: [[u64; KINDS]; FAULTS],
    /// The core's own counts as of the last event.
    seen: [[u64; STATES]; STATES],
    /// Steps of the simulation.
    pub steps: u64,
    /// Times that the oracle looked at all pages.
    pub checks: u64,
}

impl Default for Coverage {
    fn default() -> Self {
        Coverage {
            transitions: Box::new([[[0; STATES]; STATES]; CAUSES]),
            injected: [0; FAULTS],
            outcomes: [[0; KINDS]; FAULTS],
            seen: [[0; STATES]; STATES],
            steps: 0,
            checks: 0,
        }
    }
}

/// Whether the gaps are looked for among causes as well: that takes many seeds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Depth {
    /// Every legal transition was taken, every fault was injected, and nothing happened that is not listed.
    Transitions,
    /// That, and every cause and outcome that is listed was seen.
    Causes,
}

impl Coverage {
    /// The core has dealt with `cause`: what changed since it was looked at last?
    pub(super) fn note(&mut self, cause: Cause, now: &[[u64; STATES]; STATES]) {
        if self.seen == *now {
            return;
        }
        for (from, row) in now.iter().enumerate() {
            for (to, count) in row.iter().enumerate() {
                self.transitions[cause as usize][from][to] += count - self.seen[from][to];
            }
        }
        self.seen = *now;
    }

    pub(super) fn injected(&mut self, fault: Fault) {
        self.injected[fault as usize] += 1;
    }

    pub(super) fn outcome(&mut self, fault: Fault, outcome: Outcome) {
        self.outcomes[fault as usize][outcome as usize] += 1;
    }

    /// Adds the counts of another run.
    pub fn add(&mut self, other: &Coverage) {
        let sum = |into: &mut u64, from: &u64| *into += from;
        let (into, from) = (self.transitions.as_flattened_mut(), other.transitions.as_flattened());
        into.as_flattened_mut().iter_mut().zip(from.as_flattened()).for_each(|(a, b)| sum(a, b));
        self.injected.iter_mut().zip(&other.injected).for_each(|(a, b)| sum(a, b));
        let from = other.outcomes.as_flattened();
        self.outcomes.as_flattened_mut().iter_mut().zip(from).for_each(|(a, b)| sum(a, b));
        self.steps += other.steps;
        self.checks += other.checks;
    }

    /// What ought to have been seen and was not, or the other way round.
    pub fn gaps(&self, depth: Depth) -> Vec<String> {
        let mut gaps = Vec::new();
        for (from, to) in LEGAL {
            let caused = |cause: &&Cause| self.count(*from, **cause, *to) > 0;
            let known = REACHED.iter().find(|(a, b, _)| (a, b) == (from, to)).map_or(&[][..], |row| row.2);
            if !Cause::ALL.iter().any(|cause| caused(&cause)) {
                gaps.push(format!("{from:?} -> {to:?} was never taken"));
            }
            let unknown = Cause::ALL.iter().filter(|cause| !known.contains(cause) && caused(cause));
            gaps.extend(unknown.map(|cause| format!("{from:?} -> {to:?} by {cause:?} is not in the table")));
            if depth == Depth::Causes {
                let missed = known.iter().filter(|cause| !caused(cause));
                gaps.extend(missed.map(|cause| format!("{from:?} -> {to:?} was never taken by {cause:?}")));
            }
        }
        for (fault, outcomes) in OUTCOMES {
            if self.injected[*fault as usize] == 0 {
                gaps.push(format!("{fault:?} was never injected"));
            }
            for outcome in Outcome::ALL {
                let seen = self.outcomes[*fault as usize][*outcome as usize] > 0;
                match (seen, outcomes.contains(outcome)) {
                    (true, false) => {
                        gaps.push(format!("{fault:?} ended as {outcome:?}, which is not in the table"))
                    }
                    (false, true) if depth == Depth::Causes => {
                        gaps.push(format!("{fault:?} never ended as {outcome:?}"))
                    }
                    _ => {}
                }
            }
        }
        gaps
    }

    fn count(&self, from: PageState, cause: Cause, to: PageState) -> u64 {
        self.transitions[cause as usize][from as usize][to as usize]
    }
}

impl std::fmt::Display for Coverage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "| from | to | by (times) |\n|---|---|---|")?;
        for (from, to) in LEGAL {
            let causes = Cause::ALL.iter().map(|cause| (cause, self.count(*from, *cause, *to)));
            let causes: Vec<_> = causes
                .filter(|(_, count)| *count > 0)
                .map(|(cause, count)| format!("{cause:?} {count}"))
                .collect();
            writeln!(f, "| {from:?} | {to:?} | {} |", causes.join(", "))?;
        }
        writeln!(f, "\n| fault | injected | became of it |\n|---|---|---|")?;
        for fault in Fault::ALL {
            let ends = Outcome::ALL.iter().map(|end| (end, self.outcomes[*fault as usize][*end as usize]));
            let ends: Vec<_> =
                ends.filter(|(_, count)| *count > 0).map(|(end, count)| format!("{end:?} {count}")).collect();
            writeln!(f, "| {fault:?} | {} | {} |", self.injected[*fault as usize], ends.join(", "))?;
        }
        Ok(())
    }
}

impl Cause {
    pub(super) fn of(event: &Event<'_>) -> Cause {
        match event {
            Event::Fault(_) => Cause::Fault,
            Event::Tick { .. } => Cause::Tick,
            Event::ReadDone { result: Ok(_), .. } => Cause::ReadDone,
            Event::ReadDone { result: Err(_), .. } => Cause::ReadFailed,
            Event::WriteDone { result: Ok(()), .. } => Cause::WriteDone,
            Event::WriteDone { result: Err(_), .. } => Cause::WriteFailed,
            Event::MovedIn { .. } | Event::CopiedIn { .. } => Cause::MovedIn,
            Event::MovedOut { .. } => Cause::MovedOut,
            Event::Filled { .. } => Cause::Filled,
            Event::DropDone { .. } | Event::Collapsed { .. } | Event::Scanned { .. } => Cause::Other,
            Event::Step => Cause::Walk,
            Event::Request { request, .. } => match request {
                Request::SetBudget(_) => Cause::SetBudget,
                Request::Discard(_) => Cause::Discard,
                Request::Fill(_) => Cause::Fill,
                Request::Hold(_) => Cause::Hold,
                Request::Arrive(_) => Cause::Arrive,
                Request::ArriveZero(_) => Cause::ArriveZero,
                Request::ArrivePoisoned(_) => Cause::ArrivePoisoned,
                Request::Adopt(_) => Cause::Adopt,
                Request::AdoptPoisoned(_) => Cause::AdoptPoisoned,
                _ => Cause::Other,
            },
        }
    }
}

/// The causes of each transition. A seed that finds another one fails; so do many seeds that miss one.
const REACHED: &[(PageState, PageState, &[Cause])] = {
    use Cause::*;
    use PageState::{Arriving, Leaving, Poisoned, Resident, Sampled, Standby, Stored, Untouched};
    &[
        (Untouched, Arriving, &[Cause::Fault, Balance, MakeReady, Fill, Arrive]),
        (Untouched, Leaving, &[Arrive]),
        (Untouched, Stored, &[Adopt]),
        (Untouched, Poisoned, &[ArrivePoisoned, AdoptPoisoned]),
        (Resident, Leaving, &[Tick, Balance, MakeReady, Walk]),
        (Resident, Sampled, &[Tick]),
        (Resident, Untouched, &[Discard, Walk, Arrive, ArriveZero, ArrivePoisoned]),
        (Leaving, Arriving, &[Cause::Fault, Tick, WriteDone, WriteFailed]),
        (Leaving, Resident, &[MovedOut]),
        (Leaving, Standby, &[WriteDone, MovedOut]),
        (Leaving, Stored, &[WriteDone, WriteFailed, MakeReady]),
        (Leaving, Untouched, &[MovedOut, Discard, Walk, Arrive, ArriveZero, ArrivePoisoned]),
        (Standby, Arriving, &[Cause::Fault]),
        (Standby, Leaving, &[MakeReady]),
        (Standby, Stored, &[Cause::Fault, Tick, ReadDone, Balance, MakeReady, Walk]),
        (Standby, Untouched, &[Discard, Walk]),
        (Stored, Arriving, &[Cause::Fault, Tick, ReadDone, Balance, MakeReady]),
        (Stored, Untouched, &[Discard, Walk, Arrive, ArriveZero, ArrivePoisoned]),
        (Arriving, Resident, &[MovedIn, Filled]),
        (Arriving, Leaving, &[ReadDone]),
        (Arriving, Standby, &[ReadDone]),
        (Arriving, Stored, &[ReadDone, ReadFailed]),
        (Arriving, Poisoned, &[ReadDone, ReadFailed]),
        (Arriving, Untouched, &[Discard, Walk, Arrive, ArriveZero, ArrivePoisoned]),
        (Sampled, Arriving, &[Cause::Fault, Tick, SetBudget, Walk, Hold]),
        (Sampled, Resident, &[MovedOut]),
        (Sampled, Untouched, &[Discard, Walk]),
        (Poisoned, Untouched, &[Discard, Walk, Arrive, ArriveZero, ArrivePoisoned]),
    ]
};
