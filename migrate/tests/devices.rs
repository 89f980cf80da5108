//! A device has pinned a page, the page is reported as written, and only then the device writes to it: no scan
//! reports that write, and it must arrive all the same.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::cell::RefCell;
use std::io::{PipeReader, PipeWriter, Write};
use std::os::fd::AsRawFd;
use std::time::Duration;

use common::Target;
use common::vm::{MEMORY, PAGES, Writer, engine, fill, options};
use io_uring::{IoUring, opcode, types};
use migrate::reader::{Closed, FILLERS, Found, PageBuffer, Reader, Sink};
use migrate::{CancelFlag, LiveVm, SessionId, SourceOptions, SourceVm, TargetMemory, VmError, send};
use swapd::{BLOCK_PAGES, PAGE_SIZE, PageNo, Run};

/// The first page that the device reads into; the next ones follow. The guest itself leaves them alone.
const PAGE: usize = 300;
const CONTENT: [u8; PAGE_SIZE] = [0xD7; PAGE_SIZE];

/// A device that always has one read under way, whose data comes as late as it may: when it is waited for.
struct Device {
    ring: IoUring,
    data: PipeReader,
    sender: PipeWriter,
    base: usize,
    /// From one page that it reads into to the next.
    stride: usize,
    /// Reads begun.
    begun: usize,
}

impl Device {
    fn new(base: usize, stride: usize) -> Device {
        let (data, sender) = std::io::pipe().unwrap();
        Device { ring: IoUring::new(4).unwrap(), data, sender, base, stride, begun: 0 }
    }

    /// The page of its nth read.
    fn page(&self, nth: usize) -> usize {
        PAGE + nth * self.stride
    }

    /// Pins a page, which counts as a write, and asks for data.
    fn begin(&mut self) {
        let page = (self.base + self.page(self.begun) * PAGE_SIZE) as *mut u8;
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
    let mut vm = WithDevice { writer: Writer::start(base, 400..2000), device: Device::new(base, 1) };
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
    for page in (0..vm.device.begun).map(|nth| vm.device.page(nth)) {
        let word = |base: *mut u8| {
            // SAFETY: an aligned word of the engine's memory, which is alive; nobody writes to it any more.
            unsafe { base.add(page * PAGE_SIZE).cast::<u64>().read_volatile() }
        };
        assert_eq!(word(here.memory_base()), u64::from_ne_bytes([0xD7; 8]), "the device has not written");
        assert_eq!(word(there.memory_base()), word(here.memory_base()), "page {page} was left behind");
    }
}

/// What has been read of each page: nothing, zeros, or its first word.
struct Words {
    free: RefCell<Vec<PageBuffer>>,
    words: RefCell<Vec<Option<u64>>>,
}

impl Sink for Words {
    fn queues(&self) -> u32 {
        1
    }

    fn queue_of(&self, _: u32) -> u32 {
        0
    }

    async fn buffer(&self, _: u32) -> Option<PageBuffer> {
        Some(self.free.borrow_mut().pop().expect("one for each filler"))
    }

    fn unused(&self, _: u32, buffer: PageBuffer) {
        self.free.borrow_mut().push(buffer);
    }

    async fn take(&self, queue: u32, found: Found) -> Result<(), Closed> {
        let mut words = self.words.borrow_mut();
        match found {
            Found::Pages(mut buffer) => {
                let pages = buffer.runs().iter().flat_map(|run| run.indices());
                for (page, bytes) in pages.zip(buffer.content().chunks_exact(PAGE_SIZE)) {
                    words[page] = Some(u64::from_ne_bytes(bytes[..8].try_into().unwrap()));
                }
                buffer.clear();
                self.unused(queue, buffer);
            }
            Found::Zeros(runs) => runs.into_iter().for_each(|run| words[run.indices()].fill(Some(0))),
            Found::Lost(runs) => panic!("{runs:?} are lost"),
        }
        Ok(())
    }
}

async fn finish(reader: &mut Reader<Words>) {
    while reader.step().await.unwrap() {}
}

/// Each block is a portion. A read into it is begun before it is tracked, and its data comes when the device is waited
/// for: without that, behind the copy. And one is begun in a block that has been read.
#[test]
fn what_a_device_writes_into_a_portion_that_is_not_tracked_yet_is_read() {
    let place = common::place();
    let here = engine(&place, MEMORY);
    fill(&here);
    let (base, handle) = (here.memory_base() as usize, here.handle());
    let blocks = (PAGES / u64::from(BLOCK_PAGES)) as usize - 1;
    let mut vm =
        WithDevice { writer: Writer::start(base, 400..800), device: Device::new(base, BLOCK_PAGES as usize) };
    vm.device.begin();
    let sink = Words {
        free: RefCell::new((0..FILLERS).map(|_| PageBuffer::new(0, 64)).collect()),
        words: RefCell::new(vec![None; PAGES as usize]),
    };
    let dirty = handle.subscribe_dirty_in_parts().unwrap();
    let sink = tokio_uring::start(async {
        let mut reader = Reader::in_portions(&handle, dirty, sink).unwrap();
        for block in 0..blocks {
            let portion = vec![Run::new(PageNo::first_of(block), BLOCK_PAGES)];
            reader.track(portion.clone()).await.unwrap();
            vm.drain().unwrap();
            reader.open(&portion);
            while reader.survey().await.unwrap() {}
            reader.begin_first_round();
            finish(&mut reader).await;
        }
        // The rest, by what has been seen. The device is at it.
        while reader.look().await.unwrap() {}
        let portion = reader.next_portion().expect("a block is left");
        assert_eq!(portion, [Run::new(PageNo::first_of(blocks), BLOCK_PAGES)]);
        reader.track(portion.clone()).await.unwrap();
        vm.device.end();
        reader.open(&portion);
        while reader.survey().await.unwrap() {}
        reader.begin_first_round();
        finish(&mut reader).await;
        assert_eq!(reader.next_portion(), None);
        // Into a block that has been read: that is seen when it is begun, and the data comes when the VM stands still.
        vm.device.begun = 1;
        vm.device.begin();
        reader.scan().await.unwrap();
        vm.pause().unwrap();
        reader.scan().await.unwrap();
        reader.begin_last_round();
        finish(&mut reader).await;
        reader.close().await
    });
    let words = sink.words.borrow();
    for page in 0..PAGES as usize {
        // SAFETY: an aligned word of the engine's memory, which is alive; nobody writes to it any more.
        let there = unsafe { here.memory_base().add(page * PAGE_SIZE).cast::<u64>().read_volatile() };
        assert_eq!(words[page], Some(there), "page {page}");
    }
    for nth in 0..=blocks {
        assert_eq!(
            words[vm.device.page(nth)],
            Some(u64::from_ne_bytes([0xD7; 8])),
            "the device has not written"
        );
    }
}
