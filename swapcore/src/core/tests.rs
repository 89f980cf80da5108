//! What the simulation has found, each in as few events as show it.

use super::*;
use crate::api::ArrivedRun;
use crate::units::TierId;
use crate::units::bytes_of;

const PAGE: PageNo = PageNo(7);

pub(super) fn core() -> Core {
    Core::new(CoreConfig {
        pages: 256,
        budget_frames: 64,
        budget_min: 48,
        slots: 128,
        blocks: 1,
        sampling: false,
        walk: WalkStep::default(),
    })
}

/// Hands the event in, has all moves succeed, and returns what else is to be done.
pub(super) fn actions(core: &mut Core, event: Event<'_>) -> Vec<Action> {
    core.handle(event);
    performed(core)
}

/// The same for what is to be done already.
pub(super) fn performed(core: &mut Core) -> Vec<Action> {
    let mut rest = Vec::new();
    while let Some(action) = core.next_action() {
        match action {
            Action::MoveIn { run, slots } => core.handle(Event::MovedIn { run, slots, moved: run.len }),
            Action::CopyIn { page, slot } => core.handle(Event::CopiedIn { page, slot, copied: true }),
            Action::MoveOut { run, slots, .. } => {
                let out = vec![PageOut::Moved { sum: 1, zero: false }; run.len as usize];
                core.handle(Event::MovedOut { run, slots, pages: &out });
            }
            other => rest.push(other),
        }
    }
    core.check();
    rest
}

/// A heat map is taken over as a whole.
pub(super) fn ask(core: &mut Core, request: Request) -> Vec<Action> {
    let heat = matches!(request, Request::StartReceiving(_) | Request::UpdateHeat(_));
    let mut done = actions(core, Event::Request { ticket: Ticket(1), request });
    while heat && core.is_walking() {
        done.extend(actions(core, Event::Step));
    }
    done
}

pub(super) fn written(core: &mut Core, io: IoId, result: Result<(), IoError>) -> Vec<Action> {
    actions(core, Event::WriteDone { io, result })
}

/// With a source that says that `PAGE` is hot, or that nothing is.
fn receiving(hot: bool) -> Core {
    let mut core = core();
    let mut heat = vec![0; 256];
    heat[PAGE.index()] = if hot { 80 } else { 0 };
    ask(&mut core, Request::StartReceiving(heat));
    core
}

/// Whatever the event leads to, with all writes done.
fn settle(core: &mut Core, mut todo: Vec<Action>) {
    loop {
        core.make_ready();
        todo.extend(performed(core));
        if todo.is_empty() {
            return;
        }
        for action in std::mem::take(&mut todo) {
            if let Action::Write { io, .. } = action {
                todo.extend(written(core, io, Ok(())));
            }
        }
    }
}

/// A version of the page, with its checksum. Cold ones are written, as long as many more are to come.
fn arrive(core: &mut Core, sum: u64) -> Vec<Action> {
    arrive_at(core, PAGE, sum, false)
}

fn arrive_at(core: &mut Core, page: PageNo, sum: u64, again: bool) -> Vec<Action> {
    let granted = ask(core, Request::GrantFrames(1));
    let [Action::Answer { answer: Ok(Response::Frames(slots)), .. }] = granted[..] else {
        panic!("{granted:?} instead of a frame")
    };
    let arrival = ArrivedRun { run: Run::one(page), slots, sums: vec![sum], again };
    ask(core, Request::Arrive(arrival))
}

fn io_of(actions: &[Action]) -> IoId {
    let write = actions.iter().find_map(|action| match action {
        Action::Write { io, .. } => Some(*io),
        _ => None,
    });
    write.unwrap_or_else(|| panic!("no write in {actions:?}"))
}

pub(super) fn answers(actions: &[Action]) -> usize {
    actions.iter().filter(|action| matches!(action, Action::Answer { .. })).count()
}

