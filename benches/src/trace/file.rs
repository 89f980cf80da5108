//! Trace files. `docs/traces.md` describes every byte.
//!
//! A trace is written under another name and renamed when it is complete, so that a file of the right name is a whole
//! one. It is read in pieces: a file whose header lies about its length costs no memory. Nothing of it is used before
//! its checksum is known to be right.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use vmprocess::failure::{Failure, FailureKind};
use vmprocess::signals;
use xxhash_rust::xxh3::Xxh3Default;

use super::limits::{PAGES_MAX, TOUCHES_MAX};

const MAGIC: [u8; 8] = *b"VMEMDTRC";
const VERSION: u32 = 1;
/// Bytes of the header before its checksum.
const SUMMED_BYTES: usize = 64;
const HEADER_BYTES: usize = SUMMED_BYTES + 8;
/// Longest varint: 64 bits in groups of seven.
const VARINT_MAX: u64 = 10;
const ENTRY_BYTES_MAX: u64 = 2 * VARINT_MAX;
const CHUNK: usize = 64 << 10;

/// The events that a trace has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TraceKind {
    Touches,
    /// Faults, as a VM's engine saw them, each with its time.
    Faults,
}

/// The facts about a trace beside its entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: TraceKind,
    /// Pages of the VM's memory.
    pub(crate) pages: u64,
    /// Pages of the VM's RAM budget when the trace was recorded; 0: unknown.
    pub(crate) ram_pages: u64,
    pub(crate) entries: u64,
    /// How many entries at the start a replay plays and does not count.
    pub(crate) uncounted: u64,
    /// Faults that are missing, because they came faster than they could be written down.
    pub(crate) dropped: u64,
}

/// What happened to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Read = 0,
    Write = 1,
    /// A fault on memory that had no content.
    ZeroFault = 2,
    /// A fault on a page whose frame was still there.
    RescueFault = 3,
    /// A fault that had to wait for the store.
    StoreFault = 4,
}

impl What {
    fn of(tag: u64) -> Option<What> {
        [What::Read, What::Write, What::ZeroFault, What::RescueFault, What::StoreFault]
            .into_iter()
            .nth(tag as usize)
    }

    fn fits(self, kind: TraceKind) -> bool {
        matches!(self, What::Read | What::Write) == (kind == TraceKind::Touches)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) page: u32,
    pub(crate) what: What,
    /// Microseconds since the start of the recording; 0 in a trace of touches.
    pub(crate) at_us: u64,
}

