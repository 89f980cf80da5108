//! Checkpoints of a VM that writes, on the real kernel: the image and its map are what the VM had when it stood still.

#[macro_use]
extern crate testkit;

testkit::main!();

#[path = "../../migrate/tests/common/vm.rs"]
#[allow(dead_code, unreachable_pub, reason = "migrations use more of it")]
mod vm;

#[path = "../../tests/common/disk.rs"]
#[allow(dead_code, reason = "stores fail in more ways")]
mod disk;
#[path = "../../swapd/tests/common/image.rs"]
mod image;
#[path = "../../tests/common/slow_disk.rs"]
#[allow(dead_code, reason = "disks are slow in more ways")]
mod slow_disk;

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use checkpoint::format::{MemoryMap, PageKind};
use checkpoint::save::{Base, Files, Phase, SaveError, SaveOptions, Saved, save, save_at_once};
use disk::Disk;
use migrate::{LiveVm, VmError};
use swapd::digest::page_sum;
use swapd::{Engine, PAGE_SIZE, PageNo, Run};
use testkit::{OrSkip, Reason, TempDir};
use vm::{MEMORY, PAGES, Writer, engine, engine_with, fill, is_intact};

fn place() -> TempDir {
    testkit::directory_in(env!("CARGO_TARGET_TMPDIR"), "checkpoint")
}

fn open(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    // Not every file system can.
    let direct = options.clone().custom_flags(libc::O_DIRECT).open(path);
    direct.or_else(|_| options.open(path)).unwrap()
}

fn files(directory: &Path) -> Files {
    let at = |name| directory.join(name);
    Files {
        image: open(&at("memory.img")),
        map: File::create(at("map")).unwrap(),
        state: File::create(at("state")).unwrap(),
    }
}

/// What a checkpoint is compared with: the VM's memory at the moment at which its state was saved, that is, while it
/// stood still and all of its pages had been found.
struct Witness<'a> {
    vm: Writer,
    engine: &'a Engine,
    /// Saving the state fails.
    fails: bool,
}

impl Witness<'_> {
    fn of(engine: &Engine, pages: std::ops::Range<u64>) -> Witness<'_> {
        let vm = Writer::start(engine.memory_base() as usize, pages);
        Witness { vm, engine, fails: false }
    }

    fn page(&self, page: u64) -> &[u8] {
        // SAFETY: a page of the engine's memory, which nobody writes to while this is used.
        unsafe {
            let at = self.engine.memory_base().add(page as usize * PAGE_SIZE);
            std::slice::from_raw_parts(at, PAGE_SIZE)
        }
    }
}

impl LiveVm for Witness<'_> {
    fn drain(&mut self) -> Result<(), VmError> {
        self.vm.drain()
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.vm.pause()
    }

    fn stood_still(&self) -> bool {
        false
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.vm.resume()
    }

    fn save(&mut self, to: &mut dyn std::io::Write) -> Result<(), VmError> {
        if self.fails {
            return Err(VmError::Machine("no state today".to_owned()));
        }
        self.vm.save(to)
    }

    fn throttle(&mut self, percent: u8) {
        self.vm.throttle(percent);
    }
}

/// Saves a VM that does not go on afterwards, so that its memory can be compared. It pages for that, so what was paged
/// for the checkpoint is returned: the counts right after it.
fn saved(
    engine: &Engine,
    witness: &mut Witness<'_>,
    files: Files,
    base: Option<Base>,
) -> Result<Saved, SaveError> {
    let options = SaveOptions { stop: true, ..SaveOptions::default() };
    let saved = save(&engine.handle(), witness, files, base, &options, &|_| {}, &AtomicBool::new(false))?;
    println!("{saved:?}");
    Ok(saved)
}

/// The image and its map are what the VM has, which stands still.
fn assert_same(witness: &Witness<'_>, directory: &Path, bases: &[&Path]) -> MemoryMap {
    let map = MemoryMap::read_file(&File::open(directory.join("map")).unwrap()).unwrap();
    let images: Vec<_> = [&[directory], bases].concat();
    let images: Vec<File> =
        images.iter().map(|directory| File::open(directory.join("memory.img")).unwrap()).collect();
    assert_eq!(images[0].metadata().unwrap().len(), MEMORY);
    let mut bytes = vec![0; PAGE_SIZE];
    for page in 0..PAGES {
        let image = match map.kind(PageNo(page)) {
            PageKind::Zero => None,
            PageKind::Here => Some(&images[0]),
            PageKind::Base => Some(&images[1]),
            PageKind::Lost => panic!("page {page} is lost"),
        };
        bytes.fill(0);
        if let Some(image) = image {
            image.read_exact_at(&mut bytes, page * PAGE_SIZE as u64).unwrap();
            assert_eq!(map.sum(PageNo(page)), Some(page_sum(PageNo(page), &bytes)), "page {page}");
        }
        assert!(witness.page(page) == bytes, "page {page} differs ({:?})", map.kind(PageNo(page)));
        assert!(is_intact(witness.engine.memory_base() as usize, page), "page {page} is torn");
    }
    map
}