#[test]
fn while_hot_pages_are_still_found_ram_is_kept_for_those_to_come() {
    let mut core = receiving(false);
    let mut heat = vec![0; 256];
    let place = |core: &mut Core, page: usize, again: bool| {
        let done = arrive_at(core, PageNo(page as u64), 1, again);
        if done.iter().any(|action| matches!(action, Action::Write { .. })) {
            written(core, io_of(&done), Ok(()));
        }
    };
    // The guest is seen to write 12 pages more each time; the last 10 when everything has come.
    let rounds = [(0..100, 0..12), (100..200, 12..24), (200..256, 24..34)];
    for (come, hot) in rounds {
        come.for_each(|page| place(&mut core, page, false));
        heat[hot].fill(128);
        ask(&mut core, Request::UpdateHeat(heat.clone()));
    }
    (0..34).for_each(|page| place(&mut core, page, true));
    assert_eq!(core.table.count(PageState::Resident), 54, "34 hot pages, and 20 of those that came last");
    (0..34).for_each(|page| assert_eq!(core.table.state(PageNo(page)), PageState::Resident, "{page}"));
}

/// A page was to leave, and could not.
fn evicting_a_pinned_page() -> Core {
    let mut core = core();
    actions(&mut core, Event::Fault(PAGE));
    core.handle(Event::Request { ticket: Ticket(1), request: Request::Evict(Run::one(PAGE)) });
    let Some(Action::MoveOut { run, slots, .. }) = core.next_action() else { panic!("it is to leave") };
    core.handle(Event::MovedOut { run, slots, pages: &[PageOut::Pinned] });
    core
}

#[test]
fn a_pinned_page_is_evicted_at_the_next_tick_not_at_once_again_and_again() {
    let mut core = evicting_a_pinned_page();
    assert!(core.next_action().is_none(), "tried again while nothing can have changed");
    core.handle(Event::Tick { ticks: 1 });
    assert!(matches!(core.next_action(), Some(Action::MoveOut { .. })));
}

#[test]
fn a_late_fault_finds_no_page_that_is_about_to_leave() {
    // It waits.
    let mut core = evicting_a_pinned_page();
    // Two faults at once: the move would come between them.
    core.handle(Event::Fault(PageNo(200)));
    core.handle(Event::Fault(PAGE));
    while let Some(action) = core.next_action() {
        assert!(!matches!(action, Action::MoveOut { .. }), "{action:?} behind a fault");
    }
}

#[test]
fn a_failed_store_takes_no_frames_for_those_who_ask() {
    let mut core = receiving(false);
    let io = io_of(&arrive(&mut core, 1));
    written(&mut core, io, Err(IoError { tier: TierId::STORE, write: true, kind: IoErrorKind::Full }));
    // `check` finds frames that nobody has.
    let refused = ask(&mut core, Request::GrantFrames(8));
    assert!(
        matches!(refused[..], [Action::Answer { answer: Err(CommandError::Store(_)), .. }]),
        "{refused:?}"
    );
}

#[test]
fn a_newer_version_that_waits_for_an_older_ones_write_keeps_no_frame_when_it_is_replaced() {
    let mut core = receiving(false);
    let first = io_of(&arrive(&mut core, 1));
    arrive(&mut core, 2);
    // `check` finds frames that wait for nothing.
    arrive(&mut core, 3);
    let third = io_of(&written(&mut core, first, Ok(())));
    written(&mut core, third, Ok(()));
    assert_eq!(core.recorded_sum(PAGE), Some(3));
}

#[test]
fn an_older_version_that_is_written_does_not_count_as_the_newest() {
    let mut core = receiving(false);
    let first = io_of(&arrive(&mut core, 1));
    arrive(&mut core, 2);
    ask(&mut core, Request::ArriveZero(Run::one(PAGE)));
    ask(&mut core, Request::ArrivePoisoned(Run::one(PAGE)));
    written(&mut core, first, Ok(()));
    assert_eq!(
        core.recorded_sum(PAGE),
        None,
        "the store has version 1, the sum on record is that of version 2"
    );
}

#[test]
fn receiving_settles_when_the_last_write_has_ended_whatever_it_was_of() {
    let mut core = receiving(false);
    let first = io_of(&arrive(&mut core, 1));
    ask(&mut core, Request::ArriveZero(Run::one(PAGE)));
    assert_eq!(answers(&ask(&mut core, Request::SettleReceiving)), 0, "a write is under way");
    assert_eq!(answers(&written(&mut core, first, Ok(()))), 1);
}

