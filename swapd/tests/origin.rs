//! An engine whose pages are at an origin, on the real kernel: each comes when it is touched and goes home only when it
//! has changed, and the image stays as it was.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
#[path = "common/image.rs"]
mod image;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Vm, config, start, started, store_directory};
use image::{Image, ROUND};
use swapd::{
    Adopted, CommandError, Engine, LayerOf, Origin, OriginError, OriginLayer, PAGE_SIZE, PageNo, Run,
    StartError, TierId,
};
use testkit::{Random, Reason, skip};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const PAGES: u64 = 64 * MIB / PAGE_SIZE as u64;

/// What checkpoints have: much, with a large hole and some small ones.
fn mostly(page: PageNo) -> bool {
    !(5000..7000).contains(&page.0) && !page.0.is_multiple_of(301)
}

/// 64 MiB in 16 MiB, with all that is in the image adopted.
fn restored(image: &Image, encrypt: bool) -> Vm {
    restored_from(image, image.origin(), encrypt)
}

fn restored_from(image: &Image, origin: Origin, encrypt: bool) -> Vm {
    let mut config = config(image.pages * PAGE_SIZE as u64, 16 * MIB, store_directory(), false);
    (config.origin, config.store.encrypt) = (Some(origin), encrypt);
    let notify = Box::new(|notice| println!("notice: {notice:?}"));
    let vm = Vm::of(started(Engine::start(config, notify)));
    image.adopt_into(&vm.handle());
    vm
}

fn all(vm: &Vm) -> Run {
    Run::new(PageNo(0), vm.pages() as u32)
}

/// What the image has, and zeros where it has nothing.
fn is_as_restored(vm: &Vm, image: &Image, page: PageNo) -> bool {
    if image.has(page) { vm.is_right(page, ROUND) } else { vm.is_zero(page) }
}

fn assert_as_restored(vm: &Vm, image: &Image) {
    for page in (0..vm.pages()).map(PageNo) {
        assert!(is_as_restored(vm, image, page), "{page} is wrong");
    }
}

#[test]
fn pages_are_read_from_their_layer_and_only_what_has_changed_goes_home() {
    // The store's key is none of the origin's business, nor the other way round.
    for (files, encrypt, own_key) in
        [(1, false, false), (3, false, false), (3, true, false), (3, true, true), (1, false, true)]
    {
        let directory = testkit::directory_in(store_directory(), "origin");
        let image = match own_key {
            true => Image::encrypted(directory.path(), PAGES, files, mostly),
            false => Image::new(directory.path(), PAGES, files, mostly),
        };
        let before = image.digest();
        let vm = restored(&image, encrypt);
        let at_origin = || vm.stats().origin_bytes / PAGE_SIZE as u64;
        assert_eq!(at_origin(), image.count());
        // In order, and once more at random.
        assert_as_restored(&vm, &image);
        let mut random = Random(1);
        for _ in 0..5000 {
            let page = PageNo(random.below(PAGES));
            assert!(is_as_restored(&vm, &image, page), "{page} is wrong");
        }
        vm.handle().evict(all(&vm)).unwrap();
        let stats = vm.stats();
        assert!(stats.frames_bytes <= 16 * MIB, "{stats:?}");
        assert_eq!(stats.store.pages_written, 0, "unchanged pages are written nowhere");
        assert_eq!((stats.store.used_bytes, at_origin()), (0, image.count()));
        // Every third page gets another content, those in the holes as well.
        let rewritten = || (0..PAGES).step_by(3).map(PageNo);
        rewritten().for_each(|page| vm.write(page, 2));
        vm.handle().evict(all(&vm)).unwrap();
        let left = image.count() - rewritten().filter(|page| image.has(*page)).count() as u64;
        assert_eq!(at_origin(), left);
        let stats = vm.stats();
        assert_eq!(stats.store.used_bytes / PAGE_SIZE as u64, PAGES.div_ceil(3));
        for page in (0..PAGES).map(PageNo) {
            let right = match page.0.is_multiple_of(3) {
                true => vm.is_right(page, 2),
                false => is_as_restored(&vm, &image, page),
            };
            assert!(right, "{page} is wrong, of {files} files");
        }
        let stats = vm.stats();
        assert_eq!(
            (stats.poisoned_pages, stats.store.checksum_mismatches, stats.store.read_errors),
            (0, 0, 0)
        );
        assert!(image.digest() == before, "the image has changed");
    }
}

