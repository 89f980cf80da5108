//! `memory.map`: where each page of a checkpoint is, its checksum, and how hot it was. `docs/checkpoint-format.md` has
//! every byte.
//!
//! A map is runs of pages of one kind, and a checksum and the heat of each page that has content. So what it takes, in
//! a file and in memory, goes by what the VM had written, not by how large it is.

use std::fs::File;
use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};
use swapd::{PageNo, Run};

use super::chunks::{Reader, SUM_BYTES, Writer, long};
use super::{FormatError, MAX_PAGES};

const WHAT: &str = "memory map of a checkpoint";
const MAGIC: [u8; 8] = *b"VMEMDMAP";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 40;
const RUN_BYTES: u64 = 8;
/// Checksum and heat.
const CONTENT_BYTES: u64 = 8 + 1;
/// Low bits of a run's word that are its kind.
const KIND_BITS: u32 = 8;

/// What a checkpoint has of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum PageKind {
    /// It reads as zeros.
    Zero = 0,
    /// Its content is in this checkpoint's image.
    Here = 1,
    /// Its content is that of the same page of the base.
    Base = 2,
    /// The VM had lost it: a touch of it is a memory error.
    Lost = 3,
}

impl PageKind {
    fn of(number: u64) -> Option<PageKind> {
        [PageKind::Zero, PageKind::Here, PageKind::Base, PageKind::Lost].into_iter().nth(number as usize)
    }

    /// Whether such a page has content, and so a checksum.
    pub fn has_content(self) -> bool {
        matches!(self, PageKind::Here | PageKind::Base)
    }
}

/// How many pages of each kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PageCounts {
    /// Pages that read as zeros.
    pub zero: u64,
    /// Pages in this checkpoint's image.
    pub here: u64,
    /// Pages that are as in the base.
    pub base: u64,
    /// Pages without content, because the VM had lost it.
    pub lost: u64,
}

impl PageCounts {
    fn add(&mut self, kind: PageKind, pages: u64) {
        match kind {
            PageKind::Zero => self.zero += pages,
            PageKind::Here => self.here += pages,
            PageKind::Base => self.base += pages,
            PageKind::Lost => self.lost += pages,
        }
    }
}

/// Neighbouring pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapPiece<'a> {
    /// The pages.
    pub run: Run,
    /// What there is of them.
    pub kind: PageKind,
    /// Their checksums ([`swapd::digest::page_sum`]); none if the kind has no content.
    pub sums: &'a [u64],
    /// Their heat, likewise.
    pub heat: &'a [u8],
}

/// The beginning of a piece; the next one's is its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Start {
    page: u32,
    /// Pages with content before this one.
    content: u32,
    kind: PageKind,
}

const _: () = assert!(MAX_PAGES <= u32::MAX as u64);

/// A checkpoint's map of the VM's memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemoryMap {
    pages: u64,
    /// By rising page, from page 0; no two neighbours of one kind.
    starts: Vec<Start>,
    /// Of the pages with content, by rising page.
    sums: Vec<u64>,
    heat: Vec<u8>,
}

