//! The page table: one 16-bit entry a page, one enum of states, one table of legal transitions.
//!
//! ```text
//!  bits 0-2   state
//!  bit  3     ORIGIN    what is stored of the page is at the origin, and not at the home of its block
//!  bit  4     STORED    the store has content for the page, with the checksum on record
//!  bit  5     HELD      a migration reads it: it must not leave the guest
//!  bit  6     PREFETCHED, of standby pages: brought in unasked, not used so far
//!             PINNED, of resident pages: it was to leave, and something holds its frame: not to be tried for now
//!  bit  7     WRITING   a write of this page to the store is in flight
//!  bits 8-15  heat, as of the epoch of its 2 MiB block
//! ```
//! Invariant: a page's state changes only in [`PageTable::set`], which panics on an illegal transition.
//! Pages of a block are summarised (resident count, heat epoch), and blocks of a region (1 GiB), so that sweeps skip
//! what is empty and decay costs nothing where nothing happens.

use crate::units::{BLOCK_PAGES, PageNo, Run, TIERS_MAX, TierId};

/// Where a page is. See `docs/engine.md` for the picture.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum PageState {
    /// Reads as zeros; has no frame and nothing in the store.
    Untouched = 0,
    /// In the guest.
    Resident = 1,
    /// Frame in staging, the store does not have this content yet.
    Leaving = 2,
    /// Frame in staging, the store has the same content.
    Standby = 3,
    /// In the store alone.
    Stored = 4,
    /// Bound for the guest: being read, or on its way from staging.
    Arriving = 5,
    /// Frame in staging to see whether somebody misses it.
    Sampled = 6,
    /// Lost; the guest gets a memory error if it touches it.
    Poisoned = 7,
}

use PageState::{Arriving, Leaving, Poisoned, Resident, Sampled, Standby, Stored, Untouched};

/// How many states there are.
pub const STATES: usize = 8;
const ALL_STATES: [PageState; STATES] =
    [Untouched, Resident, Leaving, Standby, Stored, Arriving, Sampled, Poisoned];

/// Every transition that may happen, and when.
pub const LEGAL: &[(PageState, PageState)] = &[
    (Untouched, Arriving), // first touch, or received for RAM
    (Untouched, Leaving),  // received for the store
    (Untouched, Stored),   // adopted: it is at the origin
    (Untouched, Poisoned), // received or adopted as poisoned
    (Resident, Leaving),   // chosen as victim
    (Resident, Sampled),   // chosen as sample
    (Resident, Untouched), // given back by the guest, or replaced by a newer version
    (Leaving, Arriving),   // touched: rescue
    (Leaving, Resident),   // pinned by I/O: never left
    (Leaving, Standby),    // written, or unchanged since it was
    (Leaving, Stored),     // written, and its frame needed at once; or not written, and at the origin still
    (Leaving, Untouched),  // all zeros, given back, or replaced
    (Standby, Arriving),   // touched: rescue
    (Standby, Leaving),    // at the origin, and taken home
    (Standby, Stored),     // frame taken for another page
    (Standby, Untouched),  // given back, or replaced
    (Stored, Arriving),    // fault or prefetch
    (Stored, Untouched),   // given back, or replaced
    (Arriving, Resident),  // in the guest
    (Arriving, Leaving),   // read at the origin, and taken home
    (Arriving, Standby),   // prefetched: waits in staging to prove itself
    (Arriving, Stored),    // prefetch that failed, or not taken home after all
    (Arriving, Poisoned),  // unreadable
    (Arriving, Untouched), // given back
    (Sampled, Arriving),   // touched, or put back
    (Sampled, Resident),   // pinned by I/O: never left
    (Sampled, Untouched),  // given back
    (Poisoned, Untouched), // given back, or replaced
];

const fn legal_matrix() -> [[bool; STATES]; STATES] {
    let mut matrix = [[false; STATES]; STATES];
    let mut at = 0;
    while at < LEGAL.len() {
        matrix[LEGAL[at].0 as usize][LEGAL[at].1 as usize] = true;
        at += 1;
    }
    matrix
}

