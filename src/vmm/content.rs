//! The content that a page of the guest must have: a function of its page number and its generation.
//!
//! Word i of page p in generation g is `base(p, g) + i * STEP`, modulo 2^64. `base` is a bijection on p + g * 2^32
//! (the finaliser of SplitMix64, Steele, Lea and Flood 2014), so no two pages and no two generations agree in a
//! word at the same place, and STEP is odd, so the 512 words of a page all differ. Generation 0 is a page that was
//! never written: zeros. The guest's own version of this is in `program.rs`; the tests hold them together.

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// 64-bit words of a page.
pub const PAGE_WORDS: usize = PAGE_BYTES / 8;
/// Difference between two neighbouring words of a page: 2^64 divided by the golden ratio, made odd.
pub(super) const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
/// First factor of the finaliser.
pub(super) const MIX_1: u64 = 0xBF58_476D_1CE4_E5B9;
/// Second factor of the finaliser.
pub(super) const MIX_2: u64 = 0x94D0_49BB_1331_11EB;

/// Word 0 of a page.
fn base(page: u32, generation: u32) -> u64 {
    let mut z = u64::from(generation) << 32 | u64::from(page);
    z = (z ^ (z >> 30)).wrapping_mul(MIX_1);
    z = (z ^ (z >> 27)).wrapping_mul(MIX_2);
    z ^ (z >> 31)
}

/// The word with that index (below [`PAGE_WORDS`]) of a page in a generation.
pub fn word(page: u32, generation: u32, index: usize) -> u64 {
    if generation == 0 { 0 } else { base(page, generation).wrapping_add(STEP.wrapping_mul(index as u64)) }
}

/// All words of a page in a generation, little-endian in memory.
pub fn page(number: u32, generation: u32) -> [u64; PAGE_WORDS] {
    std::array::from_fn(|index| word(number, generation, index))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn all_words_differ() {
        let mut seen = HashSet::new();
        for number in [1, 2, 3, 1 << 20, u32::MAX] {
            for generation in [1, 2, 3, u32::MAX] {
                seen.extend(page(number, generation));
            }
        }
        assert_eq!(seen.len(), 5 * 4 * PAGE_WORDS);
    }

    #[test]
    fn never_written_is_zero() {
        assert_eq!(page(7, 0), [0; PAGE_WORDS]);
        assert!(!page(7, 1).contains(&0));
    }
}
