//! The checksum that a page carries in the store, on the wire and in a checkpoint.
//!
//! XXH3 (64 bit, Collet, <https://xxhash.com>) of the page's bytes, mixed with its page number, so that a
//! page that comes back from another page's place does not pass.

use xxhash_rust::xxh3::xxh3_64;

use crate::units::{PAGE_SIZE, PageNo};

/// An odd constant, so that the mixing is a bijection of page numbers (2^64 divided by the golden ratio).
const PAGE_MIX: u64 = 0x9E37_79B9_7F4A_7C15;

/// Checksum of `bytes` (one page) as the content of `page`.
///
/// # Panics
/// If `bytes` is not one page.
pub fn page_sum(page: PageNo, bytes: &[u8]) -> u64 {
    assert_eq!(bytes.len(), PAGE_SIZE, "a checksum is of one whole page");
    xxh3_64(bytes) ^ page.0.wrapping_mul(PAGE_MIX)
}

/// Whether all of `bytes` (one page) is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Most pages differ from zero early: look at the first line before all of them.
    let (head, tail) = bytes.split_at(64);
    head.iter().all(|byte| *byte == 0)
        && tail.chunks_exact(64).all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_number_counts() {
        let bytes = [7; PAGE_SIZE];
        assert_ne!(page_sum(PageNo(1), &bytes), page_sum(PageNo(2), &bytes));
    }

    #[test]
    fn one_byte_anywhere_is_not_zero() {
        let mut bytes = [0; PAGE_SIZE];
        assert!(is_zero(&bytes));
        for at in [0, 63, 64, 2049, PAGE_SIZE - 1] {
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "byte {at}");
            bytes[at] = 0;
        }
    }
}
