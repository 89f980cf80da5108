//! The daemon's loop: accepts connections, reads what each is for, and hands it to the process that it concerns.

use std::collections::HashMap;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use migrate::{Hello, RefuseKind, Registry, SessionHello, SessionId, StreamHello};
use tracing::{debug, info, warn};
use vmprocess::control::protocol::EngineKind;
use vmprocess::control::rundir::{RunDir, SocketName};
use vmprocess::failure::{Failure, FailureKind, chain};
use vmprocess::granted::{Granted, Share};
use vmprocess::size::Size;
use vmprocess::{ArriveSettings, MemorySpec, host, passing, signals};

use super::admission::{Held, Pool, Refusal, check_hello, tolerated_holders};
use super::children::{self, Descriptors};
use super::door::{Door, DoorSettings};
use super::groups::{Group, Groups};
use super::machine::{self, MachineChoice};
use super::watch::{Log, Watch};
use crate::qemu::rules::Rules;

/// Connections whose purpose is not known yet; more are closed at once.
const GREETING_MAX: usize = 32;
/// Pause after an accept that failed for want of descriptors or memory.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// How long a VM that comes again is kept waiting for what is left of its last try.
const LEFTOVER_LIMIT: Duration = Duration::from_secs(3);
/// How a VM's process ends when the VM has moved on.
const MOVED: i32 = FailureKind::Moved.exit_code() as i32;
/// Records of hand-overs that were given up longer ago are removed.
const RECORDS_KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// The settings of `vmemd serve`.
#[derive(Clone, Debug)]
pub struct ServeSettings {
    pub run_dir: PathBuf,
    pub listen: String,
    pub door: DoorSettings,
    /// Without TLS, whoever can reach the address.
    pub plain: bool,
    pub ram_bytes: u64,
    pub store: PathBuf,
    pub engine: EngineKind,
    pub lock: bool,
    pub encrypt_store: bool,
    pub log_dir: Option<PathBuf>,
    /// How names of other hosts' QEMU command lines are called here; None: QEMU VMs may not come.
    pub qemu_rules: Option<Rules>,
    pub json: bool,
}

#[derive(Debug)]
struct Daemon {
    settings: ServeSettings,
    dir: RunDir,
    door: Door,
    /// The address that it listens on; names the daemon in its VMs' `stat`.
    listen: String,
    registry: Registry,
    /// Where VMs get control groups of their own, if this daemon may make any.
    groups: Groups,
    /// Sessions whose process lives.
    sessions: Mutex<HashMap<SessionId, Receiver>>,
    session_ended: Condvar,
    /// One VM is let in at a time: what it gets must be seen by the next.
    admission: Mutex<()>,
    greeting: AtomicUsize,
}

/// Serves until a signal comes. Running VMs go on.
///
/// # Errors
/// If it cannot begin to.
pub fn serve(settings: ServeSettings) -> Result<(), Failure> {
    signals::install()?;
    let total = host::total_ram()?;
    if settings.ram_bytes > total {
        let (asked, total) = (Size(settings.ram_bytes), Size(total));
        return Err(Failure::new(
            FailureKind::Resources,
            format!("--ram {asked:#} is more than this host has ({total:#})"),
        ));
    }
    for dir in [Some(&settings.store), settings.log_dir.as_ref()].into_iter().flatten() {
        make_dir(dir)?;
    }
    let dir = RunDir::open(&settings.run_dir)?;
    let door = Door::new(&settings.door)?;
    let listener = bind(&settings)?;
    let fail = |error| Failure::io("cannot listen", &error);
    listener.set_nonblocking(true).map_err(fail)?;
    let listen = listener.local_addr().map_err(fail)?.to_string();
    let registry = Registry::new(&dir.sessions_dir()).map_err(|error| Failure::other(&error))?;
    if let Err(error) = registry.prune(RECORDS_KEPT) {
        warn!(error = %chain(&error), "old records of hand-overs stay");
    }
    let (groups, json) = (Groups::of_this_process(), settings.json);
    let daemon = Arc::new(Daemon {
        settings,
        dir,
        door,
        listen,
        registry,
        groups,
        sessions: Mutex::default(),
        session_ended: Condvar::new(),
        admission: Mutex::default(),
        greeting: AtomicUsize::new(0),
    });
    // What there was to put in order is: whoever reads this may rely on it.
    announce(&daemon.listen, json);
    daemon.accept(&listener);
    info!("the daemon ends; VMs run on");
    Ok(())
}

