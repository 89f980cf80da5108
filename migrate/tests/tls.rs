//! The real TLS stack over loopback: which peers are let in, and how connections end that are tampered with.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
#[path = "common/pki.rs"]
mod pki;

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use common::vm::{MEMORY, Writer, compare, engine, fill, options};
use common::{DEADLINE, Target};
use migrate::tls::{Client, Credentials, Secured, Security, Server, ServerName, TlsError};
use migrate::{CancelFlag, PlainMemory, ResolveError, SendError, SessionId, TargetMemory, send};
use pki::{Ca, When, show};
use rustls::StreamOwned;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

const HERE: &str = "127.0.0.1";
const LIMIT: Duration = Duration::from_secs(20);

fn tls(credentials: &Credentials, name: Option<&str>) -> Security {
    Security::Tls(Arc::new(Client::new(credentials, name).unwrap()))
}

/// A server that says what became of each connection.
struct Gate {
    address: SocketAddr,
    entered: Receiver<Result<Secured, TlsError>>,
}

impl Gate {
    fn open(credentials: &Credentials, limit: Duration) -> Gate {
        let server = Server::new(credentials).unwrap();
        let listener = TcpListener::bind((HERE, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (enter, entered) = channel();
        std::thread::spawn(move || {
            for tcp in listener.incoming() {
                if enter.send(server.secure(tcp.unwrap(), limit)).is_err() {
                    return;
                }
            }
        });
        Gate { address, entered }
    }

    fn next(&self) -> Result<Secured, TlsError> {
        self.entered.recv_timeout(DEADLINE).expect("the handshake does not end")
    }

    fn to(&self) -> String {
        self.address.to_string()
    }

    /// Connects a client to it: both near ends.
    fn meet(&self, client: &Client, through: SocketAddr) -> (TcpStream, TcpStream) {
        let tcp = TcpStream::connect(through).unwrap();
        let far = client.secure(tcp, &self.to(), LIMIT).unwrap();
        let near = self.next().unwrap().stream;
        for stream in [&far, &near] {
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            stream.set_write_timeout(Some(DEADLINE)).unwrap();
        }
        (far, near)
    }
}

/// Why a source sends nothing to that target.
fn refused(to: &str, security: &Security) -> String {
    match migrate::resolve(to, security, SessionId::random().unwrap()).unwrap_err() {
        ResolveError::Insecure { source, .. } => source.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn those_of_one_ca_meet() {
    let ca = Ca::new();
    let gate = Gate::open(&ca.host(HERE, When::Now), LIMIT);
    let client = Client::new(&ca.host("source.example", When::Now), None).unwrap();
    let (mut far, mut near) = gate.meet(&client, gate.address);
    far.write_all(b"ping").unwrap();
    let mut heard = [0; 4];
    near.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"ping");
    near.write_all(b"pong").unwrap();
    far.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"pong");
    let again = std::thread::spawn({
        let to = gate.address;
        move || client.secure(TcpStream::connect(to).unwrap(), HERE, LIMIT).unwrap()
    });
    let secured = gate.next().unwrap();
    again.join().unwrap();
    let is = |name| secured.is(&ServerName::try_from(name).unwrap());
    assert!(is("source.example") && !is("other.example") && !is(HERE));
}

#[test]
fn a_name_that_the_certificate_has_may_be_given() {
    let ca = Ca::new();
    let gate = Gate::open(&ca.host("target.example", When::Now), LIMIT);
    let ours = ca.host("source.example", When::Now);
    let text = refused(&gate.to(), &tls(&ours, None));
    assert!(text.contains("is not for 127.0.0.1") && text.contains("target.example"), "{text}");
    assert!(gate.next().is_err());
    let client = Client::new(&ours, Some("target.example")).unwrap();
    gate.meet(&client, gate.address);
    assert!(matches!(Client::new(&ours, Some("no name")), Err(TlsError::Ours(_))));
}

#[test]
fn strangers_are_refused_on_both_sides() {
    let (ca, strangers) = (Ca::new(), Ca::new());
    let gate = Gate::open(&ca.host(HERE, When::Now), LIMIT);
    // The source finds that the target is a stranger, and the target hears why.
    let text = refused(&gate.to(), &tls(&strangers.host("source.example", When::Now), None));
    assert!(text.contains("is not of the CA"), "{text}");
    let error = gate.next().unwrap_err();
    assert!(error.to_string().contains("not of its CA"), "{error}");
    // The target finds that the source is one.
    let error = show(gate.address, &ca, Some(&strangers.host("source.example", When::Now))).unwrap_err();
    assert!(error.to_string().contains("UnknownCA") || error.to_string().contains("DecryptError"), "{error}");
    let error = gate.next().unwrap_err();
    assert!(error.to_string().contains("is not of the CA"), "{error}");
}

#[test]
fn what_has_expired_is_not_valid_yet_or_is_missing_is_refused() {
    let ca = Ca::new();
    let gate = Gate::open(&ca.host(HERE, When::Now), LIMIT);
    for (when, alert, why) in [
        (When::TillYesterday, "CertificateExpired", "has expired"),
        (When::FromTomorrow, "CertificateExpired", "not valid yet"),
    ] {
        let wrong = ca.host("source.example", when);
        let error = show(gate.address, &ca, Some(&wrong)).unwrap_err();
        assert!(error.to_string().contains(alert) || error.to_string().contains("Certificate"), "{error}");
        let error = gate.next().unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
        // A host with such a certificate is told by its own vmemd.
        for error in [Client::new(&wrong, None).err(), Server::new(&wrong).err()] {
            let Some(TlsError::Ours(text)) = error else { panic!("{error:?}") };
            assert!(text.contains("host.crt") && text.contains(why), "{text}");
        }
    }
    let error = show(gate.address, &ca, None).unwrap_err();
    assert!(error.to_string().contains("CertificateRequired"), "{error}");
    let error = gate.next().unwrap_err();
    assert!(error.to_string().contains("it shows no certificate"), "{error}");
}

#[test]
fn a_target_whose_certificate_has_expired_gets_nothing() {
    let ca = Ca::new();
    // As one that was started in time: with its own TLS stack, for ours would not start.
    let expired = ca.host(HERE, When::TillYesterday);
    let config =
        rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from_pem_slice(expired.cert.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(expired.key.as_bytes()).unwrap(),
            );
    let listener = TcpListener::bind((HERE, 0)).unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let server = std::thread::spawn(move || {
        let (tcp, _) = listener.accept().unwrap();
        let connection = rustls::ServerConnection::new(Arc::new(config.unwrap())).unwrap();
        StreamOwned::new(connection, tcp).read(&mut [0; 1]).unwrap_err()
    });
    let text = refused(&to, &tls(&ca.host("source.example", When::Now), None));
    assert!(text.contains("its certificate has expired"), "{text}");
    assert!(server.join().unwrap().to_string().contains("CertificateExpired"));
}

#[test]
fn credentials_that_do_not_fit_together_are_refused_at_home() {
    let (ca, strangers) = (Ca::new(), Ca::new());
    let good = ca.host(HERE, When::Now);
    let other = ca.host(HERE, When::Now);
    for (wrong, says) in [
        (Credentials { ca: strangers.pem.clone(), ..good.clone() }, "host.crt"),
        (Credentials { key: other.key, ..good.clone() }, "host.key"),
        (Credentials { key: String::new(), ..good.clone() }, "host.key"),
        (Credentials { cert: "rubbish".to_owned(), ..good.clone() }, "host.crt"),
        (Credentials { ca: good.key.clone(), ..good.clone() }, "ca.crt"),
    ] {
        for error in [Client::new(&wrong, None).err(), Server::new(&wrong).err()] {
            let Some(TlsError::Ours(text)) = error else { panic!("{error:?}") };
            assert!(text.contains(says), "{text}");
        }
    }
    assert_eq!(format!("{good:?}"), "Credentials(not shown)");
}

/// A ClientHello as of TLS 1.2: without the extension that names later versions.
fn hello_of_tls_1_2() -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([9; 32]);
    // No session; ECDHE-ECDSA-AES128-GCM-SHA256; no compression; groups: P-256; signatures: ECDSA with SHA-256.
    body.extend([0, 0, 2, 0xC0, 0x2B, 1, 0, 0, 16]);
    body.extend([0, 10, 0, 4, 0, 2, 0, 23, 0, 13, 0, 4, 0, 2, 4, 3]);
    let mut record = vec![22, 3, 1, 0, body.len() as u8 + 4, 1, 0, 0, body.len() as u8];
    record.extend(body);
    record
}

#[test]
fn old_broken_and_slow_greetings_end_in_time() {
    let ca = Ca::new();
    // Those that are refused for what they say have time, however busy the machine is; for the others it is short.
    let gate = Gate::open(&ca.host(HERE, When::Now), LIMIT);
    let hasty = Gate::open(&ca.host(HERE, When::Now), Duration::from_millis(300));
    let connect = |gate: &Gate| TcpStream::connect(gate.address).unwrap();

    let mut old = connect(&gate);
    old.write_all(&hello_of_tls_1_2()).unwrap();
    let mut alert = [0; 7];
    old.read_exact(&mut alert).unwrap();
    assert_eq!((alert[0], alert[5], alert[6]), (21, 2, 70), "a fatal alert: protocol version");
    let error = gate.next().unwrap_err();
    assert!(error.to_string().contains("TLS 1.3"), "{error}");

    // A greeting that stops half-way, and one that is cut.
    let mut half = connect(&hasty);
    half.write_all(&hello_of_tls_1_2()[..20]).unwrap();
    assert!(matches!(hasty.next(), Err(TlsError::TooSlow)));
    let mut cut = connect(&gate);
    cut.write_all(&hello_of_tls_1_2()[..20]).unwrap();
    drop(cut);
    assert!(matches!(gate.next(), Err(TlsError::Link(_))));

    // A byte now and then does not make it longer: the whole greeting, which would be refused for its version, takes
    // 30 times as long.
    let mut slow = connect(&hasty);
    let dripping = std::thread::spawn(move || {
        for byte in hello_of_tls_1_2().iter().cycle() {
            if slow.write_all(&[*byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(150));
        }
    });
    assert!(matches!(hasty.next(), Err(TlsError::TooSlow)));
    dripping.join().unwrap();

    let mut rubbish = connect(&gate);
    rubbish.write_all(&[0xA5; 4096]).unwrap();
    assert!(matches!(gate.next(), Err(TlsError::Peer(_))));
}

#[test]
fn a_target_that_does_not_speak_tls_is_named_as_such() {
    let ca = Ca::new();
    let listener = TcpListener::bind((HERE, 0)).unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let server = std::thread::spawn(move || {
        let (mut tcp, _) = listener.accept().unwrap();
        let _ = tcp.read(&mut [0; 4096]);
        migrate::refuse(&mut tcp, migrate::RefuseKind::Other, "no TLS here");
    });
    let text = refused(&to, &tls(&ca.host("source.example", When::Now), None));
    assert!(text.contains("does not speak TLS"), "{text}");
    server.join().unwrap();
}

#[test]
fn without_certificates_this_host_is_asked_all_the_same() {
    let listener = TcpListener::bind((HERE, 0)).unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let answers = std::thread::spawn(move || drop(listener.accept().unwrap()));
    let asked = migrate::resolve(&to, &Security::ThisHost, SessionId::random().unwrap());
    assert!(matches!(asked, Err(ResolveError::Link { .. })), "{asked:?}");
    answers.join().unwrap();
}

/// Stands between, and spoils what the client says from a certain byte on.
#[derive(Clone, Copy)]
enum Spoil {
    Nothing,
    /// One bit is changed.
    Flip(u64),
    Cut(u64),
}

fn proxy(to: SocketAddr, spoil: Spoil) -> SocketAddr {
    let listener = TcpListener::bind((HERE, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    // Of all connections together: the last of them, which carry the pages, are hit.
    let passed = Arc::new(AtomicU64::new(0));
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (client, server) = (client.unwrap(), TcpStream::connect(to).unwrap());
            let back = (server.try_clone().unwrap(), client.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ = io::copy(&mut &back.0, &mut &back.1);
                let _ = back.1.shutdown(Shutdown::Write);
            });
            let passed = passed.clone();
            std::thread::spawn(move || forward(&client, &server, spoil, &passed));
        }
    });
    address
}

