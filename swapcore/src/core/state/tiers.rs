//! What is known of each tier: whether it takes writes, and whether it gives pages; and pages of which a reading failed.

use super::latch::{Backoff, Latch};
use crate::error::{IoError, IoErrorKind};
use crate::stats::TierState;
use crate::units::{PageNo, TierId};

/// A tier that has ended no write for so many ticks gets no more victims, and nobody counts on the frames of those that it has: 2 s.
const STALLED_TICKS: u64 = 20;

/// A page that could not be read, or came back with another content, while somebody waits for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BadReads {
    /// Readings that failed.
    pub(crate) tries: u32,
    /// Of these, the ones that count: the tier has given another page since the one before.
    pub(crate) counted: u32,
    pub(crate) first_tick: u64,
    /// Of the last reading that failed.
    pub(crate) failed_tick: u64,
    pub(crate) again_tick: u64,
    /// Pages that the tier had given when it failed last, and whether it has given more by when it was read again.
    pub(crate) good_before: u64,
    pub(crate) fair: bool,
    pub(crate) kind: IoErrorKind,
}

/// What becomes of a page that could not be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    ReadNow,
    ReadLater,
    Lost,
}

#[derive(Debug, Default)]
pub(crate) struct Silence {
    /// Pages that it had given, and writes and drops that had ended, at the last tick.
    pub(crate) good: u64,
    pub(crate) writes: u64,
    /// Ticks for which it has given none while somebody waited for one, and ended no write and no drop while somebody waited for a
    /// frame.
    pub(crate) unread: u64,
    pub(crate) unwritten: u64,
    /// Ticks for which it has ended none of its writes.
    pub(crate) stalled: u64,
    pub(crate) told: bool,
    /// How a reading failed last.
    pub(crate) kind: Option<IoErrorKind>,
}

#[derive(Debug, Default)]
pub(crate) struct Tier {
    /// It takes no writes.
    pub(crate) latch: Option<Latch>,
    pub(crate) backoff: Backoff,
    /// Pages that were read and were as they had been written.
    pub(crate) good: u64,
    /// One of the last of these, for the next probe.
    pub(crate) gave_last: Option<PageNo>,
    /// Writes and drops that it has done.
    pub(crate) writes: u64,
    /// There was no page of it for a probe.
    pub(crate) wants_sown: bool,
    pub(crate) silence: Silence,
}

impl Tier {
    pub(crate) fn failed(&self) -> Option<&Latch> {
        self.latch.as_ref().filter(|latch| latch.told)
    }
}

#[derive(Debug)]
pub(crate) struct Tiers {
    /// Those that blocks are at home at.
    tiers: Vec<Tier>,
    origin: Option<Tier>,
    /// A page that the origin has given, and its checksum: what it has of the page stays as it is for ever.
    pub(crate) known_at_origin: Option<(PageNo, u64)>,
    /// Where the last probe was.
    pub(crate) probe_hand: u64,
}

impl Tiers {
    pub(crate) fn new(count: usize) -> Tiers {
        let tiers = (0..count).map(|_| Tier::default()).collect();
        Tiers { tiers, origin: None, known_at_origin: None, probe_hand: 0 }
    }

    /// From now on so many, with nothing known of them; the origin stays.
    pub(crate) fn set_count(&mut self, count: usize) {
        self.tiers = (0..count).map(|_| Tier::default()).collect();
    }

    pub(crate) fn add_origin(&mut self) {
        self.origin = Some(Tier::default());
    }

    pub(crate) fn have_origin(&self) -> bool {
        self.origin.is_some()
    }

    /// Without the origin, as all that is about writes.
    pub(crate) fn count(&self) -> usize {
        self.tiers.len()
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = TierId> + use<> {
        (0..self.tiers.len()).map(|index| TierId(index as u8))
    }

    /// Those that pages are read from: the origin as well.
    pub(crate) fn ids_to_read(&self) -> impl Iterator<Item = TierId> + use<> {
        self.ids().chain(self.have_origin().then_some(TierId::ORIGIN))
    }

    pub(crate) fn get(&self, tier: TierId) -> &Tier {
        match tier {
            TierId::ORIGIN => self.origin.as_ref().expect("there is an origin"),
            home => &self.tiers[home.index()],
        }
    }

    pub(crate) fn get_mut(&mut self, tier: TierId) -> &mut Tier {
        match tier {
            TierId::ORIGIN => self.origin.as_mut().expect("there is an origin"),
            home => &mut self.tiers[home.index()],
        }
    }

    pub(crate) fn may_write(&self, tier: TierId) -> bool {
        self.get(tier).latch.is_none()
    }

    /// It takes no writes, but those that it refused before and gets once more.
    pub(crate) fn is_retrying(&self, tier: TierId) -> bool {
        self.get(tier).latch.as_ref().is_some_and(|latch| latch.retrying)
    }

    /// It takes writes, and ends them.
    pub(crate) fn is_open(&self, tier: TierId) -> bool {
        self.may_write(tier)
            && (self.get(tier).silence.stalled < STALLED_TICKS || mutant!(CountsOnStalledTier))
    }

    pub(crate) fn any_open(&self) -> bool {
        self.ids().any(|tier| self.is_open(tier))
    }

    pub(crate) fn all_open(&self) -> bool {
        self.ids().all(|tier| self.is_open(tier))
    }

    /// Nothing can be written anywhere.
    pub(crate) fn none_writable(&self) -> bool {
        self.tiers.iter().all(|tier| tier.latch.is_some())
    }

    /// A write to the tier failed because there is no room.
    pub(crate) fn is_full(&self, tier: TierId) -> bool {
        self.get(tier).latch.as_ref().is_some_and(|latch| latch.error.kind == IoErrorKind::Full)
    }

    /// As [`Tiers::latched`], but not while a tier is only full, and room is being made in it.
    pub(crate) fn failed(&self) -> Option<IoError> {
        self.tiers.iter().find_map(Tier::failed).map(Latch::error)
    }

    /// Nothing can be written anywhere, and that does not end by itself.
    pub(crate) fn all_failed(&self) -> bool {
        self.tiers.iter().all(|tier| tier.failed().is_some())
    }

    /// Why a tier takes no writes, if one does not.
    pub(crate) fn latched(&self) -> Option<IoError> {
        self.tiers.iter().find_map(|tier| tier.latch.as_ref()).map(Latch::error)
    }

    pub(crate) fn state(&self, tier: TierId) -> TierState {
        let Tier { latch, silence, .. } = self.get(tier);
        match latch.as_ref().map(|latch| latch.error().kind) {
            _ if silence.told => TierState::Unreachable,
            None => TierState::Working,
            Some(IoErrorKind::Full) => TierState::Full,
            Some(IoErrorKind::Unreachable) => TierState::Unreachable,
            Some(_) => TierState::Latched,
        }
    }

    /// Ticks for which somebody has waited for the tier, if that has been told.
    pub(crate) fn silent_ticks(&self, tier: TierId) -> u64 {
        let silence = &self.get(tier).silence;
        if silence.told { silence.unread.max(silence.unwritten) } else { 0 }
    }

    pub(crate) fn wrote(&mut self, tier: TierId) {
        self.get_mut(tier).writes += 1;
    }

    /// It has given so many pages, this one among them.
    pub(crate) fn gave(&mut self, tier: TierId, pages: u64, one: PageNo) {
        let tier = self.get_mut(tier);
        tier.good += pages;
        tier.gave_last = Some(one);
    }
}
