//! The source when the link breaks at every point of a migration, and when the target is not what it should be: the
//! VM stays here, or is in doubt.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::Target;
use common::vm::{MEMORY, Writer, compare, engine, fill, options};
use migrate::tls::Security;
use migrate::wire::VERSIONS;
use migrate::wire::control::Control;
use migrate::wire::opening::{Answer, PREAMBLE_BYTES, Preamble};
use migrate::wire::record::{Lane, Sequence};
use migrate::{CancelFlag, Hello, Outcome, PlainMemory, RefuseKind, SendError, TargetMemory, send};
use swapd::Engine;

/// Stands between source and target.
struct Proxy {
    address: SocketAddr,
    link: Arc<Link>,
}

#[derive(Default)]
struct Link {
    /// Bytes from the source until every connection breaks.
    left: AtomicU64,
    /// Nothing from the source gets through, and the next thing that it says breaks every connection.
    swallow: AtomicBool,
    /// No new connections any more.
    closed: AtomicBool,
    sockets: Mutex<Vec<TcpStream>>,
}

impl Link {
    fn cut(&self) {
        self.sockets.lock().unwrap().drain(..).for_each(|socket| drop(socket.shutdown(Shutdown::Both)));
    }

    fn forward(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = [0; 4096];
        loop {
            let count = from.read(&mut buffer).unwrap_or(0);
            if count > 0 && self.swallow.swap(false, Ordering::SeqCst) {
                return self.cut();
            }
            let left = self.left.fetch_sub(count as u64, Ordering::SeqCst);
            let passed = to.write_all(&buffer[..count]).is_ok();
            if left <= count as u64 {
                return self.cut();
            }
            if count == 0 || !passed {
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
                return;
            }
        }
    }
}

const NEVER: u64 = u64::MAX / 2;

fn proxy(to: SocketAddr, break_after: u64) -> Proxy {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let link = Arc::new(Link { left: break_after.into(), ..Link::default() });
    let shared = link.clone();
    std::thread::spawn(move || {
        for from in listener.incoming() {
            let from = from.unwrap();
            if shared.closed.load(Ordering::SeqCst) {
                continue;
            }
            let to = TcpStream::connect(to).unwrap();
            shared.sockets.lock().unwrap().extend([from.try_clone().unwrap(), to.try_clone().unwrap()]);
            let back = (to.try_clone().unwrap(), from.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut &back.0, &mut &back.1));
            let link = shared.clone();
            std::thread::spawn(move || link.forward(from, to));
        }
    });
    Proxy { address, link }
}

fn plain_target() -> (Target, PlainMemory) {
    let memory = PlainMemory::new(MEMORY).unwrap();
    (Target::start(TargetMemory::Plain(memory.clone())), memory)
}

/// A VM on a full engine, and a target in plain memory behind a link that works as yet.
fn over_a_link(here: &Engine) -> (Writer, Proxy, Target, PlainMemory) {
    fill(here);
    let vm = Writer::start(here.memory_base() as usize, 100..200);
    let (target, memory) = plain_target();
    (vm, proxy(target.address, NEVER), target, memory)
}

#[test]
fn nobody_there() {
    let place = common::place();
    let here = engine(&place, MEMORY);
    let mut vm = Writer::start(here.memory_base() as usize, 0..100);
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error =
        send(&here.handle(), &mut vm, &options(unused), &|_| {}, &CancelFlag::new(false)).unwrap_err();
    assert!(matches!(error, SendError::Unreachable { .. }), "{error:?}");
    vm.assert_runs_here();
}

#[test]
fn a_web_server_is_no_target() {
    let place = common::place();
    let here = engine(&place, MEMORY);
    let mut vm = Writer::start(here.memory_base() as usize, 0..100);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        std::io::Write::write_all(&mut socket, b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
            .unwrap();
        socket
    });
    let error =
        send(&here.handle(), &mut vm, &options(address), &|_| {}, &CancelFlag::new(false)).unwrap_err();
    assert!(matches!(error, SendError::Peer(_)), "{error:?}");
    vm.assert_runs_here();
    drop(server.join().unwrap());
}

