//! The guest's memory, seen from the host: a raw range that somebody else owns.
//!
//! No reference into it is ever made (the guest changes it at any time), and every access may block for as long as
//! a page fault on it takes to be served.

use std::ptr;

/// A range of host memory that is the guest's RAM.
#[derive(Clone, Copy, Debug)]
pub(super) struct GuestMemory {
    base: *mut u8,
    bytes: u64,
}

// SAFETY: the pointer is only ever used for raw copies with checked bounds; who makes a ReferenceMachine promises that
// the range stays mapped while the ReferenceMachine lives, whatever thread it lives on.
unsafe impl Send for GuestMemory {}

impl GuestMemory {
    pub(super) fn new(base: *mut u8, bytes: u64) -> GuestMemory {
        GuestMemory { base, bytes }
    }

    pub(super) fn base(&self) -> *mut u8 {
        self.base
    }

    /// Copies bytes to an offset of guest memory.
    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        let end = offset.checked_add(data.len() as u64).expect("offset in guest memory overflows");
        assert!(end <= self.bytes, "write of {offset:#x}..{end:#x} ends beyond guest memory");
        // SAFETY: the range lies within guest memory (asserted), which is mapped and writable for the
        // ReferenceMachine's life; no reference to it exists, and the guest does not run while its image is written.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), self.base.add(offset as usize), data.len()) };
    }

    /// Stores a word at an offset of guest memory.
    pub(super) fn write_u64(&self, offset: u64, value: u64) {
        self.write(offset, &value.to_le_bytes());
    }
}
