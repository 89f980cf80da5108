//! Which pages have arrived, and what they were.

use swapd::{PageNo, Placed, Run};

use crate::bitmap::Bitmap;
use crate::link::error::SessionError;
use crate::outside::planted;
use crate::wire::control::Totals;

/// Of one session, for all its streams.
#[derive(Debug)]
pub(crate) struct Ledger {
    seen: Bitmap,
    zero: Bitmap,
    pages: u64,
}

/// Pages of a run that were all here before, or all not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SameHistory {
    pub(crate) run: Run,
    pub(crate) again: bool,
}

impl Ledger {
    pub(crate) fn new(pages: u64) -> Ledger {
        Ledger { seen: Bitmap::new(pages), zero: Bitmap::new(pages), pages }
    }

    pub(crate) fn seen(&self) -> u64 {
        self.seen.count()
    }

    /// The first stretch of `run`.
    pub(crate) fn stretch(&self, run: Run) -> SameHistory {
        let again = self.seen.get(run.start);
        let changes = |page: &PageNo| self.seen.get(*page) != again;
        let len = run.pages().find(changes).map_or(run.len, |page| (page.0 - run.start.0) as u32);
        SameHistory { run: run.part(0, len), again }
    }

    pub(crate) fn arrived(&mut self, run: Run) {
        self.seen.set_run(run);
        self.zero.clear_run(run);
    }

    pub(crate) fn arrived_zero(&mut self, run: Run) {
        self.seen.set_run(run);
        self.zero.set_run(run);
    }

    /// Whether this is all, by what the source says that it sent and by what arrived on all streams.
    pub(crate) fn check_complete(&self, theirs: Totals, ours: Totals) -> Result<(), SessionError> {
        if planted!(BelievesLostStreams) {
            return Ok(());
        }
        if theirs != ours {
            return Err(SessionError::Peer(format!("it sent {theirs:?}, but {ours:?} arrived")));
        }
        if !self.seen.is_full() {
            let missing = self.pages - self.seen.count();
            return Err(SessionError::Peer(format!(
                "it called the memory complete with {missing} pages missing"
            )));
        }
        Ok(())
    }

    /// For memory without an engine, where every page that is not zero is in RAM.
    pub(crate) fn placed_plain(&self) -> Placed {
        let pages_zero = self.zero.count();
        Placed { pages_ram: self.pages - pages_zero, pages_zero, ..Placed::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_end_where_the_past_differs() {
        let mut ledger = Ledger::new(512);
        ledger.arrived(Run::new(PageNo(10), 5));
        let stretch = |start, len| ledger.stretch(Run::new(PageNo(start), len));
        assert_eq!(stretch(8, 10), SameHistory { run: Run::new(PageNo(8), 2), again: false });
        assert_eq!(stretch(10, 10), SameHistory { run: Run::new(PageNo(10), 5), again: true });
        assert_eq!(stretch(15, 3), SameHistory { run: Run::new(PageNo(15), 3), again: false });
    }

    #[test]
    fn a_gap_or_a_lie_is_found() {
        let mut ledger = Ledger::new(512);
        let totals = Totals { pages: 512, ..Totals::default() };
        ledger.arrived(Run::new(PageNo(0), 511));
        assert!(ledger.check_complete(totals, totals).is_err());
        ledger.arrived_zero(Run::one(PageNo(511)));
        assert!(ledger.check_complete(totals, Totals::default()).is_err());
        assert!(ledger.check_complete(totals, totals).is_ok());
        assert_eq!(ledger.placed_plain().pages_zero, 1);
    }
}