/// Listens, where everybody can connect only if they are asked who they are, or if that is the user's will.
fn bind(settings: &ServeSettings) -> Result<TcpListener, Failure> {
    let listen = &settings.listen;
    let fail = |error: std::io::Error| {
        let text = format!("cannot listen on {listen}: {error}; choose another --listen ADDRESS:PORT");
        let kind = if error.kind() == std::io::ErrorKind::InvalidInput {
            FailureKind::Usage
        } else {
            FailureKind::Link
        };
        Failure::new(kind, text)
    };
    let addresses: Vec<SocketAddr> = listen.to_socket_addrs().map_err(fail)?.collect();
    let this_host = addresses.iter().all(|address| address.ip().to_canonical().is_loopback());
    if !this_host && settings.door.tls.is_none() && !settings.plain {
        return Err(Failure::new(
            FailureKind::Usage,
            format!(
                "--listen {listen} can be reached from other hosts: give --tls DIR (`vmemd pki init` makes one), so that \
                 only hosts of yours come in, or --plain if the network is yours alone"
            ),
        ));
    }
    TcpListener::bind(addresses.as_slice()).map_err(fail)
}

fn make_dir(path: &std::path::Path) -> Result<(), Failure> {
    std::fs::create_dir_all(path)
        .map_err(|error| Failure::io(format!("cannot make the directory {}", path.display()), &error))
}

/// Says where it listens, on stdout, for scripts that asked for any port.
fn announce(listen: &str, json: bool) {
    let line = if json {
        serde_json::json!({ "listen": listen }).to_string()
    } else {
        format!("listening on {listen}")
    };
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    info!(listen, "ready");
}

/// The process that receives a VM.
#[derive(Debug)]
struct Receiver {
    vm: String,
    /// Where the session's data streams go.
    streams: UnixStream,
}

/// A connection whose purpose is not known yet, counted until this is dropped: also if its thread panics.
struct Greeting(Arc<Daemon>);

