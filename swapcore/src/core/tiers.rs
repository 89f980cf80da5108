//! The tiers: which of them may be written, and which of them answer. What one of them does holds up nothing that is at another.
//!
//! ```text
//!            a write failed                         nothing read, and somebody waits, for 5 s
//!  latched, full ◀──────────── working ─────────────────────▶ unreachable
//!        └── all that it refused is written ──▶ ▲ ◀── a page came back as it was written ──┘
//! ```
//! **Silent is not broken.** A tier that does not answer, or fails at everything, says nothing about the pages that it has: these stay
//! `Stored`, and who waits for one waits on, until it answers. A page is given up only when it has failed again and again for
//! [`BROKEN_TICKS`] *while its tier gave others*. So before a failure counts, another page must have come back as it was written since
//! the failure before; if nobody else reads, the core does so itself: a *probe*.

use super::Core;
use super::event::Action;
use super::state::tiers::{BadReads, Tier, Verdict};
use crate::error::{IoError, IoErrorKind};
use crate::policy::clock::may_leave;
use crate::table::{Flag, PageState};
use crate::units::{BLOCK_PAGES, PageNo, TierId, runs_of};

/// A page that cannot be read is lost when so many readings of it have failed that each count ([`BadReads`]),
pub(super) const BROKEN_TRIES: u32 = 4;
/// and not before so many ticks since the first of them: 10 s. Paths and controllers come back within less, as a rule.
pub(super) const BROKEN_TICKS: u64 = 100;
/// Ticks between the readings of a page that somebody waits for: once more at once, then after a hiccup of the device may be over; from
/// then on the last of these.
const REREAD_TICKS: [u64; 4] = [0, 1, 10, 20];
/// Somebody has waited for so many ticks, and the tier has given nothing, until that is told: 5 s.
const SILENT_TICKS: u64 = 50;
/// Probes for one reading that failed, at most: where half of a device is broken, the next one may be of the other half.
pub(super) const PROBES_MAX: u32 = 8;
/// Pages of RAM that are written for probes to come, where the tier has no other page. The origin takes none: there, a
/// page that it has given before is known for ever.
const SOWN_PAGES: usize = 8;
/// From one probe to the next, in 1/2^64 of memory: the golden ratio, so that they come by everywhere.
const PROBE_STRIDE: u64 = 0x9E37_79B9_7F4A_7C15;

impl Core {
    /// Of a page that somebody waits for.
    pub(super) fn judge(&mut self, page: PageNo, kind: IoErrorKind) -> Verdict {
        let tier = self.tiers.get_mut(self.tier_of(page));
        tier.silence.kind = Some(kind);
        let tick = self.tick;
        let bad = self.bad_reads.entry(page).or_insert(BadReads {
            tries: 0,
            counted: 0,
            first_tick: tick,
            failed_tick: tick,
            again_tick: tick,
            good_before: tier.good,
            fair: true,
            kind,
        });
        let of_medium =
            matches!(kind, IoErrorKind::Broken(_) | IoErrorKind::Mismatch) || mutant!(TakesSilenceForBroken);
        bad.counted += u32::from(of_medium && (bad.fair || mutant!(TakesSilenceForBroken)));
        if mutant!(PoisonsAtFirstError)
            || (bad.counted >= BROKEN_TRIES && tick - bad.first_tick >= BROKEN_TICKS)
        {
            return Verdict::Lost;
        }
        let wait = REREAD_TICKS[(bad.tries as usize).min(REREAD_TICKS.len() - 1)];
        bad.tries = bad.tries.saturating_add(1);
        (bad.again_tick, bad.good_before, bad.fair, bad.kind) = (tick + wait, tier.good, false, kind);
        bad.failed_tick = tick;
        if wait == 0 { Verdict::ReadNow } else { Verdict::ReadLater }
    }

