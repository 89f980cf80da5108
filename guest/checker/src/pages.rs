//! Memory in whole pages.

use crate::content;

/// Zeroed memory that begins at a page; the kernel gives the pages when they are first touched.
#[derive(Debug)]
pub(crate) struct PageBuffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl PageBuffer {
    pub(crate) fn new(len: usize) -> PageBuffer {
        let bytes = vec![0; len + content::PAGE];
        let start = bytes.as_ptr().align_offset(content::PAGE);
        PageBuffer { bytes, start, len }
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..][..self.len]
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_begins_at_a_page() {
        let mut memory = PageBuffer::new(3 * content::PAGE);
        assert_eq!(memory.as_slice().len(), 3 * content::PAGE);
        assert_eq!(memory.as_mut_slice().as_ptr() as usize % content::PAGE, 0);
    }
}
