//! Peers that know other versions of the protocol: the version that is chosen, and the error if no version is common.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
#[path = "common/source.rs"]
mod source;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use common::Target;
use common::vm::{MEMORY as ENGINE_MEMORY, Writer, engine, fill, options};
use migrate::tls::Security;
use migrate::versions::Versions;
use migrate::wire::VERSIONS;
use migrate::wire::control::Control;
use migrate::wire::opening::{Answer, PREAMBLE_BYTES, Preamble, sealed_as};
use migrate::{
    CancelFlag, Hello, Outcome, PlainMemory, ReceiveError, RefuseKind, SendError, SessionHello, SessionId,
    TargetMemory, send,
};
use source::{MEMORY, Source, hello, hello_of, read_answer};

/// One that never begins.
const SESSION: SessionId = SessionId([7; 16]);
/// Kinds of openings and answers, as `docs/wire.md` has them.
const RESOLVE: u8 = 3;
const ACCEPTED: u8 = 65;
const REFUSED: u8 = 66;
/// Kinds of refusals.
const OTHER: u8 = 0;
const VERSION: u8 = 1;

/// Bytes of an opening in front of its checksum.
fn body(bytes: &[u8]) -> &[u8] {
    &bytes[PREAMBLE_BYTES..bytes.len() - 8]
}

/// An opening of ours as a side sends it that knows these versions.
fn opening(versions: Versions, hello: &Hello) -> Vec<u8> {
    let bytes = hello.encode();
    sealed_as(&versions, bytes[10], body(&bytes))
}

fn target() -> Target {
    Target::start(TargetMemory::Plain(PlainMemory::new(MEMORY).unwrap()))
}

fn older_and_newer() -> [Versions; 4] {
    let (lowest, highest) = (*VERSIONS.start(), *VERSIONS.end());
    [0..=lowest - 1, lowest - 1..=lowest - 1, highest + 1..=highest + 1, highest + 1..=u16::MAX - 255]
}

/// A whole session with a source that knows these versions.
fn moves(versions: Versions) -> u16 {
    let target = target();
    let (mut source, version) = Source::connect_as(&target, SessionHello { versions, ..hello(&target) });
    let totals = source.whole();
    source.state();
    source.say(&Control::Final(totals));
    assert!(matches!(source.hear(), Control::Prepared { .. }));
    source.say(&Control::Commit { paused: false });
    assert!(matches!(source.hear(), Control::Running { .. }));
    target.result().unwrap();
    assert!(target.vm.is_started());
    let outcome = migrate::resolve(&target.address.to_string(), &Security::ThisHost, target.session).unwrap();
    assert_eq!(outcome, Outcome::RunningThere);
    // A doubt is settled whatever the source has become meanwhile.
    for versions in older_and_newer() {
        let mut stream = target.connect();
        stream.write_all(&opening(versions, &Hello::Resolve { session: target.session })).unwrap();
        assert_eq!(read_answer(&mut stream), Answer::Resolved(Outcome::RunningThere));
    }
    version
}

#[test]
fn a_source_that_knows_more_versions_moves_in_the_highest_of_both() {
    let (lowest, highest) = (*VERSIONS.start(), *VERSIONS.end());
    assert_eq!(moves(VERSIONS), highest);
    // It is newer, it is older, it is both, and as far as an opening can say.
    assert_eq!(moves(lowest..=highest + 3), highest);
    assert_eq!(moves(lowest - 1..=lowest), lowest);
    assert_eq!(moves(0..=highest + 9), highest);
    assert_eq!(moves(lowest..=lowest + 255), highest);
}

/// What target and source hear of an opening that cannot be understood, and the first bytes of the answer.
fn turned_away(bytes: &[u8]) -> (ReceiveError, Answer, [u8; PREAMBLE_BYTES]) {
    let target = target();
    let mut stream = target.connect();
    stream.write_all(bytes).unwrap();
    let mut preamble = [0; PREAMBLE_BYTES];
    stream.peek(&mut preamble).unwrap();
    let answer = read_answer(&mut stream);
    // All of the opening was read: the connection ends as one does, not by a reset that may overtake the answer.
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    let error = target.result().unwrap_err();
    assert!(!target.vm.is_started());
    (error, answer, preamble)
}

#[test]
fn a_source_without_a_common_version_hears_both_ranges_and_so_does_the_target() {
    for (versions, text) in older_and_newer().into_iter().zip([
        "the source speaks versions 0 to 1 of the migration protocol, the target versions 2 to 3: update vmemd at the source",
        "the source speaks version 1 of the migration protocol, the target versions 2 to 3: update vmemd at the source",
        "the source speaks version 4 of the migration protocol, the target versions 2 to 3: update vmemd at the target",
        "the source speaks versions 4 to 259 of the migration protocol, the target versions 2 to 3: update vmemd at the target",
    ]) {
        let streams = Hello::Stream(migrate::StreamHello { session: SESSION, index: 0 });
        for hello in [Hello::Session(hello_of(SESSION)), streams] {
            let (error, answer, preamble) = turned_away(&opening(versions.clone(), &hello));
            assert!(matches!(error, ReceiveError::Version(_)), "{error:?}");
            assert_eq!(error.to_string(), text);
            assert_eq!(answer, Answer::Refused { kind: RefuseKind::Version, text: text.to_owned() });
            // A source of whatever version finds ours there.
            assert_eq!(Preamble::open(&preamble).unwrap().versions(), &VERSIONS);
        }
    }
}

