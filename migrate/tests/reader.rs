//! The reader without a network: it writes the memory of a VM that runs to a file, in several rounds, and the file is
//! what the VM has when it stops.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;

use common::vm::{MEMORY, PAGES, Writer, engine, engine_with, fill, is_intact, restored};
use migrate::LiveVm;
use migrate::reader::{Closed, FILLERS, Found, PageBuffer, ReadError, Reader, Sink};
use swapd::digest::page_sum;
use swapd::{BLOCK_PAGES, Engine, PAGE_SIZE, PageNo, Run};
use testkit::until;
use tokio::sync::Notify;

const QUEUES: u32 = 2;
const BUFFER_PAGES: u32 = 64;

/// A sink that knows nothing but a file, in which page *n* is at byte *n* × 4096.
struct Image {
    file: File,
    /// A few buffers, for all queues together.
    free: RefCell<Vec<PageBuffer>>,
    freed: Notify,
    /// Takes so many buffers, and then nothing any more.
    ends_after: Cell<usize>,
    pages: Cell<u64>,
    zeros: Cell<u64>,
    lost: RefCell<BTreeSet<u64>>,
}

impl Image {
    fn new(place: &testkit::TempDir) -> Image {
        let file = File::options().read(true).write(true).create_new(true).open(place.path().join("image"));
        let file = file.unwrap();
        // Whatever the reader does not speak of is neither zero nor right.
        file.write_all_at(&vec![0xEE; MEMORY as usize], 0).unwrap();
        let buffers = QUEUES as usize * FILLERS + 1;
        Image {
            file,
            free: RefCell::new((0..buffers).map(|_| PageBuffer::new(0, BUFFER_PAGES)).collect()),
            freed: Notify::new(),
            ends_after: Cell::new(usize::MAX),
            pages: Cell::new(0),
            zeros: Cell::new(0),
            lost: RefCell::default(),
        }
    }

    fn put(&self, run: Run, bytes: &[u8]) {
        assert_eq!(run.start.block(), run.start.plus(run.len - 1).block(), "{run:?} crosses a block");
        self.file.write_all_at(bytes, run.start.0 * PAGE_SIZE as u64).unwrap();
        let mut lost = self.lost.borrow_mut();
        lost.retain(|page| !run.contains(PageNo(*page)));
    }

    fn put_pages(&self, buffer: &PageBuffer) {
        let mut rest = buffer.content();
        for run in buffer.runs() {
            let (bytes, behind) = rest.split_at(run.len as usize * PAGE_SIZE);
            self.put(*run, bytes);
            rest = behind;
        }
        assert!(rest.is_empty());
        let numbers = buffer.runs().iter().flat_map(|run| run.pages());
        let pages = numbers.zip(buffer.content().chunks_exact(PAGE_SIZE));
        let sums: Vec<_> = pages.map(|(page, bytes)| page_sum(page, bytes)).collect();
        assert_eq!(sums, buffer.sums(), "checksums that are not of these pages");
        self.pages.set(self.pages.get() + u64::from(buffer.pages()));
    }
}

impl Sink for Image {
    fn queues(&self) -> u32 {
        QUEUES
    }

    fn queue_of(&self, block: u32) -> u32 {
        block % QUEUES
    }

    async fn buffer(&self, _: u32) -> Option<PageBuffer> {
        loop {
            if self.ends_after.get() == 0 {
                self.freed.notify_waiters();
                return None;
            }
            if let Some(buffer) = self.free.borrow_mut().pop() {
                return Some(buffer);
            }
            self.freed.notified().await;
        }
    }

    fn unused(&self, _: u32, buffer: PageBuffer) {
        assert_eq!(buffer.pages(), 0);
        self.free.borrow_mut().push(buffer);
        self.freed.notify_one();
    }

    async fn take(&self, queue: u32, found: Found) -> Result<(), Closed> {
        if self.ends_after.get() == 0 {
            return Err(Closed);
        }
        match found {
            Found::Pages(mut buffer) => {
                assert!(buffer.runs().iter().all(|run| self.queue_of(run.start.block() as u32) == queue));
                self.put_pages(&buffer);
                buffer.clear();
                self.ends_after.set(self.ends_after.get() - 1);
                self.unused(queue, buffer);
            }
            Found::Zeros(runs) => {
                for run in runs {
                    self.put(run, &vec![0; run.len as usize * PAGE_SIZE]);
                    self.zeros.set(self.zeros.get() + u64::from(run.len));
                }
            }
            Found::Lost(runs) => {
                self.lost.borrow_mut().extend(runs.iter().flat_map(|run| run.pages()).map(|page| page.0));
            }
        }
        Ok(())
    }
}

/// What a checkpoint does: a round over everything, some over what is written meanwhile, then stop and the rest.
async fn read(reader: &mut Reader<Image>, vm: &mut Writer, rounds: u32) -> Result<(), ReadError> {
    reader.ask_heat().await?;
    while reader.survey().await? {}
    reader.begin_first_round();
    finish_round(reader).await?;
    for _ in 1..rounds {
        let before = vm.writes();
        until("the guest writes", || vm.writes() > before);
        reader.scan().await?;
        vm.drain().unwrap();
        assert!(reader.pages_for_next() > 0, "what the guest has written is not seen");
        reader.begin_round();
        finish_round(reader).await?;
    }
    vm.pause().unwrap();
    reader.scan().await?;
    reader.begin_last_round();
    while reader.step().await? {}
    assert_eq!((reader.pages_left(), reader.pages_for_next()), (0, 0));
    Ok(())
}

