//! A device writes to a page that it had pinned before the page was reported as written: nothing but the time tells.

mod common;

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use common::vm::{MEMORY, Writer, engine, fill, options};
use common::{Place, Target};
use io_uring::{IoUring, opcode, types};
use migrate::{CancelFlag, Phase, Progress, SessionId, SourceOptions, SourceVm, TargetMemory, VmError, send};
use swapd::PAGE_SIZE;

/// The page that the device reads into: one that the guest itself leaves alone.
const PAGE: usize = 300;
const CONTENT: [u8; PAGE_SIZE] = [0xD7; PAGE_SIZE];

/// What the device's thread waits for.
#[derive(PartialEq)]
enum Moment {
    /// The first round begins.
    Copying,
    /// The VM is to stand still: all that can be scanned before that has been.
    Pausing,
}

/// A device with its I/O on a thread of its own: pins the page when the first round begins, and gets its data as late as it can.
fn device(base: usize, moments: Receiver<Moment>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let wait_for = |moment| while moments.recv().expect("the migration goes on") != moment {};
        let (data, mut sender) = std::io::pipe().unwrap();
        let mut ring = IoUring::new(4).unwrap();
        let page = libc::iovec { iov_base: (base + PAGE * PAGE_SIZE) as *mut _, iov_len: PAGE_SIZE };
        wait_for(Moment::Copying);
        // SAFETY: the page is the engine's memory, which outlives the ring; no Rust reference to it exists.
        unsafe { ring.submitter().register_buffers(&[page]) }.unwrap();
        let read =
            opcode::ReadFixed::new(types::Fd(data.as_raw_fd()), page.iov_base.cast(), PAGE_SIZE as u32, 0);
        // SAFETY: as above; the entry is waited for before the ring goes.
        unsafe { ring.submission().push(&read.build()) }.unwrap();
        ring.submit().unwrap();
        // Pinning counted as a write, and a scan has reported it. What comes now leaves no trace.
        wait_for(Moment::Pausing);
        sender.write_all(&CONTENT).unwrap();
        ring.submit_and_wait(1).unwrap();
        assert_eq!(ring.completion().next().unwrap().result(), PAGE_SIZE as i32);
    })
}

/// A VM that stands still only when its device does, as QEMU's.
struct WithDevice {
    writer: Writer,
    device: Option<JoinHandle<()>>,
    moments: Sender<Moment>,
}

impl SourceVm for WithDevice {
    fn does_dma(&self) -> bool {
        true
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.writer.pause()?;
        if let Some(device) = self.device.take() {
            self.moments.send(Moment::Pausing).expect("the device waits");
            device.join().expect("the device gets its data");
        }
        Ok(())
    }

    fn stood_still(&self) -> bool {
        self.writer.stood_still()
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.writer.resume()
    }

    fn save(&mut self) -> Result<Vec<u8>, VmError> {
        self.writer.save()
    }

    fn throttle(&mut self, percent: u8) {
        self.writer.throttle(percent);
    }

    fn give_up_name(&mut self, session: SessionId) -> Result<(), VmError> {
        self.writer.give_up_name(session)
    }

    fn take_name_back(&mut self) {
        self.writer.take_name_back();
    }
}

#[test]
fn what_a_device_writes_into_a_pinned_page_arrives() {
    let (place, place_there) = (Place::new(), Place::new());
    let (Some(here), Some(there)) = (engine(&place, MEMORY), engine(&place_there, MEMORY)) else { return };
    fill(&here);
    let base = here.memory_base() as usize;
    let (moment, moments) = channel();
    let writer = Writer::start(base, 400..2000);
    let mut vm = WithDevice { writer, device: Some(device(base, moments)), moments: moment.clone() };
    let target = Target::start(TargetMemory::Engine(there.handle()));
    let progress = |now: Progress| {
        if now.phase == Phase::Copying {
            // The device may have all that it waits for.
            let _ = moment.send(Moment::Copying);
        }
    };
    // Several rounds behind the one in which the page is pinned, whatever the guest writes.
    let moved = SourceOptions { downtime_target: Duration::ZERO, max_rounds: 5, ..options(target.address) };
    let report = send(&here.handle(), &mut vm, &moved, &progress, &CancelFlag::new(false)).unwrap();
    target.result().unwrap();
    println!("{report:?}");
    let word = |base: *mut u8| {
        // SAFETY: an aligned word of the engine's memory, which is alive; nobody writes to it any more.
        unsafe { base.add(PAGE * PAGE_SIZE).cast::<u64>().read_volatile() }
    };
    assert_eq!(word(here.memory_base()), u64::from_ne_bytes([0xD7; 8]), "the device has written");
    assert_eq!(word(there.memory_base()), word(here.memory_base()), "what the device wrote was left behind");
}