#[test]
fn a_range_beyond_the_last_version_is_rubbish() {
    for (lowest, more) in [(u16::MAX, 1), (u16::MAX, 255), (u16::MAX - 253, 254)] {
        for hello in [Hello::Session(hello_of(SESSION)), Hello::Resolve { session: SESSION }] {
            let mut bytes = hello.encode();
            bytes[8..10].copy_from_slice(&lowest.to_le_bytes());
            bytes[11] = more;
            let target = target();
            let mut stream = target.connect();
            stream.write_all(&bytes).unwrap();
            assert!(
                matches!(target.result(), Err(ReceiveError::Peer(text)) if text.contains("number of versions"))
            );
            assert!(matches!(read_answer(&mut stream), Answer::Refused { kind: RefuseKind::Other, .. }));
        }
    }
}

#[test]
fn a_version_that_is_changed_on_the_way_is_seen() {
    let target = target();
    let mut bytes = Hello::Session(hello_of(SESSION)).encode();
    bytes[11] ^= 4;
    let mut stream = target.connect();
    stream.write_all(&bytes).unwrap();
    assert!(matches!(target.result(), Err(ReceiveError::Peer(text)) if text.contains("checksum")));
    assert!(matches!(read_answer(&mut stream), Answer::Refused { kind: RefuseKind::Other, .. }));
}

/// What the source says of a target that answers its offer so. Its VM runs on.
fn complaint(answer: &[u8]) -> SendError {
    let place = common::place();
    let here = engine(&place, ENGINE_MEMORY);
    fill(&here);
    let mut vm = Writer::start(here.memory_base() as usize, 0..100);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let error = std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut control, _) = listener.accept().unwrap();
            let mut preamble = [0; PREAMBLE_BYTES];
            control.read_exact(&mut preamble).unwrap();
            let opened = Preamble::open(&preamble).unwrap();
            assert_eq!(opened.versions(), &VERSIONS);
            skip(&mut control, opened.body_bytes());
            control.write_all(answer).unwrap();
            // Until the source hangs up.
            skip(&mut control, usize::MAX);
        });
        send(&here.handle(), &mut vm, &options(address), &|_| {}, &CancelFlag::new(false)).unwrap_err()
    });
    assert!(error.still_here());
    vm.assert_runs_here();
    error
}

fn skip(stream: &mut TcpStream, bytes: usize) {
    let _ = std::io::copy(&mut stream.take(bytes as u64), &mut std::io::sink());
}

fn refused(versions: Versions, kind: u8, text: &str) -> Vec<u8> {
    sealed_as(&versions, REFUSED, &[&[kind], text.as_bytes()].concat())
}

#[test]
fn a_target_without_a_common_version_is_told_from_one_that_refuses() {
    // Whatever it says itself: a target of one exact version does not name ours.
    for (versions, says) in [
        (1..=1, "the target version 1: update vmemd at the target"),
        (0..=1, "the target versions 0 to 1: update vmemd at the target"),
        (4..=5, "the target versions 4 to 5: update vmemd at the source"),
    ] {
        let error = complaint(&refused(versions, VERSION, "this host speaks something else"));
        let SendError::Version(text) = &error else { panic!("{error:?}") };
        assert!(
            text.starts_with("the source speaks versions 2 to 3 of the") && text.ends_with(says),
            "{text}"
        );
        assert!(error.to_string().starts_with("no version in common: "), "{error}");
    }
    let error = complaint(&refused(VERSIONS, VERSION, "not on Sundays"));
    assert!(matches!(&error, SendError::Version(text) if text == "not on Sundays"), "{error:?}");
    let error = complaint(&refused(7..=9, OTHER, "no disk"));
    assert!(matches!(&error, SendError::Refused(text) if text == "no disk"), "{error:?}");
}

#[test]
fn a_target_that_chooses_what_it_was_not_offered_gets_nothing() {
    let accepted = |versions| complaint(&sealed_as(&versions, ACCEPTED, &ENGINE_MEMORY.to_le_bytes()));
    for version in [VERSIONS.start() - 1, VERSIONS.end() + 1, u16::MAX] {
        let error = accepted(version..=version);
        assert!(matches!(error, SendError::Version(_)), "{error:?}");
    }
    // More than one is no choice.
    let error = accepted(*VERSIONS.start()..=VERSIONS.end() + 1);
    assert!(matches!(error, SendError::Peer(_)), "{error:?}");
}

#[test]
fn the_outcome_of_a_session_is_understood_from_a_target_of_any_version() {
    for (versions, outcome) in older_and_newer().into_iter().zip([0_u8, 1, 0, 1]) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let told = std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut preamble = [0; PREAMBLE_BYTES];
                stream.read_exact(&mut preamble).unwrap();
                assert_eq!(preamble[10], RESOLVE);
                skip(&mut stream, Preamble::open(&preamble).unwrap().body_bytes());
                stream.write_all(&sealed_as(&versions, 67, &[outcome])).unwrap();
            });
            migrate::resolve(&address.to_string(), &Security::ThisHost, SESSION).unwrap()
        });
        assert_eq!(told == Outcome::RunningThere, outcome == 1);
    }
}
