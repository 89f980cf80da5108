//! The sink that is an image: buffers of pages are written to where they belong, several at a time.
//!
//! A page is given at most once a round, and between two rounds all that is being written is waited for
//! ([`ImageSink::settle`]). So an old version of a page never comes behind a newer one.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;

use swapd::units::pages_in;
use swapd::{BLOCK_PAGES, Cipher, CloneError, Run};
use tokio::sync::Notify;

use super::error::SaveError;
use super::pages::PageTable;
use super::rate::{Rate, Work};
use super::stopwatch::Stopwatch;
use crate::format::PageKind;
use crate::outside::reader::{Closed, FILLERS, Found, PageBuffer, Sink, StoredRun};
use crate::outside::{File, Instant, RingFile, StoredReader, planted, punch_hole, sleep, spawn, write_bytes};

/// Pages of a buffer, which is one write where neighbours are written: 2 MiB.
const BUFFER_PAGES: u32 = BLOCK_PAGES;
/// Buffers, and so all the memory that pages take on their way: those that are being filled, and the others on their
/// way to the disk.
const BUFFERS: usize = QUEUES as usize * FILLERS + WRITES;
/// Most writes under way.
const WRITES: usize = 6;
/// Queues, each of which has its fillers: with more of them more is read from the store at a time. That the queues are
/// in no order among each other is no matter: a page is given once a round.
const QUEUES: u32 = 4;

const _: () = assert!(WRITES > 0, "nothing would be filled while something is written");

/// What a sink has done so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Counts {
    /// Bytes that were written.
    pub(super) written: u64,
    /// Pages that the image shares with the store.
    pub(super) shared: u64,
    /// Pages of which the base has the content.
    pub(super) same: u64,
}

/// An image that is being written. Its clones are the same one.
#[derive(Clone)]
pub(super) struct ImageSink(Rc<Image>);

struct Image {
    file: RingFile,
    /// The same file, for what the ring does not do.
    plain: File,
    stored: StoredReader,
    /// With which pages are encrypted before they are written.
    cipher: Option<Cipher>,
    /// Stored pages have been taken straight, or nobody knows yet whether they can be.
    straight: Cell<bool>,
    pages: RefCell<PageTable>,
    counts: Cell<Counts>,
    free: RefCell<Vec<PageBuffer>>,
    /// Buffers on their way to the disk.
    under_way: Stopwatch,
    rate: RefCell<Rate>,
    /// Fillers that the limit makes wait.
    held_back: Stopwatch,
    /// A buffer is free, nothing is under way, or nothing more is taken.
    changed: Notify,
    failed: RefCell<Option<SaveError>>,
    closed: Cell<bool>,
}

impl ImageSink {
    pub(super) fn new(
        image: File,
        stored: StoredReader,
        pages: PageTable,
        rate: Option<u64>,
        cipher: Option<Cipher>,
    ) -> io::Result<ImageSink> {
        let now = Instant::now();
        // Blocks of a store have not what an encrypted image is to have, whether that is encrypted or not.
        let straight = (cipher.is_none() || planted!(SharesPlainBlocks)).into();
        Ok(ImageSink(Rc::new(Image {
            file: RingFile::from_std(image.try_clone()?),
            plain: image,
            stored,
            cipher,
            straight,
            pages: pages.into(),
            counts: Cell::default(),
            free: (0..BUFFERS).map(|_| PageBuffer::new(0, BUFFER_PAGES)).collect::<Vec<_>>().into(),
            under_way: Stopwatch::new(),
            rate: Rate::new(rate, now).into(),
            held_back: Stopwatch::new(),
            changed: Notify::new(),
            failed: None.into(),
            closed: false.into(),
        })))
    }

    /// Waits until all that was taken is in the file.
    pub(super) async fn settle(&self) {
        while self.0.under_way.count() > 0 {
            self.0.changed.notified().await;
        }
    }

    /// Has bytes of another file written, which [`settle`](Self::settle) waits for, too. Must be called on the runtime.
    pub(super) fn write_beside(&self, file: Rc<RingFile>, what: &'static str, bytes: Vec<u8>, at: u64) {
        let image = self.0.clone();
        image.under_way.begin();
        spawn(async move {
            let written = write_bytes(&file, bytes, at).await;
            let believed = [("state", planted!(BelievesTheState)), ("map", planted!(BelievesTheMap))];
            if let Err(source) = written
                && !believed.contains(&(what, true))
            {
                image.fail(SaveError::Write { what, source });
            }
            image.under_way.end();
            image.changed.notify_waiters();
        });
    }

