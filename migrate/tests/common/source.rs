//! A source of which every word can be chosen, right or wrong.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part of it")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use super::common::Target;
use migrate::wire::VERSIONS;
use migrate::wire::control::{Control, Totals, round_end, sealed};
use migrate::wire::heat::parts;
use migrate::wire::opening::{Answer, PREAMBLE_BYTES, Preamble};
use migrate::wire::record::{HEADER_BYTES, Header, Lane, RecordKind, Sequence};
use migrate::{Hello, SessionHello, SessionId, StreamHello};
use swapd::digest::page_sum;
use swapd::{PAGE_SIZE, PageNo};

pub const PAGES: u64 = 1024;
pub const MEMORY: u64 = PAGES << 12;
/// Longer than the target takes for any message, shorter than its signs of life are apart.
const QUIET: Duration = Duration::from_millis(100);

pub fn hello(target: &Target) -> SessionHello {
    hello_of(target.session)
}

pub fn hello_of(session: SessionId) -> SessionHello {
    SessionHello {
        versions: VERSIONS,
        session,
        name: "web".to_string(),
        memory_bytes: MEMORY,
        ram_bytes: None,
        streams: 2,
        check_placement: false,
        offer: None,
    }
}

/// A source of which every word can be chosen.
pub struct Source {
    pub session: SessionId,
    pub control: TcpStream,
    pub to_target: Sequence,
    pub to_source: Sequence,
    pub streams: Vec<(TcpStream, Sequence)>,
}

impl Source {
    /// With both data streams open, and not a word said.
    pub fn connect(target: &Target) -> Source {
        Source::connect_as(target, hello(target)).0
    }

    /// One that says this of itself, and the version that the target has chosen.
    pub fn connect_as(target: &Target, hello: SessionHello) -> (Source, u16) {
        let mut control = target.connect();
        let session = hello.session;
        control.write_all(&Hello::Session(hello).encode()).unwrap();
        let Answer::Accepted { version, .. } = read_answer(&mut control) else { panic!("no acceptance") };
        let streams = (0..2).map(|index| {
            let mut stream = target.connect();
            stream.write_all(&Hello::Stream(StreamHello { session, index }).encode()).unwrap();
            (stream, Sequence::new(session, Lane::Stream(index)))
        });
        let source = Source {
            session,
            control,
            to_target: Sequence::new(session, Lane::ToTarget),
            to_source: Sequence::new(session, Lane::ToSource),
            streams: streams.collect(),
        };
        (source, version)
    }

    pub fn say(&mut self, message: &Control) {
        let record = message.encode(&mut self.to_target);
        // The target may have hung up on what went before; then it does not answer either.
        let _ = self.control.write_all(&record);
    }

    pub fn hear(&mut self) -> Control {
        loop {
            let mut head = [0; HEADER_BYTES];
            self.control.read_exact(&mut head).unwrap();
            let header = Header::open(&head).unwrap();
            let mut body = vec![0; header.meta_bytes as usize];
            self.control.read_exact(&mut body).unwrap();
            Header::verify(&head, &body, &mut self.to_source).unwrap();
            match Control::decode(&header, &body).unwrap() {
                Control::Alive => {}
                message => return message,
            }
        }
    }

    pub fn heat(&mut self) {
        parts(&[0; PAGES as usize]).for_each(|part| self.say(&Control::Heat(part)));
        assert_eq!(self.hear(), Control::HeatTaken);
    }

    pub fn record(&mut self, stream: usize, header: &Header, meta: &[u8], content: &[u8]) {
        let (socket, sequence) = &mut self.streams[stream];
        let mut bytes = sealed(header, meta, sequence);
        bytes.extend_from_slice(content);
        let _ = socket.write_all(&bytes);
    }