#[test]
fn a_layer_through_the_page_cache_is_as_good() {
    let directory = testkit::directory_in(store_directory(), "buffered");
    let image = Image::new(directory.path(), PAGES, 2, mostly);
    let vm = restored_from(&image, image.buffered_origin(), false);
    assert_as_restored(&vm, &image);
    assert_eq!(vm.stats().store.pages_written, 0);
}

#[test]
fn pages_that_are_given_back_are_zeros_and_lost_ones_are_lost() {
    let directory = testkit::directory_in(store_directory(), "back");
    let image = Image::new(directory.path(), PAGES, 1, |page| page.0 < 4096);
    let vm = restored(&image, false);
    let handle = vm.handle();
    let lost = Run::new(PageNo(5000), 3);
    handle.adopt_poisoned(lost).unwrap();
    assert!(lost.pages().all(|page| vm.is_unreadable(page)));
    assert_eq!(vm.stats().lost.iter().map(|run| (run.first, run.pages)).collect::<Vec<_>>(), [(5000, 3)]);
    let back = Run::new(PageNo(100), 1000);
    vm.touch(back.start);
    handle.discard(back).unwrap();
    handle.discard(lost).unwrap();
    assert!(back.pages().chain(lost.pages()).all(|page| vm.is_zero(page)));
    assert_eq!(vm.stats().origin_bytes, 3096 * PAGE_SIZE as u64);
    for page in (0..100).chain(1100..4096).map(PageNo) {
        assert!(vm.is_right(page, ROUND), "{page} is wrong");
    }
}

#[test]
fn what_cannot_be_adopted_is_refused() {
    let directory = testkit::directory_in(store_directory(), "refused");
    let image = Image::new(directory.path(), PAGES, 2, mostly);
    let adopted = |run: Run| Adopted { run, sums: image.sums_of(run) };
    let bare = start(64 * MIB, 16 * MIB);
    let here = Run::new(PageNo(10), 20);
    let error = bare.handle().adopt(adopted(here)).unwrap_err();
    assert!(matches!(error, CommandError::NotNow(text) if text.contains("no origin")), "{error}");
    assert!(matches!(bare.handle().take_home(1), Err(CommandError::NotNow(_))));
    assert!(matches!(bare.handle().fetch_origin(here), Err(CommandError::NotNow(_))));
    let vm = restored(&image, false);
    for run in [here, Run::new(PageNo(4990), 20)] {
        let error = vm.handle().adopt(adopted(run)).unwrap_err();
        assert!(matches!(error, CommandError::NotNow(_)), "{error}");
    }
    let beyond = Run::new(PageNo(PAGES - 1), 2);
    let error = vm.handle().adopt(Adopted { run: beyond, sums: vec![1; 2] }).unwrap_err();
    assert!(matches!(error, CommandError::OutOfRange(_)), "{error}");
    assert_as_restored(&vm, &image);
    // An image that ends too early.
    File::options().write(true).open(&image.paths[1]).unwrap().set_len(MIB).unwrap();
    let mut config = config(64 * MIB, 16 * MIB, store_directory(), false);
    config.origin = Some(image.origin());
    let error = Engine::start(config, Box::new(|_| {})).unwrap_err();
    assert!(
        matches!(error, StartError::Origin(OriginError::Short { layer: 1, available_bytes: MIB, .. })),
        "{error}"
    );
}

