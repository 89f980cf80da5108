//! What is exchanged with the engine by its handle: arguments of requests and their answers.

use serde::{Deserialize, Serialize};

use crate::units::{PAGE_SIZE, PageNo, Run, SlotRun, TierId};

/// How a fault was served.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// By a frame of zeros: the page was touched for the first time.
    Zero,
    /// From staging, where the page's frame still was: no I/O.
    Rescue,
    /// By a read of the store, which the fault began or found under way.
    Store,
}

/// Where the newest content of a piece of a held run is. See `EngineHandle::hold` of `swapd`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Reads as zeros; no frame, no store content.
    Zero,
    /// In guest memory. The guest may be changing it: copy it, then work on the copy.
    Memory,
    /// In the piece's tier, for a `StoredReader` to read. `EngineHandle::sums` has the checksums.
    Stored,
    /// In a frame outside the guest: `EngineHandle::staged` has a copy, for as long as it stays there.
    Staged,
    /// On its way between two places. Ask again a little later.
    Moving,
    /// Lost to a read error or a checksum mismatch.
    Poisoned,
}

/// Pages of a held run that are in the same place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// The pages, next to each other.
    pub run: Run,
    /// Where all of them are.
    pub place: Place,
    /// What is stored of these pages is there; of pages in another place, where it would go.
    pub tier: TierId,
}

/// Somebody who is told which pages the guest writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SubscriberId(pub u32);

/// Pages that may have been written, each in one of the two.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DirtyPages {
    /// Somebody used them, as their page-table entries say. In ascending runs.
    pub seen: Vec<Run>,
    /// They left the guest's memory, and what was written to them before that was not seen: the engine's choice, which
    /// says nothing of whether they are in use. In ascending runs.
    pub departed: Vec<Run>,
}

impl DirtyPages {
    /// All of them, in ascending runs.
    pub fn into_runs(self) -> Vec<Run> {
        let mut all = self.seen;
        all.extend(self.departed);
        all.sort_unstable_by_key(|run| run.start);
        all.dedup_by(|next, run| {
            let joins = run.end() == next.start;
            run.len += if joins { next.len } else { 0 };
            joins
        });
        all
    }
}

/// Copies of pages that were in [`Place::Staged`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Copies {
    /// Whose copies these are. Pages that were asked for and had left staging are missing.
    pub pages: Vec<PageNo>,
    /// Their contents, one behind the other.
    pub bytes: Vec<u8>,
}

impl Copies {
    /// Each page with its content.
    pub fn iter(&self) -> impl Iterator<Item = (PageNo, &[u8; PAGE_SIZE])> {
        self.pages.iter().copied().zip(self.bytes.as_chunks().0)
    }
}

/// Pages received into frames of the staging area, to be placed by the engine.
#[derive(Clone, Debug)]
pub struct ArrivedRun {
    /// The pages, in the order of their frames.
    pub run: Run,
    /// Frames granted by `EngineHandle::grant_frames_async`; they go back to the engine with this call.
    pub slots: SlotRun,
    /// One checksum a page ([`crate::digest`]), already verified against the bytes.
    pub sums: Vec<u64>,
    /// The page was sent before in this migration: it was written meanwhile, so it is hot.
    pub again: bool,
}

/// Pages whose content is at the origin.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Adopted {
    /// The pages. All of them must be untouched.
    pub run: Run,
    /// The checksum of each page's content ([`crate::digest`]).
    pub sums: Vec<u64>,
}

/// How a finished receiving left the pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Placed {
    /// Pages that are in RAM, or on their way into the guest.
    pub pages_ram: u64,
    /// Pages that are in the store, or on their way there.
    pub pages_store: u64,
    /// Pages that read as zeros and take no frame.
    pub pages_zero: u64,
    /// Page-ins and page-outs by the VM's own paging while it received.
    pub pageins: u64,
    /// Pages paged out by the VM's own paging meanwhile.
    pub pageouts: u64,
}

/// One fault, when it had been served.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SeenFault {
    /// Since the recording began.
    pub at_us: u64,
    /// The page that was touched.
    pub page: PageNo,
    /// How it was served.
    pub kind: FaultKind,
}

/// Part of what a recording saw.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct FaultsSeen {
    /// In the order in which they were served; a few hundred at most.
    pub faults: Vec<SeenFault>,
    /// Seen as well, and kept for the next answers.
    pub left: u64,
    /// Faults since the last answer for which there was no room.
    pub dropped: u64,
}
