//! A checkpoint in an archive: its manifest, and the way to its files.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};
use xxhash_rust::xxh3::Xxh3Default;

use super::error::ArchiveError;
use super::steps;
use crate::format::manifest::{MAX_BYTES, Sum};
use crate::format::sealed::{SealedAs, SealedReader, read_map};
use crate::format::{FirstFaults, FormatError, Manifest, MemoryMap, Part, Parts};
use crate::key::{ArchiveKey, ChainKey};

/// The checkpoint's pages: page *n* at offset *n* x 4096.
pub const IMAGE: &str = "memory.img";
/// Which pages are where.
pub const MAP: &str = "memory.map";
/// Virtual processors and devices.
pub const STATE: &str = "state";
/// What makes a directory a checkpoint.
pub const MANIFEST: &str = "manifest";
/// The order in which a restored VM has first touched its pages; may be missing.
pub const FIRST_FAULTS: &str = "first-faults";
/// A file that is being written, and takes another one's place.
pub(super) const NEW_SUFFIX: &str = ".new";

/// A checkpoint, as its manifest was when it was read.
#[derive(Clone, Debug)]
pub struct Entry {
    name: String,
    manifest: Manifest,
    /// Open: files are found in it also when it has been given another name.
    dir: Arc<File>,
    path: PathBuf,
    key: Option<ArchiveKey>,
}

/// The state of virtual processors and devices, to be read once.
#[derive(Debug)]
pub enum StateReader {
    /// As it was written.
    Plain(File),
    /// Of an encrypted checkpoint.
    Sealed(Box<SealedReader<File>>),
}

impl Read for StateReader {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            StateReader::Plain(file) => file.read(bytes),
            StateReader::Sealed(reader) => reader.read(bytes),
        }
    }
}