#[test]
fn a_broken_link_leaves_the_vm_where_it_was() {
    let place = common::place();
    let here = engine(&place, MEMORY);
    fill(&here);
    let mut vm = Writer::start(here.memory_base() as usize, 100..3000);
    // In the opening, in the heat map, in the first pages, and further on.
    for after in [10, 400, 50_000, 3 << 20, 20 << 20] {
        let place_there = common::place();
        let there = engine(&place_there, MEMORY / 2);
        let target = Target::start(TargetMemory::Engine(there.handle()));
        let proxy = proxy(target.address, after);
        let error = send(&here.handle(), &mut vm, &options(proxy.address), &|_| {}, &CancelFlag::new(false))
            .unwrap_err();
        println!("after {after} bytes: {error:?}");
        assert!(error.still_here());
        vm.assert_runs_here();
        assert!(target.result().is_err());
        assert!(!target.vm.is_started());
    }
    let (target, memory) = plain_target();
    send(&here.handle(), &mut vm, &options(target.address), &|_| {}, &CancelFlag::new(false)).unwrap();
    compare(&here, memory.base());
}

#[test]
fn a_commit_that_gets_lost_is_taken_back() {
    let place = common::place();
    let here = engine(&place, MEMORY);
    let (mut vm, proxy, target, _memory) = over_a_link(&here);
    let link = proxy.link.clone();
    *target.vm.on_load.lock().unwrap() = Some(Box::new(move || link.swallow.store(true, Ordering::SeqCst)));
    let error =
        send(&here.handle(), &mut vm, &options(proxy.address), &|_| {}, &CancelFlag::new(false)).unwrap_err();
    assert!(matches!(error, SendError::Link { during: "handing over", .. }), "{error:?}");
    vm.assert_runs_here();
    assert!(target.result().is_err());
    assert!(!target.vm.is_started());
}

#[test]
fn a_start_that_is_not_heard_of_is_asked_for() {
    let place = common::place();
    let here = engine(&place, MEMORY);
    let (mut vm, proxy, target, memory) = over_a_link(&here);
    let link = proxy.link.clone();
    *target.vm.on_start.lock().unwrap() = Some(Box::new(move || link.cut()));
    let report =
        send(&here.handle(), &mut vm, &options(proxy.address), &|_| {}, &CancelFlag::new(false)).unwrap();
    assert!(report.resolved_later && !vm.named.load(Ordering::SeqCst));
    assert!(target.result().is_ok());
    compare(&here, memory.base());
}

#[test]
fn in_doubt_the_vm_stands_still() {
    let place = common::place();
    let here = engine(&place, MEMORY);
    let (mut vm, proxy, target, _memory) = over_a_link(&here);
    let (link, cancel) = (proxy.link.clone(), Arc::new(CancelFlag::new(false)));
    let patience = cancel.clone();
    *target.vm.on_start.lock().unwrap() = Some(Box::new(move || {
        link.closed.store(true, Ordering::SeqCst);
        link.cut();
        // Ends the asking, not the doubt.
        patience.store(true, Ordering::SeqCst);
    }));
    let error = send(&here.handle(), &mut vm, &options(proxy.address), &|_| {}, &cancel).unwrap_err();
    let SendError::InDoubt { session, .. } = &error else { panic!("{error:?}") };
    assert!(!error.still_here());
    let writes = vm.writes();
    assert!(target.result().is_ok());
    assert_eq!(
        migrate::resolve(&target.address.to_string(), &Security::ThisHost, *session).unwrap(),
        Outcome::RunningThere
    );
    assert_eq!(vm.writes(), writes);
}

/// A target of which every word can be chosen, up to the point where the data streams begin.
struct FakeTarget {
    control: TcpStream,
    sequence: Sequence,
    _streams: Vec<TcpStream>,
}

impl FakeTarget {
    fn say(&mut self, message: &Control) {
        let record = message.encode(&mut self.sequence);
        let _ = self.control.write_all(&record);
    }
}

fn read_hello(socket: &mut TcpStream) -> Hello {
    let mut preamble = [0; PREAMBLE_BYTES];
    socket.read_exact(&mut preamble).unwrap();
    let mut body = vec![0; Preamble::open(&preamble).unwrap().body_bytes()];
    socket.read_exact(&mut body).unwrap();
    Hello::decode(&preamble, &body).unwrap()
}

