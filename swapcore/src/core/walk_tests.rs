//! Of a long request, each step does a part, and the answer comes behind the last.

use super::tests::{actions, answers, ask, core, performed, written};
use super::*;
use crate::units::bytes_of;

const PAGE: PageNo = PageNo(7);

#[test]
fn samples_go_back_some_at_a_time_and_the_host_is_told_behind_the_last() {
    let mut core = Core::new(CoreConfig {
        pages: 1 << 16,
        budget_frames: 1 << 16,
        budget_min: 48,
        slots: 8192,
        blocks: 0,
        sampling: true,
        walk: WalkStep::default(),
    });
    for page in (0..1 << 16).step_by(512).map(PageNo) {
        core.handle(Event::Fault(page));
        while let Some(action) = core.next_action() {
            if let Action::FillBlock { run } = action {
                core.handle(Event::Filled { run, huge: false });
            }
        }
    }
    // The first pass leaves what is fresh alone.
    (0..8).for_each(|_| drop(actions(&mut core, Event::Tick { ticks: 1 })));
    let out = core.table.count(PageState::Sampled);
    assert!(out > 33 * 16, "{out} pages are out");
    let moves = |core: &mut Core, event: Event<'_>| {
        core.handle(event);
        let (mut moves, mut told) = (0, false);
        while let Some(action) = core.next_action() {
            match action {
                Action::MoveIn { run, slots } => {
                    moves += 1;
                    core.handle(Event::MovedIn { run, slots, moved: run.len });
                }
                Action::HugePages(allowed) => told = !allowed,
                _ => {}
            }
        }
        (moves, told)
    };
    let request = Request::SetBudget(bytes_of((1 << 16) - 1));
    assert_eq!(moves(&mut core, Event::Request { ticket: Ticket(1), request }), (32, false));
    let mut told = false;
    while core.is_walking() {
        assert!(!told, "that comes last");
        let (moved, now) = moves(&mut core, Event::Step);
        assert!(moved <= 32, "{moved} samples in one step");
        told = now;
    }
    assert_eq!((core.table.count(PageState::Sampled), told), (0, true));
}

#[test]
fn a_discard_of_much_is_done_in_steps_and_answered_behind_the_last() {
    let mut core = core();
    core.config.walk = WalkStep { table: 64, ..WalkStep::default() };
    actions(&mut core, Event::Fault(PAGE));
    actions(&mut core, Event::Fault(PageNo(200)));
    let mut done = ask(&mut core, Request::Discard(Run::new(PageNo(0), 256)));
    assert_eq!((core.table.state(PAGE), answers(&done)), (PageState::Untouched, 0));
    assert_eq!(core.table.state(PageNo(200)), PageState::Resident);
    // It is touched behind its step: that is new, and stays.
    done.extend(actions(&mut core, Event::Fault(PAGE)));
    while core.is_walking() {
        assert_eq!(answers(&done), 0);
        done.extend(actions(&mut core, Event::Step));
    }
    assert_eq!(
        [PAGE, PageNo(200)].map(|page| core.table.state(page)),
        [PageState::Resident, PageState::Untouched]
    );
    assert_eq!(answers(&done), 1);
}

fn heat_map(core: &mut Core) -> Vec<u8> {
    let mut todo = ask(core, Request::Heat);
    while core.is_walking() {
        todo.extend(actions(core, Event::Step));
    }
    let answer = todo.into_iter().find_map(|action| match action {
        Action::Answer { answer: Ok(Response::Heat(heat)), .. } => Some(heat),
        _ => None,
    });
    answer.expect("the heat is told")
}

