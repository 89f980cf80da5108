//! A map by page number.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::units::PageNo;

/// Page numbers are spread well by one multiplication.
#[derive(Default, Debug)]
pub struct PageHasher(u64);

impl Hasher for PageHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only page numbers are hashed");
    }

    fn write_u64(&mut self, page: u64) {
        self.0 = page.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_right(20);
    }
}

/// A map by page number.
pub type PageMap<T> = HashMap<PageNo, T, BuildHasherDefault<PageHasher>>;
