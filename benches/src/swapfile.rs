//! A swap file of the benchmark's own. Switched off and removed when dropped.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use vmprocess::failure::{Failure, FailureKind};

/// `swapoff` gives up when a signal is pending (a second Ctrl-C): try again.
const SWAPOFF_TRIES: u32 = 20;
const HEADER_BYTES: usize = 4096;
/// Behind the boot block: version 1, last page, no bad pages.
const INFO_OFFSET: usize = 1024;
const MAGIC: &[u8; 10] = b"SWAPSPACE2";

#[derive(Debug)]
pub struct SwapFile {
    path: PathBuf,
}

impl SwapFile {
    /// Makes the file, with all its room, and switches it on.
    ///
    /// # Errors
    /// If there is no room, or this user or the file system may not swap.
    pub fn create(path: &Path, bytes: u64) -> Result<SwapFile, Failure> {
        let made = SwapFile { path: path.to_owned() };
        made.fill(bytes)
            .map_err(|error| Failure::io(format!("cannot make the swap file {}", path.display()), &error))?;
        let c_path = c_path(path)?;
        // SAFETY: a C string that outlives the call.
        if unsafe { libc::swapon(c_path.as_ptr(), 0) } != 0 {
            let error = io::Error::last_os_error();
            let text = format!(
                "cannot swap on {} (needs root, and a file system that allows it): {error}",
                path.display()
            );
            return Err(Failure::new(FailureKind::Host, text));
        }
        Ok(made)
    }

    fn fill(&self, bytes: u64) -> io::Result<()> {
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&self.path)?;
        // SAFETY: no memory arguments; the descriptor is open.
        let refused = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, bytes as libc::off_t) };
        if refused != 0 {
            return Err(io::Error::from_raw_os_error(refused));
        }
        file.write_all_at(&header(bytes / HEADER_BYTES as u64), 0)?;
        file.sync_all()
    }
}

/// The first page of a swap file of so many pages, as mkswap(8) writes it.
fn header(pages: u64) -> [u8; HEADER_BYTES] {
    let mut page = [0; HEADER_BYTES];
    page[INFO_OFFSET..INFO_OFFSET + 4].copy_from_slice(&1u32.to_ne_bytes());
    page[INFO_OFFSET + 4..INFO_OFFSET + 8].copy_from_slice(&((pages - 1) as u32).to_ne_bytes());
    page[HEADER_BYTES - MAGIC.len()..].copy_from_slice(MAGIC);
    page
}

fn c_path(path: &Path) -> Result<CString, Failure> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Failure::new(FailureKind::Usage, format!("{} is not a path", path.display())))
}

/// Switches a swap file off, if it is on.
pub(super) fn swap_off(path: &Path) -> io::Result<()> {
    let Ok(c_path) = c_path(path) else { return Ok(()) };
    for _ in 0..SWAPOFF_TRIES {
        // SAFETY: a C string that outlives the call.
        if unsafe { libc::swapoff(c_path.as_ptr()) } == 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => {}
            // It was not on.
            error if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
            error => return Err(error),
        }
    }
    Err(io::ErrorKind::Interrupted.into())
}

impl Drop for SwapFile {
    fn drop(&mut self) {
        if let Err(error) = swap_off(&self.path) {
            let _ = writeln!(
                io::stderr(),
                "vmemd: could not switch off the swap file {}: {error}",
                self.path.display()
            );
            return;
        }
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_that_of_mkswap() {
        let page = header(1024);
        assert_eq!(&page[4086..], b"SWAPSPACE2");
        assert_eq!(page[1024..1032], [1, 0, 0, 0, 0xff, 3, 0, 0]);
    }
}
