//! Giving a checkpoint the pages of its bases, so that it needs them no longer.
//!
//! The pages that a checkpoint has in a base are holes in its image, which nobody reads: its map says so. So they are
//! filled in place, while VMs that were restored from it may go on reading. When the image is durable, a new map goes
//! beside the old one, and then one rename puts a new manifest, which names the new map and no base, into the place
//! of the old one. Until that, the checkpoint stands on its bases as before, whatever its holes hold by then: a merge
//! that ends before that empties them again. A file beside the image ([`MARK`]) says that they may not be empty, so
//! that after a kill the next command does it.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use swapd::units::bytes_of;

use super::chain::{Chain, Layers, Source};
use super::entry::{Entry, IMAGE, MANIFEST, MAP, NEW_SUFFIX, sum_of};
use super::error::ArchiveError;
use super::keep::clean_entry;
use super::read::{Images, Piece, Watch, read_all};
use super::{Locked, steps};
use crate::format::sealed::encode_map;
use crate::format::{Manifest, MemoryMap, Part, Parts};

/// Whether the checkpoint's holes may have something in them. It has a name that is cleaned by every vmemd.
const MARK: &str = "merge.new";
/// Room for what is not pages, beside the new map.
const REST_BYTES: u64 = 1 << 20;

/// What a merge has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// Pages that the checkpoint has in the same blocks as its bases.
    pub shared: u64,
    /// Pages that were copied.
    pub copied: u64,
}

impl Locked {
    /// Gives a checkpoint the pages of its bases, so that it can stand alone. The bases stay as they are. VMs that were
    /// restored from it are not disturbed: pages that it has already are not touched.
    ///
    /// `watch` is told how far it is, from any thread, and says whether to go on.
    ///
    /// # Errors
    /// If a base is missing or damaged, or there is no room. The checkpoint is as it was, and takes no more room.
    pub fn merge(&self, name: &str, watch: Watch<'_>) -> Result<Merged, ArchiveError> {
        self.clean()?;
        let entry = self.find(Some(name))?;
        if entry.manifest().base.is_none() {
            return Ok(Merged::default());
        }
        let chain = self.chain(&entry)?;
        // So that what is read stays, and what is removed by hand is noticed.
        let files = chain.images(true)?;
        let images = Images { files: &files, cipher: chain.cipher()? };
        let layers = chain.layers()?;
        self.has_room(&layers)?;
        let image = steps::open_to_write(entry.dir(), IMAGE, true)
            .map_err(|error| ArchiveError::io("open", entry.path().join(IMAGE), error))?;
        let marked = steps::create(entry.dir(), MARK, false).and_then(|_| steps::sync_dir(entry.dir()));
        marked.map_err(|error| ArchiveError::io("make", entry.path().join(MARK), error))?;
        let merged = fill(&chain, &layers, &images, &image, watch).and_then(|merged| {
            steps::sync(&image)
                .map_err(|error| ArchiveError::io("flush", entry.path().join(IMAGE), error))?;
            let manifest = prepare(&entry, &layers.map().standing_alone())?;
            Ok((merged, manifest))
        });
        let (merged, manifest) = merged.inspect_err(|_| {
            if empty(&layers, &image).is_ok() {
                let _ = clean_entry(&entry);
            }
        })?;
        // From here on nobody knows which of the manifests lasts: the pages stay.
        replace(&entry, &manifest)?;
        Ok(merged)
    }

    /// Refuses what cannot fit. Where files can share blocks, a merge takes none.
    fn has_room(&self, layers: &Layers) -> Result<(), ArchiveError> {
        if self.shares_blocks() {
            return Ok(());
        }
        let pages: u64 =
            layers.runs().iter().filter(|(_, layer)| *layer > 0).map(|(run, _)| u64::from(run.len)).sum();
        let need_bytes = bytes_of(pages) + layers.map().file_bytes() + REST_BYTES;
        let free_bytes = self.free_bytes()?;
        match need_bytes > free_bytes {
            true => Err(ArchiveError::NoRoom { path: self.path().to_owned(), need_bytes, free_bytes }),
            false => Ok(()),
        }
    }

    /// Gives back the room of a merge that did not come to its end. One that did has left its mark only.
    pub(super) fn clean_merge(&self, entry: &Entry) {
        if entry.manifest().base.is_none() || steps::open(entry.dir(), MARK, false).is_err() {
            return;
        }
        // Of a checkpoint that is damaged, nothing is known but that; so nothing is changed in it.
        let Ok(layers) = self.chain(entry).and_then(|chain| chain.layers()) else { return };
        // A file system that makes no holes keeps the room until the merge is done again, and that is all.
        let _ = steps::open_to_write(entry.dir(), IMAGE, true).and_then(|image| empty(&layers, &image));
    }
}

