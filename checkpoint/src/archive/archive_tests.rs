use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;

use memmap2::MmapMut;
use swapd::digest::page_sum;
use swapd::units::bytes_of;
use swapd::{PAGE_SIZE, PageNo, Run};
use testkit::TempDir;

use super::crash::{self, Kind};
use super::*;
use crate::format::sealed::{SealedAs, SealedWriter, encode_map};
use crate::format::{
    FirstFaults, FormatError, Machine, Manifest, MapBuilder, MemoryMap, PageKind, Save, VmFacts,
};
use crate::key::{ArchiveKey, ChainKey, SALT_BYTES};

#[path = "archive_crash_tests.rs"]
mod crashes;
#[path = "encrypted_tests.rs"]
mod encrypted;
#[path = "archive_loss_tests.rs"]
mod losses;

const PAGES: usize = 48;
const MEMORY: u64 = (PAGES * PAGE_SIZE) as u64;
/// Versions of a page that are none.
const ZERO: u64 = 0;
const LOST: u64 = u64::MAX;

/// A version for each page of a VM's memory.
type Memory = [u64; PAGES];

fn content(page: usize, version: u64) -> Vec<u8> {
    let words = (0..testkit::pages::WORDS).map(|nth| testkit::pages::word(page as u64, version, nth));
    words.flat_map(u64::to_le_bytes).collect()
}

fn sum(page: usize, version: u64) -> u64 {
    page_sum(PageNo(page as u64), &content(page, version))
}

/// An archive, and what is to be in it.
struct Place {
    dir: TempDir,
    /// What each checkpoint has saved, by the time of its making.
    saved: BTreeMap<u64, Memory>,
    /// Its checkpoints are encrypted with this.
    key: Option<ArchiveKey>,
}

impl Place {
    fn new() -> Place {
        Place { dir: testkit::directory("archive"), saved: BTreeMap::new(), key: None }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("web")
    }

    fn archive(&self) -> Archive {
        Archive::open(&self.path()).unwrap().with_key(self.key.clone())
    }

    fn lock(&self) -> Locked {
        Archive::create(&self.path()).unwrap().with_key(self.key.clone()).lock().unwrap()
    }

    /// Makes a checkpoint as a VM's process does, in the second that is given.
    fn save(&mut self, memory: &Memory, base: Option<&str>, second: u64) -> Entry {
        self.saved.insert(second * 1000, *memory);
        save(&self.lock(), memory, base, second).unwrap()
    }

    /// Three checkpoints, each the base of the next; their names by age.
    fn chain(&mut self) -> Vec<String> {
        let mut memory = [ZERO; PAGES];
        (0..PAGES / 2).for_each(|page| memory[page] = 1);
        memory[40] = LOST;
        let mut names: Vec<String> = Vec::new();
        for second in [100, 200, 300] {
            let base = names.last().map(String::as_str);
            names.push(self.save(&memory, base, second).name().to_owned());
            // Some change, some are new, some become zeros.
            let at = second as usize / 100;
            memory[at] = second;
            memory[30 + at] = second;
            memory[10 + at] = ZERO;
        }
        names
    }

    /// Whether what the archive has is what was saved, all of `must`, and nothing but that and `may`.
    fn check(&self, must: &[u64], may: &[u64]) {
        let archive = self.archive();
        let Listing { entries, unreadable } = archive.list().unwrap();
        assert!(unreadable.is_empty(), "{unreadable:?}");
        let has: Vec<u64> = entries.iter().map(|entry| entry.manifest().made_at_ms / 1000).collect();
        assert!(must.iter().all(|second| has.contains(second)), "{has:?} instead of {must:?}");
        let known = |second: &u64| must.contains(second) || may.contains(second);
        assert!(has.iter().all(known), "{has:?} instead of {must:?} and maybe {may:?}");
        for entry in &entries {
            assert_eq!(
                restored(&archive, entry),
                // A second one of that second is a millisecond younger.
                self.saved[&(entry.manifest().made_at_ms / 1000 * 1000)],
                "{}",
                entry.name()
            );
        }
        let verified = archive.verify(&entries, &|_| true).unwrap();
        assert!(verified.damage.is_empty(), "{verified:?}");
        assert_eq!(verified.checkpoints, entries.len());
    }

