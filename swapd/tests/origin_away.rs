//! An origin that falls silent, or fails at everything, and comes back: the pages that are at home are served
//! meanwhile, and none is lost.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
#[path = "../../tests/common/disk.rs"]
#[allow(dead_code, reason = "each test file uses a part")]
mod disk;
#[path = "common/image.rs"]
mod image;
#[path = "../../tests/common/slow_disk.rs"]
#[allow(dead_code, reason = "each test file uses a part")]
mod slow_disk;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use common::{Vm, store_directory};
use image::{Image, ROUND};
use slow_disk::SlowDisk;
use swapd::{Engine, Notice, Origin, PAGE_SIZE, PageNo};
use testkit::{OrSkip, Reason, TempDir};

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 64 * MIB;
const PAGES: u64 = MEMORY / PAGE_SIZE as u64;
/// The first half of memory is at the origin.
const HALF: u64 = PAGES / 2;
/// Threads that touch pages at the origin: more than the kernel lets wait for files by itself on most hosts.
const TOUCHERS: u64 = 40;

/// 64 MiB in 16 MiB, and what its engine has to say.
fn start(image: &Image, origin: Origin) -> (Vm, Receiver<Notice>) {
    let (sender, notices) = mpsc::channel();
    let notify = Box::new(move |notice| {
        let _ = sender.send(notice);
    });
    let mut config = common::config(MEMORY, 16 * MIB, store_directory(), false);
    config.origin = Some(origin);
    let vm = Vm::of(common::started(Engine::start(config, notify)));
    image.adopt_into(&vm.handle());
    (vm, notices)
}

/// Waits for one that is meant; hears no page lost on the way.
fn hear(notices: &Receiver<Notice>, meant: impl Fn(&Notice) -> bool) {
    loop {
        let notice = notices.recv_timeout(Duration::from_secs(90)).expect("the engine tells");
        assert!(!matches!(notice, Notice::Poisoned(_)), "{notice:?}");
        if meant(&notice) {
            return;
        }
    }
}

/// The disk comes back, also when a test fails.
struct Back<'a>(&'a SlowDisk);

impl Drop for Back<'_> {
    fn drop(&mut self) {
        self.0.come_back();
    }
}

/// The disk is away while threads wait for pages at the origin; those at home are written and read, more of them than
/// there are frames. Then it comes back.
fn goes_on_at_home(disk: &SlowDisk, image: &Image, origin: Origin, leave: impl Fn()) {
    let (vm, notices) = start(image, origin);
    (HALF..PAGES).for_each(|page| vm.write(PageNo(page), 1));
    std::thread::scope(|scope| {
        let _back = Back(disk);
        leave();
        let touched = |nth: u64| PageNo(nth * (HALF / TOUCHERS));
        let waiting: Vec<_> = (0..TOUCHERS)
            .map(|nth| {
                let vm = &vm;
                scope.spawn(move || vm.is_right(touched(nth), ROUND))
            })
            .collect();
        hear(&notices, |notice| matches!(notice, Notice::Unreachable(_)));
        for round in 2..4 {
            (HALF..PAGES).for_each(|page| vm.write(PageNo(page), round));
            assert!((HALF..PAGES).all(|page| vm.is_right(PageNo(page), round)));
        }
        assert!(waiting.iter().all(|waits| !waits.is_finished()), "nobody has a page that is away");
        // The store is not what is waited for.
        assert!(vm.stats().store.oldest_ms < 5000, "{:?}", vm.stats());
        disk.come_back();
        hear(&notices, |notice| matches!(notice, Notice::Reachable));
        assert!(waiting.into_iter().all(|waits| waits.join().unwrap()));
    });
    assert!((0..HALF).all(|page| vm.is_right(PageNo(page), ROUND)));
    assert!((HALF..PAGES).all(|page| vm.is_right(PageNo(page), 3)));
    assert_eq!(vm.stats().poisoned_pages, 0);
    assert!(!notices.try_iter().any(|notice| matches!(notice, Notice::Poisoned(_))));
}

fn slow_disk(name: &str) -> (TempDir, SlowDisk) {
    let directory = testkit::directory_in(store_directory(), name);
    let disk = SlowDisk::bare(directory.path(), MEMORY).or_skip(Reason::Loop);
    (directory, disk)
}

fn image_at(path: &Path) -> Image {
    Image::in_file(path, PAGES, |page| page.0 < HALF)
}

#[test]
fn a_silent_device_keeps_only_its_own_pages() {
    let (_directory, disk) = slow_disk("silent-device");
    let image = image_at(disk.device());
    goes_on_at_home(&disk, &image, image.origin(), || disk.fall_silent());
}

/// As over a network: the kernel has a thread wait for each read.
#[test]
fn a_silent_file_system_keeps_only_its_own_pages() {
    let (directory, disk) = slow_disk("silent-files");
    let file: PathBuf = directory.path().join("fuse").join("disk.img");
    let image = image_at(&file);
    goes_on_at_home(&disk, &image, image.origin(), || disk.fall_silent());
    let image = image_at(&file);
    goes_on_at_home(&disk, &image, image.buffered_origin(), || disk.fall_silent());
}

#[test]
fn an_origin_that_fails_at_everything_loses_nothing() {
    let (_directory, disk) = slow_disk("failing-origin");
    let image = image_at(disk.device());
    goes_on_at_home(&disk, &image, image.origin(), || disk.fail(libc::EIO));
}
