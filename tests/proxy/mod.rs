//! A cable between a VM's process and the daemon that it moves to, which knows the wire's messages and strikes at a
//! chosen one.
//!
//! ```text
//!   source ══▶ Proxy ══▶ target's daemon, target's process        each connection: two threads, one a direction
//!                │ every message, whole: at the one that the plan names, the strike, and nothing passes meanwhile
//!                └──▶ cut this one · cut all · silence · kill somebody
//! ```
//! A message that the proxy has received was sent for certain, and was not heard by its addressee: the proxy strikes
//! between these two. A cut loses the message. After a kill the message is delivered, as by a network that had it
//! already.
#![allow(dead_code, reason = "each test file uses a part")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use testkit::wait::DEADLINE;

/// What a message is, as far as its first bytes tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    Session,
    Stream,
    Resolve,
    Accepted,
    Refused,
    Resolved,
    Pages,
    Zeros,
    RoundEnd,
    LastRoundEnd,
    Heat,
    State,
    Final,
    Commit,
    Abort,
    HeatTaken,
    RoundDone,
    Prepared,
    Running,
    NotStarted,
    Placement,
    Other(u8),
}

/// The opening's preamble, and a record's header (`docs/wire.md`).
const PREAMBLE: usize = 16;
const HEADER: usize = 32;
const RECORD_ALIVE: u8 = 32;

fn number(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize
}

fn opening(kind: u8) -> Word {
    match kind {
        1 => Word::Session,
        2 => Word::Stream,
        3 => Word::Resolve,
        65 => Word::Accepted,
        66 => Word::Refused,
        67 => Word::Resolved,
        kind => Word::Other(kind),
    }
}

fn record(kind: u8, flags: u8) -> Word {
    match kind {
        1 => Word::Pages,
        2 => Word::Zeros,
        4 if flags & 1 == 1 => Word::LastRoundEnd,
        4 => Word::RoundEnd,
        16 => Word::Heat,
        17 => Word::State,
        18 => Word::Final,
        19 => Word::Commit,
        33 => Word::Abort,
        48 => Word::HeatTaken,
        49 => Word::RoundDone,
        50 => Word::Prepared,
        51 => Word::Running,
        52 => Word::NotStarted,
        53 => Word::Placement,
        kind => Word::Other(kind),
    }
}

/// Reads one message. None: the connection has ended.
fn read_message(from: &mut TcpStream) -> Option<(Word, Vec<u8>)> {
    let mut bytes = vec![0; PREAMBLE];
    from.read_exact(&mut bytes).ok()?;
    let (word, rest) = if bytes.starts_with(b"vmemdmig") {
        (opening(bytes[10]), number(&bytes, 12))
    } else {
        assert!(bytes.starts_with(b"vM"), "neither an opening nor a record: {bytes:02x?}");
        bytes.resize(HEADER, 0);
        from.read_exact(&mut bytes[PREAMBLE..]).ok()?;
        (record(bytes[2], bytes[3]), number(&bytes, 16) + number(&bytes, 20))
    };
    let head = bytes.len();
    bytes.resize(head + rest, 0);
    from.read_exact(&mut bytes[head..]).ok()?;
    Some((word, bytes))
}

/// The message at which the proxy strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    /// The message of that number among all, from 1. Signs of life do not count.
    Message(usize),
    /// The message of that number among those of its kind, from 1.
    Word(Word, usize),
    /// The message that has the byte of that number among all. The bytes before it get through.
    Byte(u64),
}

/// The harm that the proxy does to connections when it strikes. Harm to processes is done by the test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strike {
    CutThis,
    CutAll,
    /// As if the cable were pulled: nothing passes any more, and nobody is told.
    Silence,
    /// Processes are killed; the message gets through if there is still somebody.
    Kill,
}

/// A fault of a migration, as tests choose them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    CutThis,
    CutAll,
    Silence,
    KillSource,
    KillTarget,
    KillDaemon,
}

pub(crate) const FAULTS: [Fault; 6] =
    [Fault::CutThis, Fault::CutAll, Fault::Silence, Fault::KillSource, Fault::KillTarget, Fault::KillDaemon];

