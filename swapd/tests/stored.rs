//! Stored pages on behalf of a migration or a checkpoint: read where they are, checked, and cloned into a file.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
#[path = "../../tests/common/disk.rs"]
#[allow(dead_code, reason = "each test file uses a part")]
mod disk;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use common::{Vm, store_directory};
use disk::Disk;
use swapd::{CloneError, EngineHandle, IoErrorKind, PAGE_SIZE, PageNo, Place, Run, TierId};
use testkit::{OrSkip, Reason, TempDir, wait_for};

const MIB: u64 = 1 << 20;
const STORE: TierId = TierId::STORE;

/// 64 MiB in 16 MiB, all of it stored.
fn stored(store: &Path, encrypt: bool) -> Vm {
    let vm = Vm::start_in(64 * MIB, 16 * MIB, store, encrypt);
    vm.write_all(1);
    vm.handle().evict(Run::new(PageNo(0), vm.pages() as u32)).unwrap();
    vm
}

fn place(name: &str) -> TempDir {
    testkit::directory_in(store_directory(), name)
}

/// Holds the run, all of which is stored, and says with which checksums.
fn hold(handle: &EngineHandle, run: Run) -> Vec<u64> {
    let pieces = handle.hold_async(run).blocking_recv().unwrap().unwrap();
    let all = |piece: &swapd::Piece| (piece.place, piece.tier, piece.run) == (Place::Stored, STORE, run);
    assert!(matches!(&pieces[..], [piece] if all(piece)), "{pieces:?}");
    handle.sums_async(run).blocking_recv().unwrap().unwrap()
}

fn release(handle: &EngineHandle, run: Run) {
    handle.release_async(run).blocking_recv().unwrap().unwrap();
}

/// Aligned memory for so many pages.
fn buffer(run: Run) -> memmap2::MmapMut {
    memmap2::MmapMut::map_anon(run.bytes()).unwrap()
}

/// The pages of a run, as the guest sees them.
fn seen(vm: &Vm, run: Run) -> Vec<u8> {
    let from = (vm.addresses().start + run.start.offset() as usize) as *const u8;
    let mut bytes = vec![0; run.bytes()];
    // SAFETY: the engine's guest memory, to which nobody writes at this moment.
    unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
    bytes
}

#[test]
fn held_pages_are_read_as_the_guest_wrote_them() {
    for encrypt in [false, true] {
        let directory = place(if encrypt { "read-sealed" } else { "read" });
        let vm = stored(directory.path(), encrypt);
        let (handle, run) = (vm.handle(), Run::new(PageNo(1234), 300));
        let sums = hold(&handle, run);
        let mut bytes = buffer(run);
        let before = vm.stats();
        handle.stored_reader().read(STORE, run, &sums, &mut bytes).unwrap();
        // Parts of it too, in any order.
        for part in [run.part(200, 100), run.part(0, 1), run.part(7, 50)] {
            let mut some = buffer(part);
            let from = (part.start.0 - run.start.0) as usize;
            let sums = &sums[from..from + part.len as usize];
            handle.stored_reader().read(STORE, part, sums, &mut some).unwrap();
            assert!(some[..] == bytes[from * PAGE_SIZE..][..part.bytes()]);
        }
        let after = vm.stats();
        assert_eq!(
            (before.resident_bytes, before.store.pages_read),
            (after.resident_bytes, after.store.pages_read)
        );
        release(&handle, run);
        assert!(bytes[..] == seen(&vm, run), "encrypted: {encrypt}");
    }
}

#[test]
fn a_page_that_is_not_what_was_written_is_refused_and_its_neighbours_are_not() {
    let directory = place("refused");
    let vm = stored(directory.path(), false);
    let (handle, run) = (vm.handle(), Run::new(PageNo(500), 64));
    let bad = run.start.plus(20);
    testkit::open_file_in(&directory)
        .write_all_at(testkit::pages::Aligned::filled(7).bytes(), bad.offset())
        .unwrap();
    let sums = hold(&handle, run);
    let reader = handle.stored_reader();
    let mut bytes = buffer(run);
    let error = reader.read(STORE, run, &sums, &mut bytes).unwrap_err();
    assert_eq!(error.kind, IoErrorKind::Mismatch);
    for part in [run.part(0, 20), run.part(21, 43)] {
        let from = (part.start.0 - run.start.0) as usize;
        let sums = &sums[from..from + part.len as usize];
        reader.read(STORE, part, sums, &mut bytes[..part.bytes()]).unwrap();
    }
    release(&handle, run);
}

