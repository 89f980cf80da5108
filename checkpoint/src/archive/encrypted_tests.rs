//! Archives with checkpoints that are encrypted.

use super::*;

/// A key in a file, as a user has it.
fn key(dir: &Path, byte: u8) -> ArchiveKey {
    let path = dir.join(format!("key-{byte}"));
    std::fs::write(&path, [byte; 32]).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&path, mode).unwrap();
    ArchiveKey::read(&path).unwrap()
}

fn encrypted() -> Place {
    let mut place = Place::new();
    place.key = Some(key(place.dir.path(), 1));
    place
}

fn needs_key<T: std::fmt::Debug>(result: Result<T, ArchiveError>) {
    assert!(matches!(result, Err(ArchiveError::KeyNeeded { .. })), "{result:?}");
}

#[test]
fn a_chain_is_read_merged_and_kept_with_its_key() {
    let mut place = encrypted();
    let names = place.chain();
    place.check(&[100, 200, 300], &[]);
    place.check_tidy();
    let entries = place.archive().list().unwrap().entries;
    assert!(entries.iter().all(|entry| entry.manifest().encryption == entries[0].manifest().encryption));
    assert!(entries[0].manifest().encryption.is_some());
    // No page is plain.
    for entry in &entries {
        let image = std::fs::read(entry.path().join(IMAGE)).unwrap();
        for (nth, page) in image.chunks(PAGE_SIZE).enumerate() {
            assert!(![1, 100, 200, 300].iter().any(|version| content(nth, *version)[..64] == page[..64]));
        }
    }
    let copied = place.lock().merge(&names[1], &|_| true).unwrap();
    assert!(copied.shared + copied.copied > 0);
    place.check(&[100, 200, 300], &[]);
    let kept = place.lock().keep(1, None, &|_| true).unwrap();
    assert_eq!(kept.merged, [names[2].clone()]);
    place.check(&[300], &[]);
    place.check_tidy();
    // And on, from what was merged.
    place.save(&[9; PAGES], Some(&names[2]), 400);
    place.check(&[300, 400], &[]);
}

#[test]
fn without_its_key_nothing_is_read_and_damage_shows_all_the_same() {
    let mut place = encrypted();
    let names = place.chain();
    let right = std::mem::take(&mut place.key);
    let archive = place.archive();
    let entry = archive.find(None).unwrap();
    needs_key(entry.map());
    needs_key(entry.state());
    needs_key(crate::restore::open(&archive, &entry));
    needs_key(place.lock().merge(&names[2], &|_| true));
    needs_key(place.lock().keep(1, None, &|_| true));
    let verified = archive.verify(&archive.list().unwrap().entries, &|_| true).unwrap();
    assert_eq!(
        (verified.checkpoints, verified.unread.len(), verified.damage.len()),
        (0, 3, 0),
        "{verified:?}"
    );
    // The state of one, the image of another.
    let path = |name: &str, file: &str| place.path().join(name).join(file);
    let mut state = std::fs::read(path(&names[2], STATE)).unwrap();
    state[60] ^= 1;
    std::fs::write(path(&names[2], STATE), state).unwrap();
    std::fs::File::options().write(true).open(path(&names[0], IMAGE)).unwrap().set_len(MEMORY - 1).unwrap();
    let verified = archive.verify(&archive.list().unwrap().entries, &|_| true).unwrap();
    assert_eq!(verified.damage.len(), 3, "all stand on that image: {verified:?}");

    // Another key is told as such, before anything else is.
    place.key = Some(key(place.dir.path(), 2));
    let entry = place.archive().find(None).unwrap();
    let error = entry.map().unwrap_err();
    assert!(matches!(&error, ArchiveError::WrongKey { key, .. } if key.ends_with("key-2")), "{error}");
    place.key = right;
    assert!(place.archive().find(None).unwrap().map().is_ok());
}

