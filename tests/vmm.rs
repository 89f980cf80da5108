//! The reference guest on the real KVM.

#[macro_use]
extern crate testkit;

testkit::main!();

mod guest;

use std::ops::Range;
use std::time::{Duration, Instant};

use guest::{Guest, config, memory, uffd};
use testkit::{OrSkip, Reason};
use vmemd::vmm::{ReferenceMachine, RunState, VmmError, saved_config};

/// Pausing a machine takes a few ms. One that takes longer than this has waited for something.
const QUICKLY: Duration = Duration::from_secs(2);
/// Patterns that go round, on a working set that takes little time.
const ROUND_PATTERNS: [&str; 5] = [
    "rewrite:working-set=8M",
    "random:working-set=8M",
    "zipf:working-set=8M",
    "read:working-set=8M",
    "rewrite:working-set=4M,fill=none",
];

#[test]
fn every_workload_goes_round_without_a_mismatch() {
    for workload in ROUND_PATTERNS {
        for vcpus in [1, 4] {
            let mut guest = Guest::new("64M", vcpus, workload);
            assert_eq!(guest.machine.state(), RunState::Paused);
            guest.machine.start().unwrap();
            let counters = guest.wait("3 rounds", |counters| counters.rounds >= 3);
            assert_eq!((counters.mismatched_pages, counters.first_mismatch), (0, None), "{workload}");
            let pages = guest.data_pages();
            let filled = if workload.contains("none") { 0 } else { pages.end - pages.start };
            assert_eq!(counters.filled_pages, filled, "{workload}");
            assert!(counters.verified_pages >= 3 * (4 << 20) / 4096);
            assert_eq!(counters.rewritten_pages > 0, !workload.starts_with("read"), "{workload}");
        }
    }
}

#[test]
fn fill_and_idle_write_every_page_once() {
    for (workload, filled) in
        [("fill", None), ("idle:working-set=8M", Some(2048)), ("fill:fill=none", Some(0))]
    {
        let mut guest = Guest::new("64M", 2, workload);
        let pages = guest.data_pages();
        let filled = filled.unwrap_or(pages.end - pages.start);
        guest.machine.start().unwrap();
        guest.wait("the fill", |counters| counters.filled_pages >= filled);
        guest.machine.pause().unwrap();
        for (index, page) in pages.enumerate() {
            let expected = u32::from((index as u64) < filled);
            assert_eq!(guest.intact(page), Some(expected), "{workload}: page {page}");
        }
    }
}

#[test]
fn host_and_guest_agree_on_contents() {
    let mut guest = Guest::new("32M", 1, "rewrite:working-set=2M");
    guest.machine.start().unwrap();
    guest.wait("10 rounds", |counters| counters.rounds >= 10);
    guest.machine.pause().unwrap();
    let torn: Vec<u64> = guest.data_pages().filter(|page| guest.intact(*page).is_none()).collect();
    assert!(torn.len() <= 1, "a vCPU writes one page at a time: {torn:?}");
    let first = guest.data_pages().start;
    assert!(guest.generation(first) >= 11 && guest.generation(first + 512) == 1);
}

/// Damages memory of a paused guest and gives the pages that are then wrong.
type Damage = fn(&mut Guest, u64) -> Vec<u64>;

/// Lets a paused guest of one vCPU go on until it is at none of those pages: a page that it has half verified or
/// rewritten is no fair target of damage. It goes in order, so the ledger steps down where it is.
fn settle(guest: &mut Guest, pages: Range<u64>) {
    let same = |guest: &mut Guest| {
        let generation = guest.generation(pages.start - 1);
        pages.clone().all(|page| guest.generation(page) == generation)
    };
    while !same(guest) {
        let verified = guest.machine.counters().verified_pages;
        guest.machine.resume().unwrap();
        guest.wait("a batch of pages", |counters| counters.verified_pages > verified);
        guest.machine.pause().unwrap();
    }
}