#[test]
fn a_vm_that_runs_while_its_pages_are_still_written_gets_the_newest_ones() {
    let mut core = receiving(false);
    let first = io_of(&arrive(&mut core, 1));
    arrive(&mut core, 2);
    let finished = ask(&mut core, Request::FinishReceiving);
    assert!(
        matches!(&finished[..], [Action::Answer { answer: Ok(Response::Placed(placed)), .. }] if placed.pages_store == 1),
        "{finished:?}"
    );
    // The device works with the older one's frame, so the newer one's goes to the guest as it is.
    core.handle(Event::Fault(PAGE));
    let Some(Action::MoveIn { run, slots }) = core.next_action() else { panic!("it is rescued") };
    core.handle(Event::MovedIn { run, slots, moved: 1 });
    while core.next_action().is_some() {}
    written(&mut core, first, Ok(()));
    assert_eq!(core.table().state(PAGE), PageState::Resident);
    assert_eq!(
        core.recorded_sum(PAGE),
        None,
        "the store has version 1, the sum on record is that of version 2"
    );
    core.check();
}

#[test]
fn an_old_version_that_is_pinned_is_gone_before_the_new_one_comes() {
    let mut core = receiving(true);
    arrive(&mut core, 1);
    assert_eq!(core.table().state(PAGE), PageState::Resident, "hot ones are kept");
    let granted = ask(&mut core, Request::GrantFrames(1));
    let [Action::Answer { answer: Ok(Response::Frames(slots)), .. }] = granted[..] else {
        panic!("{granted:?}")
    };
    let arrival = ArrivedRun { run: Run::one(PAGE), slots, sums: vec![2], again: true };
    core.handle(Event::Request { ticket: Ticket(1), request: Request::Arrive(arrival) });
    let Some(Action::MoveOut { run, slots, .. }) = core.next_action() else { panic!("the old one leaves") };
    core.handle(Event::MovedOut { run, slots, pages: &[PageOut::Pinned] });
    assert!(matches!(core.next_action(), Some(Action::DropGuest { run: dropped }) if dropped == run));
    let Some(Action::MoveIn { run, slots }) = core.next_action() else { panic!("the new one comes") };
    core.handle(Event::MovedIn { run, slots, moved: 1 });
    core.check();
}

#[test]
fn a_budget_cannot_change_while_pages_arrive() {
    let mut core = receiving(true);
    let refused = ask(&mut core, Request::SetBudget(bytes_of(48)));
    assert!(
        matches!(refused[..], [Action::Answer { answer: Err(CommandError::NotNow(_)), .. }]),
        "{refused:?}"
    );
}

#[test]
fn a_lone_page_is_copied_but_never_beyond_the_budget() {
    let mut core = evicting_a_pinned_page();
    actions(&mut core, Event::Tick { ticks: 1 });
    let burst = actions(&mut core, Event::Tick { ticks: 1 });
    written(&mut core, io_of(&burst), Ok(()));
    // What was filled beside it.
    ask(&mut core, Request::Discard(Run::new(PAGE.plus(1), 32)));
    let (taken, free) = (core.frames_taken(), core.frames.staging().free_frames());
    core.handle(Event::Fault(PAGE));
    let Some(Action::Read { io, .. }) = core.next_action() else { panic!("it is read") };
    core.handle(Event::ReadDone { io, result: Ok(&[1]) });
    let Some(Action::CopyIn { page, slot }) = core.next_action() else { panic!("it is copied") };
    assert_eq!((page, core.frames_taken()), (PAGE, taken + 1));
    // The host has none: then the frame itself goes, as it does when the budget is used up.
    core.handle(Event::CopiedIn { page, slot, copied: false });
    let Some(Action::MoveIn { run, slots }) = core.next_action() else { panic!("it is moved") };
    assert_eq!((run, slots.start), (Run::one(PAGE), slot));
    core.handle(Event::MovedIn { run, slots, moved: 1 });
    assert_eq!((core.frames_taken(), core.frames.staging().free_frames()), (taken, free - 1));
    core.check();
}

/// All of the budget is in the guest, but for the reserve.
fn full() -> Core {
    let mut core = core();
    (0..63).for_each(|page| drop(actions(&mut core, Event::Fault(PageNo(page)))));
    core
}