    /// Makes holes of pages that the image has and the checkpoint has not, which [`settle`](Self::settle) waits for,
    /// too. Must be called on the runtime.
    pub(super) fn punch(&self, holes: Vec<Run>) {
        let image = self.0.clone();
        image.under_way.begin();
        spawn(async move {
            for run in holes {
                match punch_hole(&image.file, run.start.offset(), run.bytes() as u64).await {
                    Ok(()) => {}
                    // They take room, and nobody looks at them.
                    Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => break,
                    Err(source) => {
                        image.fail(SaveError::Write { what: "image", source });
                        break;
                    }
                }
            }
            image.under_way.end();
            image.changed.notify_waiters();
        });
    }

    /// Nothing more is taken: whoever waits here is told.
    pub(super) fn close(&self) {
        self.0.closed.set(true);
        self.0.changed.notify_waiters();
    }

    /// From now on pages are written as fast as they come, and only on the ring: what the kernel does for
    /// [`Image::share`] blocks this thread for as long as the file system likes, and the VM stands still.
    pub(super) fn vm_stands_still(&self) {
        self.0.rate.borrow_mut().lift();
        self.0.straight.set(false);
        self.0.changed.notify_waiters();
    }

    /// Why nothing more can be written, if so.
    pub(super) fn take_error(&self) -> Option<SaveError> {
        self.0.failed.borrow_mut().take()
    }

    pub(super) fn counts(&self) -> Counts {
        self.0.counts.get()
    }

    /// What it has found to do, how much of that was written, and what that took. Without what its caller knows.
    pub(super) fn work(&self) -> Work {
        Work {
            written: pages_in(self.counts().written),
            busy: self.0.under_way.total(),
            held_back: self.0.held_back.total(),
            ..Work::default()
        }
    }

    pub(super) fn pages<T>(&self, work: impl FnOnce(&PageTable) -> T) -> T {
        work(&self.0.pages.borrow())
    }
}

impl Image {
    fn count(&self, change: impl FnOnce(&mut Counts)) {
        let mut counts = self.counts.get();
        change(&mut counts);
        self.counts.set(counts);
    }

    /// The first error is told. Nothing more is taken.
    fn fail(&self, error: SaveError) {
        self.failed.borrow_mut().get_or_insert(error);
        self.closed.set(true);
        self.changed.notify_waiters();
    }

    fn begin(self: &Rc<Self>, mut buffer: PageBuffer) {
        self.under_way.begin();
        if let Some(cipher) = &self.cipher
            && !planted!(WritesPlainPages)
        {
            encrypt(cipher, &mut buffer);
        }
        let bytes = buffer.content().len() as u64;
        self.rate.borrow_mut().writes(bytes, Instant::now());
        let image = self.clone();
        spawn(async move {
            let buffer = image.write(buffer).await;
            image.free.borrow_mut().push(buffer);
            image.count(|counts| counts.written += bytes);
            image.under_way.end();
            image.changed.notify_waiters();
        });
    }

    /// Writes a buffer's pages to their places, and gives it back empty.
    async fn write(&self, mut buffer: PageBuffer) -> PageBuffer {
        let mut first = 0;
        for run in joined(buffer.runs()) {
            if self.closed.get() {
                break;
            }
            let part = buffer.into_part(first, run.len);
            let (written, part) = self.file.write_all_at(part, run.start.offset()).await;
            buffer = part.into_keep();
            if let Err(source) = written
                && !planted!(IgnoresAWriteError)
            {
                self.fail(SaveError::Write { what: "image", source });
            }
            first += run.len;
        }
        buffer.clear();
        buffer
    }