#[test]
fn what_is_in_ram_where_others_had_to_leave_is_a_little_warm() {
    let mut core = core();
    let touch = |core: &mut Core, page| {
        let mut todo = actions(core, Event::Fault(PageNo(page)));
        while !todo.is_empty() {
            for action in std::mem::take(&mut todo) {
                match action {
                    Action::Write { io, .. } => todo.extend(written(core, io, Ok(()))),
                    Action::Read { io, run, .. } => {
                        let result = Ok(&vec![1; run.len as usize][..]);
                        todo.extend(actions(core, Event::ReadDone { io, result }));
                    }
                    _ => {}
                }
            }
            core.make_ready();
            todo.extend(performed(core));
        }
    };
    assert_eq!(heat_map(&mut core), vec![0; 256], "nobody had to leave");
    (0..256).for_each(|page| touch(&mut core, page));
    let table = &core.table;
    let state = |page: usize| table.state(PageNo(page as u64));
    let known: Vec<u8> = (0..256).map(|page| table.heat(PageNo(page))).collect();
    let states: Vec<_> = (0..256).map(state).collect();
    let has = |state| states.contains(&state);
    assert!(has(PageState::Stored) && has(PageState::Resident), "{:?}", core.table);
    for (page, told) in heat_map(&mut core).into_iter().enumerate() {
        let right = match (known[page], states[page]) {
            (0, PageState::Resident) => 1,
            (0, _) => 0,
            (known, _) => known + 3,
        };
        assert_eq!(told, right, "page {page}, {:?}, of which {} is known", states[page], known[page]);
    }
}

#[test]
fn only_what_is_tracked_is_scanned_and_what_leaves_is_told_wherever_it_was() {
    let blocks = |first: u64, count: u32| Run::new(PageNo(first * 512), count * 512);
    let mut core = Core::new(CoreConfig {
        pages: 5000,
        budget_frames: 5000,
        budget_min: 48,
        slots: 8192,
        blocks: 0,
        sampling: false,
        walk: WalkStep::default(),
    });
    let walk = |core: &mut Core, request: Request| {
        core.handle(Event::Request { ticket: Ticket(1), request });
        let (mut looks, mut answer) = (Vec::new(), None);
        loop {
            while let Some(action) = core.next_action() {
                match action {
                    Action::ArmTracking { run } => looks.push(run),
                    Action::ScanDirty { run } => {
                        looks.push(run);
                        core.handle(Event::Scanned { run, dirty: &[Run::one(run.start)] });
                    }
                    Action::EndTracking { run } => looks.push(run),
                    Action::Answer { answer: Ok(told), .. } => answer = Some(told),
                    _ => {}
                }
            }
            if !core.is_walking() {
                return (looks, answer.expect("it is answered"));
            }
            core.handle(Event::Step);
        }
    };
    // A page asks for its block.
    let (armed, told) = walk(&mut core, Request::SubscribeDirty(vec![Run::one(PageNo(600))]));
    let Response::Subscribed(id) = told else { panic!("{told:?}") };
    assert_eq!(armed, [blocks(1, 1)]);
    let more = vec![blocks(1, 2), blocks(7, 1), Run::one(PageNo(4999))];
    let (armed, _) = walk(&mut core, Request::TrackDirty(id, more));
    let last = Run::new(PageNo(9 * 512), 5000 - 9 * 512);
    assert_eq!(armed, [blocks(2, 1), blocks(7, 1), last], "the first is tracked already");
    core.dirty.departed(PageNo(5));
    let (scanned, told) = walk(&mut core, Request::CollectDirty(id));
    assert_eq!(scanned, [blocks(1, 2), blocks(7, 1), last]);
    let Response::Dirty(told) = told else { panic!("{told:?}") };
    assert_eq!(told.seen, [512, 7 * 512, 9 * 512].map(|page| Run::one(PageNo(page))));
    assert_eq!(told.departed, [Run::one(PageNo(5))]);
    let (ended, _) = walk(&mut core, Request::UnsubscribeDirty(id));
    assert_eq!(ended, scanned);
    ask(&mut core, Request::TrackDirty(id, vec![blocks(0, 9)]));
    let refused = actions(&mut core, Event::Step);
    assert!(matches!(refused[..], [Action::Answer { answer: Err(_), .. }]), "{refused:?}");
    let beyond = ask(&mut core, Request::SubscribeDirty(vec![blocks(9, 1)]));
    assert!(matches!(beyond[..], [Action::Answer { answer: Err(_), .. }]), "{beyond:?}");
}