fn forward(mut from: &TcpStream, mut to: &TcpStream, spoil: Spoil, passed: &AtomicU64) {
    let mut buffer = [0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let before = passed.fetch_add(count as u64, Ordering::SeqCst);
        let hit = |at: u64| (before..before + count as u64).contains(&at).then(|| (at - before) as usize);
        let mut end = count;
        match spoil {
            Spoil::Flip(at) => hit(at).into_iter().for_each(|at| buffer[at] ^= 0x10),
            Spoil::Cut(at) => end = hit(at).unwrap_or(count),
            Spoil::Nothing => {}
        }
        if to.write_all(&buffer[..end]).is_err() || end < count {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Write);
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 31 + (at >> 9)) as u8).collect()
}

#[test]
fn a_tunnel_carries_much_and_holds_its_writer_up() {
    const MUCH: usize = 64 << 20;
    const PATIENCE: Duration = Duration::from_millis(500);
    let ca = Ca::new();
    let gate = Gate::open(&ca.host(HERE, When::Now), LIMIT);
    let client = Client::new(&ca.host("source.example", When::Now), None).unwrap();
    let (mut far, mut near) = gate.meet(&client, gate.address);
    // Nobody reads, and it comes to a halt.
    far.set_write_timeout(Some(PATIENCE)).unwrap();
    let (much, mut sent) = (pattern(MUCH), 0);
    let halted = loop {
        match far.write(&much[sent..]) {
            Ok(count) => sent += count,
            Err(error) => break error,
        }
    };
    assert_eq!(halted.kind(), io::ErrorKind::WouldBlock);
    assert!(sent < MUCH / 2, "{sent} bytes were taken that nobody has read");
    // Its last words arrive although it is gone.
    drop(far);
    let mut got = Vec::new();
    near.read_to_end(&mut got).unwrap();
    assert!(got == much[..sent], "{} bytes arrived of {sent}, or others", got.len());
}