impl Fault {
    /// The proxy's part in the fault.
    pub(crate) fn strike(self) -> Strike {
        match self {
            Fault::CutThis => Strike::CutThis,
            Fault::CutAll => Strike::CutAll,
            Fault::Silence => Strike::Silence,
            Fault::KillSource | Fault::KillTarget | Fault::KillDaemon => Strike::Kill,
        }
    }
}

/// Whether new connections pass after the strike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// New connections pass.
    Open,
    /// They are refused until the proxy is healed.
    Closed,
}

pub(crate) struct Plan {
    pub(crate) at: At,
    pub(crate) strike: Strike,
    pub(crate) after: After,
    /// Called once, with nothing passing meanwhile.
    pub(crate) then: Box<dyn FnMut() + Send>,
}

#[derive(Default)]
struct State {
    plan: Option<Plan>,
    target: String,
    messages: usize,
    bytes: u64,
    /// Every message that came here, in order.
    heard: Vec<Word>,
    /// Every message that got through.
    delivered: Vec<Word>,
    struck: Option<Word>,
    /// The number of messages that had got through when it struck.
    delivered_before: usize,
    closed: bool,
    sockets: Vec<TcpStream>,
    over: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Connections from before the strike carry nothing any more.
    silent: AtomicBool,
}

pub(crate) struct Proxy {
    pub(crate) address: String,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Listens on a port of its own, and connects each source to the daemon at `target`.
    pub(crate) fn start(target: &str) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let shared = Arc::new(Shared::default());
        shared.lock().target = target.to_owned();
        let accepting = shared.clone();
        std::thread::spawn(move || {
            for source in listener.incoming().flatten() {
                if accepting.lock().over {
                    return;
                }
                accepting.clone().join(source);
            }
        });
        Proxy { address, shared }
    }

    /// Strikes once by this plan.
    pub(crate) fn plan(&self, plan: Plan) {
        let mut state = self.shared.lock();
        (state.messages, state.bytes) = (0, 0);
        (state.heard, state.delivered, state.delivered_before) = (Vec::new(), Vec::new(), 0);
        (state.struck, state.closed, state.plan) = (None, false, Some(plan));
        self.shared.silent.store(false, Ordering::SeqCst);
    }

    /// The message at which it struck, if it did.
    pub(crate) fn struck(&self) -> Option<Word> {
        self.shared.lock().struck
    }

    /// Every message that came here, in order.
    pub(crate) fn heard(&self) -> Vec<Word> {
        self.shared.lock().heard.clone()
    }

    pub(crate) fn delivered(&self, word: Word) -> bool {
        self.shared.lock().delivered.contains(&word)
    }

    /// Whether a message of that kind had got through when the proxy struck.
    pub(crate) fn delivered_before(&self, word: Word) -> bool {
        let state = self.shared.lock();
        state.delivered[..state.delivered_before].contains(&word)
    }

    /// New connections pass from now on.
    pub(crate) fn heal(&self) {
        self.shared.lock().closed = false;
    }

    /// New connections go to the daemon at `target` from now on.
    pub(crate) fn redirect(&self, target: &str) {
        self.shared.lock().target = target.to_owned();
    }

    /// Waits until it has struck; false if that does not happen.
    pub(crate) fn wait_for_strike(&self, patience: Duration) -> bool {
        let state = self.shared.lock();
        let waited = self.shared.changed.wait_timeout_while(state, patience, |state| state.struck.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.struck.is_some()
    }
}

/// A cable that lets some bytes through and then holds everything up, until it is told to go on.
pub(crate) struct HeldUp {
    proxy: Proxy,
    held: Receiver<()>,
    go_on: Mutex<Option<Sender<()>>>,
}

/// A cable to the daemon at `target` that holds everything up after so many bytes.
pub(crate) fn hold_up(target: &str, after_bytes: u64) -> HeldUp {
    let proxy = Proxy::start(target);
    let (holds, held) = channel();
    let (go_on, gone_on) = channel::<()>();
    let then = Box::new(move || {
        let _ = holds.send(());
        // The other end is dropped, and says nothing.
        let _ = gone_on.recv();
    });
    proxy.plan(Plan { at: At::Byte(after_bytes), strike: Strike::Kill, after: After::Open, then });
    HeldUp { proxy, held, go_on: Mutex::new(Some(go_on)) }
}

