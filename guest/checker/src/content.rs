//! The content of every page of checked data: a function of its place, so that no other page can be taken for it.
//!
//! Word *i* (64 bits, little-endian) of page *p* in series *s* is `base(s, p) + i * STEP`, modulo 2^64. All words of
//! a page follow from its number: a page that is lost, stale, another's, torn or shifted by a byte differs. The
//! series is the round of a memory check, or one of the names below.

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;
/// The series of a disk's content; a page is 4 KiB of the disk.
pub(crate) const DISK: u64 = 1 << 32;
/// The series of a stream's content; a page is 4 KiB of the stream.
pub(crate) const STREAM: u64 = 2 << 32;
/// Files' content: the step that wrote a page is added to it.
pub(crate) const FILES: u64 = 3 << 32;

const WORD: usize = size_of::<u64>();
/// Odd, so that all words of a page differ.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The first word of a page.
fn base(series: u64, page: u64) -> u64 {
    mix(mix(series).wrapping_add(page))
}

/// The finalizer of `SplitMix64` (Steele, Lea, Flood 2014): a bijection in which every bit depends on every bit.
pub(crate) fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(STEP);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Writes a page's content into `bytes`.
pub(crate) fn fill(bytes: &mut [u8], series: u64, page: u64) {
    let mut word = base(series, page);
    for bytes in bytes.chunks_exact_mut(WORD) {
        bytes.copy_from_slice(&word.to_le_bytes());
        word = word.wrapping_add(STEP);
    }
}

/// Whether a page holds what it should.
pub(crate) fn is_right(bytes: &[u8], series: u64, page: u64) -> bool {
    let mut word = base(series, page);
    let mut difference = 0;
    for bytes in bytes.chunks_exact(WORD) {
        difference |= number(bytes) ^ word;
        word = word.wrapping_add(STEP);
    }
    difference == 0
}

/// Describes a wrong page for people: where it begins to differ, what is there, and which page's content that would
/// be.
pub(crate) fn difference(bytes: &[u8], series: u64, page: u64) -> String {
    let first = base(series, page);
    let expected = |word: usize| first.wrapping_add(STEP.wrapping_mul(word as u64));
    let wrong: Vec<usize> = (0..bytes.len() / WORD)
        .filter(|&word| number(&bytes[word * WORD..][..WORD]) != expected(word))
        .collect();
    let Some(&word) = wrong.first() else { return "nothing differs".to_owned() };
    let found = number(&bytes[word * WORD..][..WORD]);
    let origin = if bytes.iter().all(|&byte| byte == 0) {
        "zeroes"
    } else if series > 0 && is_right(bytes, series - 1, page) {
        "older"
    } else {
        "unknown"
    };
    format!(
        "page={page} series={series} words={} first={word} expected={:016x} found={found:016x} content={origin}",
        wrong.len(),
        expected(word)
    )
}

fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(series: u64, page: u64) -> Vec<u8> {
        let mut bytes = vec![0; PAGE];
        fill(&mut bytes, series, page);
        bytes
    }

    #[test]
    fn one_wrong_bit_anywhere_is_seen() {
        for bit in [0, 1, 63, 64, 8 * PAGE / 2, 8 * PAGE - 1] {
            let mut bytes = page(3, 17);
            assert!(is_right(&bytes, 3, 17));
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(!is_right(&bytes, 3, 17), "bit {bit}");
        }
    }

    #[test]
    fn no_page_passes_for_another() {
        for (series, number) in [(3, 18), (3, 16), (2, 17), (4, 17), (DISK, 17), (STREAM, 17)] {
            assert!(!is_right(&page(series, number), 3, 17), "series {series} page {number}");
        }
        let mut shifted = page(3, 17);
        shifted.rotate_left(WORD);
        assert!(!is_right(&shifted, 3, 17));
    }

    #[test]
    fn differences_say_whose_content_it_is() {
        assert!(difference(&[0; PAGE], 3, 17).contains("words=512 first=0"));
        assert!(difference(&[0; PAGE], 3, 17).ends_with("content=zeroes"));
        assert!(difference(&page(2, 17), 3, 17).ends_with("content=older"));
        let mut torn = page(3, 17);
        torn[PAGE - WORD..].fill(0xff);
        let said = difference(&torn, 3, 17);
        assert!(said.contains("words=1 first=511") && said.contains("found=ffffffffffffffff"), "{said}");
    }
}
