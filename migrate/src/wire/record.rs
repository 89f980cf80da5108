//! The header of every message behind a connection's opening, and its checksum.

use xxhash_rust::xxh3::xxh3_64_with_seed;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{WireError, at_most};
use crate::session::SessionId;

/// First bytes of every record: "vM".
pub const RECORD_MAGIC: u16 = u16::from_le_bytes(*b"vM");
/// Bytes of a record's header.
pub const HEADER_BYTES: usize = 32;
/// Most pages whose content one record carries: 1 MiB.
pub const MAX_RECORD_PAGES: u32 = 256;
/// Most runs in a record without content.
pub const MAX_RECORD_RUNS: u32 = 512;
/// Most bytes between a header of a data stream and the pages' content.
pub const MAX_DATA_META: usize = 16 * MAX_RECORD_PAGES as usize;
/// Most bytes of a control message.
pub const MAX_CONTROL_META: usize = 256 << 10;
/// Most pages whose heat one record carries.
pub const MAX_PART_PAGES: usize = 256 << 10;
/// Most bytes of a text for people.
pub const MAX_TEXT: usize = 1024;

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);
const _: () = assert!(MAX_RECORD_RUNS as usize * 8 <= MAX_DATA_META);

/// What a record is. The numbers are those on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum RecordKind {
    // On data streams.
    /// Pages with content: runs, checksums, and the content behind them.
    Pages = 1,
    /// Runs of pages that read as zeros.
    Zeros = 2,
    /// Runs of pages that the source has lost: a touch of them is a memory error at the target, too.
    Poisoned = 3,
    /// The round's pages on this stream are all sent; with the stream's totals.
    RoundEnd = 4,
    // On the control connection, to the target.
    /// Some of the heat map.
    Heat = 16,
    /// Some of the vCPU and device state.
    State = 17,
    /// All pages are sent; with the totals of all streams.
    Final = 18,
    /// The VM is the target's from now on.
    Commit = 19,
    // On the control connection, both ways.
    /// Nothing but a sign of life.
    Alive = 32,
    /// The sender gives up, and says why.
    Abort = 33,
    // On the control connection, to the source.
    /// The heat map has come whole.
    HeatTaken = 48,
    /// Everything of the round has arrived.
    RoundDone = 49,
    /// The VM is complete, and does not run yet.
    Prepared = 50,
    /// It is the target's VM now, also if it stays paused.
    Running = 51,
    /// The VM could not start, and no vCPU has run: the source may have it back.
    NotStarted = 52,
    /// How good the placement was.
    Placement = 53,
}

impl RecordKind {
    /// Every kind, by rising number.
    pub const ALL: [RecordKind; 16] = [
        RecordKind::Pages,
        RecordKind::Zeros,
        RecordKind::Poisoned,
        RecordKind::RoundEnd,
        RecordKind::Heat,
        RecordKind::State,
        RecordKind::Final,
        RecordKind::Commit,
        RecordKind::Alive,
        RecordKind::Abort,
        RecordKind::HeatTaken,
        RecordKind::RoundDone,
        RecordKind::Prepared,
        RecordKind::Running,
        RecordKind::NotStarted,
        RecordKind::Placement,
    ];

    fn from_wire(kind: u8) -> Result<RecordKind, WireError> {
        RecordKind::ALL.into_iter().find(|known| *known as u8 == kind).ok_or(WireError::UnknownKind(kind))
    }

    /// Whether it belongs on a data stream (else on the control connection).
    pub fn is_data(self) -> bool {
        (self as u8) < RecordKind::Heat as u8
    }
}

/// Flag of `RoundEnd`, `Heat` and `State`: the last of its kind.
pub const FLAG_LAST: u8 = 1;
/// Flag of `Heat`: run-length encoded.
pub const FLAG_RUNS: u8 = 2;

/// As on the wire.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U16,
    kind: u8,
    flags: u8,
    pages: U32,
    number: U64,
    meta_bytes: U32,
    payload_bytes: U32,
    sum: U64,
}

