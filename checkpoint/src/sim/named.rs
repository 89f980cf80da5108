//! What a session has written becomes a checkpoint of a real archive, in which the host or the command dies at some
//! step: whatever has a name then is whole.

use std::io::Write;
use std::path::Path;

use memmap2::MmapMut;
use migrate::sim::engine::content;
use migrate::sim::random::Random;
use swapd::digest::page_sum;
use swapd::units::bytes_of;
use swapd::{PAGE_SIZE, PageNo};

use super::coverage::{Cause, count};
use super::story::Done;
use crate::archive::crash::{self, Kind};
use crate::archive::{Archive, ArchiveError, Entry, Made, Source};
use crate::format::{Machine, Save, VmFacts};

/// Some more than an operation has.
const STEPS: u64 = 40;

/// # Panics
/// If the archive has a checkpoint that is not whole, or has lost one that it had.
pub(crate) fn check(seed: u64, done: &[Done]) {
    let random = Random::new(seed ^ 0xC4A5);
    let place = testkit::directory("named");
    let path = place.path().join("web");
    // Those that stand by themselves, and the first that stands on one.
    let Some(first) = done.iter().position(|done| done.base.is_none()) else { return };
    let second = done.iter().position(|done| done.base == Some(first));
    let mut has = Vec::new();
    for nth in [Some(first), second].into_iter().flatten() {
        let kind = random.pick(&[Kind::Killed, Kind::NoPower, Kind::Torn(seed)]);
        // The last one may meet with a crash.
        let step = if nth == first && second.is_some() { u64::MAX } else { random.below(STEPS) };
        let (made, crashed) = crash::at(place.path(), step, kind, || make(&path, done, nth));
        assert_eq!(crashed, made.is_err(), "{made:?}");
        count(if crashed { Cause::CrashedBeforeTheName } else { Cause::Named });
        let whole = whole(&path, done);
        has.iter().for_each(|nth| assert!(whole.contains(nth), "a checkpoint is gone"));
        if !crashed {
            assert!(whole.contains(&nth), "it was made, and is not there");
            has.push(nth);
        }
    }
}

fn second_of(nth: usize) -> u64 {
    100 * (nth as u64 + 1)
}

fn make(path: &Path, done: &[Done], nth: usize) -> Result<Entry, ArchiveError> {
    let (archive, new) = (Archive::create(path)?.lock()?, &done[nth]);
    let base = match new.base {
        Some(base) => {
            let entries = archive.list()?.entries;
            let of = |entry: &&Entry| entry.manifest().made_at_ms == second_of(base) * 1000;
            Some(archive.chain(entries.iter().find(of).expect("the base was made"))?)
        }
        None => None,
    };
    let memory_bytes = bytes_of(new.truth.len() as u64);
    let pending = archive.new_checkpoint("web", memory_bytes, base.as_ref())?;
    let mut aligned = MmapMut::map_anon(PAGE_SIZE).unwrap();
    // Without its key: the archive's steps are the same.
    for (page, _) in new.image.pages() {
        aligned.copy_from_slice(&*new.page(PageNo(page)).expect("the image has it"));
        std::os::unix::fs::FileExt::write_all_at(pending.image(), &aligned, PageNo(page).offset()).unwrap();
    }
    pending.map().write_all(&new.map.encode()).unwrap();
    pending.state().write_all(&new.state).unwrap();
    pending.finish(Made {
        made_at_ms: second_of(nth) * 1000,
        made_by: "a simulation".to_owned(),
        vm: VmFacts {
            name: "web".to_owned(),
            memory_bytes,
            vcpus: 1,
            machine: Machine::Reference,
            offer: None,
            budget_bytes: memory_bytes,
            paused: false,
            disks: Vec::new(),
            without_disks: Vec::new(),
        },
        save: Save::default(),
    })
}

/// Which checkpoints have a name; each of them is what the guest had.
fn whole(path: &Path, done: &[Done]) -> Vec<usize> {
    // A crash may have come before there was one.
    let Ok(archive) = Archive::open(path) else { return Vec::new() };
    let listed = archive.list().unwrap();
    assert!(listed.unreadable.is_empty(), "{:?}", listed.unreadable);
    let each = listed.entries.iter().map(|entry| {
        let nth = (0..done.len()).find(|nth| entry.manifest().made_at_ms == second_of(*nth) * 1000);
        let nth = nth.expect("one of ours");
        compare(&archive, entry, &done[nth]);
        nth
    });
    each.collect()
}

fn compare(archive: &Archive, entry: &Entry, done: &Done) {
    let chain = archive.chain(entry).unwrap();
    let (images, layers) = (chain.images(false).unwrap(), chain.layers().unwrap());
    for piece in layers.pieces() {
        for page in piece.run.pages() {
            let wanted = content(page, done.truth[page.index()]);
            match piece.source {
                Source::Zero => assert!(wanted.iter().all(|byte| *byte == 0), "{page} of {}", entry.name()),
                Source::Lost => assert!(done.lost.contains(&page)),
                Source::Layer(layer) => {
                    let mut bytes = [0; PAGE_SIZE];
                    let image = &images[usize::from(layer)];
                    std::os::unix::fs::FileExt::read_exact_at(image, &mut bytes, page.offset()).unwrap();
                    let is_whole = bytes == wanted
                        || (done.lost.contains(&page) && page_sum(page, &bytes) != page_sum(page, &wanted));
                    assert!(is_whole, "{page} of {} is not what the guest had", entry.name());
                }
            }
        }
    }
    let mut state = Vec::new();
    std::io::Read::read_to_end(&mut entry.state().unwrap(), &mut state).unwrap();
    assert_eq!(state, done.state);
}
