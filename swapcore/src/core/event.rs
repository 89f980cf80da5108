//! What goes into the core and what comes out of it.

use crate::api::{
    Adopted, ArrivedRun, Copies, DirtyPages, FaultKind, FaultsSeen, Piece, Placed, SubscriberId,
};
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
    /// The tier has given the places back: they read as anything until they are written again.
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
    Moved {
        /// Checksum of the content ([`crate::digest`]).
        sum: u64,
        /// Whether the content is all zeros.
        zero: bool,
    },
    /// The frame is still in the guest: I/O is in flight into it.
    Pinned,
}

/// Something happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// A vCPU, or the kernel for it, waits for the page.
    Fault(PageNo),
    /// So many times [`TICK_MS`] have passed since the last tick: one while there is something to do, none behind a
    /// long [sleep](super::Core::slept).
    Tick {
        /// How many: more than one after an idle time.
        ticks: u64,
    },
    /// The sums are of what was read, one a page of the run.
    ReadDone {
        /// The operation that has ended.
        io: IoId,
        /// Checksums of what is in the frames now, right or wrong; or why the operation as a whole failed.
        result: Result<&'a [u64], IoError>,
    },
    /// A write has ended.
    WriteDone {
        /// The operation that has ended.
        io: IoId,
        /// Why it failed, if it did: then each of its places may have the old content, the new one, or a mixture.
        result: Result<(), IoError>,
    },
    /// A drop has ended.
    DropDone {
        /// The operation that has ended.
        io: IoId,
        /// What became of it.
        result: DropResult,
        /// Microseconds that it took: the tier may have kept reads waiting for as long.
        took_us: u64,
    },
    /// Answer to [`Action::CopyIn`]: not, if the host has no frame for it.
    CopiedIn {
        /// The page that was to come.
        page: PageNo,
        /// The slot with its content.
        slot: Slot,
        /// Whether it is in the guest now.
        copied: bool,
    },
    /// Answer to [`Action::MoveIn`]: the first `moved` pages are in the guest; the next one is pinned for now.
    MovedIn {
        /// The pages of the move.
        run: Run,
        /// The slots that their frames were in.
        slots: SlotRun,
        /// How many pages from the first one on.
        moved: u32,
    },
    /// Answer to [`Action::MoveOut`], one element a page.
    MovedOut {
        /// The pages of the move.
        run: Run,
        /// The slots bound for their frames.
        slots: SlotRun,
        /// What became of each, in the order of the run.
        pages: &'a [PageOut],
    },
    /// Answer to [`Action::FillBlock`]; `huge`: the host had a huge page for it.
    Filled {
        /// The block, which is in the guest now.
        run: Run,
        /// Whether it is in one huge page, and not in single frames.
        huge: bool,
    },
    /// Answer to [`Action::Collapse`], for each block of it; `huge`: it is in one huge page now.
    Collapsed {
        /// The block.
        block: Run,
        /// Whether it is in one huge page, and not in single frames as before.
        huge: bool,
    },
    /// Answer to [`Action::ScanDirty`]: those of the run's present pages that have been written since the last scan.
    Scanned {
        /// The pages that were looked at.
        run: Run,
        /// Those that have been written, in ascending runs.
        dirty: &'a [Run],
    },
    /// There is time for one more step of a walk ([`super::Core::is_walking`]).
    Step,
    /// Another thread asks for something.
    Request {
        /// To be named in the answer: [`Action::Answer`].
        ticket: Ticket,
        /// What is asked for.
        request: Request,
    },
}

/// Milliseconds between two ticks.
pub const TICK_MS: u64 = 100;

