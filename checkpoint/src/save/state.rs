//! The files that a session writes beside the image: the state, into which the VM writes while it stands still, and the
//! map.
//!
//! What is written is kept in memory, and goes to the disk on the ring, as pages do: the session's thread must never
//! wait for a disk by itself, for it could not give that up.

use std::io::{self, Write};
use std::rc::Rc;

use migrate::{LiveVm, VmError};

use super::error::SaveError;
use super::image::ImageSink;
use super::rounds::{Guard, Rounds};
use crate::format::sealed::{SealedAs, SealedWriter};
use crate::key::ChainKey;
use crate::outside::{self, File, RingFile, Runtime};

/// So much of a file is held before it is written: most states are smaller. The rest waits for the disk.
const PART_BYTES: usize = 64 << 20;

/// A file that is written from its beginning to its end.
pub(super) struct PartFile<'a> {
    what: &'static str,
    runtime: &'a Runtime,
    sink: &'a ImageSink,
    guard: Guard<'a>,
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
    let mut to = PartFile::new("state", file, runtime, &rounds.sink, rounds.guard)?;
    let saved = match key {
        None => vm.save(&mut to),
        Some(key) => sealed(vm, &mut to, key),
    };
    to.end(saved)
}

/// The same, sealed on its way into the file.
fn sealed(vm: &mut dyn LiveVm, to: &mut PartFile<'_>, key: &ChainKey) -> Result<(), VmError> {
    let failed = |source| VmError::Io { doing: "sealing its state", source };
    let salt = outside::random().map_err(failed)?;
    let mut sealed = SealedWriter::new(to, key, SealedAs::State, salt).map_err(failed)?;
    vm.save(&mut sealed)?;
    sealed.finish().map(drop).map_err(failed)
}

impl<'a> PartFile<'a> {
    pub(super) fn new(
        what: &'static str,
        file: &File,
        runtime: &'a Runtime,
        sink: &'a ImageSink,
        guard: Guard<'a>,
    ) -> Result<PartFile<'a>, SaveError> {
        let file = file.try_clone();
        let file =
            file.map_err(|source| SaveError::Host { what: "opening a checkpoint's file once more", source })?;
        let file = Rc::new(RingFile::from_std(file));
        Ok(PartFile { what, runtime, sink, guard, file, part: Vec::new(), bytes: 0, trouble: None })
    }

    /// All was given, unless that failed. Returns how many bytes it is; the last of them are on their way.
    pub(super) fn end<E: Into<SaveError>>(mut self, given: Result<(), E>) -> Result<u64, SaveError> {
        // Of whoever could not write because of the file, the file's trouble is told.
        match (self.trouble.take(), given) {
            (Some(trouble), _) => Err(trouble),
            (None, Err(error)) => Err(error.into()),
            (None, Ok(())) => self.ship().map(|()| self.bytes),
        }
    }

    /// Has what there is written. Does not wait for that.
    fn ship(&mut self) -> Result<(), SaveError> {
        self.guard.check(self.sink)?;
        let part = std::mem::take(&mut self.part);
        let at = self.bytes;
        self.bytes += part.len() as u64;
        let file = self.file.clone();
        self.runtime.block_on(async { self.sink.write_beside(file, self.what, part, at) });
        Ok(())
    }

    /// The same, and waits: there is to be one part in memory, not the whole of a large file.
    fn ship_and_wait(&mut self) -> Result<(), SaveError> {
        self.ship()?;
        self.runtime.block_on(self.guard.settle(self.sink))
    }
}

impl Write for PartFile<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.trouble.is_none() {
            let full = self.part.len() == PART_BYTES;
            self.trouble = if full { self.ship_and_wait() } else { self.guard.check(self.sink) }.err();
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
