//! A checkpoint's files, opened for a VM that is to begin from them, with locks that keep them from being removed.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use swapd::units::bytes_of;
use swapd::{OriginLayer, Run};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

use super::image::{Image, ResolveError};
use crate::format::{FirstFaults, FormatError, Manifest, MemoryMap, Part};

/// The file of a checkpoint's pages.
const IMAGE: &str = "memory.img";
/// The file of the order in which they come in after a restore.
const FIRST_FAULTS: &str = "first-faults";
/// What is read of a state at once, to see that it is whole.
const PART_BYTES: usize = 1 << 20;
/// An order of first faults is far smaller.
const FIRST_FAULTS_BYTES_MAX: u64 = 64 << 20;

/// Why a VM cannot begin from a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file cannot be opened or read.
    #[error("cannot read {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is damaged, or of a newer vmemd.
    #[error("{} is of no use", path.display())]
    Format {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        source: FormatError,
    },
    /// A file is not the one that the manifest was written for.
    #[error(
        "{} is damaged: it is not what its manifest says (`vmemd checkpoint verify` tells what is whole)",
        path.display()
    )]
    Damaged {
        /// Which.
        path: PathBuf,
    },
    /// The image ends before the memory does.
    #[error("{} is cut off: {has} of {should} bytes are there", path.display())]
    CutOff {
        /// Which.
        path: PathBuf,
        /// Its bytes.
        has: u64,
        /// The bytes of the VM's memory.
        should: u64,
    },
    /// The map and the VM do not fit together.
    #[error("{} is of {map_bytes} bytes of memory, and the VM has {vm_bytes}", path.display())]
    OtherSize {
        /// Which.
        path: PathBuf,
        /// According to the map.
        map_bytes: u64,
        /// According to the manifest.
        vm_bytes: u64,
    },
    /// The maps of the chain do not fit together.
    #[error("the memory map of {} is of no use", path.display())]
    Resolve {
        /// The checkpoint.
        path: PathBuf,
        /// Why.
        source: ResolveError,
    },
    /// Somebody removes the checkpoint, or has, at this moment.
    #[error("{} is being removed or merged at this moment", path.display())]
    Removed {
        /// Which.
        path: PathBuf,
    },
}

/// A checkpoint that is open.
#[derive(Debug)]
pub struct Checkpoint {
    /// What is in which page.
    pub image: Image,
    /// Where: for the engine.
    pub origin: swapd::Origin,
    /// The locks, and what may be written.
    pub hold: Hold,
    /// vCPUs and devices.
    pub state: File,
}

/// Keeps a checkpoint's files from being removed for as long as a VM has pages there, and from being changed but for
/// the order of first faults.
#[derive(Debug)]
pub struct Hold {
    images: Vec<File>,
    first_faults: Option<File>,
}

/// Opens the checkpoint in the first of the directories, whose bases are in the others, each that of the one before.
///
/// # Errors
/// If anything of it is not whole, but for the pages themselves: these are looked at when they are needed.
pub fn open(chain: &[(&Path, &Manifest)]) -> Result<Checkpoint, OpenError> {
    let (dir, manifest) = chain[0];
    // The locks first: what is locked stays.
    let layers = chain.iter().map(|(dir, manifest)| open_image(dir, manifest)).collect::<Result<Vec<_>, _>>()?;
    let images = layers.iter().map(|layer| layer.file.try_clone()).collect::<io::Result<_>>();
    let images = images.map_err(|source| OpenError::Io { path: dir.join(IMAGE), source })?;
    let maps = chain.iter().map(|(dir, manifest)| read_map(dir, manifest)).collect::<Result<Vec<_>, _>>()?;
    let (image, layer_of) = Image::resolve(maps)
        .map_err(|source| OpenError::Resolve { path: dir.to_owned(), source })?;
    let (first_faults, known) = open_first_faults(dir);
    let state = open_state(dir, &manifest.parts.state)?;
    Ok(Checkpoint {
        image: image.with_first_faults(known),
        origin: swapd::Origin { layers, layer_of },
        hold: Hold { images, first_faults },
        state,
    })
}

