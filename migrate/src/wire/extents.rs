//! The runs of pages that a record is about, and the checksums that go with them.
//!
//! A run is 8 bytes: start page x 4096 + length. It lies within one 2 MiB block, because a block's pages all
//! go over the same stream ([`stream_of`]): that is what keeps the versions of a page in order.

use swapd::{BLOCK_PAGES, PageNo, Run};

use super::WireError;

const LEN_BITS: u32 = 12;
/// First page number that a run cannot start at.
const MAX_PAGE: u64 = 1 << (64 - LEN_BITS);

const _: () = assert!(BLOCK_PAGES < 1 << LEN_BITS);

/// Which of `streams` data streams carries a page.
pub fn stream_of(page: PageNo, streams: u32) -> u32 {
    (page.block() as u64 % u64::from(streams)) as u32
}

/// One run, as on the wire.
///
/// # Panics
/// If the run is not within one block: a programmer's error.
pub fn encode(run: Run) -> [u8; 8] {
    assert!(run.len > 0 && run.start.block() == PageNo(run.end().0 - 1).block(), "{run:?} crosses a block");
    assert!(run.start.0 < MAX_PAGE, "{} has no place in a run", run.start);
    (run.start.0 << LEN_BITS | u64::from(run.len)).to_le_bytes()
}

/// What a receiver knows that pages must fit.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Of the VM's memory.
    pub memory_pages: u64,
    /// The data stream on which they come.
    pub stream: u32,
    /// How many data streams the session has.
    pub streams: u32,
}

impl Bounds {
    /// Decodes a record's runs into `runs`, which is emptied first. They must be `pages` pages together. Any order will
    /// do: a page that comes twice is replaced.
    pub fn decode(&self, bytes: &[u8], pages: u32, runs: &mut Vec<Run>) -> Result<(), WireError> {
        runs.clear();
        let mut total = 0_u64;
        let (words, rest) = bytes.as_chunks::<8>();
        if !rest.is_empty() {
            return Err(WireError::Lengths("runs"));
        }
        for word in words {
            let run = self.check(u64::from_le_bytes(*word))?;
            total += u64::from(run.len);
            runs.push(run);
        }
        if total == u64::from(pages) { Ok(()) } else { Err(WireError::Lengths("runs and pages")) }
    }

    fn check(&self, word: u64) -> Result<Run, WireError> {
        let (start, len) = (word >> LEN_BITS, (word & ((1 << LEN_BITS) - 1)) as u32);
        let end = start + u64::from(len);
        let in_block = start % u64::from(BLOCK_PAGES) + u64::from(len) <= u64::from(BLOCK_PAGES);
        if len == 0 || !in_block || end > self.memory_pages {
            return Err(WireError::BadRun { start, len, memory: self.memory_pages });
        }
        if stream_of(PageNo(start), self.streams) != self.stream {
            return Err(WireError::WrongStream { page: start, stream: self.stream });
        }
        Ok(Run::new(PageNo(start), len))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUNDS: Bounds = Bounds { memory_pages: 4096, stream: 1, streams: 2 };

    fn decoded(bounds: Bounds, runs: &[u8], pages: u32) -> Result<Vec<Run>, WireError> {
        let mut into = Vec::new();
        bounds.decode(runs, pages, &mut into).map(|()| into)
    }

    #[test]
    fn refusals_name_the_reason() {
        let word = |start: u64, len: u64| (start << LEN_BITS | len).to_le_bytes();
        let refused = |bytes: &[u8]| decoded(BOUNDS, bytes, 1).unwrap_err();
        assert!(matches!(refused(&word(512, 0)), WireError::BadRun { .. }));
        assert!(matches!(refused(&word(600, 500)), WireError::BadRun { .. }));
        assert!(matches!(refused(&word(1 << 51, 1)), WireError::BadRun { .. }));
        assert!(matches!(refused(&word(4607, 2)), WireError::BadRun { .. }));
        assert_eq!(refused(&word(5, 1)), WireError::WrongStream { page: 5, stream: 1 });
        assert!(matches!(refused(&word(600, 2)), WireError::Lengths(_)));
        assert!(matches!(refused(&[1; 7]), WireError::Lengths(_)));
    }

    proptest! {
        #[test]
        fn round_trip(blocks in prop::collection::btree_map(0_u64..4, (0_u32..512, 1_u32..512), 0..4)) {
            let runs: Vec<Run> = blocks.iter().map(|(block, (from, len))| {
                Run::new(PageNo((block * 2 + 1) * 512 + u64::from(*from)), (*len).min(512 - from))
            }).collect();
            let bytes: Vec<u8> = runs.iter().flat_map(|run| encode(*run)).collect();
            let pages = runs.iter().map(|run| run.len).sum();
            prop_assert_eq!(decoded(BOUNDS, &bytes, pages), Ok(runs));
        }

        #[test]
        fn arbitrary_bytes_never_panic_nor_pass_out_of_range(
            bytes in prop::collection::vec(any::<u8>(), 0..80), pages in 0_u32..2000,
        ) {
            if let Ok(runs) = decoded(BOUNDS, &bytes, pages) {
                prop_assert!(runs.iter().all(|run| run.end().0 <= 4096));
            }
        }
    }
}
