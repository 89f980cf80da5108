//! What goes into the core and what comes out of it.

use crate::api::{Arrival, Copies, DirtyPages, FaultKind, FaultsSeen, Piece, Placed, SubscriberId};
use crate::error::CommandError;
use crate::error::IoError;
use crate::stats::Stats;
use crate::units::{PageNo, Run, Slot, SlotRun, TierId};

/// An operation on the store that is under way.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct IoId(pub u32);

/// A request that waits for its answer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Ticket(pub u64);

/// What became of a drop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DropResult {
    Done,
    /// What was in these places may be there still, or in part.
    Failed,
    /// The tier cannot do that, and never will.
    Unsupported,
}

/// What became of one page of a move out of the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageOut {
    /// The frame is in its slot. Sum and zero are meaningful if a digest was asked for.
    Moved { sum: u64, zero: bool },
    /// The frame is still in the guest: I/O is in flight into it.
    Pinned,
}

/// Something happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// A vCPU, or the kernel for it, waits for the page.
    Fault(PageNo),
    /// So many times [`TICK_MS`] have passed since the last tick: one while there is something to do, none behind a long
    /// [sleep](super::Core::slept).
    Tick {
        ticks: u64,
    },
    /// The sums are of what was read, one a page of the run.
    ReadDone {
        io: IoId,
        result: Result<&'a [u64], IoError>,
    },
    WriteDone {
        io: IoId,
        result: Result<(), IoError>,
    },
    DropDone {
        io: IoId,
        result: DropResult,
    },
    /// Answer to [`Action::CopyIn`]: not, if the host has no frame for it.
    CopiedIn {
        page: PageNo,
        slot: Slot,
        copied: bool,
    },
    /// Answer to [`Action::MoveIn`]: the first `moved` pages are in the guest; the next one is pinned for now.
    MovedIn {
        run: Run,
        slots: SlotRun,
        moved: u32,
    },
    /// Answer to [`Action::MoveOut`], one element a page.
    MovedOut {
        run: Run,
        slots: SlotRun,
        pages: &'a [PageOut],
    },
    /// Answer to [`Action::FillBlock`]; `huge`: the host had a huge page for it.
    Filled {
        run: Run,
        huge: bool,
    },
    /// Answer to [`Action::Collapse`], for each block of it; `huge`: it is in one huge page now.
    Collapsed {
        block: Run,
        huge: bool,
    },
    /// Answer to [`Action::ScanDirty`]: those of the run's present pages that have been written since the last scan.
    Scanned {
        run: Run,
        dirty: &'a [Run],
    },
    /// There is time for one more step of a walk ([`super::Core::is_walking`]).
    Step,
    Request {
        ticket: Ticket,
        request: Request,
    },
}

/// Milliseconds between two ticks.
pub const TICK_MS: u64 = 100;

/// What other threads ask for; see `EngineHandle` of `swapd`, which has a method for each.
#[derive(Debug)]
pub enum Request {
    Stats,
    SetBudget(u64),
    Discard(Run),
    Evict(Run),
    /// Give never-touched pages frames, as long as frames are plentiful.
    Fill(Run),
    /// To be told which pages the guest writes from the answer on.
    SubscribeDirty,
    UnsubscribeDirty(SubscriberId),
    Prefetch(bool),
    CollectDirty(SubscriberId),
    Hold(Run),
    Release(Run),
    Sums(Run),
    /// Copies of those pages whose content is in staging.
    Staged(Vec<PageNo>),
    Heat,
    StartReceiving(Vec<u8>),
    UpdateHeat(Vec<u8>),
    GrantFrames(u32),
    ReturnFrames(SlotRun),
    Arrive(Arrival),
    ArriveZero(Run),
    ArrivePoisoned(Run),
    SettleReceiving,
    FinishReceiving,
    ResidentMap,
    StoredMap,
    RetryStore,
    /// Answered by the driver: only it knows the time.
    RecordFaults(bool),
}

