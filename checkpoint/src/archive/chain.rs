//! A checkpoint with its base, the base's base and so on: which of them has which page.

use std::fs::File;

use swapd::{Cipher, PageNo, Run};

use super::entry::IMAGE;
use super::error::ArchiveError;
use super::{Archive, Entry};
use crate::format::{FormatError, MemoryMap, PageKind};

/// Most checkpoints that one can stand on, itself among them: each is a file that a restored VM has open.
pub const MAX_CHAIN: usize = 64;

/// A checkpoint and those that it stands on, the newest first.
#[derive(Clone, Debug)]
pub struct Chain {
    entries: Vec<Entry>,
}

/// Where a page's content comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// It reads as zeros.
    Zero,
    /// It is lost.
    Lost,
    /// It is in the image of that checkpoint of the chain: 0 is the one that the chain is of.
    Layer(u8),
}

/// Neighbouring pages whose content comes from one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayeredPiece<'a> {
    /// The pages.
    pub run: Run,
    /// Where they are.
    pub source: Source,
    /// Their checksums, if they have content.
    pub sums: &'a [u64],
    /// Their heat, likewise.
    pub heat: &'a [u8],
}

/// Which checkpoint of a chain has which page.
#[derive(Clone, Debug)]
pub struct Layers {
    /// Of the checkpoint that the chain is of: what it says of kinds, checksums and heat counts.
    map: MemoryMap,
    /// Runs with content by rising page, each with the checkpoint that has it.
    runs: Vec<(Run, u8)>,
    count: usize,
}

impl Archive {
    /// The checkpoint and all that it stands on.
    ///
    /// # Errors
    /// If one is missing, is another one than that it was made against, or stands on itself.
    pub fn chain(&self, entry: &Entry) -> Result<Chain, ArchiveError> {
        let mut entries = vec![entry.clone()];
        while let Some(base) = entries.last().and_then(|last| last.manifest().base.clone()) {
            let last = entries.last().expect("it is never empty");
            let name = || last.name().to_owned();
            let found = match self.find(Some(&base.name)) {
                Err(ArchiveError::NoCheckpoint { .. }) => {
                    return Err(ArchiveError::BaseMissing { name: name(), base: base.name });
                }
                found => found?,
            };
            let (ours, theirs) = (&last.manifest().vm, &found.manifest().vm);
            let other = |why| Err(ArchiveError::BaseOther { name: name(), base: base.name.clone(), why });
            if found.manifest().id != base.id {
                return other("the one in the archive has the same name and another id");
            }
            if ours.name != theirs.name {
                return other("it is of another VM");
            }
            if ours.memory_bytes != theirs.memory_bytes {
                return other("the VM had another size then");
            }
            if last.manifest().encryption != found.manifest().encryption {
                return other("the two are not encrypted with one key");
            }
            if entries.iter().any(|one| one.name() == found.name()) {
                return Err(ArchiveError::Circle { name: entry.name().to_owned(), base: base.name });
            }
            entries.push(found);
        }
        if entries.len() > MAX_CHAIN {
            let (name, count) = (entry.name().to_owned(), entries.len() - 1);
            return Err(ArchiveError::TooDeep { name, count, max: MAX_CHAIN - 1 });
        }
        Ok(Chain { entries })
    }
}

impl Chain {
    /// The checkpoint that it is of.
    pub fn top(&self) -> &Entry {
        &self.entries[0]
    }

    /// All of them, the newest first.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Opens the image of each, for direct I/O if that is wanted and the file system can. None of them is removed
    /// while its file is open.
    ///
    /// # Errors
    /// If one cannot be opened, is being removed, or ends before the memory does.
    pub fn images(&self, direct: bool) -> Result<Vec<File>, ArchiveError> {
        let open = |entry: &Entry| {
            let image = entry.image(direct)?;
            let path = entry.path().join(IMAGE);
            let has = image.metadata().map_err(|error| ArchiveError::io("look at", &path, error))?.len();
            let should = entry.manifest().vm.memory_bytes;
            match has < should {
                true => Err(ArchiveError::format(path, FormatError::CutOff { has, should })),
                false => Ok(image),
            }
        };
        self.entries.iter().map(open).collect()
    }

    /// With which the pages of all its images are encrypted, if they are.
    ///
    /// # Errors
    /// If the archive was not given their key.
    pub fn cipher(&self) -> Result<Option<Cipher>, ArchiveError> {
        Ok(self.top().chain_key()?.map(|key| key.pages()))
    }

