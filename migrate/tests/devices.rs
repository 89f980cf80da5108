//! A device has pinned a page, the page is reported as written, and only then the device writes to it: no scan
//! reports that write, and it must arrive all the same.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::io::{PipeReader, PipeWriter, Write};
use std::os::fd::AsRawFd;
use std::time::Duration;

use common::Target;
use common::vm::{MEMORY, Writer, engine, fill, options};
use io_uring::{IoUring, opcode, types};
use migrate::{CancelFlag, LiveVm, SessionId, SourceOptions, SourceVm, TargetMemory, VmError, send};
use swapd::PAGE_SIZE;

/// The first page that the device reads into; the next ones follow. The guest itself leaves them alone.
const PAGE: usize = 300;
const CONTENT: [u8; PAGE_SIZE] = [0xD7; PAGE_SIZE];

/// A device that always has one read under way, whose data comes as late as it may: when it is waited for.
struct Device {
    ring: IoUring,
    data: PipeReader,
    sender: PipeWriter,
    base: usize,
    /// Reads begun.
    begun: usize,
}

impl Device {
    fn new(base: usize) -> Device {
        let (data, sender) = std::io::pipe().unwrap();
        Device { ring: IoUring::new(4).unwrap(), data, sender, base, begun: 0 }
    }

    /// Pins a page, which counts as a write, and asks for data.
    fn begin(&mut self) {
        let page = (self.base + (PAGE + self.begun) * PAGE_SIZE) as *mut u8;
        let buffer = libc::iovec { iov_base: page.cast(), iov_len: PAGE_SIZE };
        // SAFETY: the page is the engine's memory, which outlives the ring; no Rust reference to it exists.
        unsafe { self.ring.submitter().register_buffers(&[buffer]) }.unwrap();
        let read = opcode::ReadFixed::new(types::Fd(self.data.as_raw_fd()), page, PAGE_SIZE as u32, 0);
        // SAFETY: as above.
        unsafe { self.ring.submission().push(&read.build()) }.unwrap();
        self.ring.submit().unwrap();
        self.begun += 1;
    }

    /// The data comes, and leaves no trace but itself.
    fn end(&mut self) {
        self.sender.write_all(&CONTENT).unwrap();
        self.ring.submit_and_wait(1).unwrap();
        assert_eq!(self.ring.completion().next().unwrap().result(), PAGE_SIZE as i32);
        self.ring.submitter().unregister_buffers().unwrap();
    }
}

/// A VM that stands still only when its device does, as QEMU's.
struct WithDevice {
    writer: Writer,
    device: Device,
}

impl LiveVm for WithDevice {
    fn drain(&mut self) -> Result<(), VmError> {
        self.device.end();
        self.device.begin();
        Ok(())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.writer.pause()?;
        self.device.end();
        Ok(())
    }

    fn stood_still(&self) -> bool {
        self.writer.stood_still()
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.writer.resume()
    }

    fn save(&mut self, to: &mut dyn Write) -> Result<(), VmError> {
        self.writer.save(to)
    }

    fn throttle(&mut self, percent: u8) {
        self.writer.throttle(percent);
    }
}

impl SourceVm for WithDevice {
    fn give_up_name(&mut self, session: SessionId) -> Result<(), VmError> {
        self.writer.give_up_name(session)
    }

    fn take_name_back(&mut self) {
        self.writer.take_name_back();
    }
}

#[test]
fn what_a_device_writes_into_pinned_pages_arrives() {
    let (place, place_there) = (common::place(), common::place());
    let (here, there) = (engine(&place, MEMORY), engine(&place_there, MEMORY));
    fill(&here);
    let base = here.memory_base() as usize;
    let mut vm = WithDevice { writer: Writer::start(base, 400..2000), device: Device::new(base) };
    // Before anybody looks for what is written.
    vm.device.begin();
    let target = Target::start(TargetMemory::Engine(there.handle()));
    // Several rounds, whatever the guest writes.
    let moved = SourceOptions { downtime_target: Duration::ZERO, max_rounds: 5, ..options(target.address) };
    let report = send(&here.handle(), &mut vm, &moved, &|_| {}, &CancelFlag::new(false)).unwrap();
    target.result().unwrap();
    println!("{report:?}");
    // One before it all, and one in the first and a later round.
    assert!(vm.device.begun >= 3, "{} reads", vm.device.begun);
    for page in PAGE..PAGE + vm.device.begun {
        let word = |base: *mut u8| {
            // SAFETY: an aligned word of the engine's memory, which is alive; nobody writes to it any more.
            unsafe { base.add(page * PAGE_SIZE).cast::<u64>().read_volatile() }
        };
        assert_eq!(word(here.memory_base()), u64::from_ne_bytes([0xD7; 8]), "the device has not written");
        assert_eq!(word(there.memory_base()), word(here.memory_base()), "page {page} was left behind");
    }
}
