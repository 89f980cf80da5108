//! A read or write of the store under way, and what a completion means for it. Without hands, so that the simulation
//! runs the same code.

use std::io;

use crate::errno;
use crate::units::PAGE_SIZE;

/// Short ones go on where they stopped.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// Whether it is a write; else it is a read.
    pub write: bool,
    /// In the store.
    pub offset: u64,
    /// In memory.
    pub address: usize,
    /// Bytes of the whole operation, a multiple of the page size.
    pub len: usize,
    /// Bytes done so far. The rest is submitted at `offset + done`, from `address + done`.
    pub done: usize,
}

impl Transfer {
    /// Takes a completion's result as io_uring gives it: bytes, or an errno below zero. `None`: submit the rest.
    pub fn completed(&mut self, result: i32) -> Option<io::Result<()>> {
        match result {
            errno if [-errno::EAGAIN, -errno::EINTR].contains(&errno) => None,
            errno if errno < 0 => Some(Err(io::Error::from_raw_os_error(-errno))),
            bytes => {
                self.done += bytes as usize;
                if self.done == self.len || mutant!(TrustsShortTransfers) {
                    Some(Ok(()))
                } else if bytes > 0 && (bytes as usize).is_multiple_of(PAGE_SIZE) {
                    None
                } else {
                    let error =
                        io::Error::new(io::ErrorKind::UnexpectedEof, "the store ends before the VM's memory");
                    Some(Err(error))
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transfer(pages: usize) -> Transfer {
        Transfer { write: true, offset: 0, address: 0, len: pages * PAGE_SIZE, done: 0 }
    }

    #[test]
    fn short_ones_go_on_and_end_with_all_bytes() {
        let mut write = transfer(4);
        assert!(write.completed(-errno::EAGAIN).is_none());
        assert!(write.completed(PAGE_SIZE as i32).is_none());
        assert!(write.completed(-errno::EINTR).is_none());
        assert_eq!(write.done, PAGE_SIZE);
        assert!(write.completed(3 * PAGE_SIZE as i32).is_some_and(|result| result.is_ok()));
    }

    #[test]
    fn what_ends_within_a_page_or_moves_nothing_fails() {
        for bytes in [0, 100, PAGE_SIZE as i32 + 512] {
            assert!(transfer(4).completed(bytes).is_some_and(|result| result.is_err()), "{bytes} bytes");
        }
        let full = transfer(4).completed(-errno::ENOSPC).unwrap().unwrap_err();
        assert_eq!(full.raw_os_error(), Some(errno::ENOSPC));
    }
}