    /// Reads the maps, and finds out which checkpoint has which page.
    ///
    /// # Errors
    /// If a map cannot be read or is damaged, or a page is not where it should be.
    pub fn layers(&self) -> Result<Layers, ArchiveError> {
        let map = self.top().map()?;
        let mut runs = Vec::new();
        let mut below: Vec<Sought<'_>> = Vec::new();
        for piece in map.pieces() {
            match piece.kind {
                PageKind::Zero | PageKind::Lost => {}
                PageKind::Here => runs.push((piece.run, 0)),
                PageKind::Base => below.push(Sought { run: piece.run, sums: piece.sums }),
            }
        }
        // Down the chain, with one map of it in memory at a time.
        for (at, base) in (1..).zip(&self.entries[1..]) {
            let map = base.map()?;
            below = self.seek(&below, at, &map, &mut runs)?;
        }
        if let Some(left) = below.first() {
            // A manifest is not read if it has such pages and no base.
            return Err(self.damaged(self.entries.len(), left.run.start, "is not there"));
        }
        runs.sort_unstable_by_key(|(run, _)| run.start);
        Ok(Layers { map, runs, count: self.entries.len() })
    }

    /// Looks for pages in that checkpoint. Returns those that it has in its base in turn.
    fn seek<'a>(
        &self,
        sought: &[Sought<'a>],
        at: usize,
        map: &MemoryMap,
        runs: &mut Vec<(Run, u8)>,
    ) -> Result<Vec<Sought<'a>>, ArchiveError> {
        let mut below = Vec::new();
        for Sought { run, sums } in sought {
            for found in map.pieces_in(*run) {
                if !found.kind.has_content() {
                    return Err(self.damaged(at, found.run.start, "has no content for it"));
                }
                let sums = &sums[indices_within(found.run, run.start)];
                if let Some(differs) = sums.iter().zip(found.sums).position(|(ours, theirs)| ours != theirs) {
                    let page = found.run.start.plus(differs as u32);
                    return Err(self.damaged(at, page, "has another content for it"));
                }
                match found.kind {
                    PageKind::Base => below.push(Sought { run: found.run, sums }),
                    _ => runs.push((found.run, at as u8)),
                }
            }
        }
        Ok(below)
    }

    /// A page is not in that checkpoint, though the one above says so.
    fn damaged(&self, at: usize, page: PageNo, why: &'static str) -> ArchiveError {
        let base = self.entries.get(at).map_or("", Entry::name).to_owned();
        ArchiveError::BasePage { name: self.entries[at - 1].name().to_owned(), page, base, why }
    }
}

/// Pages that a checkpoint has in its base, and their checksums.
struct Sought<'a> {
    run: Run,
    sums: &'a [u64],
}

impl Layers {
    /// The map of the checkpoint.
    pub fn map(&self) -> &MemoryMap {
        &self.map
    }

    /// How many checkpoints there are, that which the chain is of among them.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Runs with content by rising page, each with the checkpoint of the chain that has it.
    pub fn runs(&self) -> &[(Run, u8)] {
        &self.runs
    }

    /// For each page, the checkpoint of the chain that has it; 0 for a page without content.
    pub fn per_page(&self) -> Vec<u8> {
        let mut layers = vec![0; self.map.pages() as usize];
        for (run, layer) in self.runs.iter().filter(|(_, layer)| *layer > 0) {
            layers[run.indices()].fill(*layer);
        }
        layers
    }

    /// All pages by rising number, in pieces.
    pub fn pieces(&self) -> impl Iterator<Item = LayeredPiece<'_>> {
        let mut runs = self.runs.iter().peekable();
        self.map.pieces().flat_map(move |piece| {
            let without = |source| vec![LayeredPiece { run: piece.run, source, sums: &[], heat: &[] }];
            match piece.kind {
                PageKind::Zero => without(Source::Zero),
                PageKind::Lost => without(Source::Lost),
                PageKind::Here | PageKind::Base => {
                    let mut parts = Vec::new();
                    while let Some((run, layer)) = runs.next_if(|(run, _)| run.start < piece.run.end()) {
                        let content = indices_within(*run, piece.run.start);
                        parts.push(LayeredPiece {
                            run: *run,
                            source: Source::Layer(*layer),
                            sums: &piece.sums[content.clone()],
                            heat: &piece.heat[content],
                        });
                    }
                    parts
                }
            }
        })
    }
}

fn indices_within(run: Run, start: PageNo) -> std::ops::Range<usize> {
    let skip = (run.start.0 - start.0) as usize;
    skip..skip + run.len as usize
}
