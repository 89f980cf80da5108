//! The engine on the real kernel: userfaultfd, io_uring, a real file.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::sync::atomic::{AtomicU64, Ordering};

use common::{Vm, start};
use swapd::{CommandError, Engine, FaultKind, PAGE_SIZE, PageNo, Place, Run, StartError, StoreError};
use testkit::{Random, Reason, skip, wait_for};

const MIB: u64 = 1 << 20;

#[test]
fn four_times_the_budget_is_written_and_read_back() {
    let vm = start(64 * MIB, 16 * MIB);
    for round in 1..=3 {
        vm.write_all(round);
        assert_eq!(vm.mismatches(round), 0, "round {round}");
    }
    let stats = vm.stats();
    assert!(stats.frames_bytes <= 16 * MIB, "{stats:?}");
    assert!(stats.evict.written > 0 && stats.faults.store > 0 && stats.prefetch.used > 0, "{stats:?}");
    assert_eq!(stats.resident_bytes + stats.stored_bytes + stats.untouched_bytes, 64 * MIB);
}

#[test]
fn random_access_by_four_threads_finds_every_page_right() {
    let vm = start(48 * MIB, 16 * MIB);
    vm.write_all(1);
    let pages = vm.pages();
    let wrong = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (vm, wrong) = (&vm, &wrong);
            scope.spawn(move || {
                // Each thread has its own quarter, and reads and rewrites it in an order of its own.
                let mut random = Random(thread);
                let mut round = vec![1u64; (pages / 4) as usize];
                for _ in 0..6000 {
                    let nth = random.below(pages / 4);
                    let page = PageNo(thread * (pages / 4) + nth);
                    let bad = !vm.is_right(page, round[nth as usize]);
                    wrong.fetch_add(u64::from(bad), Ordering::Relaxed);
                    if random.below(2) == 0 {
                        round[nth as usize] += 1;
                        vm.write(page, round[nth as usize]);
                    }
                }
            });
        }
    });
    assert_eq!(wrong.into_inner(), 0);
}

#[test]
fn a_recording_has_every_fault_once() {
    let vm = start(64 * MIB, 16 * MIB);
    let handle = vm.handle();
    vm.write_all(1);
    assert!(handle.record_faults(true).unwrap().faults.is_empty(), "nothing from before");
    let before = vm.stats().faults;
    vm.write_all(2);
    let (mut faults, mut dropped) = (Vec::new(), 0);
    loop {
        let seen = handle.record_faults(true).unwrap();
        faults.extend(seen.faults);
        dropped += seen.dropped;
        if seen.left == 0 {
            break;
        }
    }
    let after = vm.stats().faults;
    assert_eq!((faults.len() as u64, dropped), (after.total - before.total, 0));
    assert!(
        faults.is_sorted_by_key(|fault| fault.at_us) && faults.iter().all(|fault| fault.page.0 < vm.pages())
    );
    let store = faults.iter().filter(|fault| fault.kind == FaultKind::Store).count() as u64;
    assert_eq!(store, after.store - before.store);
    assert_eq!(handle.record_faults(false).unwrap().left, 0);
    vm.write_all(3);
    assert!(handle.record_faults(true).unwrap().faults.is_empty(), "it was off");
}

#[test]
fn clean_pages_are_dropped_and_zero_pages_never_written() {
    let vm = start(64 * MIB, 16 * MIB);
    let handle = vm.handle();
    let all = Run::new(PageNo(0), vm.pages() as u32);
    // Reading alone leaves zeros behind.
    (0..vm.pages()).for_each(|page| assert!(vm.is_zero(PageNo(page))));
    handle.evict(all).unwrap();
    assert_eq!(vm.stats().evict.written, 0);
    assert_eq!(vm.stats().untouched_bytes, 64 * MIB);
    vm.write_all(1);
    handle.evict(all).unwrap();
    let written = vm.stats().evict.written;
    assert_eq!(vm.mismatches(1), 0);
    handle.evict(all).unwrap();
    assert_eq!(vm.stats().evict.written, written, "unchanged pages are not written again");
    assert_eq!(vm.stats().stored_bytes, 64 * MIB);
}