impl Drop for Greeting {
    fn drop(&mut self) {
        self.0.greeting.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Daemon {
    fn accept(self: &Arc<Daemon>, listener: &TcpListener) {
        while signals::caught().is_none() {
            if !signals::wait_readable(listener.as_fd(), None) {
                continue;
            }
            match listener.accept() {
                Ok((stream, peer)) => self.greet_in_thread(stream, peer),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    debug!(%error, "accept");
                    std::thread::sleep(ACCEPT_RETRY);
                }
            }
        }
    }

    fn greet_in_thread(self: &Arc<Daemon>, stream: TcpStream, peer: SocketAddr) {
        let greeting = Greeting(self.clone());
        if self.greeting.fetch_add(1, Ordering::SeqCst) >= GREETING_MAX {
            let why = format!("{GREETING_MAX} connections have not said yet what they are for");
            return self.door.turned_away(peer.ip(), &why);
        }
        let spawned = std::thread::Builder::new()
            .name("greeting".to_owned())
            .spawn(move || greeting.0.greet(stream, peer));
        if let Err(error) = spawned {
            warn!(%error, "no thread for a connection");
        }
    }

    fn greet(self: &Arc<Daemon>, stream: TcpStream, peer: SocketAddr) {
        if let Err(error) = stream.set_nonblocking(false) {
            return debug!(%peer, %error, "connection lost");
        }
        let Some((mut stream, hello)) = self.door.open(stream, peer) else { return };
        match hello {
            Hello::Session(hello) => {
                if let Err(refusal) = self.admit_again(&mut stream, &hello) {
                    info!(%peer, vm = %hello.name, reason = %refusal.text, "refused");
                    migrate::refuse(&mut stream, refusal.kind, &refusal.text);
                }
            }
            Hello::Stream(hello) => self.pass_on(stream, hello),
            Hello::Resolve { session } => {
                match migrate::answer_resolve(&mut stream, session, &self.registry) {
                    Ok(outcome) => info!(%peer, %session, ?outcome, "told what became of a session"),
                    Err(error) => {
                        warn!(%peer, %session, error = %chain(&error), "cannot tell what became of a session")
                    }
                }
            }
        }
    }

    /// Gives a data stream to the process of its session.
    fn pass_on(&self, mut stream: TcpStream, hello: StreamHello) {
        let socket = self.sessions().get(&hello.session).map(|receiver| receiver.streams.try_clone());
        let passed = match socket {
            Some(Ok(socket)) => passing::send_fd(&socket, &stream, hello.index),
            Some(Err(error)) => Err(error),
            None => Err(std::io::ErrorKind::NotFound.into()),
        };
        if let Err(error) = passed {
            warn!(session = %hello.session, %error, "a data stream has no taker");
            migrate::refuse(&mut stream, RefuseKind::Other, "this session is not being received here");
        }
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<SessionId, Receiver>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a VM in. The source hears of a failure before the process that was to take the VM has ended: that must not
    /// be in the way of the next try.
    fn admit_again(self: &Arc<Daemon>, stream: &mut TcpStream, hello: &SessionHello) -> Result<(), Refusal> {
        let before = self.sessions_of(&hello.name);
        self.admit(stream, hello).or_else(|refusal| {
            let ended = !before.is_empty() && self.wait_for_end(&before);
            if ended { self.admit(stream, hello) } else { Err(refusal) }
        })
    }

    fn sessions_of(&self, vm: &str) -> Vec<SessionId> {
        let sessions = self.sessions();
        sessions.iter().filter(|(_, receiver)| receiver.vm == vm).map(|(session, _)| *session).collect()
    }

    /// Whether all of these processes end within [`LEFTOVER_LIMIT`].
    fn wait_for_end(&self, before: &[SessionId]) -> bool {
        let live = |sessions: &mut HashMap<_, _>| before.iter().any(|session| sessions.contains_key(session));
        let waited = self.session_ended.wait_timeout_while(self.sessions(), LEFTOVER_LIMIT, live);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// A VM's name, its room, its process.
    fn admit(self: &Arc<Daemon>, stream: &mut TcpStream, hello: &SessionHello) -> Result<(), Refusal> {
        check_hello(hello)?;
        let machine = machine::find(hello, self.settings.qemu_rules.as_ref(), self.settings.engine)?;
        let _one_at_a_time = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        let tolerated = tolerated_holders(&self.dir, &hello.name)?;
        let (granted, spare) = self.find_room(hello)?;
        let lock = self.dir.lock()?;
        if let Some(socket) =
            self.dir.holders(&lock, &hello.name)?.iter().find(|socket| !tolerated.contains(socket))
        {
            return Err(Refusal::name_taken(socket));
        }
        let socket = SocketName::arriving(&hello.name, &hello.session.to_string());
        let (claim, listener) = self.dir.claim(&lock, socket)?;
        drop(lock);
        let record = Granted::new(&self.dir, &hello.session.to_string(), self.share(hello, granted))?;
        let group = self.groups.make(&hello.name, &hello.session.to_string());
        let (ours, theirs) =
            UnixStream::pair().map_err(|error| Refusal::other(format!("no socket pair: {error}")))?;
        let settings = self.arrive_settings(hello, (granted, spare), &machine);
        let watch = self.watch(stream, &ours, &hello.name)?;
        // Before the child can tell the source to go on.
        self.sessions().insert(hello.session, Receiver { vm: hello.name.clone(), streams: ours });
        let descriptors =
            Descriptors { control: stream, streams: &theirs, listener: &listener, granted: record.as_fd() };
        let log_dir = self.settings.log_dir.as_deref();
        match children::start(settings, machine, &descriptors, log_dir, group.as_ref()) {
            Ok(child) => {
                claim.hand_over();
                record.hand_over(child.id());
                info!(vm = %hello.name, ram = %Size(granted), pid = child.id(), "arriving");
                self.reap_in_thread(child, hello.clone(), group, watch);
                Ok(())
            }
            Err(failure) => {
                self.sessions().remove(&hello.session);
                Err(failure.into())
            }
        }
    }

    fn watch(&self, control: &TcpStream, streams: &UnixStream, vm: &str) -> Result<Watch, Refusal> {
        let log = self.settings.log_dir.as_ref().map(|dir| Log::new(children::log_path(dir, vm)));
        let cloned = streams.try_clone().and_then(|streams| Ok((streams, control.try_clone()?)));
        let (streams, control) =
            cloned.map_err(|error| Refusal::other(format!("no descriptors left: {error}")))?;
        Ok(Watch { streams, control, log })
    }

    /// The RAM that the VM gets, and the room on the store's disk that is then promised to nobody.
    fn find_room(&self, hello: &SessionHello) -> Result<(u64, u64), Refusal> {
        let pool = Pool {
            engine: self.settings.engine,
            ram_bytes: self.settings.ram_bytes,
            store: &self.settings.store,
            held: Held::ask(&self.dir, &self.listen)?,
            host_free_bytes: host::available_ram()?,
        };
        let granted = pool.grant(hello)?;
        let promised = pool.held.store_promised_bytes.saturating_add(pool.check_store(hello, granted)?);
        Ok((granted, host::free_disk(&self.settings.store).unwrap_or_default().saturating_sub(promised)))
    }

    fn arrive_settings(
        &self,
        hello: &SessionHello,
        (granted, store_spare_bytes): (u64, u64),
        machine: &MachineChoice,
    ) -> ArriveSettings {
        ArriveSettings {
            store_spare_bytes,
            run_dir: self.dir.path().to_owned(),
            hello: SessionHello { offer: None, ..hello.clone() },
            granted_ram_bytes: granted,
            memory: MemorySpec {
                engine: self.settings.engine,
                memory_bytes: hello.memory_bytes,
                budget_bytes: granted,
                store: self.settings.store.clone(),
                store_overcommit: false,
                store_encrypt: self.settings.encrypt_store,
                prealloc: false,
                lock: self.settings.lock,
            },
            daemon: self.listen.clone(),
            offer: match machine {
                MachineChoice::Reference => None,
                MachineChoice::Qemu(qemu) => Some(qemu.offer.clone()),
            },
            control_fd: -1,
            streams_fd: -1,
            listener_fd: -1,
            granted_fd: -1,
        }
    }

    fn share(&self, hello: &SessionHello, granted: u64) -> Share {
        Share {
            name: hello.name.clone(),
            pid: 0,
            daemon: Some(self.listen.clone()),
            engine: self.settings.engine,
            memory_bytes: hello.memory_bytes,
            ram_budget_bytes: granted,
        }
    }

    fn reap_in_thread(
        self: &Arc<Daemon>,
        mut child: std::process::Child,
        hello: SessionHello,
        group: Option<Group>,
        watch: Watch,
    ) {
        let daemon = self.clone();
        let spawned = std::thread::Builder::new().name("reaper".to_owned()).spawn(move || {
            if let Some(why) = watch.until_up(&mut child) {
                warn!(vm = %hello.name, "{why}");
            }
            let status = child.wait();
            drop(group);
            daemon.sessions().remove(&hello.session);
            daemon.session_ended.notify_all();
            match status {
                Ok(status) if status.success() || status.code() == Some(MOVED) => {
                    info!(vm = %hello.name, "the VM's process has ended")
                }
                Ok(status) => warn!(vm = %hello.name, %status, "the VM's process has ended"),
                Err(error) => warn!(vm = %hello.name, %error, "cannot wait for the VM's process"),
            }
            // It cannot start any more, if it had not; sockets of the dead go with the next look.
            if let Err(error) = daemon.registry.burn(hello.session) {
                debug!(session = %hello.session, error = %chain(&error), "nothing to burn");
            }
            let _ = daemon.dir.sockets();
        });
        if let Err(error) = spawned {
            warn!(%error, "no thread to wait for the VM's process");
        }
    }
}
