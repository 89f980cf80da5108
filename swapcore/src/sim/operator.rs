//! Everybody but the guest who asks the engine for something: an operator, a balloon, a migration that reads.

use super::Sim;
use super::coverage::Outcome;
use super::oracle::Held;
use super::random::Random;
use crate::core::{Event, Request, Response, Ticket};
use crate::error::CommandError;
use crate::table::PageState;
use crate::units::{BLOCK_PAGES, PageNo, Run, SlotRun, bytes_of};

/// Held runs at a time.
const HOLDS_MAX: usize = 3;

/// A request that waits for its answer.
#[derive(Clone, Debug)]
pub(super) enum Asked {
    Hold(Run),
    Discard(Run),
    Subscribe(usize, Vec<Run>),
    Track(usize, Vec<Run>),
    Collect(usize),
    Budget,
    /// Frames for a session; `gone`: it has ended before they come.
    Frames {
        gone: bool,
    },
    Arrive {
        run: Run,
        slots: SlotRun,
        values: Vec<u64>,
    },
    Settle,
    Finish,
    /// Whether it can be.
    Adopt(bool),
    Fetch,
    TakeHome,
    Other,
}

impl Sim {
    pub(super) fn ask(&mut self, request: Request, asked: Asked) {
        self.next_ticket += 1;
        self.asked.push((Ticket(self.next_ticket), asked));
        self.event(Event::Request { ticket: Ticket(self.next_ticket), request });
    }

    /// Anywhere, or where something is going on.
    pub(super) fn random_run(&mut self, longest: u64) -> Run {
        let flights = &self.disk.flights;
        let start = match self.random.below(3) {
            0 if !flights.is_empty() => {
                let run = flights[self.random.below(flights.len() as u64) as usize].run;
                run.start.0 + self.random.below(u64::from(run.len))
            }
            1 => {
                let vcpu = self.random.below(self.guest.vcpus.len() as u64) as usize;
                self.guest.vcpus[vcpu].map_or(0, |(page, _)| page.0.saturating_sub(self.random.below(4)))
            }
            _ => self.random.below(self.pages),
        };
        let len = 1 + self.random.below(longest.min(self.pages - start));
        Run::new(PageNo(start), len as u32)
    }

    /// Without what is nobody's; elsewhere, if all of it is.
    pub(super) fn in_memory(&self, run: Run) -> Run {
        let table = self.core.table();
        let start = match table.first_of_nobody(Run::one(run.start)) {
            None => run.start,
            Some(page) => self.memory[page.index() % self.memory.len()],
        };
        let run = Run::new(start, run.len.min((self.pages - start.0) as u32));
        table.first_of_nobody(run).map_or(run, |page| run.part(0, (page.0 - start.0) as u32))
    }

    pub(super) fn operate(&mut self) {
        if self.has_origin && self.random.one_in(3) {
            return self.operate_origin();
        }
        match self.random.below(12) {
            0 => self.change_budget(),
            1 | 2 => self.give_back(),
            3 => self.hold(),
            4 => self.release(),
            5 => self.track(),
            // It is about to be moved away, and stays: its pages are put together again, as they rarely are otherwise.
            6..9 if self.calm => self.track(),
            6 | 7 => {
                let longest = if self.random.one_in(8) { self.pages } else { 40 };
                let run = self.random_run(longest);
                self.trace.add("evict", run, None, None);
                self.ask(Request::Evict(run), Asked::Other);
            }
            8 => self.repair(),
            9 => {
                let run = self.random_run(64);
                let run = self.in_memory(run);
                self.ask(Request::Fill(run), Asked::Other);
            }
            10 => {
                let on = self.random.one_in(2);
                self.ask(Request::Prefetch(on), Asked::Other);
            }
            _ => self.look(),
        }
    }

    pub(super) fn change_budget(&mut self) {
        let most = if self.random.one_in(6) { self.pages } else { self.pages / 2 };
        let frames =
            super::BUDGET_MIN + self.random.below(most.max(super::BUDGET_MIN + 1) - super::BUDGET_MIN);
        let frames = if self.random.one_in(6) { self.pages } else { frames };
        self.trace.note("budget", frames);
        self.ask(Request::SetBudget(bytes_of(frames)), Asked::Budget);
    }

    /// What the guest gives back reads as zeros from the answer on.
    fn give_back(&mut self) {
        // Now and then so much that it takes several steps.
        let longest = if self.random.one_in(6) { self.pages } else { 20 };
        let mut run = self.random_run(longest);
        if self.random.one_in(4) {
            run = self.sampled_run(run);
        }
        self.given_back(run);
    }

    pub(super) fn given_back(&mut self, run: Run) {
        let part = self.core.discard_part(run);
        self.dropped(part);
        let asked = if part.len < run.len { Asked::Discard(run) } else { Asked::Other };
        if part.len < run.len {
            self.oracle.discards.push((Ticket(self.next_ticket + 1), part.end(), run.end()));
        }
        self.ask(Request::Discard(run), asked);
    }