const IS_LEGAL: [[bool; STATES]; STATES] = legal_matrix();

const STATE_MASK: u16 = 0x0007;
const _: () = assert!(STATES <= STATE_MASK as usize + 1, "a state fits its bits");
const HEAT_SHIFT: u32 = 8;

/// One-bit facts about a page beside its state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flag {
    /// The store has content for the page, and its checksum is on record.
    InStore,
    /// Of pages with [`Flag::InStore`] alone: what is stored of the page is at the origin. Its home has nothing of it.
    Origin,
    /// A migration reads the page where it is: it must not leave the guest.
    Held,
    /// A write of the page to the store is under way.
    Writing,
    /// Of standby pages alone: a change of state ends it.
    Prefetched,
    /// Of resident pages alone: a change of state ends it.
    Pinned,
}

/// What it says depends on the state.
const OF_STATE: u16 = 1 << 6;

impl Flag {
    const fn bit(self) -> u16 {
        match self {
            Flag::Origin => 1 << 3,
            Flag::InStore => 1 << 4,
            Flag::Held => 1 << 5,
            Flag::Prefetched | Flag::Pinned => OF_STATE,
            Flag::Writing => 1 << 7,
        }
    }

    fn may_be_of(self, state: PageState) -> bool {
        match self {
            Flag::Prefetched => state == Standby,
            Flag::Pinned => state == Resident,
            Flag::InStore | Flag::Origin | Flag::Held | Flag::Writing => true,
        }
    }
}

#[derive(Clone, Copy, Default)]
struct Block {
    /// Resident pages in the block.
    resident: u16,
    /// Pages of the block of which the store has content.
    stored: u16,
    /// Those of them whose content is at the origin.
    origin: u16,
    /// [`HUGE`] and [`FRESH`].
    marks: u8,
    /// See [`PageTable::home`].
    home: TierId,
    /// The epoch that the block's heats are of.
    epoch: u32,
}

/// See [`PageTable::is_huge`].
const HUGE: u8 = 1 << 0;
/// See [`PageTable::is_fresh`].
const FRESH: u8 = 1 << 1;

const _: () = assert!(size_of::<Block>() == 12, "as `docs/engine.md` says");

impl Block {
    fn mark(&mut self, mark: u8, on: bool) {
        self.marks = if on { self.marks | mark } else { self.marks & !mark };
    }
}

/// Blocks of a region: 1 GiB.
pub const REGION_BLOCKS: usize = 512;

/// The table, and the counts that follow from it.
pub struct PageTable {
    entries: Vec<u16>,
    blocks: Vec<Block>,
    /// Resident pages of each region.
    regions: Vec<u32>,
    /// Pages of each region of which the store has content.
    stored: Vec<u32>,
    /// Those of them whose content is at the origin.
    origin: Vec<u32>,
    origin_pages: u64,
    /// See [`PageTable::with_short_blocks`].
    short: Vec<Run>,
    epoch: u32,
    counts: [u64; STATES],
    /// Pages that are `Leaving`, by the home of their block.
    leaving: [u64; TIERS_MAX],
    /// Pages with [`Flag::Pinned`].
    pinned: u64,
    /// See [`PageTable::count_hot_from`].
    hot_from: Option<u8>,
    hot_in_store: u64,
    transitions: [[u64; STATES]; STATES],
}

impl std::fmt::Debug for PageTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageTable {{ pages: {}, counts: {:?} }}", self.entries.len(), self.counts)
    }
}

