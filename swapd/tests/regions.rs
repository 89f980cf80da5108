//! Guest memory that somebody else maps, in several regions, on the real kernel.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use common::{config, started, store_directory};
use swapd::{CommandError, Engine, EngineHandle, PAGE_SIZE, PageNo, Place, Run, StartError};

const MIB: u64 = 1 << 20;
/// Uneven, so that no border is a multiple of anything but 2 MiB.
const SIZES: [u64; 3] = [14 * MIB, 22 * MIB, 28 * MIB];
const MEMORY: u64 = 64 * MIB;
const BUDGET: u64 = 16 * MIB;
const PAGES: u64 = MEMORY / PAGE_SIZE as u64;
/// First pages of the second and the third region.
const BORDERS: [u64; 2] = [14 * 256, 36 * 256];
const WORDS: usize = PAGE_SIZE / 8;

/// An engine, and the owner of its memory.
///
/// In the address space the regions follow upon each other in another order than their pages, at addresses that are
/// multiples of 4 KiB alone: who runs over a border comes to a wrong page, or to a guard page.
struct Owner {
    /// Ends before its memory goes: fields are dropped in this order.
    engine: Engine,
    mapping: Mapping,
    bases: [usize; 3],
}

struct Mapping(usize);

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `Owner::start`; its engine has ended, and nobody else has addresses of it.
        unsafe { libc::munmap(self.0 as *mut libc::c_void, MAPPING) };
    }
}

const MAPPING: usize = MEMORY as usize + 8 * PAGE_SIZE;

