//! What becomes of pages at the origin, action by action.

use std::collections::HashMap;

use super::tests::core;
use super::*;
use crate::api::Adopted;
use crate::core::state::ios::Landing;
use crate::errno;
use crate::table::Flag;
use crate::units::{bytes_of, pages_in};

/// A VM whose pages have their numbers for content, until they are given another one.
struct Vm {
    core: Core,
    content: HashMap<PageNo, u64>,
    /// I/O to be done, in order, and what was answered.
    todo: Vec<Action>,
    answers: Vec<Result<Response, CommandError>>,
}

fn vm() -> Vm {
    let (core, content) = (core().with_origin(), HashMap::new());
    let mut vm = Vm { core, content, todo: Vec::new(), answers: Vec::new() };
    vm.ask(Request::Prefetch(false));
    vm
}

/// The first so many pages are at the origin.
fn adopted(pages: u32) -> Vm {
    let mut vm = vm();
    assert_done(vm.ask(adopt(Run::new(PageNo(0), pages))));
    vm
}

fn adopt(run: Run) -> Request {
    Request::Adopt(Adopted { run, sums: run.pages().map(|page| page.0).collect() })
}

fn assert_done(answer: Option<Result<Response, CommandError>>) {
    assert!(matches!(answer, Some(Ok(Response::Done))), "{answer:?}");
}

fn failed(tier: TierId, write: bool, errno: i32) -> IoError {
    IoError { tier, write, kind: IoErrorKind::of(&std::io::Error::from_raw_os_error(errno)) }
}

impl Vm {
    fn hand(&mut self, event: Event<'_>) {
        self.core.handle(event);
        self.perform();
        self.core.make_ready();
        self.perform();
    }

    fn perform(&mut self) {
        while let Some(action) = self.core.next_action() {
            match action {
                Action::MoveIn { run, slots } => {
                    self.core.handle(Event::MovedIn { run, slots, moved: run.len });
                }
                Action::CopyIn { page, slot } => {
                    self.core.handle(Event::CopiedIn { page, slot, copied: true });
                }
                Action::MoveOut { run, slots, .. } => {
                    let sum = |page| *self.content.get(&page).unwrap_or(&page.0);
                    let out: Vec<_> =
                        run.pages().map(|page| PageOut::Moved { sum: sum(page), zero: false }).collect();
                    self.core.handle(Event::MovedOut { run, slots, pages: &out });
                }
                Action::Answer { answer, .. } => self.answers.push(answer),
                Action::Read { .. } | Action::Write { .. } | Action::Drop { .. } => self.todo.push(action),
                _ => {}
            }
        }
        self.core.check();
    }

    /// Returns the answer, if it comes at once.
    fn ask(&mut self, request: Request) -> Option<Result<Response, CommandError>> {
        self.hand(Event::Request { ticket: Ticket(1), request });
        self.answers.pop()
    }

    fn count(&mut self) -> Option<u64> {
        match self.answers.pop() {
            Some(Ok(Response::Count(count))) => Some(count),
            None => None,
            other => panic!("{other:?} instead of a count"),
        }
    }

    fn tick(&mut self) {
        self.hand(Event::Tick { ticks: 1 });
    }

    /// What is to be done next: a letter, the tier, and the run.
    fn next(&self) -> (char, TierId, Run) {
        match self.todo[0] {
            Action::Read { tier, run, .. } => ('r', tier, run),
            Action::Write { tier, run, .. } => ('w', tier, run),
            Action::Drop { tier, run, .. } => ('d', tier, run),
            ref other => panic!("{other:?}"),
        }
    }

    /// It is done, or fails.
    fn end(&mut self, errno: Option<i32>) {
        match self.todo.remove(0) {
            Action::Read { io, tier, run, .. } => {
                let sums: Vec<_> =
                    run.pages().map(|page| *self.content.get(&page).unwrap_or(&page.0)).collect();
                let result = errno.map_or(Ok(&sums[..]), |errno| Err(failed(tier, false, errno)));
                self.hand(Event::ReadDone { io, result });
            }
            Action::Write { io, tier, .. } => {
                let result = errno.map_or(Ok(()), |errno| Err(failed(tier, true, errno)));
                self.hand(Event::WriteDone { io, result });
            }
            Action::Drop { io, .. } => {
                self.hand(Event::DropDone { io, result: DropResult::Done, took_us: 1 });
            }
            other => panic!("{other:?}"),
        }
    }