    /// Whether there is nothing but checkpoints, and in them nothing but their files.
    fn check_tidy(&self) {
        let names = |path: &Path| -> Vec<String> {
            let files = std::fs::read_dir(path).unwrap();
            files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect()
        };
        let entries = self.archive().list().unwrap().entries;
        for name in names(&self.path()) {
            assert!(name == LOCK || entries.iter().any(|entry| entry.name() == name), "{name} is left");
        }
        for entry in &entries {
            let parts = &entry.manifest().parts;
            for name in names(entry.path()) {
                let own = [IMAGE, MANIFEST, FIRST_FAULTS, &parts.map.file, &parts.state.file];
                assert!(own.contains(&name.as_str()), "{name} is left in {}", entry.name());
            }
        }
    }

    /// The checkpoint's manifest is another one.
    fn edit(&self, name: &str, change: impl FnOnce(&mut Manifest)) {
        let mut manifest = self.archive().find(Some(name)).unwrap().manifest().clone();
        change(&mut manifest);
        std::fs::write(self.path().join(name).join(MANIFEST), manifest.encode()).unwrap();
    }
}

fn made(vm: &str, second: u64) -> Made {
    Made {
        made_at_ms: second * 1000,
        made_by: "a test".to_owned(),
        vm: VmFacts {
            name: vm.to_owned(),
            memory_bytes: MEMORY,
            vcpus: 1,
            machine: Machine::Reference,
            offer: None,
            budget_bytes: MEMORY,
            paused: false,
            disks: Vec::new(),
            without_disks: Vec::new(),
        },
        save: Save::default(),
    }
}

fn save(archive: &Locked, memory: &Memory, base: Option<&str>, second: u64) -> Result<Entry, ArchiveError> {
    let base = base.map(|base| archive.chain(&archive.find(Some(base))?)).transpose()?;
    let below = base.as_ref().map(|base| base.top().map()).transpose()?;
    let pending = archive.new_checkpoint("web", MEMORY, base.as_ref())?;
    let mut map = MapBuilder::new(PAGES as u64);
    let mut page_buffer = MmapMut::map_anon(PAGE_SIZE).unwrap();
    let cipher = pending.key().map(ChainKey::pages);
    for (page, version) in memory.iter().enumerate() {
        let run = Run::one(PageNo(page as u64));
        match *version {
            ZERO => map.set(run, PageKind::Zero),
            LOST => map.set(run, PageKind::Lost),
            version => {
                let sum = sum(page, version);
                let known = below.as_ref().and_then(|below| below.sum(run.start));
                if known == Some(sum) {
                    map.set_content(run, PageKind::Base, &[sum]);
                } else {
                    map.set_content(run, PageKind::Here, &[sum]);
                    page_buffer.copy_from_slice(&content(page, version));
                    if let Some(cipher) = &cipher {
                        cipher.encrypt(run, &mut page_buffer);
                    }
                    pending.image().write_all_at(&page_buffer, run.start.offset()).unwrap();
                }
            }
        }
    }
    let map = encode_map(&map.finish(&[9; PAGES]), pending.key()).unwrap();
    pending.map().write_all_at(&map, 0).unwrap();
    match pending.key() {
        None => pending.state().write_all_at(&second.to_le_bytes(), 0).unwrap(),
        Some(key) => {
            let mut sealed =
                SealedWriter::new(pending.state(), key, SealedAs::State, [7; SALT_BYTES]).unwrap();
            io::Write::write_all(&mut sealed, &second.to_le_bytes()).unwrap();
            sealed.finish().unwrap();
        }
    }
    pending.finish(made("web", second))
}

/// The memory of a VM that is restored from it.
fn restored(archive: &Archive, entry: &Entry) -> Memory {
    let chain = archive.chain(entry).unwrap();
    let images = chain.images(false).unwrap();
    let layers = chain.layers().unwrap();
    let cipher = chain.cipher().unwrap();
    let mut memory = [ZERO; PAGES];
    let per_page = layers.per_page();
    for piece in layers.pieces() {
        for page in piece.run.pages() {
            memory[page.index()] = match piece.source {
                Source::Zero => ZERO,
                Source::Lost => LOST,
                Source::Layer(layer) => {
                    assert_eq!(per_page[page.index()], layer);
                    let mut bytes = vec![0; PAGE_SIZE];
                    images[usize::from(layer)].read_exact_at(&mut bytes, page.offset()).unwrap();
                    if let Some(cipher) = &cipher {
                        cipher.decrypt(Run::one(page), &mut bytes);
                    }
                    // The first word tells the version.
                    let word = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                    let version = (1..1000).find(|version| testkit::pages::word(page.0, *version, 0) == word);
                    let version = version.unwrap_or_else(|| panic!("{page} has no content of ours"));
                    assert_eq!(bytes, content(page.index(), version));
                    version
                }
            };
        }
    }
    assert_eq!(layers.map().counts(), entry.manifest().pages);
    let mut state = String::new();
    io::Read::read_to_string(&mut entry.state().unwrap(), &mut state).unwrap_or_default();
    memory
}