/// Nothing is held, and nobody looks for written pages.
fn assert_left_alone(engine: &Engine) {
    let handle = engine.handle();
    let block = Run::new(PageNo(0), swapd::BLOCK_PAGES);
    handle.evict(block).unwrap();
    let stays = handle.resident_map().unwrap();
    assert!(stays.iter().all(|run| run.start >= block.end()), "{stays:?}");
}

#[test]
fn a_writing_vm_is_saved_as_it_was_when_it_stood_still() {
    let (place, to) = (place(), place());
    let here = engine(&place, MEMORY / 4);
    fill(&here);
    let mut witness = Witness::of(&here, 100..2000);
    let saved = saved(&here, &mut witness, files(to.path()), None).unwrap();
    let map = assert_same(&witness, to.path(), &[]);
    assert!(saved.pages.here >= PAGES / 2 && saved.pages.zero >= PAGES / 3, "{:?}", saved.pages);
    assert_eq!(saved.pages, map.counts());
    assert_eq!(std::fs::metadata(to.path().join("state")).unwrap().len(), saved.state_bytes);
    // Zeros are holes.
    let image = std::fs::metadata(to.path().join("memory.img")).unwrap();
    assert!(image.blocks() * 512 <= (saved.pages.here + 64) * PAGE_SIZE as u64, "{}", image.blocks());
    witness.resume().unwrap();
    witness.vm.assert_runs_here();
    drop(witness);
    assert_left_alone(&here);
}

#[test]
fn from_an_encrypted_store_too() {
    let (place, to) = (place(), place());
    let here = engine_with(&place, MEMORY / 4, true);
    fill(&here);
    let mut witness = Witness::of(&here, 100..2000);
    let saved = saved(&here, &mut witness, files(to.path()), None).unwrap();
    assert_eq!(saved.pages_shared, 0);
    assert_same(&witness, to.path(), &[]);
}

/// Most of what is written has no frame: none of it comes in for the checkpoint, and nothing leaves.
#[test]
fn nothing_is_paged_for_it() {
    let (place, to) = (place(), place());
    let here = engine(&place, MEMORY / 4);
    fill(&here);
    // Nothing is left that the engine could page out by itself; what comes then has room.
    here.handle().evict(Run::new(PageNo(0), PAGES as u32)).unwrap();
    (PAGES - 500..PAGES).for_each(|page| vm::write(here.memory_base() as usize, page, 1));
    let mut witness = Witness::of(&here, PAGES - 1..PAGES);
    witness.pause().unwrap();
    let counts = || {
        let stats = here.handle().stats().unwrap();
        (stats.faults.store, stats.evict.written + stats.evict.dropped, stats.prefetch.pages)
    };
    let before = counts();
    let saved = saved(&here, &mut witness, files(to.path()), None).unwrap();
    assert_eq!(counts(), before);
    assert_eq!(saved.rounds, 2);
    assert_same(&witness, to.path(), &[]);
}

#[test]
fn against_a_base_only_changes_are_written() {
    let (place, first, second) = (place(), place(), place());
    let here = engine(&place, MEMORY / 2);
    fill(&here);
    let mut witness = Witness::of(&here, 100..200);
    let full = saved(&here, &mut witness, files(first.path()), None).unwrap();
    let map = assert_same(&witness, first.path(), &[]);
    witness.resume().unwrap();
    witness.vm.assert_runs_here();
    let saved = saved(&here, &mut witness, files(second.path()), Some(Base { map, cloned: false })).unwrap();
    assert_same(&witness, second.path(), &[first.path()]);
    assert!(saved.pages.base >= full.pages.here - 100 && saved.pages.here <= 100, "{:?}", saved.pages);
    assert!(saved.bytes_written * 4 < full.bytes_written, "{saved:?}");
}

