//! Space in the store: a page's *place* is taken from the first write to it until it is dropped. Places whose content nobody will ever
//! read are dropped in batches, behind everything else.
//!
//! ```text
//!                written                  its page has other content, or none           dropped
//!   place free ───────────▶ place taken ───────────────────────────────▶ in the batch ─────────▶ place free
//!                               ▲  ▲                    written again       │   │  failed, or held meanwhile
//!                               │  └────────────────────────────────────────┘   ▼
//!                               └───────────────────────────────────────── tried again later
//! ```
//! Invariant: no write and no wanted read of a page is under way together with a drop of its place. A drop is looked at anew when it is
//! issued, not when the page joined the batch ([`Core::dead_in`]); a write that meets a drop waits until that has ended
//! ([`Core::write`]). Else the drop could come second, and take the newest content along.
//!
//! What is *not* dropped: the old copy of a page that is in the guest. If the page has not changed it leaves again without a write, and if it
//! has, its next write finds the place as it is, and the file system has nothing to allocate. Only a store that is full gives these up.

use super::Core;
use super::event::{Action, DropResult, IoId};
use super::state::ios::Purpose;
use super::state::space::LOOK_PAGES;
use crate::table::{Flag, PageState};
use crate::units::{BLOCK_PAGES, PageNo, Run, Slot, TierId};

/// Ticks from the first page of a batch to its drop: what a guest gives back it often takes again at once.
const COLLECT_TICKS: u64 = 5;
/// A batch of so many blocks of 2 MiB waits no longer.
const BATCH_BLOCKS: usize = 64;
/// Ticks after which a drop that failed is tried again.
const RETRY_TICKS: u64 = 100;
/// Blocks that are passed between two ticks in search of copies that a full store can do without, and how many of them are looked into.
const SWEEP_BLOCKS: usize = 16_384;
const SWEEP_LOOKS: usize = 512;
/// Copies that are given up at a time, at least.
const COPIES_MIN: u64 = 2048;

impl Core {
    /// Nobody will read what the store has of the page.
    pub(super) fn note_dead(&mut self, page: PageNo) {
        let supported = self.space.supported[self.home_of(page).index()];
        if !supported || !self.space.is_taken(page) || mutant!(KeepsDeadPlaces) {
            return;
        }
        if self.space.blocks.is_empty() {
            self.space.since = self.tick;
        }
        self.space.blocks.insert(page.block());
    }

    /// Drops what has been collected for some time, or is enough.
    pub(super) fn tick_space(&mut self, ticks: u64) {
        let space = &mut self.space;
        space.look_pages = LOOK_PAGES;
        space.pace.tick(ticks);
        let before = std::mem::replace(&mut space.read_at_tick, self.counts.pages_read);
        space.reads_go_on = self.counts.pages_read != before;
        if !self.space.waiting.is_empty() {
            self.forget_rescued();
            self.tiers.ids().for_each(|tier| self.end_retry(tier));
        }
        self.give_up_copies();
        let old = self.tick >= self.space.since + COLLECT_TICKS;
        self.space.draining |= old || self.space.blocks.len() >= BATCH_BLOCKS;
        self.drop_dead();
    }

    /// Starts as many drops as may be under way: one to each tier, for it keeps reads there waiting.
    fn drop_dead(&mut self) {
        while self.space.draining
            && self.space.under_way.len() < self.tiers.count()
            && self.tick >= self.space.retry_tick
        {
            // Whoever waits for a page comes first, and has most of the time, if there always is somebody.
            let somebody_reads = self.space.reads_go_on || self.ios.reads() > 0;
            // Without room, somebody waits for the drops themselves: pages cannot leave, and reads wait for frames.
            if somebody_reads && !self.is_any_full() && !self.space.pace.may_disturb() {
                return;
            }
            let Some(run) = self.next_dead() else { return };
            run.pages().for_each(|page| self.space.set_taken(page, false));
            for block in blocks_of(run) {
                if !self.space.has_taken(block) {
                    self.space.blocks.remove(&block);
                }
            }
            let tier = if mutant!(DropsAtOrigin) { self.tier_of(run.start) } else { self.home_of(run.start) };
            let io = self.ios.start_drop(tier, run);
            self.space.under_way.push((io, tier, run));
            self.actions.push_back(Action::Drop { io, tier, run });
        }
    }

