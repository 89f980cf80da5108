//! In which order blocks are read in the first round, and how hot a page is that was seen written: pure.
//!
//! Cold blocks come first. They are the least likely to be written again, and while they are read the scans find out
//! which pages are hot. Stored blocks are the coldest of all.

use std::cmp::Reverse;

/// What is known of a 2 MiB block before the first round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct BlockFacts {
    pub(super) block: u32,
    /// Some of it is in the store.
    pub(super) stored: bool,
    /// Mean heat of its pages.
    pub(super) heat: u8,
}

/// Heat is only compared by powers of two, so that neighbours stay neighbours; what has none goes before what has any.
fn class(heat: u8) -> u32 {
    u8::BITS - heat.leading_zeros()
}

/// Heat of a page that was seen written is at least this, of all others less.
pub(super) const DIRTY_HEAT: u8 = 128;
/// How much each scan that saw a page written adds.
const SCAN_HEAT: u8 = 8;

/// The blocks in the order of the first round.
pub(super) fn first_round(mut blocks: Vec<BlockFacts>) -> Vec<u32> {
    blocks.sort_unstable_by_key(|facts| (Reverse(facts.stored), class(facts.heat), facts.block));
    blocks.into_iter().map(|facts| facts.block).collect()
}

/// Mean heat of a block.
pub(super) fn mean_heat(pages: &[u8]) -> u8 {
    let sum: u64 = pages.iter().map(|heat| u64::from(*heat)).sum();
    (sum / pages.len().max(1) as u64) as u8
}

/// The heat of a page, from the engine's knowledge of it and from how many scans saw it written.
pub(super) fn raise_for_scans(heat: u8, scans: u8) -> u8 {
    match scans {
        // What has any is never as cold as what has none.
        0 => (heat / 2).max(heat.min(1)),
        _ => {
            DIRTY_HEAT + (heat / 4).saturating_add(scans.saturating_mul(SCAN_HEAT)).min(u8::MAX - DIRTY_HEAT)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_then_cold_then_hot_and_neighbours_together() {
        let facts = |block, stored, heat| BlockFacts { block, stored, heat };
        let blocks = vec![
            facts(0, false, 200),
            facts(1, false, 3),
            facts(2, true, 90),
            facts(3, false, 0),
            facts(4, true, 1),
            facts(5, false, 201),
        ];
        assert_eq!(first_round(blocks), [4, 2, 3, 1, 0, 5]);
    }

    #[test]
    fn a_written_page_is_hotter_than_any_other() {
        assert!(raise_for_scans(0, 1) > raise_for_scans(255, 0));
        assert!(raise_for_scans(0, 3) > raise_for_scans(0, 1));
        assert_eq!([0, 1, 2, 255].map(|heat| raise_for_scans(heat, 0)), [0, 1, 1, 127]);
        assert_eq!(raise_for_scans(255, 255), 255);
        assert_eq!(mean_heat(&[0, 100]), 50);
    }
}
