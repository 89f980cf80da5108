//! How stored pages come into an image without a look at them: the blocks are shared, or copied, or it cannot be done.

use std::cell::Cell;
use std::io;
use std::time::Duration;

use migrate::sim::engine::EngineHandle;
use migrate::sim::runtime::pause;
use migrate::sim::world::world;
use swapd::{CloneError, Cloned, Run, TierId};

use super::coverage::{Cause, count};
use super::disk::{self, File};

const STEP: Duration = Duration::from_millis(2);

/// What store and image can do together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    Shares,
    /// The kernel does.
    Copies,
    Refuses,
    Encrypted,
    /// Shares some, and then fails now and then.
    Breaks,
}

pub(crate) const WAYS: [Way; 5] = [Way::Shares, Way::Copies, Way::Refuses, Way::Encrypted, Way::Breaks];

thread_local!(static WAY: Cell<Way> = const { Cell::new(Way::Refuses) });

pub(crate) fn set_way(way: Way) {
    WAY.set(way);
}

pub struct StoredReader(EngineHandle);

pub(crate) fn stored_reader(handle: &EngineHandle) -> StoredReader {
    StoredReader(handle.clone())
}

impl StoredReader {
    pub fn any_may_block(&self, _: TierId) -> bool {
        false
    }

    pub fn clone_into(&self, tier: TierId, file: &File, runs: &[Run]) -> Result<Cloned, CloneError> {
        let fails = |code| Err(CloneError::Io { tier, source: io::Error::from_raw_os_error(code) });
        let way = WAY.get();
        match way {
            Way::Encrypted => return Err(CloneError::Encrypted),
            Way::Refuses => return fails(libc::EOPNOTSUPP),
            _ => {}
        }
        let mut cloned = Cloned::default();
        for page in runs.iter().flat_map(|run| run.pages()) {
            pause(world().delay(STEP));
            match disk::change() {
                Ok(()) => {}
                Err(disk::Error::Full) => return fails(libc::ENOSPC),
                Err(_) => return fails(libc::EIO),
            }
            if way == Way::Breaks && world().random.one_in(6) {
                count(Cause::CloneFails);
                return fails(libc::EIO);
            }
            let (bytes, can_be_read) = self.0.stored(page);
            if way == Way::Copies && !can_be_read {
                count(Cause::CloneFails);
                return fails(libc::EIO);
            }
            file.put(page.0, &bytes);
            if way == Way::Copies {
                count(Cause::PageIsCopied);
                cloned.copied += 1;
            } else {
                count(Cause::PageIsShared);
                cloned.shared += 1;
            }
        }
        Ok(cloned)
    }
}