#[test]
fn checkpoints_are_made_found_and_listed() {
    let mut place = Place::new();
    assert!(matches!(Archive::open(&place.path()), Err(ArchiveError::NoArchive { .. })));
    let names = place.chain();
    assert_eq!(names, ["1970-01-01T00-01-40Z", "1970-01-01T00-03-20Z", "1970-01-01T00-05-00Z"]);
    place.check(&[100, 200, 300], &[]);
    place.check_tidy();
    let archive = place.archive();
    let listed: Vec<String> =
        archive.list().unwrap().entries.iter().map(|entry| entry.name().to_owned()).collect();
    assert_eq!(listed, names.iter().rev().cloned().collect::<Vec<_>>());
    assert_eq!(archive.find(None).unwrap().name(), names[2]);
    assert_eq!(archive.find(Some(&names[0])).unwrap().name(), names[0]);
    assert!(matches!(archive.find(Some("no")), Err(ArchiveError::NoCheckpoint { .. })));
    assert!(matches!(archive.find(Some("../web")), Err(ArchiveError::Name(_))));
    // The second of the same second.
    place.saved.insert(300_000, [ZERO; PAGES]);
    let twin = place.save(&[ZERO; PAGES], None, 300);
    assert_eq!(twin.name(), "1970-01-01T00-05-00Z-2");
    assert_eq!(twin.manifest().pages.zero, PAGES as u64);
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(place.path()).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn a_directory_for_something_else_is_no_archive() {
    let place = Place::new();
    std::fs::create_dir(place.path()).unwrap();
    std::fs::write(place.path().join("letter"), "dear").unwrap();
    assert!(matches!(Archive::create(&place.path()), Err(ArchiveError::NotEmpty { .. })));
    assert!(matches!(Archive::open(&place.path()), Err(ArchiveError::NoArchive { .. })));
    let file = place.path().join("letter");
    assert!(matches!(Archive::open(&file), Err(ArchiveError::NoArchive { .. })));
    // What a new file system has in it.
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(place.path().join("lost+found")).unwrap();
    assert!(Archive::create(&place.path()).unwrap().list().unwrap().entries.is_empty());
}

#[test]
fn one_changes_an_archive_at_a_time_and_it_is_of_one_vm() {
    let mut place = Place::new();
    place.save(&[1; PAGES], None, 100);
    let held = place.lock();
    assert!(matches!(place.archive().lock(), Err(ArchiveError::Busy { .. })));
    let error = held.new_checkpoint("db", MEMORY, None).unwrap_err();
    assert!(matches!(&error, ArchiveError::OtherVm { has, .. } if has == "web"), "{error}");
    // Given up: nothing is left.
    drop(held.new_checkpoint("web", MEMORY, None).unwrap());
    place.check_tidy();
    drop(held);
    place.archive().lock().unwrap();
}

#[test]
fn a_map_that_is_none_of_the_vm_makes_no_checkpoint() {
    let place = Place::new();
    let archive = place.lock();
    let maps = [Vec::new(), MapBuilder::new(PAGES as u64 + 1).finish(&[]).encode(), {
        let mut map = MapBuilder::new(PAGES as u64);
        map.set_content(Run::one(PageNo(1)), PageKind::Base, &[1]);
        map.finish(&[]).encode()
    }];
    for map in maps {
        let pending = archive.new_checkpoint("web", MEMORY, None).unwrap();
        pending.map().write_all_at(&map, 0).unwrap();
        assert!(matches!(pending.finish(made("web", 5)), Err(ArchiveError::Format { .. })));
        place.check_tidy();
    }
}

#[test]
fn what_a_checkpoint_stands_on_must_be_there_and_be_it() {
    let mut place = Place::new();
    let names = place.chain();
    let chain = || {
        let archive = place.archive();
        archive.chain(&archive.find(Some(&names[2])).unwrap())
    };
    assert_eq!(chain().unwrap().entries().len(), 3);
    let original = place.archive().find(Some(&names[1])).unwrap().manifest().clone();

    place.edit(&names[1], |manifest| manifest.id.0 += 1);
    assert!(matches!(chain(), Err(ArchiveError::BaseOther { .. })));
    place.edit(&names[1], |manifest| {
        *manifest = original.clone();
        manifest.vm.name = "db".to_owned();
    });
    let error = chain().unwrap_err();
    assert!(error.to_string().contains("another VM") && error.is_damage(), "{error}");
    place.edit(&names[1], |manifest| {
        *manifest = original.clone();
        manifest.base.as_mut().unwrap().name.clone_from(&names[2]);
        manifest.base.as_mut().unwrap().id = place.archive().find(Some(&names[2])).unwrap().manifest().id;
    });
    assert!(matches!(chain(), Err(ArchiveError::Circle { .. })));
    place.edit(&names[1], |manifest| *manifest = original.clone());
    std::fs::rename(place.path().join(&names[0]), place.dir.path().join("away")).unwrap();
    let error = chain().unwrap_err();
    assert!(matches!(&error, ArchiveError::BaseMissing { base, .. } if *base == names[0]), "{error}");
    std::fs::rename(place.dir.path().join("away"), place.path().join(&names[0])).unwrap();
    place.check(&[100, 200, 300], &[]);
}

#[test]
fn a_page_that_its_base_does_not_have_is_told() {
    let mut place = Place::new();
    let names = place.chain();
    let archive = place.archive();
    let change = |change: &dyn Fn(&mut MapBuilder)| {
        let mut map = MapBuilder::new(PAGES as u64);
        let base = archive.find(Some(&names[0])).unwrap();
        for piece in base.map().unwrap().pieces() {
            match piece.kind.has_content() {
                true => map.set_content(piece.run, piece.kind, piece.sums),
                false => map.set(piece.run, piece.kind),
            }
        }
        change(&mut map);
        let map = map.finish(&[]);
        let bytes = map.encode();
        std::fs::write(base.path().join(MAP), &bytes).unwrap();
        place.edit(&names[0], |manifest| {
            manifest.pages = map.counts();
            manifest.parts.map.bytes = bytes.len() as u64;
            manifest.parts.map.xxh3 = entry::sum_of(&File::open(base.path().join(MAP)).unwrap()).unwrap().1;
        });
        let top = archive.find(Some(&names[2])).unwrap();
        archive.chain(&top).unwrap().layers().unwrap_err().to_string()
    };
    let gone = change(&|map| map.set(Run::one(PageNo(5)), PageKind::Zero));
    assert!(gone.contains("page 5") && gone.contains("no content"), "{gone}");
    let other = change(&|map| map.set_content(Run::one(PageNo(6)), PageKind::Here, &[3]));
    assert!(
        other.contains("page 5") || other.contains("page 6") && other.contains("another content"),
        "{other}"
    );
}

#[test]
fn damage_is_found_and_named() {
    let mut place = Place::new();
    let names = place.chain();
    let archive = place.archive();
    let all = || archive.list().unwrap().entries;
    let flip = |name: &str, file: &str, at: u64| {
        let file = File::options().read(true).write(true).open(place.path().join(name).join(file)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    };
    // Both of the base: seen for each that needs it when asked for one, once when asked for all.
    flip(&names[0], IMAGE, bytes_of(5) + 77);
    flip(&names[0], IMAGE, bytes_of(7));
    for entries in [all(), vec![archive.find(Some(&names[2])).unwrap()]] {
        let verified = archive.verify(&entries, &|_| true).unwrap();
        let pages: Vec<u64> = verified
            .damage
            .iter()
            .map(|damage| match damage {
                Damage::Page { checkpoint, page } if *checkpoint == names[0] => page.0,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!((pages, verified.damaged_pages), (vec![5, 7], 2));
    }
    // A page without content is nobody's business.
    flip(&names[0], IMAGE, bytes_of(47));
    assert_eq!(archive.verify(&all(), &|_| true).unwrap().damaged_pages, 2);
    flip(&names[0], IMAGE, bytes_of(5) + 77);
    flip(&names[0], IMAGE, bytes_of(7));
    flip(&names[1], STATE, 0);
    let verified = archive.verify(&all(), &|_| true).unwrap();
    assert!(
        matches!(&verified.damage[..], [Damage::File { checkpoint, .. }] if *checkpoint == names[1]),
        "{verified:?}"
    );
    flip(&names[1], STATE, 0);
    flip(&names[1], MAP, 40);
    let verified = archive.verify(&all(), &|_| true).unwrap();
    // The newest needs that map, too.
    assert_eq!(verified.damage.len(), 2, "{verified:?}");
    flip(&names[1], MAP, 40);
    std::fs::remove_file(place.path().join(&names[2]).join(IMAGE)).unwrap();
    let verified = archive.verify(&all(), &|_| true).unwrap();
    assert!(matches!(&verified.damage[..], [Damage::File { .. }]), "{verified:?}");
    // Cut off: that is said, also where no page with content is missing.
    let file = File::options().write(true).open(place.path().join(&names[0]).join(IMAGE)).unwrap();
    file.set_len(bytes_of(20)).unwrap();
    let verified = archive.verify(&[archive.find(Some(&names[0])).unwrap()], &|_| true).unwrap();
    let cut = |damage: &Damage| {
        let Damage::File { error: ArchiveError::Format { source, .. }, .. } = damage else { return false };
        matches!(source, FormatError::CutOff { has, .. } if *has == bytes_of(20))
    };
    assert!(matches!(&verified.damage[..], [damage] if cut(damage)), "{verified:?}");
}

/// Entries that were read before a merge, and are used behind it.
#[test]
fn what_is_merged_meanwhile_is_read_anew() {
    let mut place = Place::new();
    let names = place.chain();
    let archive = place.lock();
    let old = archive.list().unwrap().entries;
    // Below the newest, and what that stood on is gone.
    archive.merge(&names[1], &|_| true).unwrap();
    archive.remove(&names[0]).unwrap();
    let verified = archive.verify(&old, &|_| true).unwrap();
    assert!(verified.damage.is_empty() && verified.checkpoints == 2, "{verified:?}");
    archive.merge(&names[2], &|_| true).unwrap();
    archive.remove(&names[1]).unwrap();
    let verified = archive.verify(&old[..1], &|_| true).unwrap();
    assert!(verified.damage.is_empty() && verified.checkpoints == 1, "{verified:?}");
    crate::restore::open(&archive, &old[0]).unwrap();
}

#[test]
fn a_file_that_cannot_be_read_is_damage_of_its_checkpoint_alone() {
    let mut place = Place::new();
    let first = place.save(&[1; PAGES], None, 100);
    place.save(&[2; PAGES], None, 200);
    std::fs::remove_file(first.path().join(STATE)).unwrap();
    // The read fails, whoever asks.
    std::fs::create_dir(first.path().join(STATE)).unwrap();
    let archive = place.archive();
    let verified = archive.verify(&archive.list().unwrap().entries, &|_| true).unwrap();
    assert!(
        matches!(&verified.damage[..], [Damage::File { checkpoint, .. }] if checkpoint == first.name()),
        "{verified:?}"
    );
    assert_eq!(verified.checkpoints, 2);
}

#[test]
fn an_archive_that_others_can_write_to_is_none() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    drop(place.lock());
    for mode in [0o702, 0o720] {
        std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(mode)).unwrap();
        for refused in [Archive::open(&place.path()), Archive::create(&place.path())] {
            assert!(matches!(refused, Err(ArchiveError::NotSafe { .. })), "{refused:?}");
        }
    }
    std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    Archive::open(&place.path()).unwrap();
}

#[test]
fn a_manifest_that_cannot_be_read_is_told_and_keeps_others_from_being_removed() {
    let mut place = Place::new();
    let names = place.chain();
    let alone = place.save(&[5; PAGES], None, 400).name().to_owned();
    let manifest = place.path().join(&names[2]).join(MANIFEST);
    let bytes = std::fs::read(&manifest).unwrap();
    std::fs::write(&manifest, &bytes[..bytes.len() / 2]).unwrap();
    let listing = place.archive().list().unwrap();
    assert_eq!(listing.entries.len(), 3);
    assert!(matches!(&listing.unreadable[..], [(name, _)] if *name == names[2]));
    let error = place.archive().find(Some(&names[2])).unwrap_err();
    assert!(error.is_damage(), "{error}");
    let archive = place.lock();
    for result in [archive.remove(&alone), archive.keep(1, None, &|_| true).map(drop)] {
        assert!(matches!(&result, Err(ArchiveError::MayBeBase { .. })), "{result:?}");
    }
    archive.remove(&names[2]).unwrap();
    archive.remove(&alone).unwrap();
    place.check(&[100, 200], &[]);
    place.check_tidy();
}

#[test]
fn what_others_need_is_not_removed() {
    let mut place = Place::new();
    let names = place.chain();
    let archive = place.lock();
    let error = archive.remove(&names[0]).unwrap_err();
    assert!(matches!(&error, ArchiveError::IsBase { of, .. } if *of == names[1]), "{error}");
    // A VM that was restored from it has the images open.
    let newest = archive.find(Some(&names[2])).unwrap();
    let images = archive.chain(&newest).unwrap().images(true).unwrap();
    let error = archive.remove(&names[2]).unwrap_err();
    assert!(matches!(error, ArchiveError::InUse { .. }), "{error}");
    place.check(&[100, 200, 300], &[]);
    drop(images);
    archive.remove(&names[2]).unwrap();
    // Whoever found it before that cannot begin from it now.
    assert!(matches!(newest.image(true), Err(ArchiveError::Removed { .. } | ArchiveError::Io { .. })));
    archive.remove(&names[1]).unwrap();
    archive.remove(&names[0]).unwrap();
    assert!(matches!(archive.remove(&names[0]), Err(ArchiveError::NoCheckpoint { .. })));
    assert!(matches!(archive.find(None), Err(ArchiveError::Empty { .. })));
    place.check_tidy();
}

#[test]
fn a_merge_disturbs_no_vm_and_stops_when_it_is_told_to() {
    let mut place = Place::new();
    let names = place.chain();
    let archive = place.lock();
    let newest = archive.find(Some(&names[2])).unwrap();
    let images = archive.chain(&newest).unwrap().images(true).unwrap();
    let error = archive.merge(&names[2], &|_| false).unwrap_err();
    assert!(matches!(error, ArchiveError::Cancelled), "{error}");
    place.check(&[100, 200, 300], &[]);

    let told = std::sync::Mutex::new(Vec::new());
    let merged = archive
        .merge(&names[2], &|progress| {
            told.lock().unwrap().push(progress);
            true
        })
        .unwrap();
    let told = told.into_inner().unwrap();
    let pages = newest.manifest().pages;
    assert_eq!(merged.shared + merged.copied, pages.base);
    let (first, last) = (told[0], told.iter().map(|progress| progress.bytes_done).max());
    assert_eq!((first.bytes_done, last), (0, Some(bytes_of(pages.base))));
    assert_eq!(first.bytes_total, bytes_of(pages.base));

    let alone = archive.find(Some(&names[2])).unwrap();
    assert_eq!((alone.manifest().base.clone(), alone.manifest().pages.base), (None, 0));
    assert_eq!(alone.manifest().id, newest.manifest().id);
    assert_eq!(alone.map().unwrap().pieces().next().unwrap().heat[0], 9);
    place.check(&[100, 200, 300], &[]);
    place.check_tidy();
    assert_eq!(archive.merge(&names[2], &|_| true).unwrap(), Merged::default());
    drop(images);
    // In the other order than they were made, as nothing stands on the base's base any more.
    archive.remove(&names[1]).unwrap();
    archive.remove(&names[0]).unwrap();
    place.check(&[300], &[]);
}

#[test]
fn a_damaged_base_is_not_merged() {
    let mut place = Place::new();
    let names = place.chain();
    let file = File::options().write(true).open(place.path().join(&names[0]).join(IMAGE)).unwrap();
    file.write_all_at(b"else", bytes_of(20)).unwrap();
    let error = place.lock().merge(&names[2], &|_| true).unwrap_err();
    assert!(matches!(&error, ArchiveError::Page { name, page: PageNo(20) } if *name == names[0]), "{error}");
    let entry = place.archive().find(Some(&names[2])).unwrap();
    assert!(entry.manifest().base.is_some());
    // Nothing is left of what was put in before.
    let mut bytes = [1; PAGE_SIZE];
    entry.image(false).unwrap().read_exact_at(&mut bytes, bytes_of(4)).unwrap();
    assert_eq!(bytes, [0; PAGE_SIZE]);
}

#[test]
fn the_newest_few_are_kept_and_stand_alone() {
    let mut place = Place::new();
    let names = place.chain();
    let archive = place.lock();
    assert_eq!(archive.keep(3, None, &|_| true).unwrap(), Kept::default());
    // What is in use stays, and what that stands on.
    let middle = archive.find(Some(&names[1])).unwrap();
    let used = middle.image(true).unwrap();
    let kept = archive.keep(1, None, &|_| true).unwrap();
    assert_eq!(kept.merged, [names[2].clone()]);
    assert_eq!((kept.removed, kept.in_use.len()), (Vec::new(), 2));
    place.check(&[100, 200, 300], &[]);
    drop(used);
    let kept = archive.keep(1, None, &|_| true).unwrap();
    assert_eq!((kept.merged.len(), kept.removed.len(), kept.in_use.len()), (0, 2, 0));
    place.check(&[300], &[]);
    assert_eq!(archive.keep(0, None, &|_| true).unwrap(), Kept::default(), "the last one stays");
}

#[test]
fn the_one_that_was_made_just_now_is_the_newest_whatever_the_clock_says() {
    let mut place = Place::new();
    let ahead = place.save(&[1; PAGES], None, 9000);
    let archive = place.lock();
    let entry = save(&archive, &[2; PAGES], None, 400).unwrap();
    assert_eq!(entry.manifest().made_at_ms, 9_000_001);
    assert_eq!(archive.find(None).unwrap().name(), entry.name());
    // An archive that a vmemd before this one has made.
    let mut manifest = entry.manifest().clone();
    manifest.made_at_ms = 400_000;
    std::fs::write(entry.path().join(MANIFEST), manifest.encode()).unwrap();
    let kept = archive.keep(1, Some(entry.name()), &|_| true).unwrap();
    assert_eq!(kept.removed, [ahead.name()]);
}

#[test]
fn what_fails_behind_the_rename_is_told_apart() {
    for step in 0.. {
        let place = Place::new();
        let archive = place.lock();
        let dir = place.dir.path().to_owned();
        let (made, crashed) =
            crash::at(&dir, step, Kind::Killed, || save(&archive, &[1; PAGES], None, 400).map(drop));
        assert!(step < 100, "it does not come to an end");
        let there = !place.archive().list().unwrap().entries.is_empty();
        match made {
            Ok(()) => assert!(there && !crashed),
            Err(ArchiveError::NotFlushed { .. }) => assert!(there),
            Err(error) => assert!(!there, "step {step}: {error}"),
        }
        if !crashed {
            break;
        }
    }
}

#[test]
fn the_order_of_first_faults_is_replaced() {
    let mut place = Place::new();
    let entry = place.save(&[1; PAGES], None, 100);
    assert_eq!(entry.first_faults(), None);
    for start in [1, 2] {
        let order = FirstFaults::new(PAGES as u64, vec![Run::new(PageNo(start), 3)]).unwrap();
        entry.put_first_faults(&order).unwrap();
        assert_eq!(entry.first_faults(), Some(order));
    }
    std::fs::write(entry.path().join(FIRST_FAULTS), "rubbish").unwrap();
    assert_eq!(entry.first_faults(), None);
    place.check(&[100], &[]);
    place.check_tidy();
}

#[test]
fn a_chain_has_an_end() {
    let mut place = Place::new();
    let mut last: Option<String> = None;
    for second in 0..MAX_CHAIN as u64 {
        last = Some(place.save(&[1; PAGES], last.as_deref(), second).name().to_owned());
    }
    let archive = place.lock();
    let error = save(&archive, &[1; PAGES], last.as_deref(), 1000).unwrap_err();
    assert!(matches!(error, ArchiveError::TooDeep { .. }), "{error}");
    archive.merge(last.as_deref().unwrap(), &|_| true).unwrap();
    save(&archive, &[1; PAGES], last.as_deref(), 1000).unwrap();
}

/// The map that was saved is the map that is read.
#[test]
fn an_entry_gives_its_map() {
    let mut place = Place::new();
    let entry = place.save(&[3; PAGES], None, 100);
    let map: MemoryMap = entry.map().unwrap();
    assert_eq!(map.counts().here, PAGES as u64);
    assert_eq!(map.sum(PageNo(7)), Some(sum(7, 3)));
}
