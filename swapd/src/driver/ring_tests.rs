//! The ring by itself: runs that lie in several files.

use std::fs::File;
use std::os::unix::fs::FileExt;

use memmap2::MmapMut;

use super::super::{mailbox::Mailbox, store};
use super::*;
use crate::origin::{LayerOf, Origin, OriginLayer};
use swapcore::units::{PageNo, Slot};

const PAGES: u64 = 64;

struct Rig {
    ring: Ring,
    paths: Vec<std::path::PathBuf>,
    // What the ring watches.
    _bells: [Mailbox; 2],
    _directory: testkit::TempDir,
}

/// Three layers in turn, two pages each; each byte of a page is its number.
fn rig() -> Rig {
    // Beside this program, and not where files may be in RAM: the store needs O_DIRECT.
    let here = std::env::current_exe().unwrap();
    let directory = testkit::directory_in(here.parent().unwrap(), "ring");
    let paths: Vec<_> = (0..3).map(|nth| directory.path().join(format!("layer-{nth}"))).collect();
    for (nth, path) in paths.iter().enumerate() {
        let file = File::create(path).unwrap();
        file.set_len(PAGES * PAGE_SIZE as u64).unwrap();
        for page in (0..PAGES).filter(|page| layer_of(*page) as usize == nth) {
            file.write_all_at(&[page as u8; PAGE_SIZE], page * PAGE_SIZE as u64).unwrap();
        }
    }
    let layers = paths.iter().map(|path| OriginLayer::open(path).unwrap()).collect();
    let origin =
        Origin { layers, layer_of: LayerOf::PerPage((0..PAGES).map(layer_of).collect()), cipher: None };
    let origin = Arc::new(Layers::check(origin, PAGES).unwrap());
    let store = Arc::new(store::open(directory.path(), PAGES * PAGE_SIZE as u64, 0).unwrap());
    let bells = [(); 2].map(|()| Mailbox::new().unwrap());
    let ring = Ring::new(store, Some(origin), bells[0].fd(), bells[1].fd()).unwrap();
    Rig { ring, paths, _bells: bells, _directory: directory }
}

fn layer_of(page: u64) -> u8 {
    (page / 2 % 3) as u8
}

impl Rig {
    /// Reads these pages in one operation, and says how that ended.
    fn read(&mut self, run: Run, into: &mut MmapMut) -> io::Result<()> {
        let slots = SlotRun::new(Slot(0), run.len);
        self.ring.read(IoId(5), TierId::ORIGIN, run, slots, into.as_mut_ptr() as usize);
        let mut completions = Vec::new();
        while completions.is_empty() {
            assert_eq!(self.ring.in_flight(), 1, "it is one operation");
            self.ring.wait(Duration::from_secs(10), &mut completions);
        }
        assert_eq!((completions.len(), self.ring.in_flight()), (1, 0));
        match completions.pop().unwrap() {
            Completion::Io { io: IoId(5), operation, result } => {
                assert_eq!(
                    (operation.tier, operation.run, operation.slots),
                    (TierId::ORIGIN, run, Some(slots))
                );
                result
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_run_over_several_layers_is_one_operation() {
    let mut rig = rig();
    let mut into = MmapMut::map_anon(PAGES as usize * PAGE_SIZE).unwrap();
    for run in [Run::one(PageNo(9)), Run::new(PageNo(3), 2), Run::new(PageNo(1), 62)] {
        into.fill(0xEE);
        rig.read(run, &mut into).unwrap();
        for (page, bytes) in run.pages().zip(into.chunks_exact(PAGE_SIZE)) {
            assert!(bytes.iter().all(|byte| u64::from(*byte) == page.0), "{page}");
        }
        assert!(into[run.bytes()..].iter().all(|byte| *byte == 0xEE));
    }
}

/// The frames are the operation's until all parts have ended, also when one has failed.
#[test]
fn a_part_that_fails_fails_the_operation_behind_the_others() {
    let mut rig = rig();
    let mut into = MmapMut::map_anon(PAGES as usize * PAGE_SIZE).unwrap();
    File::options().write(true).open(&rig.paths[1]).unwrap().set_len(0).unwrap();
    let run = Run::new(PageNo(0), 12);
    rig.read(run, &mut into).unwrap_err();
    for (page, bytes) in
        run.pages().zip(into.chunks_exact(PAGE_SIZE)).filter(|(page, _)| layer_of(page.0) != 1)
    {
        assert!(bytes.iter().all(|byte| u64::from(*byte) == page.0), "{page}");
    }
    rig.read(Run::new(PageNo(4), 2), &mut into).unwrap();
}

#[test]
fn a_tier_that_is_not_there_is_not_read() {
    let mut rig = rig();
    let read = || rig.ring.read(IoId(0), TierId(3), Run::one(PageNo(0)), SlotRun::new(Slot(0), 1), 0);
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)).unwrap_err();
    let said = panic.downcast_ref::<String>().unwrap();
    assert!(said.contains("tier 3, which this VM does not have"), "{said}");
}