    /// Reads once more what came back bad some time ago and is still waited for.
    pub(super) fn reread(&mut self) {
        let due = |bad: &BadReads| bad.again_tick <= self.tick;
        let mut due: Vec<_> =
            self.bad_reads.iter().filter(|(_, bad)| due(bad)).map(|(page, _)| *page).collect();
        due.sort_unstable();
        for page in due {
            // If it is not in the store any more, or waits for a frame, it needs no help.
            let idle = self.table.state(page) == PageState::Stored && !self.waiters.is_deferred(page);
            if !self.waiters.wait_for(page) {
                self.bad_reads.remove(&page);
            } else if idle && !mutant!(ForgetsRereads) {
                let good = self.tiers.get(self.tier_of(page)).good;
                let bad = self.bad_reads.get_mut(&page).expect("just found");
                bad.fair = good != bad.good_before;
                if !self.page_in(page) {
                    self.waiters.defer(page);
                }
            }
        }
    }

    /// A page of the tier for a probe: what it has there is known, and nobody is writing it.
    pub(super) fn find_probe(&mut self, tier: TierId) -> Option<PageNo> {
        let pages = self.table.pages();
        // What it gave last, once; then somewhere else, for that one may fail by now.
        let last = self.tiers.get_mut(tier).gave_last.take();
        self.tiers.probe_hand = self.tiers.probe_hand.wrapping_add(PROBE_STRIDE);
        let start = PageNo(((u128::from(self.tiers.probe_hand) * u128::from(pages)) >> 64) as u64);
        let there = |page: &PageNo| {
            self.table.has(*page, Flag::InStore)
                && !self.table.has(*page, Flag::Writing)
                && self.tier_of(*page) == tier
                && !self.bad_reads.contains_key(page)
        };
        // Regions and blocks without a stored page take one look each, so one is found soon if there is any.
        let in_block = |block: usize| {
            let all = self.table.block_of(PageNo(block as u64 * u64::from(BLOCK_PAGES)));
            let from = start.0 as u32 % BLOCK_PAGES;
            (0..all.len).map(|nth| all.start.plus((from + nth) % all.len)).find(there)
        };
        let blocks = || self.table.stored_blocks(start.block());
        let known = || {
            let known = self.tiers.known_at_origin.filter(|_| tier == TierId::ORIGIN).map(|(page, _)| page);
            known.filter(|page| !self.bad_reads.contains_key(page))
        };
        last.filter(&there)
            .or_else(|| blocks().filter(|block| self.table.has_stored_at(*block, tier)).find_map(in_block))
            .or_else(known)
    }

    /// To be called when nothing is listed to be written: a page that starts out now may have been there before, with the
    /// same slot, and its write would overtake its move.
    pub(super) fn sow_tiers(&mut self) {
        self.tiers.ids().for_each(|tier| self.sow(tier));
    }

    /// The tier has no page for a probe. So that it has one when the bad page is read again, some pages of RAM are written to it, as if
    /// they left: else nobody could ever tell the only stored page from a tier that is away.
    fn sow(&mut self, tier: TierId) {
        let open = self.tiers.is_open(tier) && self.receiving.is_none();
        if !std::mem::take(&mut self.tiers.get_mut(tier).wants_sown) || !open || mutant!(NeverSows) {
            return;
        }
        let blocks = self.table.pages().div_ceil(u64::from(BLOCK_PAGES)) as usize;
        let first = ((u128::from(self.tiers.probe_hand) * blocks as u128) >> 64) as usize;
        let mut block = first;
        let mut passed = 0;
        while passed < blocks {
            if let Some(next) = self.table.skip_empty_region(block) {
                let next = next.min(blocks);
                (passed, block) = (passed + next - block, next % blocks);
                continue;
            }
            if self.table.home(block) == tier && self.table.resident_in_block(block) > 0 {
                let all = self.table.block_of(PageNo(block as u64 * u64::from(BLOCK_PAGES)));
                let ready: Vec<_> =
                    all.pages().filter(|page| may_leave(&self.table, *page)).take(SOWN_PAGES).collect();
                if !ready.is_empty() {
                    for run in runs_of(ready, SOWN_PAGES as u32) {
                        self.start_out(run, PageState::Leaving);
                    }
                    return;
                }
            }
            (passed, block) = (passed + 1, (block + 1) % blocks);
        }
    }

