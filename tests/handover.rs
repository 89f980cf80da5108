//! The link breaks at the moment of the hand-over: exactly one side runs the VM, and both know which.
//!
//! A proxy between source and daemon cuts the control connection when the source has given up its name, which it does
//! right before it sends its commit.

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Host, cannot_run_vms, wait_for};

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
    /// Set when the link was cut; what comes later passes.
    cut: AtomicBool,
}

impl Proxy {
    fn start(target: &str, run_dir: PathBuf, loses: Loses) -> (Arc<Proxy>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let proxy =
            Arc::new(Proxy { target: target.to_owned(), run_dir, loses, cut: AtomicBool::new(false) });
        let accepting = proxy.clone();
        std::thread::spawn(move || {
            for source in listener.incoming().flatten() {
                let Ok(target) = TcpStream::connect(&accepting.target) else { continue };
                let back = (target.try_clone().expect("a clone"), source.try_clone().expect("a clone"));
                let proxy = accepting.clone();
                std::thread::spawn(move || proxy.forth(source, target));
                std::thread::spawn(move || pass(back.0, back.1));
            }
        });
        (proxy, address)
    }

    fn given_up(&self) -> bool {
        let entries = std::fs::read_dir(&self.run_dir).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.file_name().to_string_lossy().contains(".leaving-"))
    }

    /// From the source to the target, until the moment of the hand-over.
    fn forth(&self, mut source: TcpStream, mut target: TcpStream) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = source.read(&mut buffer) {
            if self.given_up() && !self.cut.swap(true, Ordering::SeqCst) {
                // Nothing comes back from here on.
                let _ = source.shutdown(Shutdown::Both);
                if self.loses == Loses::Answer {
                    let _ = target.write_all(&buffer[..count]);
                }
                break;
            }
            if target.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = target.shutdown(Shutdown::Write);
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream) {
    let _ = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}

fn hand_over(loses: Loses) -> Option<(Host, Arc<Proxy>, common::Running, common::Running, common::Said)> {
    if cannot_run_vms() {
        return None;
    }
    let mut host = Host::new("handover");
    let (daemon, address) = host.start_daemon("127.0.0.1:0", "64M", &[]);
    let run = host.start_vm("web", "rewrite:working-set=40M,rate=400M");
    host.wait_rounds("web", 1);
    let (proxy, address) = Proxy::start(&address, host.run_dir(), loses);
    let said = host.vmemd(&["migrate", "web", "--to", &address, "--json"]);
    assert!(proxy.cut.load(Ordering::SeqCst), "the link was never cut: {said:?}");
    Some((host, proxy, daemon, run, said))
}

#[test]
fn a_lost_commit_leaves_the_vm_at_the_source() {
    let Some((host, _proxy, _daemon, mut run, said)) = hand_over(Loses::Commit) else { return };
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
    let Some((host, _proxy, _daemon, mut run, said)) = hand_over(Loses::Answer) else { return };
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!(said.json()["resolved_later"], true);
    run.ends_with(0);
    let stat = host.wait_state("web", "running");
    assert_ne!(stat["pid"], run.pid());
    host.wait_rounds("web", 2);
    assert_eq!(host.sockets(), ["web.sock"]);
}
