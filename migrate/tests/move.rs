//! A VM moves between two real engines in this process: every page arrives and nothing is paged.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::Target;
use common::vm::{MEMORY, PAGES, Writer, compare, engine, engine_with, fill, options, restored, write};
use migrate::{CancelFlag, LiveVm, PlainMemory, Progress, SendError, SourceOptions, TargetMemory, send};
use swapd::PAGE_SIZE;

#[test]
fn a_writing_vm_moves_into_half_of_its_memory() {
    let (place, place_there) = (common::place(), common::place());
    let (here, there) = (engine(&place, MEMORY), engine(&place_there, MEMORY / 2));
    fill(&here);
    let mut vm = Writer::start(here.memory_base() as usize, 100..2000);
    let target = Target::start(TargetMemory::Engine(there.handle()));
    let phases = Mutex::new(Vec::new());
    let progress = |now: Progress| phases.lock().unwrap().push(now);
    let moved = SourceOptions { check_placement: true, ..options(target.address) };
    let report = send(&here.handle(), &mut vm, &moved, &progress, &CancelFlag::new(false)).unwrap();
    let received = target.result().unwrap();
    println!("{report:?}\n{received:?}");
    assert!(target.vm.is_started());
    assert_eq!(target.vm.loaded.lock().unwrap().as_ref().map(Vec::len), Some(300_000));
    assert!(!vm.named.load(Ordering::SeqCst));
    let writes = vm.writes();
    let stats = there.handle().stats().unwrap();
    assert!(stats.frames_bytes <= MEMORY / 2, "{stats:?}");
    assert_eq!((report.pageins_during, report.pageouts_during), (0, 0));
    assert_eq!(report.pages_ram + report.pages_store + report.pages_zero, PAGES);
    assert!(report.pages_zero >= PAGES / 2 && report.pages_ram > 0, "{report:?}");
    assert_eq!(received.pages_ram, report.pages_ram);
    assert_eq!(report.placement.map(|placement| placement.touched_pages), Some(0), "nothing ran there");
    // Most of what was stored and not touched is in the store still: nothing was paged in for the migration's sake.
    let at_source = here.handle().stats().unwrap();
    assert!(at_source.stored_bytes >= 500 * PAGE_SIZE as u64, "{at_source:?}");
    compare(&here, there.memory_base());
    assert_eq!(vm.writes(), writes, "the source's VM stands still");
}

#[test]
fn from_half_memory_into_plain_memory_over_one_stream() {
    from_half_memory(false);
}

#[test]
fn from_an_encrypted_store_too() {
    from_half_memory(true);
}

fn from_half_memory(encrypt: bool) {
    let place = common::place();
    let here = engine_with(&place, MEMORY / 4, encrypt);
    let base = here.memory_base() as usize;
    (0..PAGES).for_each(|page| write(base, page, 7));
    let before = here.handle().stats().unwrap();
    let mut vm = Writer::start(base, 0..500);
    let memory = PlainMemory::new(MEMORY).unwrap();
    let target = Target::start(TargetMemory::Plain(memory.clone()));
    let moved = SourceOptions { streams: 1, ..options(target.address) };
    let report = send(&here.handle(), &mut vm, &moved, &|_| {}, &CancelFlag::new(false)).unwrap();
    println!("{report:?}");
    assert_eq!((report.pages_ram, report.pages_store), (PAGES, 0));
    let after = here.handle().stats().unwrap();
    assert!(after.faults.store - before.faults.store <= 600, "{before:?} {after:?}");
    compare(&here, memory.base());
}

#[test]
fn an_idle_vm_needs_two_rounds() {
    let (place, place_there) = (common::place(), common::place());
    let (here, there) = (engine(&place, MEMORY), engine(&place_there, MEMORY / 2));
    fill(&here);
    let mut vm = Writer::start(here.memory_base() as usize, 0..1);
    vm.pause().unwrap();
    let target = Target::start(TargetMemory::Engine(there.handle()));
    let moved = SourceOptions { streams: 3, ..options(target.address) };
    let report = send(&here.handle(), &mut vm, &moved, &|_| {}, &CancelFlag::new(false)).unwrap();
    assert_eq!((report.rounds, report.throttle_max_percent), (2, 0));
    assert!(report.bytes_sent < MEMORY / 2 + (4 << 20), "{report:?}");
    compare(&here, there.memory_base());
}

