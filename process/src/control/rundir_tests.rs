use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::control::client::VmClient;

/// A run directory of a test, removed at its end.
struct Temp(RunDir, #[allow(dead_code, reason = "held for its end")] testkit::TempDir);

impl Temp {
    fn new(name: &str) -> Temp {
        let directory = testkit::directory("rundir");
        Temp(RunDir::open(&directory.path().join(name)).unwrap(), directory)
    }

    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != LOCK_FILE)
            .collect();
        names.sort();
        names
    }
}

#[test]
fn names_that_are_no_file_names_are_refused() {
    for name in [
        "",
        ".hidden",
        "a/b",
        "a b",
        "ä",
        &"x".repeat(65),
        ".",
        "..",
        "../a",
        "/a",
        "a\0",
        "a\n",
        "a.leaving-1",
    ] {
        assert_eq!(check_name(name).unwrap_err().kind, FailureKind::Usage, "{name}");
    }
    for name in ["a", "web-1", "A.b_c", &"x".repeat(64)] {
        check_name(name).unwrap();
    }
}

#[test]
fn a_name_is_held_while_its_process_listens() {
    let temp = Temp::new("held");
    let (claim, listener) = temp.0.claim_name("web").unwrap();
    assert_eq!(temp.0.claim_name("web").unwrap_err().kind, FailureKind::Name);
    // A process that dies leaves the file, and nobody listens.
    drop(listener);
    let (again, _listener) = temp.0.claim_name("web").unwrap();
    again.hand_over();
    drop(claim);
    assert!(temp.files().is_empty());
}

#[test]
fn a_hand_over_within_one_directory() {
    let temp = Temp::new("handover");
    let session = "0123456789abcdef";
    let (mut source, _source_listener) = temp.0.claim_name("web").unwrap();
    let lock = temp.0.lock().unwrap();
    let (mut target, _target_listener) = temp.0.claim(&lock, SocketName::arriving("web", session)).unwrap();
    drop(lock);
    assert_eq!(temp.0.sockets().unwrap().len(), 2);
    assert_eq!(temp.0.find("web").unwrap(), SocketName::Here("web".to_owned()));
    assert_eq!(target.take_name().unwrap_err().kind, FailureKind::Name);
    source.leave(session).unwrap();
    target.take_name().unwrap();
    assert_eq!(temp.files(), ["web.leaving-01234567.sock", "web.sock"]);
    assert_eq!(source.take_name().unwrap_err().kind, FailureKind::Name);
    drop(source);
    assert_eq!(temp.files(), ["web.sock"]);
}

#[test]
fn a_vm_that_changes_its_place_is_reached() {
    let temp = Temp::new("reached");
    let (mut claim, listener) = temp.0.claim_name("web").unwrap();
    let acceptor = std::thread::spawn(move || listener.incoming().take_while(|stream| !ends(stream)).count());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mover = scope.spawn(|| {
            let mut moves = 0;
            while !over.load(Ordering::Relaxed) {
                claim.leave("0123456789abcdef").unwrap();
                claim.take_name().unwrap();
                moves += 1;
            }
            moves
        });
        let connected = (0..500).all(|_| VmClient::connect(&temp.0, "web").is_ok());
        over.store(true, Ordering::Relaxed);
        assert!(mover.join().unwrap() > 0);
        assert!(connected);
    });
    temp.0.connect(claim.socket()).unwrap().write_all(b"x").unwrap();
    acceptor.join().unwrap();
}

/// Whether somebody says something: those that only look do not.
fn ends(stream: &io::Result<UnixStream>) -> bool {
    stream.as_ref().unwrap().read(&mut [0]).unwrap() > 0
}

#[test]
fn stale_sockets_vanish_from_the_list() {
    let temp = Temp::new("stale");
    let (claim, listener) = temp.0.claim_name("dead").unwrap();
    claim.hand_over();
    drop(listener);
    let (_claim, _listener) = temp.0.claim_name("live").unwrap();
    assert_eq!(temp.0.sockets().unwrap(), [SocketName::Here("live".to_owned())]);
    assert_eq!(temp.files(), ["live.sock"]);
    let text = temp.0.find("dead").unwrap_err().text;
    assert!(text.contains("live"), "{text}");
}

#[test]
fn a_directory_of_somebody_else_is_not_used() {
    let (own, other, root) = (1000, 1001, 0);
    assert_eq!(untrusted(own, [own, own], 0o40700), None);
    assert_eq!(untrusted(own, [own, root], 0o40755), None);
    assert_eq!(untrusted(root, [other, other], 0o40700), None);
    for mode in [0o41777, 0o40770, 0o40702] {
        assert!(untrusted(own, [own, own], mode).unwrap().contains("chmod"));
        assert!(untrusted(root, [root, root], mode).unwrap().contains("chmod"));
    }
    for owners in [[own, other], [other, own]] {
        assert!(untrusted(own, owners, 0o40700).unwrap().contains("another user"));
    }
    let temp = Temp::new("widened");
    std::fs::set_permissions(temp.0.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let failure = RunDir::open(temp.0.path()).unwrap_err();
    assert!(failure.kind == FailureKind::Host && failure.text.contains("--run-dir"), "{failure}");
}

#[test]
fn sockets_and_their_directory_are_their_users_alone() {
    let temp = Temp::new("modes");
    let (claim, _listener) = temp.0.claim_name("web").unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(temp.0.path()), 0o700);
    assert_eq!(mode(&temp.0.path().join(claim.socket().file_name())), 0o600);
}

#[test]
fn a_long_directory_and_a_long_name_fit_a_socket_address() {
    let temp = Temp::new(&"long".repeat(40));
    let (mut claim, _listener) = temp.0.claim_name(&"n".repeat(NAME_MAX)).unwrap();
    claim.leave("0123456789").unwrap();
    temp.0.connect(claim.socket()).unwrap();
}
