//! The opening of a connection: what it is for, and the answer.
//!
//! Magic, version, kind and length keep their places in every version, and so does the layout of a refusal, so that
//! versions that do not understand each other can at least say so.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::control::short_text;
use super::record::MAX_TEXT;
use super::{VERSION, WireError, at_most};
use crate::registry::Outcome;
use crate::session::SessionId;

/// First bytes of every connection, and of every answer to it.
pub const OPENING_MAGIC: [u8; 8] = *b"vmemdmig";
pub const PREAMBLE_BYTES: usize = 16;
/// Most bytes behind a preamble, checksum included; of a session's, [`MAX_SESSION_BODY`].
pub const MAX_BODY: usize = MAX_TEXT + 64;
/// Most bytes of the text that describes a VM's machine.
pub const MAX_OFFER: usize = 64 << 10;
/// Most bytes behind the preamble of a session.
pub const MAX_SESSION_BODY: usize = size_of::<RawSession>() + MAX_NAME + MAX_OFFER + SUM_BYTES;
/// Most bytes of a VM's name.
pub const MAX_NAME: usize = 255;
/// Most data streams of a session.
pub const MAX_STREAMS: u32 = 16;
/// Most bytes of a VM's memory: 8 TiB.
pub const MAX_MEMORY_BYTES: u64 = 8 << 40;

const SUM_BYTES: usize = 8;
const KIND_SESSION: u8 = 1;
const KIND_STREAM: u8 = 2;
const KIND_RESOLVE: u8 = 3;
const KIND_ACCEPTED: u8 = 65;
const KIND_REFUSED: u8 = 66;
const KIND_RESOLVED: u8 = 67;

/// A run may be all of the memory, and counts its pages in 32 bits.
const _: () = assert!(MAX_MEMORY_BYTES >> swapd::PAGE_SHIFT <= u32::MAX as u64);
const _: () = assert!(size_of::<RawPreamble>() == PREAMBLE_BYTES);

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawPreamble {
    magic: [u8; 8],
    version: U16,
    kind: u8,
    reserved: u8,
    body_bytes: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSession {
    session: [u8; 16],
    memory_bytes: U64,
    /// 0: as the target likes.
    ram_bytes: U64,
    streams: U32,
    check_placement: u8,
    reserved: u8,
    name_bytes: U16,
    /// 0: no offer.
    offer_bytes: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawStream {
    session: [u8; 16],
    index: U32,
}

/// What a connection is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hello {
    /// A VM wants to move here. Answered by [`crate::receive`], or by [`crate::refuse`].
    Session(SessionHello),
    /// One more data stream of a session: give it to that session's `streams` callback.
    Stream(StreamHello),
    /// What became of a session? Answered by [`crate::answer_resolve`].
    Resolve { session: SessionId },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionHello {
    pub session: SessionId,
    pub name: String,
    pub memory_bytes: u64,
    /// RAM that the source wishes for the VM; None: as the target likes.
    pub ram_bytes: Option<u64>,
    pub streams: u32,
    pub check_placement: bool,
    /// What the target needs to make the VM's machine, in the words of whoever runs it; None: it comes in the VM's state.
    pub offer: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamHello {
    pub session: SessionId,
    /// Which of the session's streams, from 0.
    pub index: u32,
}

/// Why a target does not take a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefuseKind {
    Version,
    NameTaken,
    NoRoom,
    Other,
}

/// The answer to a connection's opening.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Accepted { ram_bytes: u64 },
    Refused { kind: RefuseKind, text: String },
    Resolved(Outcome),
}

/// A preamble that is ours and of our version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    kind: u8,
    body_bytes: usize,
}

impl Preamble {
    /// Checks a connection's first bytes. The version comes before all that depends on it. A refusal is understood from any version.
    pub fn open(bytes: &[u8; PREAMBLE_BYTES]) -> Result<Preamble, WireError> {
        let raw: RawPreamble = zerocopy::transmute!(*bytes);
        if raw.magic != OPENING_MAGIC {
            return Err(WireError::NotOurs);
        }
        if raw.version.get() != VERSION && raw.kind != KIND_REFUSED {
            return Err(WireError::Version(raw.version.get()));
        }
        let most = if raw.kind == KIND_SESSION { MAX_SESSION_BODY } else { MAX_BODY };
        let body_bytes = at_most("bytes of an opening", u64::from(raw.body_bytes.get()), most as u64)?;
        if (body_bytes as usize) < SUM_BYTES {
            return Err(WireError::Lengths("an opening"));
        }
        Ok(Preamble { kind: raw.kind, body_bytes: body_bytes as usize })
    }

