//! The handshake on a fresh connection, by blocking calls of bounded time.
//!
//! In TLS 1.3 a client is done before the server has looked at its certificate. So the server's first byte,
//! [`WELCOME`], says that the client is let in: it hears of a refusal here, and not somewhere in its session.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustls::Connection;

use super::error::TlsError;

const WELCOME: u8 = b'+';

/// The client's side.
pub(super) fn ask_in(tls: &mut Connection, tcp: &mut TcpStream, limit: Duration) -> Result<(), TlsError> {
    let deadline = Instant::now() + limit;
    let mut first = [0; 1];
    loop {
        match tls.reader().read(&mut first) {
            Ok(1) if first[0] == WELCOME => return Ok(()),
            Ok(1) => return Err(TlsError::Peer("it speaks TLS, but is no `vmemd serve`".to_string())),
            Ok(_) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => step(tls, tcp, deadline)?,
            Err(error) => return Err(error.into()),
        }
    }
}

/// The server's side.
pub(super) fn let_in(tls: &mut Connection, tcp: &mut TcpStream, limit: Duration) -> Result<(), TlsError> {
    let deadline = Instant::now() + limit;
    while tls.is_handshaking() {
        step(tls, tcp, deadline)?;
    }
    tls.writer().write_all(&[WELCOME])?;
    flush(tls, tcp, deadline)
}

/// Says what is to be said, then hears what comes next.
fn step(tls: &mut Connection, tcp: &mut TcpStream, deadline: Instant) -> Result<(), TlsError> {
    flush(tls, tcp, deadline)?;
    tcp.set_read_timeout(Some(left(deadline)?))?;
    match tls.read_tls(tcp) {
        Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        Ok(_) => {}
        Err(error) => return retried(error),
    }
    if let Err(error) = tls.process_new_packets() {
        // The peer is to hear why.
        let _ = flush(tls, tcp, deadline);
        return Err(error.into());
    }
    Ok(())
}

fn flush(tls: &mut Connection, tcp: &mut TcpStream, deadline: Instant) -> Result<(), TlsError> {
    while tls.wants_write() {
        tcp.set_write_timeout(Some(left(deadline)?))?;
        if let Err(error) = tls.write_tls(tcp) {
            retried(error)?;
        }
    }
    Ok(())
}

fn left(deadline: Instant) -> Result<Duration, TlsError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(TlsError::TooSlow) } else { Ok(left) }
}

fn retried(error: io::Error) -> Result<(), TlsError> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Err(TlsError::TooSlow),
        _ => Err(error.into()),
    }
}