impl MemoryMap {
    /// Pages of the VM's memory.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// All pages, by rising number, in pieces that are as long as can be.
    pub fn pieces(&self) -> impl Iterator<Item = MapPiece<'_>> {
        (0..self.starts.len()).map(|at| self.piece(at))
    }

    /// The pages of the run, by rising number, in pieces.
    ///
    /// # Panics
    /// If the VM has no such pages.
    pub fn pieces_in(&self, run: Run) -> impl Iterator<Item = MapPiece<'_>> {
        let first = if run.len == 0 { self.starts.len() } else { self.piece_of(run.start) };
        assert!(run.end().0 <= self.pages, "{run:?} of {} pages", self.pages);
        let pieces = (first..self.starts.len()).map(|at| self.piece(at));
        pieces.take_while(move |piece| piece.run.start < run.end()).map(move |piece| piece.within(run))
    }

    /// What there is of the page.
    ///
    /// # Panics
    /// If the VM has no such page.
    pub fn kind(&self, page: PageNo) -> PageKind {
        self.starts[self.piece_of(page)].kind
    }

    /// The page's checksum, if it has content.
    ///
    /// # Panics
    /// If the VM has no such page.
    pub fn sum(&self, page: PageNo) -> Option<u64> {
        let start = self.starts[self.piece_of(page)];
        start.kind.has_content().then(|| self.sums[(start.content + page.0 as u32 - start.page) as usize])
    }

    /// How many pages of each kind there are.
    pub fn counts(&self) -> PageCounts {
        let mut counts = PageCounts::default();
        self.pieces().for_each(|piece| counts.add(piece.kind, piece.run.len.into()));
        counts
    }

    /// The map of the same memory with the pages of the base in the same image.
    #[must_use]
    pub fn standing_alone(&self) -> MemoryMap {
        let here = |start: &Start| match start.kind {
            PageKind::Base => Start { kind: PageKind::Here, ..*start },
            _ => *start,
        };
        let mut starts: Vec<Start> = self.starts.iter().map(here).collect();
        starts.dedup_by_key(|start| start.kind);
        MemoryMap { pages: self.pages, starts, sums: self.sums.clone(), heat: self.heat.clone() }
    }

    fn piece_of(&self, page: PageNo) -> usize {
        assert!(page.0 < self.pages, "{page} of {} pages", self.pages);
        self.starts.partition_point(|start| u64::from(start.page) <= page.0) - 1
    }

    fn piece(&self, at: usize) -> MapPiece<'_> {
        let start = self.starts[at];
        let (end, content) = match self.starts.get(at + 1) {
            Some(next) => (next.page, next.content as usize),
            None => (self.pages as u32, self.sums.len()),
        };
        let content = start.content as usize..content;
        MapPiece {
            run: Run::new(PageNo(start.page.into()), end - start.page),
            kind: start.kind,
            sums: &self.sums[content.clone()],
            heat: &self.heat[content],
        }
    }

    /// Bytes of its file.
    pub fn file_bytes(&self) -> u64 {
        file_bytes(self.starts.len() as u64, self.sums.len() as u64)
    }

    /// Writes the file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let mut writer = Writer::new(to);
        let mut opening = [0; 16];
        opening[..8].copy_from_slice(&MAGIC);
        opening[8..12].copy_from_slice(&VERSION.to_le_bytes());
        writer.bytes(&opening)?;
        writer.longs([self.pages, self.starts.len() as u64, self.sums.len() as u64])?;
        writer.longs(self.pieces().map(|piece| u64::from(piece.run.len) << KIND_BITS | piece.kind as u64))?;
        writer.longs(self.sums.iter().copied())?;
        writer.bytes(&self.heat)?;
        writer.finish()
    }

    /// The file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.file_bytes() as usize);
        self.write(&mut bytes).expect("memory can be written");
        bytes
    }

    /// What the file's bytes say.
    ///
    /// # Errors
    /// If they are no whole map.
    pub fn decode(bytes: &[u8]) -> Result<MemoryMap, FormatError> {
        MemoryMap::read(bytes, bytes.len() as u64)
    }

    /// Reads a map's file from its start.
    ///
    /// # Errors
    /// If it cannot be read, or is no whole map.
    pub fn read_file(file: &File) -> Result<MemoryMap, FormatError> {
        MemoryMap::read(file, file.metadata()?.len())
    }

    /// Reads a map of so many bytes.
    ///
    /// # Errors
    /// If it cannot be read, or is no whole map.
    pub fn read(from: impl Read, bytes: u64) -> Result<MemoryMap, FormatError> {
        let (mut reader, header) = Reader::open::<HEADER_BYTES>(from, bytes, WHAT, MAGIC, VERSION)?;
        let [pages, runs, content] = [16, 24, 32].map(|at| long(&header, at));
        if header[12..16] != [0; 4] {
            return Err(FormatError::Value("bytes of the header that are always zero are not"));
        }
        if !(1..=MAX_PAGES).contains(&pages) {
            return Err(FormatError::Value("no VM has so much memory"));
        }
        if runs > pages || content > pages {
            return Err(FormatError::Value("there is more in it than the VM has pages"));
        }
        reader.must_have(file_bytes(runs, content))?;
        let mut starts = Starts { pages, content, list: Vec::with_capacity(runs as usize), at: 0, before: 0 };
        reader.longs(runs, |word| starts.add(word))?;
        let starts = starts.finish()?;
        let mut sums = Vec::with_capacity(content as usize);
        reader.longs(content, |sum| {
            sums.push(sum);
            Ok(())
        })?;
        let heat = reader.bytes(content)?;
        reader.finish()?;
        Ok(MemoryMap { pages, starts, sums, heat })
    }
}

fn file_bytes(runs: u64, content: u64) -> u64 {
    HEADER_BYTES as u64 + runs * RUN_BYTES + content * CONTENT_BYTES + SUM_BYTES
}

impl MapPiece<'_> {
    fn within(self, run: Run) -> Self {
        let start = self.run.start.max(run.start);
        let skip = (start.0 - self.run.start.0) as u32;
        let len = (self.run.end().min(run.end()).0 - start.0) as u32;
        let content = if self.kind.has_content() { skip as usize..(skip + len) as usize } else { 0..0 };
        MapPiece {
            run: self.run.part(skip, len),
            kind: self.kind,
            sums: &self.sums[content.clone()],
            heat: &self.heat[content],
        }
    }
}

/// Runs as they are read, each checked against those before it.
struct Starts {
    pages: u64,
    content: u64,
    list: Vec<Start>,
    at: u64,
    /// Pages with content before `at`.
    before: u64,
}