    /// The store's blocks become the image's, too, if the file system can.
    fn share(&self, stored: &StoredRun<'_>) -> Result<bool, SaveError> {
        let pages = u64::from(stored.run.len);
        // Before: if it fails half-way, nobody knows what the image has of them.
        self.pages.borrow_mut().may_change(stored.run);
        let cloned = match self.stored.clone_into(stored.tier, &self.plain, &[stored.run]) {
            Ok(cloned) => cloned,
            Err(CloneError::Io { source, .. }) if is_full(&source) => {
                return Err(SaveError::Write { what: "image", source });
            }
            Err(_) if planted!(BelievesFailedClones) => Default::default(),
            // As every other page: they are read, and written.
            Err(_) => {
                self.straight.set(false);
                return Ok(false);
            }
        };
        // A copy by the kernel is slower than reading and writing past its page cache, and nobody has looked at what it
        // copied: these are read, and written once more, as are all others from now on.
        if cloned.shared < pages && !planted!(BelievesFailedClones) {
            self.straight.set(false);
            return Ok(false);
        }
        self.count(|counts| counts.shared += cloned.shared);
        self.pages.borrow_mut().writes(stored.run, stored.sums);
        Ok(true)
    }
}

impl Sink for ImageSink {
    fn queues(&self) -> u32 {
        QUEUES
    }

    fn queue_of(&self, block: u32) -> u32 {
        block % QUEUES
    }

    async fn buffer(&self, _: u32) -> Option<PageBuffer> {
        let image = &self.0;
        loop {
            if image.closed.get() {
                return None;
            }
            let wait = image.rate.borrow().wait(Instant::now());
            if let Some(wait) = wait {
                let _held_back = image.held_back.begins();
                tokio::select! {
                    () = sleep(wait) => {}
                    () = image.changed.notified() => {}
                }
            } else if let Some(buffer) = image.free.borrow_mut().pop() {
                return Some(buffer);
            } else {
                image.changed.notified().await;
            }
        }
    }

    fn unused(&self, _: u32, buffer: PageBuffer) {
        self.0.free.borrow_mut().push(buffer);
        self.0.changed.notify_waiters();
    }

    async fn take(&self, _: u32, found: Found) -> Result<(), Closed> {
        let image = &self.0;
        if image.closed.get() {
            return Err(Closed);
        }
        let mut pages = image.pages.borrow_mut();
        match found {
            Found::Pages(buffer) => {
                let mut sums = buffer.sums();
                for run in buffer.runs() {
                    let (these, rest) = sums.split_at(run.len as usize);
                    pages.writes(*run, these);
                    sums = rest;
                }
                image.begin(buffer);
            }
            Found::Zeros(runs) => runs.into_iter().for_each(|run| pages.is_bare(run, PageKind::Zero)),
            Found::Lost(runs) => runs.into_iter().for_each(|run| pages.is_bare(run, PageKind::Lost)),
        }
        Ok(())
    }

    fn places_by_use(&self) -> bool {
        false
    }

    fn has(&self, page: swapd::PageNo, sum: u64) -> bool {
        let same = self.0.pages.borrow_mut().is_in_base(page, sum);
        if same {
            self.0.count(|counts| counts.same += 1);
        }
        same
    }

    async fn take_stored(&self, stored: StoredRun<'_>) -> Result<bool, Closed> {
        if self.0.closed.get() {
            return Err(Closed);
        }
        // The kernel's copy has nobody else to wait for a file server than this thread.
        if !self.0.straight.get() || self.0.stored.any_may_block(stored.tier) {
            return Ok(false);
        }
        self.0.share(&stored).map_err(|error| {
            self.0.fail(error);
            Closed
        })
    }
}

/// Its content becomes what the image is to have. Its sums stay those of the pages.
fn encrypt(cipher: &Cipher, buffer: &mut PageBuffer) {
    let runs = buffer.runs().to_vec();
    let mut rest = buffer.content_mut();
    for run in runs {
        let (pages, behind) = rest.split_at_mut(run.bytes());
        cipher.encrypt(run, pages);
        rest = behind;
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Runs of one block each, as few as they can be: neighbours are one write.
fn joined(runs: &[Run]) -> Vec<Run> {
    let mut joined: Vec<Run> = Vec::with_capacity(runs.len());
    for run in runs {
        match joined.last_mut() {
            Some(last) if last.end() == run.start => last.len += run.len,
            _ => joined.push(*run),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use swapd::PageNo;

    use super::*;

    #[test]
    fn neighbours_are_written_together() {
        let runs = [Run::new(PageNo(500), 12), Run::new(PageNo(512), 5), Run::one(PageNo(600))];
        assert_eq!(joined(&runs), [Run::new(PageNo(500), 17), Run::one(PageNo(600))]);
        assert_eq!(joined(&[]), []);
    }
}
