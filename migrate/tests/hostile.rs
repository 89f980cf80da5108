//! The real target, over real sockets, against peers that say what they may not.

mod common;
#[path = "common/source.rs"]
mod source;

use std::io::Write;
use std::net::Shutdown;

use common::{Target, TestVm};
use migrate::tls::Security;
use migrate::wire::control::{Control, Totals, round_end, sealed};
use migrate::wire::heat::parts;
use migrate::wire::opening::Answer;
use migrate::wire::record::{Header, Lane, RecordKind, Sequence};
use migrate::{
    Hello, PlainMemory, ReceiveError, RefuseKind, SessionHello, SessionId, StreamHello, TargetMemory,
};
use source::{MEMORY, PAGES, Source, hello, read_answer};
use swapd::digest::page_sum;
use swapd::{PAGE_SIZE, PageNo};

fn target() -> (Target, PlainMemory) {
    let memory = PlainMemory::new(MEMORY).unwrap();
    (Target::start(TargetMemory::Plain(memory.clone())), memory)
}

/// What the target says when `spoil` has had its way with a session.
fn refusal(spoil: impl FnOnce(&mut Source)) -> String {
    let (target, _memory) = target();
    let mut source = Source::connect(&target);
    spoil(&mut source);
    let error = target.result().expect_err("the target accepted it");
    assert!(!target.vm.is_started());
    assert_eq!(
        migrate::resolve(&target.address.to_string(), &Security::ThisHost, target.session).unwrap(),
        migrate::Outcome::NotThere
    );
    match error {
        ReceiveError::Link { during, source } => format!("link while {during}: {source}"),
        error => error.to_string(),
    }
}

fn assert_refused(expected: &str, spoil: impl FnOnce(&mut Source)) {
    let text = refusal(spoil);
    assert!(text.contains(expected), "{text:?} instead of {expected:?}");
}

#[test]
fn a_well_behaved_source_gets_its_vm_moved() {
    let (target, memory) = target();
    let mut source = Source::connect(&target);
    let totals = source.whole();
    source.state();
    source.say(&Control::Final(totals));
    assert!(
        matches!(source.hear(), Control::Prepared { placed, .. } if placed.pages_zero == 1023 && placed.pages_ram == 1)
    );
    assert!(!target.vm.is_started());
    source.say(&Control::Commit { paused: false });
    assert!(matches!(source.hear(), Control::Running { .. }));
    let received = target.result().unwrap();
    assert_eq!((received.pages_ram, received.pageins_during), (1, 0));
    assert!(target.vm.is_started());
    assert_eq!(target.vm.loaded.lock().unwrap().as_deref(), Some(b"registers".as_slice()));
    // SAFETY: page 3 of a mapping that nobody writes to any more.
    assert_eq!(unsafe { *memory.base().add(3 * PAGE_SIZE + 17) }, 9);
    let outcome = migrate::resolve(&target.address.to_string(), &Security::ThisHost, target.session).unwrap();
    assert_eq!(outcome, migrate::Outcome::RunningThere);
}

#[test]
fn rubbish_instead_of_an_opening() {
    let (target, _memory) = target();
    let mut stream = target.connect();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: vmemd\r\n\r\n").unwrap();
    assert!(matches!(target.result(), Err(ReceiveError::Peer(text)) if text.contains("does not speak")));
    assert!(matches!(read_answer(&mut stream), Answer::Refused { .. }));
}

#[test]
fn another_version_is_told_so() {
    let (target, _memory) = target();
    let mut stream = target.connect();
    let mut bytes = Hello::Session(hello(&target)).encode();
    bytes[8] = 200;
    stream.write_all(&bytes).unwrap();
    assert!(
        matches!(target.result(), Err(ReceiveError::Version(none)) if none.sides[0].versions == (200..=201))
    );
    assert!(matches!(read_answer(&mut stream), Answer::Refused { kind: RefuseKind::Version, .. }));
}

