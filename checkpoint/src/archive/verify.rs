//! Reading all that checkpoints need.

use std::io;
use std::sync::Mutex;

use swapd::PageNo;
use swapd::units::bytes_of;

use super::chain::{MAX_CHAIN, Source};
use super::error::ArchiveError;
use super::read::{Images, Piece, Progress, Watch, read_all};
use super::{Archive, Entry, STATE, StateReader};
use crate::format::{FormatError, Manifest};

/// So many damaged pages are named.
const NAMED_PAGES: usize = 16;

/// Something that is not what was saved.
#[derive(Debug)]
pub enum Damage {
    /// A page in an image.
    Page {
        /// The checkpoint whose image it is.
        checkpoint: String,
        /// The page.
        page: PageNo,
    },
    /// A file, or how it fits the others.
    File {
        /// The checkpoint.
        checkpoint: String,
        /// What is wrong.
        error: ArchiveError,
    },
}

/// What was read.
#[derive(Debug, Default)]
pub struct Verified {
    /// Checkpoints of which every page was read.
    pub checkpoints: usize,
    /// Pages that were read.
    pub pages: u64,
    /// Pages that are not what was saved.
    pub damaged_pages: u64,
    /// What is damaged: the first few pages, and every file.
    pub damage: Vec<Damage>,
    /// Why checkpoints were not read: their key was not given. Of these only lengths, and sums of the sealed files, were
    /// compared.
    pub unread: Vec<ArchiveError>,
}

impl Archive {
    /// Reads all that these checkpoints need, and compares it with its checksums. What one of them needs of another
    /// one is read once. While a checkpoint is read, nobody removes it; one that has been removed by then is passed
    /// over.
    ///
    /// `watch` is told how far it is, from any thread, and says whether to go on.
    ///
    /// # Errors
    /// If something cannot be opened, or it was told to stop. Damage is no error.
    pub fn verify(&self, entries: &[Entry], watch: Watch<'_>) -> Result<Verified, ArchiveError> {
        let is_given = |name: &str| entries.iter().any(|entry| entry.name() == name);
        let pages_of = |entry: &Entry| {
            let Manifest { pages, base, .. } = entry.manifest();
            pages.here + if base.as_ref().is_some_and(|base| is_given(&base.name)) { 0 } else { pages.base }
        };
        let bytes_total = bytes_of(entries.iter().map(pages_of).sum());
        let mut bytes_before = 0;
        let mut verified = Verified::default();
        for entry in entries {
            let watch = |progress: Progress| {
                watch(Progress { bytes_done: bytes_before + progress.bytes_done, bytes_total })
            };
            let mut now = entry.clone();
            loop {
                let before = self.manifests(&now);
                let mut one = Verified::default();
                let result = self.verify_one(&now, &is_given, &watch, &mut one);
                if let Err(error) = &result
                    && let Some(merged) = self.changed(&before, now.name(), error)
                {
                    now = merged;
                    continue;
                }
                verified.add(one);
                match result {
                    Ok(()) => {}
                    Err(ArchiveError::Removed { .. }) => {}
                    Err(error) if error.is_damage() || is_missing(&error) || is_unreadable(&error) => {
                        match self.find(Some(entry.name())) {
                            Err(ArchiveError::NoCheckpoint { .. }) => {}
                            _ => verified.file(entry, error),
                        }
                    }
                    Err(error) => return Err(error),
                }
                break;
            }
            bytes_before += bytes_of(pages_of(entry));
        }
        Ok(verified)
    }