/// Who was told that a page is stored, and holds it, finds it there, whatever the guest does meanwhile.
#[test]
fn what_is_held_stays_readable_although_the_guest_gives_it_back() {
    let directory = place("held");
    let vm = stored(directory.path(), false);
    let (handle, run) = (vm.handle(), Run::new(PageNo(2048), 512));
    let other = Run::new(PageNo(4096), 2048);
    let sums = hold(&handle, run);
    handle.discard(Run::new(PageNo(1024), 8192)).unwrap();
    // Once the space of what is not held has gone, that of what is held would have, too.
    let left = (vm.pages() - 8192 + u64::from(run.len)) * PAGE_SIZE as u64;
    let used = || vm.stats().store.used_bytes;
    wait_for("all else is dropped", || (used() == left).then_some(()));
    other.pages().for_each(|page| vm.write(page, 2));
    handle.evict(other).unwrap();
    let mut bytes = buffer(run);
    handle.stored_reader().read(STORE, run, &sums, &mut bytes).unwrap();
    release(&handle, run);
    let left = left - run.bytes() as u64 + other.bytes() as u64;
    wait_for("it is dropped as well", || (used() == left).then_some(()));
    assert!(run.pages().all(|page| vm.is_zero(page)));
}

/// Clones two runs into a file and looks at it; the answer is how many pages are shared.
fn cloned(vm: &Vm, image: &Path) -> u64 {
    let handle = vm.handle();
    let runs = [Run::new(PageNo(16), 400), Run::new(PageNo(4000), 3000)];
    handle.evict(Run::new(PageNo(0), vm.pages() as u32)).unwrap();
    let file = File::options().read(true).write(true).create_new(true).open(image).unwrap();
    file.set_len(64 * MIB).unwrap();
    runs.iter().for_each(|run| drop(hold(&handle, *run)));
    let cloned = handle.stored_reader().clone_into(STORE, &file, &runs).unwrap();
    runs.iter().for_each(|run| release(&handle, *run));
    assert_eq!(cloned.shared + cloned.copied, 3400);
    // The store goes on: what it writes from now on is not in the file.
    runs[0].pages().for_each(|page| vm.write(page, 2));
    handle.evict(runs[0]).unwrap();
    runs[0].pages().for_each(|page| vm.write(page, 1));
    for run in runs {
        let mut bytes = vec![0; run.bytes()];
        file.read_exact_at(&mut bytes, run.start.offset()).unwrap();
        assert!(bytes == seen(vm, run), "{run:?} is not in the file");
    }
    let mut hole = vec![1; PAGE_SIZE];
    file.read_exact_at(&mut hole, PageNo(2000).offset()).unwrap();
    assert!(hole.iter().all(|byte| *byte == 0), "nothing else is");
    assert!(file.metadata().unwrap().blocks() * 512 < 16 * MIB, "it is sparse");
    cloned.shared
}

#[test]
fn runs_are_cloned_into_a_file() {
    let directory = place("clone");
    let vm = stored(directory.path(), false);
    println!("{} of 3400 pages are shared", cloned(&vm, &directory.path().join("image")));
    // To another file system, where that is one.
    let elsewhere = Path::new("/dev/shm").join(format!("vmemd-clone-{}", std::process::id()));
    if elsewhere.parent().is_some_and(Path::is_dir) {
        let shared = cloned(&vm, &elsewhere);
        std::fs::remove_file(&elsewhere).unwrap();
        assert_eq!(shared, 0, "nothing is shared between two file systems");
    }
}

#[test]
fn where_the_file_system_can_blocks_are_shared() {
    let directory = place("share");
    let disk = Disk::xfs(directory.path(), 512 * MIB).or_skip(Reason::Loop);
    let mount = disk.store();
    let vm = stored(Path::new(&mount), false);
    assert_eq!(cloned(&vm, &Path::new(&mount).join("image")), 3400);
}

#[test]
fn an_encrypted_store_is_not_cloned() {
    let directory = place("clone-sealed");
    let vm = stored(directory.path(), true);
    let file = File::create(directory.path().join("image")).unwrap();
    let error = vm.handle().stored_reader().clone_into(STORE, &file, &[Run::one(PageNo(0))]).unwrap_err();
    assert!(matches!(error, CloneError::Encrypted), "{error}");
    assert_eq!(file.metadata().unwrap().len(), 0);
}