impl PageTable {
    /// A table of `pages` untouched pages. Memory is taken from the host only where entries are written.
    pub fn new(pages: u64) -> Self {
        let blocks = pages.div_ceil(u64::from(BLOCK_PAGES)) as usize;
        let mut counts = [0; STATES];
        counts[Untouched as usize] = pages;
        PageTable {
            entries: vec![0; pages as usize],
            blocks: vec![Block::default(); blocks],
            regions: vec![0; blocks.div_ceil(REGION_BLOCKS)],
            stored: vec![0; blocks.div_ceil(REGION_BLOCKS)],
            origin: vec![0; blocks.div_ceil(REGION_BLOCKS)],
            origin_pages: 0,
            short: Vec::new(),
            epoch: 0,
            counts,
            leaving: [0; TIERS_MAX],
            pinned: 0,
            hot_from: None,
            hot_in_store: 0,
            transitions: [[0; STATES]; STATES],
        }
    }

    /// Pages of the table, those that fill up short blocks among them.
    pub fn pages(&self) -> u64 {
        self.entries.len() as u64
    }

    /// The same where only these first pages of some blocks, in ascending order, are memory. The others of such a block
    /// are nobody's: they fill it up, so that the next piece of memory begins with a block of its own, and stay
    /// untouched.
    #[must_use]
    pub fn with_short_blocks(mut self, short: Vec<Run>) -> Self {
        for run in &short {
            let block = self.block_of(run.start);
            assert!(run.start == block.start && run.len < block.len, "{run:?} of {block:?}");
        }
        assert!(short.is_sorted_by_key(|run| run.start), "{short:?}");
        self.short = short;
        self
    }

    /// How many of the pages are memory.
    pub fn memory_pages(&self) -> u64 {
        let missing = self.short.iter().map(|run| u64::from(BLOCK_PAGES - run.len)).sum::<u64>();
        self.pages() - missing
    }

    /// The first page of the run that is not memory.
    pub fn first_of_nobody(&self, run: Run) -> Option<PageNo> {
        let first = |short: &Run| {
            let (from, to) = (run.start.max(short.end()), run.end().min(short.start.plus(BLOCK_PAGES)));
            (from < to).then_some(from)
        };
        self.short.iter().find_map(first)
    }

    /// Where the page is.
    pub fn state(&self, page: PageNo) -> PageState {
        ALL_STATES[usize::from(self.entries[page.index()] & STATE_MASK)]
    }

    /// Changes a page's state.
    ///
    /// # Panics
    /// If the transition is not in [`LEGAL`]: the table is then wrong, and going on would lose data.
    pub fn set(&mut self, page: PageNo, to: PageState) {
        let from = self.state(page);
        assert!(IS_LEGAL[from as usize][to as usize], "illegal transition of {page}: {from:?} -> {to:?}");
        self.pinned -= u64::from(self.has(page, Flag::Pinned));
        self.hot_in_store -= u64::from(self.is_hot_in_store(page));
        let entry = &mut self.entries[page.index()];
        *entry = (*entry & !(STATE_MASK | OF_STATE)) | to as u16;
        self.counts[from as usize] -= 1;
        self.counts[to as usize] += 1;
        self.transitions[from as usize][to as usize] += 1;
        let block = &mut self.blocks[page.block()];
        self.leaving[block.home.index()] -= u64::from(from == Leaving);
        self.leaving[block.home.index()] += u64::from(to == Leaving);
        if !matches!(to, Resident | Sampled | Arriving) {
            block.mark(HUGE, false);
        }
        block.resident -= u16::from(from == Resident);
        block.resident += u16::from(to == Resident);
        let region = &mut self.regions[page.block() / REGION_BLOCKS];
        *region -= u32::from(from == Resident);
        *region += u32::from(to == Resident);
        self.hot_in_store += u64::from(self.is_hot_in_store(page));
    }

    /// Whether the page has the flag.
    pub fn has(&self, page: PageNo, flag: Flag) -> bool {
        self.entries[page.index()] & flag.bit() != 0 && flag.may_be_of(self.state(page))
    }

