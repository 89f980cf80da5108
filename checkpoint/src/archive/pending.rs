//! A checkpoint that is being made: files in a directory whose name begins with a dot, until all of them are durable.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use swapd::units::pages_in;

use super::chain::{Chain, MAX_CHAIN};
use super::entry::{Entry, IMAGE, MANIFEST, MAP, STATE, is_same, sum_of};
use super::error::ArchiveError;
use super::keep::remove_tree;
use super::{Locked, NEW, names, steps};
use crate::format::sealed::read_map;
use crate::format::{
    BaseRef, CheckpointId, Encryption, FormatError, Manifest, MemoryMap, Part, Parts, Save, VmFacts,
};
use crate::key::ChainKey;
use crate::outside::planted;

/// What is said of a checkpoint by whoever has made it; the rest of its manifest is found in its files.
#[derive(Clone, Debug)]
pub struct Made {
    /// When the VM stood still for it: milliseconds since 1970, UTC. If the archive has one that is as new or newer,
    /// the checkpoint is of a millisecond after that.
    pub made_at_ms: u64,
    /// This vmemd, for people.
    pub made_by: String,
    /// The VM.
    pub vm: VmFacts,
    /// How it was made.
    pub save: Save,
}

/// A checkpoint that is being made. Dropped before it is [finished](Pending::finish), nothing is left of it.
#[derive(Debug)]
pub struct Pending<'a> {
    archive: &'a Locked,
    name: String,
    dir: Arc<File>,
    image: File,
    map: File,
    state: File,
    base: Option<BaseRef>,
    /// How it is encrypted, and with which key.
    seal: Option<(Encryption, ChainKey)>,
    finished: bool,
}

impl Locked {
    /// Begins a checkpoint of this VM. Its image has a hole for each page, and its map and state are empty. `base` is
    /// the chain of the checkpoint that has those pages which the new one need not have.
    ///
    /// # Errors
    /// If there are checkpoints of another VM, the base is one of another memory or stands on too many others, or the
    /// files cannot be made.
    pub fn new_checkpoint(
        &self,
        vm: &str,
        memory_bytes: u64,
        base: Option<&Chain>,
    ) -> Result<Pending<'_>, ArchiveError> {
        self.clean()?;
        if let Some(other) = self.list()?.entries.iter().find(|entry| entry.manifest().vm.name != vm) {
            let has = other.manifest().vm.name.clone();
            return Err(ArchiveError::OtherVm { path: self.path.clone(), has, wanted: vm.to_owned() });
        }
        if let Some(base) = base {
            let (name, count) = (base.top().name().to_owned(), base.entries().len());
            if count >= MAX_CHAIN {
                return Err(ArchiveError::TooDeep { name, count, max: MAX_CHAIN - 1 });
            }
            if base.top().manifest().vm.memory_bytes != memory_bytes {
                let why = "the VM had another size then";
                return Err(ArchiveError::BaseOther {
                    name: "that is to be made".to_owned(),
                    base: name,
                    why,
                });
            }
        }
        let seal = self.seal(base.map(Chain::top))?;
        let id = CheckpointId::random().map_err(|error| ArchiveError::io("name", &self.path, error))?;
        let name = format!("{NEW}{:016x}", id.0 as u64);
        let path = self.path.join(&name);
        let make = || {
            steps::make_dir(&self.dir, &name)?;
            let dir = steps::open_dir(&self.dir, &name)?;
            let image = steps::create(&dir, IMAGE, true)?;
            steps::resize(&image, memory_bytes)?;
            let map = steps::create(&dir, MAP, false)?;
            let state = steps::create(&dir, STATE, false)?;
            Ok((dir, image, map, state))
        };
        let base = base.map(Chain::top);
        let base = base.map(|base| BaseRef { name: base.name().to_owned(), id: base.manifest().id });
        match make() {
            Ok((dir, image, map, state)) => {
                let dir = Arc::new(dir);
                Ok(Pending { archive: self, name, dir, image, map, state, base, seal, finished: false })
            }
            Err(error) => {
                let _ = remove_tree(&self.dir, &name);
                Err(ArchiveError::io("make", path, error))
            }
        }
    }
}

