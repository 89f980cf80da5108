//! Reading stored pages on behalf of a migration or a checkpoint. The pages stay where they are: none comes into the
//! guest's RAM for it.
//!
//! The tier knows where a stored page lies, and the engine knows how it is stored (encrypted or not);
//! [`StoredReader`] hides both. A caller may do the I/O itself: [`StoredReader::files`] and [`StoredReader::parts`]
//! say what to read on the caller's ring, and [`StoredReader::open`] turns the bytes that were read into the pages
//! that the guest wrote, or says that they are something else.
//!
//! A page must be *held* ([`EngineHandle::hold_async`](crate::EngineHandle::hold_async)) from before its checksum is
//! asked for until it has been read. A page that is not held may be written anew meanwhile, or its place in the store
//! dropped: the bytes would then not fit the checksum.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use memmap2::MmapMut;
use swapcore::digest::page_sum;
use swapcore::error::{IoError, IoErrorKind};
use swapcore::units::{PAGE_SIZE, PageNo, Run, TierId};

use crate::cipher::Cipher;
use crate::driver::store::Store;
use crate::origin::Layers;

/// Bytes copied at a time, where neither blocks can be shared nor the kernel copies.
const COPY_BYTES: usize = 1 << 20;

/// Reads pages from a VM's tiers. Cheap to clone; may outlive its engine.
#[derive(Clone, Debug)]
pub struct StoredReader {
    pub(crate) store: Arc<Store>,
    pub(crate) cipher: Option<Arc<Cipher>>,
    pub(crate) origin: Option<Arc<Layers>>,
}

/// Pages of a run that lie one behind the other in one of their tier's files.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StoredPart {
    /// The pages.
    pub run: Run,
    /// Which of the tier's files ([`StoredReader::files`]) has them.
    pub file: usize,
    /// Byte offset of the first of the pages in it.
    pub at: u64,
}

/// How pages got into a file: how many in each way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cloned {
    /// Both files have the same blocks, until one of them changes: nothing was copied.
    pub shared: u64,
    /// The pages were copied: the file has blocks of its own for them.
    pub copied: u64,
}

