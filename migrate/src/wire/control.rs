//! The messages of the control connection, and the end of a round on a data stream.

use std::time::Duration;

use swapd::Placed;
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::heat::{self, Part};
use super::record::{FLAG_LAST, HEADER_BYTES, Header, MAX_CONTROL_META, MAX_TEXT, RecordKind, Sequence};
use super::{STATE_WITHOUT_LIMIT, WireError, at_most};
use crate::report::Placement;

/// Most bytes of vCPU and device state in one record. All of it together has no limit: see [`state_limit`].
pub const MAX_STATE_PART: usize = MAX_CONTROL_META;

/// What went over one data stream, or all of them, since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Pages with content. One that was sent twice counts twice, here and below.
    pub pages: u64,
    /// Pages that read as zeros.
    pub zeros: u64,
    /// Pages that the source has lost.
    pub poisoned: u64,
}

impl std::ops::AddAssign for Totals {
    fn add_assign(&mut self, other: Totals) {
        self.pages += other.pages;
        self.zeros += other.zeros;
        self.poisoned += other.poisoned;
    }
}

/// A message of the control connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Control {
    /// Some of the heat map. Parts come in order; the whole map is answered with `HeatTaken`.
    Heat(Part),
    /// Some of the VM's state, from byte `at`.
    State {
        /// Where in the state `bytes` begins.
        at: u64,
        /// The part, of at most [`MAX_STATE_PART`] bytes.
        bytes: Vec<u8>,
        /// The state ends here.
        last: bool,
    },
    /// All pages are sent: what that was, on all streams together.
    Final(Totals),
    /// The VM is the target's from now on.
    Commit {
        /// It stands still, and is to stay so.
        paused: bool,
    },
    /// The sender has nothing else to say. Without it, silence would look like a broken link.
    Alive,
    /// The sender gives up, for this reason.
    Abort(String),
    /// The whole heat map is known to the target, which places pages by it from now on.
    HeatTaken,
    /// Everything of this round has arrived.
    RoundDone {
        /// The round, from 1.
        round: u64,
    },
    /// The VM is complete and does not run yet.
    Prepared {
        /// Where the pages are now.
        placed: Placed,
        /// For the last pages to come to their places, and for the state to be loaded.
        took: [Micros; 2],
    },
    /// It is the target's VM now. It runs, or stays paused as the commit said.
    Running {
        /// For the commit to be recorded, and for the VM to start.
        took: [Micros; 2],
    },
    /// The VM could not start, nothing of it has run: the source may have it back.
    NotStarted(String),
    /// How good the placement was, if the source asked.
    Placement(Placement),
}

/// A time that the target tells. 0 of a target that does not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Micros(pub u32);

impl From<Duration> for Micros {
    fn from(time: Duration) -> Micros {
        Micros(u32::try_from(time.as_micros()).unwrap_or(u32::MAX))
    }
}

impl From<Micros> for Duration {
    fn from(Micros(time): Micros) -> Duration {
        Duration::from_micros(time.into())
    }
}

/// Two times as a record's number, which is of no account to who does not know of them.
fn pack([low, high]: [Micros; 2]) -> u64 {
    u64::from(high.0) << 32 | u64::from(low.0)
}

