//! The simulated network: connections between two hosts, each direction a pipe of bounded size in which bytes keep
//! their order and take their time. Connections overtake each other. Links fall silent and heal, connections break at
//! any byte, come twice, and bytes are spoilt. A process that dies leaves its connections to the kernel, which closes
//! them; a host that crashes says nothing.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio_uring::buf::{BoundedBuf, BoundedBufMut};

use super::runtime::{sleep, timeout};
use super::world::{ProcessId, world};
use crate::tls::{Client, TlsError};

/// On its way and not yet read, in one direction of a connection.
const WINDOW: usize = 64 << 10;
/// A packet that got lost and is sent again.
const SPIKE: Duration = Duration::from_secs(3);
const SPIKE_ODDS: u64 = 300;
const SYN_RETRY: Duration = Duration::from_secs(1);
/// Of whoever listens.
pub(crate) const PORT: u16 = 7000;
/// Until a connection notices that the link has healed.
const RESEND: Duration = Duration::from_secs(8);
const OPENING: usize = 16;

/// What went into a connection: seen by whoever plans the faults.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Said {
    pub(crate) end: End,
    /// What the connection was opened for: the kind of its client's opening.
    pub(crate) purpose: u8,
    pub(crate) kind: u8,
    pub(crate) flags: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub(crate) struct End {
    pub(crate) connection: usize,
    /// 0: who connected; 1: who accepted.
    pub(crate) side: usize,
}

impl End {
    fn other(self) -> End {
        End { side: 1 - self.side, ..self }
    }
}

enum Segment {
    Bytes(Vec<u8>),
    Fin,
    Reset,
}

/// What one side says, on its way to the other.
#[derive(Default)]
struct Pipe {
    flying: VecDeque<Segment>,
    flying_bytes: usize,
    last_at: Duration,
    arrived: VecDeque<u8>,
    fin: bool,
    said: u64,
}

#[derive(Default)]
struct Side {
    owner: Option<ProcessId>,
    host: usize,
    handles: usize,
    closed: bool,
    shut: bool,
    reset: bool,
    waiting: Vec<Waker>,
}

#[derive(Default)]
struct Connection {
    /// By who says it.
    pipes: [Pipe; 2],
    sides: [Side; 2],
    purpose: u8,
    /// A second connection that gets the same bytes, and how many of them still.
    mirror: Option<(usize, u64)>,
}

struct Listener {
    owner: ProcessId,
    queue: VecDeque<usize>,
    waiting: Vec<Waker>,
}

/// So many bytes from one side's purpose-`purpose` connections, and then something happens.
pub(crate) struct Countdown {
    pub(crate) side: usize,
    pub(crate) left: u64,
    pub(crate) then: Box<dyn FnOnce()>,
}

#[derive(Default)]
pub(crate) struct Net {
    connections: Vec<Connection>,
    listeners: BTreeMap<(usize, u16), Listener>,
    hosts: BTreeMap<ProcessId, usize>,
    /// What the host says does not get through.
    silent: [bool; 2],
    latency: Duration,
    pub(crate) watcher: Option<Rc<dyn Fn(Said)>>,
    pub(crate) countdown: Option<Countdown>,
    /// So many bytes, of all, and then one is spoilt.
    pub(crate) spoil: Option<u64>,
    /// The next so many connections come twice.
    pub(crate) twice: u32,
}

thread_local!(static NET: RefCell<Net> = RefCell::default());

pub(crate) fn with<T>(act: impl FnOnce(&mut Net) -> T) -> T {
    NET.with(|net| act(&mut net.borrow_mut()))
}

/// An empty network, for a new world.
pub(crate) fn begin() {
    end();
    let latencies = [1, 8, 60].map(Duration::from_millis);
    with(|net| net.latency = world().random.pick(&latencies));
    world().on_death(close_all);
}

pub(crate) fn place(process: ProcessId, host: usize) {
    with(|net| net.hosts.insert(process, host));
}

pub(crate) fn host_of(address: IpAddr) -> usize {
    match address {
        IpAddr::V4(address) => usize::from(address.octets()[3]),
        IpAddr::V6(_) => unreachable!("the simulated network has no such addresses"),
    }
}

pub(crate) fn address_of(host: usize) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, host as u8)), PORT)
}

/// Of what is no TCP connection it is not known.
pub(crate) fn round_trip(_: &StdStream) -> Option<Duration> {
    None
}