    fn end_all(&mut self) {
        while !self.todo.is_empty() {
            self.end(None);
        }
    }

    /// In the guest, as it was.
    fn touch(&mut self, page: PageNo) {
        match self.core.table.state(page) {
            // No others beside it.
            PageState::Untouched => assert_done(self.ask(Request::Fill(Run::one(page)))),
            _ => self.hand(Event::Fault(page)),
        }
        self.end_all();
        assert_eq!(self.core.table.state(page), PageState::Resident);
    }

    /// Out of the guest, and its frame is taken for another page.
    fn evict(&mut self, page: PageNo) {
        self.ask(Request::Evict(Run::one(page)));
        self.tick();
        self.end_all();
        self.ask(Request::Evict(Run::one(page)));
        assert_eq!(self.core.table.state(page), PageState::Stored);
    }

    /// Out of the guest, and within reach.
    fn leaves_for_standby(&mut self, page: PageNo) {
        self.core.start_out(Run::one(page), PageState::Leaving);
        self.perform();
        assert_eq!(self.core.table.state(page), PageState::Standby);
    }

    fn has(&self, page: PageNo) -> (PageState, TierId) {
        assert!(self.core.table.has(page, Flag::InStore), "nothing is stored of {page}");
        (self.core.table.state(page), self.core.table.stored_at(page))
    }
}

const PAGE: PageNo = PageNo(7);
const AT_ORIGIN: (PageState, TierId) = (PageState::Stored, TierId::ORIGIN);
const AT_HOME: (PageState, TierId) = (PageState::Stored, TierId::STORE);

#[test]
fn a_page_that_was_not_changed_is_at_the_origin_again_without_a_write() {
    let mut vm = adopted(16);
    assert_eq!((vm.has(PAGE), vm.core.stats().origin_bytes), (AT_ORIGIN, bytes_of(16)));
    vm.hand(Event::Fault(PAGE));
    assert_eq!(vm.next(), ('r', TierId::ORIGIN, Run::one(PAGE)));
    vm.end_all();
    vm.ask(Request::Evict(Run::one(PAGE)));
    vm.tick();
    assert!(vm.todo.is_empty(), "{:?}", vm.todo);
    vm.ask(Request::Evict(Run::one(PAGE)));
    assert_eq!((vm.has(PAGE), vm.core.stats().store.used_bytes), (AT_ORIGIN, 0));
}

#[test]
fn a_page_that_was_changed_goes_home_and_its_old_content_is_never_read_again() {
    let mut vm = adopted(16);
    vm.touch(PAGE);
    vm.content.insert(PAGE, 1000);
    vm.ask(Request::Evict(Run::one(PAGE)));
    assert!(!vm.core.table.has(PAGE, Flag::Origin), "what the origin has is old");
    vm.tick();
    assert_eq!(vm.next(), ('w', TierId::STORE, Run::one(PAGE)));
    vm.end(Some(errno::EIO));
    assert_eq!(vm.core.table.state(PAGE), PageState::Leaving, "its frame is all there is");
    vm.ask(Request::RetryStore);
    vm.end_all();
    vm.ask(Request::Evict(Run::one(PAGE)));
    assert_eq!((vm.has(PAGE), vm.core.stats().origin_bytes), (AT_HOME, bytes_of(15)));
    vm.hand(Event::Fault(PAGE));
    assert_eq!(vm.next().1, TierId::STORE);
}