    /// Somebody has long waited for a page that the tier does not give though it gives others, with errors that say nothing of the page's
    /// medium: one of its paths is gone. That is no silence, but for whoever waits it is none the better.
    fn withholds(&self, tier: TierId) -> bool {
        self.bad_reads.iter().any(|(page, bad)| {
            !matches!(bad.kind, IoErrorKind::Broken(_) | IoErrorKind::Mismatch)
                && self.tick - bad.first_tick >= SILENT_TICKS
                && self.tier_of(*page) == tier
                && self.waiters.wait_for(*page)
        })
    }

    /// The tier has given a page. Who waited for others that it did not give is served at once, if that was for want of an answer.
    pub(super) fn tier_answers(&mut self, tier: TierId) {
        if self.bad_reads.is_empty() {
            self.end_silence(tier);
            return;
        }
        let told = !self.withholds(tier) && self.end_silence(tier);
        let (table, tick) = (&self.table, self.tick);
        let mut any = false;
        for (page, bad) in &mut self.bad_reads {
            let no_answer = !matches!(bad.kind, IoErrorKind::Broken(_) | IoErrorKind::Mismatch);
            let hurry = told || (no_answer && bad.failed_tick < tick);
            if table.stored_at(*page) == tier && hurry && bad.again_tick > tick {
                // Once a tick: should it fail again, it is read again in its own time.
                (bad.again_tick, any) = (tick, true);
            }
        }
        if any {
            self.reread();
        }
    }

    fn end_silence(&mut self, tier: TierId) -> bool {
        let silence = &mut self.tiers.get_mut(tier).silence;
        (silence.unread, silence.unwritten) = (0, 0);
        let told = std::mem::take(&mut silence.told);
        silence.kind = silence.kind.filter(|_| !told);
        if told && !mutant!(ForgetsReachable) {
            self.actions.push_back(Action::TierReachable(tier));
        }
        told
    }

    /// Looks which tiers give nothing while somebody waits for it.
    pub(super) fn tick_tiers(&mut self, ticks: u64) {
        for tier in self.tiers.ids_to_read() {
            let reader = self.waits_for_read(tier);
            // It has given nothing, and is not asked for lack of a frame: that is neither more silence nor an end of it.
            let asks_later = !reader && self.waits_to_read_again(tier);
            let under_way = self.ios.writes_to(tier) > 0;
            let writer = (under_way || self.waits_for_drop(tier)) && self.waiters.any_deferred();
            let withholds = (reader || asks_later) && self.withholds(tier);
            let Tier { good, writes, silence, .. } = self.tiers.get_mut(tier);
            let heard = (silence.good != *good, silence.writes != *writes);
            (silence.good, silence.writes) = (*good, *writes);
            silence.unread = match heard.0 {
                false if reader => silence.unread + ticks,
                false if asks_later && silence.told => silence.unread.max(silence.unwritten),
                false if asks_later => silence.unread,
                _ if withholds => silence.unread.max(SILENT_TICKS),
                _ => 0,
            };
            silence.unwritten = if writer && !heard.1 { silence.unwritten + ticks } else { 0 };
            // Behind a drop that does not end wait the pages that have met it, and no others: the tier takes those.
            silence.stalled = if under_way && !heard.1 { silence.stalled + ticks } else { 0 };
            match silence.unread.max(silence.unwritten) {
                0 => drop(self.end_silence(tier)),
                SILENT_TICKS.. if !silence.told && !mutant!(WaitsInSilence) => {
                    silence.told = true;
                    let write = silence.unread == 0;
                    let kind = silence.kind.filter(|_| !write).unwrap_or(IoErrorKind::Unreachable);
                    self.actions.push_back(Action::TierUnreachable(IoError { tier, write, kind }));
                }
                _ => {}
            }
        }
    }

    /// Somebody waits for a page that the tier has not given, and that has no frame to be read into once more.
    fn waits_to_read_again(&self, tier: TierId) -> bool {
        let waits = |page: &PageNo| self.tier_of(*page) == tier && self.waiters.wait_for(*page);
        self.bad_reads.keys().any(waits) && !mutant!(EndsSilenceForWantOfFrames)
    }