/// Why a file is no trace.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TraceError {
    #[error("it is no trace of vmemd")]
    Magic,
    #[error("it has version {0} of the format, and this vmemd reads version {VERSION}: record it again")]
    Version(u32),
    #[error("it is cut off: {has} of {should} bytes are there")]
    CutOff { has: u64, should: u64 },
    #[error("it goes on behind its end: {has} bytes instead of {should}")]
    TooLong { has: u64, should: u64 },
    #[error("its header cannot be right: {0}")]
    Header(&'static str),
    #[error("entry {0} cannot be right")]
    Entry(u64),
    #[error("its checksum is wrong: it was damaged after it was written")]
    Sum,
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

impl Header {
    fn to_bytes(self, body_bytes: u64) -> [u8; SUMMED_BYTES] {
        let kind = match self.kind {
            TraceKind::Touches => 0u32,
            TraceKind::Faults => 1,
        };
        let mut bytes = [0; SUMMED_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&kind.to_le_bytes());
        let fields = [self.pages, self.ram_pages, self.entries, self.uncounted, body_bytes, self.dropped];
        for (place, field) in bytes[16..].chunks_exact_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    /// The header's facts, and the length of the body, which has been compared with the file's.
    fn from_bytes(bytes: &[u8; SUMMED_BYTES], file_bytes: u64) -> Result<(Header, u64), TraceError> {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        if bytes[..8] != MAGIC {
            return Err(TraceError::Magic);
        }
        if word(8) != VERSION {
            return Err(TraceError::Version(word(8)));
        }
        let kind = match word(12) {
            0 => TraceKind::Touches,
            1 => TraceKind::Faults,
            _ => return Err(TraceError::Header("it is of an unknown kind")),
        };
        let [pages, ram_pages, entries, uncounted, body_bytes, dropped] = [16, 24, 32, 40, 48, 56].map(long);
        let header = Header { kind, pages, ram_pages, entries, uncounted, dropped };
        if !(1..=PAGES_MAX).contains(&pages) {
            return Err(TraceError::Header("so much memory cannot be traced"));
        }
        if ram_pages > pages {
            return Err(TraceError::Header("more RAM than memory"));
        }
        if entries > TOUCHES_MAX {
            return Err(TraceError::Header("too many entries"));
        }
        if uncounted > entries {
            return Err(TraceError::Header("more entries that do not count than entries"));
        }
        if !(entries..=entries * ENTRY_BYTES_MAX).contains(&body_bytes) {
            return Err(TraceError::Header("so many entries do not take so many bytes"));
        }
        let should = HEADER_BYTES as u64 + body_bytes;
        match file_bytes {
            has if has < should => Err(TraceError::CutOff { has, should }),
            has if has > should => Err(TraceError::TooLong { has, should }),
            _ => Ok((header, body_bytes)),
        }
    }
}

/// Page and time of the entry before: the next one is written as the difference to it.
#[derive(Clone, Copy, Default)]
struct Last {
    page: u32,
    at_us: u64,
}

fn put_varint(into: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        into.push(value as u8 | 0x80);
        value >>= 7;
    }
    into.push(value as u8);
}

fn encode(into: &mut Vec<u8>, kind: TraceKind, last: &mut Last, entry: Entry) {
    let step = i64::from(entry.page) - i64::from(last.page);
    // Zigzag coding: a small step down becomes a small number as well.
    let zigzag = (step << 1 ^ step >> 63) as u64;
    put_varint(into, zigzag << 3 | entry.what as u64);
    if kind == TraceKind::Faults {
        put_varint(into, entry.at_us.saturating_sub(last.at_us));
    }
    *last = Last { page: entry.page, at_us: entry.at_us.max(last.at_us) };
}

/// A trace that is being written.
pub(crate) struct TraceWriter {
    file: BufWriter<File>,
    path: PathBuf,
    partial: PathBuf,
    kind: TraceKind,
    sum: Xxh3Default,
    buffer: Vec<u8>,
    last: Last,
    entries: u64,
    body_bytes: u64,
    complete: bool,
}

impl TraceWriter {
    /// # Errors
    /// If there cannot be such a file.
    pub(crate) fn create(path: &Path, kind: TraceKind) -> Result<TraceWriter, Failure> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".partial");
        let partial = path.with_file_name(name);
        if path.is_dir() {
            return Err(Failure::new(
                FailureKind::Usage,
                format!("{} is a directory: name a file", path.display()),
            ));
        }
        let mut file = File::create(&partial)
            .map_err(|error| Failure::io(format!("cannot make the trace {}", partial.display()), &error))?;
        // Zeros keep the header's place until its fields are known.
        file.write_all(&[0; HEADER_BYTES]).map_err(|error| cannot_write(&partial, &error))?;
        Ok(TraceWriter {
            file: BufWriter::with_capacity(CHUNK, file),
            path: path.to_owned(),
            partial,
            kind,
            sum: Xxh3Default::new(),
            buffer: Vec::with_capacity(CHUNK),
            last: Last::default(),
            entries: 0,
            body_bytes: 0,
            complete: false,
        })
    }

    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    /// # Errors
    /// If the disk is full, or the trace.
    pub(crate) fn push(&mut self, entry: Entry) -> Result<(), Failure> {
        if self.entries == TOUCHES_MAX {
            return Err(Failure::new(
                FailureKind::Resources,
                format!("a trace has at most {TOUCHES_MAX} entries"),
            ));
        }
        encode(&mut self.buffer, self.kind, &mut self.last, entry);
        self.entries += 1;
        if self.buffer.len() + ENTRY_BYTES_MAX as usize > CHUNK { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Failure> {
        signals::check()?;
        self.sum.update(&self.buffer);
        self.body_bytes += self.buffer.len() as u64;
        let written = self.file.write_all(&self.buffer);
        self.buffer.clear();
        written.map_err(|error| cannot_write(&self.partial, &error))
    }

    /// Makes the file a trace. The header's kind and count of entries are what was written.
    ///
    /// # Errors
    /// If the disk is full.
    pub(crate) fn finish(mut self, header: Header) -> Result<u64, Failure> {
        self.flush()?;
        let header = Header { kind: self.kind, entries: self.entries, ..header };
        let bytes = header.to_bytes(self.body_bytes);
        self.sum.update(&bytes);
        let sum = self.sum.digest().to_le_bytes();
        let finish = |file: &mut BufWriter<File>| {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&bytes)?;
            file.write_all(&sum)?;
            file.flush()?;
            std::fs::rename(&self.partial, &self.path)
        };
        finish(&mut self.file).map_err(|error| cannot_write(&self.path, &error))?;
        self.complete = true;
        Ok(HEADER_BYTES as u64 + self.body_bytes)
    }
}