    fn verify_one(
        &self,
        entry: &Entry,
        is_given: &dyn Fn(&str) -> bool,
        watch: Watch<'_>,
        verified: &mut Verified,
    ) -> Result<(), ArchiveError> {
        let chain = self.chain(entry)?;
        let files = chain.images(true)?;
        let cipher = match chain.cipher() {
            Err(error @ (ArchiveError::KeyNeeded { .. } | ArchiveError::WrongKey { .. })) => {
                verified.unread.push(error);
                return chain.entries().iter().try_for_each(Entry::check_sealed);
            }
            cipher => cipher?,
        };
        let images = Images { files: &files, cipher };
        let layers = chain.layers()?;
        let mut pieces: Vec<Piece<'_>> = Vec::new();
        for piece in layers.pieces() {
            if let Source::Layer(layer) = piece.source
                && (layer == 0 || !is_given(chain.entries()[usize::from(layer)].name()))
            {
                pieces.extend(Piece { image: layer.into(), run: piece.run, sums: piece.sums }.parts());
            }
        }
        let found = Mutex::new(Vec::new());
        read_all(&images, &pieces, watch, &|piece, _, damaged| {
            let mut found = found.lock().expect("nobody panics with it");
            found.extend(damaged.iter().map(|page| (piece.image, *page)));
            Ok(())
        })?;
        let mut found = found.into_inner().expect("nobody panics with it");
        found.sort_unstable();
        for (layer, page) in found.iter().take(NAMED_PAGES) {
            let checkpoint = chain.entries()[*layer].name().to_owned();
            verified.damage.push(Damage::Page { checkpoint, page: *page });
        }
        verified.checkpoints += 1;
        verified.pages += pieces.iter().map(|piece| u64::from(piece.run.len)).sum::<u64>();
        verified.damaged_pages += found.len() as u64;
        // Last: pages that are damaged are to be told as well.
        let sealed = |error| ArchiveError::io("read", entry.path().join(STATE), error);
        match entry.state()? {
            StateReader::Plain(_) => Ok(()),
            mut reader => match io::copy(&mut reader, &mut io::sink()) {
                Ok(_) => Ok(()),
                Err(error) => Err(match FormatError::Io(error).of_sealed() {
                    FormatError::Io(error) => sealed(error),
                    error => ArchiveError::format(entry.path().join(STATE), error),
                }),
            },
        }
    }
}

impl Verified {
    fn add(&mut self, one: Verified) {
        let is_page = |damage: &Damage| matches!(damage, Damage::Page { .. });
        let named = self.damage.iter().filter(|damage| is_page(damage)).count();
        // These are all pages.
        self.damage.extend(one.damage.into_iter().take(NAMED_PAGES.saturating_sub(named)));
        self.unread.extend(one.unread);
        self.checkpoints += one.checkpoints;
        self.pages += one.pages;
        self.damaged_pages += one.damaged_pages;
    }

    fn file(&mut self, entry: &Entry, error: ArchiveError) {
        self.damage.push(Damage::File { checkpoint: entry.name().to_owned(), error });
    }
}

impl Archive {
    /// The manifest of the entry, and those of what it stands on as they are now.
    pub(crate) fn manifests(&self, entry: &Entry) -> Vec<Manifest> {
        let mut all = vec![entry.manifest().clone()];
        while all.len() <= MAX_CHAIN
            && let Some(base) = all.last().and_then(|last| last.base.as_ref())
            && let Ok(base) = self.find(Some(&base.name))
        {
            all.push(base.manifest().clone());
        }
        all
    }

    /// The checkpoint's entry anew, if a merge has changed the checkpoint, or one below it, since [`manifests`] were
    /// read, and `error` may come of that: a map has another name then, and bases may be gone. It is the same
    /// checkpoint, with the same content.
    ///
    /// [`manifests`]: Archive::manifests
    pub(crate) fn changed(&self, before: &[Manifest], name: &str, error: &ArchiveError) -> Option<Entry> {
        if !error.is_damage() && !is_missing(error) {
            return None;
        }
        let now = self.find(Some(name)).ok()?;
        let is_other = now.manifest().id != before[0].id;
        (!is_other && self.manifests(&now) != before).then_some(now)
    }
}

/// Whether a disk, or its file system, does not give a file back: that checkpoint is damaged, and others may be whole.
fn is_unreadable(error: &ArchiveError) -> bool {
    const DAMAGE: [i32; 6] =
        [libc::EIO, libc::EUCLEAN, libc::EBADMSG, libc::ENODATA, libc::EILSEQ, libc::EISDIR];
    let ArchiveError::Io { source, .. } = error else { return false };
    source.raw_os_error().is_some_and(|number| DAMAGE.contains(&number))
}

fn is_missing(error: &ArchiveError) -> bool {
    match error {
        ArchiveError::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
        ArchiveError::Removed { .. } | ArchiveError::NoFile { .. } => true,
        _ => false,
    }
}
