//! Pages that are not what they should be.

use crate::content;

/// How many pages, of all that were checked, differed.
pub(crate) type Mismatched = u64;

/// Says which pages differ, the first few of them.
#[derive(Debug)]
pub(crate) struct Differences {
    mode: &'static str,
    pub(crate) count: Mismatched,
}

impl Differences {
    /// More than this many are counted only: the console is slow.
    const SHOWN: u64 = 8;

    pub(crate) fn none(mode: &'static str) -> Differences {
        Differences { mode, count: 0 }
    }

    pub(crate) fn check(&mut self, bytes: &[u8], series: u64, page: u64) {
        if content::is_right(bytes, series, page) {
            return;
        }
        self.count += 1;
        if self.count <= Differences::SHOWN {
            println!("checker {} mismatch {}", self.mode, content::difference(bytes, series, page));
        }
    }
}