/// Connections here have no TLS: what it makes of a cut, of silence and of spoilt bytes is a connection that broke.
pub(crate) fn secure(_: &Client, _: StdStream, _: &str, _: Duration) -> Result<StdStream, TlsError> {
    unreachable!("no session asks for it")
}

fn wake(waiting: &mut Vec<Waker>) {
    waiting.drain(..).for_each(Waker::wake);
}

fn broken(kind: ErrorKind) -> io::Error {
    kind.into()
}

impl Net {
    fn side(&mut self, end: End) -> &mut Side {
        &mut self.connections[end.connection].sides[end.side]
    }

    fn pipe(&mut self, from: End) -> &mut Pipe {
        &mut self.connections[from.connection].pipes[from.side]
    }

    fn fly(&mut self, from: End, segment: Segment) {
        let world = world();
        let spike = if world.random.one_in(SPIKE_ODDS) { world.delay(SPIKE) } else { Duration::ZERO };
        let soonest = world.now() + world.delay(self.latency) + spike;
        let pipe = self.pipe(from);
        let at = soonest.max(pipe.last_at + Duration::from_nanos(1));
        pipe.last_at = at;
        pipe.flying.push_back(segment);
        world.at(at, move || with(|net| net.pump(from)));
    }

    /// Delivers what is first on its way. If the link is silent, nothing: until it heals.
    fn pump(&mut self, from: End) {
        let host = self.side(from).host;
        if self.silent[host] {
            return;
        }
        let to = from.other();
        let pipe = self.pipe(from);
        match pipe.flying.pop_front() {
            None => {}
            Some(Segment::Bytes(bytes)) => {
                pipe.flying_bytes -= bytes.len();
                if self.side(to).closed {
                    self.fly(to, Segment::Reset);
                } else if !self.side(to).reset {
                    self.pipe(from).arrived.extend(bytes);
                }
            }
            Some(Segment::Fin) => pipe.fin = true,
            Some(Segment::Reset) => {
                self.side(to).reset = true;
                if world().random.one_in(2) {
                    self.pipe(from).arrived.clear();
                }
            }
        }
        wake(&mut self.side(to).waiting);
        wake(&mut self.side(from).waiting);
    }

    /// Takes some of what is to be said; 0 if there is no room.
    fn say(&mut self, from: End, bytes: &[u8]) -> io::Result<usize> {
        let side = self.side(from);
        if side.reset {
            return Err(broken(ErrorKind::ConnectionReset));
        }
        if side.shut || side.closed {
            return Err(broken(ErrorKind::BrokenPipe));
        }
        let pipe = self.pipe(from);
        let room = WINDOW - pipe.arrived.len() - pipe.flying_bytes;
        let mut count = room.min(bytes.len());
        if count == 0 {
            return Ok(0);
        }
        if let Some(countdown) = &mut self.countdown
            && countdown.side == from.side
        {
            count = (count as u64).min(countdown.left.max(1)) as usize;
            countdown.left = countdown.left.saturating_sub(count as u64);
        }
        let mut bytes = bytes[..count].to_vec();
        if let Some(left) = &mut self.spoil {
            if let Some(byte) = bytes.get_mut(usize::try_from(*left).unwrap_or(usize::MAX)) {
                *byte ^= 1 << world().random.below(8);
                world().note(|| format!("a byte from {from:?} is spoilt"));
                self.spoil = None;
            } else {
                *left -= count as u64;
            }
        }
        self.mirror(from, &bytes);
        let pipe = self.pipe(from);
        pipe.said += count as u64;
        pipe.flying_bytes += count;
        self.fly(from, Segment::Bytes(bytes));
        if self.countdown.as_ref().is_some_and(|countdown| countdown.left == 0) {
            let at = self.pipe(from).last_at;
            let countdown = self.countdown.take().expect("just seen");
            world().at(at, move || (countdown.then)());
        }
        Ok(count)
    }

    fn mirror(&mut self, from: End, bytes: &[u8]) {
        let Some((copy, left)) = self.connections[from.connection].mirror.filter(|_| from.side == 0) else {
            return;
        };
        let count = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let end = End { connection: copy, side: 0 };
        self.pipe(end).flying_bytes += count;
        self.fly(end, Segment::Bytes(bytes[..count].to_vec()));
        let left = left - count as u64;
        self.connections[from.connection].mirror = (left > 0).then_some((copy, left));
        if left == 0 && world().random.one_in(2) {
            self.fly(end, Segment::Fin);
        }
    }

