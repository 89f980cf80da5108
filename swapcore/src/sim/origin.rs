//! The simulated origin: pages that are there at the start, or are said to be later on, and who wants them elsewhere.
//! It reads as the other tiers do, is damaged as they are, and is never written.

use super::Sim;
use super::disk::Trouble;
use super::guest;
use super::operator::Asked;
use crate::api::Adopted;
use crate::core::{Request, Response};
use crate::errno;
use crate::error::CommandError;
use crate::table::{Flag, PageState};
use crate::units::{PageNo, Run, TierId, bytes_of};

/// Requests within which all pages that can be read are at home, once nothing goes wrong any more.
const TAKINGS_MAX: u32 = 200;

impl Sim {
    /// The VM begins with a part of its pages at the origin, some of them lost there, and the others zeros.
    pub(super) fn begin_at_origin(&mut self) {
        for page in (0..self.pages).map(PageNo) {
            let place = self.disk.place(TierId::ORIGIN, page);
            self.disk.content[place] = self.guest.new_value();
        }
        let longest = 1 + self.random.below(self.pages);
        let mut next = 0;
        while next < self.pages {
            let len = (1 + self.random.below(longest)).min(self.pages - next);
            let run = self.in_memory(Run::new(PageNo(next), len as u32));
            match self.random.below(8) {
                0 | 1 => {}
                2 => self.adopt_poisoned(run.part(0, run.len.min(3))),
                _ => self.adopt(run),
            }
            next += len;
        }
    }

    fn may_adopt(&self, run: Run) -> bool {
        self.session.is_none() && self.core.table().may_adopt(run)
    }

    /// What the origin has of the pages never changes: it is the same however often they are said to be there.
    fn adopt(&mut self, run: Run) {
        let may = self.may_adopt(run);
        self.trace.add(if may { "is at the origin" } else { "cannot be at the origin" }, run, None, None);
        let (sums, values): (Vec<_>, Vec<_>) = run
            .pages()
            .map(|page| self.disk.content[self.disk.place(TierId::ORIGIN, page)])
            .zip(run.pages())
            .map(|(value, page)| (super::sum_of(page, value), value))
            .unzip();
        if may {
            let truth = &mut self.oracle.truth[run.indices()];
            truth.iter_mut().zip(values).for_each(|(truth, value)| *truth = Some(value));
        }
        self.ask(Request::Adopt(Adopted { run, sums }), Asked::Adopt(may));
    }

    fn adopt_poisoned(&mut self, run: Run) {
        let may = self.may_adopt(run);
        self.trace.add(if may { "is lost at the origin" } else { "cannot be lost" }, run, None, None);
        if may {
            self.oracle.truth[run.indices()].fill(None);
        }
        self.ask(Request::AdoptPoisoned(run), Asked::Adopt(may));
    }

    /// Somebody wants pages in the guest, or at home; or says that more are at the origin.
    pub(super) fn operate_origin(&mut self) {
        match self.random.below(8) {
            0 => {
                let run = self.random_run(8);
                let run = self.in_memory(run);
                // Damage of the origin has no end, and its content would not be what it was.
                let damaged =
                    |page: PageNo| self.disk.damage[self.disk.place(TierId::ORIGIN, page)].is_some();
                match self.random.one_in(8) {
                    true => self.adopt_poisoned(run),
                    false if run.pages().any(damaged) => {}
                    false => self.adopt(run),
                }
            }
            1..5 => {
                let run = self.random_run(self.pages);
                self.trace.add("fetch", run, None, None);
                self.ask(Request::FetchOrigin(run), Asked::Fetch);
            }
            _ => {
                let most = if self.random.one_in(4) { self.pages } else { 40 };
                let pages = 1 + self.random.below(most);
                self.take_home(pages as u32);
            }
        }
    }

    fn take_home(&mut self, pages: u32) {
        self.trace.note("take home", u64::from(pages));
        self.ask(Request::TakeHome(pages), Asked::TakeHome);
    }

    pub(super) fn answered_of_origin(&self, asked: &Asked, answer: Result<Response, CommandError>) {
        match (asked, answer) {
            (Asked::Adopt(true), Ok(Response::Done)) => {}
            (Asked::Adopt(false), Err(CommandError::NotNow(_))) => {}
            (Asked::Fetch, Ok(Response::Count(count))) => assert!(count <= self.pages),
            (Asked::TakeHome, Ok(Response::Count(count))) => {
                let table = self.core.table();
                let at_origin = |page: &PageNo| table.has(*page, Flag::Origin);
                let found = self.memory.iter().filter(|page| at_origin(page)).count() as u64;
                assert_eq!(count, found, "pages said to be at the origin still");
                let under_way = |page: &PageNo| {
                    at_origin(page)
                        && table.state(*page) == PageState::Leaving
                        && table.has(*page, Flag::Writing)
                };
                let early = self.memory.iter().copied().find(under_way);
                self.trace.suspect.set(early);
                assert!(early.is_none(), "{early:?} is said to have been taken home, and is being written");
            }
            (Asked::TakeHome, Err(CommandError::Store(_))) => {}
            (asked, answer) => panic!("{asked:?} was answered with {answer:?}"),
        }
    }

    /// Either the origin is away for good, and every page that is not there is served; or all of it is taken home, but
    /// for what cannot be read.
    pub(super) fn end_at_origin(&mut self) {
        self.guest.vcpus = [None; guest::VCPUS];
        match self.random.below(3) {
            0 => self.lose_the_origin(),
            1 => self.take_all_home(),
            _ => {}
        }
    }

    fn lose_the_origin(&mut self) {
        self.ask(Request::SetBudget(bytes_of(self.pages / 2 + 64)), Asked::Other);
        let trouble = if self.random.one_in(2) { Trouble::Silence } else { Trouble::Outage(errno::EIO) };
        self.set_trouble(TierId::ORIGIN, trouble, u64::MAX);
        let elsewhere = |page: &PageNo| self.core.table().stored_at(*page) != TierId::ORIGIN;
        let good: Vec<_> = self.memory.iter().copied().filter(elsewhere).collect();
        self.take_home(40);
        for page in good {
            assert!(self.serve(page), "no frame for {page}");
        }
        self.settle();
        self.check();
    }

    fn take_all_home(&mut self) {
        for _ in 0..TAKINGS_MAX {
            if self.core.table().origin_pages() == 0 {
                return;
            }
            self.take_home(self.pages as u32);
            self.settle();
        }
        let damaged = |page: PageNo| self.disk.damage[self.stored_place(page)].is_some();
        let stays = |page: &PageNo| self.core.table().has(*page, Flag::Origin) && !damaged(*page);
        let stays = self.memory.iter().copied().find(stays);
        self.trace.suspect.set(stays);
        assert!(stays.is_none(), "{stays:?} is not taken home");
        self.check();
    }
}