/// Memory of this process that only raw pointers reach.
fn map(at: usize, len: usize, protection: i32, fixed: i32) -> usize {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | fixed;
    // SAFETY: with `MAP_FIXED` the range is part of an `Owner`'s mapping, which nothing refers to; else it is new.
    let mapped = unsafe { libc::mmap(at as *mut libc::c_void, len, protection, flags, -1, 0) };
    assert_ne!(mapped, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    mapped as usize
}

impl Owner {
    /// Ends the test on a host that cannot run an engine.
    fn start(prealloc: bool) -> Owner {
        let config = config(MEMORY, BUDGET, store_directory(), prealloc);
        let engine =
            started(Engine::start_external(config, &SIZES, Box::new(|notice| println!("{notice:?}"))));
        let mapping = map(0, MAPPING, libc::PROT_NONE, 0);
        // guard, region 1, region 2, guard, region 0, guards; the first region at an odd page.
        let first = mapping + PAGE_SIZE * if (mapping / PAGE_SIZE).is_multiple_of(2) { 1 } else { 2 };
        let second = first + SIZES[1] as usize;
        let bases = [second + SIZES[2] as usize + PAGE_SIZE, first, second];
        assert!(bases[1] / PAGE_SIZE % 2 == 1);
        let owner = Owner { engine, mapping: Mapping(mapping), bases };
        (0..3).for_each(|region| owner.map(region));
        owner
    }

    fn started(prealloc: bool) -> Owner {
        let owner = Owner::start(prealloc);
        assert!(!owner.handle().is_attached());
        (0..3).for_each(|region| owner.attach(region).unwrap());
        assert!(owner.handle().is_attached());
        owner
    }

    fn map(&self, region: usize) {
        map(self.bases[region], SIZES[region] as usize, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_FIXED);
    }

    fn handle(&self) -> EngineHandle {
        self.engine.handle()
    }

    fn attach(&self, region: usize) -> Result<(), StartError> {
        self.attach_at(region, self.bases[region])
    }

    fn attach_at(&self, region: usize, base: usize) -> Result<(), StartError> {
        // SAFETY: in this mapping, if anywhere, which only raw pointers refer to. It stays until the engine has ended.
        unsafe { self.handle().attach(region, base as *mut u8) }
    }

    /// Not by the engine's own table.
    fn address(&self, page: u64) -> usize {
        let region = BORDERS.iter().filter(|first| page >= **first).count();
        let first = if region == 0 { 0 } else { BORDERS[region - 1] };
        self.bases[region] + (page - first) as usize * PAGE_SIZE
    }

    fn word(&self, page: u64, nth: usize) -> *mut u64 {
        assert!(page < PAGES && nth < WORDS);
        (self.address(page) + nth * 8) as *mut u64
    }

    fn write(&self, page: u64, round: u64) {
        for nth in [0, 77, WORDS - 1] {
            // SAFETY: within a region that is mapped; volatile, for other threads and the engine work on it too.
            unsafe { self.word(page, nth).write_volatile(page << 32 | round << 16 | nth as u64) };
        }
    }

    fn is_right(&self, page: u64, round: u64) -> bool {
        [0, 77, WORDS - 1].into_iter().all(|nth| {
            // SAFETY: as above.
            unsafe { self.word(page, nth).read_volatile() == page << 32 | round << 16 | nth as u64 }
        })
    }

    fn is_zero(&self, page: u64) -> bool {
        (0..WORDS).all(|nth| {
            // SAFETY: as above.
            unsafe { self.word(page, nth).read_volatile() == 0 }
        })
    }

    fn write_all(&self, round: u64) {
        (0..PAGES).for_each(|page| self.write(page, round));
    }

    fn assert_right(&self, pages: impl IntoIterator<Item = u64>, round: u64) {
        let wrong: Vec<_> = pages.into_iter().filter(|page| !self.is_right(*page, round)).collect();
        assert!(wrong.is_empty(), "{} wrong pages of round {round}, first {:?}", wrong.len(), wrong.first());
    }
}

fn all() -> Run {
    Run::new(PageNo(0), PAGES as u32)
}

fn count(runs: &[Run]) -> u64 {
    runs.iter().map(|run| u64::from(run.len)).sum()
}

#[test]
fn threads_find_all_pages_right_while_the_budget_changes() {
    let owner = Owner::started(false);
    std::thread::scope(|scope| {
        for nth in 0..4 {
            let owner = &owner;
            // Each has every fourth page, so that all of them work on both sides of each border.
            let mine = move || (nth..PAGES).step_by(4);
            scope.spawn(move || {
                for round in 1..=3 {
                    mine().for_each(|page| owner.write(page, round));
                    owner.assert_right(mine(), round);
                }
            });
        }
        let handle = owner.handle();
        for budget in [64, 20, 40, 16].into_iter().cycle().take(12) {
            handle.set_budget(budget * MIB).unwrap();
            assert!(handle.stats().unwrap().frames_bytes <= budget * MIB);
        }
    });
    owner.assert_right(0..PAGES, 3);
    let stats = owner.handle().stats().unwrap();
    assert_eq!(stats.resident_bytes + stats.stored_bytes + stats.untouched_bytes, MEMORY);
}

#[test]
fn runs_across_borders_are_evicted_and_given_back() {
    let owner = Owner::started(false);
    let handle = owner.handle();
    // With a frame for each page, the regions' last and first pages are resident together.
    handle.set_budget(MEMORY).unwrap();
    owner.write_all(1);
    assert_eq!(count(&handle.resident_map().unwrap()), PAGES);
    handle.evict(all()).unwrap();
    assert_eq!(handle.stats().unwrap().stored_bytes, MEMORY);
    owner.assert_right(0..PAGES, 1);
    let given = Run::new(PageNo(BORDERS[0] - 700), (BORDERS[1] - BORDERS[0]) as u32 + 1400);
    // One half of it in memory, the other in the store.
    handle.evict(given.part(0, given.len / 2)).unwrap();
    handle.discard(given).unwrap();
    let within = |page: &u64| given.contains(PageNo(*page));
    owner.assert_right((0..PAGES).filter(|page| !within(page)), 1);
    assert_eq!(handle.stats().unwrap().untouched_bytes, given.bytes() as u64);
    let not_zero: Vec<_> = (0..PAGES).filter(within).filter(|page| !owner.is_zero(*page)).collect();
    assert!(not_zero.is_empty(), "{not_zero:?}");
}

#[test]
fn tracking_names_pages_written_on_either_side_of_a_border() {
    let owner = Owner::started(false);
    let handle = owner.handle();
    handle.set_budget(MEMORY).unwrap();
    owner.write_all(1);
    let dirty = handle.subscribe_dirty().unwrap();
    dirty.collect().unwrap();
    let written: Vec<u64> =
        BORDERS.iter().flat_map(|border| [border - 9, border - 1, *border, border + 5]).collect();
    written.iter().for_each(|page| owner.write(*page, 2));
    let named: Vec<u64> =
        dirty.collect().unwrap().iter().flat_map(|run| run.pages()).map(|page| page.0).collect();
    assert_eq!(named, written);
    // And of memory that left the guest or was given back meanwhile.
    let left = Run::new(PageNo(BORDERS[0] - 100), 200);
    handle.evict(left).unwrap();
    handle.discard(Run::new(PageNo(BORDERS[1] - 3), 6)).unwrap();
    assert_eq!(count(&dirty.collect().unwrap()), 206);
    assert_eq!(dirty.collect().unwrap(), []);
}

#[test]
fn before_it_is_attached_memory_is_untouched() {
    let owner = Owner::start(false);
    let handle = owner.handle();
    let dirty = handle.subscribe_dirty().unwrap();
    handle.evict(all()).unwrap();
    handle.discard(all()).unwrap();
    let pieces = handle.hold(all()).unwrap();
    assert!(pieces.iter().all(|piece| piece.place == Place::Zero), "{pieces:?}");
    handle.release(all()).unwrap();
    assert_eq!(count(&dirty.collect().unwrap()), PAGES, "what was given back");
    assert_eq!(handle.resident_map().unwrap(), []);
    let refused = handle.start_receiving_async(vec![0; PAGES as usize]).blocking_recv().unwrap();
    assert!(matches!(refused, Err(CommandError::NotNow(_))), "{refused:?}");
    // What was there before is dropped, and the region works without the others.
    let second = || BORDERS[0]..BORDERS[1];
    second().step_by(100).for_each(|page| owner.write(page, 9));
    owner.attach(1).unwrap();
    assert!(second().all(|page| owner.is_zero(page)));
    second().for_each(|page| owner.write(page, 1));
    let written = dirty.collect().unwrap();
    assert!(second().all(|page| written.iter().any(|run| run.contains(PageNo(page)))), "{written:?}");
    drop(dirty);
    handle.evict(all()).unwrap();
    assert_eq!(handle.stats().unwrap().stored_bytes, SIZES[1]);
    handle.discard(Run::new(PageNo(BORDERS[0] - 10), 20)).unwrap();
    owner.attach(2).unwrap();
    owner.attach(0).unwrap();
    assert!(handle.is_attached());
    assert!((BORDERS[0] - 10..BORDERS[0] + 10).all(|page| owner.is_zero(page)));
    owner.assert_right(BORDERS[0] + 10..BORDERS[1], 1);
    owner.write_all(2);
    owner.assert_right(0..PAGES, 2);
}

#[test]
fn addresses_and_pages_are_found_both_ways() {
    let owner = Owner::started(false);
    let handle = owner.handle();
    for page in [0, BORDERS[0] - 1, BORDERS[0], BORDERS[1] - 1, BORDERS[1], PAGES - 1] {
        let address = owner.address(page) as *mut u8;
        assert_eq!(handle.runs_in(address, PAGE_SIZE), [Run::new(PageNo(page), 1)]);
        assert_eq!(handle.page_address(PageNo(page)), address);
    }
    assert_eq!(handle.runs_in(owner.mapping.0 as *const u8, PAGE_SIZE), []);
    // The second and the third region follow upon each other in the address space as well.
    let from = owner.address(BORDERS[1] - 2) + 1;
    let found = handle.runs_in(from as *const u8, 5 * PAGE_SIZE);
    assert_eq!(found, [Run::new(PageNo(BORDERS[1] - 1), 1), Run::new(PageNo(BORDERS[1]), 3)]);
}

#[test]
fn what_cannot_be_attached_is_refused_with_the_reason() {
    let owner = Owner::start(false);
    owner.attach(0).unwrap();
    let elsewhere = map(0, SIZES[1] as usize + PAGE_SIZE, libc::PROT_READ | libc::PROT_WRITE, 0);
    // SAFETY: a mapping of this test alone, to which nothing refers; its first half is unmapped, nothing else.
    unsafe { libc::munmap(elsewhere as *mut libc::c_void, SIZES[1] as usize / 2) };
    let cases = [
        (owner.attach(0), "attached already"),
        (owner.attach_at(3, owner.bases[1]), "no region 3"),
        (owner.attach_at(1, owner.bases[1] + 8), "no page's address"),
        (owner.attach_at(1, 0), "no page's address"),
        (owner.attach_at(1, owner.bases[0] - PAGE_SIZE), "overlaps"),
        (owner.attach_at(1, owner.bases[0] + SIZES[0] as usize - PAGE_SIZE), "overlaps"),
        (owner.attach_at(1, elsewhere), "map all of them first"),
    ];
    for (result, reason) in cases {
        let error = result.expect_err(reason).to_string();
        assert!(error.contains(reason), "{error}");
    }
    // Nothing of that is in the way of the right ones.
    owner.attach(1).unwrap();
    owner.attach(2).unwrap();
    owner.write_all(1);
    owner.assert_right(0..PAGES, 1);
    let refused = |sizes: &[u64]| {
        let config = config(MEMORY, BUDGET, store_directory(), false);
        Engine::start_external(config, sizes, Box::new(|_| {})).unwrap_err().to_string()
    };
    assert!(refused(&[32 * MIB, 30 * MIB]).contains("give each of its regions once"));
    assert!(refused(&[33 * MIB, 31 * MIB]).contains("give each of its regions once"));
    assert!(refused(&[64 * MIB - 100]).contains("multiple of 4 KiB"));
    assert!(refused(&[64 * MIB, 0]).contains("multiple of 4 KiB"));
    assert!(refused(&[]).contains("give each of its regions once"));
}

#[test]
fn frames_are_taken_when_a_region_is_attached() {
    let owner = Owner::start(true);
    let handle = owner.handle();
    let frames = || handle.stats().unwrap().frames_bytes;
    assert_eq!(frames(), 0);
    owner.attach(0).unwrap();
    let first = frames();
    assert!(first > 12 * MIB && first <= SIZES[0], "{first}");
    owner.attach(1).unwrap();
    owner.attach(2).unwrap();
    assert!(frames() > 14 * MIB && frames() <= BUDGET, "{}", frames());
    owner.write_all(1);
    owner.assert_right(0..PAGES, 1);
}

/// None is a multiple of 2 MiB: a page, all of a block but a page, and a few blocks and a half.
const ODD: [u64; 3] = [PAGE_SIZE as u64, 2 * MIB - PAGE_SIZE as u64, 29 * MIB];
const ODD_MEMORY: u64 = (2 + 2 + 30) * MIB;
const ODD_PAGES: u64 = 1 + 511 + 29 * 256;
/// Page numbers that no region has.
const NOBODYS: [(u64, u32); 3] = [(1, 511), (1023, 1), (1024 + 29 * 256, 256)];

#[test]
fn regions_of_any_number_of_pages_work_to_their_last_page_and_no_further() {
    const GUARD: u8 = 0xA5;
    for budget in [16 * MIB, ODD_PAGES * PAGE_SIZE as u64, ODD_MEMORY] {
        let config = config(ODD_MEMORY, budget, store_directory(), false);
        let engine = started(Engine::start_external(config, &ODD, Box::new(|_| {})));
        let handle = engine.handle();
        // Each with 4 MiB of somebody else's memory behind it, which has content.
        let bases = ODD.map(|bytes| {
            let behind = 4 * MIB as usize;
            let mapping =
                map(0, bytes as usize + behind + 2 * MIB as usize, libc::PROT_READ | libc::PROT_WRITE, 0);
            let base = mapping.next_multiple_of(2 * MIB as usize);
            // SAFETY: within the mapping, which only this test has.
            unsafe { std::ptr::write_bytes((base + bytes as usize) as *mut u8, GUARD, behind) };
            base
        });
        // A guest that is at work in one region before the next is there.
        let words = |region: usize, round: u64, write: bool| {
            (0..ODD[region] / PAGE_SIZE as u64).all(|page| {
                let word = (bases[region] + page as usize * PAGE_SIZE) as *mut u64;
                let right = (region as u64) << 48 | page << 16 | round;
                // SAFETY: within the region; volatile, for the engine works on it too.
                unsafe {
                    if write {
                        word.write_volatile(right);
                    }
                    word.read_volatile() == right
                }
            })
        };
        for (region, base) in bases.into_iter().enumerate() {
            // SAFETY: just mapped, longer than the region; it stays until the process ends.
            unsafe { handle.attach(region, base as *mut u8) }.unwrap();
            assert!(words(region, 1, true));
        }
        assert!((0..3).all(|region| words(region, 1, false)), "budget {budget}");
        let stats = handle.stats().unwrap();
        let all = ODD_PAGES * PAGE_SIZE as u64;
        assert_eq!(stats.memory_bytes, ODD_MEMORY);
        assert_eq!(stats.untouched_bytes, ODD_MEMORY - all);
        assert!(stats.frames_bytes <= budget.min(all), "{stats:?}");
        if budget >= all {
            assert_eq!(stats.resident_bytes, all, "all of it fits, to the byte");
        }
        let dirty = handle.subscribe_dirty().unwrap();
        dirty.collect().unwrap();
        assert!((0..3).all(|region| words(region, 2, true)));
        let written = count(&dirty.collect().unwrap());
        assert!(written >= ODD_PAGES, "{written}");
        drop(dirty);
        let everything = Run::new(PageNo(0), (ODD_MEMORY / PAGE_SIZE as u64) as u32);
        for (start, len) in NOBODYS {
            let pieces = handle.hold(Run::new(PageNo(start), len)).unwrap();
            assert!(pieces.iter().all(|piece| piece.place == Place::Zero), "{pieces:?}");
            handle.release(Run::new(PageNo(start), len)).unwrap();
        }
        handle.evict(everything).unwrap();
        assert_eq!(handle.stats().unwrap().stored_bytes, all);
        assert!((0..3).all(|region| words(region, 2, false)));
        handle.discard(everything).unwrap();
        assert_eq!(handle.stats().unwrap().untouched_bytes, ODD_MEMORY);
        for (base, bytes) in bases.iter().zip(ODD) {
            let behind = (base + bytes as usize) as *const u8;
            // SAFETY: memory behind the region, mapped above.
            let kept = (0..4 * MIB as usize).all(|at| unsafe { behind.add(at).read_volatile() } == GUARD);
            assert!(kept, "memory behind a region was touched");
        }
    }
}

/// A source that sends content for pages that are nobody's.
#[test]
fn nothing_arrives_where_there_is_no_memory() {
    let config = config(ODD_MEMORY, 16 * MIB, store_directory(), false);
    let engine = started(Engine::start_external(config, &ODD, Box::new(|_| {})));
    let handle = engine.handle();
    for (region, bytes) in ODD.into_iter().enumerate() {
        let base = map(0, bytes as usize, libc::PROT_READ | libc::PROT_WRITE, 0);
        // SAFETY: just mapped, and stays until the process ends.
        unsafe { handle.attach(region, base as *mut u8) }.unwrap();
    }
    let pages = ODD_MEMORY / PAGE_SIZE as u64;
    handle.start_receiving_async(vec![0; pages as usize]).blocking_recv().unwrap().unwrap();
    for (start, len) in NOBODYS {
        let page = PageNo(start + u64::from(len) - 1);
        let slots = handle.grant_frames_async(1).blocking_recv().unwrap().unwrap();
        let sums = vec![0; 1];
        let arrival = swapd::ArrivedRun { run: Run::new(page, 1), slots, sums, again: false };
        let refused = handle.arrive_async(arrival).blocking_recv().unwrap();
        assert!(matches!(refused, Err(CommandError::OutOfRange(at)) if at == page), "{refused:?}");
        handle.return_frames_async(slots).blocking_recv().unwrap().unwrap();
        let refused = handle.arrive_poisoned_async(Run::new(page, 1)).blocking_recv().unwrap();
        assert!(matches!(refused, Err(CommandError::OutOfRange(at)) if at == page), "{refused:?}");
    }
    // That they are empty, it may say.
    handle.arrive_zero_async(Run::new(PageNo(0), pages as u32)).blocking_recv().unwrap().unwrap();
    let placed = handle.finish_receiving_async().blocking_recv().unwrap().unwrap();
    assert_eq!((placed.pages_zero, placed.pages_ram), (pages, 0));
}