/// Puts the pages that are in bases into the image.
fn fill(
    chain: &Chain,
    layers: &Layers,
    images: &Images<'_>,
    image: &File,
    watch: Watch<'_>,
) -> Result<Merged, ArchiveError> {
    let mut pieces = Vec::new();
    for piece in layers.pieces() {
        if let Source::Layer(layer @ 1..) = piece.source {
            pieces.extend(Piece { image: layer.into(), run: piece.run, sums: piece.sums }.parts());
        }
    }
    let (shared, copied) = (AtomicU64::new(0), AtomicU64::new(0));
    let path = chain.top().path().join(IMAGE);
    read_all(images, &pieces, watch, &|piece, bytes, damaged| {
        let from = &chain.entries()[piece.image];
        if let Some(page) = damaged.first() {
            return Err(ArchiveError::Page { name: from.name().to_owned(), page: *page });
        }
        let put = || {
            let at = piece.run.start.offset();
            // Blocks of a file that was opened past the page cache can be shared as well.
            if steps::share(&images.files[piece.image], image, at, bytes.len() as u64)? {
                return Ok(&shared);
            }
            steps::write(image, bytes, at)?;
            Ok(&copied)
        };
        let count = put().map_err(|error| ArchiveError::io("write", &path, error))?;
        count.fetch_add(piece.run.len.into(), Ordering::Relaxed);
        Ok(())
    })?;
    Ok(Merged { shared: shared.into_inner(), copied: copied.into_inner() })
}

/// Gives back the room that a merge took which does not come to its end. What is left of it does no harm.
fn empty(layers: &Layers, image: &File) -> io::Result<()> {
    let mut below = layers.runs().iter().filter(|(_, layer)| *layer > 0);
    below.try_for_each(|(run, _)| steps::make_hole(image, run.start.offset(), run.bytes() as u64))
}

/// Where a manifest is written that is to take the place of another one.
fn partial_manifest() -> String {
    format!("{MANIFEST}{NEW_SUFFIX}")
}

/// Writes another map for a checkpoint, and a manifest that names this and no base. Both are durable then, and neither
/// counts.
fn prepare(entry: &Entry, map: &MemoryMap) -> Result<Manifest, ArchiveError> {
    let dir = entry.dir();
    let io = |what, name: &str| {
        let path = entry.path().join(name);
        move |error| ArchiveError::io(what, path, error)
    };
    let old = &entry.manifest().parts;
    let file = next_map(&old.map.file);
    let key = entry.chain_key()?;
    let part = || {
        let made = steps::create(dir, &file, false)?;
        steps::write(&made, &encode_map(map, key.as_ref())?, 0)?;
        steps::sync(&made)?;
        let (bytes, xxh3) = sum_of(&steps::open(dir, &file, false)?)?;
        Ok(Part { file: file.clone(), bytes, xxh3 })
    };
    let map_part = part().map_err(io("write", &file))?;
    let manifest = Manifest {
        base: None,
        pages: map.counts(),
        parts: Parts { map: map_part, state: old.state.clone() },
        ..entry.manifest().clone()
    };
    let write = || {
        let made = steps::create(dir, &partial_manifest(), false)?;
        steps::write(&made, &manifest.encode(), 0)?;
        steps::sync(&made)?;
        // The new map's name is durable before the manifest that needs it.
        steps::sync_dir(dir)
    };
    write().map_err(io("write", &partial_manifest()))?;
    Ok(manifest)
}

/// Puts the manifest that was prepared into the place of the old one.
fn replace(entry: &Entry, manifest: &Manifest) -> Result<(), ArchiveError> {
    let dir = entry.dir();
    let replaced = steps::replace(dir, &partial_manifest(), MANIFEST)
        // Before the old map goes, and before anybody may remove the bases.
        .and_then(|()| steps::sync_dir(dir));
    replaced.map_err(|error| ArchiveError::io("replace", entry.path().join(MANIFEST), error))?;
    let now = entry.with(manifest.clone());
    clean_entry(&now)
}

/// A name that no map of this checkpoint has: `memory.map`, `memory.map.1`, …
fn next_map(name: &str) -> String {
    let number = name.strip_prefix(MAP).and_then(|rest| rest.strip_prefix('.'));
    let number = number.and_then(|number| number.parse::<u32>().ok()).unwrap_or(0);
    format!("{MAP}.{}", number.wrapping_add(1))
}