    /// # Panics
    /// If the flag is put on a page of a state that cannot have it, or a page that nothing is stored of is said to be
    /// at the origin.
    pub fn put(&mut self, page: PageNo, flag: Flag, on: bool) {
        let state = self.state(page);
        if !flag.may_be_of(state) {
            assert!(!on, "{page} is {state:?}, which is never {flag:?}");
            return;
        }
        if flag == Flag::Pinned {
            self.pinned = self.pinned + u64::from(on) - u64::from(self.has(page, flag));
        }
        if flag == Flag::InStore {
            assert!(
                on || !self.has(page, Flag::Origin),
                "nothing is stored of {page}, and it is at the origin"
            );
            let had = self.has(page, flag);
            let block = &mut self.blocks[page.block()];
            block.stored = block.stored + u16::from(on) - u16::from(had);
            let region = &mut self.stored[page.block() / REGION_BLOCKS];
            *region = *region + u32::from(on) - u32::from(had);
        }
        if flag == Flag::Origin {
            assert!(
                !on || self.has(page, Flag::InStore),
                "nothing is stored of {page}: not at the origin either"
            );
            let had = self.has(page, flag);
            let block = &mut self.blocks[page.block()];
            block.origin = block.origin + u16::from(on) - u16::from(had);
            let region = &mut self.origin[page.block() / REGION_BLOCKS];
            *region = *region + u32::from(on) - u32::from(had);
            self.origin_pages = self.origin_pages + u64::from(on) - u64::from(had);
        }
        let entry = &mut self.entries[page.index()];
        *entry = if on { *entry | flag.bit() } else { *entry & !flag.bit() };
    }

    /// Nothing is stored of the page any more, or nothing that is of use.
    pub fn unstore(&mut self, page: PageNo) {
        if self.has(page, Flag::Origin) {
            self.put(page, Flag::Origin, false);
        }
        self.put(page, Flag::InStore, false);
    }

    /// Whether every page of the run can be [adopted](Self::adopt): it is untouched, and no write of what it was is
    /// still under way. That would say at its end that the home has the page.
    pub fn may_adopt(&self, run: Run) -> bool {
        let entries = &self.entries[run.indices()];
        entries.iter().all(|entry| entry & (STATE_MASK | Flag::Writing.bit()) == Untouched as u16)
    }

    /// The pages are stored from now on, at the origin. All at once, for there may be as many as memory has.
    ///
    /// # Panics
    /// If one [may not](Self::may_adopt) be.
    pub fn adopt(&mut self, run: Run) {
        assert!(self.may_adopt(run) && self.hot_from.is_none(), "{run:?} cannot be at the origin");
        const _: () = assert!(IS_LEGAL[Untouched as usize][Stored as usize], "as `adopt` does");
        for part in run.blocks() {
            for entry in &mut self.entries[part.indices()] {
                debug_assert!(*entry & Flag::InStore.bit() == 0, "nothing is stored of what is untouched");
                *entry |= Stored as u16 | Flag::InStore.bit() | Flag::Origin.bit();
            }
            let (block, region) = (part.start.block(), part.start.block() / REGION_BLOCKS);
            self.blocks[block].stored += part.len as u16;
            self.blocks[block].origin += part.len as u16;
            self.stored[region] += part.len;
            self.origin[region] += part.len;
        }
        let pages = u64::from(run.len);
        self.origin_pages += pages;
        self.counts[Untouched as usize] -= pages;
        self.counts[Stored as usize] += pages;
        self.transitions[Untouched as usize][Stored as usize] += pages;
    }

    /// Pages whose stored content is at the origin.
    pub fn origin_pages(&self) -> u64 {
        self.origin_pages
    }

    /// Whether something of the block is stored there.
    pub fn has_stored_at(&self, block: usize, tier: TierId) -> bool {
        let Block { stored, origin, home, .. } = self.blocks[block];
        if tier == TierId::ORIGIN { origin > 0 } else { home == tier && stored > origin }
    }

    /// The first block from this one on of which a page is at the origin. Regions without one are passed by one look.
    pub fn next_origin_block(&self, from: usize) -> Option<usize> {
        let mut block = from;
        while block < self.blocks.len() {
            if self.origin[block / REGION_BLOCKS] == 0 {
                block = (block / REGION_BLOCKS + 1) * REGION_BLOCKS;
            } else if self.blocks[block].origin == 0 {
                block += 1;
            } else {
                return Some(block);
            }
        }
        None
    }