#[test]
fn an_opening_that_breaks_off() {
    let (target, _memory) = target();
    let mut stream = target.connect();
    stream.write_all(&Hello::Session(hello(&target)).encode()[..20]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert!(matches!(target.result(), Err(ReceiveError::Link { .. })));
}

#[test]
fn an_opening_of_absurd_length() {
    let (target, _memory) = target();
    let mut bytes = Hello::Session(hello(&target)).encode();
    bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    target.connect().write_all(&bytes).unwrap();
    assert!(matches!(target.result(), Err(ReceiveError::Peer(text)) if text.contains("at most")));
}

#[test]
fn memory_of_another_size() {
    let (target, _memory) = target();
    let mut stream = target.connect();
    let other = SessionHello { memory_bytes: 2 * MEMORY, ..hello(&target) };
    stream.write_all(&Hello::Session(other).encode()).unwrap();
    assert!(matches!(target.result(), Err(ReceiveError::Setup(_))));
    assert!(matches!(read_answer(&mut stream), Answer::Refused { .. }));
}

#[test]
fn the_same_stream_twice() {
    let (target, _memory) = target();
    let mut control = target.connect();
    control.write_all(&Hello::Session(hello(&target)).encode()).unwrap();
    read_answer(&mut control);
    let stream = Hello::Stream(StreamHello { session: target.session, index: 1 }).encode();
    let _streams = [(); 2].map(|()| {
        let mut socket = target.connect();
        socket.write_all(&stream).unwrap();
        socket
    });
    assert!(matches!(target.result(), Err(ReceiveError::Peer(text)) if text.contains("twice")));
}

#[test]
fn messages_in_a_wrong_order() {
    assert_refused("a commit at the wrong time", |source| {
        source.heat();
        source.say(&Control::Commit { paused: false });
    });
    assert_refused("VM state at the wrong time", Source::state);
    assert_refused("the end of the memory at the wrong time", |source| {
        let totals = source.whole();
        source.say(&Control::Final(totals));
    });
    assert_refused("a heat map at the wrong time", |source| {
        source.whole();
        source.state();
        source.say(&Control::Heat(parts(&[0; PAGES as usize]).next().unwrap()));
    });
    assert_refused("only a target may send", |source| {
        source.say(&Control::Running { took: Default::default() })
    });
    assert_refused("state from byte 5", |source| {
        source.heat();
        source.say(&Control::State { at: 5, bytes: vec![1], last: false });
    });
}

#[test]
fn heat_that_does_not_fit() {
    assert_refused("at most", |source| {
        parts(&[0; PAGES as usize + 1]).for_each(|part| source.say(&Control::Heat(part)));
    });
    assert_refused("heat map and the memory", |source| {
        parts(&[0; 5]).for_each(|part| source.say(&Control::Heat(part)));
    });
}

#[test]
fn pages_that_are_none_of_its_memory() {
    assert_refused("not a run within", |source| {
        source.heat();
        source.pages(0, &[(PAGES, 1)], 1);
    });
    assert_refused("not a run within", |source| {
        source.heat();
        source.zeros(0, &[(u64::MAX >> 12, 1)]);
    });
    assert_refused("not a run within", |source| {
        source.heat();
        source.pages(0, &[(510, 4)], 1);
    });
}

#[test]
fn pages_on_the_wrong_stream() {
    assert_refused("page 3 came on stream 1", |source| {
        source.heat();
        source.pages(1, &[(3, 1)], 1);
    });
}

#[test]
fn content_that_was_damaged() {
    assert_refused("does not match its checksum", |source| {
        source.heat();
        let sums = [page_sum(PageNo(4), &[1; PAGE_SIZE]), page_sum(PageNo(5), &[1; PAGE_SIZE])];
        let mut content = vec![1; 2 * PAGE_SIZE];
        content[PAGE_SIZE + 77] ^= 4;
        source.pages_with_sums(0, &[(4, 2)], &sums, &content);
    });
    assert_refused("does not match its checksum", |source| {
        source.heat();
        let sums = [page_sum(PageNo(6), &[1; PAGE_SIZE])];
        source.pages_with_sums(0, &[(5, 1)], &sums, &[1; PAGE_SIZE]);
    });
}

#[test]
fn a_record_of_another_session_or_place() {
    assert_refused("checksum does not match", |source| {
        source.heat();
        source.streams[0].1 = Sequence::new(SessionId([8; 16]), Lane::Stream(0));
        source.pages(0, &[(3, 1)], 1);
    });
    assert_refused("checksum does not match", |source| {
        source.to_target = Sequence::new(source.session, Lane::Stream(0));
        source.say(&Control::Heat(parts(&[0; PAGES as usize]).next().unwrap()));
    });
}

#[test]
fn control_and_data_are_not_mixed() {
    assert_refused("record on a data stream", |source| {
        source.heat();
        source.record(0, &Header::plain(RecordKind::Commit, 0, 0), &[], &[]);
    });
    assert_refused("record on the control connection", |source| {
        let record = round_end(1, Totals::default(), false, &mut source.to_target);
        source.control.write_all(&record).unwrap();
    });
}

#[test]
fn absurd_lengths_in_a_record() {
    for (at, value) in [(4, 300_u32), (16, u32::MAX), (20, u32::MAX)] {
        let text = refusal(|source| {
            source.heat();
            let header = Header { pages: 1, payload_bytes: 4096, ..Header::plain(RecordKind::Pages, 1, 16) };
            let mut bytes = header.seal(&[0; 16], &mut source.streams[0].1);
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            source.streams[0].0.write_all(&bytes).unwrap();
        });
        assert!(text.contains("at most") || text.contains("fit each other"), "{text}");
    }
}

#[test]
fn totals_that_lie() {
    assert_refused("the end of round 1", |source| {
        source.heat();
        source.end(0, 1, Totals { pages: 5, ..Totals::default() }, false);
    });
    assert_refused("the end of round 7", |source| {
        source.heat();
        source.end(0, 7, Totals::default(), false);
    });
    assert_refused("too early", |source| {
        source.heat();
        source.end(0, 1, Totals::default(), false);
        source.end(0, 2, Totals::default(), false);
    });
    assert_refused("arrived", |source| {
        let totals = source.whole();
        source.state();
        source.say(&Control::Final(Totals { pages: totals.pages + 1, ..totals }));
    });
}

#[test]
fn memory_with_a_hole() {
    assert_refused("1 pages missing", |source| {
        source.heat();
        source.zeros(0, &[(0, 511)]);
        source.zeros(1, &[(512, 512)]);
        source.end(0, 1, Totals { zeros: 511, ..Totals::default() }, true);
        source.end(1, 1, Totals { zeros: 512, ..Totals::default() }, true);
        source.hear();
        source.state();
        source.say(&Control::Final(Totals { zeros: 1023, ..Totals::default() }));
    });
}

#[test]
fn links_that_break() {
    // In the middle of a page, of a header, between rounds, and of the control connection.
    assert_refused("link", |source| {
        source.heat();
        let meta: Vec<u8> = [3 << 12 | 1_u64, 0].into_iter().flat_map(u64::to_le_bytes).collect();
        let header = Header { pages: 1, payload_bytes: 4096, ..Header::plain(RecordKind::Pages, 1, 16) };
        let mut bytes = sealed(&header, &meta, &mut source.streams[0].1);
        bytes.extend_from_slice(&[1; 100]);
        source.streams[0].0.write_all(&bytes).unwrap();
        source.streams[0].0.shutdown(Shutdown::Write).unwrap();
    });
    assert_refused("link", |source| {
        source.heat();
        source.streams[1].0.write_all(b"vM").unwrap();
        source.streams[1].0.shutdown(Shutdown::Both).unwrap();
    });
    assert_refused("link", |source| {
        source.whole();
        source.control.shutdown(Shutdown::Both).unwrap();
    });
    assert_refused("link", |source| source.control.shutdown(Shutdown::Both).unwrap());
}

#[test]
fn a_source_that_gives_up_says_why() {
    assert_refused("changed my mind", |source| {
        source.whole();
        source.say(&Control::Abort("changed my mind".to_string()));
    });
}

#[test]
fn a_link_that_breaks_before_the_commit_burns_the_session() {
    assert_refused("link while waiting for the", |source| {
        let totals = source.whole();
        source.state();
        source.say(&Control::Final(totals));
        assert!(matches!(source.hear(), Control::Prepared { .. }));
        source.control.shutdown(Shutdown::Both).unwrap();
    });
}

#[test]
fn a_target_can_be_cancelled() {
    let (target, _memory) = target();
    let mut source = Source::connect(&target);
    source.heat();
    target.cancel.store(true, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(source.hear(), Control::Abort("cancelled".to_string()));
    assert!(matches!(target.result(), Err(ReceiveError::Cancelled)));
}

#[test]
fn a_vm_that_cannot_start_goes_back() {
    let (target, _memory) = target();
    let TestVm { refuse_start, .. } = &target.vm;
    refuse_start.store(true, std::sync::atomic::Ordering::SeqCst);
    let mut source = Source::connect(&target);
    let totals = source.whole();
    source.state();
    source.say(&Control::Final(totals));
    assert!(matches!(source.hear(), Control::Prepared { .. }));
    source.say(&Control::Commit { paused: false });
    assert!(matches!(source.hear(), Control::NotStarted(_)));
    assert!(matches!(target.result(), Err(ReceiveError::Vm(_))));
    let outcome = migrate::resolve(&target.address.to_string(), &Security::ThisHost, target.session).unwrap();
    assert_eq!(outcome, migrate::Outcome::NotThere);
}

#[test]
fn zeros_replace_content() {
    let (target, memory) = target();
    let mut source = Source::connect(&target);
    source.heat();
    source.pages(0, &[(3, 2), (9, 1)], 5);
    source.zeros(0, &[(0, 4), (5, 507)]);
    source.zeros(1, &[(512, 512)]);
    source.end(0, 1, Totals { pages: 3, zeros: 511, poisoned: 0 }, true);
    source.end(1, 1, Totals { pages: 0, zeros: 512, poisoned: 0 }, true);
    assert_eq!(source.hear(), Control::RoundDone { round: 1 });
    // SAFETY: pages of a mapping that nobody writes to any more.
    let first_byte = |page: usize| unsafe { *memory.base().add(page * PAGE_SIZE) };
    assert_eq!([3, 4, 9].map(first_byte), [0, 5, 0]);
}