/// What other threads ask for; see `EngineHandle` of `swapd`, which has a method for each.
#[derive(Debug)]
pub enum Request {
    /// The figures of this moment.
    Stats,
    /// Change the RAM budget to so many bytes. Answered when no more is held, or when it is clear that more will be.
    SetBudget(u64),
    /// The guest gave the run back: it reads as zeros from the answer on.
    Discard(Run),
    /// Page out what is resident in the run. Answered when none of it is on its way out any more; held pages stay.
    Evict(Run),
    /// Give never-touched pages frames, as long as frames are plentiful.
    Fill(Run),
    /// To be told which pages of these blocks the guest writes from the answer on, and which of all pages have left.
    /// More blocks can be [added](Request::TrackDirty).
    SubscribeDirty(Vec<Run>),
    /// To be told of these blocks, too, from the answer on: of each 2 MiB block of which the runs have a page.
    TrackDirty(SubscriberId, Vec<Run>),
    /// End a subscription. Its walks under way find nothing more.
    UnsubscribeDirty(SubscriberId),
    /// Whether pages are read ahead of any touch.
    Prefetch(bool),
    /// The pages written since this subscriber collected last, or since it had them tracked.
    CollectDirty(SubscriberId),
    /// Keep the run's pages from leaving the guest until they are released, and say where they are.
    Hold(Run),
    /// Held pages may leave again.
    Release(Run),
    /// The checksums of the run's pages, one a page; those of pages that are not stored mean nothing.
    Sums(Run),
    /// Copies of those pages whose content is in staging.
    Staged(Vec<PageNo>),
    /// The heat of all pages, one byte each.
    Heat,
    /// Begin to receive the VM, with the source's heat of all pages. Refused unless every page is untouched.
    StartReceiving(Vec<u8>),
    /// Newer heat of all pages from the source, for those still to come.
    UpdateHeat(Vec<u8>),
    /// Up to so many contiguous frames to receive into. Answered when at least one is free.
    GrantFrames(u32),
    /// Granted frames that are not needed after all.
    ReturnFrames(SlotRun),
    /// Place received pages, each in RAM or in the store.
    Arrive(ArrivedRun),
    /// The run arrived, and is all zeros.
    ArriveZero(Run),
    /// The run is lost at the source, so it is poisoned here as well.
    ArrivePoisoned(Run),
    /// Answered when every page that has arrived is where it belongs, all writes done.
    SettleReceiving,
    /// Nothing more arrives: the VM may run.
    FinishReceiving,
    /// The pages in the guest, in ascending runs.
    ResidentMap,
    /// The pages that are in the store or on their way there, in ascending runs.
    StoredMap,
    /// Write again what tiers refused. Answered when all of it is written, or refused again.
    RetryStore,
    /// The pages are at the origin from now on. Refused as a whole unless all of them are untouched.
    Adopt(Adopted),
    /// The pages are lost at the origin, so they are poisoned here as well. Refused as [`Request::Adopt`] is.
    AdoptPoisoned(Run),
    /// Bring pages of the run that are at the origin into the guest ahead of any touch, as long as frames are
    /// plentiful. Answered with how many have come: 0, if there are none, or no frames for them, or they could not be read. It
    /// brings some hundred at a time, so whoever wants all of the run asks again until the answer is 0.
    FetchOrigin(Run),
    /// Move what is stored of up to so many pages from the origin to their homes. Answered with how many pages are at
    /// the origin still, when the writes have ended. A count that has not fallen says that pages cannot be moved at
    /// this moment (they are in motion or held, or could not be read): ask again some time later.
    TakeHome(u32),
    /// Answered by the driver: only it knows the time.
    RecordFaults(bool),
}

/// The core's answer to a request.
#[derive(Debug)]
pub enum Response {
    /// It is done, and there is nothing to say about it.
    Done,
    /// To [`Request::Stats`].
    Stats(Box<Stats>),
    /// To [`Request::ResidentMap`] and [`Request::StoredMap`]: in ascending order.
    Runs(Vec<Run>),
    /// To [`Request::SubscribeDirty`]: the new subscriber, who must unsubscribe, or tracking goes on for ever.
    Subscribed(SubscriberId),
    /// To [`Request::CollectDirty`].
    Dirty(DirtyPages),
    /// To [`Request::Hold`]: the whole run, in ascending pieces.
    Pieces(Vec<Piece>),
    /// To [`Request::Sums`]: one a page of the run.
    Sums(Vec<u64>),
    /// To [`Request::Staged`]: given by the driver, which has the bytes.
    Copies(Copies),
    /// To [`Request::Heat`]: one byte a page.
    Heat(Vec<u8>),
    /// To [`Request::GrantFrames`]: one frame a slot. They come back by an arrival, or returned.
    Frames(SlotRun),
    /// To [`Request::FinishReceiving`].
    Placed(Placed),
    /// To [`Request::FetchOrigin`] and [`Request::TakeHome`]: so many pages.
    Count(u64),
    /// To [`Request::RecordFaults`].
    Faults(FaultsSeen),
}