/// The engine starts at once, whatever the origin's size.
#[test]
fn an_origin_of_64_gib_is_there_at_once() {
    let directory = testkit::directory_in(store_directory(), "large");
    let (path, pages) = (directory.path().join("image"), (64 * GIB / PAGE_SIZE as u64) as usize);
    File::create(&path).unwrap().set_len(64 * GIB).unwrap();
    let start = || {
        let mut layers = vec![Origin::NO_LAYER; pages];
        layers[pages / 2..].fill(1);
        let mut config = config(64 * GIB, 64 * MIB, store_directory(), false);
        config.store.overcommit = true;
        let files = [OriginLayer::open(&path).unwrap(), OriginLayer::open(&path).unwrap()];
        config.origin =
            Some(Origin { layers: files.into(), layer_of: LayerOf::PerPage(layers), cipher: None });
        let since = Instant::now();
        let vm = Vm::of(started(Engine::start(config, Box::new(|_| {}))));
        (vm, since.elapsed())
    };
    // One of so many does, on a machine that is busy with something else.
    let (vm, took) = (0..5).map(|_| start()).min_by_key(|(_, took)| *took).unwrap();
    println!("64 GiB with an origin: started in {took:?}");
    assert!(took < Duration::from_secs(1), "{took:?}");
    drop(vm);
}

#[test]
fn a_damaged_page_is_lost_alone_and_on_evidence() {
    let directory = testkit::directory_in(store_directory(), "damaged");
    let image = Image::new(directory.path(), PAGES, 3, mostly);
    let bad = PageNo(4321);
    let file = File::options().read(true).write(true).open(image.path_of(bad)).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, bad.offset() + 77).unwrap();
    file.write_all_at(&[byte[0] ^ 1], bad.offset() + 77).unwrap();
    file.sync_all().unwrap();
    let vm = restored(&image, false);
    std::thread::scope(|scope| {
        let since = Instant::now();
        let waits = scope.spawn(|| vm.is_unreadable(bad));
        for page in (0..PAGES).map(PageNo).filter(|page| *page != bad) {
            assert!(is_as_restored(&vm, &image, page), "{page} is wrong");
        }
        assert!(waits.join().unwrap(), "it was read");
        assert!(since.elapsed() >= Duration::from_secs(9), "{:?}", since.elapsed());
    });
    let stats = vm.stats();
    assert_eq!(stats.lost.iter().map(|run| (run.first, run.pages)).collect::<Vec<_>>(), [(bad.0, 1)]);
    assert!(stats.store.checksum_mismatches >= 4, "{stats:?}");
    // What the guest gives back is lost no more.
    vm.handle().discard(Run::one(bad)).unwrap();
    assert!(vm.is_zero(bad));
}

#[test]
fn two_engines_run_from_one_image() {
    let directory = testkit::directory_in(store_directory(), "two");
    let image = Image::new(directory.path(), PAGES, 2, mostly);
    let before = image.digest();
    let vms = [restored(&image, false), restored(&image, true)];
    std::thread::scope(|scope| {
        for (nth, vm) in vms.iter().enumerate() {
            let image = &image;
            scope.spawn(move || {
                let mine = |page: &PageNo| page.0 % 5 == nth as u64;
                (0..PAGES).map(PageNo).filter(mine).for_each(|page| vm.write(page, 10 + nth as u64));
                for page in (0..PAGES).map(PageNo) {
                    let right = match mine(&page) {
                        true => vm.is_right(page, 10 + nth as u64),
                        false => is_as_restored(vm, image, page),
                    };
                    assert!(right, "{page} of VM {nth} is wrong");
                }
            });
        }
    });
    assert!(image.digest() == before, "the image has changed");
}