#[test]
fn a_base_of_another_size_is_refused() {
    let (place, to) = (place(), place());
    let here = engine(&place, MEMORY / 2);
    let map = checkpoint::format::MapBuilder::new(PAGES / 2).finish(&[]);
    let mut witness = Witness::of(&here, 0..10);
    let error = saved(&here, &mut witness, files(to.path()), Some(Base { map, cloned: false })).unwrap_err();
    assert!(matches!(error, SaveError::Options(_)), "{error:?}");
    witness.vm.assert_runs_here();
}

#[test]
fn a_disk_that_is_full_in_the_middle_leaves_the_vm_as_it_was() {
    let (place, to) = (place(), place());
    let small = Disk::ext4(to.path(), 24 << 20).or_skip(Reason::Loop);
    let here = engine(&place, MEMORY / 4);
    fill(&here);
    let mut witness = Witness::of(&here, 100..2000);
    let error = saved(&here, &mut witness, files(Path::new(&small.store())), None).unwrap_err();
    let SaveError::Write { what: "image", source } = &error else { panic!("{error:?}") };
    assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
    witness.vm.assert_runs_here();
    drop(witness);
    assert_left_alone(&here);
}

/// The store and the image are on one file system that shares blocks: what is stored is neither read nor written.
#[test]
fn stored_pages_share_their_blocks_where_the_file_system_can() {
    let on = place();
    let disk = Disk::xfs(on.path(), 400 << 20).or_skip(Reason::Loop);
    let (place, to) =
        (testkit::directory_in(disk.store(), "store"), testkit::directory_in(disk.store(), "to"));
    let here = engine(&place, MEMORY / 4);
    fill(&here);
    let mut witness = Witness::of(&here, 100..900);
    let saved = saved(&here, &mut witness, files(to.path()), None).unwrap();
    assert!(saved.pages_shared >= 3000, "{saved:?}");
    // And what was written meanwhile, once more in each round behind the first.
    let (written, again) = (saved.bytes_written / PAGE_SIZE as u64, 800 * u64::from(saved.rounds - 1));
    assert!(written <= saved.pages.here - saved.pages_shared + again, "{saved:?}");
    // The comparison pages in; the next one shares what is stored by then.
    assert_same(&witness, to.path(), &[]);
    // What is written to the store from now on does not change the image.
    witness.resume().unwrap();
    witness.vm.assert_runs_here();
    here.handle().evict(Run::new(PageNo(0), 4096)).unwrap();
    let map = MemoryMap::read_file(&File::open(to.path().join("map")).unwrap()).unwrap();
    let image = File::open(to.path().join("memory.img")).unwrap();
    let mut bytes = vec![0; PAGE_SIZE];
    for page in (0..PAGES).map(PageNo).filter(|page| map.kind(*page) == PageKind::Here) {
        image.read_exact_at(&mut bytes, page.offset()).unwrap();
        assert_eq!(map.sum(page), Some(page_sum(page, &bytes)), "{page}");
    }
}

/// A pipe that nobody reads is a disk that takes nothing more: the state goes there.
#[test]
fn a_disk_that_hangs_in_the_pause_does_not_take_the_vm_along() {
    let (place, to) = (place(), place());
    let here = engine(&place, MEMORY / 4);
    fill(&here);
    let mut witness = Witness::of(&here, 100..2000);
    let (disk, state) = std::io::pipe().unwrap();
    let files = Files { state: File::from(std::os::fd::OwnedFd::from(state)), ..files(to.path()) };
    let options = SaveOptions { pause_limit: Duration::from_secs(1), ..SaveOptions::default() };
    let cancel = AtomicBool::new(false);
    let failed = save_at_once(&here.handle(), &mut witness, files, None, &options, &|_| {}, &cancel);
    let failed = failed.unwrap_err();
    assert!(matches!(failed.error, SaveError::StoodTooLong(_)), "{failed:?}");
    // The disk has not answered yet.
    witness.vm.assert_runs_here();
    let rest = failed.rest.expect("a write that the disk still has");
    drop(disk);
    rest.close();
    drop(witness);
    assert_left_alone(&here);
}

#[test]
fn a_map_that_cannot_be_written_lets_a_vm_go_on_that_was_to_be_stopped() {
    let (place, to) = (place(), place());
    let here = engine(&place, MEMORY / 4);
    fill(&here);
    let mut witness = Witness::of(&here, 100..2000);
    let files = files(to.path());
    let files = Files { map: File::open(to.path().join("map")).unwrap(), ..files };
    let error = saved(&here, &mut witness, files, None).unwrap_err();
    assert!(matches!(error, SaveError::Write { what: "map", .. }), "{error:?}");
    witness.vm.assert_runs_here();
}