#[test]
fn the_budget_changes_under_load_both_ways() {
    let vm = start(96 * MIB, 32 * MIB);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=6 {
                vm.write_all(round);
                assert_eq!(vm.mismatches(round), 0, "round {round}");
            }
            done.store(true, Ordering::Release);
        });
        let handle = vm.handle();
        for step in 0.. {
            if done.load(Ordering::Acquire) {
                break;
            }
            let budget = [16, 64, 20, 96, 32][step % 5] * MIB;
            handle.set_budget(budget).unwrap();
            assert!(vm.stats().frames_bytes <= budget);
        }
    });
    let error = vm.handle().set_budget(MIB).unwrap_err();
    assert!(matches!(error, CommandError::BudgetTooSmall { .. }), "{error}");
    let error = vm.handle().set_budget(97 * MIB).unwrap_err();
    assert!(matches!(error, CommandError::BudgetTooLarge { .. }), "{error}");
}

/// Calls `work` while the host compacts its memory all the time: pages of the VM are on their way elsewhere now and
/// then.
fn while_the_host_compacts(work: impl FnOnce() + Send) {
    let compact = || std::fs::write("/proc/sys/vm/compact_memory", "1");
    if let Err(error) = compact() {
        skip(Reason::Root, format_args!("cannot have the host compact its memory: {error}"));
    }
    let before = pages_put_elsewhere();
    std::thread::scope(|scope| {
        let working = scope.spawn(work);
        while !working.is_finished() {
            let _gaps = with_gaps();
            compact().unwrap();
        }
    });
    if pages_put_elsewhere() == before {
        skip(Reason::Kernel, "the host found nothing to compact");
    }
}

/// Linux 6.18 says of some pages that they have not moved, and they have.
#[test]
fn memory_that_the_host_compacts_stays_right() {
    let vm = start(64 * MIB, 16 * MIB);
    while_the_host_compacts(|| {
        for round in 1..=12 {
            vm.write_all(round);
            assert_eq!(vm.mismatches(round), 0, "round {round}");
        }
    });
}

#[test]
fn tracking_misses_nothing_that_the_host_puts_elsewhere() {
    let vm = start(96 * MIB, 64 * MIB);
    let touched = 12 * 1024;
    while_the_host_compacts(|| {
        let handle = vm.handle();
        let dirty = handle.subscribe_dirty().unwrap();
        for round in 1..=60 {
            // What comes back gets frames from among the gaps.
            handle.evict(Run::new(PageNo(round * 1000 % touched), 1000)).unwrap();
            (0..touched).for_each(|page| vm.write(PageNo(page), round));
            let runs = dirty.collect().unwrap();
            let mut named = vec![false; touched as usize];
            runs.into_iter().flat_map(Run::indices).for_each(|page| named[page] = true);
            let missed: Vec<_> = (0..touched).filter(|page| !named[*page as usize]).collect();
            assert!(missed.is_empty(), "round {round}: {missed:?}");
        }
    });
}

/// Memory of which every other page is free: something to compact.
fn with_gaps() -> memmap2::MmapMut {
    let mut memory = memmap2::MmapMut::map_anon(64 * MIB as usize).expect("memory");
    for at in (0..memory.len()).step_by(PAGE_SIZE) {
        memory[at] = 1;
    }
    for at in (0..memory.len()).step_by(2 * PAGE_SIZE) {
        // SAFETY: it is private, and there is no reference to it.
        unsafe { memory.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, at, PAGE_SIZE) }
            .expect("it can be given back");
    }
    memory
}

