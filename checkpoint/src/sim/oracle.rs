//! Whether a checkpoint is what the guest had at the pause, page by page.

use std::rc::Rc;

use migrate::sim::engine::content;
use swapd::PageNo;
use swapd::digest::page_sum;
use xxhash_rust::xxh3::xxh3_64;

use super::coverage::{Cause, count};
use super::disk::{self, Page};
use super::story::Done;
use crate::format::PageKind;

/// A page of a VM that is restored.
enum Found {
    Zeros,
    Lost,
    Content(Rc<Page>),
}

fn restored(all: &[Done], nth: usize, page: PageNo) -> Found {
    let done = &all[nth];
    match done.map.kind(page) {
        PageKind::Zero => Found::Zeros,
        PageKind::Lost => Found::Lost,
        PageKind::Here => {
            Found::Content(done.page(page).unwrap_or_else(|| panic!("{page} is a hole in the image")))
        }
        PageKind::Base => restored(all, done.base.expect("it has pages in a base"), page),
    }
}

/// # Panics
/// If a checkpoint is not what the guest had.
pub(crate) fn check(all: &[Done], nth: usize) {
    let done = &all[nth];
    assert_eq!(done.map.pages(), done.truth.len() as u64);
    let mut pages = [0; 4];
    for (index, generation) in done.truth.iter().enumerate() {
        let page = PageNo(index as u64);
        let wanted = content(page, *generation);
        let (kind, has_content) = (done.map.kind(page), done.map.kind(page).has_content());
        pages[kind as usize] += 1;
        if has_content {
            let sum = done.map.sum(page);
            assert_eq!(
                sum,
                Some(page_sum(page, &wanted)),
                "{page}'s sum is not of what it was ({generation})"
            );
        }
        match restored(all, nth, page) {
            Found::Zeros => {
                assert!(!has_content, "{page} has no content in the base");
                assert!(wanted.iter().all(|byte| *byte == 0), "{page} is zeros, and was {generation}");
            }
            Found::Lost => {
                count(Cause::PageIsLost);
                assert!(done.lost.contains(&page), "{page} counts as lost, and was {generation}");
            }
            Found::Content(bytes) if *bytes == wanted => {}
            // What was not looked at is found by its sum when it is restored.
            Found::Content(bytes) => {
                let straight = all.iter().any(|done| done.saved.pages_shared > 0);
                let is_found = done.map.sum(page) != Some(page_sum(page, &*bytes));
                assert!(
                    done.lost.contains(&page) && straight && is_found,
                    "{page} is not what it was ({generation})"
                );
            }
        }
        if kind == PageKind::Base {
            count(Cause::PageIsInBase);
        }
        if kind != PageKind::Here && disk::makes_holes() {
            assert!(done.image.page(page.0).is_none(), "{page} has no content here, and the image has some");
        }
    }
    let counts = done.saved.pages;
    assert_eq!(counts, done.map.counts());
    assert_eq!([counts.zero, counts.here, counts.base, counts.lost], pages, "the kinds are miscounted");
    assert_eq!(done.saved.map_bytes, done.map_bytes.len() as u64);
    assert_eq!(done.saved.state_bytes, done.state_bytes);
}

/// A short account of all files.
pub(crate) fn digest(all: &[Done]) -> Vec<u64> {
    let files = all.iter().map(|done| {
        let pages = done.image.pages().into_iter().map(|(page, bytes)| page ^ xxh3_64(&*bytes));
        let parts = pages.chain([xxh3_64(&done.map_bytes), xxh3_64(&done.state)]);
        parts.fold(0, |all: u64, part| all.rotate_left(5) ^ part)
    });
    files.collect()
}
