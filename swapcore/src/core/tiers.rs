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
pub(super) const SILENT_TICKS: u64 = 50;
/// Probes for one reading that failed, at most: where half of a device is broken, the next one may be of the other half.
pub(super) const PROBES_MAX: u32 = 8;
/// Pages of RAM that are written for probes to come, where the tier has no other page. The origin takes none: there, a
/// page that it has given before is known for ever.
const SOWN_PAGES: usize = 8;
/// From one probe to the next, in 1/2^64 of memory: the golden ratio, so that they come by everywhere.
pub(super) const PROBE_STRIDE: u64 = 0x9E37_79B9_7F4A_7C15;

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
            let waits = self.waiters.any_deferred() || self.waits_for_write(tier);
            let writer = (under_way || self.waits_for_drop(tier)) && waits;
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

    /// Somebody waits for a page that is being written to the tier: there was no frame for a copy of it.
    fn waits_for_write(&self, tier: TierId) -> bool {
        let waits = |page: PageNo| self.home_of(page) == tier && self.is_awaited_under_write(page);
        self.ios.writes_to(tier) > 0 && self.waiters.pages().any(waits)
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