/// Has all moves out of the guest fail, and says which pages were tried.
fn all_pinned(core: &mut Core, mut handle: impl FnMut(&mut Core)) -> (Vec<PageNo>, Vec<Action>) {
    let (mut tried, mut rest) = (Vec::new(), Vec::new());
    handle(core);
    while let Some(action) = core.next_action() {
        match action {
            Action::MoveOut { run, slots, .. } => {
                tried.extend(run.pages());
                core.handle(Event::MovedOut { run, slots, pages: &vec![PageOut::Pinned; run.len as usize] });
            }
            other => rest.push(other),
        }
    }
    core.check();
    (tried, rest)
}

#[test]
fn pinned_victims_are_given_up_until_the_next_tick_and_whoever_starves_is_told_once() {
    let mut core = full();
    let mut tried = Vec::new();
    for _ in 0..100 {
        tried.extend(all_pinned(&mut core, Core::make_ready).0);
        if !core.looks_for_others() {
            break;
        }
    }
    assert!(!core.looks_for_others(), "it looks for ever");
    let (all, mut once) = (tried.len(), tried);
    once.sort_unstable();
    once.dedup();
    assert_eq!(all, once.len(), "none was tried twice");
    assert_eq!(core.table.count(PageState::Resident), core.table.pinned(), "all were");

    let (_, rest) = all_pinned(&mut core, |core| core.handle(Event::Fault(PageNo(200))));
    assert!(!rest.iter().any(|action| matches!(action, Action::Short { .. })));
    let mut told = 0;
    for _ in 0..30 {
        let (_, rest) = all_pinned(&mut core, |core| core.handle(Event::Tick { ticks: 1 }));
        told +=
            rest.iter().filter(|action| matches!(action, Action::Short { pinned } if *pinned > 0)).count();
        all_pinned(&mut core, Core::make_ready);
    }
    assert_eq!((told, core.stats().starved_ms), (1, 3000));
    // Let go of: pages leave, and whoever waits gets a frame.
    let mut rest = actions(&mut core, Event::Tick { ticks: 1 });
    while core.is_waited_for(PageNo(200)) {
        core.make_ready();
        rest.extend(performed(&mut core));
        rest.extend(actions(&mut core, Event::Tick { ticks: 1 }));
        for action in std::mem::take(&mut rest) {
            match action {
                Action::Write { io, .. } => rest.extend(written(&mut core, io, Ok(()))),
                other => rest.push(other),
            }
        }
    }
    rest.extend(actions(&mut core, Event::Tick { ticks: 1 }));
    assert!(rest.iter().any(|action| matches!(action, Action::Enough)), "{rest:?}");
    assert_eq!(core.stats().starved_ms, 0);
}

#[test]
fn who_waits_for_a_frame_no_longer_is_not_said_to_starve() {
    let mut core = full();
    let gone = PageNo(0);
    let mut burst = ask(&mut core, Request::Evict(Run::one(gone)));
    burst.extend(actions(&mut core, Event::Tick { ticks: 1 }));
    written(&mut core, io_of(&burst), Ok(()));
    let mut next = PageNo(100);
    while core.frames.at_hand() > 0 {
        next = next.plus(1);
        actions(&mut core, Event::Fault(next));
    }
    assert_eq!(core.table.state(gone), PageState::Stored);
    actions(&mut core, Event::Fault(gone));
    let mut tick = || all_pinned(&mut core, |core| core.handle(Event::Tick { ticks: 1 })).1;
    let short: Vec<_> = (0..20).flat_map(|_| tick()).collect();
    assert!(matches!(short[..], [Action::Short { .. }]), "{short:?}");
    // It is given back, and nobody waits: there are no more frames than before.
    ask(&mut core, Request::Discard(Run::one(gone)));
    let (_, enough) = all_pinned(&mut core, |core| core.handle(Event::Tick { ticks: 1 }));
    assert!(matches!(enough[..], [Action::Enough]), "{enough:?}");
    assert_eq!((core.frames.at_hand(), core.stats().starved_ms), (0, 0));
}

