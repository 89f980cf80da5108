//! What both sides' sessions stand on: connections on tokio-uring, and one place where their errors meet.
//!
//! No read or write is ever dropped while the kernel works on it: a session that ends shuts its sockets down, which
//! completes whatever is in flight, and then waits for its tasks.

pub(crate) mod control;
pub(crate) mod error;
pub(crate) mod guard;
pub(crate) mod state;

use std::io;

use tokio_uring::buf::{BoundedBuf, IoBufMut};

use crate::outside::{StdStream, TcpStream};
use state::SessionState;

/// Fills `buf` from byte `from` to byte `to`.
pub(crate) async fn read_exact<B: IoBufMut>(
    socket: &TcpStream,
    mut buf: B,
    from: usize,
    to: usize,
    session_state: &SessionState,
) -> (io::Result<()>, B) {
    let mut filled = from;
    while filled < to {
        let (result, slice) = socket.read(buf.slice(filled..to)).await;
        buf = slice.into_inner();
        match result {
            Ok(0) => return (Err(io::ErrorKind::UnexpectedEof.into()), buf),
            Ok(count) => {
                session_state.received(count);
                filled += count;
            }
            Err(error) => return (Err(error), buf),
        }
    }
    (Ok(()), buf)
}

/// A connection for the runtime, and a second handle with which it can be ended from anywhere.
pub(crate) fn split(socket: StdStream) -> io::Result<(TcpStream, StdStream)> {
    // A nonblocking socket would make io_uring answer EAGAIN instead of waiting.
    socket.set_nonblocking(false)?;
    // The near end of a tunnel has no such option; the connection behind it has it set.
    let _ = socket.set_nodelay(true);
    let ender = socket.try_clone()?;
    Ok((TcpStream::from_std(socket), ender))
}

/// Ends a connection: whatever is in flight on it completes.
pub(crate) fn end(socket: &StdStream) {
    // It fails if the peer has ended it already.
    let _ = socket.shutdown(std::net::Shutdown::Both);
}
