//! The file into which a VM writes its state while it stands still.

use std::io::{self, Write};
use std::sync::atomic::Ordering;
use std::time::Duration;

use migrate::{CancelFlag, LiveVm};

use super::error::SaveError;
use crate::outside::{File, Instant, planted};

/// So much of a state is held before it is written: machines write a few bytes at a time.
const PART_BYTES: usize = 1 << 20;

struct StateFile<'a> {
    file: &'a File,
    part: Vec<u8>,
    bytes: u64,
    cancel: &'a CancelFlag,
    /// When the VM has stood still for as long as it may, and how long that is.
    until: (Instant, Duration),
    trouble: Option<SaveError>,
}

/// Has the VM write its state. Returns how many bytes it has.
pub(super) fn save(
    vm: &mut dyn LiveVm,
    file: &File,
    cancel: &CancelFlag,
    until: (Instant, Duration),
) -> Result<u64, SaveError> {
    let mut to =
        StateFile { file, part: Vec::with_capacity(PART_BYTES), bytes: 0, cancel, until, trouble: None };
    let saved = vm.save(&mut to);
    // Of a VM that could not write because of the file, the file's trouble is told.
    match (to.trouble.take(), saved) {
        (Some(trouble), _) => Err(trouble),
        (None, Err(error)) => Err(error.into()),
        (None, Ok(())) => to.ship().map(|()| to.bytes),
    }
}

impl StateFile<'_> {
    fn ship(&mut self) -> Result<(), SaveError> {
        if self.cancel.load(Ordering::Relaxed) && !planted!(IgnoresCancel) {
            return Err(SaveError::Cancelled);
        }
        if Instant::now() >= self.until.0 && !planted!(WaitsForever) {
            return Err(SaveError::StoodTooLong(self.until.1));
        }
        self.bytes += self.part.len() as u64;
        let written = self.file.write_all(&self.part);
        self.part.clear();
        if planted!(BelievesTheState) {
            return Ok(());
        }
        written.map_err(|source| SaveError::Write { what: "state", source })
    }
}

impl Write for StateFile<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.trouble.is_none()
            && self.part.len() == PART_BYTES
            && let Err(trouble) = self.ship()
        {
            self.trouble = Some(trouble);
        }
        if self.trouble.is_some() {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the checkpoint has failed"));
        }
        let count = bytes.len().min(PART_BYTES - self.part.len());
        self.part.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