async fn finish_round(reader: &mut Reader<Image>) -> Result<(), ReadError> {
    while reader.step().await? {
        if reader.scan_is_due() {
            reader.scan().await?;
        }
    }
    assert_eq!(reader.pages_left(), 0);
    Ok(())
}

/// The file is what the guest has, and nothing is held nor tracked any more.
fn assert_same(engine: &Engine, image: &Image, but: &[u64]) {
    assert_eq!(image.lost.borrow().iter().copied().collect::<Vec<_>>(), but);
    let mut bytes = vec![0; PAGE_SIZE];
    for page in (0..PAGES).filter(|page| !but.contains(page)) {
        image.file.read_exact_at(&mut bytes, page * PAGE_SIZE as u64).unwrap();
        // SAFETY: a page of the engine's memory, which nobody writes to any more.
        let there = unsafe {
            let at = engine.memory_base().add(page as usize * PAGE_SIZE);
            std::slice::from_raw_parts(at, PAGE_SIZE)
        };
        assert!(there == bytes, "page {page} differs");
        assert!(is_intact(engine.memory_base() as usize, page), "page {page} is torn");
    }
}

/// Has the memory read into a file, and checks the file. Returns the reader's counts: pages with content, and zeros.
fn read_into_file(engine: &Engine, place: &testkit::TempDir, rounds: u32, but: &[u64]) -> (u64, u64) {
    let handle = engine.handle();
    let mut vm = Writer::start(engine.memory_base() as usize, 100..2000);
    let dirty = handle.subscribe_dirty().unwrap();
    let image = Image::new(place);
    let (image, given) = tokio_uring::start(async {
        let mut reader = Reader::new(&handle, dirty, image).unwrap();
        read(&mut reader, &mut vm, rounds).await.unwrap();
        let given = reader.pages_given();
        (reader.close().await, given)
    });
    assert_eq!(given, image.pages.get());
    assert_same(engine, &image, but);
    // Nothing is held: what is in the guest can leave.
    let block = Run::new(PageNo(0), BLOCK_PAGES);
    handle.evict(block).unwrap();
    let stays: Vec<_> = handle.resident_map().unwrap();
    assert!(stays.iter().all(|run| run.start >= block.end()), "{stays:?}");
    (given, image.zeros.get())
}

#[test]
fn a_writing_vm_is_read_into_a_file() {
    let place = common::place();
    let here = engine(&place, MEMORY / 4);
    fill(&here);
    let (pages, zeros) = read_into_file(&here, &place, 5, &[]);
    println!("{pages} pages with content, {zeros} zeros");
    // Every page of the first half once, and some of those that are written again.
    assert!(pages > PAGES / 2, "{pages}");
    assert!(zeros >= PAGES / 2, "{zeros}");
}

#[test]
fn from_an_encrypted_store_too() {
    let place = common::place();
    let here = engine_with(&place, MEMORY / 4, true);
    fill(&here);
    read_into_file(&here, &place, 3, &[]);
}

#[test]
fn a_page_that_the_store_lost_is_told() {
    #[repr(align(4096))]
    struct Page([u8; PAGE_SIZE]);
    let place = common::place();
    let here = engine(&place, MEMORY);
    fill(&here);
    let store = testkit::open_file_in(&place);
    // One page in the middle of a stored run, behind the engine's back.
    store.write_all_at(&Page([0xA5; PAGE_SIZE]).0, 3000 << 12).unwrap();
    read_into_file(&here, &place, 2, &[3000]);
}

/// Two thirds of what it has is at the origin, where the reader leaves it.
#[test]
fn a_restored_vm_is_read_from_its_origin_and_its_store() {
    for encrypt in [false, true] {
        let place = common::place();
        let (here, _) = restored(&place, encrypt);
        let before = here.handle().stats().unwrap();
        assert!(before.origin_bytes > MEMORY / 4 && before.store.used_bytes > 0, "{before:?}");
        read_into_file(&here, &place, 3, &[]);
        let after = here.handle().stats().unwrap();
        println!("at the origin: {} bytes, then {}", before.origin_bytes, after.origin_bytes);
    }
}

#[test]
fn a_page_that_the_origin_lost_is_told_and_the_rest_is_read() {
    let place = common::place();
    let (here, odd) = restored(&place, false);
    // Of the ten pages there, those with an odd number are in this layer.
    let file = File::options().write(true).open(odd).unwrap();
    file.write_all_at(&[0xA5; 100], (3011 << 12) + 8).unwrap();
    file.sync_all().unwrap();
    read_into_file(&here, &place, 2, &[3011]);
}

#[test]
fn a_sink_that_ends_ends_the_reader_and_leaves_nothing_behind() {
    let place = common::place();
    let here = engine(&place, MEMORY);
    fill(&here);
    let handle = here.handle();
    let mut vm = Writer::start(here.memory_base() as usize, 100..2000);
    let image = Image::new(&place);
    image.ends_after.set(5);
    let dirty = handle.subscribe_dirty().unwrap();
    let image = tokio_uring::start(async {
        let mut reader = Reader::new(&handle, dirty, image).unwrap();
        let error = read(&mut reader, &mut vm, 3).await.unwrap_err();
        assert!(matches!(error, ReadError::Closed), "{error:?}");
        reader.close().await
    });
    assert!(image.pages.get() <= 5 * u64::from(BUFFER_PAGES));
    // The same VM can be read again, and to the end.
    drop(vm);
    std::fs::remove_file(place.path().join("image")).unwrap();
    read_into_file(&here, &place, 2, &[]);
}