/// The reason why pages could not be put into a file.
#[derive(Debug, thiserror::Error)]
pub enum CloneError {
    /// The tier is encrypted with a key of its own: a copy of what it has would be of no use.
    #[error("what an encrypted tier has is of no use elsewhere: it is encrypted with a key of its own")]
    Encrypted,
    /// The kernel neither shares the blocks nor copies them.
    #[error("pages cannot be cloned from {tier}")]
    Io {
        /// The tier whose pages these are.
        tier: TierId,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

impl StoredReader {
    /// The tier's files, for operations of the caller's own ring, which read into memory that is aligned to pages: they
    /// are open with `O_DIRECT`, but for those of an origin on a file system that cannot. None if the VM has no such
    /// tier.
    ///
    /// # Errors
    /// If this process can have no more descriptors.
    pub fn files(&self, tier: TierId) -> io::Result<Vec<File>> {
        match (tier, &self.origin) {
            (TierId::STORE, _) => Ok(vec![self.store.file().try_clone()?]),
            (TierId::ORIGIN, Some(origin)) => origin.files().map(File::try_clone).collect(),
            _ => Ok(Vec::new()),
        }
    }

    /// Whether to begin a read of that file of the tier's may take as long as the read itself, on a caller's ring as
    /// well: such reads are for threads.
    pub fn may_block(&self, tier: TierId, file: usize) -> bool {
        tier != TierId::STORE && self.origin(tier).layer(file).blocks
    }

    /// Whether that is so of any of the tier's files.
    pub fn any_may_block(&self, tier: TierId) -> bool {
        tier != TierId::STORE && self.origin(tier).any_blocks()
    }

    /// Where the run's pages lie in the tier's files, in ascending parts.
    ///
    /// # Panics
    /// If the VM has no such tier, as with every call here but [`StoredReader::files`]; or if the tier has no place for
    /// one of the pages.
    pub fn parts(&self, tier: TierId, run: Run) -> impl Iterator<Item = StoredPart> {
        let mut rest = run;
        std::iter::from_fn(move || {
            if rest.len == 0 {
                return None;
            }
            let (file, part) = match tier {
                TierId::STORE => (0, rest),
                tier => self.origin(tier).first_part(rest),
            };
            rest = rest.part(part.len, rest.len - part.len);
            let at =
                if tier == TierId::STORE { self.store.place_of(part.start) } else { part.start.offset() };
            Some(StoredPart { run: part, file, at })
        })
    }

    /// Whether the tier can have the page: each page has its place in the store, and in the origin each that one of its
    /// layers has.
    pub fn has_place(&self, tier: TierId, page: PageNo) -> bool {
        tier == TierId::STORE || !self.origin(tier).lacks(Run::one(page))
    }

    /// Whether the VM's pages are encrypted where they are stored, or were in the checkpoint that the VM began from.
    pub fn is_encrypted(&self) -> bool {
        self.cipher.is_some() || self.origin.as_ref().is_some_and(|origin| origin.cipher().is_some())
    }

    fn cipher(&self, tier: TierId) -> Option<&Cipher> {
        match tier {
            TierId::STORE => self.cipher.as_deref(),
            _ => self.origin.as_deref().and_then(Layers::cipher),
        }
    }

    fn origin(&self, tier: TierId) -> &Layers {
        let origin = self.origin.as_deref().filter(|_| tier == TierId::ORIGIN);
        origin.unwrap_or_else(|| panic!("{tier}, which this VM does not have"))
    }

    fn file(&self, tier: TierId, nth: usize) -> &File {
        if tier == TierId::STORE { self.store.file() } else { &self.origin(tier).layer(nth).file }
    }

    /// Turns bytes that were read from the run's places into the content of its pages, in place: decrypts them, and
    /// compares them with their checksums.
    ///
    /// # Errors
    /// [`IoErrorKind::Mismatch`]: one of the pages is not what was written. The bytes are decrypted all the same.
    ///
    /// # Panics
    /// If there are not as many bytes and sums as the run has pages.
    pub fn open(&self, tier: TierId, run: Run, sums: &[u64], bytes: &mut [u8]) -> Result<(), IoError> {
        if let Some(cipher) = self.cipher(tier) {
            cipher.decrypt(run, bytes);
        }
        verify(tier, run, sums, bytes)
    }

    /// Reads the run's pages into `bytes`, which begin at a multiple of 4096, and blocks until they are there.
    ///
    /// # Errors
    /// They cannot be read, or one of them is not what was written.
    ///
    /// # Panics
    /// As [`StoredReader::open`].
    pub fn read(&self, tier: TierId, run: Run, sums: &[u64], bytes: &mut [u8]) -> Result<(), IoError> {
        let failed = |error: io::Error| IoError { tier, write: false, kind: IoErrorKind::of(&error) };
        for part in self.parts(tier, run) {
            let from = (part.run.start.0 - run.start.0) as usize * PAGE_SIZE;
            let into = &mut bytes[from..from + part.run.bytes()];
            self.file(tier, part.file).read_exact_at(into, part.at).map_err(failed)?;
        }
        self.open(tier, run, sums, bytes)
    }

    /// Puts the runs' pages, all of them stored in this tier, into a file, page *n* at offset *n* x 4096: by sharing
    /// blocks where both are on one file system that can, else by a copy. The pages are not looked at: their
    /// checksums go along.
    ///
    /// # Errors
    /// The tier is encrypted, or the kernel refuses. A part may have been done.
    pub fn clone_into(&self, tier: TierId, file: &File, runs: &[Run]) -> Result<Cloned, CloneError> {
        if self.cipher(tier).is_some() {
            return Err(CloneError::Encrypted);
        }
        // A way that one of the tier's files refuses may be open to another.
        let mut cloners: Vec<Option<Cloner<'_>>> = Vec::new();
        let mut cloned = Cloned::default();
        for StoredPart { run, file: nth, at } in runs.iter().flat_map(|run| self.parts(tier, *run)) {
            if cloners.len() <= nth {
                cloners.resize_with(nth + 1, || None);
            }
            let cloner = cloners[nth].get_or_insert_with(|| Cloner {
                from: self.file(tier, nth),
                to: file,
                way: Way::Share,
                buffer: None,
            });
            let way = cloner
                .clone(at, run.start.offset(), run.bytes())
                .map_err(|source| CloneError::Io { tier, source })?;
            match way {
                Way::Share => cloned.shared += u64::from(run.len),
                Way::CopyInKernel | Way::Copy => cloned.copied += u64::from(run.len),
            }
        }
        Ok(cloned)
    }
}

/// Whether these bytes are the pages of the run as they were written.
///
/// # Errors
/// [`IoErrorKind::Mismatch`], if they are not.
///
/// # Panics
/// As [`StoredReader::open`].
pub fn verify(tier: TierId, run: Run, sums: &[u64], bytes: &[u8]) -> Result<(), IoError> {
    assert_eq!((bytes.len(), sums.len()), (run.bytes(), run.len as usize), "a page and a sum each");
    let mut pages = run.pages().zip(bytes.chunks_exact(PAGE_SIZE)).zip(sums);
    match pages.all(|((page, bytes), sum)| page_sum(page, bytes) == *sum) {
        true => Ok(()),
        false => Err(IoError { tier, write: false, kind: IoErrorKind::Mismatch }),
    }
}

/// The ways to put pages into a file, the best first. A way that a file system has refused once is not tried again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Share,
    CopyInKernel,
    Copy,
}

struct Cloner<'a> {
    from: &'a File,
    to: &'a File,
    way: Way,
    buffer: Option<MmapMut>,
}

