//! Trouble at the end of a run that chance would hardly ever make: a drop that does not end while all frames wait behind it, and a page
//! that cannot be read where no other is stored.

use super::Sim;
use super::coverage::Fault;
use super::disk::Trouble;
use super::guest::{self, Access};
use super::operator::Asked;
use crate::core::Request;
use crate::table::PageState;
use crate::units::{PageNo, Run, TierId};

/// Pages given back: more than the smallest budget has frames.
const DROPPED: usize = 100;
/// Of one VM in so many each.
const TIMES: u64 = 4;

impl Sim {
    pub(super) fn make_trouble(&mut self) {
        let apart = &mut super::Random::new(self.seed.rotate_left(16));
        if apart.one_in(TIMES) && !self.disk.keeps_all {
            self.hang_a_drop();
        }
        if apart.one_in(TIMES) {
            self.break_the_only_page();
        }
    }

    /// The guest gives memory back and takes it again, while the tier does not end the drop of its places: all frames fill up with what
    /// waits to be written there. That is told, and when the drop ends, all goes on.
    fn hang_a_drop(&mut self) {
        self.guest.vcpus = [None; guest::VCPUS];
        // Of one block, so that it is one drop.
        let last = self.memory[self.memory.len() - 1].block();
        let of = |block: usize| self.memory.iter().copied().filter(move |page| page.block() == block);
        let block = (0..=last).max_by_key(|block| of(*block).count()).expect("there is memory");
        let pages: Vec<_> = of(block).take(DROPPED).collect();
        let run = Run::new(pages[0], pages.len() as u32);
        let tier = self.core.table().home(block);
        // What is damaged there is not to be read for that.
        self.given_back(run);
        self.settle();
        pages.iter().for_each(|page| assert!(self.serve(*page), "no frame for {page}"));
        self.ask(Request::Evict(run), Asked::Other);
        self.settle();
        self.set_trouble(tier, Trouble::Drops, u64::MAX);
        self.given_back(run);
        while !self.disk.is_dropping() {
            assert!(self.core.has_dead_places(), "nothing is dropped of {run:?}");
            self.go_on();
        }
        let frames = self.core.budget_frames() as usize;
        let told = |sim: &Sim| sim.oracle.silent[tier.index()].1;
        let served = pages.iter().take_while(|page| self.serve_unless(**page, told)).count();
        self.trace.note("pages served while a drop did not end", served as u64);
        assert!(served < pages.len() || served <= frames, "{served} pages in {frames} frames");
        self.settle();
        self.check();
    }

    /// The only page that the tier has cannot be read. It is lost, for the tier gives what is written to it for that.
    fn break_the_only_page(&mut self) {
        self.guest.vcpus = [None; guest::VCPUS];
        let all = Run::new(PageNo(0), self.pages as u32);
        self.given_back(all);
        self.settle();
        let page = self.memory[self.random.below(self.memory.len() as u64) as usize];
        let tier = self.core.table().home(page.block());
        let of_tier = |other: &PageNo| self.core.table().home(other.block()) == tier;
        let others: Vec<_> = self.memory.iter().copied().filter(of_tier).take(16).collect();
        others.into_iter().chain([page]).for_each(|page| assert!(self.serve(page), "no frame for {page}"));
        self.ask(Request::Evict(Run::one(page)), Asked::Other);
        self.settle();
        if self.core.table().state(page) != PageState::Stored {
            return;
        }
        self.disk.damage[page.index()] = Some(Fault::BadSector);
        self.coverage.injected(Fault::BadSector);
        self.changed = true;
        self.access(0, page, Access::Read);
        self.settle();
        assert_eq!(
            self.core.table().state(page),
            PageState::Poisoned,
            "nobody could tell that {page} is lost"
        );
    }

    /// A tier has said that it answers again. Then it has done something, or nobody waits any more for what it did not give.
    pub(super) fn check_answers(&self, tier: TierId) {
        let waits = |page: &PageNo| self.core.table().stored_at(*page) == tier && self.core.is_unread(*page);
        let waited_for = self.guest.vcpus.iter().flatten().map(|(page, _)| *page).find(waits);
        if let Some(page) = waited_for.filter(|_| !self.disk.answered[tier.index()]) {
            self.trace.suspect.set(Some(page));
            panic!("{tier} is said to answer, and has given nothing");
        }
    }
}