/// A VM of two huge pages whose budget covers it, with samples on.
fn huge() -> Core {
    huge_of(1024)
}

fn huge_of(pages: u32) -> Core {
    let mut core = Core::new(CoreConfig {
        pages: u64::from(pages),
        budget_frames: u64::from(pages),
        budget_min: 48,
        slots: 128,
        blocks: 2,
        sampling: true,
        walk: WalkStep::default(),
    });
    refill(&mut core, Run::new(PageNo(0), pages));
    // What has just been touched is left alone once.
    sampled(&mut core, true);
    core
}

fn refill(core: &mut Core, run: Run) {
    let blocks = run.pages().filter(|page| page.0.is_multiple_of(512));
    for block in blocks {
        core.handle(Event::Fault(block));
        let Some(Action::FillBlock { run }) = core.next_action() else { panic!("it is filled whole") };
        actions(core, Event::Filled { run, huge: true });
    }
}

/// Has a tick pass, and says what was taken out as a sample then: all of it or nothing leaves.
fn sampled(core: &mut Core, leaves: bool) -> Vec<Run> {
    core.handle(Event::Tick { ticks: 1 });
    let (mut taken, mut rest) = (Vec::new(), Vec::new());
    while let Some(action) = core.next_action() {
        match action {
            Action::MoveOut { run, slots, .. } => {
                taken.push(run);
                let out = if leaves { PageOut::Moved { sum: 1, zero: false } } else { PageOut::Pinned };
                core.handle(Event::MovedOut { run, slots, pages: &vec![out; run.len as usize] });
            }
            Action::MoveIn { run, slots } => core.handle(Event::MovedIn { run, slots, moved: run.len }),
            other => rest.push(other),
        }
    }
    assert!(rest.is_empty(), "{rest:?}");
    core.check();
    taken
}

/// Everything comes back, each page once.
fn end_samples(core: &mut Core) -> u64 {
    core.handle(Event::Request { ticket: Ticket(1), request: Request::SubscribeDirty(Vec::new()) });
    let mut back = 0;
    while core.is_walking() {
        core.handle(Event::Step);
        while let Some(action) = core.next_action() {
            if let Action::MoveIn { run, slots } = action {
                back += u64::from(run.len);
                core.handle(Event::MovedIn { run, slots, moved: run.len });
            }
        }
    }
    core.check();
    assert_eq!((core.table.count(PageState::Sampled), core.sampler.is_out()), (0, false));
    back
}

#[test]
fn a_huge_page_that_was_pinned_as_a_sample_is_not_out() {
    let mut core = huge();
    let both = [Run::new(PageNo(0), 512), Run::new(PageNo(512), 512)];
    for _ in 0..3 {
        assert_eq!(sampled(&mut core, false), both);
        assert!(!core.sampler.is_out(), "nothing has left");
    }
    assert_eq!(sampled(&mut core, true), both);
    assert_eq!(end_samples(&mut core), 1024, "once each");
}

#[test]
fn a_huge_page_sampled_again_after_it_was_given_back_comes_back_once() {
    let mut core = huge();
    let second = Run::new(PageNo(512), 512);
    assert_eq!(sampled(&mut core, true).len(), 2);
    // The first one's frames go back to the host, so that there are some for the second in one piece.
    actions(&mut core, Event::Fault(PageNo(0)));
    ask(&mut core, Request::Discard(Run::new(PageNo(0), 1024)));
    refill(&mut core, second);
    // The first one gets those that are where a sample of the second goes.
    (0..512).map(PageNo).for_each(|page| drop(actions(&mut core, Event::Fault(page))));
    assert_eq!(sampled(&mut core, true), [], "fresh");
    assert!(sampled(&mut core, true).contains(&second));
    assert!(end_samples(&mut core) > 512);
}

/// What a VM of so many pages with a budget of 1024 frames becomes while pages of such heats arrive.
fn arriving(pages: u64, short: Vec<Run>, heat: Vec<u8>) -> Core {
    let config = CoreConfig {
        pages,
        budget_frames: 1024,
        budget_min: 48,
        slots: 512,
        blocks: 0,
        sampling: false,
        walk: WalkStep::default(),
    };
    let mut core = Core::new(config).with_short_blocks(short);
    ask(&mut core, Request::StartReceiving(heat));
    core
}