impl Cloner<'_> {
    /// Puts the run's pages into the file by the best way that is left, and says by which.
    fn clone(&mut self, at: u64, to: u64, len: usize) -> io::Result<Way> {
        loop {
            let (result, next) = match self.way {
                Way::Share => (self.share(at, to, len), Way::CopyInKernel),
                Way::CopyInKernel => (self.copy_in_kernel(at, to, len), Way::Copy),
                Way::Copy => return self.copy(at, to, len).map(|()| Way::Copy),
            };
            match result {
                Ok(()) => return Ok(self.way),
                Err(error) if is_refused(&error) => self.way = next,
                Err(error) => return Err(error),
            }
        }
    }

    fn share(&self, at: u64, to: u64, len: usize) -> io::Result<()> {
        share(self.from, at, self.to, to, len as u64)
    }

    fn copy_in_kernel(&self, at: u64, to: u64, len: usize) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let (mut from_at, mut to_at) = ((at + done as u64) as i64, (to + done as u64) as i64);
            let (from, into) = (self.from.as_raw_fd(), self.to.as_raw_fd());
            let left = len - done;
            // SAFETY: the kernel reads and writes two offsets, which outlive the call.
            let copied = unsafe { libc::copy_file_range(from, &mut from_at, into, &mut to_at, left, 0) };
            match copied {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                copied if copied > 0 => done += copied as usize,
                _ => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }

    fn copy(&mut self, at: u64, to: u64, len: usize) -> io::Result<()> {
        if self.buffer.is_none() {
            // Mapped, so aligned for direct I/O.
            self.buffer = Some(MmapMut::map_anon(COPY_BYTES)?);
        }
        let buffer = self.buffer.as_mut().expect("just made");
        for done in (0..len).step_by(COPY_BYTES) {
            let part = &mut buffer[..COPY_BYTES.min(len - done)];
            self.from.read_exact_at(part, at + done as u64)?;
            self.to.write_all_at(part, to + done as u64)?;
        }
        Ok(())
    }
}

/// Makes `len` bytes of `to`, from `to_at` on, the same blocks as those of `from` from `at` on. False, and nothing is
/// done, if the two files cannot share blocks: another file system, or one that knows nothing of it.
///
/// # Errors
/// If the kernel refuses for another reason: no room, or a failing disk.
pub fn share_blocks(from: &File, at: u64, to: &File, to_at: u64, len: u64) -> io::Result<bool> {
    match share(from, at, to, to_at, len) {
        Ok(()) => Ok(true),
        Err(error) if is_refused(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn share(from: &File, at: u64, to: &File, to_at: u64, len: u64) -> io::Result<()> {
    let range = libc::file_clone_range {
        src_fd: from.as_raw_fd().into(),
        src_offset: at,
        src_length: len,
        dest_offset: to_at,
    };
    // SAFETY: the kernel reads one struct, which outlives the call; both descriptors are open as long as the files
    // are borrowed.
    match unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONERANGE as libc::Ioctl, &raw const range) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether this error means that this way never works here, so that the next one is to be tried.
fn is_refused(error: &io::Error) -> bool {
    let refusals = [libc::EOPNOTSUPP, libc::EXDEV, libc::EINVAL, libc::ENOTTY, libc::ENOSYS, libc::EBADF];
    error.raw_os_error().is_some_and(|errno| refusals.contains(&errno))
}
