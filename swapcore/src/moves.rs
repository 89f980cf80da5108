//! A move that the kernel does in parts, and what its errors mean. Without hands, so that the simulation runs the same
//! code.

use crate::errno;

/// Tries for a frame whose pin the kernel is about to drop: it comes from a read that has just ended.
pub const PATIENT: u32 = 200;
/// Tries for a page of the guest that may be pinned for as long as its I/O takes.
pub const HASTY: u32 = 2;
/// Tries for a move that met a change of the address space.
const RETRIES: u32 = 2000;

/// How far a move came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Moved {
    /// To its end.
    All,
    /// So many bytes, then a page pinned by I/O.
    Pinned(usize),
}

/// What stopped a move for good: how far it was, and the errno.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refused {
    /// Bytes moved before that.
    pub done: usize,
    /// The kernel's number of the error ([`crate::errno`]).
    pub errno: i32,
}

/// Moves `len` bytes by as many calls of `attempt` as it takes. It is told how many bytes are moved, and says how many
/// more are now, with the errno that ended it.
pub fn carry(
    len: usize,
    patience: u32,
    mut attempt: impl FnMut(usize) -> (usize, i32),
) -> Result<Moved, Refused> {
    let mut done = 0;
    let mut retries = 0;
    while done < len {
        let (moved, errno) = attempt(done);
        if moved > 0 {
            done += moved;
            retries = 0;
            continue;
        }
        retries += 1;
        match errno {
            errno::EBUSY if retries < patience => std::hint::spin_loop(),
            errno::EBUSY => return Ok(Moved::Pinned(done)),
            errno::EAGAIN if retries < RETRIES => std::thread::yield_now(),
            errno::EAGAIN => return Ok(Moved::Pinned(done)),
            errno => return Err(Refused { done, errno }),
        }
    }
    Ok(Moved::All)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_buys_new_patience_and_a_pin_ends_it() {
        let answers = [
            (0, errno::EBUSY),
            (1, errno::EBUSY),
            (0, errno::EAGAIN),
            (1, errno::EAGAIN),
            (0, errno::EBUSY),
            (0, errno::EBUSY),
        ];
        let mut answers = answers.into_iter();
        assert_eq!(carry(4, HASTY, |_| answers.next().unwrap()), Ok(Moved::Pinned(2)));
        assert_eq!(answers.next(), None);
    }

    #[test]
    fn other_errors_are_told() {
        let refused = carry(2, PATIENT, |done| if done == 0 { (1, 0) } else { (0, errno::EEXIST) });
        assert_eq!(refused, Err(Refused { done: 1, errno: errno::EEXIST }));
        assert_eq!(carry(2, PATIENT, |_| (1, errno::EAGAIN)), Ok(Moved::All));
    }
}
