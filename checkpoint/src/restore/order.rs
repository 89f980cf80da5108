//! The order in which a restored VM's pages come ahead of any touch: that of an earlier restore, then by heat.

use std::cmp::Reverse;

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
    let known = image.first_faults().iter().copied();
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
}