impl Drop for TraceWriter {
    fn drop(&mut self) {
        if !self.complete {
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

fn cannot_write(path: &Path, error: &std::io::Error) -> Failure {
    Failure::io(format!("cannot write the trace {}", path.display()), error)
}

/// Reads a trace file; `each` gets the entries, and must not be believed before this has ended well.
///
/// # Errors
/// If it cannot be read, or is no whole trace.
pub(crate) fn read(path: &Path, each: impl FnMut(Entry)) -> Result<Header, Failure> {
    let open = || {
        let file = File::open(path)?;
        let facts = file.metadata()?;
        if !facts.is_file() {
            return Err(TraceError::Io(std::io::Error::other("it is no regular file")));
        }
        decode(file, facts.len(), each)
    };
    open().map_err(|error| {
        Failure::new(FailureKind::Usage, format!("cannot read the trace {}: {error}", path.display()))
    })
}

pub(crate) fn decode(
    mut file: impl Read,
    file_bytes: u64,
    mut each: impl FnMut(Entry),
) -> Result<Header, TraceError> {
    if file_bytes < HEADER_BYTES as u64 {
        let mut start = [0; MAGIC.len()];
        let is_start = file.read_exact(&mut start).is_ok() && start == MAGIC;
        let cut_off = TraceError::CutOff { has: file_bytes, should: HEADER_BYTES as u64 };
        return Err(if is_start { cut_off } else { TraceError::Magic });
    }
    let (mut bytes, mut sum) = ([0; SUMMED_BYTES], [0; 8]);
    file.read_exact(&mut bytes)?;
    file.read_exact(&mut sum)?;
    let (header, body_bytes) = Header::from_bytes(&bytes, file_bytes)?;
    let mut body = Body { file, left: body_bytes, chunk: Vec::new(), at: 0, sum: Xxh3Default::new() };
    let mut last = Last::default();
    for number in 0..header.entries {
        let entry = body.entry(&header, last, number)?;
        last = Last { page: entry.page, at_us: entry.at_us };
        each(entry);
    }
    if body.left > 0 || body.at < body.chunk.len() {
        return Err(TraceError::Header("there are bytes behind the last entry"));
    }
    body.sum.update(&bytes);
    if body.sum.digest().to_le_bytes() != sum {
        return Err(TraceError::Sum);
    }
    Ok(header)
}

/// The entries' bytes, read and summed in pieces.
struct Body<R> {
    file: R,
    left: u64,
    chunk: Vec<u8>,
    at: usize,
    sum: Xxh3Default,
}

impl<R: Read> Body<R> {
    fn entry(&mut self, header: &Header, last: Last, number: u64) -> Result<Entry, TraceError> {
        let wrong = TraceError::Entry(number);
        let word = self.varint(number)?;
        let what = What::of(word & 7).filter(|what| what.fits(header.kind));
        let zigzag = word >> 3;
        let step = (zigzag >> 1) as i64 ^ -((zigzag & 1) as i64);
        let page = i64::from(last.page).checked_add(step).and_then(|page| u64::try_from(page).ok());
        let passed_us = if header.kind == TraceKind::Faults { self.varint(number)? } else { 0 };
        let at_us = last.at_us.checked_add(passed_us);
        match (page.filter(|page| *page < header.pages), what, at_us) {
            (Some(page), Some(what), Some(at_us)) => Ok(Entry { page: page as u32, what, at_us }),
            _ => Err(wrong),
        }
    }

    fn varint(&mut self, number: u64) -> Result<u64, TraceError> {
        let mut value = 0u64;
        for group in 0..VARINT_MAX {
            let byte = self.byte(number)?;
            let bits = u64::from(byte & 0x7F);
            if group == VARINT_MAX - 1 && byte > 1 {
                break;
            }
            value |= bits << (7 * group);
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(TraceError::Entry(number))
    }

    fn byte(&mut self, number: u64) -> Result<u8, TraceError> {
        if self.at == self.chunk.len() {
            if self.left == 0 {
                return Err(TraceError::Entry(number));
            }
            let len = self.left.min(CHUNK as u64);
            self.chunk.resize(len as usize, 0);
            self.file.read_exact(&mut self.chunk)?;
            self.sum.update(&self.chunk);
            self.left -= len;
            self.at = 0;
        }
        self.at += 1;
        Ok(self.chunk[self.at - 1])
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
