//! The simulated disk under a checkpoint's files: writes end in any order and late, come in parts, fail, are torn, find
//! no room, or hang.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use migrate::sim::reader::Region;
use migrate::sim::runtime::{pause, sleep};
use migrate::sim::world::world;
use swapd::PAGE_SIZE;

use super::coverage::{Cause, count};

/// What a part of a write takes at most, by the disk.
pub(crate) const SPEEDS: [Duration; 3] =
    [Duration::from_millis(8), Duration::from_millis(80), Duration::from_millis(500)];
/// The same for what only the page cache takes.
const CACHE: Duration = Duration::from_millis(1);

pub(crate) type Page = [u8; PAGE_SIZE];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Error {
    Broken,
    /// A part of it was written.
    Torn,
    Full,
}

impl Error {
    fn error(self) -> io::Error {
        io::Error::from_raw_os_error(if self == Error::Full { libc::ENOSPC } else { libc::EIO })
    }
}

#[derive(Default)]
struct Disk {
    /// After so many more changes, so many of them fail.
    failing: Option<(u32, u32, Error)>,
    /// The next write of an image takes so much longer.
    hang: Option<Duration>,
    /// Writes of images that have begun and not ended.
    under_way: u32,
    makes_holes: bool,
    step: Duration,
}

thread_local!(static DISK: RefCell<Disk> = RefCell::default());

fn with<T>(act: impl FnOnce(&mut Disk) -> T) -> T {
    DISK.with(|disk| act(&mut disk.borrow_mut()))
}

pub(crate) fn begin(makes_holes: bool, step: Duration) {
    with(|disk| *disk = Disk { makes_holes, step, ..Disk::default() });
}

pub(crate) fn fail(skip: u32, times: u32, error: Error) {
    with(|disk| disk.failing = Some((skip, times, error)));
}

pub(crate) fn hang(time: Duration) {
    with(|disk| disk.hang = Some(time));
}

pub(crate) fn heal() {
    with(|disk| (disk.failing, disk.hang) = (None, None));
}

pub(crate) fn under_way() -> u32 {
    with(|disk| disk.under_way)
}

pub(crate) fn makes_holes() -> bool {
    with(|disk| disk.makes_holes)
}

/// Whether this change is to fail.
pub(crate) fn change() -> Result<(), Error> {
    with(|disk| {
        let Some((skip, times, error)) = &mut disk.failing else { return Ok(()) };
        if *skip > 0 {
            *skip -= 1;
            return Ok(());
        }
        let error = *error;
        *times -= 1;
        if *times == 0 {
            disk.failing = None;
        }
        world().note(|| format!("the disk says no: {error:?}"));
        count(match error {
            Error::Broken => Cause::WriteFails,
            Error::Torn => Cause::WriteIsTorn,
            Error::Full => Cause::DiskIsFull,
        });
        Err(error)
    })
}

/// A file: an image has pages, the others a row of bytes.
#[derive(Debug)]
struct Inode {
    pages: RefCell<BTreeMap<u64, Rc<Page>>>,
    len: Cell<u64>,
    bytes: RefCell<Vec<u8>>,
}

#[derive(Debug)]
pub struct File(Rc<Inode>);

pub struct Metadata(u64);

impl Metadata {
    pub fn len(&self) -> u64 {
        self.0
    }
}

impl File {
    pub(crate) fn new() -> File {
        File(Rc::new(Inode { pages: RefCell::default(), len: Cell::new(0), bytes: RefCell::default() }))
    }

    /// A file that shares all blocks with this one.
    pub(crate) fn clone_of(other: &File) -> File {
        let file = File::new();
        file.0.pages.borrow_mut().clone_from(&other.0.pages.borrow());
        file.0.len.set(other.0.len.get());
        file
    }

    pub(crate) fn page(&self, page: u64) -> Option<Rc<Page>> {
        self.0.pages.borrow().get(&page).cloned()
    }

    pub(crate) fn pages(&self) -> Vec<(u64, Rc<Page>)> {
        self.0.pages.borrow().iter().map(|(page, bytes)| (*page, bytes.clone())).collect()
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.bytes.borrow().clone()
    }

    pub(crate) fn put(&self, page: u64, bytes: &Page) {
        assert!((page + 1) * PAGE_SIZE as u64 <= self.0.len.get(), "a page behind the image's end");
        self.0.pages.borrow_mut().insert(page, Rc::new(*bytes));
    }