/// Since the host was started.
fn pages_put_elsewhere() -> u64 {
    let counts = std::fs::read_to_string("/proc/vmstat").expect("the host's counts");
    let count = counts.lines().find_map(|line| line.strip_prefix("pgmigrate_success "));
    count.map_or(0, |count| count.parse().expect("a number"))
}

#[test]
fn given_back_memory_reads_as_zeros_and_frees_frames() {
    let vm = start(64 * MIB, 16 * MIB);
    vm.write_all(1);
    let run = Run::new(PageNo(1000), 9000);
    vm.handle().discard(run).unwrap();
    run.pages().for_each(|page| assert!(vm.is_zero(page), "{page}"));
    assert!((0..1000).chain(10_000..vm.pages()).all(|page| vm.is_right(PageNo(page), 1)));
    let beyond = Run::new(PageNo(vm.pages() - 1), 2);
    assert!(matches!(vm.handle().discard(beyond), Err(CommandError::OutOfRange(_))));
}

#[test]
fn tracking_names_every_written_page() {
    let vm = start(64 * MIB, 32 * MIB);
    vm.write_all(1);
    let handle = vm.handle();
    let dirty = handle.subscribe_dirty().unwrap();
    dirty.collect().unwrap();
    let touched: Vec<u64> = (0..vm.pages()).filter(|page| page % 37 == 5).collect();
    touched.iter().for_each(|page| vm.write(PageNo(*page), 2));
    // Some of them leave the guest before the scan sees them.
    handle.evict(Run::new(PageNo(0), 2048)).unwrap();
    let runs = dirty.collect().unwrap();
    let named = |page: u64| runs.iter().any(|run| run.contains(PageNo(page)));
    assert!(touched.iter().all(|page| named(*page)));
    let quiet = dirty.collect().unwrap();
    assert_eq!(quiet.iter().map(|run| u64::from(run.len)).sum::<u64>(), 0, "{quiet:?}");
    // Whoever joins is told what is written from then on, and takes nothing from the others; nor does its end.
    let other = handle.subscribe_dirty().unwrap();
    vm.write(PageNo(3000), 3);
    assert_eq!(other.collect().unwrap(), [Run::one(PageNo(3000))]);
    vm.write(PageNo(5000), 3);
    drop(other);
    assert_eq!(dirty.collect().unwrap(), [3000, 5000].map(|page| Run::one(PageNo(page))));
    drop(dirty);
}

#[test]
fn held_pages_stay_where_they_are() {
    let vm = start(64 * MIB, 16 * MIB);
    vm.write_all(1);
    let handle = vm.handle();
    let run = Run::new(PageNo(vm.pages() - 600), 600);
    let pieces = wait_for("nothing moves", || {
        let pieces = handle.hold(run).unwrap();
        pieces.iter().all(|piece| piece.place != Place::Moving).then_some(pieces)
    });
    for round in 2..=3 {
        (0..vm.pages() - 600).for_each(|page| vm.write(PageNo(page), round));
    }
    let after = handle.hold(run).unwrap();
    let memory = |pieces: &[swapd::Piece]| -> Vec<PageNo> {
        let held = pieces.iter().filter(|piece| piece.place == Place::Memory);
        held.flat_map(|piece| piece.run.pages()).collect()
    };
    assert!(!memory(&pieces).is_empty());
    assert!(memory(&pieces).iter().all(|page| memory(&after).contains(page)));
    handle.release(run).unwrap();
}

#[test]
fn prealloc_takes_the_frames_at_start() {
    let vm = Vm::start(64 * MIB, 32 * MIB, true);
    let frames = vm.stats().frames_bytes;
    assert!(frames > 28 * MIB && frames <= 32 * MIB, "{frames}");
    vm.write_all(1);
    assert_eq!(vm.mismatches(1), 0);
}