#[test]
fn only_untouched_pages_are_adopted_and_all_or_none() {
    let without = super::tests::ask(&mut core(), adopt(Run::one(PAGE)));
    let [Action::Answer { answer: Err(CommandError::NotNow(_)), .. }] = without[..] else {
        panic!("{without:?} without an origin")
    };
    let mut vm = vm();
    vm.touch(PAGE);
    let run = Run::new(PageNo(200), 16);
    let refused = |vm: &mut Vm, request| {
        let answer = vm.ask(request);
        assert!(matches!(answer, Some(Err(CommandError::NotNow(_)))), "{answer:?}");
        assert_eq!(vm.core.table.origin_pages(), 0);
    };
    refused(&mut vm, adopt(Run::new(PageNo(0), 256)));
    refused(&mut vm, Request::AdoptPoisoned(Run::one(PAGE)));
    assert_done(vm.ask(Request::AdoptPoisoned(run)));
    refused(&mut vm, adopt(run));
    assert_eq!(vm.core.stats().lost.len(), 1);
    // It is untouched, and its old content is being written: the end of that must not say that it is at home.
    vm.ask(Request::Evict(Run::one(PAGE)));
    vm.tick();
    assert_eq!(vm.next().0, 'w');
    vm.ask(Request::Discard(Run::one(PAGE)));
    refused(&mut vm, adopt(Run::one(PAGE)));
    vm.end_all();
    assert_done(vm.ask(adopt(Run::one(PAGE))));
    assert_eq!(vm.has(PAGE), AT_ORIGIN);
}

#[test]
fn a_page_given_back_is_at_the_origin_no_more_and_nothing_is_dropped_for_it() {
    let mut vm = adopted(16);
    vm.touch(PageNo(0));
    vm.hand(Event::Fault(PageNo(1)));
    vm.ask(Request::Discard(Run::new(PageNo(0), 16)));
    vm.end_all();
    (0..20).for_each(|_| vm.tick());
    assert!(vm.todo.is_empty() && !vm.core.has_dead_places(), "{:?}", vm.todo);
    assert_eq!((vm.core.table.origin_pages(), vm.core.table.count(PageState::Untouched)), (0, 256));
}

#[test]
fn a_read_is_cut_where_the_tier_changes() {
    let mut vm = vm();
    for page in (4..8).map(PageNo) {
        vm.touch(page);
        vm.evict(page);
    }
    assert_done(vm.ask(adopt(Run::new(PageNo(0), 4))));
    assert_done(vm.ask(adopt(Run::new(PageNo(8), 4))));
    let taken = vm.core.frames.take_fresh(12).unwrap();
    vm.core.read(Run::new(PageNo(0), 12), taken.slots, Landing::Staging);
    vm.perform();
    let mut reads = Vec::new();
    while !vm.todo.is_empty() {
        reads.push((vm.next().1, vm.next().2.len));
        vm.end(None);
    }
    assert_eq!(reads, [(TierId::ORIGIN, 4), (TierId::STORE, 4), (TierId::ORIGIN, 4)]);
}

#[test]
fn stored_pages_are_taken_home_in_runs_and_the_answer_comes_when_they_are_written() {
    let mut vm = adopted(24);
    assert!(vm.ask(Request::TakeHome(16)).is_none());
    assert_eq!(vm.next(), ('r', TierId::ORIGIN, Run::new(PageNo(0), 16)));
    vm.end(None);
    assert_eq!(vm.next(), ('w', TierId::STORE, Run::new(PageNo(0), 16)));
    assert_eq!(
        (vm.count(), vm.has(PAGE)),
        (None, (PageState::Leaving, TierId::ORIGIN)),
        "until it is written"
    );
    vm.end(None);
    assert_eq!((vm.count(), vm.has(PAGE)), (Some(8), AT_HOME));
    assert!(vm.ask(Request::TakeHome(100)).is_none());
    assert_eq!(vm.next().2, Run::new(PageNo(16), 8));
    vm.end_all();
    assert_eq!(vm.count(), Some(0));
    assert!(matches!(vm.ask(Request::TakeHome(100)), Some(Ok(Response::Count(0)))));
}

