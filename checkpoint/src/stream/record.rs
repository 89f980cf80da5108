//! The bytes of a stream: its opening, and the headers of its records, each summed with all that was before it.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::format::FormatError;

const WHAT: &str = "stream of a checkpoint";
const MAGIC: [u8; 8] = *b"VMEMDLOG";
const VERSION: u32 = 1;
pub(super) const OPENING_BYTES: usize = 32;
pub(super) const HEADER_BYTES: usize = 32;
pub(super) const SUM_BYTES: u64 = 8;
/// Of an opening and of a header, what its sum is over.
const SUMMED: usize = 24;
/// Most pages of a record, 4 MiB: what is read or written at once.
pub const MAX_RECORD_PAGES: u32 = 1024;

/// What a record has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum RecordKind {
    /// The checkpoint's manifest.
    Manifest = 1,
    /// The map of its memory.
    Map = 2,
    /// Processors and devices.
    State = 3,
    /// The order of first touches of a VM that was restored from it.
    FirstFaults = 4,
    /// Pages.
    Pages = 5,
    /// Nothing: the stream is whole.
    End = 6,
}

impl RecordKind {
    /// All of them, in the order in which they come. Only that of first faults may be missing, and only pages come more
    /// than once, or never.
    pub const ALL: [RecordKind; 6] = [
        RecordKind::Manifest,
        RecordKind::Map,
        RecordKind::State,
        RecordKind::FirstFaults,
        RecordKind::Pages,
        RecordKind::End,
    ];
}

/// A record's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    /// What it has.
    pub kind: RecordKind,
    /// How many pages; of the last record, 0.
    pub pages: u32,
    /// In how many runs they are; of the last record, pages of the whole stream.
    pub count: u64,
    /// Bytes of its body.
    pub bytes: u64,
}

/// What a record with a body of so many bytes takes in a stream.
pub const fn record_bytes(body: u64) -> u64 {
    HEADER_BYTES as u64 + body + SUM_BYTES
}

/// The first bytes of a stream of so many bytes, and their sum.
pub(super) fn opening(total: u64) -> ([u8; OPENING_BYTES], u64) {
    let mut bytes = [0; OPENING_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..24].copy_from_slice(&total.to_le_bytes());
    let sum = xxh3_64(&bytes[..SUMMED]);
    bytes[SUMMED..].copy_from_slice(&sum.to_le_bytes());
    (bytes, sum)
}

/// Bytes of the whole stream that begins so, and the opening's sum.
pub(super) fn read_opening(bytes: &[u8; OPENING_BYTES]) -> Result<(u64, u64), FormatError> {
    if bytes[..8] != MAGIC {
        return Err(FormatError::Magic(WHAT));
    }
    match u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes")) {
        0 => return Err(FormatError::Value("no version of the format is 0")),
        found if found > VERSION => return Err(FormatError::Newer { found, known: VERSION }),
        _ => {}
    }
    let sum = xxh3_64(&bytes[..SUMMED]);
    if long(bytes, SUMMED) != sum {
        return Err(FormatError::Sum);
    }
    if bytes[12..16] != [0; 4] {
        return Err(FormatError::Value("bytes of the opening that are always zero are not"));
    }
    Ok((long(bytes, 16), sum))
}

/// A beginning that is too short to be read may still say that it is something else.
pub(super) fn may_be_opening(bytes: &[u8]) -> Result<(), FormatError> {
    let len = bytes.len().min(MAGIC.len());
    if bytes.is_empty() || bytes[..len] != MAGIC[..len] { Err(FormatError::Magic(WHAT)) } else { Ok(()) }
}

impl Record {
    /// The header's bytes and its sum, behind a sum.
    pub(super) fn encode(&self, before: u64) -> ([u8; HEADER_BYTES], u64) {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&(self.kind as u32).to_le_bytes());
        bytes[4..8].copy_from_slice(&self.pages.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.count.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.bytes.to_le_bytes());
        let sum = xxh3_64_with_seed(&bytes[..SUMMED], before);
        bytes[SUMMED..].copy_from_slice(&sum.to_le_bytes());
        (bytes, sum)
    }

    /// What the header behind a sum says, and its sum.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES], before: u64) -> Result<(Record, u64), FormatError> {
        let sum = xxh3_64_with_seed(&bytes[..SUMMED], before);
        if long(bytes, SUMMED) != sum {
            return Err(FormatError::Sum);
        }
        let half = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let kind = RecordKind::ALL.into_iter().find(|kind| *kind as u32 == half(0));
        let kind = kind.ok_or(FormatError::Value("a record of an unknown kind"))?;
        let record = Record { kind, pages: half(4), count: long(bytes, 8), bytes: long(bytes, 16) };
        record.check()?;
        Ok((record, sum))
    }

    fn check(&self) -> Result<(), FormatError> {
        let Record { kind, pages, count, bytes } = *self;
        let fits = match kind {
            RecordKind::Pages => {
                (1..=MAX_RECORD_PAGES).contains(&pages)
                    && (1..=u64::from(pages)).contains(&count)
                    && bytes == pages_bytes(pages, count)
            }
            RecordKind::End => pages == 0 && bytes == 0,
            _ => pages == 0 && count == 0,
        };
        if fits { Ok(()) } else { Err(FormatError::Value("a record whose header contradicts itself")) }
    }
}

/// Bytes of the body of so many pages in so many runs.
pub(super) const fn pages_bytes(pages: u32, runs: u64) -> u64 {
    runs * 8 + pages as u64 * (8 + swapd::PAGE_SIZE as u64)
}

pub(super) fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
