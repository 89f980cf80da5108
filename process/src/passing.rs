//! Passing an accepted connection to another process: one descriptor and four bytes over a Unix socket (SCM_RIGHTS).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

const TAG_BYTES: usize = 4;
/// Room for one control message with one descriptor.
const CONTROL_BYTES: usize = rustix::cmsg_space!(ScmRights(1));

/// Sends a descriptor with a number.
///
/// # Errors
/// If the other side is gone.
pub fn send_fd(socket: &UnixStream, fd: &impl AsFd, tag: u32) -> io::Result<()> {
    match send_with_fd(socket, &tag.to_le_bytes(), fd)? {
        TAG_BYTES => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// Sends a descriptor with the first of some bytes, of which there must be one. Returns how many of them were sent.
///
/// # Errors
/// If the other side is gone.
pub fn send_with_fd(socket: &UnixStream, bytes: &[u8], fd: &impl AsFd) -> io::Result<usize> {
    let fds = [fd.as_fd()];
    let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)), "there is room for one descriptor");
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
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

/// Receives a descriptor with some bytes, and says how many. Bytes that come with no descriptor, or with more than one,
/// are an error: the sender is not one of ours. Descriptors that nobody asked for are closed.
///
/// # Errors
/// As [`receive_fd`].
pub fn receive_with_fd(
    socket: &UnixStream,
    bytes: &mut [u8],
    timeout: Duration,
) -> io::Result<(OwnedFd, usize)> {
    socket.set_read_timeout(Some(timeout))?;
    let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = message {
            fds.extend(more);
        }
    }
    match fds.pop() {
        Some(fd) if fds.is_empty() && !got.flags.contains(ReturnFlags::CTRUNC) => Ok((fd, got.bytes)),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
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

    #[test]
    fn none_and_several_descriptors_are_refused_and_closed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let limit = Duration::from_secs(5);
        for count in [0, 2, 3, 8] {
            let (mut end, passed) = UnixStream::pair().unwrap();
            let fds = vec![passed.as_fd(); count];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
            let sent = sendmsg(&ours, &[IoSlice::new(&[0; TAG_BYTES])], &mut control, SendFlags::NOSIGNAL);
            assert_eq!(sent, Ok(TAG_BYTES));
            let error = receive_fd(&theirs, limit).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{count}");
            drop(passed);
            // The end is seen once nobody has the other side any more.
            end.set_read_timeout(Some(limit)).unwrap();
            assert_eq!(end.read(&mut [0]).unwrap(), 0, "{count}");
        }
    }

    #[test]
    fn a_descriptor_is_not_inherited() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        send_fd(&ours, &ours, 1).unwrap();
        let (fd, _) = receive_fd(&theirs, Duration::from_secs(5)).unwrap();
        assert!(rustix::io::fcntl_getfd(&fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    }
}
