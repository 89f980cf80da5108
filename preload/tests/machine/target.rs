//! The part of the daemon that lets one VM in: a QEMU that waits is started for it, with the connections passed on.

use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use migrate::Hello;
use vmprocess::control::protocol::EngineKind;
use vmprocess::control::rundir::SocketName;
use vmprocess::granted::{Granted, Share};
use vmprocess::qemu::Role;
use vmprocess::{ArriveSettings, passing};

use super::{Kit, Plan, Site, Vm};

/// Where a VM may come to.
#[derive(Debug)]
pub(crate) struct Target {
    listener: TcpListener,
}

impl Target {
    pub(crate) fn new() -> Target {
        Target { listener: TcpListener::bind("127.0.0.1:0").unwrap() }
    }

    pub(crate) fn address(&self) -> String {
        self.listener.local_addr().unwrap().to_string()
    }

    /// Lets the next VM in that comes, to a QEMU of that plan. On the test's own thread: QEMU ends with it.
    pub(crate) fn take(&self, kit: &Kit, site: &Site, plan: &Plan) -> Vm {
        let (mut control, _) = self.listener.accept().unwrap();
        let Hello::Session(hello) = migrate::read_hello(&mut control).unwrap() else {
            panic!("a session first")
        };
        let dir = site.run_dir();
        let lock = dir.lock().unwrap();
        let socket_name = SocketName::arriving(&hello.name, &hello.session.to_string());
        let (claim, socket) = dir.claim(&lock, socket_name).unwrap();
        drop(lock);
        let share = Share {
            name: hello.name.clone(),
            pid: 0,
            daemon: Some(self.address()),
            engine: EngineKind::Vmemd,
            memory_bytes: hello.memory_bytes,
            ram_budget_bytes: plan.budget_bytes,
        };
        let granted = Granted::new(&dir, &hello.session.to_string(), share).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let streams = hello.streams;
        let settings = ArriveSettings {
            store_spare_bytes: 1 << 30,
            run_dir: site.path("run"),
            granted_ram_bytes: plan.budget_bytes,
            memory: site.memory(hello.memory_bytes, plan.budget_bytes),
            daemon: self.address(),
            offer: None,
            control_fd: control.as_raw_fd(),
            streams_fd: theirs.as_raw_fd(),
            listener_fd: socket.as_raw_fd(),
            granted_fd: granted.as_fd().as_raw_fd(),
            hello,
        };
        let passed =
            [control.as_raw_fd(), theirs.as_raw_fd(), socket.as_raw_fd(), granted.as_fd().as_raw_fd()];
        let plan = plan.clone().with(&["-incoming", "defer", "-S"]);
        let vm = Vm::start_as(kit, site, &plan, Role::Arriving(Box::new(settings)), &passed);
        claim.hand_over();
        granted.hand_over(0);
        drop(control);
        for _ in 0..streams {
            let (mut stream, _) = self.listener.accept().unwrap();
            let Hello::Stream(hello) = migrate::read_hello(&mut stream).unwrap() else { panic!("a stream") };
            passing::send_fd(&ours, &stream, hello.index).unwrap();
        }
        vm
    }
}