fn open_image(dir: &Path, manifest: &Manifest) -> Result<OriginLayer, OpenError> {
    let path = dir.join(IMAGE);
    let io = |source| OpenError::Io { path: path.clone(), source };
    let layer = OriginLayer::open(&path).map_err(io)?;
    match layer.file.try_lock_shared() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(OpenError::Removed { path }),
        Err(TryLockError::Error(source)) => return Err(OpenError::Io { path, source }),
    }
    let found = layer.file.metadata().map_err(io)?;
    if found.nlink() == 0 {
        return Err(OpenError::Removed { path });
    }
    let (has, should) = (found.len(), manifest.vm.memory_bytes);
    if has < should {
        return Err(OpenError::CutOff { path, has, should });
    }
    Ok(layer)
}

fn read_map(dir: &Path, manifest: &Manifest) -> Result<MemoryMap, OpenError> {
    let part = &manifest.parts.map;
    let path = dir.join(&part.file);
    let bytes = read_part(&path, part)?;
    let map = MemoryMap::decode(&bytes).map_err(|source| OpenError::Format { path: path.clone(), source })?;
    let (map_bytes, vm_bytes) = (bytes_of(map.pages()), manifest.vm.memory_bytes);
    if map_bytes != vm_bytes {
        return Err(OpenError::OtherSize { path, map_bytes, vm_bytes });
    }
    Ok(map)
}

fn read_part(path: &Path, part: &Part) -> Result<Vec<u8>, OpenError> {
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    let has = file.metadata().map_err(io)?.len();
    if has != part.bytes {
        return Err(OpenError::Damaged { path: path.to_owned() });
    }
    let mut bytes = Vec::with_capacity(has as usize);
    file.take(has).read_to_end(&mut bytes).map_err(io)?;
    if xxh3_64(&bytes) != part.xxh3.0 {
        return Err(OpenError::Damaged { path: path.to_owned() });
    }
    Ok(bytes)
}

/// A state may be larger than memory should hold at once.
fn open_state(dir: &Path, part: &Part) -> Result<File, OpenError> {
    let path = dir.join(&part.file);
    let read = || {
        let mut file = File::open(&path)?;
        if file.metadata()?.len() != part.bytes {
            return Ok((file, false));
        }
        let (mut sum, mut buffer) = (Xxh3Default::new(), vec![0; PART_BYTES.min(part.bytes as usize + 1)]);
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                bytes => sum.update(&buffer[..bytes]),
            }
        }
        file.seek(SeekFrom::Start(0))?;
        let whole = sum.digest() == part.xxh3.0;
        Ok((file, whole))
    };
    match read() {
        Ok((file, true)) => Ok(file),
        Ok((_, false)) => Err(OpenError::Damaged { path }),
        Err(source) => Err(OpenError::Io { path, source }),
    }
}

/// The order of first faults, if there is one; the file to write it to, if there is none and this process may. Nothing
/// of it keeps a VM from being restored.
fn open_first_faults(dir: &Path) -> (Option<File>, Option<FirstFaults>) {
    let path = dir.join(FIRST_FAULTS);
    let read = |file: &File| {
        let bytes = file.metadata().ok()?.len();
        (bytes <= FIRST_FAULTS_BYTES_MAX).then(|| FirstFaults::read(file, bytes).ok()).flatten()
    };
    if let Some(known) = File::open(&path).ok().and_then(|file| read(&file)) {
        return (None, Some(known));
    }
    let mut options = File::options();
    let options = options.create(true).truncate(false).read(true).write(true).mode(0o600);
    // Of several VMs that begin from one checkpoint at once, one records.
    let file = options.open(&path).ok().filter(|file| file.try_lock().is_ok());
    (file, None)
}

impl Hold {
    /// Of no checkpoint: for tests.
    pub fn none() -> Hold {
        Hold { images: Vec::new(), first_faults: None }
    }

    /// Whether the order of first faults is not known yet, and this VM may write it.
    pub fn wants_first_faults(&self) -> bool {
        self.first_faults.is_some()
    }

    /// Writes the order of first faults. A sandboxed process can rename nothing there, so it is written in place: what
    /// is not written to its end has no valid checksum, and is as good as none.
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

    /// Nothing of the checkpoint is needed any more: it may be removed.
    pub fn let_go(&mut self) {
        // The engine may have the same files open still: only by unlocking are they free.
        for image in self.images.drain(..) {
            let _ = image.unlock();
        }
        self.first_faults = None;
    }
}
