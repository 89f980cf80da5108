//! A crash at every step of what changes an archive.

use super::*;

/// Ends the operation at each of its steps, in each way, and looks at what is there then; then does it again.
pub(super) fn crash_everywhere(
    may: &[u64],
    must: &[u64],
    setup: impl Fn(&mut Place),
    operation: impl Fn(&Place) -> Result<(), ArchiveError>,
) {
    for kind in [Kind::Killed, Kind::NoPower].into_iter().chain((0..6).map(Kind::Torn)) {
        for step in 0.. {
            assert!(step < 1000, "it does not come to an end");
            let mut place = Place::new();
            let dir = place.dir.path().to_owned();
            // Without flushing: nothing crashes here.
            crash::at(&dir, u64::MAX, Kind::Killed, || setup(&mut place));
            let (result, crashed) = crash::at(&dir, step, kind, || operation(&place));
            let context = format!("step {step}, {kind:?}, {result:?}");
            eprintln!("{context}");
            assert!(crashed || result.is_ok(), "{context}");
            if place.path().exists() && Archive::open(&place.path()).is_ok() {
                place.check(must, may);
            }
            match crash::at(&dir, u64::MAX, Kind::Killed, || operation(&place)).0 {
                Ok(()) | Err(ArchiveError::NoCheckpoint { .. }) => {}
                Err(error) => panic!("{context}: and again: {error}"),
            }
            place.check(must, may);
            crash::at(&dir, u64::MAX, Kind::Killed, || place.lock().clean().unwrap());
            place.check_tidy();
            if !crashed {
                break;
            }
        }
    }
}

#[test]
fn a_crash_while_a_checkpoint_is_made_leaves_it_or_none() {
    let memory = [7; PAGES];
    crash_everywhere(
        &[400],
        &[],
        |place| {
            place.saved.insert(400_000, memory);
        },
        |place| save(&Archive::create(&place.path())?.lock()?, &memory, None, 400).map(drop),
    );
}

#[test]
fn a_crash_while_a_differential_one_is_made_leaves_its_base() {
    let mut memory = [1; PAGES];
    memory[3] = 3;
    crash_everywhere(
        &[400],
        &[100, 200, 300],
        |place| {
            place.chain();
            place.saved.insert(400_000, memory);
        },
        |place| {
            let archive = place.archive().lock()?;
            let base = archive.list()?.entries.last().map(|entry| entry.name().to_owned());
            save(&archive, &memory, base.as_deref(), 400).map(drop)
        },
    );
}

#[test]
fn a_crash_while_one_is_removed_leaves_all_of_it_or_nothing() {
    crash_everywhere(
        &[300],
        &[100, 200],
        |place| {
            place.chain();
        },
        |place| place.archive().lock()?.remove("1970-01-01T00-05-00Z"),
    );
}

#[test]
fn a_crash_while_one_is_merged_leaves_it_whole() {
    crash_everywhere(
        &[],
        &[100, 200, 300],
        |place| {
            place.chain();
        },
        |place| place.archive().lock()?.merge("1970-01-01T00-05-00Z", &|_| true).map(drop),
    );
}

#[test]
fn a_crash_while_old_ones_go_leaves_the_newest_whole() {
    crash_everywhere(
        &[100, 200],
        &[300],
        |place| {
            place.chain();
        },
        |place| place.archive().lock()?.keep(1, None, &|_| true).map(drop),
    );
}

#[test]
fn a_crash_while_the_order_is_recorded_leaves_the_checkpoint() {
    crash_everywhere(
        &[],
        &[100],
        |place| {
            place.save(&[1; PAGES], None, 100);
        },
        |place| {
            let order = FirstFaults::new(PAGES as u64, vec![Run::new(PageNo(4), 3)]).unwrap();
            place.archive().find(None)?.put_first_faults(&order)
        },
    );
}