    fn hear(&mut self, end: End, most: usize, into: &mut dyn FnMut(&[u8])) -> Option<io::Result<usize>> {
        let pipe = self.pipe(end.other());
        if !pipe.arrived.is_empty() {
            let (bytes, _) = pipe.arrived.as_slices();
            let most = most.min(bytes.len());
            // As much as there is, or somewhat less.
            let less = world().random.one_in(4);
            let count = if less { 1 + world().random.below(most as u64) as usize } else { most };
            into(&bytes[..count]);
            pipe.arrived.drain(..count);
            wake(&mut self.side(end.other()).waiting);
            return Some(Ok(count));
        }
        let fin = pipe.fin;
        let side = self.side(end);
        if side.reset {
            return Some(Err(broken(ErrorKind::ConnectionReset)));
        }
        (fin || side.shut || side.closed).then_some(Ok(0))
    }

    fn close(&mut self, end: End) {
        if std::mem::replace(&mut self.side(end).closed, true) {
            return;
        }
        wake(&mut self.side(end).waiting);
        if self.side(end).reset {
            return;
        }
        if !self.pipe(end.other()).arrived.is_empty() {
            self.fly(end, Segment::Reset);
        } else if !self.side(end).shut {
            self.fly(end, Segment::Fin);
        }
    }

    fn reset(&mut self, connection: usize) {
        for side in 0..2 {
            let end = End { connection, side };
            self.pipe(end).flying.clear();
            self.pipe(end).flying_bytes = 0;
            self.side(end).reset = true;
            wake(&mut self.side(end).waiting);
        }
    }

    fn connected(&mut self, owner: ProcessId, host: usize, port: u16) -> io::Result<End> {
        let own_host = self.hosts[&owner];
        let connection = self.connections.len();
        if !self.listeners.contains_key(&(host, port)) {
            return Err(broken(ErrorKind::ConnectionRefused));
        }
        let twice = self.twice > 0;
        self.twice -= u32::from(twice);
        for _ in 0..1 + u32::from(twice) {
            let mut made = Connection::default();
            made.sides[0] = Side { owner: Some(owner), host: own_host, ..Side::default() };
            made.sides[1] = Side { host, ..Side::default() };
            self.connections.push(made);
        }
        if twice {
            let random = &world().random;
            let bytes = if random.one_in(2) { u64::MAX } else { OPENING as u64 + random.below(400) };
            self.connections[connection].mirror = Some((connection + 1, bytes));
            self.connections[connection + 1].sides[0].owner = None;
            world().note(|| format!("connection {connection} comes twice"));
        }
        let listener = self.listeners.get_mut(&(host, port)).expect("just seen");
        let mut order = vec![connection];
        if twice {
            order.insert(world().random.below(2) as usize, connection + 1);
        }
        listener.queue.extend(order);
        wake(&mut listener.waiting);
        Ok(End { connection, side: 0 })
    }
}

/// A process has died.
fn close_all(process: ProcessId) {
    with(|net| {
        for connection in 0..net.connections.len() {
            for side in 0..2 {
                let end = End { connection, side };
                if net.side(end).owner == Some(process) {
                    net.close(end);
                }
            }
        }
        let ports: Vec<_> =
            net.listeners.iter().filter(|(_, it)| it.owner == process).map(|(port, _)| *port).collect();
        for port in ports {
            let listener = net.listeners.remove(&port).expect("just listed");
            listener.queue.into_iter().for_each(|connection| net.reset(connection));
        }
    });
}

/// Every connection between the hosts breaks, or only one of those that live.
pub(crate) fn cut(all: bool) {
    with(|net| {
        let alive =
            |it: &Connection| it.sides.iter().all(|side| !side.closed && !side.reset && side.handles > 0);
        let living: Vec<usize> =
            (0..net.connections.len()).filter(|at| alive(&net.connections[*at])).collect();
        if living.is_empty() {
            return;
        }
        let only = world().random.pick(&living);
        let chosen = living.into_iter().filter(|connection| all || *connection == only);
        chosen.for_each(|connection| net.reset(connection));
    });
}