#[test]
fn every_kind_of_damage_is_found() {
    let damages: [(&str, Damage); 6] = [
        ("one flipped bit", |guest, page| {
            let mut words = guest.page(page);
            words[511] ^= 1 << 63;
            guest.set_page(page, words);
            vec![page]
        }),
        ("an older version", |guest, page| {
            let old = guest.page(page);
            let before = guest.machine.counters().rounds;
            guest.machine.resume().unwrap();
            guest.wait("the page's rewriting", |counters| counters.rounds >= before + 2);
            guest.machine.pause().unwrap();
            settle(guest, page..page + 1);
            guest.set_page(page, old);
            vec![page]
        }),
        ("two pages swapped", |guest, page| {
            let (one, other) = (guest.page(page), guest.page(page + 1));
            guest.set_page(page, other);
            guest.set_page(page + 1, one);
            vec![page, page + 1]
        }),
        ("zeros", |guest, page| {
            guest.set_page(page, [0; 512]);
            vec![page]
        }),
        ("half a page from another generation", |guest, page| {
            let mut words = guest.page(page);
            let generation = guest.generation(page);
            let older = vmemd::vmm::page_content(page as u32, generation.wrapping_sub(1));
            words[256..].copy_from_slice(&older[256..]);
            guest.set_page(page, words);
            vec![page]
        }),
        ("a lost page of the ledger", |guest, _| {
            let pages = guest.data_pages();
            // The ledger's last page is that of the last 1024 pages of memory.
            let wrong = pages.end - 1024..pages.end;
            settle(guest, wrong.clone());
            guest.set_page(pages.start - 1, [0; 512]);
            wrong.collect()
        }),
    ];
    for (name, damage) in damages {
        let ledger = name.contains("ledger");
        let workload = if ledger { "rewrite" } else { "rewrite:working-set=4M" };
        let mut guest = Guest::new("32M", 1, workload);
        guest.machine.start().unwrap();
        guest.wait("a round", |counters| counters.rounds >= 1);
        guest.machine.pause().unwrap();
        let page = guest.data_pages().start + 500;
        settle(&mut guest, page..page + 2);
        let wrong = damage(&mut guest, page);
        guest.machine.resume().unwrap();
        let count = wrong.len() as u64;
        let found = guest.wait(name, |counters| counters.mismatched_pages >= count);
        if !ledger {
            assert_eq!(found.first_mismatch, Some(wrong[0]), "{name}");
        }
        let rounds = found.rounds;
        let later = guest.wait("rounds after it", |counters| counters.rounds >= rounds + 2);
        assert_eq!(later.mismatched_pages, count, "{name}: it is reported once, then the page is new");
    }
}

#[test]
fn a_reading_guest_finds_damage_too() {
    let mut guest = Guest::new("32M", 2, "read:working-set=4M");
    guest.machine.start().unwrap();
    guest.wait("a round", |counters| counters.rounds >= 1);
    guest.machine.pause().unwrap();
    let page = guest.data_pages().start + 77;
    guest.set_page(page, [1; 512]);
    guest.machine.resume().unwrap();
    let found = guest.wait("the mismatch", |counters| counters.mismatched_pages >= 1);
    assert_eq!(found.first_mismatch, Some(page));
}

#[test]
fn zipf_is_skewed_and_scattered() {
    let mut guest = Guest::new("64M", 1, "zipf:working-set=16M,theta=0.99");
    guest.machine.start().unwrap();
    guest.wait("20 rounds", |counters| counters.rounds >= 20);
    guest.machine.pause().unwrap();
    let pages = guest.data_pages();
    let mut touches: Vec<(u32, u64)> =
        (pages.start..pages.start + 4096).map(|page| (guest.generation(page) - 1, page)).collect();
    touches.sort_unstable_by(|a, b| b.cmp(a));
    let total: u64 = touches.iter().map(|(count, _)| u64::from(*count)).sum();
    let hottest: u64 = touches[..410].iter().map(|(count, _)| u64::from(*count)).sum();
    // By the law, a tenth of 4096 ranks gets 73 % of the touches at this skew.
    let share = hottest as f64 / total as f64;
    assert!((0.68..0.80).contains(&share), "the hottest tenth gets {share:.3}");
    let upper = touches[..410].iter().filter(|(_, page)| *page >= pages.start + 2048).count();
    assert!((150..260).contains(&upper), "{upper} of the 410 hottest pages in the upper half");
}