    /// The next run to drop, all of it at one tier. Blocks that need no more looks leave the batch on the way.
    fn next_dead(&mut self) -> Option<Run> {
        loop {
            let hand = self.space.hand;
            let next = self.space.blocks.range(hand.block()..).next().copied();
            let Some(block) = next else {
                // What has to stay for now is looked at once more at the next tick.
                self.space.hand = PageNo(0);
                self.space.draining = false;
                self.space.since = self.tick;
                return None;
            };
            let all = self.table.block_of(PageNo(block as u64 * u64::from(BLOCK_PAGES)));
            let from = hand.max(all.start);
            self.space.look_pages = self.space.look_pages.checked_sub((all.end().0 - from.0) as u32)?;
            if let Some(run) = self.dead_in(Run::new(from, (all.end().0 - from.0) as u32)) {
                let run = self.dead_behind(run);
                self.space.hand = run.end();
                return Some(run);
            }
            // What is in use now, or has joined behind the hand, has its turn later.
            if !all.pages().any(|page| self.is_dead(page)) {
                self.space.blocks.remove(&block);
            }
            self.space.hand = all.start.next_block();
        }
    }

    /// The first run to drop in a part of one block.
    fn dead_in(&self, part: Run) -> Option<Run> {
        if self.space.is_busy(self.home_of(part.start)) {
            return None;
        }
        let reads = self.ios.reads_any(part);
        // Nobody needs what is in the page's place, nor the place at this moment.
        let may_drop = |page: &PageNo| {
            self.is_dead(*page) && !self.is_kept(*page) && !(reads && self.ios.is_read(*page))
        };
        let start = part.pages().find(may_drop)?;
        let rest = Run::new(start, (part.end().0 - start.0) as u32);
        Some(rest.part(0, rest.pages().take_while(may_drop).count() as u32))
    }

    /// The run, with what is to be dropped next to its end in the blocks behind it, as long as one drop may be. A file system makes one
    /// long hole as quickly as a few short ones.
    fn dead_behind(&mut self, mut run: Run) -> Run {
        while run.len < self.space.pace.longest() {
            let next = run.end();
            let here = next.0 < self.table.pages()
                && next.0.is_multiple_of(u64::from(BLOCK_PAGES))
                && self.space.blocks.contains(&next.block())
                && self.home_of(next) == self.home_of(run.start);
            if !here {
                return run;
            }
            let all = self.table.block_of(next);
            let Some(left) = self.space.look_pages.checked_sub(all.len) else { return run };
            let Some(more) = self.dead_in(all).filter(|more| more.start == next) else { return run };
            self.space.look_pages = left;
            run.len += more.len;
        }
        run
    }

    /// A page that is leaving has its next content written there: nothing is gained by a drop before. What is at the origin
    /// has nothing at home but what a write that failed has left.
    fn is_dead(&self, page: PageNo) -> bool {
        let leaves = self.table.state(page) == PageState::Leaving;
        let at_home = self.table.has(page, Flag::InStore) && !self.table.has(page, Flag::Origin);
        let newest = at_home || leaves;
        self.space.is_taken(page) && (!newest || mutant!(DropsNewContent))
    }

    /// The device works there, or a migration may be reading: it was told that the page is in the store, and holds it.
    fn is_place_in_use(&self, page: PageNo) -> bool {
        self.space.is_busy(self.home_of(page)) || self.is_kept(page) || self.ios.is_read(page)
    }

    fn is_kept(&self, page: PageNo) -> bool {
        (self.table.has(page, Flag::Writing) && !mutant!(DropsUnderWrite))
            || (self.table.has(page, Flag::Held) && !mutant!(DropsHeldPlaces))
    }

    pub(super) fn drop_done(&mut self, io: IoId, result: DropResult, took_us: u64) {
        let (tier, run) = self.ios.end_drop(io);
        self.space.under_way.retain(|(other, ..)| *other != io);
        self.space.pace.dropped(run.len, took_us);
        if result != DropResult::Failed {
            self.tiers.wrote(tier);
        }
        match result {
            DropResult::Done => self.space.freed = true,
            DropResult::Failed | DropResult::Unsupported => {
                run.pages().for_each(|page| self.space.set_taken(page, true));
            }
        }
        match result {
            DropResult::Done => {}
            DropResult::Failed => {
                self.space.blocks.extend(blocks_of(run));
                self.space.retry_tick = self.tick + RETRY_TICKS;
            }
            DropResult::Unsupported => {
                self.space.supported[tier.index()] = false;
                let table = &self.table;
                self.space.blocks.retain(|block| table.home(*block) != tier);
            }
        }
        self.drop_dead();
        self.write_behind_drops();
        self.tiers.ids().for_each(|tier| self.end_retry(tier));
        if self.tiers.is_full(tier) && !self.space.is_busy(tier) && std::mem::take(&mut self.space.freed) {
            self.retry_tier(tier);
        }
    }