impl Starts {
    fn add(&mut self, word: u64) -> Result<(), FormatError> {
        let len = word >> KIND_BITS;
        let kind = PageKind::of(word & ((1 << KIND_BITS) - 1))
            .ok_or(FormatError::Value("pages of an unknown kind"))?;
        if len == 0 || len > self.pages - self.at {
            return Err(FormatError::Value("its runs and the VM's memory are of different lengths"));
        }
        if self.list.last().is_some_and(|last| last.kind == kind) {
            return Err(FormatError::Value("two neighbouring runs of one kind"));
        }
        self.list.push(Start { page: self.at as u32, content: self.before as u32, kind });
        self.at += len;
        if kind.has_content() {
            self.before += len;
        }
        Ok(())
    }

    fn finish(self) -> Result<Vec<Start>, FormatError> {
        if self.at != self.pages {
            return Err(FormatError::Value("its runs and the VM's memory are of different lengths"));
        }
        if self.before != self.content {
            return Err(FormatError::Value("not every page with content has a checksum"));
        }
        Ok(self.list)
    }
}

/// A map that is being made, in any order: a page may change its kind any number of times.
#[derive(Clone, Debug)]
pub struct MapBuilder {
    kinds: Vec<u8>,
    /// Of pages without content: anything.
    sums: Vec<u64>,
}

impl MapBuilder {
    /// Of a memory of so many pages, which all read as zeros so far.
    ///
    /// # Panics
    /// If no VM can have so many.
    pub fn new(pages: u64) -> MapBuilder {
        assert!((1..=MAX_PAGES).contains(&pages), "{pages} pages");
        // Zeroed by the kernel when they are first touched.
        MapBuilder { kinds: vec![PageKind::Zero as u8; pages as usize], sums: vec![0; pages as usize] }
    }

    /// These pages are of a kind without content.
    ///
    /// # Panics
    /// If the kind has content, or the VM has no such pages.
    pub fn set(&mut self, run: Run, kind: PageKind) {
        assert!(!kind.has_content(), "pages with content have checksums");
        self.kinds[run.indices()].fill(kind as u8);
    }

    /// These pages are of a kind with content, and have these checksums.
    ///
    /// # Panics
    /// If the kind has no content, or the VM has no such pages, or there are not as many sums.
    pub fn set_content(&mut self, run: Run, kind: PageKind, sums: &[u64]) {
        assert!(kind.has_content(), "pages without content have no checksums");
        self.kinds[run.indices()].fill(kind as u8);
        self.sums[run.indices()].copy_from_slice(sums);
    }

    /// What there is of the page so far.
    ///
    /// # Panics
    /// If the VM has no such page.
    pub fn kind(&self, page: PageNo) -> PageKind {
        PageKind::of(self.kinds[page.index()].into()).expect("only kinds are put in")
    }

    /// The page's checksum, if it has content.
    ///
    /// # Panics
    /// If the VM has no such page.
    pub fn sum(&self, page: PageNo) -> Option<u64> {
        self.kind(page).has_content().then(|| self.sums[page.index()])
    }

    /// The map. `heat` has a byte a page, or none at all: then all are cold.
    ///
    /// # Panics
    /// If it has another number of bytes.
    pub fn finish(&self, heat: &[u8]) -> MemoryMap {
        let pages = self.kinds.len();
        assert!(heat.is_empty() || heat.len() == pages, "{} bytes of heat for {pages} pages", heat.len());
        let mut map =
            MemoryMap { pages: pages as u64, starts: Vec::new(), sums: Vec::new(), heat: Vec::new() };
        let mut at = 0;
        while at < pages {
            let end = at + same(&self.kinds[at..]);
            let kind = self.kind(PageNo(at as u64));
            map.starts.push(Start { page: at as u32, content: map.sums.len() as u32, kind });
            if kind.has_content() {
                map.sums.extend_from_slice(&self.sums[at..end]);
                match heat.get(at..end) {
                    Some(heat) => map.heat.extend_from_slice(heat),
                    None => map.heat.resize(map.sums.len(), 0),
                }
            }
            at = end;
        }
        map
    }
}

/// How many bytes at the start are the same. Looks at a block of them at a time while it can: memories are large, and
/// mostly of one kind for long.
fn same(bytes: &[u8]) -> usize {
    const BLOCK: usize = 512;
    let first = bytes[0];
    let blocks = bytes
        .chunks_exact(BLOCK)
        .take_while(|block| block.iter().fold(0, |others, byte| others | (byte ^ first)) == 0);
    let even = blocks.count() * BLOCK;
    even + bytes[even..].iter().take_while(|byte| **byte == first).count()
}

#[cfg(test)]
#[path = "map_tests.rs"]
mod tests;