#[test]
fn what_was_changed_or_cut_on_the_way_ends_the_connection_and_gives_nothing_wrong() {
    const MUCH: usize = 4 << 20;
    let ca = Ca::new();
    let gate = Gate::open(&ca.host(HERE, When::Now), LIMIT);
    let client = Client::new(&ca.host("source.example", When::Now), None).unwrap();
    for spoil in [Spoil::Flip(100_003), Spoil::Cut(100_003), Spoil::Cut(1 << 20), Spoil::Flip((3 << 20) + 1)]
    {
        let (mut far, mut near) = gate.meet(&client, proxy(gate.address, spoil));
        let writer = std::thread::spawn(move || {
            let said = far.write_all(&pattern(MUCH));
            // It sees the end as well, by a write or by a read.
            let heard = far.read(&mut [0; 1]);
            assert!(said.is_err() || !matches!(heard, Ok(1..)), "{heard:?}");
        });
        let mut got = Vec::new();
        let ended = near.read_to_end(&mut got);
        assert!(got.len() < MUCH && got == pattern(MUCH)[..got.len()], "{ended:?} after {}", got.len());
        assert!(near.write_all(&[0; 1 << 20]).is_err(), "the connection takes more");
        drop(near);
        writer.join().unwrap();
    }
}

/// TLS in front of a target that speaks none.
fn front(credentials: &Credentials, to: SocketAddr) -> SocketAddr {
    let server = Server::new(credentials).unwrap();
    let listener = TcpListener::bind((HERE, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for tcp in listener.incoming() {
            let Ok(secured) = server.secure(tcp.unwrap(), LIMIT) else { continue };
            let (near, target) = (secured.stream, TcpStream::connect(to).unwrap());
            for (from, to) in [(&near, &target), (&target, &near)] {
                let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                std::thread::spawn(move || {
                    let _ = io::copy(&mut &from, &mut &to);
                    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
                });
            }
        }
    });
    address
}

