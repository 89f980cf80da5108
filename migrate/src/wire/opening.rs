//! The opening of a connection: what it is for, and the answer.
//!
//! The preamble keeps its layout in every version, and so does a refusal, so that versions that do not understand each
//! other can at least say so. A question for an outcome and its answer keep theirs too: a doubt can be settled whatever
//! was updated meanwhile.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::control::short_text;
use super::record::MAX_TEXT;
use super::{VERSIONS, WireError, at_most};
use crate::registry::Outcome;
use crate::session::SessionId;
use crate::versions::{Versions, highest_common};

/// First bytes of every connection, and of every answer to it.
pub const OPENING_MAGIC: [u8; 8] = *b"vmemdmig";
/// Bytes of the preamble: magic, versions, kind and length.
pub const PREAMBLE_BYTES: usize = 16;
/// Most bytes behind a preamble, checksum included; of a session's, [`MAX_SESSION_BODY`].
pub const MAX_BODY: usize = MAX_TEXT + 64;
/// Most bytes of the text that describes a VM's machine.
pub const MAX_OFFER: usize = 64 << 10;
/// Most bytes behind the preamble of a session.
pub const MAX_SESSION_BODY: usize = size_of::<RawSession>() + MAX_NAME + MAX_OFFER + SUM_BYTES;
/// Most bytes of a VM's name that the format carries. No VM has a name of more than [`NAME_MAX`].
pub const MAX_NAME: usize = 255;
/// Most bytes of a VM's name: that of its control socket has to fit a socket's address.
pub const NAME_MAX: usize = 64;
/// What the file name of a VM's control socket has behind the VM's name while the VM is on its way.
pub const NAME_ROLES: [&str; 2] = [".arriving-", ".leaving-"];
const _: () = assert!(NAME_MAX <= MAX_NAME);
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
    /// The lowest version that the sender knows; of an acceptance, the one that was chosen.
    version: U16,
    kind: u8,
    /// How many versions above that one it knows as well. Who knows one version only sends 0, and does not look at it.
    more_versions: u8,
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
    Resolve {
        /// The session whose commit had no answer.
        session: SessionId,
    },
}

/// A VM that a source offers, and what it asks for with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionHello {
    /// Versions of the protocol that the source knows.
    #[serde(default = "unsaid_versions")]
    pub versions: Versions,
    /// New for every attempt.
    pub session: SessionId,
    /// What the VM is called, at the target too: see [`is_name`].
    pub name: String,
    /// The VM's memory: a multiple of 2 MiB, at most [`MAX_MEMORY_BYTES`].
    pub memory_bytes: u64,
    /// RAM that the source wishes for the VM; None: as the target likes.
    pub ram_bytes: Option<u64>,
    /// How many data streams the source will open, 1 to [`MAX_STREAMS`].
    pub streams: u32,
    /// The source wants to hear how much of what the VM touches in its first second was in RAM.
    pub check_placement: bool,
    /// What the target needs to make the VM's machine, in the words of whoever runs it; None: it comes in the VM's
    /// state.
    pub offer: Option<String>,
}

/// Of a hello that another program of this host has handed on which knows of one version only.
fn unsaid_versions() -> Versions {
    2..=2
}

impl SessionHello {
    /// What is spoken in this session: the highest version that both sides know.
    #[must_use]
    pub fn version(&self) -> Option<u16> {
        highest_common(&VERSIONS, &self.versions)
    }
}

/// A data stream, by the session that it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamHello {
    /// The session, which has been accepted by then.
    pub session: SessionId,
    /// Which of the session's streams, from 0.
    pub index: u32,
}

/// Why a target does not take a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefuseKind {
    /// No version is known to both sides.
    Version,
    /// Another VM has the name at the target's host.
    NameTaken,
    /// RAM or store is short.
    NoRoom,
    /// Whatever else; the text says what.
    Other,
}

/// The answer to a connection's opening.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The VM may come: the source opens its data streams.
    Accepted {
        /// RAM budget that it gets at the target.
        ram_bytes: u64,
        /// What is spoken from here on: the highest version that both sides know.
        version: u16,
    },
    /// The target does not do what was asked.
    Refused {
        /// Why, for programs.
        kind: RefuseKind,
        /// Why, for people: at most [`MAX_TEXT`] bytes.
        text: String,
    },
    /// What became of a session, once and for all.
    Resolved(Outcome),
}

