//! Reading a stream: nothing of it is believed before its sum has been found right, and no more memory is taken than
//! for bytes that are there.

use std::io::{self, Read, Write};

use swapd::digest::page_sum;
use swapd::{PAGE_SIZE, PageNo, Run};
use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use super::error::StreamError;
use super::record::{
    HEADER_BYTES, OPENING_BYTES, Record, RecordKind, SUM_BYTES, long, may_be_opening, read_opening,
    record_bytes,
};
use crate::format::manifest::MAX_BYTES;
use crate::format::{FirstFaults, FormatError, Manifest, MemoryMap, PageKind};

const CHUNK: usize = 256 << 10;

/// Reads a stream. What it has comes in this order: [manifest](StreamReader::manifest), [map](StreamReader::map),
/// [state](StreamReader::state), [order of first faults](StreamReader::first_faults), then pages
/// until there are no more.
#[derive(Debug)]
pub struct StreamReader<R> {
    from: R,
    at: u64,
    total: u64,
    /// Of all that was read.
    sum: u64,
    /// The next record, read ahead.
    ahead: Option<(Record, u64)>,
}

/// Pages whose content comes next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    /// The pages, by rising number.
    pub runs: Vec<Run>,
    /// Their sums.
    pub sums: Vec<u64>,
}

/// What the pages of a stream must be.
#[derive(Debug)]
pub(super) struct Expected<'a> {
    /// None: it is sealed, and they are any pages, as many as the manifest says.
    map: Option<&'a MemoryMap>,
    memory_pages: u64,
    here: u64,
    /// All pages before this one have come.
    next: PageNo,
    count: u64,
}

impl<R: Read> StreamReader<R> {
    /// Reads the beginning of a stream.
    ///
    /// # Errors
    /// If it is none, or of a newer vmemd.
    pub fn open(mut from: R) -> Result<StreamReader<R>, StreamError> {
        let mut bytes = [0; OPENING_BYTES];
        let has = fill(&mut from, &mut bytes)?;
        if has < OPENING_BYTES {
            may_be_opening(&bytes[..has])?;
            return Err(FormatError::CutOff { has: has as u64, should: OPENING_BYTES as u64 }.into());
        }
        let (total, sum) = read_opening(&bytes)?;
        Ok(StreamReader { from, at: OPENING_BYTES as u64, total, sum, ahead: None })
    }

    /// Bytes of the whole stream, as it says.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Bytes that were read.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// The manifest.
    ///
    /// # Errors
    /// If it is damaged, or of a checkpoint that does not stand alone.
    pub fn manifest(&mut self) -> Result<Manifest, StreamError> {
        let (record, sum) = self.take(RecordKind::Manifest)?;
        if record.bytes > MAX_BYTES {
            return Err(FormatError::TooLong { has: record.bytes, should: MAX_BYTES }.into());
        }
        let mut bytes = Vec::new();
        self.body(record, sum, &mut bytes)?;
        let manifest = Manifest::decode(&bytes)?;
        if manifest.base.is_some() {
            return Err(FormatError::Value("a checkpoint in a stream that needs another one").into());
        }
        Ok(manifest)
    }

    /// Copies the map's file.
    ///
    /// # Errors
    /// If it cannot be read or written, or is damaged.
    pub fn map(&mut self, manifest: &Manifest, to: &mut impl Write) -> Result<(), StreamError> {
        self.part(RecordKind::Map, manifest.parts.map.bytes, to)
    }

    /// Copies the file with the state.
    ///
    /// # Errors
    /// If it cannot be read or written, or is damaged.
    pub fn state(&mut self, manifest: &Manifest, to: &mut impl Write) -> Result<(), StreamError> {
        self.part(RecordKind::State, manifest.parts.state.bytes, to)
    }

    fn part(&mut self, kind: RecordKind, bytes: u64, to: &mut impl Write) -> Result<(), StreamError> {
        let (record, sum) = self.take(kind)?;
        if record.bytes != bytes {
            return Err(FormatError::Value("a part of another length than the manifest says").into());
        }
        self.body(record, sum, to)
    }