impl Entry {
    /// Reads the manifest in a directory; `None` if the directory is none of a checkpoint.
    pub(super) fn read(
        archive: &Path,
        key: Option<&ArchiveKey>,
        dir: File,
        name: &str,
    ) -> Result<Option<Entry>, ArchiveError> {
        let path = archive.join(name);
        let file = match steps::open(&dir, MANIFEST, false) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return if is_of_checkpoint(&dir, name)? {
                    Err(ArchiveError::NoManifest { name: name.to_owned() })
                } else {
                    Ok(None)
                };
            }
            Err(error) => return Err(ArchiveError::io("open", path.join(MANIFEST), error)),
        };
        let mut bytes = Vec::new();
        let read = file.take(MAX_BYTES + 1).read_to_end(&mut bytes);
        read.map_err(|error| ArchiveError::io("read", path.join(MANIFEST), error))?;
        if bytes.len() as u64 > MAX_BYTES {
            let source = FormatError::TooLong { has: bytes.len() as u64, should: MAX_BYTES };
            return Err(ArchiveError::format(path.join(MANIFEST), source));
        }
        let manifest =
            Manifest::decode(&bytes).map_err(|error| ArchiveError::format(path.join(MANIFEST), error))?;
        let (dir, key) = (Arc::new(dir), key.cloned());
        Ok(Some(Entry { name: name.to_owned(), manifest, dir, path, key }))
    }

    pub(super) fn new(
        archive: &Path,
        key: Option<ArchiveKey>,
        name: String,
        manifest: Manifest,
        dir: Arc<File>,
    ) -> Entry {
        let path = archive.join(&name);
        Entry { name, manifest, dir, path, key }
    }

    /// The same with another manifest.
    pub(super) fn with(&self, manifest: Manifest) -> Entry {
        Entry { manifest, ..self.clone() }
    }

    /// Its name in the archive.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that its image takes on the disk. Where files share blocks, each of them counts.
    ///
    /// # Errors
    /// If the file system does not say.
    pub fn disk_bytes(&self) -> Result<u64, ArchiveError> {
        let found = rustix::fs::statat(&self.dir, IMAGE, rustix::fs::AtFlags::SYMLINK_NOFOLLOW);
        let found =
            found.map_err(|error| ArchiveError::io("look at", self.path.join(IMAGE), error.into()))?;
        // The unit of `stat`, whatever the file system's own is.
        Ok(found.st_blocks as u64 * 512)
    }

    pub(super) fn dir(&self) -> &File {
        &self.dir
    }

    /// Whether it can be read only with its key.
    pub fn is_encrypted(&self) -> bool {
        self.manifest.encryption.is_some()
    }

    /// The key of its chain; none if it is not encrypted.
    ///
    /// # Errors
    /// If it is encrypted, and its archive was not given a key, or another one.
    pub fn chain_key(&self) -> Result<Option<ChainKey>, ArchiveError> {
        let name = || self.name.clone();
        let Some(encryption) = &self.manifest.encryption else { return Ok(None) };
        let key = self.key.as_ref().ok_or_else(|| ArchiveError::KeyNeeded { name: name() })?;
        let wrong = || ArchiveError::WrongKey { name: name(), key: key.from().to_owned() };
        key.chain(encryption).ok_or_else(wrong).map(Some)
    }

    /// Reads its map, and finds it to be the one that the manifest names.
    ///
    /// # Errors
    /// If it cannot be read, or is damaged.
    pub fn map(&self) -> Result<MemoryMap, ArchiveError> {
        let key = self.chain_key()?;
        let part = &self.manifest.parts.map;
        let file = self.open_part(part)?;
        self.check_part(part, &file)?;
        let wrong = |source| ArchiveError::format(self.path.join(&part.file), source);
        let file = self.open_part(part)?;
        let map = read_map(&file, key.as_ref()).map_err(wrong)?;
        if map.pages() != self.manifest.memory_pages() || map.counts() != self.manifest.pages {
            return Err(wrong(FormatError::Value("it and the manifest have not the same pages")));
        }
        Ok(map)
    }

    /// Opens the state of virtual processors and devices, which has been found to be what was saved.
    ///
    /// # Errors
    /// If it cannot be read, or is damaged.
    pub fn state(&self) -> Result<StateReader, ArchiveError> {
        let key = self.chain_key()?;
        let file = self.state_file()?;
        let Some(key) = key else { return Ok(StateReader::Plain(file)) };
        let part = &self.manifest.parts.state;
        let reader = SealedReader::new(file, part.bytes, &key, SealedAs::State)
            .map_err(|error| ArchiveError::format(self.path.join(&part.file), error))?;
        Ok(StateReader::Sealed(Box::new(reader)))
    }

    /// The same as it is in its file.
    pub(crate) fn state_file(&self) -> Result<File, ArchiveError> {
        let part = &self.manifest.parts.state;
        self.check_part(part, &self.open_part(part)?)?;
        self.open_part(part)
    }

    /// Compares what can be compared without the key: whether its parts are the files that the manifest names.
    pub(super) fn check_sealed(&self) -> Result<(), ArchiveError> {
        let Parts { map, state } = &self.manifest.parts;
        [map, state].into_iter().try_for_each(|part| self.check_part(part, &self.open_part(part)?))
    }

    /// Opens the image to be read, for direct I/O if that is wanted and the file system can. Nobody removes the
    /// checkpoint while it is open.
    ///
    /// # Errors
    /// If it cannot be opened, or is being removed.
    pub fn image(&self, direct: bool) -> Result<File, ArchiveError> {
        let file = steps::open(&self.dir, IMAGE, direct).map_err(|error| self.not_opened(IMAGE, error))?;
        let removed = || ArchiveError::Removed { name: self.name.clone() };
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(removed()),
            Err(error) => return Err(ArchiveError::io("lock", self.path.join(IMAGE), error.into())),
        }
        // Whoever removes a checkpoint has this lock before its name goes: with the lock in hand, the name tells.
        if self.has_its_name() { Ok(file) } else { Err(removed()) }
    }

    fn has_its_name(&self) -> bool {
        let archive = self.path.parent().unwrap_or(Path::new("."));
        let named = File::open(archive).and_then(|archive| steps::open_dir(&archive, &self.name));
        named.is_ok_and(|named| is_same(&named, &self.dir))
    }

    /// A file that is missing is damage, unless all of the checkpoint is being removed.
    fn not_opened(&self, file: &str, error: io::Error) -> ArchiveError {
        match error.kind() {
            io::ErrorKind::NotFound if self.has_its_name() => {
                ArchiveError::NoFile { name: self.name.clone(), file: file.to_owned() }
            }
            io::ErrorKind::NotFound => ArchiveError::Removed { name: self.name.clone() },
            _ => ArchiveError::io("open", self.path.join(file), error),
        }
    }

    /// The order in which a restored VM has first touched its pages, if one is there. One that is damaged is passed
    /// over: it only makes a restore faster.
    pub fn first_faults(&self) -> Option<FirstFaults> {
        let file = steps::open(&self.dir, FIRST_FAULTS, false).ok()?;
        let bytes = file.metadata().ok()?.len();
        let order = FirstFaults::read(file, bytes).ok()?;
        (order.pages() == self.manifest.memory_pages()).then_some(order)
    }

    /// Records the order in which a restored VM has first touched its pages, in place of the one before. Needs no
    /// lock: of two that do so at once, the later one counts.
    ///
    /// # Errors
    /// If it cannot be written. The one before is there as it was.
    pub fn put_first_faults(&self, order: &FirstFaults) -> Result<(), ArchiveError> {
        // A name of its own: another VM that was restored from here may do the same just now.
        let partial = format!(".{FIRST_FAULTS}-{}", std::process::id());
        let put = || {
            let file = steps::create(&self.dir, &partial, false)?;
            steps::write(&file, &order.encode(), 0)?;
            steps::sync(&file)?;
            steps::replace(&self.dir, &partial, FIRST_FAULTS)
        };
        put().map_err(|error| {
            let _ = steps::remove_file(&self.dir, &partial);
            ArchiveError::io("write", self.path.join(FIRST_FAULTS), error)
        })
    }

    /// Opens the map, to be passed on: whoever reads it finds out whether it is whole.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn map_file(&self) -> Result<File, ArchiveError> {
        self.open_part(&self.manifest.parts.map)
    }

    pub(super) fn open_part(&self, part: &Part) -> Result<File, ArchiveError> {
        steps::open(&self.dir, &part.file, false).map_err(|error| self.not_opened(&part.file, error))
    }

    /// Whether the file is the one that the manifest names, by its length and its checksum.
    pub(super) fn check_part(&self, part: &Part, file: &File) -> Result<(), ArchiveError> {
        let path = self.path.join(&part.file);
        let (bytes, sum) = sum_of(file).map_err(|error| ArchiveError::io("read", &path, error))?;
        match bytes {
            has if has < part.bytes => {
                Err(ArchiveError::format(path, FormatError::CutOff { has, should: part.bytes }))
            }
            has if has > part.bytes => {
                Err(ArchiveError::format(path, FormatError::TooLong { has, should: part.bytes }))
            }
            _ if sum != part.xxh3 => Err(ArchiveError::format(path, FormatError::Sum)),
            _ => Ok(()),
        }
    }
}

/// Whether a directory without a manifest is what is left of a checkpoint, and not somebody's own directory.
fn is_of_checkpoint(dir: &File, name: &str) -> Result<bool, ArchiveError> {
    let names = steps::names(dir).map_err(|error| ArchiveError::io("read", name, error))?;
    let is_ours = |file: &String| [IMAGE, STATE].contains(&file.as_str()) || file.starts_with(MAP);
    Ok(super::names::parse(name).is_some() || names.iter().any(is_ours))
}

/// Whether two descriptors are of one file or directory.
pub(super) fn is_same(one: &File, other: &File) -> bool {
    match (rustix::fs::fstat(one), rustix::fs::fstat(other)) {
        (Ok(one), Ok(other)) => (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino),
        _ => false,
    }
}

/// Length and checksum of a file that is open at its start.
pub(super) fn sum_of(mut file: &File) -> io::Result<(u64, Sum)> {
    let (mut sum, mut bytes, mut chunk) = (Xxh3Default::new(), 0, vec![0; 256 << 10]);
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return Ok((bytes, Sum(sum.digest()))),
            Ok(len) => {
                sum.update(&chunk[..len]);
                bytes += len as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