    /// Pages in that state.
    pub fn count(&self, state: PageState) -> u64 {
        self.counts[state as usize]
    }

    /// Pages on their way to the tier.
    pub fn leaving_to(&self, tier: TierId) -> u64 {
        self.leaving[tier.index()]
    }

    /// Resident pages that something holds where they are, as far as it was tried.
    pub fn pinned(&self) -> u64 {
        self.pinned
    }

    /// How often each transition was taken, as `[from][to]`.
    pub fn transitions(&self) -> &[[u64; STATES]; STATES] {
        &self.transitions
    }

    /// Resident pages of the block: 512 at most.
    pub fn resident_in_block(&self, block: usize) -> u16 {
        self.blocks[block].resident
    }

    /// The host gave the block one huge page, and no part of it has gone another way since.
    pub fn is_huge(&self, block: usize) -> bool {
        self.blocks[block].marks & HUGE != 0
    }

    /// The whole block has come in one huge page, or one has lost a part.
    pub fn set_huge(&mut self, block: usize, huge: bool) {
        self.blocks[block].mark(HUGE, huge);
    }

    /// Some of the block was touched for the first time since this was last asked: that is no sign that it is in use.
    pub fn is_fresh(&mut self, block: usize) -> bool {
        let block = &mut self.blocks[block];
        let fresh = block.marks & FRESH != 0;
        block.mark(FRESH, false);
        fresh
    }

    /// Some of the block has just been touched for the first time.
    pub fn set_fresh(&mut self, block: usize) {
        self.blocks[block].mark(FRESH, true);
    }

    /// Where new content of the block's pages goes, and where what is stored of them is, unless that is at the origin.
    pub fn home(&self, block: usize) -> TierId {
        self.blocks[block].home
    }

    /// Where what is stored of the page is, if anything is.
    pub fn stored_at(&self, page: PageNo) -> TierId {
        if self.has(page, Flag::Origin) { TierId::ORIGIN } else { self.home(page.block()) }
    }

    /// # Panics
    /// If something of the block is stored there, or on its way: it would be looked for in the wrong place. And if that
    /// is to be the origin, which takes no content.
    pub fn set_home(&mut self, block: usize, home: TierId) {
        assert!(home != TierId::ORIGIN, "pages leave the origin and never enter");
        let pages = self.block_of(PageNo(block as u64 * u64::from(BLOCK_PAGES))).pages();
        let elsewhere = |page: &PageNo| {
            let at_origin = self.has(*page, Flag::Origin);
            !(matches!(self.state(*page), Untouched | Resident) || (at_origin && self.state(*page) == Stored))
                || (self.has(*page, Flag::InStore) && !at_origin)
                || self.has(*page, Flag::Writing)
        };
        if let Some(page) = pages.into_iter().find(elsewhere) {
            panic!("{page} is stored already, and its home is to be {home:?}");
        }
        self.blocks[block].home = home;
    }

    /// The first block from `block` on that is in another region, if this one has no resident page at all.
    pub fn skip_empty_region(&self, block: usize) -> Option<usize> {
        let region = block / REGION_BLOCKS;
        (self.regions[region] == 0).then(|| (region + 1) * REGION_BLOCKS)
    }

    /// The blocks of which the store has a page, from one on and round to it again. Regions without one are passed by one
    /// look.
    pub fn stored_blocks(&self, from: usize) -> impl Iterator<Item = usize> {
        let (regions, first) = (self.stored.len(), from / REGION_BLOCKS);
        let part = move |nth: usize| {
            let region = (first + nth) % regions;
            let all = region * REGION_BLOCKS..self.blocks.len().min((region + 1) * REGION_BLOCKS);
            match nth {
                _ if self.stored[region] == 0 => 0..0,
                0 => from..all.end,
                _ if nth == regions => all.start..from,
                _ => all,
            }
        };
        (0..=regions).flat_map(part).filter(|block| self.blocks[*block].stored > 0)
    }

