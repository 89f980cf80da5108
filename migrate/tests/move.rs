//! A VM moves between two real engines in this process: every page arrives, nothing is paged, and whatever breaks before
//! the hand-over leaves it running where it was.

mod common;

use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use common::{Place, Target, eventually};
use migrate::{
    CancelFlag, PlainMemory, Progress, SendError, SourceOptions, SourceVm, TargetMemory, VmError, send,
};
use swapd::{Engine, EngineConfig, PAGE_SIZE, PageNo, Run, StartError, StoreConfig};

const MEMORY: u64 = 64 << 20;
const PAGES: u64 = MEMORY / PAGE_SIZE as u64;

/// None, with the reason said, on a host that cannot run an engine.
fn engine(place: &Place, budget_bytes: u64) -> Option<Engine> {
    let config = EngineConfig {
        memory_bytes: MEMORY,
        budget_bytes,
        store: StoreConfig { path: place.path().to_path_buf() },
        prealloc: false,
        lock: true,
        sampling: false,
    };
    match Engine::start(config, Box::new(|notice| println!("notice: {notice:?}"))) {
        Ok(engine) => Some(engine),
        Err(StartError::Host(reason)) => {
            println!("skipped: {reason}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The words of a page: a function of page and generation in the first and last, and the generation.
fn write(base: usize, page: u64, generation: u64) {
    let mix = (page << 24 | generation).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    for (word, value) in [(0, mix), (1, generation), (511, !mix)] {
        // SAFETY: within the engine's memory, which outlives the writer; volatile because others read it meanwhile.
        unsafe { ((base + page as usize * PAGE_SIZE) as *mut u64).add(word).write_volatile(value) };
    }
}

fn is_intact(base: usize, page: u64) -> bool {
    // SAFETY: as above.
    let word = |at| unsafe { ((base + page as usize * PAGE_SIZE) as *const u64).add(at).read_volatile() };
    let generation: u64 = word(1);
    let mix = (page << 24 | generation).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let zero = [0, 1, 511].iter().all(|at| word(*at) == 0_u64);
    zero || (word(0), word(511)) == (mix, !mix)
}

#[derive(Default)]
struct Switch {
    /// (asked to stand still, stands still, ends)
    state: Mutex<(bool, bool, bool)>,
    changed: Condvar,
    throttle: AtomicU8,
    writes: AtomicU64,
}

/// A "VM": a thread that writes to some of its memory, round and round, and can be paused between two pages.
struct Writer {
    switch: Arc<Switch>,
    thread: Option<JoinHandle<()>>,
    named: Arc<AtomicBool>,
    fail_pause: bool,
}

impl Writer {
    fn start(base: usize, pages: std::ops::Range<u64>) -> Writer {
        let switch = Arc::new(Switch::default());
        let shared = switch.clone();
        let thread = std::thread::spawn(move || {
            for generation in 1.. {
                for page in pages.clone() {
                    let mut state = shared.state.lock().unwrap();
                    while state.0 && !state.2 {
                        state.1 = true;
                        shared.changed.notify_all();
                        state = shared.changed.wait(state).unwrap();
                    }
                    if state.2 {
                        return;
                    }
                    state.1 = false;
                    write(base, page, generation);
                    shared.writes.fetch_add(1, Ordering::Relaxed);
                    drop(state);
                    // A crude throttle: time spent outside of "the guest".
                    for _ in 0..u32::from(shared.throttle.load(Ordering::Relaxed)) * 20 {
                        std::hint::spin_loop();
                    }
                }
            }
        });
        Writer { switch, thread: Some(thread), named: Arc::new(AtomicBool::new(true)), fail_pause: false }
    }

    fn writes(&self) -> u64 {
        self.switch.writes.load(Ordering::Relaxed)
    }

    fn assert_runs_here(&self) {
        let before = self.writes();
        eventually("the VM writes on", || self.writes() > before + 100);
        assert!(self.named.load(Ordering::SeqCst), "it runs without its name");
        assert_eq!(self.switch.throttle.load(Ordering::SeqCst), 0, "it is still throttled");
    }
}

impl SourceVm for Writer {
    fn pause(&mut self) -> Result<(), VmError> {
        let mut state = self.switch.state.lock().unwrap();
        state.0 = true;
        while !state.1 {
            state = self.switch.changed.wait(state).unwrap();
        }
        if self.fail_pause { Err(VmError("stuck".to_string())) } else { Ok(()) }
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.switch.state.lock().unwrap().0 = false;
        self.switch.changed.notify_all();
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(vec![42; 300_000])
    }

    fn throttle(&mut self, percent: u8) {
        self.switch.throttle.store(percent, Ordering::SeqCst);
    }

    fn give_up_name(&mut self) -> Result<(), VmError> {
        self.named.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn take_name_back(&mut self) {
        self.named.store(true, Ordering::SeqCst);
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.switch.state.lock().unwrap().2 = true;
        self.switch.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the writer panicked");
        }
    }
}

fn options(to: impl ToString) -> SourceOptions {
    SourceOptions::new("web", to.to_string())
}

/// Half of the memory written, some of it stored, some of it zeros on purpose.
fn fill(source: &Engine) {
    let base = source.memory_base() as usize;
    (0..PAGES / 2).for_each(|page| write(base, page, 0));
    // Touched, but zero: found by content.
    let at = (base + (PAGES / 2) as usize * PAGE_SIZE) as *mut u64;
    // SAFETY: within the engine's memory.
    unsafe { at.write_volatile(0) };
    source.handle().evict(Run::new(PageNo(1000), 3000)).unwrap();
}

fn compare(source: &Engine, target_base: *mut u8) {
    let source_base = source.memory_base() as usize;
    for page in 0..PAGES as usize {
        // SAFETY: a page of each memory; both VMs stand still.
        let bytes = |base: usize| unsafe {
            std::slice::from_raw_parts((base + page * PAGE_SIZE) as *const u8, PAGE_SIZE)
        };
        assert!(bytes(source_base) == bytes(target_base as usize), "page {page} differs");
        assert!(is_intact(target_base as usize, page as u64), "page {page} is torn");
    }
}

#[test]
fn a_writing_vm_moves_into_half_of_its_memory() {
    let (place, place_there) = (Place::new(), Place::new());
    let (Some(here), Some(there)) = (engine(&place, MEMORY), engine(&place_there, MEMORY / 2)) else {
        return;
    };
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
    let place = Place::new();
    let Some(here) = engine(&place, MEMORY / 4) else { return };
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
    let (place, place_there) = (Place::new(), Place::new());
    let (Some(here), Some(there)) = (engine(&place, MEMORY), engine(&place_there, MEMORY / 2)) else {
        return;
    };
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
    let (place, place_there) = (Place::new(), Place::new());
    let (Some(here), Some(there)) = (engine(&place, MEMORY), engine(&place_there, MEMORY / 2)) else {
        return;
    };
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
fn a_vm_that_cannot_be_stopped_or_started_runs_on_at_the_source() {
    let place = Place::new();
    let Some(here) = engine(&place, MEMORY) else { return };
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
fn nobody_there() {
    let place = Place::new();
    let Some(here) = engine(&place, MEMORY) else { return };
    let mut vm = Writer::start(here.memory_base() as usize, 0..100);
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error =
        send(&here.handle(), &mut vm, &options(unused), &|_| {}, &CancelFlag::new(false)).unwrap_err();
    assert!(matches!(error, SendError::Unreachable { .. }), "{error:?}");
    vm.assert_runs_here();
}

#[test]
fn a_web_server_is_no_target() {
    let place = Place::new();
    let Some(here) = engine(&place, MEMORY) else { return };
    let mut vm = Writer::start(here.memory_base() as usize, 0..100);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        std::io::Write::write_all(&mut socket, b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
            .unwrap();
        socket
    });
    let error =
        send(&here.handle(), &mut vm, &options(address), &|_| {}, &CancelFlag::new(false)).unwrap_err();
    assert!(matches!(error, SendError::Peer(_)), "{error:?}");
    vm.assert_runs_here();
    drop(server.join().unwrap());
}

/// Stands between source and target, and breaks every connection after so many bytes from the source.
fn breaking_proxy(to: std::net::SocketAddr, after: u64) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let budget = Arc::new(AtomicU64::new(after));
        let all: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        for from in listener.incoming().take(8) {
            let (from, to) = (from.unwrap(), TcpStream::connect(to).unwrap());
            all.lock().unwrap().extend([from.try_clone().unwrap(), to.try_clone().unwrap()]);
            let back = (to.try_clone().unwrap(), from.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut &back.0, &mut &back.1));
            let (budget, all) = (budget.clone(), all.clone());
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                loop {
                    let count = std::io::Read::read(&mut &from, &mut buffer).unwrap_or(0);
                    let left = budget.load(Ordering::SeqCst);
                    let spent = budget.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                        Some(left.saturating_sub(count as u64))
                    });
                    let passed = std::io::Write::write_all(&mut &to, &buffer[..count]).is_ok();
                    if count == 0 || !passed || spent.unwrap_or(0) <= count as u64 || left == 0 {
                        let both = all.lock().unwrap();
                        both.iter().for_each(|socket| drop(socket.shutdown(Shutdown::Both)));
                        return;
                    }
                }
            });
        }
    });
    address
}

#[test]
fn a_broken_link_leaves_the_vm_where_it_was() {
    let place = Place::new();
    let Some(here) = engine(&place, MEMORY) else { return };
    fill(&here);
    let mut vm = Writer::start(here.memory_base() as usize, 100..3000);
    // In the opening, in the heat map, in the first pages, and further on.
    for after in [10, 400, 50_000, 3 << 20, 20 << 20] {
        let place_there = Place::new();
        let there = engine(&place_there, MEMORY / 2).expect("the other one started");
        let target = Target::start(TargetMemory::Engine(there.handle()));
        let proxy = breaking_proxy(target.address, after);
        let error =
            send(&here.handle(), &mut vm, &options(proxy), &|_| {}, &CancelFlag::new(false)).unwrap_err();
        println!("after {after} bytes: {error:?}");
        assert!(error.still_here());
        vm.assert_runs_here();
        assert!(target.result().is_err());
        assert!(!target.vm.is_started());
    }
    let memory = PlainMemory::new(MEMORY).unwrap();
    let target = Target::start(TargetMemory::Plain(memory.clone()));
    send(&here.handle(), &mut vm, &options(target.address), &|_| {}, &CancelFlag::new(false)).unwrap();
    compare(&here, memory.base());
}