#[test]
fn cancelled_at_any_phase_it_runs_on() {
    for phase in [Phase::Copying, Phase::Converging, Phase::Stopped] {
        let (place, to) = (place(), place());
        let here = engine(&place, MEMORY / 4);
        fill(&here);
        let mut witness = Witness::of(&here, 100..2000);
        let cancel = AtomicBool::new(false);
        let options = SaveOptions {
            // As many rounds as may be.
            downtime_target: Duration::ZERO,
            max_rounds: 3,
            ..SaveOptions::default()
        };
        let seen = Cell::new(false);
        let at = |progress: checkpoint::save::Progress| {
            if progress.phase == phase {
                seen.set(true);
                cancel.store(true, Ordering::Relaxed);
            }
        };
        let error = save(&here.handle(), &mut witness, files(to.path()), None, &options, &at, &cancel);
        assert!(!seen.get() || matches!(error, Err(SaveError::Cancelled)), "{phase:?}: {error:?}");
        witness.vm.assert_runs_here();
        drop(witness);
        assert_left_alone(&here);
    }
}

#[test]
fn a_vm_that_cannot_be_paused_or_saved_runs_on() {
    let (place, to) = (place(), place());
    let here = engine(&place, MEMORY / 4);
    fill(&here);
    let mut witness = Witness::of(&here, 100..2000);
    witness.vm.fail_pause = true;
    let error = saved(&here, &mut witness, files(to.path()), None).unwrap_err();
    assert!(matches!(error, SaveError::Vm(_)), "{error:?}");
    witness.vm.assert_runs_here();
    (witness.vm.fail_pause, witness.fails) = (false, true);
    let error = saved(&here, &mut witness, files(to.path()), None).unwrap_err();
    assert!(matches!(error, SaveError::Vm(_)), "{error:?}");
    witness.vm.assert_runs_here();
    drop(witness);
    assert_left_alone(&here);
}

#[test]
fn a_rate_is_kept_to_while_it_runs() {
    let (place, to) = (place(), place());
    let here = engine(&place, MEMORY / 2);
    fill(&here);
    let mut witness = Witness::of(&here, 0..10);
    let options = SaveOptions { rate: Some(32 << 20), stop: true, ..SaveOptions::default() };
    let began = Instant::now();
    let saved = save(
        &here.handle(),
        &mut witness,
        files(to.path()),
        None,
        &options,
        &|_| {},
        &AtomicBool::new(false),
    );
    let saved = saved.unwrap();
    println!("{saved:?}");
    // 32 MiB, but for what a burst and the buffers under way let through.
    assert!(began.elapsed() > Duration::from_millis(700), "{:?}", began.elapsed());
    assert_same(&witness, to.path(), &[]);
}

/// As over a network: to begin a read there takes until the server answers. The session's own thread must not wait for
/// it, or nobody could cancel.
#[test]
fn a_vm_whose_origin_is_silent_can_be_cancelled() {
    let place = place();
    let disk = slow_disk::SlowDisk::bare(place.path(), MEMORY).or_skip(Reason::Loop);
    let image = image::Image::in_file(&place.path().join("fuse/disk.img"), PAGES, |page| page.0 < PAGES / 2);
    for origin in [image.origin(), image.buffered_origin()] {
        disk.come_back();
        let engine = vm::start(&place, 16 << 20, false, Some(origin));
        image.adopt_into(&engine.handle());
        let directory = self::place();
        let cancel = AtomicBool::new(false);
        let options = SaveOptions { stop: false, ..SaveOptions::default() };
        disk.fall_silent();
        let (handle, files) = (engine.handle(), files(directory.path()));
        std::thread::scope(|scope| {
            let mut witness = Witness::of(&engine, PAGES / 2..PAGES);
            scope.spawn(|| {
                std::thread::sleep(Duration::from_secs(2));
                cancel.store(true, Ordering::SeqCst);
                std::thread::sleep(Duration::from_secs(6));
                disk.come_back();
            });
            let began = Instant::now();
            let failed =
                save_at_once(&handle, &mut witness, files, None, &options, &|_| {}, &cancel).unwrap_err();
            let took = began.elapsed();
            println!("cancelled {took:?} after it began: {failed:?}");
            assert!(matches!(failed.error, SaveError::Cancelled), "{failed:?}");
            assert!(took < Duration::from_secs(6), "{took:?}");
            if let Some(rest) = failed.rest {
                rest.close();
            }
        });
    }
}