/// From now on nothing that these hosts say gets through; or all does again, also what waited.
pub(crate) fn silence(silent: [bool; 2]) {
    with(|net| {
        net.silent = silent;
        for connection in 0..net.connections.len() {
            // What was lost is sent again, by and by: new connections may be faster.
            let again = world().delay(RESEND);
            for side in 0..2 {
                let from = End { connection, side };
                let count = net.pipe(from).flying.len();
                // One for each: the events of those that had to wait are over.
                for nth in 0..count {
                    let at = world().now() + again + Duration::from_micros(nth as u64 + 1);
                    world().at(at, move || with(|net| net.pump(from)));
                }
            }
        }
    });
}

/// A host stops to be: its processes are killed by the caller, with nobody to close their connections.
pub(crate) fn crash(host: usize) {
    with(|net| {
        for connection in &mut net.connections {
            for (side, pipe) in connection.sides.iter_mut().zip(&mut connection.pipes) {
                if side.host == host {
                    (side.closed, side.shut) = (true, true);
                    pipe.flying.retain(|segment| matches!(segment, Segment::Bytes(_)));
                }
            }
        }
    });
}

pub(crate) struct Port(usize, u16);

pub(crate) fn listen(host: usize, port: u16) -> Port {
    let owner = world().me();
    let listener = Listener { owner, queue: VecDeque::new(), waiting: Vec::new() };
    with(|net| assert!(net.listeners.insert((host, port), listener).is_none(), "the port is in use"));
    Port(host, port)
}

impl Port {
    pub(crate) fn accept(&self) -> StdStream {
        let me = world().me();
        let connection = world().block(poll_fn(|context| {
            with(|net| {
                let listener = net.listeners.get_mut(&(self.0, self.1)).expect("its owner is alive");
                match listener.queue.pop_front() {
                    Some(connection) => Poll::Ready(connection),
                    None => {
                        listener.waiting.push(context.waker().clone());
                        Poll::Pending
                    }
                }
            })
        }));
        let end = End { connection, side: 1 };
        with(|net| net.side(end).owner = Some(me));
        StdStream::new(end)
    }
}

/// A connection's end as `std::net::TcpStream`.
#[derive(Debug)]
pub struct StdStream {
    pub(crate) end: End,
    read_timeout: Option<Duration>,
    write_timeout: Option<Duration>,
}

impl StdStream {
    fn new(end: End) -> StdStream {
        with(|net| net.side(end).handles += 1);
        StdStream { end, read_timeout: None, write_timeout: None }
    }

    pub fn connect_timeout(to: &SocketAddr, limit: Duration) -> io::Result<StdStream> {
        let (me, host, port) = (world().me(), host_of(to.ip()), to.port());
        let work = async {
            loop {
                sleep(world().delay(with(|net| net.latency))).await;
                if !with(|net| net.silent.contains(&true)) {
                    return with(|net| net.connected(me, host, port));
                }
                sleep(SYN_RETRY).await;
            }
        };
        let end = world().block(timeout(limit, work)).unwrap_or_else(|_| Err(broken(ErrorKind::TimedOut)))?;
        Ok(StdStream::new(end))
    }

    /// It is another process's from now on.
    pub(crate) fn pass_to(&self, process: ProcessId) {
        with(|net| net.side(self.end).owner = Some(process));
    }

