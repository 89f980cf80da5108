//! A VM that begins from a checkpoint, in a QEMU that waits for a state as it does for one of another host.
//!
//! The checkpoint is opened before QEMU has memory: what is wrong with it is said, and QEMU ends. The engine has the
//! checkpoint's files as its origin, and the state goes where a migration's goes ([`Incoming`]).

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use checkpoint::archive::{Archive, StateReader};
use checkpoint::key::{ArchiveKey, ChainKey};
use checkpoint::restore::{self, Checkpoint};
use swapd::{EngineHandle, Origin, PageNo, Run};
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::qemu::RestoreSettings;
use vmprocess::{Restoration, RestoreOptions};

use crate::guest::Incoming;

/// Pages that are discarded at once.
const DISCARD_PAGES: u32 = 1 << 18;

/// A checkpoint that is open and locked.
pub(crate) struct Opened {
    saved: Saved,
    origin: Origin,
}

/// A checkpoint without the files that its memory is in: these are the engine's.
pub(crate) struct Saved {
    from: String,
    image: restore::Image,
    hold: restore::Hold,
    state: StateReader,
    was_paused: bool,
    options: RestoreOptions,
}

impl Opened {
    /// # Errors
    /// If the checkpoint is gone, not whole, or not of a VM of this memory.
    pub(crate) fn open(settings: &RestoreSettings) -> Result<Opened, Failure> {
        let key = settings.key.map(take_key).transpose()?;
        let archive = Archive::open(&settings.archive)?.with_key(key);
        let entry = archive.find(Some(&settings.checkpoint))?;
        let vm = &entry.manifest().vm;
        if vm.memory_bytes != settings.memory.memory_bytes {
            let text = format!("{} is of a VM with memory of another size", entry.path().display());
            return Err(Failure::new(FailureKind::Usage, text));
        }
        let was_paused = vm.paused;
        let from = entry.path().display().to_string();
        let Checkpoint { image, origin, hold, state } = restore::open(&archive, &entry)?;
        for lock in &settings.locks {
            // SAFETY: this process was started with that descriptor open, for this only: nothing else here has its number.
            unsafe { libc::close(*lock) };
        }
        let saved = Saved { from, image, hold, state, was_paused, options: settings.options };
        Ok(Opened { saved, origin })
    }

    pub(crate) fn split(self) -> (Saved, Origin) {
        (self.saved, self.origin)
    }
}

fn take_key(pipe: RawFd) -> Result<ArchiveKey, Failure> {
    // SAFETY: this process was started with that descriptor open, for this only: nothing else here has its number.
    let pipe = unsafe { OwnedFd::from_raw_fd(pipe) };
    let key = ChainKey::from_pipe(File::from(pipe));
    Ok(ArchiveKey::of_chain(key.map_err(|error| Failure::io("taking the checkpoint's key", &error))?))
}

impl Saved {
    /// For the VM's process. What QEMU may have written to guest memory while it started is none of the checkpoint's,
    /// and goes.
    pub(crate) fn into_restoration(
        self,
        engine: &EngineHandle,
        qemu: Incoming,
    ) -> Result<Restoration, Failure> {
        let Saved { from, image, hold, state, was_paused, options } = self;
        let stats = engine.stats()?;
        // As a rule it has written nothing, and to look at all of a large memory takes longer than the rest.
        let written = stats.untouched_bytes < stats.memory_bytes;
        for start in (0..image.pages()).step_by(DISCARD_PAGES as usize).take_while(|_| written) {
            let pages = u64::from(DISCARD_PAGES).min(image.pages() - start);
            engine.discard(Run::new(PageNo(start), pages as u32))?;
        }
        let started = Box::new(|_: &_| {});
        let (state, newcomer) = (Box::new(state), Box::new(qemu));
        Ok(Restoration { from, image, hold, state, was_paused, newcomer, options, started })
    }
}
