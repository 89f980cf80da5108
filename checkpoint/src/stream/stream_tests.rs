use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use memmap2::MmapMut;
use proptest::prelude::*;
use swapd::digest::page_sum;
use swapd::units::bytes_of;
use swapd::{PAGE_SIZE, PageNo, Run};
use testkit::TempDir;

use super::*;
use crate::archive::{Archive, ArchiveError, Entry, Locked, Made};
use crate::format::sealed::{SealedAs, SealedWriter, encode_map};
use crate::format::{FirstFaults, FormatError, Machine, MapBuilder, PageKind, Save, VmFacts};
use crate::key::{ArchiveKey, SALT_BYTES};

const STATE: &[u8] = b"processors and devices";

/// The first bytes of each page that has content.
type Memory = BTreeMap<u64, u64>;

fn content(page: u64, version: u64) -> Vec<u8> {
    let words = (0..testkit::pages::WORDS).map(|nth| testkit::pages::word(page, version, nth));
    words.flat_map(u64::to_le_bytes).collect()
}

fn sum(page: u64, version: u64) -> u64 {
    page_sum(PageNo(page), &content(page, version))
}

fn made(vm: &str, pages: u64, at: u64) -> Made {
    let vm = VmFacts {
        name: vm.to_owned(),
        memory_bytes: bytes_of(pages),
        vcpus: 1,
        machine: Machine::Reference,
        offer: Some("an offer".to_owned()),
        budget_bytes: bytes_of(pages),
        paused: false,
        disks: Vec::new(),
        without_disks: Vec::new(),
    };
    Made { made_at_ms: 1_795_994_400_000 + at, made_by: "a test".to_owned(), vm, save: Save::default() }
}

/// Saves a memory; pages that the base has with the same version are in it.
fn save(archive: &Locked, pages: u64, memory: &Memory, base: Option<(&Entry, &Memory)>, at: u64) -> Entry {
    let chain = base.map(|(entry, _)| archive.chain(entry).unwrap());
    let pending = archive.new_checkpoint("web", bytes_of(pages), chain.as_ref()).unwrap();
    let mut map = MapBuilder::new(pages);
    let mut page_bytes = MmapMut::map_anon(PAGE_SIZE).unwrap();
    for (page, version) in memory {
        let run = Run::new(PageNo(*page), 1);
        let in_base = base.is_some_and(|(_, memory)| memory.get(page) == Some(version));
        let kind = if in_base { PageKind::Base } else { PageKind::Here };
        map.set_content(run, kind, &[sum(*page, *version)]);
        if !in_base {
            page_bytes.copy_from_slice(&content(*page, *version));
            if let Some(key) = pending.key() {
                key.pages().encrypt(run, &mut page_bytes);
            }
            pending.image().write_all_at(&page_bytes, run.start.offset()).unwrap();
        }
    }
    pending.map().write_all_at(&encode_map(&map.finish(&[]), pending.key()).unwrap(), 0).unwrap();
    let state = match pending.key() {
        None => STATE.to_vec(),
        Some(key) => {
            let mut sealed = SealedWriter::new(Vec::new(), key, SealedAs::State, [7; SALT_BYTES]).unwrap();
            sealed.write_all(STATE).unwrap();
            sealed.finish().unwrap()
        }
    };
    pending.state().write_all_at(&state, 0).unwrap();
    pending.finish(made("web", pages, at)).unwrap()
}

fn archive(path: &Path) -> Locked {
    Archive::create(path).unwrap().lock().unwrap()
}

struct Place {
    dir: TempDir,
    from: Locked,
}

impl Place {
    fn new() -> Place {
        let dir = testkit::directory("stream");
        let from = archive(&dir.path().join("from"));
        Place { dir, from }
    }

    fn to(&self) -> Locked {
        archive(&self.dir.path().join("to"))
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path().join("to")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != "archive.lock").collect()
    }

    fn export(&self, entry: &Entry) -> Vec<u8> {
        let export = Export::open(self.from.chain(entry).unwrap()).unwrap();
        let mut bytes = Vec::new();
        let exported = export.write(&mut bytes, &|_| true).unwrap();
        assert_eq!((exported.bytes, export.total()), (bytes.len() as u64, bytes.len() as u64));
        bytes
    }
}