impl HeldUp {
    pub(crate) fn address(&self) -> &str {
        &self.proxy.address
    }

    pub(crate) fn wait_until_held(&self) {
        self.held.recv_timeout(DEADLINE).expect("so much is sent");
    }

    /// From now on everything gets through.
    pub(crate) fn go_on(&self) {
        self.go_on.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

impl Drop for HeldUp {
    fn drop(&mut self) {
        // What holds it up has the proxy's lock, for which the proxy's end waits.
        self.go_on();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.over = true;
        cut(&mut state);
        drop(state);
        // Wakes the accepting thread.
        let _ = TcpStream::connect(&self.address);
    }
}

fn cut(state: &mut State) {
    state.sockets.drain(..).for_each(|socket| drop(socket.shutdown(Shutdown::Both)));
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins a new connection with one to the target.
    fn join(self: Arc<Shared>, source: TcpStream) {
        let mut state = self.lock();
        if state.closed {
            return;
        }
        let Ok(target) = TcpStream::connect(&state.target) else { return };
        let clones = || [source.try_clone().expect("a clone"), target.try_clone().expect("a clone")];
        for socket in [&source, &target] {
            socket.set_nodelay(true).expect("a socket");
        }
        state.sockets.extend(clones());
        let newborn = state.struck.is_some();
        drop(state);
        for forth in [true, false] {
            let [source, target] = clones();
            let (from, to) = if forth { (source, target) } else { (target, source) };
            let shared = self.clone();
            std::thread::spawn(move || shared.carry(from, to, newborn));
        }
    }

    /// Carries one direction of one connection. `newborn`: the connection was made after the strike.
    fn carry(&self, mut from: TcpStream, mut to: TcpStream, newborn: bool) {
        while let Some((word, bytes)) = read_message(&mut from) {
            if !newborn && self.silent.load(Ordering::SeqCst) {
                // Read, so that whoever writes does not notice; never passed on.
                continue;
            }
            if !self.pass(word, &bytes, &from, &mut to) {
                break;
            }
        }
        if newborn || !self.silent.load(Ordering::SeqCst) {
            let _ = to.shutdown(Shutdown::Write);
        }
    }

    /// Passes a message on, unless this is where it strikes. False: this connection is over.
    fn pass(&self, word: Word, bytes: &[u8], from: &TcpStream, to: &mut TcpStream) -> bool {
        let mut state = self.lock();
        if word != Word::Other(RECORD_ALIVE) {
            state.messages += 1;
            state.heard.push(word);
        }
        let before = state.bytes;
        state.bytes += bytes.len() as u64;
        let due = state.struck.is_none()
            && match state.plan.as_ref().map(|plan| plan.at) {
                None => false,
                Some(At::Message(number)) => state.messages == number,
                Some(At::Word(at, number)) => {
                    word == at && state.heard.iter().filter(|heard| **heard == at).count() == number
                }
                Some(At::Byte(byte)) => before <= byte && byte < state.bytes,
            };
        if !due {
            state.delivered.push(word);
            // A peer that takes nothing just now must not hold up the others.
            drop(state);
            return to.write_all(bytes).is_ok();
        }
        let mut plan = state.plan.take().expect("it is due");
        state.struck = Some(word);
        state.delivered_before = state.delivered.len();
        let split = if let At::Byte(byte) = plan.at { (byte - before) as usize } else { 0 };
        let (first, rest) = bytes.split_at(split);
        let _ = to.write_all(first);
        (plan.then)();
        state.closed = plan.after == After::Closed;
        self.changed.notify_all();
        match plan.strike {
            Strike::CutThis => {
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
                false
            }
            Strike::CutAll => {
                cut(&mut state);
                false
            }
            Strike::Silence => {
                self.silent.store(true, Ordering::SeqCst);
                true
            }
            Strike::Kill => {
                state.delivered.push(word);
                to.write_all(rest).is_ok()
            }
        }
    }
}