#[test]
fn samples_find_the_pages_in_use() {
    let vm = start(32 * MIB, 32 * MIB);
    vm.write_all(1);
    // A sample may have been out while that was written.
    let before = vm.heat();
    let hot = 0..vm.pages() / 4;
    let heat = wait_for("samples were touched", || {
        hot.clone().for_each(|page| assert!(vm.is_right(PageNo(page), 1)));
        (vm.stats().sampling.touched > 500).then(|| vm.heat())
    });
    let warm = |pages: std::ops::Range<u64>| {
        pages.filter(|page| heat[*page as usize] > before[*page as usize]).count()
    };
    let (inside, outside) = (warm(hot), warm(vm.pages() / 2..vm.pages()));
    assert!(
        inside > 500 && outside < inside / 10,
        "{inside} warm pages in use, {outside} of those not in use"
    );
}

/// A field of this address range's mappings, summed.
fn mapped_kib(vm: &common::Vm, field: &str) -> u64 {
    let within = vm.addresses();
    let smaps = std::fs::read_to_string("/proc/self/smaps").expect("proc is there");
    let mut counts = false;
    let lines = smaps.lines().filter_map(|line| {
        if let Some((from, _)) = line.split_once('-')
            && let Ok(from) = usize::from_str_radix(from, 16)
        {
            counts = within.contains(&from);
        }
        line.strip_prefix(field).filter(|_| counts)
    });
    lines.map(|rest| rest.trim_matches([':', ' ', 'k', 'B']).parse::<u64>().expect("a number")).sum()
}

/// Whether the page's frame is part of a huge page; None for a user who may not know.
fn is_of_huge_page(vm: &common::Vm, page: PageNo) -> Option<bool> {
    use std::os::unix::fs::FileExt;
    let word = |path: &str, nth: u64| {
        let mut bytes = [0; 8];
        std::fs::File::open(path).ok()?.read_exact_at(&mut bytes, nth * 8).ok()?;
        Some(u64::from_le_bytes(bytes))
    };
    let address = vm.addresses().start as u64 + page.offset();
    let frame = word("/proc/self/pagemap", address / 4096)? & ((1 << 55) - 1);
    // Flags 15 and 16: first, and another, of a compound page.
    (frame != 0).then(|| word("/proc/kpageflags", frame).map(|flags| flags >> 15 & 3 != 0))?
}

#[test]
fn memory_that_fits_is_in_huge_pages_and_samples_leave_them_whole() {
    const MEMORY: u64 = 64 * MIB;
    if swapd::huge_page_mode().is_none_or(|mode| mode == "never") {
        skip(Reason::Huge, "no transparent huge pages");
    }
    let vm = start(MEMORY, MEMORY);
    let blocks = vm.pages() / 512;
    let huge_blocks = || mapped_kib(&vm, "AnonHugePages") / 2048;
    // Half of the blocks at first sight of a read, half of a write.
    (0..blocks).step_by(2).for_each(|block| assert!(vm.is_zero(PageNo(block * 512 + 77))));
    vm.write_all(1);
    let had = huge_blocks();
    // Some of them may be out as samples.
    if had < blocks - 16 {
        skip(Reason::Huge, format_args!("the host had {had} huge pages, not {blocks}"));
    }
    assert_eq!(vm.stats().frames_bytes, MEMORY);
    wait_for("samples were touched", || {
        assert_eq!(vm.mismatches(1), 0);
        (vm.stats().sampling.touched > 8 * 512).then_some(())
    });
    // What has been touched is not out, until the next tick.
    wait_for("all huge pages are back", || {
        assert_eq!(vm.mismatches(1), 0);
        (huge_blocks() == blocks).then_some(())
    });

    // Of what is given back singly, the host has the frames: the rest is a huge page no more.
    let handle = vm.handle();
    assert_ne!(is_of_huge_page(&vm, PageNo(999)), Some(false));
    handle.discard(Run::new(PageNo(1000), 3)).unwrap();
    assert_ne!(is_of_huge_page(&vm, PageNo(999)), Some(true));
    assert!(vm.is_zero(PageNo(1001)) && vm.is_right(PageNo(999), 1) && vm.is_right(PageNo(1003), 1));
    // A block given back whole comes again as a huge page.
    wait_for("the frames of a block are given back", || {
        // It may be out as a sample: then they are kept for others.
        vm.is_zero(PageNo(2048));
        handle.discard(Run::new(PageNo(2048), 512)).unwrap();
        (vm.stats().frames_bytes == MEMORY - 2 * MIB).then_some(())
    });
    assert!(vm.is_zero(PageNo(2048)));
    wait_for("the other blocks are huge pages", || {
        // All of them, but for what was given back.
        vm.mismatches(1);
        (huge_blocks() == blocks - 1).then_some(())
    });

    // A smaller budget takes them to pieces; nothing of them is lost.
    handle.set_budget(MEMORY / 2).unwrap();
    vm.write_all(2);
    assert_eq!(vm.mismatches(2), 0);
    let stats = vm.stats();
    assert!(stats.frames_bytes <= MEMORY / 2 && stats.store.pages_written > 0, "{stats:?}");
    handle.set_budget(MEMORY).unwrap();
    // What has come back in single frames is put together again, also where it has been tracked.
    let dirty = handle.subscribe_dirty().unwrap();
    assert_eq!(vm.mismatches(2), 0);
    drop(dirty);
    wait_for("huge pages again", || {
        assert_eq!(vm.mismatches(2), 0);
        (huge_blocks() == blocks).then_some(())
    });
}