#[test]
fn pages_come_ahead_of_any_touch() {
    let directory = testkit::directory_in(store_directory(), "fetch");
    let image = Image::new(directory.path(), PAGES, 2, mostly);
    let vm = restored(&image, false);
    let (handle, run) = (vm.handle(), Run::new(PageNo(0), 2048));
    let mut fetched = 0;
    loop {
        match handle.fetch_origin(run).unwrap() {
            0 => break,
            more => fetched += more,
        }
    }
    assert_eq!(fetched, run.pages().filter(|page| image.has(*page)).count() as u64);
    let before = vm.stats().faults;
    for page in run.pages() {
        assert!(is_as_restored(&vm, &image, page), "{page} is wrong");
    }
    assert_eq!(vm.stats().faults.store, before.store, "all of them are here");
    // More than there are frames for: it ends, and says so.
    while handle.fetch_origin(all(&vm)).unwrap() > 0 {}
    assert!(vm.stats().frames_bytes <= 16 * MIB);
    assert_as_restored(&vm, &image);
}

#[test]
fn the_origin_is_emptied_while_the_guest_writes() {
    let directory = testkit::directory_in(store_directory(), "home");
    let image = Image::new(directory.path(), PAGES, 3, mostly);
    let vm = restored(&image, true);
    let handle = vm.handle();
    let mut rounds = vec![ROUND; PAGES as usize];
    let (ends, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut random = Random(7);
            for round in 2.. {
                let page = PageNo(random.below(PAGES));
                let was = rounds[page.index()];
                let right =
                    if was == ROUND { is_as_restored(&vm, &image, page) } else { vm.is_right(page, was) };
                assert!(right, "{page} is wrong");
                vm.write(page, round);
                rounds[page.index()] = round;
                writes.store(round, Ordering::SeqCst);
                if ends.load(Ordering::SeqCst) {
                    return;
                }
            }
        });
        let mut left = image.count();
        while left > 0 {
            left = handle.take_home(1000).unwrap();
            assert!(!writer.is_finished());
        }
        ends.store(true, Ordering::SeqCst);
    });
    println!("{} pages were written meanwhile", writes.into_inner());
    assert_eq!(vm.stats().origin_bytes, 0);
    // It is needed no more.
    for path in &image.paths {
        File::options().write(true).open(path).unwrap().set_len(0).unwrap();
    }
    handle.evict(all(&vm)).unwrap();
    for page in (0..PAGES).map(PageNo) {
        let was = rounds[page.index()];
        let right = if was == ROUND { is_as_restored(&vm, &image, page) } else { vm.is_right(page, was) };
        assert!(right, "{page} is wrong");
    }
    assert_eq!(vm.stats().poisoned_pages, 0);
}

/// Stored pages are read where they are, beside the engine.
#[test]
fn held_pages_are_read_and_cloned_from_their_layers() {
    let directory = testkit::directory_in(store_directory(), "held");
    let image = Image::new(directory.path(), PAGES, 3, mostly);
    let vm = restored(&image, true);
    let (handle, run) = (vm.handle(), Run::new(PageNo(910), 250));
    let pieces = handle.hold(run).unwrap();
    let tiers: Vec<_> = pieces.iter().map(|piece| (piece.tier, piece.run.len)).collect();
    assert_eq!(tiers, [(TierId::ORIGIN, 250)]);
    let sums = handle.sums_async(run).blocking_recv().unwrap().unwrap();
    let reader = handle.stored_reader();
    assert_eq!(reader.files(TierId::ORIGIN).unwrap().len(), 3);
    assert!(reader.parts(TierId::ORIGIN, run).count() > 3);
    let mut bytes = memmap2::MmapMut::map_anon(run.bytes()).unwrap();
    reader.read(TierId::ORIGIN, run, &sums, &mut bytes).unwrap();
    let expected: Vec<u8> = run.pages().flat_map(|page| image::content(page, ROUND)).collect();
    assert!(bytes[..] == expected);
    // The store is encrypted, and the origin is not.
    let path = directory.path().join("clone");
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    let cloned = reader.clone_into(TierId::ORIGIN, &file, &[run]).unwrap();
    assert_eq!(cloned.shared + cloned.copied, 250);
    let mut bytes = vec![0; run.bytes()];
    file.read_exact_at(&mut bytes, run.start.offset()).unwrap();
    assert!(bytes == expected);
    handle.release(run).unwrap();
}