    /// Somebody waits for a page that is being read from the tier, or is to be read again.
    fn waits_for_read(&self, tier: TierId) -> bool {
        self.waiters.pages().any(|page| {
            self.tier_of(page) == tier
                && match self.table.state(page) {
                    PageState::Stored => {
                        self.bad_reads.contains_key(&page) && !self.waiters.is_deferred(page)
                    }
                    PageState::Arriving => {
                        self.frames.find_slot(page).is_some_and(|slot| self.ios.is_reading(slot))
                    }
                    _ => false,
                }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::{CoreConfig, DropResult, Event, IoId, PageOut, Request, Ticket, WalkStep};
    use crate::errno;
    use crate::stats::TierState;
    use crate::units::Run;

    /// Two blocks, each at a tier of its own.
    fn core() -> Core {
        let config = CoreConfig {
            pages: 1024,
            budget_frames: 256,
            budget_min: 48,
            slots: 256,
            blocks: 0,
            sampling: false,
            walk: WalkStep::default(),
        };
        Core::new(config).with_homes(2, |block| TierId(block as u8))
    }

    /// Does what is to be done but for I/O and what is to be told: that is returned.
    fn perform(core: &mut Core) -> Vec<Action> {
        let mut rest = Vec::new();
        while let Some(action) = core.next_action() {
            match action {
                Action::MoveIn { run, slots } => core.handle(Event::MovedIn { run, slots, moved: run.len }),
                Action::CopyIn { page, slot } => core.handle(Event::CopiedIn { page, slot, copied: true }),
                Action::MoveOut { run, slots, .. } => {
                    let out: Vec<_> =
                        run.pages().map(|page| PageOut::Moved { sum: page.0, zero: false }).collect();
                    core.handle(Event::MovedOut { run, slots, pages: &out });
                }
                other => rest.push(other),
            }
        }
        core.check();
        rest
    }

    fn hand(core: &mut Core, event: Event<'_>) -> Vec<Action> {
        core.handle(event);
        core.make_ready();
        perform(core)
    }

    /// The page has been touched, and is in the store alone; its checksum is its number.
    fn store(core: &mut Core, page: PageNo) {
        hand(core, Event::Fault(page));
        let evict = |core: &mut Core| {
            let request = Request::Evict(Run::one(page));
            hand(core, Event::Request { ticket: Ticket(1), request })
        };
        let mut todo = evict(core);
        while core.table.state(page) != PageState::Stored {
            todo.extend(hand(core, Event::Tick { ticks: 1 }));
            for action in std::mem::take(&mut todo) {
                if let Action::Write { io, .. } = action {
                    todo.extend(hand(core, Event::WriteDone { io, result: Ok(()) }));
                }
            }
        }
    }

    fn reads(actions: &[Action]) -> Vec<(IoId, TierId, Run)> {
        let read = |action: &Action| match action {
            Action::Read { io, tier, run, .. } => Some((*io, *tier, *run)),
            _ => None,
        };
        actions.iter().filter_map(read).collect()
    }

    const BROKEN: IoErrorKind = IoErrorKind::Broken(errno::EIO);

    /// Somebody waits for the page while its tier gives what `gives` says, for so many ticks; returns what is told meanwhile.
    fn wait(core: &mut Core, page: PageNo, ticks: u64, gives: impl Fn(PageNo) -> bool) -> Vec<Action> {
        let (mut told, mut todo) = (Vec::new(), hand(core, Event::Fault(page)));
        for _ in 0..=ticks {
            while !todo.is_empty() {
                for action in std::mem::take(&mut todo) {
                    let [(io, tier, read)] = reads(std::slice::from_ref(&action))[..] else {
                        told.push(action);
                        continue;
                    };
                    let sums: Vec<_> = read.pages().map(|page| page.0).collect();
                    let error = IoError { tier, write: false, kind: BROKEN };
                    let result = if read.pages().all(&gives) { Ok(&sums[..]) } else { Err(error) };
                    todo.extend(hand(core, Event::ReadDone { io, result }));
                }
            }
            todo = hand(core, Event::Tick { ticks: 1 });
        }
        told.extend(todo);
        told
    }

    #[test]
    fn a_tier_that_fails_at_everything_for_minutes_loses_no_page() {
        let mut core = core();
        let pages = [3, 70, 140].map(PageNo);
        pages.iter().for_each(|page| store(&mut core, *page));
        let told = wait(&mut core, pages[0], 3000, |_| false);
        assert_eq!(core.table.count(PageState::Poisoned), 0);
        let unreachable = |action: &&Action| matches!(action, Action::TierUnreachable(error) if error.tier == TierId(0) && error.kind == BROKEN);
        assert_eq!(told.iter().filter(unreachable).count(), 1, "{told:?}");
        assert_eq!(core.tier_state(TierId(0)), TierState::Unreachable);
        assert_eq!(core.tier_state(TierId(1)), TierState::Working);
        let told = wait(&mut core, pages[1], 0, |_| true);
        assert!(told.iter().any(|action| matches!(action, Action::TierReachable(TierId(0)))), "{told:?}");
        wait(&mut core, pages[2], 20, |_| true);
        assert!(pages.iter().all(|page| core.table.state(*page) == PageState::Resident));
        assert_eq!(core.tier_state(TierId(0)), TierState::Working);
    }

    #[test]
    fn a_page_that_is_not_given_for_ten_seconds_while_others_are_is_lost() {
        let mut core = core();
        [3, 70, 140].map(PageNo).iter().for_each(|page| store(&mut core, *page));
        let told = wait(&mut core, PageNo(3), BROKEN_TICKS - 1, |page| page != PageNo(3));
        assert_eq!(core.table.state(PageNo(3)), PageState::Stored, "{told:?}");
        wait(&mut core, PageNo(3), 40, |page| page != PageNo(3));
        assert_eq!(core.table.state(PageNo(3)), PageState::Poisoned);
        assert_eq!(core.table.count(PageState::Poisoned), 1);
    }

    #[test]
    fn what_one_tier_refuses_is_no_matter_of_the_other() {
        let mut core = core();
        let [good, bad] = [PageNo(3), PageNo(600)];
        for page in [good, bad] {
            hand(&mut core, Event::Fault(page));
            let request = Request::Evict(Run::one(page));
            let mut todo = hand(&mut core, Event::Request { ticket: Ticket(page.0), request });
            todo.extend(hand(&mut core, Event::Tick { ticks: 1 }));
            for action in todo {
                if let Action::Write { io, tier, .. } = action {
                    let error = IoError { tier, write: true, kind: IoErrorKind::Full };
                    let result = if tier == TierId(1) { Err(error) } else { Ok(()) };
                    hand(&mut core, Event::WriteDone { io, result });
                }
            }
        }
        assert_eq!([0, 1].map(|tier| core.tier_state(TierId(tier))), [TierState::Working, TierState::Full]);
        assert_eq!(core.table.state(bad), PageState::Leaving);
        store(&mut core, PageNo(200));
        assert_eq!(core.table.state(PageNo(200)), PageState::Stored);
    }

    #[test]
    fn a_page_that_its_tier_withholds_while_it_gives_others_is_no_busy_loop_and_is_told() {
        let mut core = core();
        let (bad, good) = (PageNo(3), PageNo(200));
        [bad, good].into_iter().for_each(|page| store(&mut core, page));
        let (mut told, mut reads) = (false, 0);
        let mut todo = hand(&mut core, Event::Fault(bad));
        for _ in 0..SILENT_TICKS + 20 {
            // All that it asks for within one tick.
            for _ in 0..100 {
                for action in std::mem::take(&mut todo) {
                    match action {
                        Action::Read { io, tier, run, .. } => {
                            reads += 1;
                            let kind = IoErrorKind::Unreachable;
                            let sums: Vec<_> = run.pages().map(|page| page.0).collect();
                            let failed = Err(IoError { tier, write: false, kind });
                            let result = if run.contains(bad) { failed } else { Ok(&sums[..]) };
                            todo.extend(hand(&mut core, Event::ReadDone { io, result }));
                        }
                        Action::TierUnreachable(_) => told = true,
                        Action::TierReachable(_) => told = false,
                        _ => {}
                    }
                }
            }
            assert!(todo.is_empty(), "reads without end within a tick");
            todo = hand(&mut core, Event::Tick { ticks: 1 });
        }
        assert!(told, "somebody has waited for 5 s");
        assert!(reads < 400, "{reads} reads in 7 s");
        assert_eq!(core.table.state(bad), PageState::Stored, "nothing says that it is lost");
        // It is given in the end.
        for _ in 0..100 {
            for action in std::mem::take(&mut todo) {
                match action {
                    Action::Read { io, run, .. } => {
                        let sums: Vec<_> = run.pages().map(|page| page.0).collect();
                        todo.extend(hand(&mut core, Event::ReadDone { io, result: Ok(&sums) }));
                    }
                    Action::TierReachable(_) => told = false,
                    _ => {}
                }
            }
            if todo.is_empty() {
                todo = hand(&mut core, Event::Tick { ticks: 1 });
            }
        }
        assert!(!told && core.table.state(bad) == PageState::Resident && core.faults_waiting() == 0);
    }

    /// An idle VM's engine sleeps for seconds: whoever begins to wait then has not waited for these.
    #[test]
    fn who_begins_to_wait_behind_a_long_sleep_has_not_waited_for_it() {
        let mut core = core();
        store(&mut core, PageNo(3));
        core.slept(64);
        let mut todo = hand(&mut core, Event::Fault(PageNo(3)));
        todo.extend(hand(&mut core, Event::Tick { ticks: 0 }));
        assert!(!todo.iter().any(|action| matches!(action, Action::TierUnreachable(_))), "{todo:?}");
        todo.extend(hand(&mut core, Event::Tick { ticks: SILENT_TICKS }));
        assert!(todo.iter().any(|action| matches!(action, Action::TierUnreachable(_))), "{todo:?}");
    }

    /// The store has two pages, far from each other and at an end of a large memory: the one is found for a probe of the other.
    #[test]
    fn one_page_of_gibibytes_is_found_for_a_probe() {
        const PAGES: u64 = 1 << 19;
        let config = CoreConfig {
            pages: PAGES,
            budget_frames: 4096,
            budget_min: 48,
            slots: 2048,
            blocks: 0,
            sampling: false,
            walk: WalkStep::default(),
        };
        let mut core = Core::new(config);
        let [bad, good] = [PageNo(5), PageNo(PAGES - 3)];
        [bad, good].iter().for_each(|page| store(&mut core, *page));
        for _ in 0..100 {
            core.tiers.probe_hand = core.tiers.probe_hand.wrapping_add(PROBE_STRIDE / 3);
            core.bad_reads.clear();
            assert!([Some(bad), Some(good)].contains(&core.find_probe(TierId::STORE)));
        }
        core.tiers.get_mut(TierId::STORE).gave_last = None;
        let told = wait(&mut core, bad, BROKEN_TICKS + 20, |page| page != bad);
        assert_eq!(core.table.state(bad), PageState::Poisoned, "{told:?}");
        assert_eq!(core.table.state(good), PageState::Stored);
    }

    /// As [`wait`], where writes end as they should.
    fn wait_and_write(core: &mut Core, page: PageNo, ticks: u64, gives: impl Fn(PageNo) -> bool) {
        let mut todo = hand(core, Event::Fault(page));
        for _ in 0..=ticks {
            while !todo.is_empty() {
                for action in std::mem::take(&mut todo) {
                    match action {
                        Action::Read { io, tier, run, .. } => {
                            let sums: Vec<_> = run.pages().map(|page| page.0).collect();
                            let failed = Err(IoError { tier, write: false, kind: BROKEN });
                            let result = if run.pages().all(&gives) { Ok(&sums[..]) } else { failed };
                            todo.extend(hand(core, Event::ReadDone { io, result }));
                        }
                        Action::Write { io, .. } => {
                            todo.extend(hand(core, Event::WriteDone { io, result: Ok(()) }));
                        }
                        _ => {}
                    }
                }
            }
            todo = hand(core, Event::Tick { ticks: 1 });
        }
    }

    #[test]
    fn the_only_stored_page_is_lost_if_the_tier_gives_what_is_written_to_it_for_that() {
        let mut core = core();
        let bad = PageNo(3);
        store(&mut core, bad);
        // Of the same tier, and in RAM alone.
        hand(&mut core, Event::Fault(PageNo(200)));
        wait_and_write(&mut core, bad, BROKEN_TICKS - 1, |page| page != bad);
        assert_eq!(core.table.state(bad), PageState::Stored);
        wait_and_write(&mut core, bad, 20, |page| page != bad);
        assert_eq!(core.table.state(bad), PageState::Poisoned);
        assert_eq!(core.table.count(PageState::Poisoned), 1);
    }

    #[test]
    fn the_only_stored_page_stays_if_the_tier_gives_nothing_at_all() {
        let mut core = core();
        store(&mut core, PageNo(3));
        hand(&mut core, Event::Fault(PageNo(200)));
        wait_and_write(&mut core, PageNo(3), 3000, |_| false);
        assert_eq!(
            (core.table.state(PageNo(3)), core.table.count(PageState::Poisoned)),
            (PageState::Stored, 0)
        );
        assert_eq!(core.tier_state(TierId(0)), TierState::Unreachable);
    }

    /// All frames are taken while the page that the tier does not give waits to be read once more.
    #[test]
    fn want_of_a_frame_is_no_answer_of_the_tier() {
        let mut core = core();
        store(&mut core, PageNo(3));
        let told = wait(&mut core, PageNo(3), SILENT_TICKS + 20, |_| false);
        assert!(told.iter().any(|action| matches!(action, Action::TierUnreachable(_))), "{told:?}");
        core.waiters.defer(PageNo(3));
        core.tick_tiers(1);
        assert_eq!(core.tier_state(TierId(0)), TierState::Unreachable, "it has given nothing");
        assert!(core.tiers.silent_ticks(TierId(0)) >= SILENT_TICKS);
    }

    /// A VM whose first `run` has been in the store and was given back: its places are being dropped, which does not end.
    fn hung_drop(pages: u64, run: Run) -> (Core, IoId) {
        let config = CoreConfig {
            pages,
            budget_frames: 64,
            budget_min: 48,
            slots: 128,
            blocks: 0,
            sampling: false,
            walk: WalkStep::default(),
        };
        let mut core = Core::new(config);
        for page in run.pages() {
            let mut todo = match core.table.state(page) {
                PageState::Untouched => hand(&mut core, Event::Fault(page)),
                _ => Vec::new(),
            };
            let request = Request::Evict(Run::one(page));
            todo.extend(hand(&mut core, Event::Request { ticket: Ticket(1), request }));
            for _ in 0..20 {
                for action in std::mem::take(&mut todo) {
                    if let Action::Write { io, .. } = action {
                        todo.extend(hand(&mut core, Event::WriteDone { io, result: Ok(()) }));
                    }
                }
                todo.extend(hand(&mut core, Event::Tick { ticks: 1 }));
            }
            assert_eq!(core.table.state(page), PageState::Stored, "{page}");
        }
        hand(&mut core, Event::Request { ticket: Ticket(2), request: Request::Discard(run) });
        let mut dropping = None;
        for _ in 0..20 {
            for action in hand(&mut core, Event::Tick { ticks: 1 }) {
                if let Action::Drop { io, run, .. } = action {
                    dropping = Some((io, run));
                }
            }
        }
        let (io, dropped) = dropping.expect("its places are dropped");
        assert_eq!(dropped, run);
        (core, io)
    }

    /// A full VM that uses memory again which it has just given back, while the drop of its places does not end.
    #[test]
    fn a_drop_that_does_not_end_is_the_tiers_silence() {
        let run = Run::new(PageNo(0), 192);
        let (mut core, io) = hung_drop(512, run);
        let mut todo: Vec<_> = run.pages().flat_map(|page| hand(&mut core, Event::Fault(page))).collect();
        for _ in 0..SILENT_TICKS - 1 {
            todo.extend(hand(&mut core, Event::Tick { ticks: 1 }));
        }
        assert!(core.waits_for_frame() && reads(&todo).is_empty());
        let unreachable = |action: &Action| matches!(action, Action::TierUnreachable(error) if error.write);
        let writes = |action: &Action| matches!(action, Action::Write { .. });
        assert!(!todo.iter().any(|action| writes(action) || unreachable(action)), "{todo:?}");
        todo.extend(hand(&mut core, Event::Tick { ticks: 5 }));
        assert!(todo.iter().any(unreachable), "{todo:?}");
        let took_us = 5_500_000;
        let mut todo = hand(&mut core, Event::DropDone { io, result: DropResult::Done, took_us });
        assert!(todo.iter().any(writes), "what has met the drop is written behind it: {todo:?}");
        let mut reachable = false;
        for _ in 0..40 {
            while !todo.is_empty() {
                for action in std::mem::take(&mut todo) {
                    reachable |= matches!(action, Action::TierReachable(_));
                    if let Action::Write { io, .. } = action {
                        todo.extend(hand(&mut core, Event::WriteDone { io, result: Ok(()) }));
                    }
                }
            }
            todo = hand(&mut core, Event::Tick { ticks: 1 });
        }
        assert!(
            reachable && core.faults_waiting() == 0 && core.tier_state(TierId::STORE) == TierState::Working
        );
    }

    #[test]
    fn behind_a_drop_that_does_not_end_wait_the_pages_that_have_met_it_and_no_others() {
        let run = Run::new(PageNo(0), 192);
        let (mut core, _) = hung_drop(1024, run);
        // One of its pages is in use again, and leaves: it waits.
        hand(&mut core, Event::Fault(PageNo(7)));
        hand(&mut core, Event::Request { ticket: Ticket(1), request: Request::Evict(Run::one(PageNo(7))) });
        for _ in 0..2 * SILENT_TICKS {
            hand(&mut core, Event::Tick { ticks: 1 });
        }
        assert_eq!(core.table.state(PageNo(7)), PageState::Leaving);
        // The others are more than RAM has room for.
        for page in Run::new(PageNo(512), 256).pages() {
            let mut todo = hand(&mut core, Event::Fault(page));
            for _ in 0..10 {
                for action in std::mem::take(&mut todo) {
                    assert!(!matches!(action, Action::TierUnreachable(_)), "{action:?}");
                    if let Action::Write { io, .. } = action {
                        todo.extend(hand(&mut core, Event::WriteDone { io, result: Ok(()) }));
                    }
                }
                todo.extend(hand(&mut core, Event::Tick { ticks: 1 }));
            }
            assert_eq!(core.faults_waiting(), 0, "{page}");
        }
    }

    #[test]
    fn a_page_that_is_sown_is_not_written_before_it_has_moved() {
        let mut core = core();
        let page = PageNo(0);
        hand(&mut core, Event::Fault(page));
        hand(&mut core, Event::Request { ticket: Ticket(1), request: Request::Evict(Run::one(page)) });
        assert_eq!(core.table.state(page), PageState::Leaving);
        // It is listed to be written, and is wanted again before that.
        hand(&mut core, Event::Fault(page));
        assert_eq!(core.table.state(page), PageState::Resident);
        core.tiers.get_mut(TierId(0)).wants_sown = true;
        core.handle(Event::Tick { ticks: 1 });
        let actions: Vec<_> = std::iter::from_fn(|| core.next_action()).collect();
        assert!(actions.iter().any(|action| matches!(action, Action::MoveOut { .. })), "{actions:?}");
        assert!(!actions.iter().any(|action| matches!(action, Action::Write { .. })), "{actions:?}");
    }
}
