//! The content that tests write to pages and compare.

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Words of a page.
pub const WORDS: usize = PAGE / 8;

/// A word of a page's content: another one in every page, at every version and at every place in it.
pub fn word(page: u64, version: u64, nth: usize) -> u64 {
    (page << 32 | version).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(nth as u64)
}

/// One page, aligned for direct I/O.
#[derive(Debug)]
#[repr(align(4096))]
pub struct Aligned([u8; PAGE]);

impl Aligned {
    pub fn filled(byte: u8) -> Box<Self> {
        Box::new(Aligned([byte; PAGE]))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}
