//! What an errno of the store means: decided here, once. `docs/reliability.md` has the same as a table.
//!
//! Only a broken medium counts against a page, and what is not known for certain to be something else counts as that: the core
//! asks more than once, and others too, before it gives a page up.

use std::io;

use crate::core::IoErrorKind;

/// The medium is said to be broken; also where no errno was given (a device that ends too early).
const BROKEN: i32 = libc::EIO;

pub fn kind_of(error: &io::Error) -> IoErrorKind {
    let Some(errno) = error.raw_os_error() else { return IoErrorKind::Broken(BROKEN) };
    match errno {
        libc::ENOSPC | libc::EDQUOT => IoErrorKind::Full,
        // From the block layer: a lost path, a time-out, a device that is off or away, one that another host has reserved.
        libc::ENOLINK
        | libc::ETIMEDOUT
        | libc::ETIME
        | libc::ENODEV
        | libc::ENXIO
        | libc::ENOMEDIUM
        | libc::EBADE
        // From file systems behind a network or another process.
        | libc::ESHUTDOWN
        | libc::ENOTCONN
        | libc::ECONNREFUSED
        | libc::ECONNRESET
        | libc::ECONNABORTED
        | libc::EPIPE
        | libc::ECOMM
        | libc::EHOSTDOWN
        | libc::EHOSTUNREACH
        | libc::ENETDOWN
        | libc::ENETUNREACH
        | libc::ENETRESET
        | libc::ENONET
        | libc::ESTALE => IoErrorKind::Unreachable,
        // The host is short of something. (A transfer that met EINTR or EAGAIN is submitted anew, and does not come here.)
        libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ENOMEM | libc::ENOBUFS | libc::ENFILE => {
            IoErrorKind::Passing(errno)
        }
        // EIO says anything and nothing; EREMOTEIO, ENODATA, EILSEQ, EBADMSG and EUCLEAN name the medium.
        _ => IoErrorKind::Broken(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(errno: i32) -> IoErrorKind {
        kind_of(&io::Error::from_raw_os_error(errno))
    }

    #[test]
    fn silence_and_want_are_not_a_broken_medium() {
        for errno in [libc::EIO, libc::EREMOTEIO, libc::EILSEQ, libc::EBADMSG, libc::ENODATA, libc::EPERM] {
            assert_eq!(kind(errno), IoErrorKind::Broken(errno));
        }
        for errno in [libc::ETIMEDOUT, libc::ENOLINK, libc::ENODEV, libc::ENXIO, libc::ESHUTDOWN] {
            assert_eq!(kind(errno), IoErrorKind::Unreachable);
        }
        for errno in [libc::ENOMEM, libc::ENOBUFS, libc::EBUSY] {
            assert_eq!(kind(errno), IoErrorKind::Passing(errno));
        }
        assert_eq!([libc::ENOSPC, libc::EDQUOT].map(kind), [IoErrorKind::Full; 2]);
        let short = io::Error::new(io::ErrorKind::UnexpectedEof, "too short");
        assert_eq!(kind_of(&short), IoErrorKind::Broken(libc::EIO));
    }
}