    /// The order of first faults, if there is one.
    ///
    /// # Errors
    /// If it is damaged, or of another memory.
    pub fn first_faults(&mut self, manifest: &Manifest) -> Result<Option<FirstFaults>, StreamError> {
        if self.peek()?.kind != RecordKind::FirstFaults {
            return Ok(None);
        }
        let (record, sum) = self.take(RecordKind::FirstFaults)?;
        let mut bytes = Vec::new();
        self.body(record, sum, &mut bytes)?;
        let order = FirstFaults::decode(&bytes)?;
        if order.pages() != manifest.memory_pages() {
            return Err(FormatError::Value("an order of first faults of another memory").into());
        }
        Ok(Some(order))
    }

    /// The next pages, whose [content](StreamReader::content) is to be read then; false if there are no more, and the
    /// stream is whole.
    ///
    /// # Errors
    /// If they are not those that the map says, or their sums are others.
    pub(super) fn pages(
        &mut self,
        expected: &mut Expected<'_>,
        pages: &mut Pages,
        content: &mut [u8],
    ) -> Result<bool, StreamError> {
        if self.peek()?.kind == RecordKind::End {
            self.end(expected)?;
            return Ok(false);
        }
        let (record, sum) = self.take(RecordKind::Pages)?;
        let mut list = vec![0; (record.count * 8 + u64::from(record.pages) * 8) as usize];
        self.exactly(&mut list)?;
        let (runs, sums) = list.split_at(record.count as usize * 8);
        let words = |bytes: &[u8]| -> Vec<u64> { bytes.chunks_exact(8).map(|word| long(word, 0)).collect() };
        pages.runs.clear();
        pages.runs.extend(words(runs).into_iter().map(|word| Run::new(PageNo(word >> 32), word as u32)));
        pages.sums = words(sums);
        self.exactly(&mut content[..record.pages as usize * PAGE_SIZE])?;
        self.end_of_body(xxh3_64_with_seed(&list, sum))?;
        expected.take(pages)?;
        Ok(true)
    }

    /// Reads the last record, and sees that nothing is behind it.
    fn end(&mut self, expected: &Expected<'_>) -> Result<(), StreamError> {
        let (record, sum) = self.take(RecordKind::End)?;
        self.body(record, sum, &mut io::sink())?;
        if record.count != expected.count || expected.count != expected.here {
            return Err(FormatError::Value("pages of the map are missing").into());
        }
        if self.at != self.total || fill(&mut self.from, &mut [0])? > 0 {
            return Err(FormatError::TooLong { has: self.at.max(self.total) + 1, should: self.total }.into());
        }
        Ok(())
    }

    fn peek(&mut self) -> Result<Record, StreamError> {
        if let Some((record, _)) = self.ahead {
            return Ok(record);
        }
        let mut bytes = [0; HEADER_BYTES];
        self.exactly(&mut bytes)?;
        let (record, sum) = Record::decode(&bytes, self.sum)?;
        let whole = record_bytes(0).checked_add(record.bytes);
        if whole.is_none_or(|whole| whole - HEADER_BYTES as u64 > self.total.saturating_sub(self.at)) {
            return Err(FormatError::Value("a record that is longer than the stream").into());
        }
        self.ahead = Some((record, sum));
        Ok(record)
    }

    fn take(&mut self, kind: RecordKind) -> Result<(Record, u64), StreamError> {
        if self.peek()?.kind != kind {
            return Err(FormatError::Value("its records are not in order").into());
        }
        Ok(self.ahead.take().expect("it has just been looked at"))
    }

    fn body(&mut self, record: Record, seed: u64, to: &mut impl Write) -> Result<(), StreamError> {
        let mut sum = Xxh3::with_seed(seed);
        let mut chunk = vec![0; (CHUNK as u64).min(record.bytes) as usize];
        let mut left = record.bytes;
        while left > 0 {
            let part = &mut chunk[..(CHUNK as u64).min(left) as usize];
            self.exactly(part)?;
            sum.update(part);
            to.write_all(part).map_err(StreamError::Write)?;
            left -= part.len() as u64;
        }
        self.end_of_body(sum.digest())
    }

    fn end_of_body(&mut self, sum: u64) -> Result<(), StreamError> {
        let mut bytes = [0; SUM_BYTES as usize];
        self.exactly(&mut bytes)?;
        if u64::from_le_bytes(bytes) != sum {
            return Err(FormatError::Sum.into());
        }
        self.sum = sum;
        Ok(())
    }

