//! The way between a plain descriptor and a secured connection: a thread for each.
//!
//! What is written to the near end leaves encrypted, what arrives is read there once it has been verified. At most one
//! [`CHUNK`] a direction waits here, besides what the kernel's sockets hold: whoever writes is held up when the peer
//! does not take it.
//!
//! There is no clean end: a session that has all that it wants does not look whether its connection ends, and to one
//! that waits for more, an end is a broken link. So an attacker who cuts a connection short, or changes a byte, can
//! only break it.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustls::Connection;

use super::error::TlsError;
use crate::limits::LINGER_LIMIT;

/// Read at a time.
const CHUNK: usize = 256 << 10;

/// Starts the thread, which lives until either end is closed. What it returns is a socket of another family than its
/// type says, and takes everything that a connection does but options of TCP: those are set on the connection itself.
pub(super) fn start(tls: Connection, tcp: TcpStream) -> io::Result<TcpStream> {
    let (near, ours) = UnixStream::pair()?;
    let tunnel = Tunnel::new(tls, tcp, ours)?;
    std::thread::Builder::new().name("tunnel".to_string()).spawn(move || match tunnel.run() {
        Ok(()) => tracing::debug!("a secured connection has ended"),
        // Links break; this is somebody who breaks them.
        Err(error @ TlsError::Peer(_)) => tracing::warn!(%error, "a secured connection was tampered with"),
        Err(error) => tracing::debug!(%error, "a secured connection broke"),
    })?;
    Ok(TcpStream::from(OwnedFd::from(near)))
}

struct Tunnel {
    tls: Connection,
    tcp: TcpStream,
    near: UnixStream,
    /// From the near end, to be encrypted.
    plain: Box<[u8]>,
    /// From the peer, of which `unread` has not been looked at yet.
    wire: Box<[u8]>,
    unread: Range<usize>,
    /// From the peer, of which `verified` is to go to the near end.
    clear: Box<[u8]>,
    verified: Range<usize>,
    /// Nobody has the near end any more, though something may be left in it.
    hung_up: bool,
    /// What was written to the near end has all been read, and what comes from the peer is of no use any more.
    near_ended: bool,
    /// Until when the last words may take to leave.
    until: Option<Instant>,
    /// Nothing comes from the peer any more.
    deaf: bool,
    /// The connection has ended, and how.
    ended: Option<Result<(), TlsError>>,
}

impl Tunnel {
    fn new(mut tls: Connection, tcp: TcpStream, near: UnixStream) -> io::Result<Tunnel> {
        tcp.set_nonblocking(true)?;
        near.set_nonblocking(true)?;
        // It is given a chunk when the one before has left.
        tls.set_buffer_limit(None);
        let chunk = || vec![0; CHUNK].into_boxed_slice();
        Ok(Tunnel {
            tls,
            tcp,
            near,
            plain: chunk(),
            wire: chunk(),
            unread: 0..0,
            clear: chunk(),
            verified: 0..0,
            hung_up: false,
            near_ended: false,
            until: None,
            deaf: false,
            ended: None,
        })
    }

    fn run(mut self) -> Result<(), TlsError> {
        loop {
            let went = [self.outward(), self.inward()];
            if went.contains(&true) {
                continue;
            }
            // What arrived before the end is delivered first.
            if self.ended.is_some() && self.verified.is_empty() {
                return self.ended.unwrap_or(Ok(()));
            }
            if !self.wait()? {
                return Ok(());
            }
        }
    }

    /// From the near end to the peer, a chunk at most. Says whether anything was done.
    fn outward(&mut self) -> bool {
        let mut went = false;
        if self.ended.is_some() {
            return went;
        }
        loop {
            while self.tls.wants_write() {
                match self.tls.write_tls(&mut self.tcp) {
                    Ok(_) => went = true,
                    Err(error) if is_wait(&error) => return went,
                    Err(error) => {
                        self.ended = Some(Err(error.into()));
                        return true;
                    }
                }
            }
            if went || self.near_ended {
                return went;
            }
            match self.near.read(&mut self.plain) {
                Ok(count @ 1..) => {
                    if let Err(error) = self.tls.writer().write_all(&self.plain[..count]) {
                        self.ended = Some(Err(error.into()));
                        return true;
                    }
                }
                Err(error) if is_wait(&error) => return went,
                // An error is a near end that was closed with something unread in it.
                Ok(_) | Err(_) => {
                    self.near_ended = true;
                    self.until.get_or_insert(Instant::now() + LINGER_LIMIT);
                    self.tls.send_close_notify();
                }
            }
        }
    }