/// A header whose fields are within their limits and fit each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What the record is, and so what the other fields mean.
    pub kind: RecordKind,
    /// [`FLAG_LAST`], [`FLAG_RUNS`], both or neither.
    pub flags: u8,
    /// Pages that the record is about.
    pub pages: u32,
    /// Runs of a record with pages, the round of a `RoundEnd` or `RoundDone`, the first page of `Heat`, the first byte
    /// of `State`.
    pub number: u64,
    /// Bytes between the header and the content of the pages; covered by the header's checksum.
    pub meta_bytes: u32,
    /// Bytes of content: whole pages, covered by the pages' own checksums.
    pub payload_bytes: u32,
}

/// What a record's checksum is seeded with: its session, its connection and direction, and how many records went before
/// it. So a record that is repeated, left out, or comes from somewhere else does not pass.
#[derive(Clone, Copy, Debug)]
pub struct Sequence(u64);

/// A connection and direction of a session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lane {
    /// The control connection, from source to target.
    ToTarget,
    /// The control connection, from target to source.
    ToSource,
    /// The data stream of that index, which only the source writes to.
    Stream(u32),
}

impl Sequence {
    /// The first record of a lane.
    pub fn new(session: SessionId, lane: Lane) -> Sequence {
        let lane = match lane {
            Lane::ToTarget => 0xFFFF,
            Lane::ToSource => 0xFFFE,
            Lane::Stream(index) => u64::from(index),
        };
        Sequence(session.seed() ^ lane << 48)
    }

    fn take(&mut self) -> u64 {
        let seed = self.0;
        self.0 = self.0.wrapping_add(1);
        seed
    }
}

impl Header {
    /// A header without content pages.
    pub fn plain(kind: RecordKind, number: u64, meta_bytes: usize) -> Header {
        Header { kind, flags: 0, pages: 0, number, meta_bytes: meta_bytes as u32, payload_bytes: 0 }
    }

    /// The same header with these flags, and no others.
    #[must_use]
    pub fn with_flags(self, flags: u8) -> Header {
        Header { flags, ..self }
    }

    /// The header's bytes, with the checksum of itself and `meta`.
    ///
    /// # Panics
    /// If `meta` is not as long as the header says.
    pub fn seal(&self, meta: &[u8], sequence: &mut Sequence) -> [u8; HEADER_BYTES] {
        assert_eq!(meta.len(), self.meta_bytes as usize, "metadata of another length than its header says");
        let mut raw = RawHeader {
            magic: RECORD_MAGIC.into(),
            kind: self.kind as u8,
            flags: self.flags,
            pages: self.pages.into(),
            number: self.number.into(),
            meta_bytes: self.meta_bytes.into(),
            payload_bytes: self.payload_bytes.into(),
            sum: U64::ZERO,
        };
        raw.sum = sum(&raw, meta, sequence.take()).into();
        zerocopy::transmute!(raw)
    }

