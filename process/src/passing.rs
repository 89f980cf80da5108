//! Passing an accepted connection to another process: one descriptor and four bytes over a Unix socket (SCM_RIGHTS).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

const TAG_BYTES: usize = 4;
// SAFETY: CMSG_SPACE only computes.
const CONTROL_BYTES: usize = unsafe { libc::CMSG_SPACE(size_of::<RawFd>() as u32) } as usize;

/// Room for one control message with one descriptor, aligned as its header asks.
#[repr(C, align(8))]
struct ControlBuffer([u8; CONTROL_BYTES]);
const _: () = assert!(align_of::<ControlBuffer>() >= align_of::<libc::cmsghdr>());

/// Sends a descriptor with a number.
///
/// # Errors
/// If the other side is gone.
pub fn send_fd(socket: &UnixStream, fd: &impl AsRawFd, tag: u32) -> io::Result<()> {
    match send_with_fd(socket, &tag.to_le_bytes(), fd)? {
        TAG_BYTES => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// Sends a descriptor with the first of some bytes, of which there must be one. Returns how many of them were sent.
///
/// # Errors
/// If the other side is gone.
pub fn send_with_fd(socket: &UnixStream, bytes: &[u8], fd: &impl AsRawFd) -> io::Result<usize> {
    let mut control = ControlBuffer([0; CONTROL_BYTES]);
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let message = header(&mut part, &mut control);
    // SAFETY: the message's control buffer is large enough and aligned for one header and one descriptor; header and
    // data pointers come from the CMSG functions over that buffer.
    unsafe {
        let first = libc::CMSG_FIRSTHDR(&message);
        (*first).cmsg_level = libc::SOL_SOCKET;
        (*first).cmsg_type = libc::SCM_RIGHTS;
        (*first).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
        libc::CMSG_DATA(first).cast::<RawFd>().write_unaligned(fd.as_raw_fd());
    }
    // SAFETY: every pointer in the message points to what outlives the call; sending only reads the bytes.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives a descriptor with its number.
///
/// # Errors
/// `TimedOut`/`WouldBlock` after `timeout`, `UnexpectedEof` if the sender is gone.
pub fn receive_fd(socket: &UnixStream, timeout: Duration) -> io::Result<(OwnedFd, u32)> {
    let mut tag = [0; TAG_BYTES];
    match receive_with_fd(socket, &mut tag, timeout)? {
        (fd, TAG_BYTES) => Ok((fd, u32::from_le_bytes(tag))),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Receives a descriptor with some bytes, and says how many.
///
/// # Errors
/// As [`receive_fd`].
pub fn receive_with_fd(
    socket: &UnixStream,
    bytes: &mut [u8],
    timeout: Duration,
) -> io::Result<(OwnedFd, usize)> {
    socket.set_read_timeout(Some(timeout))?;
    let mut control = ControlBuffer([0; CONTROL_BYTES]);
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut message = header(&mut part, &mut control);
    // SAFETY: every pointer in the message points to a local, or to the caller's bytes, which outlive the call.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel filled the control buffer; CMSG_FIRSTHDR gives null if there is no whole header in it, and the
    // descriptor is only read if the header says that it is there. It is new and owned by nobody else.
    let fd = unsafe {
        let first = libc::CMSG_FIRSTHDR(&message);
        let whole = !first.is_null()
            && (*first).cmsg_level == libc::SOL_SOCKET
            && (*first).cmsg_type == libc::SCM_RIGHTS
            && (*first).cmsg_len == libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
        whole.then(|| OwnedFd::from_raw_fd(libc::CMSG_DATA(first).cast::<RawFd>().read_unaligned()))
    };
    fd.map(|fd| (fd, count)).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

fn header(part: &mut libc::iovec, control: &mut ControlBuffer) -> libc::msghdr {
    // SAFETY: an all-zero msghdr is a valid value of that plain C struct.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = CONTROL_BYTES;
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_descriptor_arrives_with_its_number() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut end, passed) = UnixStream::pair().unwrap();
        send_fd(&ours, &passed, 7).unwrap();
        drop(passed);
        let (fd, tag) = receive_fd(&theirs, Duration::from_secs(5)).unwrap();
        assert_eq!(tag, 7);
        UnixStream::from(fd).write_all(b"hello").unwrap();
        let mut text = String::new();
        end.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn silence_and_the_end_are_errors() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let error = receive_fd(&theirs, Duration::from_millis(10)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(ours);
        let error = receive_fd(&theirs, Duration::from_secs(5)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