#[test]
fn a_saved_guest_goes_on_elsewhere() {
    for workload in
        ROUND_PATTERNS.into_iter().chain(["idle:working-set=4M", "rewrite:working-set=8M,rate=100M"])
    {
        let vcpus = 3;
        let mut guest = Guest::new("32M", vcpus, workload);
        guest.machine.start().unwrap();
        let idle = workload.starts_with("idle");
        // Some are moved amid the fill, some amid their rounds.
        for hop in 0..4 {
            let counters = guest.machine.counters();
            let progress =
                |counters: &vmemd::vmm::GuestCounters| counters.filled_pages + counters.verified_pages;
            let before = progress(&counters);
            guest.wait("progress", |now| (idle && now.filled_pages == 1024) || progress(now) >= before + 700);
            guest.machine.pause().unwrap();
            assert_eq!(guest.machine.state(), RunState::Paused);
            let state = guest.machine.save().unwrap();
            assert_eq!(saved_config(&state).unwrap(), config("32M", vcpus, workload));
            let saved = guest.machine.counters();
            let copy = guest.copy_memory();
            drop(guest);
            guest = Guest::restored(&state, copy);
            assert_eq!(guest.machine.counters(), saved, "{workload}, hop {hop}");
            guest.machine.resume().unwrap();
        }
        let rounds = guest.machine.counters().rounds;
        let end = guest.wait("rounds at the target", |counters| idle || counters.rounds >= rounds + 2);
        assert_eq!(end.mismatched_pages, 0, "{workload}");
    }
}

#[test]
fn pausing_is_quick_and_loses_no_kick() {
    for workload in ["rewrite:working-set=4M", "rewrite:working-set=4M,rate=4K", "idle:working-set=4M"] {
        for throttle in [0, 99] {
            let mut guest = Guest::new("32M", 4, workload);
            guest.machine.throttle(throttle);
            guest.machine.start().unwrap();
            let mut took: Vec<Duration> = (0..100)
                .map(|_| {
                    let start = Instant::now();
                    guest.machine.pause().unwrap();
                    let took = start.elapsed();
                    guest.machine.resume().unwrap();
                    took
                })
                .collect();
            guest.machine.pause().unwrap();
            // Half of them: others may keep the machine busy for a moment.
            took.sort_unstable();
            assert!(took[took.len() / 2] < QUICKLY, "{workload}: {took:?}");
            assert_eq!(guest.machine.counters().mismatched_pages, 0);
        }
    }
}

#[test]
fn the_rate_holds() {
    let mut guest = Guest::new("32M", 3, "random:working-set=4M,rate=40M,fill=working-set");
    guest.machine.start().unwrap();
    let first = guest.wait("the first page", |counters| counters.verified_pages > 0);
    let start = Instant::now();
    let wanted = 20 << 20;
    guest.wait("20 MiB", |now| (now.verified_pages - first.verified_pages) * 4096 >= wanted);
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(400), "20 MiB at 40 MiB/s took {took:?}");
}

#[test]
fn memory_goes_on_above_the_hole() {
    const HOLE_PAGE: u64 = (3 << 30) / 4096;
    for (vcpus, workload) in [(1, "random:fill=none"), (4, "rewrite:fill=none")] {
        let mut guest = Guest::new("5G", vcpus, workload);
        guest.machine.start().unwrap();
        let counters = guest.wait("100000 pages", |counters| counters.verified_pages >= 100_000);
        assert_eq!(counters.mismatched_pages, 0);
        guest.machine.pause().unwrap();
        let pages = guest.data_pages();
        assert_eq!(pages.end, (5 << 30) / 4096);
        let (mut below, mut above) = (0, 0);
        for page in pages {
            if guest.generation(page) > 0 {
                *if page < HOLE_PAGE { &mut below } else { &mut above } +=
                    u32::from(guest.intact(page).is_some());
            }
        }
        assert!(below > 1000 && above > 1000, "{workload}: {below} pages below the hole, {above} above");
    }
}

#[test]
fn memory_of_terabytes_costs_only_what_is_touched() {
    let mut guest = Guest::new("1T", 1, "rewrite:working-set=1M,fill=none");
    guest.machine.start().unwrap();
    let counters = guest.wait("3 rounds", |counters| counters.rounds >= 3);
    assert_eq!(counters.mismatched_pages, 0);
}

#[test]
fn a_page_that_cannot_be_provided_fails_the_guest() {
    let mut guest = Guest::new("32M", 1, "rewrite:working-set=4M");
    guest.machine.start().unwrap();
    guest.wait("a round", |counters| counters.rounds >= 1);
    guest.machine.pause().unwrap();
    let page = guest.data_pages().start + 500;
    // SAFETY: a page of this test's own mapping, which nothing reads from here on but the guest.
    let result = unsafe {
        let address = guest.memory.as_mut_ptr().add(page as usize * 4096);
        libc::mprotect(address.cast(), 4096, libc::PROT_NONE)
    };
    assert_eq!(result, 0);
    guest.machine.resume().unwrap();
    let reason = guest.wait_failure();
    assert!(reason.contains("vCPU 0") && reason.contains(&format!("page {page}")), "{reason}");
    assert!(matches!(guest.machine.resume(), Err(VmmError::Failed(_))));
    assert!(matches!(guest.machine.pause(), Err(VmmError::Failed(_))));
    assert!(matches!(guest.machine.save(), Err(VmmError::Failed(_))));
}

