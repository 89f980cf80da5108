//! How much heat the target is told: pure.
//!
//! The target places hot pages in RAM. If more pages were called hot than fit there, the word would mean nothing, and
//! chance would decide which of them get RAM.

use crate::limits::HOT_SHARE;

/// Hot pages that the target has room for, if the VM gets so many pages of RAM there.
pub(crate) fn hot_room(ram_pages: u64) -> u64 {
    (ram_pages as f64 * HOT_SHARE) as u64
}

/// Leaves heat only to the `pages` hottest; all others become cold.
pub(crate) fn keep_hottest(heat: &mut [u8], pages: u64) {
    let mut count = [0_u64; 256];
    heat.iter().for_each(|heat| count[usize::from(*heat)] += 1);
    let mut left = pages;
    let mut lowest = u8::MAX;
    while lowest > 0 && count[usize::from(lowest)] <= left {
        left -= count[usize::from(lowest)];
        lowest -= 1;
    }
    // Everything above `lowest` fits, and `left` pages of those with just this heat.
    for heat in heat.iter_mut().filter(|heat| **heat <= lowest) {
        if *heat == lowest && left > 0 {
            left -= 1;
        } else {
            *heat = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_hottest_stay_hot() {
        let kept = |pages| {
            let mut heat = [5, 0, 9, 5, 1, 5, 255];
            keep_hottest(&mut heat, pages);
            heat
        };
        assert_eq!(kept(0), [0; 7]);
        assert_eq!(kept(1), [0, 0, 0, 0, 0, 0, 255]);
        assert_eq!(kept(4), [5, 0, 9, 5, 0, 0, 255]);
        assert_eq!(kept(100), [5, 0, 9, 5, 1, 5, 255]);
    }
}
