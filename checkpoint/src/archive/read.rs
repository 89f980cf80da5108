//! Reading pages of images: in large pieces, several at a time, each compared with its checksums.
//!
//! A few threads each read a piece and look at it, so the disk has something to do while checksums are made.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::{io, thread};

use memmap2::MmapMut;
use swapd::digest::page_sum;
use swapd::units::bytes_of;
use swapd::{Cipher, PAGE_SIZE, PageNo, Run};

use super::error::ArchiveError;

/// Most pages of a piece: 4 MiB, which is enough for the disk to be busy with one alone.
const PIECE_PAGES: u32 = 1024;
/// Threads that read. More do not help: one makes checksums faster than most disks read.
const READERS: usize = 4;

/// How far something is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub bytes_done: u64,
    /// Bytes to do in all.
    pub bytes_total: u64,
}

/// Whoever is told how far something is, from any thread, and says whether to go on.
pub(super) type Watch<'a> = &'a (dyn Fn(Progress) -> bool + Sync);

/// Pages of one image that are to be read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece<'a> {
    /// Which of the images.
    pub(super) image: usize,
    pub(super) run: Run,
    pub(super) sums: &'a [u64],
}

impl<'a> Piece<'a> {
    /// Its parts, none of them too long to be read at once.
    pub(super) fn parts(self) -> impl Iterator<Item = Piece<'a>> {
        (0..self.run.len).step_by(PIECE_PAGES as usize).map(move |skip| {
            let run = self.run.part(skip, PIECE_PAGES.min(self.run.len - skip));
            let sums = &self.sums[skip as usize..][..run.len as usize];
            Piece { image: self.image, run, sums }
        })
    }
}

/// What becomes of a piece: its bytes as they are in the image (anything if they cannot be read), and those of its pages
/// that are damaged.
pub(super) type Each<'a> = &'a (dyn Fn(Piece<'_>, &[u8], &[PageNo]) -> Result<(), ArchiveError> + Sync);

/// Images of one chain, and what they are encrypted with.
pub(super) struct Images<'a> {
    pub(super) files: &'a [File],
    pub(super) cipher: Option<Cipher>,
}

/// Reads the pieces in about this order, and gives each to `each`, on any of a few threads.
pub(super) fn read_all(
    images: &Images<'_>,
    pieces: &[Piece<'_>],
    watch: Watch<'_>,
    each: Each<'_>,
) -> Result<(), ArchiveError> {
    let bytes_total = pieces.iter().map(|piece| piece.run.bytes() as u64).sum();
    let (next, done, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let failed: Mutex<Option<ArchiveError>> = Mutex::new(None);
    let show = || watch(Progress { bytes_done: done.load(Ordering::Relaxed), bytes_total });
    if !show() {
        return Err(ArchiveError::Cancelled);
    }
    let work = || {
        let memory = |len| {
            let made = MmapMut::map_anon(len);
            made.map_err(|error| ArchiveError::io("get memory to read", "checkpoints", error))
        };
        let mut buffer = memory(bytes_of(PIECE_PAGES.into()) as usize)?;
        let mut plain = memory(PAGE_SIZE)?;
        while !stop.load(Ordering::Relaxed) {
            let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed) as usize) else { break };
            let bytes = &mut buffer[..piece.run.bytes()];
            let damaged = read(images, *piece, bytes, &mut plain);
            each(*piece, bytes, &damaged)?;
            done.fetch_add(piece.run.bytes() as u64, Ordering::Relaxed);
            if !show() {
                return Err(ArchiveError::Cancelled);
            }
        }
        Ok(())
    };
    #[cfg(test)]
    let crash = super::crash::current();
    thread::scope(|scope| {
        for _ in 0..READERS.min(pieces.len()) {
            scope.spawn(|| {
                #[cfg(test)]
                super::crash::join(crash.clone());
                if let Err(error) = work() {
                    stop.store(true, Ordering::Relaxed);
                    failed.lock().expect("nobody panics with it").get_or_insert(error);
                }
            });
        }
    });
    failed.into_inner().expect("nobody panics with it").map_or(Ok(()), Err)
}

/// Reads a piece, and says which of its pages are not what was saved.
fn read(images: &Images<'_>, piece: Piece<'_>, bytes: &mut [u8], plain: &mut [u8]) -> Vec<PageNo> {
    let image = &images.files[piece.image];
    let whole = image.read_exact_at(bytes, piece.run.start.offset()).is_ok();
    let mut damaged = Vec::new();
    let pages = piece.run.pages().zip(bytes.chunks_exact_mut(PAGE_SIZE));
    for ((page, bytes), sum) in pages.zip(piece.sums) {
        // A disk that cannot read a page spoils all that was asked for with it.
        let there = whole || read_page(image, page, bytes).is_ok();
        let content = match &images.cipher {
            None => &*bytes,
            Some(cipher) => {
                plain.copy_from_slice(bytes);
                cipher.decrypt(Run::one(page), plain);
                &*plain
            }
        };
        if !there || page_sum(page, content) != *sum {
            damaged.push(page);
        }
    }
    damaged
}

fn read_page(image: &File, page: PageNo, bytes: &mut [u8]) -> io::Result<()> {
    image.read_exact_at(bytes, page.offset())
}
