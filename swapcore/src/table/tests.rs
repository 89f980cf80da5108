//! The page table's counts, and what it refuses.

use super::*;

#[test]
fn every_transition_not_listed_panics() {
    for from in ALL_STATES {
        for to in ALL_STATES {
            let mut table = PageTable::new(1);
            table.entries[0] = from as u16;
            table.counts = [1; STATES];
            table.leaving[0] = 1;
            table.blocks[0].resident = 1;
            table.regions[0] = 1;
            let legal = LEGAL.contains(&(from, to));
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| table.set(PageNo(0), to)));
            assert_eq!(done.is_ok(), legal, "{from:?} -> {to:?}");
        }
    }
}

#[test]
fn heat_halves_each_epoch_and_flags_stay() {
    let mut table = PageTable::new(1024);
    table.put(PageNo(3), Flag::Held, true);
    table.set_heat(PageNo(3), 200);
    table.next_epoch();
    assert_eq!(table.heat(PageNo(3)), 100);
    table.warm(PageNo(4), 1);
    assert_eq!((table.heat(PageNo(3)), table.heat(PageNo(4))), (100, 1));
    table.next_epoch();
    table.next_epoch();
    assert_eq!((table.heat(PageNo(3)), table.heat(PageNo(4))), (25, 0));
    assert!(table.has(PageNo(3), Flag::Held) && !table.has(PageNo(3), Flag::Writing));
    assert_eq!(table.state(PageNo(3)), Untouched);
}

#[test]
fn what_is_said_of_a_state_ends_with_it_and_is_not_taken_for_what_is_said_of_another() {
    let mut table = PageTable::new(1);
    let page = PageNo(0);
    table.put(page, Flag::InStore, true);
    let said = |table: &PageTable| {
        let flags = [Flag::Prefetched, Flag::Pinned].map(|flag| table.has(page, flag));
        (flags, table.pinned(), table.has(page, Flag::InStore))
    };
    [Arriving, Standby].into_iter().for_each(|state| table.set(page, state));
    table.put(page, Flag::Prefetched, true);
    table.put(page, Flag::Pinned, false);
    assert_eq!(said(&table), ([true, false], 0, true), "to let go of a page that has left says nothing");
    [Arriving, Resident].into_iter().for_each(|state| table.set(page, state));
    assert_eq!(said(&table), ([false, false], 0, true));
    (0..2).for_each(|_| table.put(page, Flag::Pinned, true));
    table.put(page, Flag::Prefetched, false);
    assert_eq!(said(&table), ([false, true], 1, true), "counted once");
    [Leaving, Standby].into_iter().for_each(|state| table.set(page, state));
    assert_eq!(said(&table), ([false, false], 0, true));
    let wrong = std::panic::AssertUnwindSafe(|| table.put(page, Flag::Pinned, true));
    assert!(std::panic::catch_unwind(wrong).is_err(), "what has left is not pinned");
}

#[test]
fn adopted_pages_are_counted_as_if_they_had_come_one_by_one() {
    let pages = 3 << 18;
    let run = Run::new(PageNo((1 << 18) - 700), 1500);
    let mut table = PageTable::new(pages);
    table.put(run.start, Flag::Held, true);
    assert_eq!(table.next_origin_block(0), None);
    table.adopt(run);
    let (first, last) = (run.start.block(), PageNo(run.end().0 - 1).block());
    let found = [0, first + 1, last + 1].map(|from| table.next_origin_block(from));
    assert_eq!(found, [Some(first), Some(first + 1), None]);
    assert_eq!(
        (table.count(Stored), table.origin_pages(), table.count(Untouched)),
        (1500, 1500, pages - 1500)
    );
    assert_eq!(table.transitions()[Untouched as usize][Stored as usize], 1500);
    assert!(table.has(run.start, Flag::Held) && !table.may_adopt(Run::one(run.start)));
    assert_eq!(table.stored_at(run.start), TierId::ORIGIN);
    assert!(table.has_stored_at(last, TierId::ORIGIN) && !table.has_stored_at(last, TierId::STORE));
    // Nothing of the block is at its home.
    table.set_home(last, TierId(1));
    let at_origin = std::panic::AssertUnwindSafe(|| table.put(run.start, Flag::InStore, false));
    assert!(std::panic::catch_unwind(at_origin).is_err(), "it is at the origin still");
    for page in run.pages() {
        table.unstore(page);
        table.set(page, Untouched);
    }
    assert_eq!((table.origin_pages(), table.next_origin_block(0), table.count(Untouched)), (0, None, pages));
    assert_eq!(table.stored_blocks(0).next(), None);
    let nothing = std::panic::AssertUnwindSafe(|| table.put(run.start, Flag::Origin, true));
    assert!(std::panic::catch_unwind(nothing).is_err(), "nothing is stored of it");
}

#[test]
fn runs_stop_at_other_states_and_bounds() {
    let mut table = PageTable::new(600);
    table.set(PageNo(10), Arriving);
    assert_eq!(
        table.run_around(PageNo(12), Untouched, table.block_of(PageNo(12))),
        Run::new(PageNo(11), 501)
    );
    assert_eq!(table.block_of(PageNo(599)), Run::new(PageNo(512), 88));
}

#[test]
fn what_fills_a_block_up_is_no_memory() {
    let short = vec![Run::new(PageNo(0), 1), Run::new(PageNo(1024), 511)];
    let table = PageTable::new(1536).with_short_blocks(short.clone());
    assert_eq!((table.pages(), table.memory_pages()), (1536, 1 + 512 + 511));
    assert_eq!(table.block_of(PageNo(0)), short[0]);
    assert_eq!(table.block_of(PageNo(600)), Run::new(PageNo(512), 512));
    assert_eq!(table.block_of(PageNo(1100)), short[1]);
    for (start, len, found) in [
        (0, 1, None),
        (0, 2, Some(1)),
        (400, 112, Some(400)),
        (512, 1023, None),
        (512, 1024, Some(1535)),
        (0, 1536, Some(1)),
    ] {
        assert_eq!(table.first_of_nobody(Run::new(PageNo(start), len)), found.map(PageNo), "{start}");
    }
}
