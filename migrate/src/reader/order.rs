//! In which order blocks are read in the first round, and how hot a page is that was seen written: pure.
//!
//! Cold blocks come first. They are the least likely to be written again, and while they are read the scans find out
//! which pages are hot. Stored blocks are the coldest of all, and those that have been seen to change the hottest.

use std::cmp::Reverse;

/// What is known of a 2 MiB block before the first round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct BlockFacts {
    pub(super) block: u32,
    /// Some of it is in the store.
    pub(super) stored: bool,
    /// Mean heat of its pages.
    pub(super) heat: u8,
    /// How many looks have found that it had changed.
    pub(super) changes: u8,
    /// Pages of it that have ever been touched.
    pub(super) touched: u16,
}

/// Heat is only compared by powers of two, so that neighbours stay neighbours; what has none goes before what has any.
fn class(heat: u8) -> u32 {
    u8::BITS - heat.leading_zeros()
}

/// Heat of a page that was seen written is at least this, of all others less.
pub(super) const DIRTY_HEAT: u8 = 128;
/// How much each scan that saw a page written adds.
const SCAN_HEAT: u8 = 8;
/// Heat of the pages of a block that was seen to change, and of which no scan has told more: below `DIRTY_HEAT`.
const CHANGING_HEAT: u8 = 112;

/// The blocks in the order of the first round.
pub(super) fn first_round(mut blocks: Vec<BlockFacts>) -> Vec<u32> {
    sort(&mut blocks);
    blocks.into_iter().map(|facts| facts.block).collect()
}

fn sort(blocks: &mut [BlockFacts]) {
    blocks.sort_unstable_by_key(|facts| {
        (class(facts.changes), Reverse(facts.stored), class(facts.heat), facts.block)
    });
}

/// The blocks to be protected next, ascending: of those that nobody has touched all, which costs nothing, and of the
/// others the coldest, about so many pages. Blocks that change come by themselves: with others they would be protected
/// before they have to be.
pub(super) fn portion(mut blocks: Vec<BlockFacts>, pages: u64) -> Vec<u32> {
    sort(&mut blocks);
    let (mut portion, touched): (Vec<_>, Vec<_>) = blocks.into_iter().partition(|facts| facts.touched == 0);
    let change = touched.first().is_some_and(|first| first.changes > 0);
    let mut taken = 0;
    portion.extend(touched.into_iter().take_while(|facts| {
        let room = taken < pages && (facts.changes > 0) == change;
        taken += u64::from(facts.touched);
        room
    }));
    let mut blocks: Vec<_> = portion.into_iter().map(|facts| facts.block).collect();
    blocks.sort_unstable();
    blocks
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

/// The heat of a page of a block that was seen to change so often.
pub(super) fn raise_for_changes(heat: u8, changes: u8) -> u8 {
    if changes > 0 { heat.max(CHANGING_HEAT) } else { heat }
}

const _: () = assert!(CHANGING_HEAT < DIRTY_HEAT);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_portion_is_of_cold_blocks_and_of_changing_ones_only_when_those_are_left() {
        let facts = |block, changes, touched| BlockFacts { block, stored: false, heat: 0, changes, touched };
        let mut blocks =
            vec![facts(0, 9, 512), facts(1, 0, 0), facts(2, 0, 512), facts(3, 0, 100), facts(4, 1, 512)];
        assert_eq!(portion(blocks.clone(), u64::MAX), [1, 2, 3]);
        assert_eq!(portion(blocks.clone(), 512), [1, 2]);
        assert_eq!(portion(blocks.clone(), 513), [1, 2, 3]);
        blocks.retain(|facts| facts.changes > 0);
        assert_eq!(portion(blocks.clone(), 1), [4], "the one that changes less often");
        assert_eq!(portion(blocks.clone(), 1000), [0, 4]);
        assert_eq!(portion(vec![facts(7, 0, 0), facts(8, 3, 1)], 1), [7, 8]);
        assert_eq!(portion(Vec::new(), 1), [0; 0]);
        assert_eq!(first_round(blocks), [4, 0]);
    }

    #[test]
    fn stored_then_cold_then_hot_and_neighbours_together() {
        let facts = |block, stored, heat| BlockFacts { block, stored, heat, changes: 0, touched: 512 };
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