fn goes_on(_: Progress) -> bool {
    true
}

fn verify(archive: &Archive) {
    let verified = archive.verify(&archive.list().unwrap().entries, &goes_on).unwrap();
    assert!(verified.damage.is_empty(), "{:?}", verified.damage);
}

/// What a checkpoint's image has where its map says that it has something.
fn memory_of(archive: &Archive, entry: &Entry) -> BTreeMap<u64, Vec<u8>> {
    assert!(archive.chain(entry).unwrap().entries().len() == 1, "it stands alone");
    let image = entry.image(false).unwrap();
    let map = entry.map().unwrap();
    let pages = (0..map.pages()).filter(|page| map.kind(PageNo(*page)) == PageKind::Here);
    let read = |page: u64| {
        let mut bytes = vec![0; PAGE_SIZE];
        image.read_exact_at(&mut bytes, PageNo(page).offset()).unwrap();
        (page, bytes)
    };
    pages.map(read).collect()
}

fn is(memory: &Memory) -> BTreeMap<u64, Vec<u8>> {
    memory.iter().map(|(page, version)| (*page, content(*page, *version))).collect()
}

#[test]
fn what_is_exported_stands_alone_and_is_the_same_checkpoint() {
    let place = Place::new();
    // More than a record, with holes.
    let old: Memory = (0..3000).filter(|page| page % 7 != 3).map(|page| (page, 1)).collect();
    let base = save(&place.from, 9000, &old, None, 0);
    let mut new = old.clone();
    new.extend((100..120).chain(2990..3010).chain([8999]).map(|page| (page, 2)));
    let top = save(&place.from, 9000, &new, Some((&base, &old)), 1000);
    let order = FirstFaults::new(9000, vec![Run::new(PageNo(8999), 1), Run::new(PageNo(0), 9)]).unwrap();
    top.put_first_faults(&order).unwrap();
    assert!(top.manifest().pages.base > 2000);
    let bytes = place.export(&top);
    let small = bytes.len() as u64 - bytes_of(new.len() as u64);
    assert!(small < 80_000, "{small} bytes beside the pages");

    let to = place.to();
    let Imported { entry, bytes: read } = import(&to, bytes.as_slice(), &goes_on).unwrap();
    assert_eq!(read, bytes.len() as u64);
    assert_eq!(entry.manifest().id, top.manifest().id);
    assert_eq!(entry.manifest().vm, top.manifest().vm);
    assert_eq!(memory_of(&to, &entry), is(&new));
    assert_eq!(entry.first_faults(), Some(order));
    let mut state = String::new();
    entry.state().unwrap().read_to_string(&mut state).unwrap();
    assert_eq!(state, "processors and devices");
    verify(&to);
    // Holes have stayed holes.
    assert!(entry.disk_bytes().unwrap() < bytes_of(new.len() as u64 + 256));
}