    pub fn try_clone(&self) -> io::Result<StdStream> {
        Ok(StdStream::new(self.end))
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(with(|net| address_of(net.side(self.end).host)))
    }

    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        Ok(with(|net| address_of(net.side(self.end.other()).host)))
    }

    pub fn set_nonblocking(&self, _: bool) -> io::Result<()> {
        Ok(())
    }

    pub fn set_nodelay(&self, _: bool) -> io::Result<()> {
        Ok(())
    }

    pub fn set_read_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.read_timeout = limit;
        Ok(())
    }

    pub fn set_write_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.write_timeout = limit;
        Ok(())
    }

    pub fn shutdown(&self, _: Shutdown) -> io::Result<()> {
        with(|net| {
            let side = net.side(self.end);
            if side.reset || side.closed || std::mem::replace(&mut side.shut, true) {
                return Err(broken(ErrorKind::NotConnected));
            }
            wake(&mut side.waiting);
            net.fly(self.end, Segment::Fin);
            Ok(())
        })
    }

    fn poll_read(
        &self,
        context: &mut Context<'_>,
        most: usize,
        into: &mut dyn FnMut(&[u8]),
    ) -> Poll<io::Result<usize>> {
        with(|net| match net.hear(self.end, most, into) {
            Some(result) => Poll::Ready(result),
            None => {
                net.side(self.end).waiting.push(context.waker().clone());
                Poll::Pending
            }
        })
    }

    fn poll_write(&self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        with(|net| match net.say(self.end, bytes) {
            Ok(0) if !bytes.is_empty() => {
                net.side(self.end).waiting.push(context.waker().clone());
                Poll::Pending
            }
            result => Poll::Ready(result),
        })
    }

    /// A message begins.
    fn tell(&self, bytes: &[u8]) {
        let end = self.end;
        let (said, watcher) = with(|net| {
            let opening = net.pipe(end).said == 0 && bytes.len() >= OPENING && bytes.starts_with(b"vmemdmig");
            if opening && end.side == 0 {
                net.connections[end.connection].purpose = bytes[10];
            }
            let (kind, flags) = if opening { (bytes[10], 0) } else { (bytes[2], bytes[3]) };
            (Said { end, purpose: net.connections[end.connection].purpose, kind, flags }, net.watcher.clone())
        });
        world().note(|| {
            format!(
                "{} says {} on connection {} (for {})",
                ["client", "server"][end.side],
                said.kind,
                end.connection,
                said.purpose
            )
        });
        if let Some(watcher) = watcher {
            watcher(said);
        }
    }
}

impl Drop for StdStream {
    fn drop(&mut self) {
        with(|net| {
            // One that nobody took outlives its world.
            if net.connections.len() <= self.end.connection {
                return;
            }
            let side = net.side(self.end);
            side.handles -= 1;
            if side.handles == 0 {
                net.close(self.end);
            }
        });
    }
}

impl Read for StdStream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = into.len();
        let work = poll_fn(|context| {
            self.poll_read(context, most, &mut |bytes| into[..bytes.len()].copy_from_slice(bytes))
        });
        match self.read_timeout {
            None => world().block(work),
            Some(limit) => {
                world().block(timeout(limit, work)).unwrap_or_else(|_| Err(broken(ErrorKind::WouldBlock)))
            }
        }
    }
}

impl Write for StdStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Not of the rest of an opening.
        if bytes.starts_with(b"vmemdmig") {
            self.tell(bytes);
        }
        let work = async {
            sleep(world().delay(Duration::from_micros(50))).await;
            poll_fn(|context| self.poll_write(context, bytes)).await
        };
        match self.write_timeout {
            None => world().block(work),
            Some(limit) => {
                world().block(timeout(limit, work)).unwrap_or_else(|_| Err(broken(ErrorKind::WouldBlock)))
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection's end as `tokio_uring::net::TcpStream`.
#[derive(Debug)]
pub struct TcpStream(StdStream);

impl TcpStream {
    pub fn from_std(socket: StdStream) -> TcpStream {
        TcpStream(socket)
    }

    pub async fn read<B: BoundedBufMut>(&self, mut buf: B) -> (io::Result<usize>, B) {
        let most = buf.bytes_total();
        let at = buf.stable_mut_ptr();
        let result = poll_fn(|context| {
            self.0.poll_read(context, most, &mut |bytes| {
                // SAFETY: the buffer is ours until we give it back, and `bytes` are at most as many as it holds.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) }
            })
        })
        .await;
        if let Ok(count) = result {
            // SAFETY: just written.
            unsafe { buf.set_init(count) };
        }
        (result, buf)
    }

    pub async fn write_all<B: BoundedBuf>(&self, buf: B) -> (io::Result<()>, B) {
        // SAFETY: the buffer is ours until we give it back.
        let bytes = unsafe { std::slice::from_raw_parts(buf.stable_ptr(), buf.bytes_init()) };
        self.0.tell(bytes);
        let mut done = 0;
        while done < bytes.len() {
            sleep(world().delay(Duration::from_micros(50))).await;
            match poll_fn(|context| self.0.poll_write(context, &bytes[done..])).await {
                Ok(count) => done += count,
                Err(error) => return (Err(error), buf),
            }
        }
        (Ok(()), buf)
    }
}

/// The world is over.
pub(crate) fn end() {
    let old = with(std::mem::take);
    drop(old);
}