#[test]
fn what_could_not_be_written_home_is_at_the_origin_as_before_and_leaves_nothing_at_home() {
    let mut vm = adopted(8);
    vm.ask(Request::TakeHome(8));
    vm.end(None);
    let frames = vm.core.frames.at_hand();
    vm.end(Some(errno::EIO));
    assert_eq!((vm.has(PAGE), vm.core.frames.at_hand()), (AT_ORIGIN, frames + 8));
    assert_eq!(vm.count(), Some(8));
    let refused = vm.ask(Request::TakeHome(8));
    assert!(matches!(refused, Some(Err(CommandError::Store(_)))), "{refused:?}");
    // Of what the write has left, a mixture perhaps, nothing is of use.
    while vm.todo.is_empty() {
        vm.tick();
    }
    assert_eq!(vm.next(), ('d', TierId::STORE, Run::new(PageNo(0), 8)));
    vm.end_all();
    vm.ask(Request::RetryStore);
    vm.ask(Request::TakeHome(8));
    vm.end_all();
    assert_eq!((vm.count(), vm.has(PAGE)), (Some(0), AT_HOME));
}

#[test]
fn a_full_home_gives_up_nothing_that_is_at_the_origin() {
    let mut vm = adopted(8);
    vm.touch(PAGE);
    vm.core.latch_store(failed(TierId::STORE, true, errno::ENOSPC));
    vm.perform();
    assert_eq!(vm.has(PAGE), (PageState::Resident, TierId::ORIGIN));
    assert!(vm.todo.is_empty(), "{:?}", vm.todo);
}

#[test]
fn a_page_that_is_touched_on_its_way_home_gets_a_copy_and_is_at_home_behind_the_write() {
    let mut vm = adopted(8);
    vm.ask(Request::TakeHome(8));
    vm.end(None);
    vm.hand(Event::Fault(PAGE));
    assert_eq!(vm.has(PAGE), (PageState::Resident, TierId::ORIGIN));
    vm.ask(Request::Discard(Run::one(PageNo(3))));
    vm.end_all();
    assert_eq!((vm.count(), vm.has(PAGE)), (Some(0), (PageState::Resident, TierId::STORE)));
    assert!(!vm.core.table.has(PageNo(3), Flag::InStore));
    // The one that is read at that moment goes to the guest.
    let mut vm = adopted(8);
    vm.ask(Request::TakeHome(8));
    vm.hand(Event::Fault(PAGE));
    vm.end_all();
    assert_eq!(vm.has(PAGE), (PageState::Resident, TierId::ORIGIN));
    assert_eq!(vm.count(), Some(1));
    vm.ask(Request::TakeHome(8));
    assert!(vm.todo.is_empty() && !vm.core.table.has(PAGE, Flag::InStore), "it has all that is needed");
    assert_eq!(vm.core.table.origin_pages(), 0);
}

#[test]
fn what_waits_in_standby_is_written_home_from_there() {
    let mut vm = adopted(8);
    vm.touch(PAGE);
    vm.ask(Request::Discard(Run::new(PageNo(0), 7)));
    vm.leaves_for_standby(PAGE);
    vm.ask(Request::TakeHome(1));
    assert_eq!(vm.next(), ('w', TierId::STORE, Run::one(PAGE)));
    vm.end(Some(errno::EIO));
    assert_eq!((vm.count(), vm.has(PAGE)), (Some(1), AT_ORIGIN));
    vm.ask(Request::RetryStore);
    vm.touch(PAGE);
    vm.leaves_for_standby(PAGE);
    vm.ask(Request::TakeHome(1));
    vm.end(None);
    assert_eq!((vm.count(), vm.has(PAGE)), (Some(0), (PageState::Standby, TierId::STORE)));
}

