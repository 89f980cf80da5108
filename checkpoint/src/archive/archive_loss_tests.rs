//! Files of checkpoints that are gone, and merges that do not come to their end.

use super::*;

fn damages(error: &ArchiveError, words: &str) {
    let text = error.to_string();
    assert!(error.is_damage() && text.contains(words), "{text}");
}

#[test]
fn a_checkpoint_without_a_manifest_is_told_and_no_older_one_is_taken_for_it() {
    let mut place = Place::new();
    let names = place.chain();
    let manifest = place.path().join(&names[2]).join(MANIFEST);
    let bytes = std::fs::read(&manifest).unwrap();
    std::fs::remove_file(&manifest).unwrap();
    let archive = place.archive();
    let listing = archive.list().unwrap();
    assert_eq!(listing.entries.len(), 2);
    assert!(
        matches!(&listing.unreadable[..], [(name, ArchiveError::NoManifest { .. })] if *name == names[2])
    );
    damages(&archive.find(Some(&names[2])).unwrap_err(), "no manifest");
    let error = archive.find(None).unwrap_err();
    damages(&error, &names[2]);
    assert!(matches!(error, ArchiveError::Latest { .. }), "{error}");
    assert_eq!(archive.find(Some(&names[1])).unwrap().name(), names[1]);
    let locked = place.lock();
    assert!(matches!(locked.keep(1, None, &|_| true), Err(ArchiveError::MayBeBase { .. })));
    assert!(matches!(locked.remove(&names[1]), Err(ArchiveError::MayBeBase { .. })));
    // A VM that was restored from it when it could be still reads its image.
    std::fs::write(&manifest, &bytes).unwrap();
    let image = archive.find(Some(&names[2])).unwrap().image(true).unwrap();
    std::fs::remove_file(&manifest).unwrap();
    assert!(matches!(locked.remove(&names[2]), Err(ArchiveError::InUse { .. })));
    drop(image);
    locked.remove(&names[2]).unwrap();
    assert_eq!(archive.find(None).unwrap().name(), names[1]);
    place.check(&[100, 200], &[]);
    place.check_tidy();
}

#[test]
fn an_older_one_that_cannot_be_read_keeps_nobody_from_the_latest() {
    let mut place = Place::new();
    let names = place.chain();
    place.save(&[3; PAGES], None, 400);
    for name in &names {
        std::fs::remove_file(place.path().join(name).join(MANIFEST)).unwrap();
    }
    let archive = place.archive();
    assert_eq!(archive.list().unwrap().unreadable.len(), 3);
    assert_eq!(archive.find(None).unwrap().manifest().made_at_ms, 400_000);
    // Renamed by hand, it is as old as it was; and of a damaged one with a name of its user's nobody knows.
    let newest = archive.find(None).unwrap();
    std::fs::rename(newest.path(), place.path().join("a-name")).unwrap();
    assert_eq!(archive.find(None).unwrap().name(), "a-name");
    std::fs::rename(place.path().join(&names[0]), place.path().join("another")).unwrap();
    assert!(matches!(archive.find(None), Err(ArchiveError::Latest { name, .. }) if name == "another"));
}

#[test]
fn with_nothing_but_a_damaged_one_an_archive_is_not_empty() {
    let mut place = Place::new();
    let only = place.save(&[3; PAGES], None, 400);
    std::fs::remove_file(only.path().join(MANIFEST)).unwrap();
    assert!(matches!(place.archive().find(None), Err(ArchiveError::Latest { .. })));
}

#[test]
fn a_directory_of_somebody_elses_is_no_checkpoint() {
    let mut place = Place::new();
    place.chain();
    for name in ["notes", "scripts"] {
        std::fs::create_dir(place.path().join(name)).unwrap();
        std::fs::write(place.path().join(name).join("readme"), "hello").unwrap();
    }
    place.check(&[100, 200, 300], &[]);
    // What is left of one whose files were removed, and one whose name is lost.
    std::fs::create_dir(place.path().join("1970-01-01T00-05-01Z")).unwrap();
    std::fs::rename(place.path().join("notes/readme"), place.path().join("notes/memory.img")).unwrap();
    let unreadable: Vec<String> =
        place.archive().list().unwrap().unreadable.into_iter().map(|(name, _)| name).collect();
    assert_eq!(unreadable, ["1970-01-01T00-05-01Z", "notes"]);
}