    /// Pages in runs of any kind, right or wrong.
    pub fn pages(&mut self, stream: usize, runs: &[(u64, u32)], byte: u8) {
        let content = vec![byte; runs.iter().map(|run| run.1 as usize * PAGE_SIZE).sum()];
        let numbers = runs.iter().flat_map(|(start, len)| *start..start + u64::from(*len));
        let sums: Vec<u64> = numbers.map(|page| page_sum(PageNo(page), &[byte; PAGE_SIZE])).collect();
        self.pages_with_sums(stream, runs, &sums, &content);
    }

    pub fn pages_with_sums(&mut self, stream: usize, runs: &[(u64, u32)], sums: &[u64], content: &[u8]) {
        let words = runs.iter().map(|(start, len)| start << 12 | u64::from(*len)).chain(sums.iter().copied());
        let meta: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        let header = Header {
            pages: sums.len() as u32,
            payload_bytes: content.len() as u32,
            ..Header::plain(RecordKind::Pages, runs.len() as u64, meta.len())
        };
        self.record(stream, &header, &meta, content);
    }

    pub fn zeros(&mut self, stream: usize, runs: &[(u64, u32)]) {
        let meta: Vec<u8> =
            runs.iter().flat_map(|(start, len)| (start << 12 | u64::from(*len)).to_le_bytes()).collect();
        let pages = runs.iter().map(|run| run.1).sum();
        let header = Header { pages, ..Header::plain(RecordKind::Zeros, runs.len() as u64, meta.len()) };
        self.record(stream, &header, &meta, &[]);
    }

    pub fn end(&mut self, stream: usize, round: u64, totals: Totals, last: bool) {
        let (socket, sequence) = &mut self.streams[stream];
        let _ = socket.write_all(&round_end(round, totals, last, sequence));
    }

    /// A whole memory, in one round: page 3 has content, the rest is zeros.
    pub fn whole(&mut self) -> Totals {
        self.heat();
        self.zeros(0, &[(0, 512)]);
        self.pages(0, &[(3, 1)], 9);
        self.zeros(1, &[(512, 512)]);
        let first = Totals { pages: 1, zeros: 512, poisoned: 0 };
        let second = Totals { pages: 0, zeros: 512, poisoned: 0 };
        self.end(0, 1, first, true);
        self.end(1, 1, second, true);
        assert_eq!(self.hear(), Control::RoundDone { round: 1 });
        Totals { pages: 1, zeros: 1024, poisoned: 0 }
    }

    pub fn cut_stream(&self, stream: usize) {
        let _ = self.streams[stream].0.shutdown(Shutdown::Both);
    }

    /// Another connection that says it is this stream; it says nothing else.
    pub fn open_stream_again(&mut self, target: &Target, index: u32) {
        let mut stream = target.connect();
        let hello = StreamHello { session: target.session, index };
        let _ = stream.write_all(&Hello::Stream(hello).encode());
        self.streams.push((stream, Sequence::new(target.session, Lane::Stream(index))));
    }

    /// Takes what the target says, until it has ended the session or says nothing for a while: then it waits for more.
    pub fn listen(&mut self) {
        self.control.set_read_timeout(Some(QUIET)).unwrap();
        while self.control.read(&mut [0; 256]).is_ok_and(|bytes| bytes > 0) {}
    }

    /// Nothing comes any more; what is under way arrives.
    pub fn hang_up(&self) {
        let streams = self.streams.iter().map(|(stream, _)| stream);
        for socket in streams.chain([&self.control]) {
            // Those that were cut are no longer connected.
            let _ = socket.shutdown(Shutdown::Write);
        }
    }

    pub fn state(&mut self) {
        self.say(&Control::State { at: 0, bytes: b"registers".to_vec(), last: true });
    }
}

pub fn read_answer(stream: &mut TcpStream) -> Answer {
    let mut preamble = [0; PREAMBLE_BYTES];
    stream.read_exact(&mut preamble).unwrap();
    let mut body = vec![0; Preamble::open(&preamble).unwrap().body_bytes()];
    stream.read_exact(&mut body).unwrap();
    Answer::decode(&preamble, &body).unwrap()
}
