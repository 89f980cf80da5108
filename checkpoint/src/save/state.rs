//! The file into which a VM writes its state while it stands still.
//!
//! The state is kept in memory, and goes to the disk on the ring, as pages do: the session's thread must never wait for
//! a disk by itself while the VM stands still, for it could not give that up.

use std::io::{self, Write};
use std::rc::Rc;

use migrate::{LiveVm, VmError};

use super::error::SaveError;
use super::rounds::Rounds;
use crate::format::sealed::{SealedAs, SealedWriter};
use crate::key::ChainKey;
use crate::outside::{self, File, RingFile, Runtime};

/// So much of a state is held before it is written: most are smaller. The rest waits for the disk.
const PART_BYTES: usize = 64 << 20;

struct StateFile<'a, 'r> {
    runtime: &'a Runtime,
    rounds: &'a Rounds<'r>,
    file: Rc<RingFile>,
    part: Vec<u8>,
    /// Bytes that are in the file, or on their way there.
    bytes: u64,
    trouble: Option<SaveError>,
}

/// Has the VM write its state. Returns how many bytes it has. They are on their way to the disk then: see
/// [`Rounds::settle`].
pub(super) fn save(
    vm: &mut dyn LiveVm,
    file: &File,
    key: Option<&ChainKey>,
    runtime: &Runtime,
    rounds: &Rounds<'_>,
) -> Result<u64, SaveError> {
    let file = file.try_clone();
    let file =
        file.map_err(|source| SaveError::Host { what: "opening the state's file once more", source })?;
    let mut to = StateFile {
        runtime,
        rounds,
        file: Rc::new(RingFile::from_std(file)),
        part: Vec::new(),
        bytes: 0,
        trouble: None,
    };
    let saved = match key {
        None => vm.save(&mut to),
        Some(key) => sealed(vm, &mut to, key),
    };
    // Of a VM that could not write because of the file, the file's trouble is told.
    match (to.trouble.take(), saved) {
        (Some(trouble), _) => Err(trouble),
        (None, Err(error)) => Err(error.into()),
        (None, Ok(())) => to.ship().map(|()| to.bytes),
    }
}

/// The same, sealed on its way into the file.
fn sealed(vm: &mut dyn LiveVm, to: &mut StateFile<'_, '_>, key: &ChainKey) -> Result<(), VmError> {
    let failed = |source| VmError::Io { doing: "sealing its state", source };
    let salt = outside::random().map_err(failed)?;
    let mut sealed = SealedWriter::new(to, key, SealedAs::State, salt).map_err(failed)?;
    vm.save(&mut sealed)?;
    sealed.finish().map(drop).map_err(failed)
}

impl StateFile<'_, '_> {
    /// Has what there is written. Does not wait for that.
    fn ship(&mut self) -> Result<(), SaveError> {
        self.rounds.check()?;
        let part = std::mem::take(&mut self.part);
        let at = self.bytes;
        self.bytes += part.len() as u64;
        let file = self.file.clone();
        self.runtime.block_on(async { self.rounds.sink.write_beside(file, "state", part, at) });
        Ok(())
    }

    /// The same, and waits: there is to be one part in memory, not the whole of a large state.
    fn ship_and_wait(&mut self) -> Result<(), SaveError> {
        self.ship()?;
        self.runtime.block_on(self.rounds.settle())
    }
}

impl Write for StateFile<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.trouble.is_none() {
            let full = self.part.len() == PART_BYTES;
            self.trouble = if full { self.ship_and_wait() } else { self.rounds.check() }.err();
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
