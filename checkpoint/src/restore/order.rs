//! The order in which a restored VM's pages come ahead of any touch: that of an earlier restore, then by heat.

use std::cmp::Reverse;
use std::collections::HashMap;

use swapd::Run;

use super::image::Image;

/// Runs with content, in the order in which they are to come, and of no more pages than the budget has frames.
///
/// The first faults of an earlier restore know best. Behind them, and without them, the hottest come first, a part of a
/// block of 2 MiB at a time, because the device reads that as fast as a few pages of it. What is cold waits for a
/// touch: bringing it would fill the budget with what nobody needs.
pub fn order(image: &Image, budget_pages: u64) -> Vec<Run> {
    let mut parts: Vec<(u8, Run)> = Vec::new();
    for piece in image.stored() {
        for part in piece.run.blocks() {
            let skip = (part.start.0 - piece.run.start.0) as usize;
            let heat = piece.heat[skip..][..part.len as usize].iter().max().copied().unwrap_or(0);
            if heat > 0 {
                parts.push((heat, part));
            }
        }
    }
    // In the order of their addresses where the heat is the same: neighbours are read together.
    parts.sort_by_key(|(heat, _)| Reverse(*heat));
    let known = by_blocks(image.first_faults()).into_iter();
    let mut left = budget_pages;
    known
        .chain(parts.into_iter().map(|(_, part)| part))
        .map_while(|run| {
            let len = u64::from(run.len).min(left) as u32;
            left -= u64::from(len);
            (len > 0).then(|| run.part(0, len))
        })
        .collect()
}

/// All of a block of 2 MiB when its first page is wanted. A guest that touches memory at random has left an order of
/// single 64 KiB: brought one by one they take several times as long as they do together, and the last of them is there
/// sooner if none is waited for by itself.
fn by_blocks(runs: &[Run]) -> Vec<Run> {
    let mut nth_of: HashMap<usize, usize> = HashMap::new();
    let mut blocks: Vec<Vec<Run>> = Vec::new();
    for part in runs.iter().flat_map(|run| run.blocks()) {
        let nth = *nth_of.entry(part.start.block()).or_insert(blocks.len());
        if nth == blocks.len() {
            blocks.push(Vec::new());
        }
        blocks[nth].push(part);
    }
    let mut order: Vec<Run> = Vec::with_capacity(runs.len());
    for mut block in blocks {
        block.sort_by_key(|part| part.start);
        for part in block {
            match order.last_mut() {
                Some(last) if last.end() == part.start => last.len += part.len,
                _ => order.push(part),
            }
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::restore::image::tests::{image, run};

    #[test]
    fn known_first_then_hot_ones_and_never_more_than_the_budget() {
        let mut heat = vec![0; 2048];
        heat[600] = 3;
        heat[1500] = 9;
        let image = |first_faults| image(2048, &[run(0, 1024), run(1200, 800)], &heat, first_faults);
        let hot = [run(1200, 336), run(512, 512)];
        assert_eq!(order(&image(Vec::new()), 4096), hot);
        assert_eq!(order(&image(vec![run(16, 16)]), 4096), [run(16, 16), hot[0], hot[1]]);
        assert_eq!(order(&image(vec![run(16, 16)]), 20), [run(16, 16), run(1200, 4)]);
        assert_eq!(order(&image(vec![run(16, 16)]), 0), []);
    }

    #[test]
    fn what_was_touched_of_a_block_comes_with_the_first_of_it() {
        let touched = [run(1040, 16), run(64, 16), run(1024, 16), run(80, 16), run(500, 24), run(0, 16)];
        let expected = [run(1024, 32), run(0, 16), run(64, 32), run(500, 24)];
        assert_eq!(by_blocks(&touched), expected);
        assert_eq!(by_blocks(&[]), []);
    }
}
