//! Runs that somebody wants out of RAM, and how far each has come.
//!
//! ```text
//!            ┌───────── a part of the run a step ─────────┐      all of it looked at, nothing left behind
//!   asked ─▶ looked at ──▶ no room to leave: it waits ────┘─────────────────────────────────────────────▶ answered
//!               ▲   for a tick, or a write that ends        │
//!               └── from the first page that is left behind ◀┘ it leaves still, or is pinned
//! ```

use std::collections::VecDeque;

use crate::core::event::Ticket;
use crate::units::{PageNo, Run};

#[derive(Debug)]
pub(crate) struct Eviction {
    ticket: Ticket,
    run: Run,
    /// The tick at which it was asked for.
    since: u64,
    /// Where the next look begins.
    next: PageNo,
    /// The first page of this pass that is not out, though it will be, or something holds it.
    behind: Option<PageNo>,
    /// Something holds pages of the run, or did during this pass.
    pinned: bool,
    /// Pages have been started on their way in this pass: there will be news of them at once.
    started: bool,
    /// There was no room for some in this pass: it starts no others.
    full: bool,
    /// Behind the last page that was ever started.
    furthest: PageNo,
    /// This pass only looks at what became of those that the last one started.
    looks_back: bool,
    due: bool,
}

/// How a look ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Look {
    /// There is more to be seen, now or later.
    Goes,
    /// Nothing of the run is on its way out any more.
    Done,
    /// The pass is over, and something holds pages of it.
    Held,
}

impl Eviction {
    pub(crate) fn ticket(&self) -> Ticket {
        self.ticket
    }

    pub(crate) fn run(&self) -> Run {
        self.run
    }

    pub(crate) fn since(&self) -> u64 {
        self.since
    }

    /// The next so many pages.
    pub(crate) fn part(&self, most: u64) -> Run {
        Run::new(self.next, (self.run.end().0 - self.next.0).min(most) as u32)
    }

    /// The page leaves, still or from now on.
    pub(crate) fn leaves(&mut self, page: PageNo) {
        let first = self.behind.map_or(page, |behind| behind.min(page));
        self.behind = Some(first);
    }

    /// The pages have been started on their way.
    pub(crate) fn started(&mut self, run: Run) {
        self.leaves(run.start);
        self.furthest = self.furthest.max(run.end());
        self.started = true;
    }

    pub(crate) fn is_pinned(&mut self, page: PageNo) {
        self.leaves(page);
        self.pinned = true;
    }

    /// There is no room for what is to leave from this page on. Room comes of pages that have left: for these the pass
    /// goes on as far as any was started, or their frames would be in the way for ever.
    pub(crate) fn stop(&mut self, page: PageNo) {
        self.leaves(page);
        self.full = true;
    }

    pub(crate) fn looks_back(&self) -> bool {
        self.looks_back
    }

    pub(crate) fn is_full(&self) -> bool {
        self.full
    }

    /// What of the run is before the page has been looked at.
    pub(crate) fn looked(&mut self, up_to: PageNo) -> Look {
        self.next = up_to;
        let full = self.full && up_to >= self.furthest;
        if up_to < self.run.end() && !full {
            return Look::Goes;
        }
        let Some(behind) = self.behind.take() else { return Look::Done };
        // What has just started has moved by the next look, or was refused: that is known until the next tick. The look
        // starts nothing, or a page could leave before the vCPU that waited for it has run.
        let looks_back = self.started && !self.full;
        (self.next, self.due, self.looks_back) = (behind, looks_back, looks_back);
        (self.started, self.full) = (false, false);
        if std::mem::take(&mut self.pinned) { Look::Held } else { Look::Goes }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Evictions(VecDeque<Eviction>);

impl Evictions {
    pub(crate) fn ask(&mut self, ticket: Ticket, run: Run, tick: u64) {
        self.0.push_back(Eviction {
            ticket,
            run,
            since: tick,
            next: run.start,
            behind: None,
            pinned: false,
            started: false,
            full: false,
            furthest: run.start,
            looks_back: false,
            due: true,
        });
    }

    pub(crate) fn any(&self) -> bool {
        !self.0.is_empty()
    }

    /// Something has happened that may let pages leave.
    pub(crate) fn wake(&mut self) {
        self.0.iter_mut().for_each(|eviction| (eviction.due, eviction.looks_back) = (true, false));
    }

    /// How many there is something to be looked at of.
    pub(crate) fn due(&self) -> usize {
        self.0.iter().filter(|eviction| eviction.due).count()
    }

    /// The next one to look at, in turn.
    pub(crate) fn take_due(&mut self) -> Option<Eviction> {
        let at = self.0.iter().position(|eviction| eviction.due)?;
        self.0.remove(at)
    }

    /// The page was to leave, and could not. At the next tick that is forgotten, and a pass may take longer.
    pub(crate) fn refused(&mut self, page: PageNo) {
        self.0
            .iter_mut()
            .filter(|eviction| eviction.run.contains(page))
            .for_each(|eviction| eviction.is_pinned(page));
    }

    /// It goes on.
    pub(crate) fn put(&mut self, eviction: Eviction) {
        self.0.push_back(eviction);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_done_when_a_pass_leaves_nothing_behind() {
        let mut evictions = Evictions::default();
        evictions.ask(Ticket(1), Run::new(PageNo(100), 250), 0);
        let mut eviction = evictions.take_due().unwrap();
        assert_eq!(eviction.part(100), Run::new(PageNo(100), 100));
        eviction.started(Run::new(PageNo(130), 20));
        assert_eq!(eviction.looked(PageNo(200)), Look::Goes);
        eviction.started(Run::new(PageNo(220), 50));
        eviction.stop(PageNo(240));
        assert_eq!(eviction.looked(PageNo(260)), Look::Goes);
        assert_eq!(eviction.part(10).start, PageNo(260), "on to the last that was started");
        assert_eq!(eviction.looked(PageNo(270)), Look::Goes);
        evictions.put(eviction);
        assert_eq!(evictions.due(), 0, "it waits for room");
        evictions.wake();
        let mut eviction = evictions.take_due().unwrap();
        assert_eq!(eviction.part(1000), Run::new(PageNo(130), 220), "from the first one left behind");
        eviction.started(Run::one(PageNo(240)));
        assert_eq!(eviction.looked(PageNo(350)), Look::Goes);
        assert_eq!((eviction.part(1000).start, eviction.due), (PageNo(240), true), "there is news at once");
        eviction.is_pinned(PageNo(240));
        assert_eq!((eviction.looked(PageNo(350)), eviction.due), (Look::Held, false));
        assert_eq!(eviction.looked(PageNo(350)), Look::Done);
    }
}