    /// Bytes to read behind the preamble.
    pub fn body_bytes(&self) -> usize {
        self.body_bytes
    }
}

/// A connection's first bytes, with their checksum.
pub fn sealed(kind: u8, body: &[u8]) -> Vec<u8> {
    let preamble = RawPreamble {
        magic: OPENING_MAGIC,
        version: VERSION.into(),
        kind,
        reserved: 0,
        body_bytes: ((body.len() + SUM_BYTES) as u32).into(),
    };
    let mut bytes = preamble.as_bytes().to_vec();
    bytes.extend_from_slice(body);
    let sum = xxh3_64(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    bytes
}

/// The body without its checksum, which has been found right.
fn checked<'a>(preamble: &[u8; PREAMBLE_BYTES], body: &'a [u8]) -> Result<&'a [u8], WireError> {
    let (body, sum) = body.split_last_chunk::<SUM_BYTES>().ok_or(WireError::Lengths("an opening"))?;
    let whole = [preamble.as_slice(), body].concat();
    if xxh3_64(&whole) == u64::from_le_bytes(*sum) { Ok(body) } else { Err(WireError::Checksum) }
}

fn fixed<T: FromBytes + KnownLayout + Immutable>(body: &[u8]) -> Result<T, WireError> {
    T::read_from_bytes(body).map_err(|_| WireError::Lengths("an opening"))
}

impl Hello {
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Hello::Session(hello) => {
                let offer = hello.offer.as_deref().unwrap_or_default();
                let raw = RawSession {
                    session: hello.session.0,
                    memory_bytes: hello.memory_bytes.into(),
                    ram_bytes: hello.ram_bytes.unwrap_or(0).into(),
                    streams: hello.streams.into(),
                    check_placement: hello.check_placement.into(),
                    reserved: 0,
                    name_bytes: (hello.name.len() as u16).into(),
                    offer_bytes: (offer.len() as u32).into(),
                };
                sealed(KIND_SESSION, &[raw.as_bytes(), hello.name.as_bytes(), offer.as_bytes()].concat())
            }
            Hello::Stream(hello) => {
                let raw = RawStream { session: hello.session.0, index: hello.index.into() };
                sealed(KIND_STREAM, raw.as_bytes())
            }
            Hello::Resolve { session } => sealed(KIND_RESOLVE, &session.0),
        }
    }

    pub fn decode(preamble: &[u8; PREAMBLE_BYTES], body: &[u8]) -> Result<Hello, WireError> {
        let kind = Preamble::open(preamble)?.kind;
        let body = checked(preamble, body)?;
        match kind {
            KIND_SESSION => decode_session(body).map(Hello::Session),
            KIND_STREAM => {
                let raw: RawStream = fixed(body)?;
                let index =
                    at_most("a stream's index", u64::from(raw.index.get()), u64::from(MAX_STREAMS - 1))?;
                Ok(Hello::Stream(StreamHello { session: SessionId(raw.session), index: index as u32 }))
            }
            KIND_RESOLVE => Ok(Hello::Resolve { session: SessionId(fixed(body)?) }),
            kind => Err(WireError::UnknownKind(kind)),
        }
    }
}

fn decode_session(body: &[u8]) -> Result<SessionHello, WireError> {
    let (raw, texts) =
        RawSession::read_from_prefix(body).map_err(|_| WireError::Lengths("a session's opening"))?;
    let memory_bytes = at_most("bytes of memory", raw.memory_bytes.get(), MAX_MEMORY_BYTES)?;
    let block_bytes = u64::from(swapd::BLOCK_PAGES) << swapd::PAGE_SHIFT;
    if memory_bytes == 0 || memory_bytes % block_bytes != 0 {
        return Err(WireError::BadValue { what: "the VM's memory", value: memory_bytes });
    }
    let streams = at_most("data streams", u64::from(raw.streams.get()), u64::from(MAX_STREAMS))? as u32;
    if streams == 0 {
        return Err(WireError::BadValue { what: "the number of data streams", value: 0 });
    }
    let offer_bytes = at_most("bytes of an offer", u64::from(raw.offer_bytes.get()), MAX_OFFER as u64)?;
    let (name, offer) = texts
        .split_at_checked(usize::from(raw.name_bytes.get()))
        .filter(|(_, offer)| offer.len() as u64 == offer_bytes)
        .ok_or(WireError::Lengths("a session's texts"))?;
    let offer = str::from_utf8(offer).map_err(|_| WireError::NotText)?;
    Ok(SessionHello {
        session: SessionId(raw.session),
        name: checked_name(name)?,
        memory_bytes,
        ram_bytes: Some(raw.ram_bytes.get()).filter(|bytes| *bytes != 0),
        streams,
        check_placement: raw.check_placement != 0,
        offer: Some(offer).filter(|offer| !offer.is_empty()).map(str::to_owned),
    })
}