#[test]
fn a_poisoned_page_fails_the_guest() {
    let mut guest = Guest::new("32M", 2, "rewrite:working-set=4M,fill=none");
    let page = guest.data_pages().start + 300;
    let address = guest.memory.as_mut_ptr().wrapping_add(page as usize * 4096);
    let poison = uffd::poison(address).or_skip(Reason::Uffd);
    guest.machine.start().unwrap();
    let reason = guest.wait_failure();
    println!("{reason}");
    assert!(reason.contains(&format!("page {page}")) && reason.contains("poisoned"), "{reason}");
    drop(poison);
}

#[test]
fn faults_may_wait_for_another_thread() {
    let size = config("32M", 2, "rewrite:working-set=16M");
    let mut mapping = memory(size.memory_bytes);
    let server = uffd::Server::new(mapping.as_mut_ptr(), size.memory_bytes).or_skip(Reason::Uffd);
    // Dropped before the server: its vCPUs may wait for it.
    let mut guest = Guest::on(mapping, size);
    assert!(server.served() < 40, "setting up touches {} pages", server.served());
    guest.machine.start().unwrap();
    guest.wait("some filling", |counters| counters.filled_pages >= 512);
    server.stall(true);
    guest.wait("both vCPUs in unserved faults", |_| server.waiting() >= 2);
    // Nobody serves, and yet vCPUs leave the guest: a kick breaks the wait off. One of some tries is quick: others
    // may keep the machine busy for a moment.
    let mut fastest = Duration::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        guest.machine.pause().unwrap();
        fastest = fastest.min(start.elapsed());
        if fastest < QUICKLY {
            break;
        }
        let seen = server.waiting();
        guest.machine.resume().unwrap();
        guest.wait("both vCPUs in unserved faults again", |_| server.waiting() >= seen + 2);
    }
    assert!(fastest < QUICKLY, "pausing took {fastest:?}");
    let state = guest.machine.save().unwrap();
    guest.machine.resume().unwrap();
    server.stall(false);
    let end = guest.wait("a round", |counters| counters.rounds >= 1);
    assert_eq!(end.mismatched_pages, 0);
    drop(state);
}

#[test]
fn impossible_requests_say_what_to_do() {
    let mut memory = memory(64 << 20);
    let base = memory.as_mut_ptr();
    let error = |size, vcpus, workload| {
        ReferenceMachine::new(config(size, vcpus, workload), base).unwrap_err().to_string()
    };
    assert!(error("16M", 1, "fill").contains("at least 32M"));
    assert!(error("33M", 1, "fill").contains("multiple of 2M"));
    drop(Guest::new("32M", 1, "fill"));
    assert!(error("64M", 9, "fill").contains("choose 1 to 8"));
    assert!(error("64M", 0, "fill").contains("choose 1 to 8"));
    assert!(error("64M", 1, "fill:working-set=64M").contains("choose a smaller working set"));
    let odd = ReferenceMachine::new(config("32M", 1, "fill"), base.wrapping_add(8)).unwrap_err();
    assert!(matches!(odd, VmmError::Misaligned(_)));
}

#[test]
fn saving_and_restoring_refuse_what_does_not_fit() {
    let mut guest = Guest::new("32M", 1, "rewrite:working-set=4M");
    guest.machine.start().unwrap();
    assert!(matches!(guest.machine.save(), Err(VmmError::NotPaused)));
    guest.machine.pause().unwrap();
    let mut state = guest.machine.save().unwrap();
    let mut memory = memory(64 << 20);
    let base = memory.as_mut_ptr();
    let size = ReferenceMachine::restore_sized(&state, base, 64 << 20).unwrap_err();
    assert!(size.to_string().contains("has 32M of memory, but 64M"), "{size}");
    state[8] = 77;
    let version = ReferenceMachine::restore(&state, base).unwrap_err();
    assert!(version.to_string().contains("state version 77"), "{version}");
}
