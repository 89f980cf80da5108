//! A target on a loopback socket, and the places and VMs that tests need.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part of it")]

pub mod vm;

use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use migrate::{
    DataStream, Hello, ReceiveError, Received, Registry, SessionId, StateSpool, TargetLink, TargetMemory,
    TargetVm, VmError, answer_resolve, read_hello, receive,
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
    /// Takes the state in its place, of which nothing is loaded then.
    pub taker: Taker,
    pub started: Arc<AtomicBool>,
    pub refuse_start: Arc<AtomicBool>,
    /// Called when the state has been loaded, and when the VM has started.
    pub on_load: Hook,
    pub on_start: Hook,
}

pub type Taker = Arc<Mutex<Option<Box<dyn FnMut(&mut dyn Read) -> io::Result<()> + Send>>>>;
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
    fn load(&mut self, state: &mut dyn Read) -> Result<(), VmError> {
        let taken = match &mut *self.taker.lock().unwrap() {
            Some(take) => take(state),
            None => {
                let mut whole = Vec::new();
                let read = state.read_to_end(&mut whole);
                read.map(|_| *self.loaded.lock().unwrap() = Some(whole))
            }
        };
        taken.map_err(|source| VmError::Io { doing: "taking its state", source })?;
        call(&self.on_load);
        Ok(())
    }

    fn start(&mut self, _: bool) -> Result<(), VmError> {
        if self.refuse_start.load(Ordering::SeqCst) {
            return Err(VmError::Machine("no vCPU today".to_string()));
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
    sockets: Sockets,
    _place: TempDir,
}

/// Of connections that sources have opened, to end them.
type Sockets = Arc<Mutex<Vec<TcpStream>>>;

/// How a target is made, if not as usual.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// Where it keeps a state, and what of that in memory.
    pub spool: Option<StateSpool>,
    /// It knows the versions of the protocol only up to this one.
    pub highest: Option<u16>,
}

impl Target {
    pub fn start(memory: TargetMemory) -> Target {
        Target::start_with(memory, Setup::default())
    }

    pub fn start_with(memory: TargetMemory, setup: Setup) -> Target {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (vm, cancel, stop) =
            (TestVm::default(), Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let place = place();
        let registry = Registry::new(&place.path().join("sessions")).unwrap();
        let (done, result) = channel();
        let spool = setup.spool.clone().unwrap_or_else(|| StateSpool {
            directory: place.path().to_path_buf(),
            disk_bytes: u64::MAX,
            memory_bytes: migrate::limits::STATE_IN_MEMORY,
            encrypt: false,
            lock: false,
        });
        let sockets = Sockets::default();
        let daemon = Daemon {
            listener,
            memory,
            vm: vm.clone(),
            cancel: cancel.clone(),
            stop: stop.clone(),
            registry,
            spool,
            highest: setup.highest,
            sockets: sockets.clone(),
        };
        let daemon = Some(std::thread::spawn(move || daemon.serve(&done)));
        Target {
            address,
            session: SessionId::random().unwrap(),
            vm,
            cancel,
            result,
            stop,
            daemon,
            sockets,
            _place: place,
        }
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        stream
    }

    /// Ends the connections that there are.
    pub fn cut(&self) -> impl Fn() + Send + 'static {
        let sockets = self.sockets.clone();
        move || sockets.lock().unwrap().drain(..).for_each(|socket| drop(socket.shutdown(Shutdown::Both)))
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
    spool: StateSpool,
    highest: Option<u16>,
    sockets: Sockets,
}

impl Daemon {
    fn note(&self, socket: &TcpStream) {
        self.sockets.lock().unwrap().push(socket.try_clone().unwrap());
    }

    fn serve(self, done: &Sender<Result<Received, ReceiveError>>) {
        std::thread::scope(|scope| {
            let mut waiting: Option<Sender<DataStream>> = None;
            loop {
                let (mut socket, _) = self.listener.accept().unwrap();
                if self.stop.load(Ordering::SeqCst) {
                    return;
                }
                match read_hello(&mut socket) {
                    Ok(Hello::Session(mut hello)) => {
                        self.note(&socket);
                        if let Some(highest) = self.highest {
                            hello.versions = *hello.versions.start()..=highest;
                        }
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
                        self.note(&socket);
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
            spool: self.spool.clone(),
            registry: &self.registry,
            progress: &|_| {},
            cancel: &self.cancel,
        };
        receive(link, self.memory.clone(), &mut self.vm.clone())
    }
}