    /// Bytes that the table takes when every page has been touched.
    pub fn bytes(&self) -> usize {
        let regions = 3 * size_of_val(&self.regions[..]);
        size_of_val(&self.entries[..]) + size_of_val(&self.blocks[..]) + regions
    }

    /// The longest run of pages in `state` around `page` within `bounds`.
    pub fn run_around(&self, page: PageNo, state: PageState, bounds: Run) -> Run {
        let same = |other: &PageNo| self.state(*other) == state;
        let before = (bounds.start.0..page.0).rev().map(PageNo).take_while(same).count() as u32;
        let after = (page.0..bounds.end().0).map(PageNo).take_while(same).count() as u32;
        Run::new(PageNo(page.0 - u64::from(before)), before + after)
    }

    /// The 2 MiB block of a page, cut off where its memory ends.
    pub fn block_of(&self, page: PageNo) -> Run {
        let start = PageNo(page.0 - page.0 % u64::from(BLOCK_PAGES));
        if let Ok(at) = self.short.binary_search_by_key(&start, |run| run.start) {
            return self.short[at];
        }
        Run::new(start, (self.pages() - start.0).min(u64::from(BLOCK_PAGES)) as u32)
    }

    // ── heat ─────────────────────────────────────────────────────────────────────────────

    /// Decayed access score: halves at each epoch.
    pub fn heat(&self, page: PageNo) -> u8 {
        let raw = (self.entries[page.index()] >> HEAT_SHIFT) as u8;
        raw >> self.age(page.block()).min(7)
    }

    fn age(&self, block: usize) -> u32 {
        self.epoch - self.blocks[block].epoch
    }

    /// Brings the block's heats to the present epoch, so that one of them can change.
    fn refresh(&mut self, page: PageNo) {
        let age = self.age(page.block()).min(8);
        if age == 0 {
            return;
        }
        for index in self.block_of(page).indices() {
            let entry = self.entries[index];
            let heat = (entry >> HEAT_SHIFT) >> age;
            self.entries[index] = (entry & 0x00FF) | (heat << HEAT_SHIFT);
        }
        self.blocks[page.block()].epoch = self.epoch;
    }

    /// Sets the page's heat, as of now.
    pub fn set_heat(&mut self, page: PageNo, heat: u8) {
        self.refresh(page);
        self.hot_in_store -= u64::from(self.is_hot_in_store(page));
        let entry = &mut self.entries[page.index()];
        *entry = (*entry & 0x00FF) | (u16::from(heat) << HEAT_SHIFT);
        self.hot_in_store += u64::from(self.is_hot_in_store(page));
    }

    /// From now on, until it is told None, the table counts the pages of so much heat that are in the store or on their
    /// way there.
    pub fn count_hot_from(&mut self, heat: Option<u8>) {
        self.hot_from = heat;
        self.hot_in_store = self.find_hot_in_store();
    }

    /// How many those are, as counted.
    pub fn hot_in_store(&self) -> u64 {
        self.hot_in_store
    }

    /// The same, as found now.
    pub fn find_hot_in_store(&self) -> u64 {
        if self.hot_from.is_none() {
            return 0;
        }
        (0..self.pages()).filter(|page| self.is_hot_in_store(PageNo(*page))).count() as u64
    }

    fn is_hot_in_store(&self, page: PageNo) -> bool {
        let hot = |from| matches!(self.state(page), Leaving | Stored) && self.heat(page) >= from;
        self.hot_from.is_some_and(hot)
    }

    /// Adds so much to the page's heat, up to 255.
    pub fn warm(&mut self, page: PageNo, by: u8) {
        self.set_heat(page, self.heat(page).saturating_add(by));
    }

    /// Everything cools by half.
    ///
    /// # Panics
    /// If hot pages are counted: it would not be known which of them still are.
    pub fn next_epoch(&mut self) {
        assert!(self.hot_from.is_none(), "what cools is not counted");
        self.epoch += 1;
    }
}

#[cfg(test)]
mod tests;
