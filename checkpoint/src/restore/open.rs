//! A checkpoint's files, opened for a VM that is to begin from them, with locks that keep them from being removed.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;

use swapd::{Origin, OriginLayer, Run};

use super::image::Image;
use crate::archive::{Archive, ArchiveError, Chain, Entry, FIRST_FAULTS, IMAGE, StateReader};
use crate::format::FirstFaults;

/// A checkpoint that is open.
#[derive(Debug)]
pub struct Checkpoint {
    /// What is in which page.
    pub image: Image,
    /// Where: for the engine.
    pub origin: Origin,
    /// The locks, and what may be written.
    pub hold: Hold,
    /// vCPUs and devices.
    pub state: StateReader,
}

/// Keeps a checkpoint's files from being removed for as long as a VM has pages there, and from being changed but for
/// the order of first faults.
#[derive(Debug)]
pub struct Hold {
    images: Vec<File>,
    first_faults: Option<File>,
}

/// Opens a checkpoint with all that it stands on. One that a merge changes meanwhile is opened as it is then.
///
/// # Errors
/// If anything of it is not whole, but for the pages themselves: these are looked at when they are needed.
pub fn open(archive: &Archive, entry: &Entry) -> Result<Checkpoint, ArchiveError> {
    let mut now = entry.clone();
    loop {
        let before = archive.manifests(&now);
        let opened = archive.chain(&now).and_then(|chain| open_chain(&chain));
        match opened {
            Err(error) => match archive.changed(&before, now.name(), &error) {
                Some(merged) => now = merged,
                None => return Err(error),
            },
            opened => return opened,
        }
    }
}

fn open_chain(chain: &Chain) -> Result<Checkpoint, ArchiveError> {
    // The locks first: what is locked stays.
    let mut images = Vec::with_capacity(chain.entries().len());
    let mut layers = Vec::with_capacity(chain.entries().len());
    for (file, entry) in chain.images(true)?.into_iter().zip(chain.entries()) {
        let path = entry.path().join(IMAGE);
        let io = |source| ArchiveError::Io { what: "look at", path: path.clone(), source };
        images.push(file.try_clone().map_err(io)?);
        layers.push(OriginLayer::of(file).map_err(io)?);
    }
    let (image, layer_of) = Image::of(&chain.layers()?);
    let state = chain.top().state()?;
    let known = chain.top().first_faults();
    let first_faults = if known.is_some() { None } else { first_faults_to_write(chain.top()) };
    Ok(Checkpoint {
        image: image.with_first_faults(known),
        origin: Origin { layers, layer_of, cipher: chain.cipher()?.map(Arc::new) },
        hold: Hold { images, first_faults },
        state,
    })
}

/// The file for the order of first faults, if this process may write it and no other VM does already. Nothing of it
/// keeps a VM from being restored.
fn first_faults_to_write(entry: &Entry) -> Option<File> {
    let mut options = File::options();
    let options = options.create(true).truncate(false).read(true).write(true).mode(0o600);
    let file = options.custom_flags(libc::O_NOFOLLOW).open(entry.path().join(FIRST_FAULTS)).ok()?;
    // Of several VMs that begin from one checkpoint at once, one records.
    file.try_lock().ok()?;
    Some(file)
}

impl Hold {
    /// The files whose locks keep the checkpoint: for a process that is to have them as well.
    pub fn images(&self) -> &[File] {
        &self.images
    }

    /// Whether the order of first faults is not known yet, and this VM may write it.
    pub fn wants_first_faults(&self) -> bool {
        self.first_faults.is_some()
    }

    /// Writes the order of first faults of a memory of so many pages. A sandboxed process can rename nothing there, so
    /// it is written in place: what is not written to its end has no valid checksum, and is as good as none.
    ///
    /// # Errors
    /// If it cannot be written; it is none then.
    pub fn write_first_faults(&mut self, pages: u64, runs: Vec<Run>) -> io::Result<()> {
        let Some(file) = self.first_faults.take() else { return Ok(()) };
        let order = FirstFaults::new(pages, runs).map_err(io::Error::other)?;
        file.set_len(0)?;
        file.write_all_at(&order.encode(), 0)?;
        file.sync_data()
    }

    /// Nothing of the checkpoint's memory is needed any more: it may be removed.
    pub fn let_go(&mut self) {
        // The engine has the same files open still: only by unlocking are they free.
        for image in self.images.drain(..) {
            let _ = image.unlock();
        }
    }
}