#[test]
fn a_file_that_is_missing_is_damage_whoever_asks() {
    for file in [IMAGE, MAP, STATE] {
        let mut place = Place::new();
        let names = place.chain();
        std::fs::remove_file(place.path().join(&names[2]).join(file)).unwrap();
        let archive = place.archive();
        let newest = archive.find(None).unwrap();
        damages(&crate::restore::open(&archive, &newest).unwrap_err(), file);
        let verified = archive.verify(&archive.list().unwrap().entries, &|_| true).unwrap();
        assert!(
            matches!(&verified.damage[..], [Damage::File { error, .. }] if error.is_damage()),
            "{verified:?}"
        );
        let opened = newest.map_file().map(drop);
        assert_eq!(opened.is_err(), file == MAP, "{opened:?}");
        if file != STATE {
            damages(&place.lock().merge(&names[2], &|_| true).unwrap_err(), file);
        }
    }
}

#[test]
fn a_checkpoint_in_the_place_of_its_archive_is_told_by_both_names() {
    let mut place = Place::new();
    let entry = place.save(&[1; PAGES], None, 100);
    for refused in [Archive::open(entry.path()), Archive::create(entry.path())] {
        let text = refused.unwrap_err().to_string();
        let both = format!("{} {}", place.path().canonicalize().unwrap().display(), entry.name());
        assert!(text.contains(&both), "{text}");
    }
    let file = place.dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    for path in [file.clone(), file.join("below")] {
        let refused = Archive::create(&path).unwrap_err();
        assert!(matches!(refused, ArchiveError::NotDirectory { .. }), "{refused}");
    }
}

/// Blocks that the image takes.
fn room(archive: &Archive, name: &str) -> u64 {
    archive.find(Some(name)).unwrap().disk_bytes().unwrap()
}

#[test]
fn a_merge_that_ends_early_takes_no_room() {
    let mut place = Place::new();
    let names = place.chain();
    let archive = place.lock();
    let before = room(&archive, &names[2]);
    // Told to give up when all is in the image.
    let given_up = archive.merge(&names[2], &|progress| progress.bytes_done < progress.bytes_total);
    assert!(matches!(given_up, Err(ArchiveError::Cancelled)), "{given_up:?}");
    assert_eq!(room(&archive, &names[2]), before);
    place.check_tidy();
    place.check(&[100, 200, 300], &[]);
}

#[test]
fn a_merge_that_was_killed_leaves_no_room_taken_behind_the_next_command() {
    let (mut taken, mut ended) = (0, false);
    for step in 0.. {
        let mut place = Place::new();
        let names = place.chain();
        let archive = place.archive();
        let before = room(&archive, &names[2]);
        let dir = place.dir.path().to_owned();
        let (_, crashed) =
            crash::at(&dir, step, Kind::Killed, || archive.lock()?.merge(&names[2], &|_| true));
        let merged = archive.find(Some(&names[2])).unwrap().manifest().base.is_none();
        taken += u64::from(!merged && room(&archive, &names[2]) > before);
        place.lock().clean().unwrap();
        assert!(merged || room(&archive, &names[2]) == before, "step {step}");
        place.check_tidy();
        place.check(&[100, 200, 300], &[]);
        if !crashed {
            ended = merged;
            break;
        }
    }
    assert!(taken > 0 && ended, "{taken} kills left something");
}

/// Whoever verifies, lists or opens beside merges and removals sees no damage: there is none.
#[test]
fn beside_merges_and_removals_nothing_seems_damaged() {
    use std::sync::atomic::{AtomicBool, Ordering};
    for _ in 0..12 {
        let mut place = Place::new();
        let names = place.chain();
        let (archive, done) = (place.archive(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let looked = || {
                    let listing = archive.list().unwrap();
                    assert!(listing.unreadable.is_empty(), "{listing:?}");
                    let verified = archive.verify(&listing.entries, &|_| true).unwrap();
                    assert!(verified.damage.is_empty(), "{verified:?}");
                    let latest = archive.find(None).unwrap();
                    assert_eq!(latest.name(), names[2]);
                    crate::restore::open(&archive, &latest).map(drop).unwrap();
                };
                while !done.load(Ordering::SeqCst) {
                    looked();
                }
            });
            let locked = place.lock();
            let merge = |name: &str| locked.merge(name, &|_| true).unwrap();
            let remove = |name: &str| while locked.remove(name).is_err() {};
            merge(&names[1]);
            remove(&names[0]);
            merge(&names[2]);
            remove(&names[1]);
            done.store(true, Ordering::SeqCst);
        });
        place.check(&[300], &[]);
    }
}