/// The core's answer to a request.
#[derive(Debug)]
pub enum Response {
    Done,
    Stats(Box<Stats>),
    Runs(Vec<Run>),
    Subscribed(SubscriberId),
    Dirty(DirtyPages),
    Pieces(Vec<Piece>),
    Sums(Vec<u64>),
    Copies(Copies),
    Heat(Vec<u8>),
    Frames(SlotRun),
    Placed(Placed),
    Faults(FaultsSeen),
}

/// Something to do. Executed in the order of issue, each before the next event is read.
#[derive(Debug)]
pub enum Action {
    /// Move the frames in `slots` to the guest's `run`; wakes who waits there. Answered by `MovedIn`.
    MoveIn {
        run: Run,
        slots: SlotRun,
    },
    /// Copy what is in `slot` to a new frame of the guest's; wakes who waits there. Answered by `CopiedIn`.
    CopyIn {
        page: PageNo,
        slot: Slot,
    },
    /// Move the guest's frames into `slots`. Answered by `MovedOut`.
    MoveOut {
        run: Run,
        slots: SlotRun,
        digest: bool,
    },
    /// Make the frames in `slots` read as zeros; `fresh`: take them from the host.
    Prepare {
        slots: SlotRun,
        fresh: bool,
    },
    /// Zeros for a whole block, from the host straight to the guest, in one huge page if it has one. Answered by `Filled`.
    FillBlock {
        run: Run,
    },
    /// Whole blocks in single frames, all in the guest: have the host put huge pages in the place of these. Answered by `Collapsed`.
    Collapse {
        run: Run,
    },
    /// Part of a huge page is given back next, this page with it: have the host take it to pieces, so that what is given
    /// back is free at once.
    Split {
        page: PageNo,
    },
    /// Whether the host may have huge pages ready for faults of the guest's memory.
    HugePages(bool),
    Copy {
        from: Slot,
        to: Slot,
    },
    /// Answer the request with copies of these pages. The device may be reading their frames.
    CopyOut {
        ticket: Ticket,
        pages: Vec<(PageNo, Slot)>,
    },
    /// Answered by `ReadDone`, at any later time.
    Read {
        io: IoId,
        tier: TierId,
        run: Run,
        slots: SlotRun,
    },
    /// Answered by `WriteDone`, at any later time.
    Write {
        io: IoId,
        tier: TierId,
        run: Run,
        slots: SlotRun,
    },
    /// The content of these places in the store is needed no more: free them. No write of these pages is issued before this has ended.
    /// Answered by `DropDone`, at any later time.
    Drop {
        io: IoId,
        tier: TierId,
        run: Run,
    },
    /// Give the guest's frames in `run` back to the host.
    DropGuest {
        run: Run,
    },
    /// Give the frames in `slots` back to the host.
    ReleaseFrames {
        slots: SlotRun,
    },
    /// From now on a touch of the page is a memory error.
    Poison {
        page: PageNo,
    },
    Wake {
        page: PageNo,
    },
    /// A fault has been served: for the latency figures.
    Resolved {
        page: PageNo,
        kind: FaultKind,
    },
    /// Write-protect all present pages of the run for asynchronous tracking.
    ArmTracking {
        run: Run,
    },
    /// Find those of the run's pages that have been written, and protect them again. Answered by `Scanned`.
    ScanDirty {
        run: Run,
    },
    Answer {
        ticket: Ticket,
        answer: Result<Response, CommandError>,
    },
    /// A write failed: nothing more is written to that tier until a retry succeeds.
    StoreFailed(IoError),
    StoreRecovered(TierId),
    /// A fault waits for a frame, and there will be none as long as the store fails.
    Starved(IoError),
    /// That is over.
    Relieved,
    /// Somebody waits for the tier, and it has given nothing for a while. It is asked again and again.
    TierUnreachable(IoError),
    /// It gives pages again, or nobody waits for it any more.
    TierReachable(TierId),
    /// A fault has waited for a frame for a while, and there is none to be had: all that could leave is held where it is.
    Short {
        pinned: u64,
    },
    /// That is over.
    Enough,
    PagePoisoned(PageNo),
}