#[test]
fn a_store_that_lies_poisons_one_page_and_no_more() {
    use std::os::unix::fs::FileExt;
    let directory = testkit::directory_in(common::store_directory(), "lies");
    let vm = Vm::start_in(64 * MIB, 16 * MIB, directory.path(), false);
    vm.write_all(1);
    vm.handle().evict(Run::new(PageNo(0), vm.pages() as u32)).unwrap();
    let bad = PageNo(4321);
    let page = testkit::pages::Aligned::filled(0x5A);
    testkit::open_file_in(&directory).write_all_at(page.bytes(), bad.offset()).unwrap();
    // The kernel refuses to copy from a poisoned page, instead of ending this process by a signal.
    assert!(vm.is_unreadable(bad));
    assert!((0..vm.pages()).map(PageNo).filter(|page| *page != bad).all(|page| vm.is_right(page, 1)));
    assert_eq!(vm.stats().poisoned_pages, 1);
    assert!(vm.stats().store.checksum_mismatches >= 1);
}

#[test]
fn settings_that_cannot_be_are_refused_with_the_remedy() {
    let refused = |memory, budget, store: &str| {
        Engine::start(common::config(memory, budget, store.into(), false), Box::new(|_| {})).unwrap_err()
    };
    let cases = [
        (refused(64 * MIB, 8 * MIB, "/tmp"), "at least 16M"),
        (refused(64 * MIB, 65 * MIB, "/tmp"), "lower one or raise the other"),
        (refused(63 * MIB, 32 * MIB, "/tmp"), "multiple of 2 MiB"),
        (refused(1 << 50, 1 << 49, "/tmp"), "available"),
        (refused(64 * MIB, 32 * MIB, "/nonexistent"), "create the directory"),
        (refused(64 * MIB, 32 * MIB, "/etc/passwd"), "neither a directory nor a block device"),
        (refused(64 * MIB, 32 * MIB, "/proc"), "store"),
    ];
    for (error, remedy) in cases {
        assert!(error.to_string().contains(remedy), "{error}");
    }
    let refused = refused(1 << 42, 32 * MIB, "/tmp");
    assert!(matches!(refused, StartError::Store(StoreError::NoRoom { .. })), "no room for the rest");
}

#[test]
fn a_page_is_as_large_as_we_think() {
    // SAFETY: no pointers are involved.
    assert_eq!(unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize, PAGE_SIZE);
}
