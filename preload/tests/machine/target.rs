//! The part of the daemon that lets one VM in: a QEMU that waits is started for it, with the connections passed on.

use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use migrate::Hello;
use vmprocess::control::rundir::Place;
use vmprocess::qemu::Role;
use vmprocess::{ArriveSettings, passing};

use super::{Kit, Plan, Site, Vm};

/// Lets the next VM in that comes, as the plan says. The address to send it to, and the QEMU that it then is in.
pub(crate) fn expect(kit: Kit, site: &Site, plan: Plan) -> (String, JoinHandle<Vm>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (daemon, site) = (address.clone(), site.same());
    let serve = move || {
        let (mut control, _) = listener.accept().unwrap();
        let Hello::Session(hello) = migrate::read_hello(&mut control).unwrap() else { panic!("a session first") };
        let dir = site.run_dir();
        let lock = dir.lock().unwrap();
        let place = Place::arriving(&hello.name, &hello.session.to_string());
        let (claim, socket) = dir.claim(&lock, place).unwrap();
        drop(lock);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let streams = hello.streams;
        let settings = ArriveSettings {
            run_dir: site.path("run"),
            granted_ram_bytes: plan.budget_bytes,
            memory: site.memory(hello.memory_bytes, plan.budget_bytes),
            daemon,
            control_fd: control.as_raw_fd(),
            streams_fd: theirs.as_raw_fd(),
            listener_fd: socket.as_raw_fd(),
            hello,
        };
        let passed = [control.as_raw_fd(), theirs.as_raw_fd(), socket.as_raw_fd()];
        let plan = plan.with(&["-incoming", "defer", "-S"]);
        let vm = Vm::start_as(&kit, &site, &plan, Role::Arriving(Box::new(settings)), &passed);
        claim.hand_over();
        drop(control);
        for _ in 0..streams {
            let (mut stream, _) = listener.accept().unwrap();
            let Hello::Stream(hello) = migrate::read_hello(&mut stream).unwrap() else { panic!("a stream") };
            passing::send_fd(&ours, &stream, hello.index).unwrap();
        }
        vm
    };
    (address, std::thread::spawn(serve))
}