    /// Checks everything that can be checked before the metadata is there, so that nothing is allocated or read in
    /// vain.
    pub fn open(bytes: &[u8; HEADER_BYTES]) -> Result<Header, WireError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        if raw.magic.get() != RECORD_MAGIC {
            return Err(WireError::NotOurs);
        }
        let header = Header {
            kind: RecordKind::from_wire(raw.kind)?,
            flags: raw.flags,
            pages: raw.pages.get(),
            number: raw.number.get(),
            meta_bytes: raw.meta_bytes.get(),
            payload_bytes: raw.payload_bytes.get(),
        };
        header.check_lengths()?;
        Ok(header)
    }

    fn check_lengths(&self) -> Result<(), WireError> {
        let (pages, meta) = (u64::from(self.pages), u64::from(self.meta_bytes));
        let limit = if self.kind.is_data() { MAX_DATA_META } else { MAX_CONTROL_META };
        at_most("metadata", meta, limit as u64)?;
        let payload = match self.kind {
            RecordKind::Pages => {
                at_most("pages in a record", pages, u64::from(MAX_RECORD_PAGES))?;
                at_most("runs in a record", self.number, pages)?;
                if meta != 8 * (self.number + pages) {
                    return Err(WireError::Lengths("runs, checksums and metadata"));
                }
                pages * swapd::PAGE_SIZE as u64
            }
            RecordKind::Zeros | RecordKind::Poisoned => {
                at_most("runs in a record", self.number, u64::from(MAX_RECORD_RUNS))?;
                if meta != 8 * self.number {
                    return Err(WireError::Lengths("runs and metadata"));
                }
                0
            }
            RecordKind::Heat => {
                at_most("pages of heat", pages, MAX_PART_PAGES as u64)?;
                0
            }
            _ => 0,
        };
        if u64::from(self.payload_bytes) != payload {
            return Err(WireError::Lengths("pages and content"));
        }
        Ok(())
    }

    /// Checks the metadata, now that it is there. `bytes` are those that [`open`](Self::open) took.
    pub fn verify(bytes: &[u8; HEADER_BYTES], meta: &[u8], sequence: &mut Sequence) -> Result<(), WireError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        if raw.sum.get() == sum(&raw, meta, sequence.take()) { Ok(()) } else { Err(WireError::Checksum) }
    }

    /// Whether this flag is set.
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// XXH3-64 of the header up to its sum, then of the metadata, seeded with that.
fn sum(raw: &RawHeader, meta: &[u8], seed: u64) -> u64 {
    let header = &raw.as_bytes()[..HEADER_BYTES - size_of::<U64>()];
    xxh3_64_with_seed(meta, xxh3_64_with_seed(header, seed))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sequence() -> Sequence {
        Sequence::new(SessionId([3; 16]), Lane::Stream(1))
    }

    #[test]
    fn a_record_passes_only_in_its_place() {
        let meta = [5; 24];
        let header = Header::plain(RecordKind::Final, 0, meta.len());
        let mut sender = sequence();
        let (first, second) = (header.seal(&meta, &mut sender), header.seal(&meta, &mut sender));
        let mut receiver = sequence();
        assert_eq!(Header::open(&first), Ok(header));
        assert_eq!(Header::verify(&first, &meta, &mut receiver), Ok(()));
        assert_eq!(Header::verify(&first, &meta, &mut receiver.clone()), Err(WireError::Checksum));
        assert_eq!(Header::verify(&second, &[6; 24], &mut receiver.clone()), Err(WireError::Checksum));
        assert_eq!(Header::verify(&second, &meta, &mut receiver), Ok(()));
        let mut other = Sequence::new(SessionId([4; 16]), Lane::Stream(1));
        assert_eq!(Header::verify(&first, &meta, &mut other), Err(WireError::Checksum));
    }

    #[test]
    fn absurd_lengths_are_refused_from_the_header_alone() {
        let absurd = [
            Header {
                kind: RecordKind::Pages,
                flags: 0,
                pages: 257,
                number: 1,
                meta_bytes: 2064,
                payload_bytes: 257 << 12,
            },
            Header {
                kind: RecordKind::Pages,
                flags: 0,
                pages: 1,
                number: 1,
                meta_bytes: 16,
                payload_bytes: u32::MAX,
            },
            Header {
                kind: RecordKind::Pages,
                flags: 0,
                pages: 2,
                number: 3,
                meta_bytes: 40,
                payload_bytes: 2 << 12,
            },
            Header {
                kind: RecordKind::Zeros,
                flags: 0,
                pages: 1,
                number: 513,
                meta_bytes: 4104,
                payload_bytes: 0,
            },
            Header {
                kind: RecordKind::State,
                flags: 0,
                pages: 0,
                number: 0,
                meta_bytes: u32::MAX,
                payload_bytes: 0,
            },
            Header {
                kind: RecordKind::Commit,
                flags: 0,
                pages: 0,
                number: 0,
                meta_bytes: 0,
                payload_bytes: 4096,
            },
            Header {
                kind: RecordKind::Heat,
                flags: 0,
                pages: u32::MAX,
                number: 0,
                meta_bytes: 3,
                payload_bytes: 0,
            },
        ];
        for header in absurd {
            let meta = vec![0; (header.meta_bytes as usize).min(1 << 20)];
            if meta.len() == header.meta_bytes as usize {
                let bytes = header.seal(&meta, &mut sequence());
                assert!(Header::open(&bytes).is_err(), "{header:?}");
            }
            assert!(header.check_lengths().is_err(), "{header:?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::array::uniform32(any::<u8>())) {
            let _ = Header::open(&bytes);
            let mut ours = bytes;
            ours[..2].copy_from_slice(&RECORD_MAGIC.to_le_bytes());
            ours[2] %= 54;
            if let Ok(header) = Header::open(&ours) {
                prop_assert!(header.meta_bytes as usize <= MAX_CONTROL_META);
                prop_assert!(header.payload_bytes <= MAX_RECORD_PAGES << swapd::PAGE_SHIFT);
            }
        }
    }
}