/// A preamble that is ours and, if it needs to be, of a version that we know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preamble {
    kind: u8,
    body_bytes: usize,
    versions: Versions,
}

impl Preamble {
    /// Checks a connection's first bytes. The versions come before all that depends on them. What is the same in every
    /// version is understood from any.
    pub fn open(bytes: &[u8; PREAMBLE_BYTES]) -> Result<Preamble, WireError> {
        let raw: RawPreamble = zerocopy::transmute!(*bytes);
        if raw.magic != OPENING_MAGIC {
            return Err(WireError::NotOurs);
        }
        let versions = offered(&raw)?;
        let of_any = matches!(raw.kind, KIND_REFUSED | KIND_RESOLVE | KIND_RESOLVED);
        if !of_any && highest_common(&VERSIONS, &versions).is_none() {
            return Err(WireError::Version(versions));
        }
        let most = if raw.kind == KIND_SESSION { MAX_SESSION_BODY } else { MAX_BODY };
        let body_bytes = at_most("bytes of an opening", u64::from(raw.body_bytes.get()), most as u64)?;
        if (body_bytes as usize) < SUM_BYTES {
            return Err(WireError::Lengths("an opening"));
        }
        Ok(Preamble { kind: raw.kind, body_bytes: body_bytes as usize, versions })
    }

    /// Bytes to read behind the preamble.
    pub fn body_bytes(&self) -> usize {
        self.body_bytes
    }

    /// The versions that its sender knows.
    pub fn versions(&self) -> &Versions {
        &self.versions
    }
}

fn offered(raw: &RawPreamble) -> Result<Versions, WireError> {
    let (lowest, more) = (raw.version.get(), raw.more_versions);
    match lowest.checked_add(more.into()) {
        Some(highest) => Ok(lowest..=highest),
        None => Err(WireError::BadValue { what: "the number of versions", value: more.into() }),
    }
}

/// A connection's first bytes, with their checksum.
pub fn sealed(kind: u8, body: &[u8]) -> Vec<u8> {
    sealed_as(&VERSIONS, kind, body)
}

/// As [`sealed`], of a side that knows other versions. Of a range that is wider than an opening can say, the lowest
/// 256.
pub fn sealed_as(versions: &Versions, kind: u8, body: &[u8]) -> Vec<u8> {
    let more_versions = versions.end().saturating_sub(*versions.start()).min(u8::MAX.into()) as u8;
    let preamble = RawPreamble {
        magic: OPENING_MAGIC,
        version: (*versions.start()).into(),
        kind,
        more_versions,
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
    /// All bytes of the opening: preamble, body and checksum.
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
                let body = [raw.as_bytes(), hello.name.as_bytes(), offer.as_bytes()].concat();
                sealed_as(&hello.versions, KIND_SESSION, &body)
            }
            Hello::Stream(hello) => {
                let raw = RawStream { session: hello.session.0, index: hello.index.into() };
                sealed(KIND_STREAM, raw.as_bytes())
            }
            Hello::Resolve { session } => sealed(KIND_RESOLVE, &session.0),
        }
    }

    /// Reads an opening: its preamble, and the [`body_bytes`](Preamble::body_bytes) behind it. The checksum is looked
    /// at before anything in the body is believed.
    pub fn decode(preamble: &[u8; PREAMBLE_BYTES], body: &[u8]) -> Result<Hello, WireError> {
        let Preamble { kind, versions, .. } = Preamble::open(preamble)?;
        let body = checked(preamble, body)?;
        match kind {
            KIND_SESSION => decode_session(versions, body).map(Hello::Session),
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

fn decode_session(versions: Versions, body: &[u8]) -> Result<SessionHello, WireError> {
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
        versions,
        session: SessionId(raw.session),
        name: checked_name(name)?,
        memory_bytes,
        ram_bytes: Some(raw.ram_bytes.get()).filter(|bytes| *bytes != 0),
        streams,
        check_placement: raw.check_placement != 0,
        offer: Some(offer).filter(|offer| !offer.is_empty()).map(str::to_owned),
    })
}