/// A stream of an encrypted checkpoint takes its key, and has nothing plain; whoever imports it needs none.
#[test]
fn an_encrypted_checkpoint_goes_through_a_stream_as_it_is() {
    let mut place = Place::new();
    let path = place.dir.path().join("key");
    std::fs::write(&path, [7; 32]).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let key = ArchiveKey::read(&path).unwrap();
    let keyed = |name: &str| {
        Archive::create(&place.dir.path().join(name)).unwrap().with_key(Some(key.clone())).lock().unwrap()
    };
    let from = keyed("encrypted");
    let old: Memory = (0..1500).map(|page| (page, 1)).collect();
    let base = save(&from, 3000, &old, None, 0);
    let mut new = old.clone();
    new.extend((1490..1510).map(|page| (page, 2)));
    let top = save(&from, 3000, &new, Some((&base, &old)), 1000);
    assert!(top.manifest().pages.base > 1000);
    // Without its key it is not exported.
    let plain = Archive::open(from.path()).unwrap();
    let refused = Export::open(plain.chain(&plain.find(None).unwrap()).unwrap()).map(drop);
    assert!(matches!(refused, Err(StreamError::Archive(ArchiveError::KeyNeeded { .. }))), "{refused:?}");
    place.from = from;
    let bytes = place.export(&top);
    let shows = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
    assert!(!shows(&content(1495, 2)[..32]) && !shows(STATE) && !shows(&sum(1495, 2).to_le_bytes()));

    let to = place.to();
    let imported = import(&to, bytes.as_slice(), &goes_on).unwrap().entry;
    assert_eq!((imported.manifest().id, imported.is_encrypted()), (top.manifest().id, true));
    assert!(matches!(imported.map(), Err(ArchiveError::KeyNeeded { .. })));
    drop(to);
    let to = Archive::open(&place.dir.path().join("to")).unwrap().with_key(Some(key));
    let verified = to.verify(&to.list().unwrap().entries, &goes_on).unwrap();
    assert!(verified.damage.is_empty() && verified.checkpoints == 1, "{verified:?}");
    assert_eq!(verified.pages, new.len() as u64);
    let entry = to.find(None).unwrap();
    let mut memory = memory_of(&to, &entry);
    let cipher = entry.chain_key().unwrap().unwrap().pages();
    memory.iter_mut().for_each(|(page, bytes)| cipher.decrypt(Run::one(PageNo(*page)), bytes));
    assert_eq!(memory, is(&new));
    let mut state = Vec::new();
    entry.state().unwrap().read_to_end(&mut state).unwrap();
    assert_eq!(state, STATE);
    to.lock().unwrap().remove(entry.name()).unwrap();

    // Cut, or with a bit that is another one, it leaves nothing.
    let to = place.to();
    for at in (0..bytes.len()).step_by(bytes.len() / 40) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        assert!(import(&to, damaged.as_slice(), &goes_on).is_err(), "byte {at}");
        assert!(import(&to, &bytes[..at], &goes_on).is_err(), "the first {at} bytes");
    }
    assert_eq!(place.names(), [""; 0]);
}

#[test]
fn a_checkpoint_is_not_imported_twice_and_an_archive_is_of_one_vm() {
    let place = Place::new();
    let first = save(&place.from, 64, &Memory::from([(3, 1)]), None, 0);
    let second = save(&place.from, 64, &Memory::from([(3, 2)]), None, 0);
    assert_eq!(second.name(), format!("{}-2", first.name()));
    let to = place.to();
    // Of two that were made in one second, the one that comes second has a number.
    let imported = import(&to, place.export(&second).as_slice(), &goes_on).unwrap();
    assert_eq!(imported.entry.name(), first.name());
    let imported = import(&to, place.export(&first).as_slice(), &goes_on).unwrap();
    assert_eq!(imported.entry.name(), second.name());
    let again = import(&to, place.export(&second).as_slice(), &goes_on);
    assert!(matches!(&again, Err(StreamError::There(name)) if name == first.name()), "{again:?}");

    let other = archive(&place.dir.path().join("other"));
    other
        .new_checkpoint("db", bytes_of(1), None)
        .map(|pending| {
            MapBuilder::new(1).finish(&[]).write(&mut pending.map()).unwrap();
            pending.finish(made("db", 1, 0)).unwrap()
        })
        .unwrap();
    let refused = import(&other, place.export(&first).as_slice(), &goes_on);
    assert!(matches!(refused, Err(StreamError::Archive(ArchiveError::OtherVm { .. }))), "{refused:?}");
}

#[test]
fn a_stream_that_is_cut_or_damaged_leaves_nothing() {
    let place = Place::new();
    let entry = save(&place.from, 64, &Memory::from([(3, 1), (5, 1), (6, 1)]), None, 0);
    let whole = place.export(&entry);
    let to = place.to();
    let places = (0..600).chain((600..whole.len()).step_by(97)).chain(whole.len() - 120..whole.len());
    for at in places {
        let cut = import(&to, &whole[..at], &goes_on).unwrap_err();
        assert!(cut.is_damage(), "cut at {at}: {cut:?}");
        let mut flipped = whole.clone();
        flipped[at] ^= 0x10;
        let error = import(&to, flipped.as_slice(), &goes_on).unwrap_err();
        let newer = matches!(error, StreamError::Format(FormatError::Newer { .. }));
        assert!(error.is_damage() || newer && (8..12).contains(&at), "flipped at {at}: {error:?}");
    }
    let mut longer = whole.clone();
    longer.push(0);
    let longer = import(&to, longer.as_slice(), &goes_on);
    assert!(matches!(longer, Err(StreamError::Format(FormatError::TooLong { .. }))), "{longer:?}");
    assert_eq!(place.names(), Vec::<String>::new());
    import(&to, whole.as_slice(), &goes_on).unwrap();
}