#[test]
fn pages_are_fetched_as_long_as_frames_are_plentiful_and_the_answer_comes_with_them() {
    let mut vm = adopted(256);
    let mut fetched = 0;
    loop {
        let answer = vm.ask(Request::FetchOrigin(Run::new(PageNo(0), 256)));
        if let Some(answer) = answer {
            assert!(matches!(answer, Ok(Response::Count(0))), "{answer:?}");
            break;
        }
        assert_eq!(vm.next().1, TierId::ORIGIN);
        vm.end_all();
        fetched += vm.count().expect("they have come");
    }
    let goal = u64::from(vm.core.frames.marks().goal());
    assert_eq!((fetched, vm.core.frames.at_hand()), (vm.core.table.count(PageState::Resident), goal));
    assert_eq!(vm.core.counts.victims, 0, "none had to leave for that");
}

#[test]
fn several_fetches_are_under_way_at_once_and_less_of_them_while_somebody_waits() {
    let mut vm = vm();
    let config = CoreConfig { pages: 2048, budget_frames: 1024, slots: 2048, ..vm.core.config };
    vm.core = Core::new(config).with_origin();
    vm.ask(Request::Prefetch(false));
    assert_done(vm.ask(adopt(Run::new(PageNo(0), 512))));
    // Each a run of its own.
    for start in (0..128).step_by(16) {
        assert!(vm.ask(Request::FetchOrigin(Run::new(PageNo(start), 8))).is_none());
    }
    assert_eq!(vm.todo.len(), 8, "{:?}", vm.todo);
    vm.end_all();
    assert_eq!(vm.answers.drain(..).count(), 8);
    // Somebody waits, and what is asked for then comes all the same: two reads at a time.
    vm.hand(Event::Fault(PageNo(511)));
    let mut left = vm.todo.len();
    assert!(vm.ask(Request::FetchOrigin(Run::new(PageNo(128), 256))).is_none());
    assert_eq!(vm.todo.len() - left, 2, "{:?}", vm.todo);
    left = vm.todo.len();
    // The fault's read came first, and is kept waiting.
    vm.todo.rotate_left(1);
    vm.end(None);
    assert_eq!(vm.todo.len(), left, "the next one has begun: {:?}", vm.todo);
}

#[test]
fn empty_memory_is_passed_quickly() {
    let pages = pages_in(64 << 30);
    let mut vm = vm();
    vm.core =
        Core::new(CoreConfig { pages, budget_frames: 4096, slots: 2048, ..vm.core.config }).with_origin();
    let far = Run::new(PageNo(pages - 1000), 8);
    assert_done(vm.ask(adopt(far)));
    assert!(vm.ask(Request::FetchOrigin(Run::new(PageNo(0), pages as u32))).is_none());
    assert_eq!(vm.next().2, far, "in one step");
    vm.ask(Request::Discard(Run::one(far.start)));
    vm.end_all();
    assert_eq!(vm.count(), Some(7), "without the one that was given back meanwhile");
    vm.ask(Request::TakeHome(u32::MAX));
    assert_eq!(vm.count(), None, "no more than a step's share of what is in RAM");
}

#[test]
fn the_last_page_at_the_origin_is_lost_only_if_the_origin_gives_what_it_has_given_before() {
    for (knows, ends) in [(true, PageState::Poisoned), (false, PageState::Stored)] {
        let mut vm = adopted(8);
        if knows {
            vm.touch(PageNo(0));
            vm.content.insert(PageNo(0), 1000);
        }
        vm.ask(Request::Discard(Run::new(PageNo(1), 6)));
        if !knows {
            vm.ask(Request::Discard(Run::one(PageNo(0))));
        }
        vm.hand(Event::Fault(PAGE));
        for _ in 0..400 {
            while !vm.todo.is_empty() {
                let bad = vm.next() == ('r', TierId::ORIGIN, Run::one(PAGE));
                // The probe finds what the origin had.
                vm.content.remove(&PageNo(0));
                vm.end(bad.then_some(errno::EIO));
            }
            vm.tick();
        }
        assert_eq!(vm.core.table.state(PAGE), ends, "another page is known: {knows}");
        let state = vm.core.tier_state(TierId::ORIGIN);
        assert_eq!(state == TierState::Unreachable, !knows);
        assert_eq!(vm.core.tier_state(TierId::STORE), TierState::Working, "a tier of its own");
    }
}