/// Whether a VM may have this name: the rule of every host, for the name is part of a path there. 1 to [`NAME_MAX`]
/// ASCII letters, digits, `.`, `_` and `-`; not a dot first, and none of the [`NAME_ROLES`] in it.
///
/// A source asks before it connects, and a target before it makes anything of that name. An opening with a name that is
/// longer, or has such a word in it, is read all the same, so that the refusal can say what is wrong.
pub fn is_name(name: &str) -> bool {
    name.len() <= NAME_MAX && is_of_name_letters(name) && !NAME_ROLES.iter().any(|role| name.contains(role))
}

fn is_of_name_letters(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    !name.is_empty() && !name.starts_with('.') && name.chars().all(allowed)
}

fn checked_name(name: &[u8]) -> Result<String, WireError> {
    at_most("bytes of a name", name.len() as u64, MAX_NAME as u64)?;
    let name = str::from_utf8(name).map_err(|_| WireError::NotText)?;
    match is_of_name_letters(name) {
        true => Ok(name.to_string()),
        false => Err(WireError::BadValue {
            what: "a VM's name, of letters, digits and ._-,",
            value: name.len() as u64,
        }),
    }
}

impl Answer {
    /// All bytes of the answer: preamble, body and checksum.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Answer::Accepted { ram_bytes, version } => {
                sealed_as(&(*version..=*version), KIND_ACCEPTED, &ram_bytes.to_le_bytes())
            }
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

    /// Reads an answer: its preamble, and the [`body_bytes`](Preamble::body_bytes) behind it, as [`Hello::decode`].
    pub fn decode(preamble: &[u8; PREAMBLE_BYTES], body: &[u8]) -> Result<Answer, WireError> {
        let Preamble { kind, versions, .. } = Preamble::open(preamble)?;
        let body = checked(preamble, body)?;
        match kind {
            KIND_ACCEPTED if versions.start() != versions.end() => {
                let value = u64::from(versions.end() - versions.start());
                Err(WireError::BadValue { what: "the number of versions above the chosen one", value })
            }
            KIND_ACCEPTED => fixed::<U64>(body)
                .map(|ram| Answer::Accepted { ram_bytes: ram.get(), version: *versions.start() }),
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
            versions: VERSIONS,
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
            assert!(!is_name(name), "{name:?}");
            let bytes = Hello::Session(session(name)).encode();
            let (preamble, body) = split(&bytes);
            assert!(Hello::decode(preamble, body).is_err(), "{name:?}");
        }
    }

    #[test]
    fn every_name_that_a_host_takes_is_read_and_longer_ones_too_so_that_they_can_be_refused() {
        for (name, taken) in [
            ("a", true),
            ("web-1", true),
            ("A.b_c", true),
            ("_a", true),
            ("-a", true),
            (&"x".repeat(NAME_MAX), true),
            (&"x".repeat(NAME_MAX + 1), false),
            (&"x".repeat(MAX_NAME), false),
            ("a.leaving-1", false),
            ("a.arriving-1", false),
        ] {
            assert_eq!(is_name(name), taken, "{name:?}");
            let bytes = Hello::Session(session(name)).encode();
            let (preamble, body) = split(&bytes);
            assert_eq!(Hello::decode(preamble, body), Ok(Hello::Session(session(name))), "{name:?}");
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
        assert_eq!(Preamble::open(split(&bytes).0), Err(WireError::Version(99..=100)));
        bytes[0] = b'V';
        assert_eq!(Preamble::open(split(&bytes).0), Err(WireError::NotOurs));
    }

    /// The same bytes as a side sends them that knows these versions.
    fn said_as(versions: Versions, bytes: &[u8]) -> Vec<u8> {
        sealed_as(&versions, bytes[10], &bytes[PREAMBLE_BYTES..bytes.len() - SUM_BYTES])
    }

    #[test]
    fn refusals_and_outcomes_are_understood_from_any_version() {
        for versions in [0..=0, 1..=1, 7..=7, 3..=258, u16::MAX..=u16::MAX] {
            let refusal = Answer::Refused { kind: RefuseKind::Version, text: "too old".to_string() };
            for answer in
                [refusal, Answer::Resolved(Outcome::NotThere), Answer::Resolved(Outcome::RunningThere)]
            {
                let bytes = said_as(versions.clone(), &answer.encode());
                let (preamble, body) = split(&bytes);
                assert_eq!(Preamble::open(preamble).unwrap().versions(), &versions);
                assert_eq!(Answer::decode(preamble, body), Ok(answer));
            }
            let question = Hello::Resolve { session: SessionId([3; 16]) };
            let bytes = said_as(versions.clone(), &question.encode());
            let (preamble, body) = split(&bytes);
            assert_eq!(Hello::decode(preamble, body), Ok(question));
        }
    }

    /// What a vmemd of one exact version reads and writes: the version at 8, a zero at 11 that it does not look at.
    #[test]
    fn a_peer_of_the_lowest_version_alone_finds_what_it_expects() {
        let bytes = Hello::Session(session("web")).encode();
        assert_eq!(bytes[8..10], VERSIONS.start().to_le_bytes());
        let accepted = Answer::Accepted { ram_bytes: 1, version: *VERSIONS.start() }.encode();
        assert_eq!(accepted[8..12], [VERSIONS.start().to_le_bytes(), [65, 0]].concat());
        // In both directions: who offers one version gets that one.
        let bytes = said_as(*VERSIONS.start()..=*VERSIONS.start(), &bytes);
        let (preamble, body) = split(&bytes);
        let Ok(Hello::Session(hello)) = Hello::decode(preamble, body) else { panic!("a session") };
        assert_eq!(hello.version(), Some(*VERSIONS.start()));
    }

    #[test]
    fn an_acceptance_names_one_version_that_we_know() {
        let bytes = Answer::Accepted { ram_bytes: 1, version: *VERSIONS.end() }.encode();
        let answered = |versions: Versions| {
            let bytes = said_as(versions, &bytes);
            let (preamble, body) = split(&bytes);
            Answer::decode(preamble, body)
        };
        let highest = *VERSIONS.end();
        assert_eq!(answered(highest..=highest), Ok(Answer::Accepted { ram_bytes: 1, version: highest }));
        assert_eq!(answered(highest + 1..=highest + 1), Err(WireError::Version(highest + 1..=highest + 1)));
        assert!(matches!(answered(highest..=highest + 1), Err(WireError::BadValue { value: 1, .. })));
    }

    proptest! {
        #[test]
        fn offers_of_versions(lowest: u16, more: u8) {
            let mut bytes = Hello::Session(session("web")).encode();
            bytes[8..10].copy_from_slice(&lowest.to_le_bytes());
            bytes[11] = more;
            let opened = Preamble::open(split(&bytes).0);
            let highest = u32::from(lowest) + u32::from(more);
            let ours = VERSIONS.map(u32::from);
            if highest > u32::from(u16::MAX) {
                let refused = matches!(opened, Err(WireError::BadValue { .. }));
                prop_assert!(refused, "{:?}", opened);
            } else if ours.clone().any(|version| (lowest.into()..=highest).contains(&version)) {
                let whole = said_as(lowest..=highest as u16, &bytes);
                let opened = opened.unwrap();
                prop_assert_eq!(opened.versions(), &(lowest..=highest as u16));
                let (preamble, body) = split(&whole);
                let Ok(Hello::Session(hello)) = Hello::decode(preamble, body) else { panic!("a session") };
                let chosen = u32::from(hello.version().unwrap());
                prop_assert_eq!(Some(chosen), ours.filter(|it| (lowest.into()..=highest).contains(it)).max());
            } else {
                prop_assert_eq!(opened, Err(WireError::Version(lowest..=highest as u16)));
            }
        }

        #[test]
        fn hellos_round_trip(id: [u8; 16], name in "[a-z0-9][a-z0-9._-]{0,30}", blocks in 1_u64..4096,
                             ram in prop::option::of(1_u64..1 << 40), streams in 1_u32..=MAX_STREAMS, check: bool,
                             offer in prop::option::of(".{1,2000}")) {
            let session = SessionId(id);
            let all = [
                Hello::Session(SessionHello {
                    versions: VERSIONS, session, name, memory_bytes: blocks << 21, ram_bytes: ram, streams, check_placement: check, offer,
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
                Answer::Accepted { ram_bytes, version: *VERSIONS.end() },
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