    /// The core is about to drop what the guest has given back.
    pub(super) fn dropped(&mut self, run: Run) {
        self.trace.add("given back", run, None, None);
        for page in run.pages() {
            self.oracle.truth[page.index()] = Some(0);
            self.oracle.written(page);
            let damaged = self.disk.damage[self.stored_place(page)].is_some();
            self.abandon(page, Outcome::GivenBack);
            self.oracle.is_given_back(page, damaged);
        }
    }

    /// The core is about to take the next step of a discard, as it says.
    pub(super) fn step_discard(&mut self) {
        let Some((ticket, part)) = self.core.next_discard() else { return };
        self.dropped(part);
        let mut discards = self.oracle.discards.iter_mut();
        let found = discards.find(|(of, next, _)| (*of, *next) == (ticket, part.start));
        found.unwrap_or_else(|| panic!("{part:?} is dropped, and nobody has given it back")).1 = part.end();
    }

    /// Where a sample is out, if one is.
    fn sampled_run(&self, run: Run) -> Run {
        let table = self.core.table();
        let sampled = |page: &PageNo| table.state(*page) == PageState::Sampled;
        let start = (run.start.0..self.pages).map(PageNo).find(sampled).unwrap_or(run.start);
        Run::new(start, run.len.min((self.pages - start.0) as u32))
    }

    fn hold(&mut self) {
        let run = self.random_run(30);
        let free = |held: &Held| held.run.end() <= run.start || run.end() <= held.run.start;
        if self.oracle.held.len() < HOLDS_MAX && self.oracle.held.iter().all(free) {
            self.trace.add("hold", run, None, None);
            self.ask(Request::Hold(run), Asked::Hold(run));
            self.copy(run);
        }
    }

    pub(super) fn release(&mut self) {
        if let Some(held) = self.oracle.held.pop() {
            self.trace.add("release", held.run, None, None);
            self.copy(held.run);
            self.ask(Request::Release(held.run), Asked::Other);
        }
    }

    /// What is copied is looked at when it is.
    fn copy(&mut self, run: Run) {
        self.ask(Request::Staged(run.pages().collect()), Asked::Other);
    }

    /// All of memory, or parts of it, or none. With chances of its own: the story is the same, whatever is tracked.
    fn runs_to_track(&mut self) -> Vec<Run> {
        let (pages, random) = (self.pages, &mut self.tracking);
        let run = |random: &mut Random| {
            let start = random.below(pages);
            Run::new(PageNo(start), 1 + random.below(pages - start) as u32)
        };
        match random.below(3) {
            _ if self.calm => vec![Run::new(PageNo(0), pages as u32)],
            0 => vec![Run::new(PageNo(0), pages as u32)],
            _ => (0..random.below(3)).map(|_| run(random)).collect(),
        }
    }

    /// One of the subscribers begins, has more tracked, collects or ends.
    fn track(&mut self) {
        let nth = usize::from(self.random.one_in(4));
        let subscriber = &mut self.oracle.subscribers[nth];
        let id = subscriber.id;
        if std::mem::replace(&mut subscriber.asked, true) {
            return;
        }
        match id {
            None => {
                let runs = self.runs_to_track();
                self.trace.note("subscribes to dirty pages", nth as u64);
                self.ask(Request::SubscribeDirty(runs.clone()), Asked::Subscribe(nth, runs));
            }
            Some(id) if !self.calm && self.tracking.one_in(4) => {
                let runs = self.runs_to_track();
                self.trace.note("has more tracked", nth as u64);
                self.ask(Request::TrackDirty(id, runs.clone()), Asked::Track(nth, runs));
            }
            Some(id) if !self.random.one_in(if self.calm { 2 } else { 4 }) => {
                let subscriber = &mut self.oracle.subscribers[nth];
                let due = subscriber.written.iter().zip(&mut subscriber.to_tell);
                due.for_each(|(written, to_tell)| *to_tell |= written);
                self.ask(Request::CollectDirty(id), Asked::Collect(nth));
            }
            Some(id) => {
                let subscriber = &mut self.oracle.subscribers[nth];
                (subscriber.id, subscriber.asked) = (None, false);
                subscriber.tracked.fill(false);
                self.trace.note("unsubscribes", nth as u64);
                self.ask(Request::UnsubscribeDirty(id), Asked::Other);
            }
        }
    }

    /// The store is tried again, with its trouble mended or not.
    pub(super) fn repair(&mut self) {
        if self.random.one_in(2) {
            self.disk.bad_writes = None;
            self.disk.room += self.random.below(self.pages);
        }
        self.ask(Request::RetryStore, Asked::Other);
    }