impl Locked {
    /// How a checkpoint with this base is encrypted: with the key of the base's chain, so that they can share blocks; not
    /// at all, if the archive was given no key.
    fn seal(&self, base: Option<&Entry>) -> Result<Option<(Encryption, ChainKey)>, ArchiveError> {
        let refused = |base: &Entry, why| Err(ArchiveError::BaseKey { base: base.name().to_owned(), why });
        match (&self.key, base) {
            (None, Some(base)) if base.is_encrypted() => {
                refused(base, "it is encrypted, and this one would not be (--encrypt-to KEYFILE)")
            }
            (None, _) => Ok(None),
            (Some(key), None) => {
                let made = key.new_chain();
                Ok(Some(made.map_err(|error| ArchiveError::io("make a salt for", &self.path, error))?))
            }
            (Some(_), Some(base)) => match base.chain_key()?.zip(base.manifest().encryption.clone()) {
                Some((key, encryption)) => Ok(Some((encryption, key))),
                None => refused(base, "it is not encrypted, and this one is to be"),
            },
        }
    }
}

impl Pending<'_> {
    /// The key with which its files are to be written; none: they are plain.
    pub fn key(&self) -> Option<&ChainKey> {
        self.seal.as_ref().map(|(_, key)| key)
    }

    /// The image: page *n* at offset *n* x 4096. Opened for direct I/O if the file system can.
    pub fn image(&self) -> &File {
        &self.image
    }

    /// The file for the map, empty so far.
    pub fn map(&self) -> &File {
        &self.map
    }

    /// The file for the state, empty so far.
    pub fn state(&self) -> &File {
        &self.state
    }

    /// Gives the image all content of the base, without a copy, if the base has all of its pages itself and the file
    /// system can share blocks; the checkpoint then needs no base. False, with nothing changed, if not.
    ///
    /// # Errors
    /// If the base cannot be read, or sharing fails for another reason.
    pub fn share_base(&mut self, base: &Chain) -> Result<bool, ArchiveError> {
        if base.entries().len() > 1 {
            return Ok(false);
        }
        let from = base.top().image(false)?;
        let len = base.top().manifest().vm.memory_bytes;
        let shared = steps::share_all(&from, &self.image, len)
            .map_err(|error| ArchiveError::io("share blocks with", self.path().join(IMAGE), error))?;
        if shared {
            self.base = None;
        }
        Ok(shared)
    }

    fn path(&self) -> PathBuf {
        self.archive.path.join(&self.name)
    }

    /// Makes it a checkpoint of the archive. The files are flushed first, then the manifest is written and flushed,
    /// then the directory gets its name.
    ///
    /// # Errors
    /// If something cannot be written, or the map is none of this VM. Nothing is left of it then.
    /// [`ArchiveError::NotFlushed`]: there is a checkpoint, which is whole, and may be gone after a power failure.
    pub fn finish(self, made: Made) -> Result<Entry, ArchiveError> {
        let id = CheckpointId::random().map_err(|error| ArchiveError::io("name", self.path(), error))?;
        self.finish_with(made, id, None)
    }

    /// Makes it a checkpoint of the archive that has this manifest: the same checkpoint as one that was elsewhere.
    ///
    /// # Errors
    /// If something cannot be written, or the files are not those that the manifest names. Nothing is left of it then.
    /// [`ArchiveError::NotFlushed`]: there is a checkpoint, which is whole, and may be gone after a power failure.
    pub fn finish_as(self, manifest: Manifest) -> Result<Entry, ArchiveError> {
        let Manifest { id, made_at_ms, ref made_by, ref vm, save, .. } = manifest;
        let made = Made { made_at_ms, made_by: made_by.clone(), vm: vm.clone(), save };
        self.finish_with(made, id, Some(&manifest))
    }

    fn finish_with(
        mut self,
        made: Made,
        id: CheckpointId,
        wanted: Option<&Manifest>,
    ) -> Result<Entry, ArchiveError> {
        let path = self.path();
        for (file, name) in [(&self.image, IMAGE), (&self.map, MAP), (&self.state, STATE)] {
            if planted!(NamesBeforeTheFlush) {
                continue;
            }
            steps::sync(file).map_err(|error| ArchiveError::io("flush", path.join(name), error))?;
        }
        let wrong = |why| ArchiveError::format(path.join(MAP), FormatError::Value(why));
        // Of one that is encrypted with a key that is not here, nobody can read the map: its sum is in the manifest.
        let unread = wanted.filter(|wanted| wanted.encryption.is_some() && self.seal.is_none());
        let pages = match unread {
            Some(wanted) => wanted.pages,
            None => {
                let map = self.read_map(&path)?;
                if map.pages() != pages_in(made.vm.memory_bytes) {
                    return Err(wrong("it is of a memory of another size"));
                }
                map.counts()
            }
        };
        if pages.base == 0 {
            self.base = None;
        } else if self.base.is_none() {
            return Err(wrong("it has pages in a base, and no base"));
        }
        // The newest of an archive is the one that was made last, also after a clock that was ahead: a latest one that
        // is older than others would be passed over, and be the first to go. One that comes from elsewhere is as old as
        // it is.
        let newest = self.archive.list()?.entries.first().map(|entry| entry.manifest().made_at_ms);
        let made_at_ms = match (wanted, newest) {
            (None, Some(newest)) => made.made_at_ms.max(newest.saturating_add(1)),
            _ => made.made_at_ms,
        };
        let manifest = Manifest {
            id,
            made_at_ms,
            made_by: made.made_by,
            vm: made.vm,
            base: self.base.take(),
            pages,
            encryption: match unread {
                Some(wanted) => wanted.encryption.clone(),
                None => self.seal.as_ref().map(|(encryption, _)| encryption.clone()),
            },
            parts: Parts { map: self.part(MAP)?, state: self.part(STATE)? },
            save: made.save,
        };
        if wanted.is_some_and(|wanted| *wanted != manifest) {
            let other = FormatError::Value("its files are not those of its manifest");
            return Err(ArchiveError::format(path.join(MANIFEST), other));
        }
        let bytes = manifest.encode();
        // What no restore would read is not to become a checkpoint.
        Manifest::decode(&bytes).map_err(|error| ArchiveError::format(path.join(MANIFEST), error))?;
        let write = || {
            let file = steps::create(&self.dir, MANIFEST, false)?;
            steps::write(&file, &bytes, 0)?;
            steps::sync(&file)?;
            steps::sync_dir(&self.dir)
        };
        write().map_err(|error| ArchiveError::io("write", path.join(MANIFEST), error))?;
        let name = self.name_it(manifest.made_at_ms)?;
        self.finished = true;
        let archive = self.archive;
        if let Err(source) = steps::sync_dir(&archive.dir) {
            return Err(ArchiveError::NotFlushed { name, path: archive.path.clone(), source });
        }
        Ok(Entry::new(&archive.path, archive.key.clone(), name, manifest, self.dir.clone()))
    }

    /// Gives the directory the first name for that time that is free.
    fn name_it(&self, made_at_ms: u64) -> Result<String, ArchiveError> {
        let first = names::of_time(made_at_ms);
        let mut taken = 0;
        loop {
            let name = names::numbered(&first, taken);
            match steps::rename(&self.archive.dir, &self.name, &name) {
                Ok(()) => return Ok(name),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => taken += 1,
                // A network's file system may say so of a rename that was done.
                Err(_) if self.is_named(&name) => return Ok(name),
                Err(error) => return Err(ArchiveError::io("name", self.archive.path.join(name), error)),
            }
        }
    }

    fn is_named(&self, name: &str) -> bool {
        steps::open_dir(&self.archive.dir, name).is_ok_and(|dir| is_same(&dir, &self.dir))
    }

    /// As it was written: whoever wrote it may have left the descriptor anywhere in the file.
    fn read_map(&self, path: &std::path::Path) -> Result<MemoryMap, ArchiveError> {
        let file = steps::open(&self.dir, MAP, false)
            .map_err(|error| ArchiveError::io("open", path.join(MAP), error))?;
        read_map(&file, self.key()).map_err(|error| ArchiveError::format(path.join(MAP), error))
    }

    fn part(&self, name: &str) -> Result<Part, ArchiveError> {
        let sum = || sum_of(&steps::open(&self.dir, name, false)?);
        let (bytes, xxh3) = sum().map_err(|error| ArchiveError::io("read", self.path().join(name), error))?;
        Ok(Part { file: name.to_owned(), bytes, xxh3 })
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if !self.finished {
            let _ = remove_tree(&self.archive.dir, &self.name);
        }
    }
}
