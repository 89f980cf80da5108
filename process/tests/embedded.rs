//! VMs embedded in another program (this test), with guests and engines that the program brings along, as a preloaded
//! QEMU does.

#[macro_use]
extern crate testkit;

testkit::main!();

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, IntoRawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use migrate::{Hello, SessionHello};
use swapd::{Engine, EngineConfig, PAGE_SIZE, PageNo, StartError, StoreConfig};
use testkit::{Reason, TempDir, skip, until, wait_for};
use vmprocess::control::client::VmClient;
use vmprocess::control::protocol::{EngineKind, Force, GuestStat, MigrateRequest, Request, State, Trust};
use vmprocess::control::rundir::{RunDir, SocketName};
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::granted::{Granted, Share};
use vmprocess::{
    Arrival, ArriveSettings, End, Facts, GuestView, Machine, Memory, MemorySpec, Newcomer, Owner, Process,
    passing,
};

/// No test waits longer for anything.
const DEADLINE: Duration = Duration::from_secs(60);
const MEMORY: u64 = 64 << 20;
const BUDGET: u64 = 32 << 20;
/// What a target needs to know of the machine.
const OFFER: &str = "{\"a machine\": 3}";
const STATE: &[u8] = b"the state of the devices";
/// Pages that have content, spread over more memory than the budget.
const PAGES: u64 = 100;

/// A run directory and a store, which go when the test ends. Not in /tmp, which may be a tmpfs without O_DIRECT.
#[derive(Clone)]
struct Host(Arc<TempDir>);

impl Host {
    fn new() -> Host {
        Host(Arc::new(testkit::directory_in(env!("CARGO_TARGET_TMPDIR"), "embedded")))
    }

    fn path(&self) -> PathBuf {
        self.0.path().to_owned()
    }

    fn run_dir(&self) -> RunDir {
        RunDir::open(&self.0.path().join("run")).unwrap()
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("run/web.sock")
    }
}

/// What guests were asked to do, in turn.
type Log = Arc<Mutex<Vec<&'static str>>>;

fn logged(log: &Log) -> Vec<&'static str> {
    std::mem::take(&mut *log.lock().unwrap())
}

/// What a guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    Well,
    /// Somebody else has paused it.
    Stands,
    RefusesState,
    RefusesToRun,
    /// Does not say whether it runs.
    MayRun,
    /// A bug shows when it is told to run.
    PanicsAtStart,
    Panics,
}

#[derive(Debug)]
struct LoggedGuest {
    log: Log,
    manner: Manner,
}

impl LoggedGuest {
    fn note(&self, what: &'static str) -> Result<(), Failure> {
        self.log.lock().unwrap().push(what);
        Ok(())
    }
}