#[test]
fn whoever_stops_an_import_or_export_leaves_nothing() {
    let place = Place::new();
    let memory: Memory = (0..4096).map(|page| (page, 1)).collect();
    let entry = save(&place.from, 4096, &memory, None, 0);
    let whole = place.export(&entry);
    let to = place.to();
    for limit in [0, 1 << 20, 6 << 20, whole.len() as u64 - 1] {
        let stop = |progress: Progress| progress.bytes_done < limit;
        let error = import(&to, whole.as_slice(), &stop).unwrap_err();
        assert!(matches!(error, StreamError::Cancelled), "{error:?}");
        assert_eq!(place.names(), Vec::<String>::new());
        let export = Export::open(place.from.chain(&entry).unwrap()).unwrap();
        let written =
            export.write(&mut std::io::sink(), &|progress| progress.bytes_done < limit.min(6 << 20));
        assert!(matches!(written, Err(StreamError::Cancelled)));
    }
    // Nor does a reader of the export that has gone away.
    struct Full(usize);
    impl std::io::Write for Full {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 = self.0.checked_sub(bytes.len()).ok_or(std::io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let export = Export::open(place.from.chain(&entry).unwrap()).unwrap();
    let written = export.write(&mut Full(5 << 20), &goes_on);
    assert!(matches!(written, Err(StreamError::Write(_))));
}

#[test]
fn a_damaged_page_is_not_exported() {
    let place = Place::new();
    let memory: Memory = (0..2000).map(|page| (page, 1)).collect();
    let entry = save(&place.from, 2000, &memory, None, 0);
    let image = std::fs::File::options().write(true).open(entry.path().join("memory.img")).unwrap();
    image.write_all_at(b"otherwise", PageNo(1500).offset()).unwrap();
    let export = Export::open(place.from.chain(&entry).unwrap()).unwrap();
    let error = export.write(&mut std::io::sink(), &goes_on).unwrap_err();
    assert!(
        matches!(&error, StreamError::Archive(ArchiveError::Page { page: PageNo(1500), .. })),
        "{error:?}"
    );
}

#[test]
fn a_memory_of_zeros_costs_next_to_nothing() {
    let place = Place::new();
    let entry = save(&place.from, 16 << 20, &Memory::new(), None, 0);
    let bytes = place.export(&entry);
    assert!(bytes.len() < 2000, "{}", bytes.len());
    let to = place.to();
    import(&to, bytes.as_slice(), &goes_on).unwrap();
    verify(&to);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_memory_comes_back(
        pages in 1..3000u64,
        runs in prop::collection::vec((0..3000u64, 1..1500u64, 0..3u64), 0..12),
        changed in prop::collection::vec((0..3000u64, 1..40u64, 3..5u64), 0..6),
    ) {
        let place = Place::new();
        let mut memory = Memory::new();
        let put = |memory: &mut Memory, (first, len, version): (u64, u64, u64)| {
            for page in first..(first + len).min(pages) {
                // Version 0: zeros again.
                if version == 0 { memory.remove(&page); } else { memory.insert(page, version); }
            }
        };
        runs.into_iter().for_each(|run| put(&mut memory, run));
        let mut entry = save(&place.from, pages, &memory, None, 0);
        if !changed.is_empty() {
            let old = memory.clone();
            changed.into_iter().for_each(|run| put(&mut memory, run));
            entry = save(&place.from, pages, &memory, Some((&entry, &old)), 1000);
        }
        let bytes = place.export(&entry);
        let mut seen = BTreeMap::new();
        inspect(bytes.as_slice(), &mut |pages, content| {
            let numbers = pages.runs.iter().flat_map(|run| run.pages());
            seen.extend(numbers.zip(content.chunks_exact(PAGE_SIZE)).map(|(page, bytes)| (page.0, bytes.to_vec())));
        }).unwrap();
        prop_assert_eq!(&seen, &is(&memory));
        let to = place.to();
        let imported = import(&to, bytes.as_slice(), &goes_on).unwrap();
        prop_assert_eq!(&memory_of(&to, &imported.entry), &is(&memory));
    }
}
