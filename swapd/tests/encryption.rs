//! An encrypted store on a real disk: its bytes are not the pages', and the pages come back.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::os::unix::fs::FileExt;

use common::{Vm, store_directory};
use swapd::{PAGE_SIZE, PageNo, Run, TierId};
use testkit::TempDir;

const MIB: u64 = 1 << 20;

/// 64 MiB in 16.
fn start(directory: &TempDir, encrypt: bool) -> Vm {
    Vm::start_in(64 * MIB, 16 * MIB, directory.path(), encrypt)
}

/// Direct I/O wants a page of its own.
#[repr(C, align(4096))]
struct Page([u8; PAGE_SIZE]);

/// The bytes of a page as they are on the disk.
fn on_disk(directory: &TempDir, page: PageNo) -> Box<Page> {
    let mut bytes = Box::new(Page([0; PAGE_SIZE]));
    testkit::open_file_in(directory).read_exact_at(&mut bytes.0, page.offset()).unwrap();
    bytes
}

#[test]
fn the_disk_has_nothing_that_the_guest_wrote() {
    let [here, there] = ["plain", "sealed"].map(|name| testkit::directory_in(store_directory(), name));
    let (plain, vm) = (start(&here, false), start(&there, true));
    let (page, all) = (PageNo(100), Run::new(PageNo(0), 64 * 256));
    for vm in [&plain, &vm] {
        vm.write_all(1);
        vm.handle().evict(all).unwrap();
    }
    let (content, mut sealed) = (on_disk(&here, page), on_disk(&there, page));
    assert!(content.0[..8].iter().any(|byte| *byte != 0));
    for word in content.0.chunks(8) {
        assert!(!sealed.0.chunks(8).any(|other| other == word));
    }
    let handle = vm.handle();
    handle.hold_async(Run::one(page)).blocking_recv().unwrap().unwrap();
    let sums = handle.sums_async(Run::one(page)).blocking_recv().unwrap().unwrap();
    handle.stored_reader().read(TierId::STORE, Run::one(page), &sums, &mut sealed.0).unwrap();
    assert!(sealed.0 == content.0);
    handle.release_async(Run::one(page)).blocking_recv().unwrap().unwrap();
    assert_eq!(vm.mismatches(1), 0);
}

#[test]
fn what_is_written_again_and_again_comes_back() {
    let directory = testkit::directory_in(store_directory(), "again");
    let vm = start(&directory, true);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for round in 1..=4 {
                vm.write_all(round);
                assert_eq!(vm.mismatches(round), 0, "round {round}");
            }
        });
        for nth in 0.. {
            if writer.is_finished() {
                break;
            }
            vm.handle().set_budget([16, 40, 24, 64][nth % 4] * MIB).unwrap();
        }
    });
    let stats = vm.stats();
    assert!(stats.evict.written > 2 * 64 * 256, "{stats:?}");
    assert_eq!(stats.store.checksum_mismatches, 0);
}