#[test]
fn a_vm_moves_by_tls_and_stays_when_a_byte_is_changed() {
    let place = common::place();
    let here = engine(&place, MEMORY);
    fill(&here);
    let ca = Ca::new();
    let mut vm = Writer::start(here.memory_base() as usize, 100..2000);
    let security = tls(&ca.host("source.example", When::Now), None);
    for spoil in
        [Spoil::Flip(5000), Spoil::Flip(3 << 20), Spoil::Cut(20 << 20), Spoil::Flip(30 << 20), Spoil::Nothing]
    {
        let memory = PlainMemory::new(MEMORY).unwrap();
        let target = Target::start(TargetMemory::Plain(memory.clone()));
        let door = front(&ca.host(HERE, When::Now), target.address);
        let mut options = options(proxy(door, spoil));
        options.security = security.clone();
        let sent = send(&here.handle(), &mut vm, &options, &|_| {}, &CancelFlag::new(false));
        if let Spoil::Nothing = spoil {
            sent.unwrap();
            target.result().unwrap();
            assert!(target.vm.is_started());
            compare(&here, memory.base());
            continue;
        }
        let error = sent.unwrap_err();
        println!("{error:?}");
        assert!(
            matches!(error, SendError::Link { .. } | SendError::Insecure { .. } | SendError::GaveUp(_)),
            "{error:?}"
        );
        vm.assert_runs_here();
        assert!(!target.vm.is_started());
    }
}
