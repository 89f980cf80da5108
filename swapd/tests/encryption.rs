//! An encrypted store on a real disk: what is in it, and what comes back.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::os::unix::fs::FileExt;

use common::{Vm, config, started, store_directory};
use swapd::{Engine, EngineConfig, PAGE_SIZE, PageNo, Run, StoreConfig};

const MIB: u64 = 1 << 20;

fn start(encrypt: bool) -> Vm {
    let config = config(64 * MIB, 16 * MIB, store_directory(), false);
    let store = StoreConfig { encrypt, ..config.store };
    Vm::of(started(Engine::start(
        EngineConfig { store, ..config },
        Box::new(|notice| println!("{notice:?}")),
    )))
}

/// Direct I/O wants a page of its own.
#[repr(C, align(4096))]
struct Page([u8; PAGE_SIZE]);

/// Some bytes of a page as they are on the disk.
fn on_disk(vm: &Vm, page: PageNo) -> Box<Page> {
    let mut bytes = Box::new(Page([0; PAGE_SIZE]));
    vm.handle().store().read_exact_at(&mut bytes.0, page.offset()).unwrap();
    bytes
}

#[test]
fn the_disk_has_nothing_that_the_guest_wrote() {
    let (plain, vm) = (start(false), start(true));
    let (page, all) = (PageNo(100), Run::new(PageNo(0), 64 * 256));
    for vm in [&plain, &vm] {
        vm.write_all(1);
        vm.handle().evict(all).unwrap();
    }
    let (content, mut sealed) = (on_disk(&plain, page), on_disk(&vm, page));
    assert!(content.0[..8].iter().any(|byte| *byte != 0));
    for word in content.0.chunks(8) {
        assert!(!sealed.0.chunks(8).any(|other| other == word));
    }
    vm.handle().decrypt(Run::one(page), &mut sealed.0);
    assert!(sealed.0 == content.0);
    assert_eq!(vm.mismatches(1), 0);
}

#[test]
fn what_is_written_again_and_again_comes_back() {
    let vm = start(true);
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
