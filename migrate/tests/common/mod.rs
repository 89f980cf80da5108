//! A target on a loopback socket, and the places and VMs that tests need.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part of it")]

pub mod vm;

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use migrate::{
    DataStream, Hello, ReceiveError, Received, Registry, SessionId, TargetLink, TargetMemory, TargetVm,
    VmError, answer_resolve, read_hello, receive,
};
use testkit::TempDir;

/// No test waits longer for anything.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A directory on a disk, which goes when the test ends: /tmp may be a tmpfs without O_DIRECT.
pub fn place() -> TempDir {
    testkit::directory_in(env!("CARGO_TARGET_TMPDIR"), "migrate")
}

/// What a target's VM was asked to do.
#[derive(Clone, Default)]
pub struct TestVm {
    pub loaded: Arc<Mutex<Option<Vec<u8>>>>,
    pub started: Arc<AtomicBool>,
    pub refuse_start: Arc<AtomicBool>,
    /// Called when the state has been loaded, and when the VM has started.
    pub on_load: Hook,
    pub on_start: Hook,
}

pub type Hook = Arc<Mutex<Option<Box<dyn Fn() + Send>>>>;

fn call(hook: &Hook) {
    if let Some(hook) = &*hook.lock().unwrap() {
        hook();
    }
}

impl TestVm {
    pub fn is_started(&self) -> bool {
        self.started.load(Ordering::SeqCst)
    }
}

impl TargetVm for TestVm {
    fn load(&mut self, state: &[u8]) -> Result<(), VmError> {
        *self.loaded.lock().unwrap() = Some(state.to_vec());
        call(&self.on_load);
        Ok(())
    }

    fn start(&mut self, _: bool) -> Result<(), VmError> {
        if self.refuse_start.load(Ordering::SeqCst) {
            return Err(VmError("no vCPU today".to_string()));
        }
        self.started.store(true, Ordering::SeqCst);
        call(&self.on_start);
        Ok(())
    }
}

/// A daemon with one session's worth of memory.
pub struct Target {
    pub address: SocketAddr,
    /// A session of it, under a number of its own: an end of one that comes late is then never taken for that of
    /// another.
    pub session: SessionId,
    pub vm: TestVm,
    pub cancel: Arc<AtomicBool>,
    result: Receiver<Result<Received, ReceiveError>>,
    stop: Arc<AtomicBool>,
    daemon: Option<JoinHandle<()>>,
    _place: TempDir,
}

impl Target {
    pub fn start(memory: TargetMemory) -> Target {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (vm, cancel, stop) =
            (TestVm::default(), Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let place = place();
        let registry = Registry::new(&place.path().join("sessions")).unwrap();
        let (done, result) = channel();
        let daemon =
            Daemon { listener, memory, vm: vm.clone(), cancel: cancel.clone(), stop: stop.clone(), registry };
        let daemon = Some(std::thread::spawn(move || daemon.serve(&done)));
        Target {
            address,
            session: SessionId::random().unwrap(),
            vm,
            cancel,
            result,
            stop,
            daemon,
            _place: place,
        }
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        stream
    }

    /// How the (next) session ended.
    pub fn result(&self) -> Result<Received, ReceiveError> {
        self.result.recv_timeout(DEADLINE).expect("the target does not end")
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.cancel.store(true, Ordering::SeqCst);
        // Wakes the accepting thread.
        let _ = TcpStream::connect(self.address);
        if let Some(daemon) = self.daemon.take()
            && daemon.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the target panicked");
        }
    }
}

struct Daemon {
    listener: TcpListener,
    memory: TargetMemory,
    vm: TestVm,
    cancel: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    registry: Registry,
}

impl Daemon {
    fn serve(self, done: &Sender<Result<Received, ReceiveError>>) {
        std::thread::scope(|scope| {
            let mut waiting: Option<Sender<DataStream>> = None;
            loop {
                let (mut socket, _) = self.listener.accept().unwrap();
                if self.stop.load(Ordering::SeqCst) {
                    return;
                }
                match read_hello(&mut socket) {
                    Ok(Hello::Session(hello)) => {
                        let (streams_in, streams) = channel();
                        waiting = Some(streams_in);
                        let daemon = &self;
                        scope.spawn(move || {
                            let next =
                                || streams.recv_timeout(Duration::from_secs(3)).map_err(io::Error::other);
                            // Whoever waits may have gone.
                            let _ = done.send(daemon.receive(socket, hello, next));
                        });
                    }
                    Ok(Hello::Stream(hello)) => {
                        if let Some(waiting) = &waiting {
                            let _ = waiting.send(DataStream { index: hello.index, socket });
                        }
                    }
                    Ok(Hello::Resolve { session }) => {
                        answer_resolve(&mut socket, session, &self.registry).unwrap();
                    }
                    Err(error) => {
                        let _ = done.send(Err(error));
                    }
                }
            }
        });
    }

    fn receive(
        &self,
        control: TcpStream,
        hello: migrate::SessionHello,
        mut streams: impl FnMut() -> io::Result<DataStream>,
    ) -> Result<Received, ReceiveError> {
        let link = TargetLink {
            control,
            hello,
            granted_ram_bytes: 1 << 30,
            streams: &mut streams,
            registry: &self.registry,
            progress: &|_| {},
            cancel: &self.cancel,
        };
        receive(link, self.memory.clone(), &mut self.vm.clone())
    }
}