/// What the source says of a target that answers with `answer` and, if that accepts, does what `misbehave` says.
fn complaint(answer: &Answer, misbehave: impl FnOnce(&mut FakeTarget) + Send) -> SendError {
    let place = common::place();
    let here = engine(&place, MEMORY);
    fill(&here);
    let mut vm = Writer::start(here.memory_base() as usize, 0..100);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let error = std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut control, _) = listener.accept().unwrap();
            let Hello::Session(hello) = read_hello(&mut control) else { panic!("no session") };
            control.write_all(&answer.encode()).unwrap();
            if !matches!(answer, Answer::Accepted { .. }) {
                return;
            }
            let streams = (0..hello.streams).map(|_| {
                let (mut stream, _) = listener.accept().unwrap();
                assert!(matches!(read_hello(&mut stream), Hello::Stream(_)));
                stream
            });
            let mut target = FakeTarget {
                _streams: streams.collect(),
                control,
                sequence: Sequence::new(hello.session, Lane::ToSource),
            };
            misbehave(&mut target);
            // Until the source hangs up.
            let _ = std::io::copy(&mut &target.control, &mut std::io::sink());
        });
        send(&here.handle(), &mut vm, &options(address), &|_| {}, &CancelFlag::new(false)).unwrap_err()
    });
    assert!(error.still_here());
    vm.assert_runs_here();
    error
}

#[test]
fn targets_that_refuse() {
    let place = common::place();
    drop(engine(&place, MEMORY));
    let refused = |kind| complaint(&Answer::Refused { kind, text: "no".to_string() }, |_| {});
    assert!(matches!(refused(RefuseKind::NameTaken), SendError::NameTaken(text) if text == "no"));
    assert!(matches!(refused(RefuseKind::NoRoom), SendError::NoRoom(_)));
    assert!(matches!(refused(RefuseKind::Version), SendError::Version(_)));
    assert!(matches!(refused(RefuseKind::Other), SendError::Refused(_)));
    assert!(matches!(complaint(&Answer::Resolved(Outcome::NotThere), |_| {}), SendError::Peer(_)));
}

#[test]
fn targets_that_talk_nonsense() {
    let place = common::place();
    drop(engine(&place, MEMORY));
    let accepted = Answer::Accepted { ram_bytes: MEMORY, version: *VERSIONS.end() };
    let error = complaint(&accepted, |target| target.say(&Control::Running { took: Default::default() }));
    assert!(matches!(&error, SendError::Peer(text) if text.contains("Running")), "{error:?}");
    let error = complaint(&accepted, |target| {
        target.say(&Control::HeatTaken);
        target.say(&Control::RoundDone { round: 9 });
    });
    assert!(matches!(&error, SendError::Peer(text) if text.contains("9")), "{error:?}");
    let error = complaint(&accepted, |target| drop(target.control.write_all(&[0x55; 64])));
    assert!(matches!(error, SendError::Peer(_)), "{error:?}");
    let error = complaint(&accepted, |target| {
        target.sequence = Sequence::new(migrate::SessionId([0; 16]), Lane::ToSource);
        target.say(&Control::HeatTaken);
    });
    assert!(matches!(&error, SendError::Peer(text) if text.contains("checksum")), "{error:?}");
    let error = complaint(&accepted, |target| target.say(&Control::Abort("disk on fire".to_string())));
    assert!(matches!(&error, SendError::GaveUp(text) if text.contains("fire")), "{error:?}");
}

#[test]
fn a_target_that_never_answers_can_be_left() {
    let place = common::place();
    let here = engine(&place, MEMORY);
    let mut vm = Writer::start(here.memory_base() as usize, 0..100);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let cancel = CancelFlag::new(false);
    let error = std::thread::scope(|scope| {
        let silent = scope.spawn(|| {
            let socket = listener.accept().unwrap();
            cancel.store(true, Ordering::SeqCst);
            socket
        });
        let error = send(&here.handle(), &mut vm, &options(address), &|_| {}, &cancel).unwrap_err();
        drop(silent.join().unwrap());
        error
    });
    assert!(matches!(error, SendError::Cancelled), "{error:?}");
    vm.assert_runs_here();
}
