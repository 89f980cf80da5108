//! Whose process is at the other end of a control socket: the VM's own user may ask it, and root.
//!
//! The socket's mode and its directory's keep others out already; this holds also where somebody has widened those, or
//! has passed an open socket on.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use tracing::warn;

use crate::failure::{Failure, FailureKind};

/// Users whose refusal is remembered, so that it is logged once.
const USERS_MAX: usize = 64;

/// Those who have been refused.
#[derive(Debug, Default)]
pub(super) struct Peers {
    refused: Vec<libc::uid_t>,
}

impl Peers {
    /// # Errors
    /// If the socket is not in the hands of this process's user, nor of root.
    pub(super) fn check(&mut self, stream: &UnixStream) -> Result<(), Failure> {
        let peer =
            credentials(stream).map_err(|error| Failure::io("cannot tell whose process asks", &error))?;
        let own = rustix::process::geteuid().as_raw();
        if peer.uid == own || peer.uid == 0 {
            return Ok(());
        }
        if !self.refused.contains(&peer.uid) && self.refused.len() < USERS_MAX {
            self.refused.push(peer.uid);
            warn!(uid = peer.uid, pid = peer.pid, "refused: another user's process; told once");
        }
        let text = format!("this VM belongs to user {own}: user {} may not control it", peer.uid);
        Err(Failure::new(FailureKind::Host, text))
    }
}

/// As they were when it connected. Not by rustix, whose process numbers cannot be 0: the kernel gives that one for a
/// process of another PID namespace, such as one outside of this process's container.
fn credentials(stream: &UnixStream) -> io::Result<libc::ucred> {
    let mut found = libc::ucred { pid: 0, uid: libc::uid_t::MAX, gid: libc::gid_t::MAX };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `found`, which is a plain C struct and outlives the call.
    let got = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut found).cast(),
            &mut length,
        )
    };
    if got != 0 { Err(io::Error::last_os_error()) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_user_is_refused_and_root_is_not() {
        if !rustix::process::geteuid().is_root() {
            testkit::skip(testkit::Reason::Root, "only root can be somebody else");
        }
        let pair = |uid: libc::uid_t| {
            // A thread's user is its own, until the C library is asked to change that of all of them.
            let made = std::thread::spawn(move || {
                // SAFETY: changes the user of this thread, which ends right after.
                let changed = unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) };
                assert_eq!(changed, 0);
                UnixStream::pair().unwrap()
            });
            made.join().unwrap()
        };
        let mut peers = Peers::default();
        peers.check(&pair(0).0).unwrap();
        let stranger = pair(65534);
        for _ in 0..2 {
            let failure = peers.check(&stranger.0).unwrap_err();
            assert_eq!(failure.kind, FailureKind::Host);
            assert!(failure.text.contains("user 65534 may not"), "{failure}");
        }
        assert_eq!(peers.refused, [65534]);
    }
}