    /// Pages that wait behind a drop and have been rescued since do not wait any more.
    fn forget_rescued(&mut self) {
        let waiting = &mut self.space.waiting;
        waiting.sort_unstable_by_key(|(page, _)| *page);
        waiting.dedup();
        waiting.retain(|(page, slot)| {
            self.table.state(*page) == PageState::Leaving && self.frames.find_slot(*page) == Some(*slot)
        });
    }

    /// Writes what has met a drop that is over. It is a part of a retry, if its tier is being retried.
    fn write_behind_drops(&mut self) {
        let mut waiting = std::mem::take(&mut self.space.waiting);
        waiting.retain(|(page, slot)| {
            let tier = self.table.home(page.block());
            let here = self.table.state(*page) == PageState::Leaving
                && !self.table.has(*page, Flag::Writing)
                && self.frames.find_slot(*page) == Some(*slot)
                // Else it is found when that is retried.
                && (self.tiers.may_write(tier) || self.tiers.is_retrying(tier));
            self.table.put(*page, Flag::Writing, here || self.table.has(*page, Flag::Writing));
            here
        });
        let purpose = if self.receiving.is_some() { Purpose::Placement } else { Purpose::PageOut };
        self.write(&waiting, purpose);
    }

    fn is_any_full(&self) -> bool {
        self.tiers.ids().any(|tier| self.tiers.is_full(tier))
    }

    /// A tier has no room. Until it has, copies of pages that are in the guest give way: they can be written again, when these
    /// pages leave.
    pub(super) fn make_space(&mut self) {
        let blocks = self.table.pages().div_ceil(u64::from(BLOCK_PAGES)) as usize;
        (self.space.sweep.1, self.space.freed) = (blocks, false);
        self.give_up_copies();
        self.space.draining = true;
        self.drop_dead();
    }

    /// A tier is full, and there is something to give up still.
    pub(super) fn room_may_come(&self) -> bool {
        self.tiers.ids().any(|tier| self.room_may_come_in(tier))
    }

    /// The same of one: nobody need be told that there is no room.
    pub(super) fn room_may_come_in(&self, tier: TierId) -> bool {
        let space = &self.space;
        let drops = space.draining && self.tick >= space.retry_tick;
        let (_, left) = space.sweep;
        let full = space.supported[tier.index()] && self.tiers.is_full(tier);
        full && (space.is_busy(tier) || drops || left > 0)
    }

    fn give_up_copies(&mut self) {
        let waits = |tier: TierId| self.tiers.is_full(tier) && !self.space.is_busy(tier);
        if !self.tiers.ids().any(waits) {
            return;
        }
        let wanted = COPIES_MIN.max(2 * self.table.count(PageState::Leaving));
        let blocks = self.table.pages().div_ceil(u64::from(BLOCK_PAGES)) as usize;
        let (mut found, mut looks) = (0, 0);
        for _ in 0..SWEEP_BLOCKS {
            let (block, left) = self.space.sweep;
            if left == 0 || found >= wanted || looks >= SWEEP_LOOKS {
                break;
            }
            self.space.sweep = ((block + 1) % blocks, left - 1);
            let home = self.table.home(block);
            let full = self.tiers.is_full(home) && self.space.supported[home.index()];
            if full && self.table.resident_in_block(block) > 0 && self.space.has_taken(block) {
                looks += 1;
                found += self.give_up_copies_of(block);
            }
        }
        self.space.draining |= found > 0;
    }

    fn give_up_copies_of(&mut self, block: usize) -> u64 {
        let mut found = 0;
        for page in self.table.block_of(PageNo(block as u64 * u64::from(BLOCK_PAGES))).pages() {
            let resident = self.table.state(page) == PageState::Resident;
            if resident && self.space.is_taken(page) && !self.is_place_in_use(page) {
                // What is at the origin takes no room here, and stays.
                if !self.table.has(page, Flag::Origin) {
                    self.table.put(page, Flag::InStore, false);
                }
                self.note_dead(page);
                found += 1;
            }
        }
        found
    }

    /// Whether a write to the tier has failed because there is no room, and it takes no others since.
    pub fn is_full(&self, tier: TierId) -> bool {
        self.tiers.is_full(tier)
    }