/// A name becomes part of a path at the target: letters, digits, and `.`, `_`, `-` behind the first.
pub fn is_name(name: &str) -> bool {
    let mut chars = name.chars();
    name.len() <= MAX_NAME
        && chars.next().is_some_and(|c| c.is_ascii_alphanumeric())
        && chars.all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

fn checked_name(name: &[u8]) -> Result<String, WireError> {
    at_most("bytes of a name", name.len() as u64, MAX_NAME as u64)?;
    let name = str::from_utf8(name).map_err(|_| WireError::NotText)?;
    match is_name(name) {
        true => Ok(name.to_string()),
        false => Err(WireError::BadValue {
            what: "a VM's name, of letters, digits and ._-,",
            value: name.len() as u64,
        }),
    }
}

impl Answer {
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Answer::Accepted { ram_bytes } => sealed(KIND_ACCEPTED, &ram_bytes.to_le_bytes()),
            Answer::Refused { kind, text } => {
                let kind = match kind {
                    RefuseKind::Other => 0,
                    RefuseKind::Version => 1,
                    RefuseKind::NameTaken => 2,
                    RefuseKind::NoRoom => 3,
                };
                sealed(KIND_REFUSED, &[&[kind], short_text(text).as_bytes()].concat())
            }
            Answer::Resolved(outcome) => {
                sealed(KIND_RESOLVED, &[u8::from(*outcome == Outcome::RunningThere)])
            }
        }
    }

    pub fn decode(preamble: &[u8; PREAMBLE_BYTES], body: &[u8]) -> Result<Answer, WireError> {
        let kind = Preamble::open(preamble)?.kind;
        let body = checked(preamble, body)?;
        match kind {
            KIND_ACCEPTED => fixed::<U64>(body).map(|ram| Answer::Accepted { ram_bytes: ram.get() }),
            KIND_REFUSED => {
                let (kind, text) = body.split_first().ok_or(WireError::Lengths("a refusal"))?;
                let kind = match kind {
                    1 => RefuseKind::Version,
                    2 => RefuseKind::NameTaken,
                    3 => RefuseKind::NoRoom,
                    _ => RefuseKind::Other,
                };
                Ok(Answer::Refused { kind, text: super::control::text(text)? })
            }
            KIND_RESOLVED => match body {
                [0] => Ok(Answer::Resolved(Outcome::NotThere)),
                [1] => Ok(Answer::Resolved(Outcome::RunningThere)),
                _ => Err(WireError::Lengths("an outcome")),
            },
            kind => Err(WireError::UnknownKind(kind)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(bytes: &[u8]) -> (&[u8; PREAMBLE_BYTES], &[u8]) {
        bytes.split_first_chunk().unwrap()
    }

    fn session(name: &str) -> SessionHello {
        SessionHello {
            session: SessionId([9; 16]),
            name: name.to_string(),
            memory_bytes: 64 << 20,
            ram_bytes: None,
            streams: 2,
            check_placement: true,
            offer: None,
        }
    }

    #[test]
    fn names_that_are_no_file_names_are_refused() {
        for name in ["", "../x", "a/b", ".hidden", "a\nb", "ä", &"x".repeat(256)] {
            let bytes = Hello::Session(session(name)).encode();
            let (preamble, body) = split(&bytes);
            assert!(Hello::decode(preamble, body).is_err(), "{name:?}");
        }
    }

    #[test]
    fn offers_are_bounded_and_texts() {
        let encoded = |offer: &str| {
            Hello::Session(SessionHello { offer: Some(offer.to_owned()), ..session("web") }).encode()
        };
        let longest = "x".repeat(MAX_OFFER);
        let bytes = encoded(&longest);
        let (preamble, body) = split(&bytes);
        let Ok(Hello::Session(hello)) = Hello::decode(preamble, body) else {
            panic!("the longest is too long")
        };
        assert_eq!(hello.offer.as_deref(), Some(longest.as_str()));
        let bytes = encoded(&format!("{longest}x"));
        let (preamble, body) = split(&bytes);
        assert!(matches!(Hello::decode(preamble, body), Err(WireError::TooLarge { .. })));
        // Of all other kinds, no such length is believed.
        let mut preamble = *preamble;
        preamble[10] = KIND_STREAM;
        assert!(matches!(Preamble::open(&preamble), Err(WireError::TooLarge { .. })));

        let resealed = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = encoded("{}");
            bytes.truncate(bytes.len() - SUM_BYTES);
            change(&mut bytes);
            let sum = xxh3_64(&bytes);
            bytes.extend_from_slice(&sum.to_le_bytes());
            let (preamble, body) = split(&bytes);
            Hello::decode(preamble, body)
        };
        assert!(resealed(&|_| {}).is_ok());
        assert_eq!(resealed(&|bytes| *bytes.last_mut().unwrap() = 0xFF), Err(WireError::NotText));
        // A length that takes from the name, one that says too much, and one that says too little.
        let lengths = PREAMBLE_BYTES + size_of::<RawSession>() - 6;
        for (at, by) in [(lengths, 1), (lengths + 2, 1), (lengths + 2, u8::MAX), (lengths + 5, 0x7F)] {
            let told = resealed(&|bytes| bytes[at] = bytes[at].wrapping_add(by));
            assert!(told.is_err(), "{at} {by}: {told:?}");
        }
    }

    #[test]
    fn another_version_is_told_from_rubbish() {
        let mut bytes = Hello::Session(session("web")).encode();
        bytes[8] = 99;
        assert_eq!(Preamble::open(split(&bytes).0), Err(WireError::Version(99)));
        bytes[0] = b'V';
        assert_eq!(Preamble::open(split(&bytes).0), Err(WireError::NotOurs));
    }

    #[test]
    fn a_refusal_is_understood_from_any_version() {
        let refusal = Answer::Refused { kind: RefuseKind::Version, text: "too old".to_string() };
        let mut bytes = refusal.encode();
        bytes[8] = 7;
        let end = bytes.len() - SUM_BYTES;
        let sum = xxh3_64(&bytes[..end]);
        bytes[end..].copy_from_slice(&sum.to_le_bytes());
        let (preamble, body) = split(&bytes);
        assert_eq!(Answer::decode(preamble, body), Ok(refusal));
    }

    proptest! {
        #[test]
        fn hellos_round_trip(id: [u8; 16], name in "[a-z0-9][a-z0-9._-]{0,30}", blocks in 1_u64..4096,
                             ram in prop::option::of(1_u64..1 << 40), streams in 1_u32..=MAX_STREAMS, check: bool,
                             offer in prop::option::of(".{1,2000}")) {
            let session = SessionId(id);
            let all = [
                Hello::Session(SessionHello {
                    session, name, memory_bytes: blocks << 21, ram_bytes: ram, streams, check_placement: check, offer,
                }),
                Hello::Stream(StreamHello { session, index: streams - 1 }),
                Hello::Resolve { session },
            ];
            for hello in all {
                let bytes = hello.encode();
                let (preamble, body) = split(&bytes);
                prop_assert_eq!(Preamble::open(preamble).unwrap().body_bytes(), body.len());
                prop_assert_eq!(Hello::decode(preamble, body), Ok(hello));
            }
        }

        #[test]
        fn answers_round_trip(ram_bytes: u64, text in "[ -~]{0,80}") {
            let kinds = [RefuseKind::Other, RefuseKind::Version, RefuseKind::NameTaken, RefuseKind::NoRoom];
            let refusals = kinds.map(|kind| Answer::Refused { kind, text: text.clone() });
            let others = [
                Answer::Accepted { ram_bytes },
                Answer::Resolved(Outcome::NotThere),
                Answer::Resolved(Outcome::RunningThere),
            ];
            for answer in refusals.into_iter().chain(others) {
                let bytes = answer.encode();
                let (preamble, body) = split(&bytes);
                prop_assert_eq!(Answer::decode(preamble, body), Ok(answer));
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(kind: u8, ours: bool, body in prop::collection::vec(any::<u8>(), 0..120)) {
            let mut bytes = sealed(kind, &body);
            if !ours {
                bytes.iter_mut().zip(&body).for_each(|(byte, rubbish)| *byte ^= rubbish);
            }
            let (preamble, body) = split(&bytes);
            let _ = Hello::decode(preamble, body);
            let _ = Answer::decode(preamble, body);
        }

        #[test]
        fn a_flipped_bit_never_passes(at in 0_usize..100, bit in 0_u8..8) {
            let mut bytes = Hello::Session(session("web")).encode();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            let (preamble, body) = split(&bytes);
            prop_assert!(Hello::decode(preamble, body).is_err());
        }
    }
}