    /// From the peer to the near end, a chunk at most. Says whether anything was done.
    fn inward(&mut self) -> bool {
        let mut went = false;
        loop {
            while !self.verified.is_empty() {
                match self.near.write(&self.clear[self.verified.clone()]) {
                    Ok(count) => self.verified.start += count,
                    Err(error) if is_wait(&error) => return went,
                    // Nobody is there to read it.
                    Err(_) => self.verified = 0..0,
                }
                went = true;
            }
            self.decrypt();
            if !self.verified.is_empty() {
                continue;
            }
            if went || self.deaf {
                return went;
            }
            match self.tcp.read(&mut self.wire) {
                Ok(count @ 1..) => self.unread = 0..count,
                Err(error) if is_wait(&error) => return went,
                Ok(_) => self.end(Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())),
                Err(error) => self.end(Err(error.into())),
            }
        }
    }

    /// Verifies what has come, until all of it has been looked at, or there is no room for more.
    fn decrypt(&mut self) {
        let mut filled = 0;
        while filled < self.clear.len() {
            // An error is that there is nothing now, or ever more.
            match self.tls.reader().read(&mut self.clear[filled..]) {
                Ok(count @ 1..) => filled += count,
                _ if self.unread.is_empty() => break,
                _ => self.decrypt_record(),
            }
        }
        self.verified = 0..filled;
    }

    /// Looks at a record, or a part of one.
    fn decrypt_record(&mut self) {
        let mut unread = &self.wire[self.unread.clone()];
        let looked_at = self.tls.read_tls(&mut unread);
        self.unread.start = self.unread.end - unread.len();
        let state = match looked_at {
            Ok(_) => self.tls.process_new_packets(),
            Err(error) => return self.end(Err(error.into())),
        };
        match state {
            Ok(state) if state.peer_has_closed() => self.end(Ok(())),
            Ok(_) => {}
            Err(error) => {
                // The peer is to hear of it, if there is room for a word.
                let _ = self.tls.write_tls(&mut self.tcp);
                self.end(Err(error.into()));
            }
        }
    }

    /// Nothing comes any more. How the connection ended first counts.
    fn end(&mut self, how: Result<(), TlsError>) {
        (self.deaf, self.unread) = (true, 0..0);
        self.ended.get_or_insert(how);
    }

    /// Waits until there is something to do. False: there was not, for as long as last words may take.
    fn wait(&mut self) -> io::Result<bool> {
        let (arrived, leaving) = (!self.verified.is_empty(), self.tls.wants_write());
        if self.near_ended && !leaving {
            // It has all been said; what the peer still says is waited for, lest it be told that its words were lost.
            let _ = self.tcp.shutdown(Shutdown::Write);
        }
        let events = |reads, writes| {
            let wanted = [(reads, PollFlags::IN), (writes, PollFlags::OUT)];
            wanted.into_iter().filter(|(on, _)| *on).map(|(_, event)| event).collect::<PollFlags>()
        };
        let near_events = events(!leaving && self.ended.is_none(), arrived);
        let tcp_events = events(!self.deaf && !arrived, leaving && self.ended.is_none());
        // A descriptor of which nothing is wanted would still say that it was hung up, again and again.
        let deaf_to_near = self.near_ended || (self.hung_up && near_events.is_empty());
        let mut both = [PollFd::new(&self.near, near_events), PollFd::new(&self.tcp, tcp_events)];
        let polled = match (deaf_to_near, tcp_events.is_empty()) {
            (false, false) => &mut both[..],
            (false, true) => &mut both[..1],
            (true, false) => &mut both[1..],
            (true, true) => &mut [],
        };
        let left = self.until.map(|until| until.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(false);
        }
        // A time that the kernel has no number for is as good as none.
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(polled, timeout.as_ref()) {
            Err(Errno::INTR) => return Ok(true),
            Err(error) => return Err(error.into()),
            Ok(_) => {}
        }
        // Of one that was not asked nothing is known.
        if both[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) {
            self.hung_up = true;
            self.until.get_or_insert(Instant::now() + LINGER_LIMIT);
        }
        Ok(true)
    }
}

fn is_wait(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