/// Something to do. Executed in the order of issue, each before the next event is read.
#[derive(Debug)]
pub enum Action {
    /// Move the frames in `slots` to the guest's `run`; wakes who waits there. Answered by `MovedIn`.
    MoveIn {
        /// Pages of which the guest has none yet.
        run: Run,
        /// Where their frames are, in the same order.
        slots: SlotRun,
    },
    /// Copy what is in `slot` to a new frame of the guest's; wakes who waits there. Answered by `CopiedIn`.
    CopyIn {
        /// A page that the guest does not have yet.
        page: PageNo,
        /// Where its content is; the frame stays there.
        slot: Slot,
    },
    /// Move the guest's frames into `slots`. Answered by `MovedOut`.
    MoveOut {
        /// Pages in the guest.
        run: Run,
        /// Empty slots for their frames, in the same order.
        slots: SlotRun,
        /// Whether the sum of each page is wanted, and whether it is all zeros.
        digest: bool,
    },
    /// Make the frames in `slots` read as zeros; `fresh`: take them from the host.
    Prepare {
        /// As many slots as pages are to read as zeros.
        slots: SlotRun,
        /// Whether the slots are empty, so that frames have to come from the host.
        fresh: bool,
    },
    /// Zeros for a whole block, from the host straight to the guest, in one huge page if it has one. Answered by
    /// `Filled`.
    FillBlock {
        /// One whole block, of which the guest has no page.
        run: Run,
    },
    /// Whole blocks in single frames, all in the guest: have the host put huge pages in the place of these. Answered by
    /// `Collapsed`.
    Collapse {
        /// Blocks next to each other, from the start of the first to the end of the last.
        run: Run,
    },
    /// Part of a huge page is given back next, this page with it: have the host take it to pieces, so that what is
    /// given back is free at once.
    Split {
        /// A page of the block.
        page: PageNo,
    },
    /// Whether the host may have huge pages ready for faults of the guest's memory.
    HugePages(bool),
    /// Copy one frame's content to another frame: the device still reads from the first, so the guest gets the second.
    Copy {
        /// The slot to copy from.
        from: Slot,
        /// The slot to copy to, which has a frame.
        to: Slot,
    },
    /// Answer the request with copies of these pages. The device may be reading their frames.
    CopyOut {
        /// The request to answer.
        ticket: Ticket,
        /// The pages, and the slots that have their content.
        pages: Vec<(PageNo, Slot)>,
    },
    /// Answered by `ReadDone`, at any later time.
    Read {
        /// The operation, to be named at its end.
        io: IoId,
        /// The tier to read from.
        tier: TierId,
        /// The pages to read.
        run: Run,
        /// The frames to read into, in the same order.
        slots: SlotRun,
    },
    /// Answered by `WriteDone`, at any later time.
    Write {
        /// The operation, to be named at its end.
        io: IoId,
        /// The tier to write to.
        tier: TierId,
        /// The pages to write.
        run: Run,
        /// The frames with their content, in the same order.
        slots: SlotRun,
    },
    /// The content of these places in the store is needed no more: free them. No write of these pages is issued before
    /// this has ended. Answered by `DropDone`, at any later time.
    Drop {
        /// The operation, to be named at its end.
        io: IoId,
        /// The tier whose places they are.
        tier: TierId,
        /// The pages whose places are dropped: of several blocks, it may be.
        run: Run,
    },
    /// Give the guest's frames in `run` back to the host.
    DropGuest {
        /// Pages with an entry in the guest's page tables. They read as zeros from then on, or as what is moved in
        /// next.
        run: Run,
    },
    /// Give the frames in `slots` back to the host.
    ReleaseFrames {
        /// Slots with a frame, which are empty from then on.
        slots: SlotRun,
    },
    /// From now on a touch of the page is a memory error.
    Poison {
        /// A page that the guest does not have.
        page: PageNo,
    },
    /// Wake whoever waits for the page: it is in the guest already, or the next touch faults anew.
    Wake {
        /// The page that is waited for.
        page: PageNo,
    },
    /// A fault has been served: for the latency figures.
    Resolved {
        /// The page that was waited for, now in the guest.
        page: PageNo,
        /// How it was served.
        kind: FaultKind,
    },
    /// Write-protect all present pages of the run for asynchronous tracking.
    ArmTracking {
        /// The pages to protect.
        run: Run,
    },
    /// Find those of the run's pages that have been written, and protect them again. Answered by `Scanned`.
    ScanDirty {
        /// The pages to look at.
        run: Run,
    },
    /// Take the protection off the run's pages: nobody wants to know of writes to them any more.
    EndTracking {
        /// The pages that need no protection.
        run: Run,
    },
    /// Answer a request. It is the last that is heard of its ticket.
    Answer {
        /// The request to answer.
        ticket: Ticket,
        /// What it asked for, or why it is refused.
        answer: Result<Response, CommandError>,
    },
    /// A write failed: nothing more is written to that tier until a retry succeeds.
    StoreFailed(IoError),
    /// All that the tier had refused is written.
    StoreRecovered(TierId),
    /// A fault waits for a frame, and there will be none as long as the store fails.
    Starved(IoError),
    /// That is over.
    Relieved,
    /// Somebody waits for the tier, and it has given nothing for a while. It is asked again and again.
    TierUnreachable(IoError),
    /// It gives pages again, or nobody waits for it any more.
    TierReachable(TierId),
    /// A fault has waited for a frame for a while, and there is none to be had: all that could leave is held where it
    /// is.
    Short {
        /// Pages of which a move out of the guest was refused, because something holds their frames.
        pinned: u64,
    },
    /// That is over.
    Enough,
    /// A page's content is lost for good: its owner ought to know.
    PagePoisoned(PageNo),
}
