//! Little-endian writing and checked reading of the saved state.

use crate::vmm::error::VmmError;

/// Collects fields.
#[derive(Default)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    pub(super) fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.raw(&value.to_le_bytes());
    }

    /// A length of 32 bits, then that many bytes.
    pub(super) fn block(&mut self, bytes: &[u8]) {
        self.u32(bytes.len() as u32);
        self.raw(bytes);
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// Everything written, behind it its checksum.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let sum = checksum(&self.0);
        self.u64(sum);
        self.0
    }
}

/// Takes fields off the front.
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader(bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn raw(&mut self, bytes: usize) -> Result<&'a [u8], VmmError> {
        let (head, rest) = self.0.split_at_checked(bytes).ok_or(VmmError::BadState("it ends too early"))?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], VmmError> {
        Ok(self.raw(N)?.try_into().expect("raw gives the bytes asked for"))
    }

    pub(super) fn u32(&mut self) -> Result<u32, VmmError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, VmmError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn block(&mut self) -> Result<&'a [u8], VmmError> {
        let bytes = self.u32()? as usize;
        self.raw(bytes)
    }
}

/// FNV-1a, 64 bit (Fowler, Noll, Vo).
pub(super) fn checksum(bytes: &[u8]) -> u64 {
    const START: u64 = 0xcbf2_9ce4_8422_2325;
    const FACTOR: u64 = 0x100_0000_01b3;
    bytes.iter().fold(START, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(FACTOR))
}