/// What is encrypted with the origin's own key is decrypted beside the engine too, and its blocks are of no use elsewhere.
#[test]
fn held_pages_of_an_encrypted_origin_are_decrypted_and_not_cloned() {
    let directory = testkit::directory_in(store_directory(), "held-encrypted");
    let image = Image::encrypted(directory.path(), PAGES, 3, mostly);
    let vm = restored(&image, false);
    let (handle, run) = (vm.handle(), Run::new(PageNo(910), 250));
    handle.hold(run).unwrap();
    let sums = handle.sums_async(run).blocking_recv().unwrap().unwrap();
    let reader = handle.stored_reader();
    assert!(reader.is_encrypted());
    let mut bytes = memmap2::MmapMut::map_anon(run.bytes()).unwrap();
    reader.read(TierId::ORIGIN, run, &sums, &mut bytes).unwrap();
    let expected: Vec<u8> = run.pages().flat_map(|page| image::content(page, ROUND)).collect();
    assert!(bytes[..] == expected);
    let path = directory.path().join("clone");
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    let cloned = reader.clone_into(TierId::ORIGIN, &file, &[run]);
    assert!(matches!(cloned, Err(swapd::CloneError::Encrypted)), "{cloned:?}");
    handle.release(run).unwrap();
    // A byte of the image is another one: that page is lost, and no other.
    let page = PageNo((0..PAGES).find(|page| image.has(PageNo(*page))).unwrap());
    let file = File::options().read(true).write(true).open(image.path_of(page)).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, page.offset() + 77).unwrap();
    file.write_all_at(&[!byte[0]], page.offset() + 77).unwrap();
    let damaged = restored(&image, false);
    let sums = image.sums_of(Run::one(page));
    let mut bytes = memmap2::MmapMut::map_anon(PAGE_SIZE).unwrap();
    let read = damaged.handle().stored_reader().read(TierId::ORIGIN, Run::one(page), &sums, &mut bytes);
    assert!(read.is_err(), "a page that was changed counts as whole");
}

/// A page at the origin is no further away than one in the store, on the same disk: `VMEMD_LONG=1`, nothing else
/// running.
#[test]
fn a_first_touch_takes_as_long_as_one_of_a_stored_page() {
    if std::env::var_os("VMEMD_LONG").is_none() {
        skip(Reason::Long, "a measurement; VMEMD_LONG=1 asks for it");
    }
    let directory = testkit::directory_in(store_directory(), "latency");
    // Every other 32 KiB.
    let is_there = |page: PageNo| (page.0 / 8).is_multiple_of(2);
    let image = Image::new(directory.path(), 4 * PAGES, 1, is_there);
    let vm = restored(&image, false);
    (0..vm.pages()).map(PageNo).filter(|page| !is_there(*page)).for_each(|page| vm.write(page, ROUND));
    vm.handle().evict(all(&vm)).unwrap();
    vm.handle().set_prefetch_async(false).blocking_recv().unwrap().unwrap();
    let mut random = Random(3);
    let mut latencies = [Vec::new(), Vec::new()];
    for _ in 0..20_000 {
        let page = PageNo(random.below(vm.pages()));
        let since = Instant::now();
        vm.touch(page);
        let took = since.elapsed().as_nanos() as u64;
        assert!(vm.is_right(page, ROUND), "{page} is wrong");
        // What was resident does not count.
        if took > 2000 {
            latencies[usize::from(is_there(page))].push(took);
        }
    }
    let medians = latencies.map(|mut ns| {
        ns.sort_unstable();
        let at = |share: usize| ns[ns.len() * share / 1000] / 1000;
        println!("{} misses: p50 {} us, p99 {} us, p99.9 {} us", ns.len(), at(500), at(990), at(999));
        at(500)
    });
    println!("(the store, then the origin)");
    assert!(medians[1] <= 2 * medians[0], "{medians:?}");
}