    /// Somebody's page cannot be written before a drop has ended: it has met that one, or there is no room in the tier but what is dropped.
    pub(super) fn waits_for_drop(&self, tier: TierId) -> bool {
        let behind = |(page, _): &(PageNo, Slot)| self.home_of(*page) == tier;
        self.space.is_busy(tier)
            && (self.tiers.is_full(tier) || self.space.waiting.iter().any(behind))
            && !mutant!(ForgetsSilentDrops)
    }

    // ── for the drivers' checks ──────────────────────────────────────────────────────────

    /// Whether the page's place in the store is on record as taken.
    pub fn is_place_taken(&self, page: PageNo) -> bool {
        self.space.is_taken(page)
    }

    /// Whether places are still to be dropped.
    pub fn has_dead_places(&self) -> bool {
        !self.space.blocks.is_empty() || self.space.is_anything_dropping()
    }
}

/// The blocks that have a part of the run.
fn blocks_of(run: Run) -> impl Iterator<Item = usize> {
    run.start.block()..=PageNo(run.end().0 - 1).block()
}

#[cfg(test)]
mod tests {
    use crate::core::{Core, CoreConfig, Event, IoError, IoErrorKind, WalkStep};

    use super::*;

    const TICK_US: u64 = 100_000;

    /// A VM that has given all of its memory back: every place in the store can be dropped.
    fn core(pages: u64) -> Core {
        let mut core = Core::new(CoreConfig {
            pages,
            budget_frames: 64,
            budget_min: 48,
            slots: 128,
            blocks: 0,
            sampling: false,
            walk: WalkStep::default(),
        });
        for page in (0..pages).map(PageNo) {
            core.space.set_taken(page, true);
            core.note_dead(page);
        }
        core
    }

    fn dropping(core: &mut Core) -> Option<IoId> {
        std::iter::from_fn(|| core.next_action()).find_map(|action| match action {
            Action::Drop { io, .. } => Some(io),
            _ => None,
        })
    }

    /// A tick, since whose last one something has been read, if somebody reads.
    fn tick(core: &mut Core, reads: bool) -> Option<IoId> {
        core.counts.pages_read += u64::from(reads);
        core.handle(Event::Tick { ticks: 1 });
        dropping(core)
    }

    /// Has all of it dropped, each drop in so much time. How long drops took, from the first to the last, and in all.
    fn drop_all(core: &mut Core, drop_us: u64, reads: bool) -> (u64, u64) {
        let (mut next_tick, mut under_way, mut first, mut last) = (TICK_US, None, None, 0);
        while core.has_dead_places() {
            let (now, started) = match under_way {
                Some((io, end)) if end <= next_tick => {
                    last = end;
                    core.handle(Event::DropDone { io, result: DropResult::Done, took_us: drop_us });
                    under_way = None;
                    (end, dropping(core))
                }
                _ => {
                    next_tick += TICK_US;
                    (next_tick - TICK_US, tick(core, reads))
                }
            };
            if let Some(io) = started {
                first.get_or_insert(now);
                under_way = Some((io, now + drop_us));
            }
        }
        assert_eq!(core.space.count(), 0);
        (core.stats().store.drop_us, last - first.expect("something was dropped"))
    }

    /// The promise of `docs/engine.md`, whatever a drop costs. What one tick may take comes twice, at the beginning and at the end.
    #[test]
    fn drops_take_an_eighth_of_the_time_while_somebody_reads() {
        for drop_us in [400, 1500, 3000, 10_000, 50_000] {
            let (spent, time) = drop_all(&mut core(1 << 18), drop_us, true);
            assert!(spent <= time / 8 + 25_000 + drop_us, "{spent} us of {time} us, by {drop_us} us each");
            let (alone, soon) = drop_all(&mut core(1 << 18), drop_us, false);
            assert!(soon <= 2 * alone + 9 * TICK_US, "nobody reads: {soon} us for {alone} us of drops");
        }
    }

    /// A read needs a frame, that a page leaves, and that room in the store.
    #[test]
    fn a_full_store_is_given_room_whoever_reads() {
        let mut core = core(1 << 16);
        assert!((0..10).any(|_| tick(&mut core, true).is_some()));
        let io = core.space.under_way.first().expect("a drop is under way").0;
        core.handle(Event::DropDone { io, result: DropResult::Done, took_us: 500_000 });
        assert_eq!((dropping(&mut core), tick(&mut core, true)), (None, None), "paid for at first");
        core.latch_store(IoError { tier: TierId::STORE, write: true, kind: IoErrorKind::Full });
        core.handle(Event::Step);
        assert!(dropping(&mut core).is_some(), "somebody may be waiting for it");
    }
}
