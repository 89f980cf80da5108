//! The link breaks at the moment of the hand-over: exactly one side runs the VM, and both know which.
//!
//! `tests/cuts.rs` does this at many more moments. Its cable reads the messages that it carries; the cable here does
//! not, so TLS may run through it.
//!
//! A proxy between source and daemon cuts the control connection when the source sends something while the process at
//! the target says that it waits for the commit.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Host, needs_vms, wait_for};

#[derive(Clone, Copy, PartialEq)]
enum Loses {
    /// The commit never reaches the target.
    Commit,
    /// The commit does, and the target's answer is lost.
    Answer,
}

struct Proxy {
    target: String,
    run_dir: PathBuf,
    loses: Loses,
    /// Whether the link has been cut.
    cut: AtomicBool,
    /// Whether new connections pass after the cut.
    open: AtomicBool,
}

impl Proxy {
    fn start(target: &str, run_dir: PathBuf, loses: Loses, open: bool) -> (Arc<Proxy>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let (target, cut, open) = (target.to_owned(), AtomicBool::new(false), AtomicBool::new(open));
        let proxy = Arc::new(Proxy { target, run_dir, loses, cut, open });
        let accepting = proxy.clone();
        std::thread::spawn(move || {
            for source in listener.incoming().flatten() {
                if accepting.cut.load(Ordering::SeqCst) && !accepting.open.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(target) = TcpStream::connect(&accepting.target) else { continue };
                let back = (target.try_clone().expect("a clone"), source.try_clone().expect("a clone"));
                let (proxy, returning) = (accepting.clone(), accepting.clone());
                std::thread::spawn(move || proxy.forth(source, target));
                std::thread::spawn(move || returning.back(back.0, back.1));
            }
        });
        (proxy, address)
    }

    /// Whether the target waits for the commit: then that is what the source says next.
    fn awaits_commit(&self) -> bool {
        let entries = std::fs::read_dir(&self.run_dir).into_iter().flatten().flatten();
        let mut arriving = entries.filter(|entry| entry.file_name().to_string_lossy().contains(".arriving-"));
        let Some(mut vm) = arriving.next().and_then(|entry| UnixStream::connect(entry.path()).ok()) else {
            return false;
        };
        let mut said = String::new();
        let asked =
            vm.write_all(b"{\"op\":\"stat\"}\n").and_then(|()| BufReader::new(vm).read_line(&mut said));
        asked.is_ok() && said.contains("the source's commit")
    }

    /// Carries bytes from the target to the source. Bytes that come on a connection which has been cut are lost.
    fn back(&self, mut target: TcpStream, mut source: TcpStream) {
        let cut_at_start = self.cut.load(Ordering::SeqCst);
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = target.read(&mut buffer) {
            if self.cut.load(Ordering::SeqCst) != cut_at_start || source.write_all(&buffer[..count]).is_err()
            {
                break;
            }
        }
        let _ = source.shutdown(Shutdown::Write);
    }

    /// Carries bytes from the source to the target, until the moment of the hand-over.
    fn forth(&self, mut source: TcpStream, mut target: TcpStream) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = source.read(&mut buffer) {
            if !self.cut.load(Ordering::SeqCst)
                && self.awaits_commit()
                && !self.cut.swap(true, Ordering::SeqCst)
            {
                if self.loses == Loses::Answer {
                    let _ = target.write_all(&buffer[..count]);
                    wait_for("the VM to start there", || {
                        self.run_dir.join("web.sock").exists().then_some(())
                    });
                }
                let _ = source.shutdown(Shutdown::Both);
                break;
            }
            if target.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = target.shutdown(Shutdown::Write);
    }
}

fn hand_over(
    loses: Loses,
    open: bool,
    secured: bool,
) -> (Host, Arc<Proxy>, common::Running, common::Running, common::Said) {
    needs_vms();
    let mut host = Host::new("handover");
    host.haste = 4;
    let certificates = secured.then(|| host.pki("pki", &["127.0.0.1"]).remove(0));
    let tls: Vec<&str> = certificates.iter().flat_map(|dir| ["--tls", dir]).collect();
    let (daemon, address) = host.start_daemon("127.0.0.1:0", "64M", &tls);
    let run = host.start_vm("web", "rewrite:working-set=40M,rate=400M");
    host.wait_rounds("web", 1);
    let (proxy, address) = Proxy::start(&address, host.run_dir(), loses, open);
    let said = host.vmemd(&[&["migrate", "web", "--to", &address, "--json"], tls.as_slice()].concat());
    assert!(proxy.cut.load(Ordering::SeqCst), "the link was never cut: {said:?}");
    (host, proxy, daemon, run, said)
}

#[test]
fn a_lost_commit_leaves_the_vm_at_the_source() {
    let (host, _proxy, _daemon, mut run, said) = hand_over(Loses::Commit, true, false);
    said.fails(6, &["runs on here"]);
    let stat = host.wait_state("web", "running");
    assert_eq!(stat["pid"], run.pid());
    host.wait_rounds("web", 2);
    wait_for("the target to give up", || (host.sockets() == ["web.sock"]).then_some(()));
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
    run.ends_with(0);
}

#[test]
fn a_lost_answer_leaves_the_vm_at_the_target() {
    let (host, _proxy, _daemon, mut run, said) = hand_over(Loses::Answer, true, false);
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!(said.json()["resolved_later"], true);
    run.ends_with(10);
    let stat = host.wait_state("web", "running");
    assert_ne!(stat["pid"], run.pid());
    host.wait_rounds("web", 2);
    assert_eq!(host.sockets(), ["web.sock"]);
}

/// Until the target can be asked, which is done by TLS as well, the VM stays paused where it was. Takes as long as
/// the source asks by itself before it says that it is in doubt. From its return on the source may find out at any
/// moment, for it goes on to ask.
fn stays_in_doubt(loses: Loses) -> (Host, common::Running, common::Running) {
    let (host, proxy, daemon, run, said) = hand_over(loses, false, true);
    said.fails(8, &["paused"]);
    let stat = host.vmemd(&["list", "--json"]).json();
    let rows = stat.as_array().expect("a list");
    let here = rows.iter().find(|row| row["pid"] == run.pid()).expect("it is still here");
    assert_eq!(here["state"], "in_doubt");
    proxy.open.store(true, Ordering::SeqCst);
    (host, daemon, run)
}

#[test]
fn a_vm_in_doubt_goes_on_when_the_target_says_that_it_has_it_not() {
    let (host, _daemon, mut run) = stays_in_doubt(Loses::Commit);
    let resumed = host.vmemd(&["resume", "web", "--json"]);
    assert_eq!(resumed.code, 0, "{resumed:?}");
    assert_eq!(resumed.json()["state"], "running");
    host.wait_rounds("web", 2);
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
    run.ends_with(0);
    wait_for("its sockets to go", || host.sockets().is_empty().then_some(()));
}

#[test]
fn a_vm_in_doubt_ends_here_when_the_target_says_that_it_has_it() {
    let (host, _daemon, mut run) = stays_in_doubt(Loses::Answer);
    // The name is the target's by now; the process that waits here still hears of it.
    let stat = host.wait_state("web", "running");
    assert_ne!(stat["pid"], run.pid());
    let resumed = host.vmemd(&["resume", "web", "--json"]);
    assert_eq!(resumed.code, 0, "{resumed:?}");
    // Or the source has asked by itself in that moment, and the name is the target's alone, whose VM runs already.
    let told = resumed.json();
    assert!(told["state"] == "moved" || (told["state"] == "running" && told["already"] == true), "{told}");
    run.ends_with(10);
    host.wait_rounds("web", 1);
}
