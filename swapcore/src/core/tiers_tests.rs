//! Tiers that are silent, fail, or refuse what they are given: what is told of them, and that each holds up its own
//! pages alone.

use super::tiers::{BROKEN_TICKS, PROBE_STRIDE, SILENT_TICKS};
use super::{Action, Core, CoreConfig, DropResult, Event, IoId, PageOut, Request, Ticket, WalkStep};
use crate::errno;
use crate::error::{IoError, IoErrorKind};
use crate::stats::TierState;
use crate::table::PageState;
use crate::units::{PageNo, Run, TierId};

/// Two blocks, each at a tier of its own.
fn core() -> Core {
    core_of(256)
}

/// The same with such a budget.
fn core_of(budget_frames: u64) -> Core {
    let config = CoreConfig {
        pages: 1024,
        budget_frames,
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
            Action::FillBlock { run } => core.handle(Event::Filled { run, huge: false }),
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

/// Somebody waits for the page while its tier gives what `gives` says, for so many ticks; returns what is told
/// meanwhile.
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
    let of_first = |error: &IoError| error.tier == TierId(0) && error.kind == BROKEN;
    let unreachable = |action: &&Action| matches!(action, Action::TierUnreachable(error) if of_first(error));
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

/// The store has two pages, far from each other and at an end of a large memory: the one is found for a probe of the
/// other.
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
    assert_eq!((core.table.state(PageNo(3)), core.table.count(PageState::Poisoned)), (PageState::Stored, 0));
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
    assert!(reachable && core.faults_waiting() == 0 && core.tier_state(TierId::STORE) == TierState::Working);
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

/// How the writes to a tier end. None: not at all.
type Ends = Option<Result<(), IoErrorKind>>;

/// Ends writes as it is said, reads well, and what follows from that. Returns what else there is to be done.
fn end_io(core: &mut Core, actions: Vec<Action>, ends: impl Fn(TierId) -> Ends) -> Vec<Action> {
    let (mut rest, mut todo) = (Vec::new(), actions);
    while !todo.is_empty() {
        for action in std::mem::take(&mut todo) {
            match action {
                Action::Write { io, tier, .. } if ends(tier).is_some() => {
                    let result = ends(tier).expect("just looked at");
                    let result = result.map_err(|kind| IoError { tier, write: true, kind });
                    todo.extend(hand(core, Event::WriteDone { io, result }));
                }
                Action::Read { io, run, .. } => {
                    let sums: Vec<_> = run.pages().map(|page| page.0).collect();
                    todo.extend(hand(core, Event::ReadDone { io, result: Ok(&sums) }));
                }
                other => rest.push(other),
            }
        }
    }
    rest
}

fn ask(core: &mut Core, request: Request) -> Vec<Action> {
    hand(core, Event::Request { ticket: Ticket(1), request })
}

/// What is on its way to a tier that stands still is no frame to come, and no more is sent there: the other tier's
/// pages leave.
#[test]
fn a_vm_goes_on_while_one_of_its_tiers_ends_no_write_or_fails_at_all_of_them() {
    let (good, bad) = (TierId(0), TierId(1));
    for fails in [false, true] {
        let mut core = core();
        let ends = |tier| if tier == good { Some(Ok(())) } else { fails.then_some(Err(BROKEN)) };
        let end = |core: &mut Core, actions| end_io(core, actions, ends);
        let touch = |core: &mut Core, page: PageNo| {
            let mut todo = hand(core, Event::Fault(page));
            for _ in 0..20 {
                end(core, todo);
                todo = hand(core, Event::Tick { ticks: 1 });
            }
            end(core, todo);
            assert_eq!(core.faults_waiting(), 0, "{page} (fails: {fails})");
        };
        // Pages of both are in RAM, and of the one more are on their way than is kept ready ahead of need.
        let run = Run::new(PageNo(512), 80);
        for page in [PageNo(0)].into_iter().chain(run.pages()) {
            let todo = hand(&mut core, Event::Fault(page));
            end_io(&mut core, todo, |_| Some(Ok(())));
        }
        let mut todo = ask(&mut core, Request::Evict(run));
        for _ in 0..40 {
            end(&mut core, todo);
            todo = hand(&mut core, Event::Tick { ticks: 1 });
        }
        end(&mut core, todo);
        let leaving = core.table.leaving_to(bad);
        assert!(leaving > u64::from(core.frames.marks().goal()), "{leaving} (fails: {fails})");
        for page in (0..512).map(PageNo) {
            touch(&mut core, page);
            assert_eq!(core.table.leaving_to(bad), leaving, "at {page} (fails: {fails})");
        }
    }
}

fn write_of(page: PageNo, actions: &[Action]) -> Option<IoId> {
    actions.iter().find_map(|action| match action {
        Action::Write { io, run, .. } if run.contains(page) => Some(*io),
        _ => None,
    })
}

fn tick_until_written(core: &mut Core, page: PageNo, mut actions: Vec<Action>) -> IoId {
    for _ in 0..200 {
        if let Some(io) = write_of(page, &actions) {
            return io;
        }
        actions = hand(core, Event::Tick { ticks: 1 });
    }
    panic!("{page} is not written");
}

/// A retry has looked what is to be written, and the other tier takes writes meanwhile.
#[test]
fn what_leaves_while_its_tier_is_retried_is_written_behind_that() {
    let mut core = core_of(1024);
    let [first, second, copy] = [3, 5, 7].map(PageNo);
    store(&mut core, copy);
    wait(&mut core, copy, 0, |_| true);
    [first, second].into_iter().for_each(|page| drop(hand(&mut core, Event::Fault(page))));
    // The tier is full. That is not told, for the copy of a page that is in RAM gives way.
    let todo = ask(&mut core, Request::Evict(Run::one(first)));
    let io = tick_until_written(&mut core, first, todo);
    let error = IoError { tier: TierId::STORE, write: true, kind: IoErrorKind::Full };
    let mut told = hand(&mut core, Event::WriteDone { io, result: Err(error) });
    assert!(told.iter().any(|action| matches!(action, Action::Drop { .. })), "{told:?}");
    let retry = tick_until_written(&mut core, first, Vec::new());
    assert!(core.tiers.is_retrying(TierId::STORE));
    told.extend(ask(&mut core, Request::Evict(Run::one(second))));
    told.extend(hand(&mut core, Event::Tick { ticks: 1 }));
    assert_eq!((core.table.state(second), write_of(second, &told)), (PageState::Leaving, None), "{told:?}");
    let todo = hand(&mut core, Event::WriteDone { io: retry, result: Ok(()) });
    assert!(core.tiers.may_write(TierId::STORE));
    tick_until_written(&mut core, second, todo);
}

/// Whoever asks has all that fails tried again, and is told how all of it ends.
#[test]
fn a_retry_ends_when_all_tiers_do() {
    for last in [Ok(()), Err(BROKEN)] {
        let mut core = core_of(1024);
        let pages = [PageNo(3), PageNo(600)];
        let mut todo = Vec::new();
        for page in pages {
            todo.extend(hand(&mut core, Event::Fault(page)));
            todo.extend(ask(&mut core, Request::Evict(Run::one(page))));
        }
        todo.extend(hand(&mut core, Event::Tick { ticks: 1 }));
        end_io(&mut core, todo, |_| Some(Err(BROKEN)));
        let answers = |actions: &[Action]| {
            let answer = |action: &Action| match action {
                Action::Answer { ticket: Ticket(9), answer } => Some(answer.is_ok()),
                _ => None,
            };
            actions.iter().filter_map(answer).collect::<Vec<_>>()
        };
        let todo = hand(&mut core, Event::Request { ticket: Ticket(9), request: Request::RetryStore });
        let todo = end_io(&mut core, todo, |tier| (tier == TierId(0)).then_some(Ok(())));
        assert!(core.tiers.may_write(TierId(0)) && !core.tiers.may_write(TierId(1)));
        assert_eq!(answers(&todo), [], "the other is being tried still");
        let todo = end_io(&mut core, todo, |_| Some(last));
        assert_eq!(answers(&todo), [last.is_ok()]);
    }
}

/// A full tier in which room is being made, for as long as it takes, says nothing of another that is full.
#[test]
fn a_full_tier_without_anything_to_give_up_is_told_whatever_another_one_does() {
    let mut core = core_of(1024);
    let copy = PageNo(600);
    store(&mut core, copy);
    wait(&mut core, copy, 0, |_| true);
    let mut told = Vec::new();
    for page in [PageNo(601), PageNo(3)] {
        hand(&mut core, Event::Fault(page));
        let todo = ask(&mut core, Request::Evict(Run::one(page)));
        let io = tick_until_written(&mut core, page, todo);
        let tier = core.home_of(page);
        let error = IoError { tier, write: true, kind: IoErrorKind::Full };
        told.extend(hand(&mut core, Event::WriteDone { io, result: Err(error) }));
    }
    assert!(told.iter().any(|action| matches!(action, Action::Drop { tier: TierId(1), .. })), "{told:?}");
    let failed = told.iter().filter_map(|action| match action {
        Action::StoreFailed(error) => Some(error.tier),
        _ => None,
    });
    assert_eq!(failed.collect::<Vec<_>>(), [TierId(0)], "{told:?}");
}

/// All frames are taken, and a vCPU has touched a page that is just being written.
fn awaited_under_write() -> (Core, PageNo, IoId) {
    let mut core = core();
    let page = PageNo(3);
    hand(&mut core, Event::Fault(page));
    let todo = ask(&mut core, Request::Evict(Run::one(page)));
    let io = tick_until_written(&mut core, page, todo);
    while core.frames.at_hand() > 0 {
        core.frames.take(1).expect("one is at hand");
    }
    core.handle(Event::Fault(page));
    assert!(core.is_awaited_under_write(page) && !core.waits_for_frame());
    (core, page, io)
}

#[test]
fn who_waits_for_a_page_that_is_being_written_to_a_silent_tier_is_told_of() {
    let (mut core, page, _) = awaited_under_write();
    let told: Vec<_> = (0..=SILENT_TICKS)
        .flat_map(|_| {
            core.handle(Event::Tick { ticks: 1 });
            std::iter::from_fn(|| core.next_action()).collect::<Vec<_>>()
        })
        .collect();
    assert!(told.iter().any(|action| matches!(action, Action::TierUnreachable(_))), "{page}: {told:?}");
}

#[test]
fn who_waits_for_a_page_that_is_being_written_gets_a_copy_once_there_is_a_frame() {
    let (mut core, page, _) = awaited_under_write();
    core.handle(Event::Tick { ticks: 1 });
    assert!(core.is_awaited_under_write(page), "there is none");
    core.frames.set_budget(300);
    core.handle(Event::Tick { ticks: 1 });
    let todo: Vec<_> = std::iter::from_fn(|| core.next_action()).collect();
    assert!(todo.iter().any(|action| matches!(action, Action::Copy { .. })), "{todo:?}");
    assert_eq!(core.table.state(page), PageState::Arriving);
}