impl Machine for LoggedGuest {
    fn drain(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Failure> {
        self.note("pause")
    }

    fn runs(&mut self) -> Result<bool, Failure> {
        Ok(self.manner != Manner::Stands)
    }

    fn resume(&mut self) -> Result<(), Failure> {
        self.note("resume")?;
        match self.manner {
            Manner::RefusesToRun => Err(Failure::new(FailureKind::Vm, "a disk is locked")),
            Manner::MayRun => Err(Failure::new(FailureKind::InDoubt, "no answer")),
            // Once: its user tells it again.
            Manner::PanicsAtStart => {
                self.manner = Manner::Well;
                panic!("a bug at the start");
            }
            _ => Ok(()),
        }
    }

    fn save(&mut self, to: &mut dyn Write) -> Result<(), Failure> {
        self.note("save")?;
        assert_ne!(self.manner, Manner::Panics);
        to.write_all(STATE).map_err(|error| Failure::io("its state", &error))
    }

    fn throttle(&mut self, _percent: u8) {}

    fn view(&self) -> GuestView {
        GuestView {
            vcpus: 3,
            workload: "an operating system".to_owned(),
            guest: GuestStat::default(),
            failed: None,
        }
    }

    fn quit(self: Box<Self>) -> Result<(), Failure> {
        self.note("quit")
    }
}

struct LoggedNewcomer {
    log: Log,
    manner: Manner,
}

impl Newcomer for LoggedNewcomer {
    fn load(self: Box<Self>, state: &mut dyn Read) -> Result<Box<dyn Machine>, Failure> {
        assert_ne!(self.manner, Manner::Panics);
        let mut whole = Vec::new();
        state.read_to_end(&mut whole).map_err(|error| Failure::io("its state", &error))?;
        if self.manner == Manner::RefusesState || whole != STATE {
            return Err(Failure::new(FailureKind::Vm, "these devices are unknown here"));
        }
        let guest = LoggedGuest { log: self.log, manner: self.manner };
        guest.note("load")?;
        Ok(Box::new(guest))
    }
}

/// Ends the test on a host that cannot run an engine.
fn engine(host: &Host, notify: impl Fn(swapd::Notice) + Send + 'static) -> Engine {
    let config = EngineConfig {
        memory_bytes: MEMORY,
        budget_bytes: BUDGET,
        store: StoreConfig { path: host.path(), overcommit: false, encrypt: false },
        origin: None,
        prealloc: false,
        lock: false,
        sampling: false,
    };
    match Engine::start(config, Box::new(notify)) {
        Err(StartError::Host(reason)) => skip(Reason::Uffd, reason),
        started => started.unwrap(),
    }
}

fn word_of(engine: &Engine, number: u64) -> *mut u64 {
    let page = PageNo(number * (MEMORY / PAGE_SIZE as u64 / PAGES));
    engine.handle().page_address(page).cast()
}

/// A VM that runs, in a thread of this process.
struct Running {
    engine: Engine,
    log: Log,
    process: JoinHandle<(Process, End)>,
}

fn start(host: &Host) -> Running {
    start_as(host, Manner::Well)
}

fn start_as(host: &Host, manner: Manner) -> Running {
    let facts = Facts {
        name: "web".to_owned(),
        memory_bytes: MEMORY,
        budget_bytes: BUDGET,
        engine: EngineKind::Vmemd,
        daemon: None,
        offer: Some(OFFER.to_owned()),
    };
    let socket = host.run_dir().claim_name("web").unwrap();
    let process = Process::begin(facts, socket, Owner::Embedder).unwrap();
    let engine = engine(host, process.notices());
    for number in 0..PAGES {
        // SAFETY: an aligned word of the engine's memory, which lives as long as the engine; only this thread uses it.
        unsafe { word_of(&engine, number).write_volatile(number + 1) };
    }
    let (memory, log) = (Memory::external(engine.handle()), Log::default());
    let guest = LoggedGuest { log: log.clone(), manner };
    let process = std::thread::spawn(move || {
        let end = process.run(memory, || Ok(Box::new(guest)));
        (process, end)
    });
    Running { engine, log, process }
}

fn connect(host: &Host) -> VmClient {
    VmClient::connect(&host.run_dir(), "web").unwrap()
}

/// The VM's facts once it is in that state.
fn wait_state(host: &Host, state: State) -> vmprocess::control::protocol::VmStat {
    let mut client = connect(host);
    wait_for("a state", || Some(client.stat().unwrap()).filter(|stat| stat.state == state))
}

/// A VM came, ran when it was told to, and was stopped.
fn arrived_and_stopped(target: JoinHandle<(Engine, Log, Process, End)>) {
    let (_engine, log, _process, end) = target.join().unwrap();
    assert_eq!((end.result, end.quit), (Ok(()), true));
    assert_eq!(logged(&log), ["load", "resume", "pause", "quit"]);
}

/// What the daemon and the program that it starts do for one VM that comes.
fn receive_one(host: &Host, manner: Manner) -> (String, JoinHandle<(Engine, Log, Process, End)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (dir, host) = (host.run_dir(), host.clone());
    let receiver = std::thread::spawn(move || {
        let (mut control, _) = listener.accept().unwrap();
        let Hello::Session(hello) = migrate::read_hello(&mut control).unwrap() else { panic!("a session") };
        let (ours, theirs) = UnixStream::pair().unwrap();
        let streams = hello.streams;
        let settings = settings_of(&dir, host.path(), hello, control, theirs);
        let passing = std::thread::spawn(move || {
            for _ in 0..streams {
                let (mut stream, _) = listener.accept().unwrap();
                let Hello::Stream(hello) = migrate::read_hello(&mut stream).unwrap() else {
                    panic!("a stream")
                };
                passing::send_fd(&ours, &stream, hello.index).unwrap();
            }
        });
        let (process, arrival) = Arrival::begin(&settings, Owner::Embedder).unwrap();
        let engine = engine(&host, process.notices());
        let log = Log::default();
        let newcomer = LoggedNewcomer { log: log.clone(), manner };
        let end = process.receive(arrival, Memory::external(engine.handle()), Box::new(newcomer));
        passing.join().unwrap();
        (engine, log, process, end)
    });
    (address, receiver)
}

fn settings_of(
    dir: &RunDir,
    store: PathBuf,
    hello: SessionHello,
    control: TcpStream,
    streams: UnixStream,
) -> ArriveSettings {
    assert_eq!(hello.offer.as_deref(), Some(OFFER));
    let socket = SocketName::arriving(&hello.name, &hello.session.to_string());
    let (claim, listener) = dir.claim(&dir.lock().unwrap(), socket).unwrap();
    claim.hand_over();
    let share = Share {
        name: hello.name.clone(),
        pid: 0,
        daemon: Some("a daemon".to_owned()),
        engine: EngineKind::Vmemd,
        memory_bytes: hello.memory_bytes,
        ram_budget_bytes: BUDGET,
    };
    let granted = Granted::new(dir, &hello.session.to_string(), share).unwrap();
    let granted_fd = granted.as_fd().try_clone_to_owned().unwrap();
    granted.hand_over(std::process::id());
    ArriveSettings {
        store_spare_bytes: 1 << 30,
        run_dir: dir.path().to_owned(),
        granted_ram_bytes: BUDGET,
        memory: MemorySpec {
            engine: EngineKind::Vmemd,
            memory_bytes: hello.memory_bytes,
            budget_bytes: BUDGET,
            store,
            store_overcommit: false,
            store_encrypt: false,
            prealloc: false,
            lock: false,
        },
        offer: hello.offer.clone(),
        hello,
        daemon: "a daemon".to_owned(),
        control_fd: control.into_raw_fd(),
        streams_fd: streams.into_raw_fd(),
        listener_fd: listener.into_raw_fd(),
        granted_fd: granted_fd.into_raw_fd(),
    }
}

fn migrate_to(host: &Host, to: String) -> Result<serde_json::Value, Failure> {
    connect(host).ask_long(&migrate_request(to), &mut |_| {})
}

fn migrate_request(to: String) -> Request {
    Request::Migrate(MigrateRequest {
        to,
        ram_bytes: None,
        downtime_target_ms: 50,
        max_downtime_ms: None,
        streams: 2,
        max_rounds: 3,
        max_throttle: 0,
        check_placement: false,
        trust: Trust::default(),
    })
}

fn sigterm_handler() -> libc::sighandler_t {
    // SAFETY: an all-zero sigaction is a valid value of that plain C struct.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null new action only queries; `action` outlives the call.
    assert_eq!(unsafe { libc::sigaction(libc::SIGTERM, std::ptr::null(), &mut action) }, 0);
    action.sa_sigaction
}

#[test]
fn an_embedded_vm_obeys_and_leaves_its_program_alone() {
    let host = Host::new();
    let handler = sigterm_handler();
    let vm = start(&host);
    let stat = wait_state(&host, State::Running);
    assert_eq!((stat.vcpus, stat.workload.as_str()), (3, "an operating system"));
    assert_eq!((stat.memory.memory_bytes, stat.engine), (MEMORY, EngineKind::Vmemd));
    assert!(stat.memory.resident_bytes + stat.memory.stored_bytes >= PAGES * PAGE_SIZE as u64);

    let mut client = connect(&host);
    client.ask(&Request::Pause, DEADLINE).unwrap();
    assert_eq!(client.stat().unwrap().state, State::Paused);
    client.ask(&Request::Resume, DEADLINE).unwrap();
    let smaller = BUDGET / 2;
    let set = client.ask(&Request::SetRam { ram_bytes: smaller }, DEADLINE).unwrap();
    assert_eq!(set["ram_budget_bytes"], smaller);
    assert_eq!(logged(&vm.log), ["pause", "resume"]);

    assert_eq!(sigterm_handler(), handler, "signals are the program's");
    assert!(std::thread::spawn(|| panic!("a panic of the program's own")).join().is_err(), "so are panics");

    client.ask(&Request::Stop, DEADLINE).unwrap();
    let (process, end) = vm.process.join().unwrap();
    assert_eq!((end.result, end.quit), (Ok(()), true));
    assert_eq!(logged(&vm.log), ["pause", "quit"]);
    // The guest has only been told: until its program ends, its memory is served and its name is taken.
    vm.engine.handle().stats().unwrap();
    assert_eq!(host.run_dir().claim_name("web").unwrap_err().kind, FailureKind::Name);
    drop(process);
    assert!(!host.socket().exists());
}

#[test]
fn a_program_that_ends_by_itself_takes_the_name_with_it() {
    let host = Host::new();
    let socket = host.run_dir().claim_name("web").unwrap();
    let facts = Facts {
        name: "web".to_owned(),
        memory_bytes: MEMORY,
        budget_bytes: BUDGET,
        engine: EngineKind::Vmemd,
        daemon: None,
        offer: Some(OFFER.to_owned()),
    };
    let process = Process::begin(facts, socket, Owner::Embedder).unwrap();
    let name = process.name_hold();
    assert_eq!(connect(&host).stat().unwrap().state, State::Arriving);
    assert!(host.socket().exists());
    name.release();
    assert!(!host.socket().exists());
    // Another VM's socket of that name stays.
    let _other = host.run_dir().claim_name("web").unwrap();
    name.release();
    drop(process);
    assert!(host.socket().exists());
}

#[test]
fn a_vm_moves_from_one_program_to_another() {
    let host = Host::new();
    let source = start(&host);
    wait_state(&host, State::Running);
    let (address, target) = receive_one(&host, Manner::Well);
    let report = migrate_to(&host, address).unwrap();
    assert_eq!(report["bytes_total"], MEMORY);

    let (process, end) = source.process.join().unwrap();
    assert_eq!((end.result.unwrap_err().kind, end.quit), (FailureKind::Moved, true));
    assert_eq!(logged(&source.log), ["pause", "save", "quit"], "nothing runs it here again");
    drop(process);

    let stat = wait_state(&host, State::Running);
    assert_eq!((stat.vcpus, stat.daemon.as_deref()), (3, Some("a daemon")));
    connect(&host).ask(&Request::Stop, DEADLINE).unwrap();
    let (engine, log, _process, end) = target.join().unwrap();
    assert_eq!((end.result, end.quit), (Ok(()), true));
    assert_eq!(logged(&log), ["load", "resume", "pause", "quit"]);
    for number in 0..PAGES {
        // SAFETY: an aligned word of the engine's memory, which lives as long as the engine; only this thread uses it.
        let word = unsafe { word_of(&engine, number).read_volatile() };
        assert_eq!(word, number + 1);
    }
}

#[test]
fn a_vm_that_the_target_cannot_load_runs_on_at_the_source() {
    let host = Host::new();
    let source = start(&host);
    wait_state(&host, State::Running);
    let (address, target) = receive_one(&host, Manner::RefusesState);
    let failure = migrate_to(&host, address).unwrap_err();
    for says in ["these devices are unknown here", "runs on here"] {
        assert!(failure.text.contains(says), "{failure}");
    }

    let (_engine, log, _process, end) = target.join().unwrap();
    let text = end.result.unwrap_err().text;
    assert!(text.contains("did not arrive") && text.contains("these devices are unknown here"), "{text}");
    assert!(!end.quit, "there was no guest to tell");
    assert!(logged(&log).is_empty());

    wait_state(&host, State::Running);
    assert_eq!(logged(&source.log), ["pause", "save", "resume"]);
    connect(&host).ask(&Request::Stop, DEADLINE).unwrap();
    let (_process, end) = source.process.join().unwrap();
    assert_eq!((end.result, end.quit), (Ok(()), true));
}

#[test]
fn a_vm_that_stands_still_arrives_so() {
    for by_its_user in [true, false] {
        let host = Host::new();
        let source = start_as(&host, if by_its_user { Manner::Well } else { Manner::Stands });
        wait_state(&host, State::Running);
        if by_its_user {
            connect(&host).ask(&Request::Pause, DEADLINE).unwrap();
            logged(&source.log);
        }
        // What it does not get away from, it stands still at.
        let (address, target) = receive_one(&host, Manner::RefusesState);
        let failure = migrate_to(&host, address).unwrap_err();
        assert!(failure.text.contains("stays paused here"), "{failure}");
        drop(target.join().unwrap());
        wait_state(&host, State::Paused);
        assert_eq!(logged(&source.log), ["pause", "save"]);

        let (address, target) = receive_one(&host, Manner::Well);
        migrate_to(&host, address).unwrap();
        drop(source.process.join().unwrap());
        wait_state(&host, State::Paused);
        connect(&host).ask(&Request::Resume, DEADLINE).unwrap();
        wait_state(&host, State::Running);
        connect(&host).ask(&Request::Stop, DEADLINE).unwrap();
        arrived_and_stopped(target);
    }
}

/// Its stopper has been told that it is stopped: it must not run elsewhere after that.
#[test]
fn a_vm_that_is_ending_does_not_move_any_more() {
    let host = Host::new();
    let vm = start(&host);
    wait_state(&host, State::Running);
    // Somebody who has not had an answer yet: until then, or for some seconds, requests are taken.
    let mut slow = UnixStream::connect(host.socket()).unwrap();
    writeln!(slow, "{}", serde_json::to_string(&Request::RecordFaults { seconds: 60 }).unwrap()).unwrap();
    let mut first = [0];
    std::io::Read::read_exact(&mut slow, &mut first).unwrap();
    let mut late = connect(&host);
    assert_eq!(connect(&host).ask(&Request::Stop, DEADLINE).unwrap()["state"], "stopped");
    let refused = late.ask_long(&migrate_request("127.0.0.1:1".to_owned()), &mut |_| {}).unwrap_err();
    assert_eq!(
        (refused.kind, refused.text.as_str()),
        (FailureKind::Name, "\"web\" cannot move: it is ending")
    );
    drop(slow);
    let (_process, end) = vm.process.join().unwrap();
    assert_eq!((end.result, end.quit), (Ok(()), true));
}

#[test]
fn a_vm_that_may_run_at_the_target_runs_nowhere_else() {
    let host = Host::new();
    let source = start(&host);
    wait_state(&host, State::Running);
    let (address, target) = receive_one(&host, Manner::MayRun);
    migrate_to(&host, address).unwrap();
    drop(source.process.join().unwrap());
    assert_eq!(logged(&source.log), ["pause", "save", "quit"]);
    wait_state(&host, State::Running);
    connect(&host).ask(&Request::Stop, DEADLINE).unwrap();
    arrived_and_stopped(target);
}

#[test]
fn a_bug_at_the_start_leaves_the_vm_where_the_record_says() {
    let host = Host::new();
    let source = start(&host);
    wait_state(&host, State::Running);
    let (address, target) = receive_one(&host, Manner::PanicsAtStart);
    // Its daemon is not there to be asked: in doubt, until somebody who knows says so.
    let mut client = UnixStream::connect(host.socket()).unwrap();
    writeln!(client, "{}", serde_json::to_string(&migrate_request(address)).unwrap()).unwrap();
    until("its daemon", || connect(&host).stat().is_ok_and(|stat| stat.daemon.is_some()));
    assert_eq!(connect(&host).stat().unwrap().state, State::Running);
    // It has not run: whoever panicked did so before.
    connect(&host).ask(&Request::Resume, DEADLINE).unwrap();
    let sockets = host.run_dir().sockets().unwrap();
    let left = sockets.iter().find(|socket| matches!(socket, SocketName::Leaving(..))).unwrap();
    let mut doubter = VmClient::connect_to(&host.run_dir(), left).unwrap();
    until("the limit", || {
        doubter.stat().unwrap().waiting.is_some_and(|waiting| waiting.limit == "RESOLVE_LIMIT")
    });
    // Ends the asking, not the doubt.
    drop(client);
    until("its doubt", || doubter.stat().unwrap().state == State::InDoubt);
    // What holds the name here is taken for what it is: the VM.
    let here = Request::Resolve { force: Some(Force::RunHere) };
    assert_eq!(doubter.ask(&here, DEADLINE).unwrap_err().kind, FailureKind::Name);
    let gone = Request::Resolve { force: Some(Force::Gone) };
    assert_eq!(doubter.ask(&gone, DEADLINE).unwrap()["state"], "moved");
    drop(source.process.join().unwrap());
    assert_eq!(logged(&source.log), ["pause", "save", "quit"]);
    connect(&host).ask(&Request::Stop, DEADLINE).unwrap();
    let (_engine, log, _process, end) = target.join().unwrap();
    assert_eq!((end.result, end.quit), (Ok(()), true));
    assert_eq!(logged(&log), ["load", "resume", "resume", "pause", "quit"]);
}

#[test]
fn a_vm_that_stays_and_cannot_be_resumed_is_said_to_be_paused() {
    let host = Host::new();
    let source = start_as(&host, Manner::RefusesToRun);
    wait_state(&host, State::Running);
    let (address, target) = receive_one(&host, Manner::RefusesState);
    let failure = migrate_to(&host, address).unwrap_err();
    for says in ["could not be resumed: a disk is locked", "stays paused here"] {
        assert!(failure.text.contains(says), "{failure}");
    }
    drop(target.join().unwrap());
    wait_state(&host, State::Paused);
    let log = logged(&source.log);
    assert!(log.starts_with(&["pause", "save", "resume", "resume"]), "tried again: {log:?}");
    connect(&host).ask(&Request::Stop, DEADLINE).unwrap();
    drop(source.process.join().unwrap());
}

#[test]
fn a_bug_on_either_side_leaves_no_vm_half_way() {
    let host = Host::new();
    let source = start(&host);
    wait_state(&host, State::Running);
    let (address, target) = receive_one(&host, Manner::Panics);
    let failure = migrate_to(&host, address).unwrap_err();
    assert!(failure.text.contains("runs on here"), "{failure}");
    let (_engine, _log, process, end) = target.join().unwrap();
    assert!(end.result.unwrap_err().text.contains("a bug in vmemd"));
    drop(process);
    wait_state(&host, State::Running);
    connect(&host).ask(&Request::Stop, DEADLINE).unwrap();
    drop(source.process.join().unwrap());

    let source = start_as(&host, Manner::Panics);
    wait_state(&host, State::Running);
    let (address, target) = receive_one(&host, Manner::Well);
    let failure = migrate_to(&host, address).unwrap_err();
    for says in ["a bug in vmemd", "stays paused here"] {
        assert!(failure.text.contains(says), "{failure}");
    }
    assert!(target.join().unwrap().3.result.is_err());
    wait_state(&host, State::Paused);
    connect(&host).ask(&Request::Resume, DEADLINE).unwrap();
    wait_state(&host, State::Running);
    connect(&host).ask(&Request::Stop, DEADLINE).unwrap();
    drop(source.process.join().unwrap());
}