    fn look(&mut self) {
        match self.random.below(4) {
            0 => self.ask(Request::ResidentMap, Asked::Other),
            1 => self.ask(Request::Heat, Asked::Other),
            2 => {
                let run = self.random_run(8);
                self.ask(Request::Sums(run), Asked::Other);
            }
            _ => self.ask(Request::Stats, Asked::Other),
        }
    }

    pub(super) fn answered(&mut self, ticket: Ticket, answer: Result<Response, CommandError>) {
        let nth = self.asked.iter().position(|(asked, _)| *asked == ticket);
        let Some(nth) = nth else { panic!("{ticket:?} is answered twice: {answer:?}") };
        let (_, asked) = self.asked.swap_remove(nth);
        match (asked.clone(), answer) {
            (Asked::Hold(run), Ok(Response::Pieces(pieces))) => {
                let told = pieces
                    .iter()
                    .flat_map(|piece| piece.run.pages().map(|page| (page, piece.place, piece.tier)));
                let pages = told
                    .map(|(page, place, tier)| Some((place, tier, self.oracle.truth[page.index()])))
                    .collect();
                self.oracle.held.push(Held { run, pages });
            }
            (Asked::Subscribe(nth, runs), Ok(Response::Subscribed(id))) => {
                let subscriber = &mut self.oracle.subscribers[nth];
                subscriber.id = Some(id);
                subscriber.written.fill(false);
                subscriber.to_tell.fill(false);
                self.tracked(nth, &runs);
            }
            (Asked::Track(nth, runs), Ok(Response::Done)) => self.tracked(nth, &runs),
            (Asked::Collect(nth), Ok(Response::Dirty(dirty))) => self.collected(nth, &dirty.into_runs()),
            (Asked::Discard(run), Ok(Response::Done)) => {
                let done = (ticket, run.end(), run.end());
                let nth = self.oracle.discards.iter().position(|discard| *discard == done);
                let nth = nth.unwrap_or_else(|| panic!("{run:?} is said to be dropped before all of it is"));
                self.oracle.discards.swap_remove(nth);
            }
            (Asked::Budget, Ok(Response::Done)) => {
                let (taken, budget) = (self.core.frames_taken(), self.core.budget_frames());
                assert!(taken <= budget, "{taken} frames when the budget of {budget} is confirmed");
            }
            (Asked::Budget, Err(CommandError::Store(_))) => {
                let (taken, budget) = (self.core.frames_taken(), self.core.budget_frames());
                assert!(taken > budget, "{taken} frames are within the budget of {budget}, which is refused");
            }
            (Asked::Budget, Err(CommandError::StillAbove { held, .. })) => {
                let (taken, budget) = (self.core.frames_taken(), self.core.budget_frames());
                assert!(
                    taken > budget && held == bytes_of(taken),
                    "{held} bytes are said to be above {budget}"
                );
            }
            (Asked::Other, Err(CommandError::Pinned { pages })) => assert!(pages > 0, "held by nothing"),
            (Asked::Frames { gone }, Ok(Response::Frames(slots))) => self.granted(slots, gone),
            (Asked::Arrive { run, slots, values }, answer) => self.arrived(run, slots, &values, answer),
            (Asked::Settle, answer) => self.settled(&answer),
            (Asked::Finish, answer) => self.finished(answer),
            (Asked::Adopt(_) | Asked::Fetch | Asked::TakeHome, answer) => {
                self.answered_of_origin(&asked, answer)
            }
            (Asked::Frames { .. }, Err(CommandError::Store(_))) => self.not_granted(),
            (Asked::Other, Err(CommandError::Store(_) | CommandError::NotNow(_))) | (Asked::Other, Ok(_)) => {
            }
            (Asked::Budget, Err(CommandError::NotNow(_))) if self.session.is_some() => {}
            (asked, answer) => panic!("{asked:?} was answered with {answer:?}"),
        }
    }

    /// From now on the subscriber has to be told of writes to these blocks.
    fn tracked(&mut self, nth: usize, runs: &[Run]) {
        let subscriber = &mut self.oracle.subscribers[nth];
        subscriber.asked = false;
        for block in runs.iter().flat_map(|run| run.blocks()).map(|part| part.start.block()) {
            let first = PageNo::first_of(block).index();
            let pages = subscriber.tracked.iter_mut().skip(first).take(BLOCK_PAGES as usize);
            pages.for_each(|tracked| *tracked = true);
        }
    }

    fn collected(&mut self, nth: usize, runs: &[Run]) {
        let subscriber = &mut self.oracle.subscribers[nth];
        subscriber.asked = false;
        for page in runs.iter().flat_map(|run| run.pages()) {
            subscriber.to_tell[page.index()] = false;
        }
        if let Some(missed) = subscriber.to_tell.iter().position(|written| *written) {
            self.trace.suspect.set(Some(PageNo(missed as u64)));
            panic!("page {missed} was written and is not reported");
        }
    }
}