    pub fn metadata(&self) -> io::Result<Metadata> {
        Ok(Metadata(self.0.len.get()))
    }

    pub fn set_len(&self, len: u64) -> io::Result<()> {
        pause(world().delay(CACHE));
        change().map_err(Error::error)?;
        self.0.len.set(len);
        Ok(())
    }

    #[expect(clippy::unnecessary_wraps, reason = "has the shape of the real one")]
    pub fn try_clone(&self) -> io::Result<File> {
        Ok(File(self.0.clone()))
    }
}

async fn may_hang() {
    let hang = with(|disk| disk.hang.take());
    if let Some(hang) = hang {
        world().note(|| format!("the disk hangs for {hang:?}"));
        count(Cause::DiskHangs);
        sleep(hang).await;
    }
}

/// As a write: the ring makes holes, too, and a disk may hang at them.
pub(crate) async fn punch_hole(file: &RingFile, at: u64, len: u64) -> io::Result<()> {
    let _under_way = UnderWay::begin();
    if !makes_holes() {
        return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    }
    may_hang().await;
    sleep(world().delay(CACHE)).await;
    change().map_err(Error::error)?;
    count(Cause::HoleIsMade);
    let page = PAGE_SIZE as u64;
    file.0.0.pages.borrow_mut().retain(|number, _| !(at..at + len).contains(&(number * page)));
    Ok(())
}

/// Bytes of a file that has no pages, on the ring: they are in the file when this has ended.
pub(crate) async fn write_bytes(file: &RingFile, bytes: Vec<u8>, at: u64) -> io::Result<()> {
    let _under_way = UnderWay::begin();
    may_hang().await;
    let step = with(|disk| disk.step);
    sleep(world().delay(step)).await;
    let verdict = change();
    let done = match verdict {
        Ok(()) => bytes.len(),
        Err(Error::Torn) => bytes.len() / 2,
        Err(_) => 0,
    };
    let mut row = file.0.0.bytes.borrow_mut();
    row.truncate(at as usize);
    row.extend_from_slice(&bytes[..done]);
    verdict.map_err(Error::error)
}

/// An image, for operations of a runtime's ring.
pub struct RingFile(File);

struct UnderWay;

impl UnderWay {
    fn begin() -> UnderWay {
        with(|disk| disk.under_way += 1);
        UnderWay
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        with(|disk| disk.under_way -= 1);
    }
}

impl RingFile {
    pub fn from_std(file: File) -> RingFile {
        RingFile(file)
    }

    /// The pages are in the file when the write has ended, and some of them before.
    pub async fn write_all_at<K: Unpin + 'static>(
        &self,
        from: Region<K>,
        at: u64,
    ) -> (io::Result<()>, Region<K>) {
        let result = self.write_pages(from.bytes().as_chunks().0, at / PAGE_SIZE as u64).await;
        (result, from)
    }

    async fn write_pages(&self, pages: &[Page], first: u64) -> io::Result<()> {
        let _under_way = UnderWay::begin();
        let mut written = 0;
        while written < pages.len() {
            may_hang().await;
            let step = with(|disk| disk.step);
            sleep(world().delay(step)).await;
            let left = pages.len() - written;
            let some = if world().random.one_in(3) {
                count(Cause::WriteIsShort);
                left.div_ceil(2)
            } else {
                left
            };
            let verdict = change();
            let done = match verdict {
                Ok(()) => some,
                Err(Error::Torn) => some / 2,
                Err(_) => 0,
            };
            for (nth, page) in pages[written..written + done].iter().enumerate() {
                self.0.put(first + (written + nth) as u64, page);
            }
            if verdict == Err(Error::Torn) {
                self.tear(first + (written + done) as u64, &pages[written + done]);
            }
            verdict.map_err(Error::error)?;
            written += some;
        }
        Ok(())
    }

    /// Half of the page is the old one.
    fn tear(&self, page: u64, bytes: &Page) {
        let mut torn = self.0.page(page).map_or([0; PAGE_SIZE], |old| *old);
        torn[..PAGE_SIZE / 2].copy_from_slice(&bytes[..PAGE_SIZE / 2]);
        self.0.put(page, &torn);
    }
}