/// What may be placed in RAM of that budget: 128 frames are kept to receive into.
const ROOM: u64 = 896;

fn place(core: &mut Core, page: u64, again: bool) {
    let done = arrive_at(core, PageNo(page), 1, again);
    settle(core, done);
}

#[test]
fn the_search_for_colder_pages_goes_on_behind_a_block_that_is_not_whole() {
    let work = || {
        let mut heat = vec![0; 4096];
        heat[512..2048].fill(40);
        // None of the first block is in RAM.
        let mut core = arriving(4096, vec![Run::new(PageNo(0), 100)], heat);
        (512..512 + ROOM).for_each(|page| place(&mut core, page, false));
        place(&mut core, 3000, true);
        [512, 3000].map(|page| core.table.state(PageNo(page)))
    };
    let (end, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || end.send(work()));
    let states = ended.recv_timeout(std::time::Duration::from_secs(30)).expect("it ends");
    assert_eq!(states, [PageState::Stored, PageState::Resident], "the coldest gives way");
}

#[test]
fn huge_pages_that_share_a_place_are_sampled_one_after_the_other_and_stay_whole() {
    let mut core = huge_of(3072);
    let block = |nth: u64| Run::new(PageNo(nth * 512), 512);
    assert_eq!(sampled(&mut core, true), [block(0), block(1)], "places for two");
    assert!((2..6).all(|nth| core.table.is_huge(nth)), "the others are as they were");
    assert_eq!((core.table.count(PageState::Sampled), core.stats().sampling.pages), (1024, 1024));
    assert_eq!(end_samples(&mut core), 1024, "none is taken for one that is out");
}

#[test]
fn a_sample_for_which_there_is_no_slot_is_not_out() {
    let mut core = Core::new(CoreConfig {
        pages: 1024,
        budget_frames: 256,
        budget_min: 48,
        slots: 256,
        blocks: 0,
        sampling: true,
        walk: WalkStep::default(),
    });
    (0..64).for_each(|page| drop(actions(&mut core, Event::Fault(PageNo(page)))));
    sampled(&mut core, true);
    let taken: Vec<_> = std::iter::from_fn(|| core.frames.staging_mut().take_empty(256)).collect();
    assert!(!taken.is_empty() && !core.sampler.is_out(), "fresh ones are left alone");
    core.handle(Event::Tick { ticks: 1 });
    assert!(core.next_action().is_none() && !core.sampler.is_out(), "no slot, no sample");
}

/// RAM full of pages of heat 80 behind page 2048, of which the first have given way to others of them.
fn full_of_warm_pages() -> Core {
    let mut heat = vec![0; 4096];
    heat[1024..2048].fill(40);
    heat[2048..4096].fill(80);
    let mut core = arriving(4096, vec![], heat);
    (1024..1024 + ROOM).for_each(|page| place(&mut core, page, false));
    (2048..2049 + ROOM).for_each(|page| place(&mut core, page, false));
    core
}

fn resident(core: &Core, pages: std::ops::Range<u64>) -> usize {
    pages.filter(|page| core.table.state(PageNo(*page)) == PageState::Resident).count()
}

#[test]
fn pages_that_came_to_ram_behind_the_hand_give_way_to_hotter_ones() {
    let mut core = full_of_warm_pages();
    (1024..1034).for_each(|page| place(&mut core, page, false));
    (0..1000).for_each(|page| place(&mut core, page, true));
    assert_eq!((resident(&core, 1024..1034), resident(&core, 2048..4096)), (0, 0), "colder than what came");
    assert!(core.placed_in_ram() <= ROOM, "{} pages in RAM", core.placed_in_ram());
}

#[test]
fn a_colder_page_that_comes_while_there_is_room_gives_way_before_what_was_the_coldest() {
    let mut heat = vec![0; 4096];
    heat[0..2048].fill(80);
    heat[4000..4040].fill(10);
    let mut core = arriving(4096, vec![], heat);
    (0..ROOM + 1).for_each(|page| place(&mut core, page, false));
    // The hand is at those of 80, and has made room for some more.
    (4000..4040).for_each(|page| place(&mut core, page, false));
    (3000..3100).for_each(|page| place(&mut core, page, true));
    assert_eq!((resident(&core, 4000..4040), resident(&core, 3000..3100)), (0, 100));
}

