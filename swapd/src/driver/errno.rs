//! Checks that the core's numbers of errors are this kernel's. The core decides what each means
//! ([`IoErrorKind::of`]), and has no libc to take the numbers from.

use swapcore::errno;

const _: () = {
    assert!(errno::EINTR == libc::EINTR);
    assert!(errno::EIO == libc::EIO);
    assert!(errno::ENXIO == libc::ENXIO);
    assert!(errno::EAGAIN == libc::EAGAIN);
    assert!(errno::ENOMEM == libc::ENOMEM);
    assert!(errno::EBUSY == libc::EBUSY);
    assert!(errno::EEXIST == libc::EEXIST);
    assert!(errno::ENODEV == libc::ENODEV);
    assert!(errno::ENFILE == libc::ENFILE);
    assert!(errno::ENOSPC == libc::ENOSPC);
    assert!(errno::EPIPE == libc::EPIPE);
    assert!(errno::EBADE == libc::EBADE);
    assert!(errno::ETIME == libc::ETIME);
    assert!(errno::ENONET == libc::ENONET);
    assert!(errno::ENOLINK == libc::ENOLINK);
    assert!(errno::ECOMM == libc::ECOMM);
    assert!(errno::ENETDOWN == libc::ENETDOWN);
    assert!(errno::ENETUNREACH == libc::ENETUNREACH);
    assert!(errno::ENETRESET == libc::ENETRESET);
    assert!(errno::ECONNABORTED == libc::ECONNABORTED);
    assert!(errno::ECONNRESET == libc::ECONNRESET);
    assert!(errno::ENOBUFS == libc::ENOBUFS);
    assert!(errno::ENOTCONN == libc::ENOTCONN);
    assert!(errno::ESHUTDOWN == libc::ESHUTDOWN);
    assert!(errno::ETIMEDOUT == libc::ETIMEDOUT);
    assert!(errno::ECONNREFUSED == libc::ECONNREFUSED);
    assert!(errno::EHOSTDOWN == libc::EHOSTDOWN);
    assert!(errno::EHOSTUNREACH == libc::EHOSTUNREACH);
    assert!(errno::ESTALE == libc::ESTALE);
    assert!(errno::EDQUOT == libc::EDQUOT);
    assert!(errno::ENOMEDIUM == libc::ENOMEDIUM);
};

#[cfg(test)]
mod tests {
    use std::io;

    use swapcore::error::IoErrorKind;

    fn kind(errno: i32) -> IoErrorKind {
        IoErrorKind::of(&io::Error::from_raw_os_error(errno))
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
        assert_eq!(IoErrorKind::of(&short), IoErrorKind::Broken(libc::EIO));
    }
}