#[test]
fn a_page_and_a_part_that_are_others_are_found() {
    let mut place = encrypted();
    let names = place.chain();
    let entry = place.archive().find(Some(&names[0])).unwrap();
    let image = std::fs::File::options().read(true).write(true).open(entry.path().join(IMAGE)).unwrap();
    let mut byte = [0];
    image.read_exact_at(&mut byte, 5 * PAGE_SIZE as u64 + 9).unwrap();
    image.write_all_at(&[byte[0] ^ 1], 5 * PAGE_SIZE as u64 + 9).unwrap();
    let archive = place.archive();
    let verified = archive.verify(&archive.list().unwrap().entries, &|_| true).unwrap();
    assert!(
        matches!(&verified.damage[..], [Damage::Page { page: PageNo(5), checkpoint }] if *checkpoint == names[0]),
        "{verified:?}"
    );
    assert!(matches!(place.lock().merge(&names[2], &|_| true), Err(ArchiveError::Page { .. })));
    // A state that somebody has made, with a checksum that is right.
    let forged = entry.path().join(STATE);
    let mut bytes = std::fs::read(&forged).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&forged, &bytes).unwrap();
    place.edit(&names[0], |manifest| {
        manifest.parts.state.xxh3 = crate::format::manifest::Sum(xxhash_rust::xxh3::xxh3_64(&bytes));
    });
    let entry = place.archive().find(Some(&names[0])).unwrap();
    let read = io::Read::read_to_end(&mut entry.state().unwrap(), &mut Vec::new());
    assert_eq!(read.unwrap_err().kind(), io::ErrorKind::InvalidData);
    let verified = place.archive().verify(&[entry], &|_| true).unwrap();
    assert!(verified.damage.iter().any(|damage| matches!(damage, Damage::File { .. })), "{verified:?}");
}

#[test]
fn no_checkpoint_has_a_base_of_another_key_or_of_none() {
    let mut place = encrypted();
    let first = place.save(&[1; PAGES], None, 100).name().to_owned();
    let based = |place: &Place| {
        let archive = place.lock();
        let chain = archive.chain(&archive.find(Some(&first)).unwrap()).unwrap();
        archive.new_checkpoint("web", MEMORY, Some(&chain)).map(drop)
    };
    based(&place).unwrap();
    let right = place.key.replace(key(place.dir.path(), 2));
    assert!(matches!(based(&place), Err(ArchiveError::WrongKey { .. })));
    place.key = None;
    assert!(matches!(based(&place), Err(ArchiveError::BaseKey { .. })));
    // A plain one beside it, which is no base of one that is encrypted.
    let plain = place.save(&[2; PAGES], None, 200).name().to_owned();
    place.key = right;
    let archive = place.lock();
    let chain = archive.chain(&archive.find(Some(&plain)).unwrap()).unwrap();
    let error = archive.new_checkpoint("web", MEMORY, Some(&chain)).unwrap_err();
    assert!(matches!(error, ArchiveError::BaseKey { .. }), "{error}");
    drop(archive);
    place.check(&[100, 200], &[]);
    // A manifest that says otherwise.
    let second = place.save(&[3; PAGES], Some(&first), 300).name().to_owned();
    let base = place.archive().find(Some(&plain)).unwrap();
    place.edit(&second, |manifest| {
        let base = crate::format::BaseRef { name: plain.clone(), id: base.manifest().id };
        manifest.base = Some(base);
    });
    let archive = place.archive();
    let error = archive.chain(&archive.find(Some(&second)).unwrap()).unwrap_err();
    assert!(error.to_string().contains("one key"), "{error}");
}

#[test]
fn a_crash_while_an_encrypted_one_is_merged_leaves_it_whole() {
    crashes::crash_everywhere(
        &[],
        &[100, 200, 300],
        |place| {
            place.key = Some(key(place.dir.path(), 1));
            place.chain();
        },
        |place| place.archive().lock()?.merge("1970-01-01T00-05-00Z", &|_| true).map(drop),
    );
}