#[test]
fn what_found_no_slot_on_its_way_out_is_found_again() {
    let mut heat = vec![0; 4096];
    heat[0..2048].fill(40);
    let mut core = arriving(4096, vec![], heat);
    (0..ROOM).for_each(|page| place(&mut core, page, false));
    // All but 20 of the slots are somebody's.
    let taken: Vec<_> = std::iter::from_fn(|| core.frames.staging_mut().take_empty(32)).collect();
    let some = taken.iter().flat_map(|slots| slots.slots()).take(20);
    some.for_each(|slot| {
        core.frames.staging_mut().assign(slot, Use::Orphan);
        core.frames.staging_mut().vacate(slot);
    });
    core.make_way();
    assert!(core.next_action().is_none(), "nothing is over");
    core.frames.set_budget(core.frames.budget() - 30);
    core.make_way();
    let out =
        |core: &Core| (0..64).filter(|page| core.table.state(PageNo(*page)) == PageState::Leaving).count();
    assert_eq!(out(&core), 20);
    taken.iter().flat_map(|slots| slots.slots()).skip(20).for_each(|slot| {
        core.frames.staging_mut().assign(slot, Use::Orphan);
        core.frames.staging_mut().vacate(slot);
    });
    core.frames.set_budget(core.frames.budget() - 30);
    core.make_way();
    assert_eq!(out(&core), 64, "from the first one that stayed");
}

#[test]
fn what_was_pinned_when_the_hand_passed_gives_way_later() {
    let mut core = full_of_warm_pages();
    let mut next = 0;
    while core.placed_in_ram() <= ROOM {
        arrive_at(&mut core, PageNo(next), 1, true);
        next += 1;
    }
    let (tried, _) = all_pinned(&mut core, Core::make_ready);
    assert_eq!(tried.len(), 64);
    let done = actions(&mut core, Event::Tick { ticks: 1 });
    settle(&mut core, done);
    (next..1000).for_each(|page| place(&mut core, page, true));
    assert_eq!(resident(&core, 2048..4096), 0, "colder than what came");
}

#[test]
fn what_was_held_when_the_hand_passed_gives_way_once_it_is_released() {
    let mut core = full_of_warm_pages();
    let held = Run::new(PageNo(2300), 10);
    ask(&mut core, Request::Hold(held));
    (0..900).for_each(|page| place(&mut core, page, true));
    assert_eq!((resident(&core, 2300..2310), resident(&core, 2048..4096)), (10, 10), "all others have left");
    ask(&mut core, Request::Release(held));
    (900..1000).for_each(|page| place(&mut core, page, true));
    assert_eq!(resident(&core, 2048..4096), 0, "colder than what came");
}

#[test]
fn hot_pages_in_the_store_that_become_zeros_do_not_keep_room() {
    let mut core = arriving(4096, vec![], vec![0; 4096]);
    (0..600).for_each(|page| place(&mut core, page, false));
    assert_eq!(core.table.count(PageState::Stored), 600, "as long as much is to come");
    let mut heat = vec![0; 4096];
    heat[..600].fill(80);
    // The second time nothing new is found.
    (0..2).for_each(|_| drop(ask(&mut core, Request::UpdateHeat(heat.clone()))));
    assert_eq!(core.table.hot_in_store(), 600);
    ask(&mut core, Request::ArriveZero(Run::new(PageNo(0), 3500)));
    assert_eq!(core.table.hot_in_store(), 0);
    (3500..4096).for_each(|page| place(&mut core, page, false));
    assert_eq!(core.table.count(PageState::Resident), 596, "there is room for all that is not zeros");
}

#[test]
fn a_heat_map_of_another_size_begins_no_receiving() {
    let mut core = core();
    let refused = ask(&mut core, Request::StartReceiving(vec![0; 255]));
    assert!(
        matches!(refused[..], [Action::Answer { answer: Err(CommandError::NotNow(_)), .. }]),
        "{refused:?}"
    );
    assert!(core.receiving.is_none(), "it pages as before");
}
