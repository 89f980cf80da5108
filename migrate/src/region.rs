//! Raw memory as a buffer of a ring operation.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::rc::Rc;

use swapd::PAGE_SIZE;
use tokio_uring::buf::{IoBuf, IoBufMut};

/// Some bytes that stay where they are for as long as `keep` lives. The operation owns it until it completes.
#[derive(Debug)]
pub struct Region<K> {
    at: NonNull<u8>,
    len: usize,
    keep: K,
}

impl<K> Region<K> {
    /// # Safety
    /// `len` initialised bytes from `at` must stay mapped while `keep` lives, and until the region is dropped nobody
    /// else may use them.
    pub(crate) unsafe fn new(at: *mut u8, len: usize, keep: K) -> Region<K> {
        let at = NonNull::new(at).expect("a region at address 0");
        Region { at, len, keep }
    }

    /// What has kept the bytes where they are, when the operation has ended.
    pub fn into_keep(self) -> K {
        self.keep
    }

    /// The bytes. Nobody else uses them, and with the region in hand no operation is in flight on them.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: initialised and ours alone by the contract of `new`.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the region is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }
}

// SAFETY: the bytes do not move with the struct, and they are initialised (contract of `new`).
unsafe impl<K: Unpin + 'static> IoBuf for Region<K> {
    fn stable_ptr(&self) -> *const u8 {
        self.at.as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.len
    }

    fn bytes_total(&self) -> usize {
        self.len
    }
}

// SAFETY: as above; all bytes count as initialised always, so there is no cursor to move.
unsafe impl<K: Unpin + 'static> IoBufMut for Region<K> {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.at.as_ptr()
    }

    unsafe fn set_init(&mut self, _pos: usize) {}
}

/// Page-aligned memory of a fixed length.
#[derive(Debug)]
pub(crate) struct Pages {
    at: NonNull<u8>,
    layout: Layout,
}

impl Pages {
    pub(crate) fn new(bytes: usize) -> Rc<Pages> {
        let layout = Layout::from_size_align(bytes, PAGE_SIZE).expect("a buffer's size is a small constant");
        assert!(bytes > 0, "an empty buffer");
        // SAFETY: the layout is not empty.
        let at = unsafe { alloc_zeroed(layout) };
        let at = NonNull::new(at).unwrap_or_else(|| handle_alloc_error(layout));
        Rc::new(Pages { at, layout })
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.at.as_ptr()
    }

    pub(crate) fn len(&self) -> usize {
        self.layout.size()
    }

    /// A part of it, for one operation.
    ///
    /// # Safety
    /// Nobody may use these bytes until the region is dropped.
    pub(crate) unsafe fn region(self: &Rc<Self>, from: usize, to: usize) -> Region<Rc<Pages>> {
        assert!(from <= to && to <= self.len(), "{from}..{to} of a buffer of {}", self.len());
        // SAFETY: within the allocation, which lives as long as the Rc; zeroed from the start; the rest is the caller's
        // promise.
        unsafe { Region::new(self.base().add(from), to - from, self.clone()) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.at.as_ptr(), self.layout) }
    }
}