    fn exactly(&mut self, bytes: &mut [u8]) -> Result<(), StreamError> {
        let has = fill(&mut self.from, bytes)?;
        self.at += has as u64;
        if has < bytes.len() {
            return Err(FormatError::CutOff { has: self.at, should: self.total.max(self.at + 1) }.into());
        }
        Ok(())
    }
}

impl<'a> Expected<'a> {
    /// The pages of that memory; without its map, if that is sealed.
    pub(super) fn new(map: Option<&'a MemoryMap>, manifest: &Manifest) -> Result<Expected<'a>, StreamError> {
        let (memory_pages, counts) = (manifest.memory_pages(), manifest.pages);
        if map.is_some_and(|map| map.pages() != memory_pages || map.counts() != counts) {
            return Err(FormatError::Value("its map and its manifest have not the same pages").into());
        }
        if counts.base > 0 {
            return Err(FormatError::Value("pages in a base, and no base").into());
        }
        Ok(Expected { map, memory_pages, here: counts.here, next: PageNo(0), count: 0 })
    }

    /// These pages have come.
    fn take(&mut self, pages: &Pages) -> Result<(), StreamError> {
        let mut sums = pages.sums.as_slice();
        for run in &pages.runs {
            // Before `end()`, which is only to be asked of a run of a memory.
            if run.len == 0 || run.start < self.next || run.start.0 + u64::from(run.len) > self.memory_pages {
                return Err(FormatError::Value("pages that are not in order").into());
            }
            let fits = self.map.is_none_or(|map| are_of(map, *run, sums));
            sums = match sums.get(run.len as usize..) {
                Some(rest) if fits => rest,
                _ => return Err(FormatError::Value("pages that are not those of the map").into()),
            };
            self.next = run.end();
            self.count += u64::from(run.len);
        }
        if sums.is_empty() { Ok(()) } else { Err(FormatError::Value("more sums than pages").into()) }
    }
}

/// Whether the map has these sums of these pages, and maybe of more that follow.
fn are_of(map: &MemoryMap, run: Run, mut sums: &[u64]) -> bool {
    map.pieces_in(run).all(|piece| {
        let here = piece.kind == PageKind::Here && sums.starts_with(piece.sums);
        sums = sums.get(piece.sums.len()..).unwrap_or_default();
        here
    })
}

/// Compares the pages with their sums.
pub(super) fn check(pages: &Pages, content: &[u8]) -> Result<(), StreamError> {
    let numbers = pages.runs.iter().flat_map(|run| run.pages());
    let pages = numbers.zip(content.as_chunks::<PAGE_SIZE>().0).zip(&pages.sums);
    let wrong = pages.into_iter().find(|((page, bytes), sum)| page_sum(*page, *bytes) != **sum);
    wrong.map_or(Ok(()), |((page, _), _)| Err(StreamError::Page(page)))
}

/// Reads a stream to its end, and tells what it is of; `each` is given all pages.
///
/// # Errors
/// If it is not whole.
pub fn inspect(from: impl Read, each: &mut dyn FnMut(&Pages, &[u8])) -> Result<Manifest, StreamError> {
    let mut reader = StreamReader::open(from)?;
    let manifest = reader.manifest()?;
    let mut bytes = Vec::new();
    reader.map(&manifest, &mut bytes)?;
    let map = if manifest.encryption.is_some() { None } else { Some(MemoryMap::decode(&bytes)?) };
    reader.state(&manifest, &mut io::sink())?;
    reader.first_faults(&manifest)?;
    let mut expected = Expected::new(map.as_ref(), &manifest)?;
    let mut content = vec![0; super::MAX_RECORD_PAGES as usize * PAGE_SIZE];
    let mut pages = Pages::default();
    while reader.pages(&mut expected, &mut pages, &mut content)? {
        let content = &content[..pages.sums.len() * PAGE_SIZE];
        check(&pages, content)?;
        each(&pages, content);
    }
    Ok(manifest)
}

/// Reads until the bytes are full or the source is at its end, and says how many there are.
fn fill(from: &mut impl Read, bytes: &mut [u8]) -> Result<usize, StreamError> {
    let mut has = 0;
    while has < bytes.len() {
        match from.read(&mut bytes[has..]) {
            Ok(0) => break,
            Ok(len) => has += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(StreamError::Read(error)),
        }
    }
    Ok(has)
}