#[test]
fn a_cancel_leaves_the_vm_where_it_was() {
    let (place, place_there) = (common::place(), common::place());
    let (here, there) = (engine(&place, MEMORY), engine(&place_there, MEMORY / 2));
    fill(&here);
    let mut vm = Writer::start(here.memory_base() as usize, 100..200);
    let target = Target::start(TargetMemory::Engine(there.handle()));
    let cancel = CancelFlag::new(false);
    let progress = |now: Progress| cancel.store(now.round > 2, Ordering::SeqCst);
    // So small a downtime that it goes on until it is cancelled.
    let endless =
        SourceOptions { downtime_target: Duration::ZERO, max_rounds: u32::MAX, ..options(target.address) };
    let error = send(&here.handle(), &mut vm, &endless, &progress, &cancel).unwrap_err();
    assert!(matches!(error, SendError::Cancelled) && error.still_here(), "{error:?}");
    let received = target.result().unwrap_err();
    assert!(received.to_string().contains("cancelled"), "{received:?}");
    vm.assert_runs_here();
    // Nothing is held: it can move again, to somewhere else.
    let memory = PlainMemory::new(MEMORY).unwrap();
    let other = Target::start(TargetMemory::Plain(memory.clone()));
    send(&here.handle(), &mut vm, &options(other.address), &|_| {}, &CancelFlag::new(false)).unwrap();
    compare(&here, memory.base());
}

#[test]
fn a_restored_vm_moves_while_pages_are_at_its_origin() {
    let (place, place_there) = (common::place(), common::place());
    let ((here, _), there) = (restored(&place, true), engine(&place_there, MEMORY / 2));
    let at_origin = here.handle().stats().unwrap().origin_bytes;
    assert!(at_origin > MEMORY / 4, "{at_origin} bytes");
    let mut vm = Writer::start(here.memory_base() as usize, 100..2000);
    let target = Target::start(TargetMemory::Engine(there.handle()));
    let report =
        send(&here.handle(), &mut vm, &options(target.address), &|_| {}, &CancelFlag::new(false)).unwrap();
    assert_eq!(report.pages_ram + report.pages_store + report.pages_zero, PAGES);
    target.result().unwrap();
    compare(&here, there.memory_base());
    let stats = here.handle().stats().unwrap();
    assert_eq!((stats.poisoned_pages, stats.store.read_errors, stats.store.checksum_mismatches), (0, 0, 0));
}

#[test]
fn a_vm_that_cannot_be_stopped_or_started_runs_on_at_the_source() {
    let place = common::place();
    let here = engine(&place, MEMORY);
    fill(&here);
    let mut vm = Writer::start(here.memory_base() as usize, 100..200);
    let target = Target::start(TargetMemory::Plain(PlainMemory::new(MEMORY).unwrap()));
    vm.fail_pause = true;
    let error = send(&here.handle(), &mut vm, &options(target.address), &|_| {}, &CancelFlag::new(false))
        .unwrap_err();
    assert!(matches!(error, SendError::Vm(_)), "{error:?}");
    assert!(target.result().unwrap_err().to_string().contains("stuck"));
    vm.assert_runs_here();
    vm.fail_pause = false;

    let target = Target::start(TargetMemory::Plain(PlainMemory::new(MEMORY).unwrap()));
    target.vm.refuse_start.store(true, Ordering::SeqCst);
    let error = send(&here.handle(), &mut vm, &options(target.address), &|_| {}, &CancelFlag::new(false))
        .unwrap_err();
    assert!(matches!(&error, SendError::GaveUp(text) if text.contains("VM failed")), "{error:?}");
    vm.assert_runs_here();
}

#[test]
fn a_page_that_the_store_lost_arrives_as_lost() {
    #[repr(align(4096))]
    struct Page([u8; PAGE_SIZE]);
    let (place, place_there) = (common::place(), common::place());
    let (here, there) = (engine(&place, MEMORY), engine(&place_there, MEMORY / 2));
    fill(&here);
    // One page in the middle of a stored run, behind the engine's back.
    std::os::unix::fs::FileExt::write_all_at(
        &testkit::open_file_in(&place),
        &Page([0xA5; PAGE_SIZE]).0,
        2000 << 12,
    )
    .unwrap();
    let mut vm = Writer::start(here.memory_base() as usize, 0..100);
    let target = Target::start(TargetMemory::Engine(there.handle()));
    let report =
        send(&here.handle(), &mut vm, &options(target.address), &|_| {}, &CancelFlag::new(false)).unwrap();
    assert_eq!(there.handle().stats().unwrap().poisoned_pages, 1);
    assert_eq!(report.pages_ram + report.pages_store + report.pages_zero, PAGES - 1);
    let bytes = |engine: &swapd::Engine, page: usize| {
        // SAFETY: a page that is not the poisoned one; both VMs stand still.
        unsafe { std::slice::from_raw_parts(engine.memory_base().add(page * PAGE_SIZE), PAGE_SIZE).to_vec() }
    };
    for page in [0, 50, 1000, 1999, 2001, 2047, 2048, 3999, 5000] {
        assert!(bytes(&here, page) == bytes(&there, page), "page {page} differs");
    }
}