fn unpack(number: u64) -> [Micros; 2] {
    [Micros(number as u32), Micros((number >> 32) as u32)]
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawNumbers<const N: usize>([U64; N]);

fn numbers<const N: usize>(values: [u64; N]) -> Vec<u8> {
    RawNumbers(values.map(U64::new)).0.as_bytes().to_vec()
}

fn read_numbers<const N: usize>(body: &[u8]) -> Result<[u64; N], WireError> {
    let raw = <[U64; N]>::read_from_bytes(body).map_err(|_| WireError::Lengths("a fixed message"))?;
    Ok(raw.map(U64::get))
}

/// A record for the end of a round on a data stream.
pub fn round_end(round: u64, totals: Totals, last: bool, sequence: &mut Sequence) -> Vec<u8> {
    let body = numbers([totals.pages, totals.zeros, totals.poisoned]);
    let flags = if last { FLAG_LAST } else { 0 };
    sealed(&Header::plain(RecordKind::RoundEnd, round, body.len()).with_flags(flags), &body, sequence)
}

/// The totals that a [`RecordKind::RoundEnd`] or [`RecordKind::Final`] carries.
pub fn read_totals(body: &[u8]) -> Result<Totals, WireError> {
    let [pages, zeros, poisoned] = read_numbers(body)?;
    Ok(Totals { pages, zeros, poisoned })
}

/// A record that is small enough to be put together in memory.
pub fn sealed(header: &Header, body: &[u8], sequence: &mut Sequence) -> Vec<u8> {
    let mut record = Vec::with_capacity(HEADER_BYTES + body.len());
    record.extend_from_slice(&header.seal(body, sequence));
    record.extend_from_slice(body);
    record
}

/// At most [`MAX_TEXT`] bytes of a text, cut between characters.
pub fn short_text(text: &str) -> &str {
    let end = (0..=text.len().min(MAX_TEXT)).rev().find(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or(0)]
}

/// Most bytes of state that a target takes with which this version is spoken: None if it takes any number.
#[must_use]
pub const fn state_limit(version: u16) -> Option<u64> {
    if version < STATE_WITHOUT_LIMIT { Some(1 << 30) } else { None }
}

impl Control {
    /// The whole record, sealed as the next one of its connection and direction. Texts are cut to [`MAX_TEXT`] bytes.
    pub fn encode(&self, sequence: &mut Sequence) -> Vec<u8> {
        let (kind, number, body) = match self {
            Control::Heat(part) => {
                let (header, body) = heat::encode(part);
                return sealed(&header, &body, sequence);
            }
            Control::State { at, bytes, last } => {
                let flags = if *last { FLAG_LAST } else { 0 };
                return sealed(
                    &Header::plain(RecordKind::State, *at, bytes.len()).with_flags(flags),
                    bytes,
                    sequence,
                );
            }
            Control::Final(totals) => {
                (RecordKind::Final, 0, numbers([totals.pages, totals.zeros, totals.poisoned]))
            }
            Control::Commit { paused } => (RecordKind::Commit, u64::from(*paused), Vec::new()),
            Control::Alive => (RecordKind::Alive, 0, Vec::new()),
            Control::Abort(text) => (RecordKind::Abort, 0, short_text(text).as_bytes().to_vec()),
            Control::HeatTaken => (RecordKind::HeatTaken, 0, Vec::new()),
            Control::RoundDone { round } => (RecordKind::RoundDone, *round, Vec::new()),
            Control::Prepared { placed, took } => {
                let Placed { pages_ram, pages_store, pages_zero, pageins, pageouts } = *placed;
                let placed = numbers([pages_ram, pages_store, pages_zero, pageins, pageouts]);
                (RecordKind::Prepared, pack(*took), placed)
            }
            Control::Running { took } => (RecordKind::Running, pack(*took), Vec::new()),
            Control::NotStarted(text) => (RecordKind::NotStarted, 0, short_text(text).as_bytes().to_vec()),
            Control::Placement(placement) => {
                (RecordKind::Placement, 0, numbers([placement.touched_pages, placement.touched_in_ram]))
            }
        };
        sealed(&Header::plain(kind, number, body.len()), &body, sequence)
    }

    /// From a header that was opened and a body that was verified.
    pub fn decode(header: &Header, body: &[u8]) -> Result<Control, WireError> {
        let empty =
            |message| if body.is_empty() { Ok(message) } else { Err(WireError::Lengths("an empty message")) };
        match header.kind {
            RecordKind::Heat => heat::decode(header, body).map(Control::Heat),
            RecordKind::State => {
                Ok(Control::State { at: header.number, bytes: body.to_vec(), last: header.has(FLAG_LAST) })
            }
            RecordKind::Final => read_totals(body).map(Control::Final),
            RecordKind::Commit if header.number > 1 => {
                Err(WireError::BadValue { what: "a commit", value: header.number })
            }
            RecordKind::Commit => empty(Control::Commit { paused: header.number == 1 }),
            RecordKind::Alive => empty(Control::Alive),
            RecordKind::Abort => text(body).map(Control::Abort),
            RecordKind::HeatTaken => empty(Control::HeatTaken),
            RecordKind::RoundDone => empty(Control::RoundDone { round: header.number }),
            RecordKind::Prepared => {
                let [pages_ram, pages_store, pages_zero, pageins, pageouts] = read_numbers(body)?;
                let placed = Placed { pages_ram, pages_store, pages_zero, pageins, pageouts };
                Ok(Control::Prepared { placed, took: unpack(header.number) })
            }
            RecordKind::Running => empty(Control::Running { took: unpack(header.number) }),
            RecordKind::NotStarted => text(body).map(Control::NotStarted),
            RecordKind::Placement => {
                let [touched_pages, touched_in_ram] = read_numbers(body)?;
                Ok(Control::Placement(Placement { touched_pages, touched_in_ram }))
            }
            RecordKind::Pages | RecordKind::Zeros | RecordKind::Poisoned | RecordKind::RoundEnd => {
                Err(WireError::BadValue { what: "a control message's kind", value: header.kind as u64 })
            }
        }
    }
}

pub(super) fn text(body: &[u8]) -> Result<String, WireError> {
    at_most("bytes of text", body.len() as u64, MAX_TEXT as u64)?;
    let text = str::from_utf8(body).map_err(|_| WireError::NotText)?;
    // It ends up on a terminal: no line breaks, no escape sequences.
    Ok(text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::session::SessionId;
    use crate::wire::record::Lane;

    fn any_control() -> impl Strategy<Value = Control> {
        let numbers = any::<[u64; 5]>();
        (0_u8..12, numbers, "[a-zäß ]{0,40}", prop::collection::vec(any::<u8>(), 0..300), any::<bool>())
            .prop_map(|(kind, n, text, bytes, last)| match kind {
                0 => Control::Heat(Part { first: n[0], heat: bytes, last }),
                1 => Control::State { at: n[0] % 1000, bytes, last },
                2 => Control::Final(Totals { pages: n[0], zeros: n[1], poisoned: n[2] }),
                3 => Control::Commit { paused: last },
                4 => Control::Alive,
                5 => Control::Abort(text),
                6 => Control::HeatTaken,
                7 => Control::RoundDone { round: n[0] },
                8 => Control::Prepared {
                    placed: Placed {
                        pages_ram: n[0],
                        pages_store: n[1],
                        pages_zero: n[2],
                        pageins: n[3],
                        pageouts: n[4],
                    },
                    took: unpack(n[0]),
                },
                9 => Control::Running { took: unpack(n[0]) },
                10 => Control::NotStarted(text),
                _ => Control::Placement(Placement { touched_pages: n[0], touched_in_ram: n[1] }),
            })
    }

    proptest! {
        #[test]
        fn round_trip(message in any_control()) {
            let sequence = || Sequence::new(SessionId([1; 16]), Lane::ToTarget);
            let record = message.encode(&mut sequence());
            let (head, body) = record.split_first_chunk::<HEADER_BYTES>().unwrap();
            let header = Header::open(head).unwrap();
            Header::verify(head, body, &mut sequence()).unwrap();
            prop_assert_eq!(Control::decode(&header, body), Ok(message));
        }

        #[test]
        fn arbitrary_bodies_never_panic(
            kind in 0_usize..16, number: u64, flags: u8, pages: u32,
            body in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let header = Header::plain(RecordKind::ALL[kind], number, body.len()).with_flags(flags);
            let _ = Control::decode(&Header { pages, ..header }, &body);
        }
    }

    #[test]
    fn texts_are_cut_between_characters_and_harmless() {
        let long = "ä".repeat(MAX_TEXT);
        assert_eq!(short_text(&long).len(), MAX_TEXT);
        assert_eq!(text(b"a\x1b[2Jb\nc"), Ok("a [2Jb c".to_string()));
        assert_eq!(text(&[0xFF]), Err(WireError::NotText));
    }

    #[test]
    fn a_commit_says_one_of_two_things() {
        let decoded = |number| Control::decode(&Header::plain(RecordKind::Commit, number, 0), &[]);
        assert_eq!(decoded(0), Ok(Control::Commit { paused: false }));
        assert_eq!(decoded(1), Ok(Control::Commit { paused: true }));
        assert_eq!(decoded(2), Err(WireError::BadValue { what: "a commit", value: 2 }));
    }

    #[test]
    fn only_the_first_version_has_a_limit_of_state() {
        let limits = crate::wire::VERSIONS.map(state_limit).collect::<Vec<_>>();
        assert_eq!(limits, [Some(1 << 30), None]);
    }
}
