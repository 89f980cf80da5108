//! How much a list of touches, and so a trace, can have.

use crate::optimum::WRITE;

/// Most touches of one list: 1 GiB of them.
pub(crate) const TOUCHES_MAX: u64 = 1 << 28;
/// Page numbers have 31 bits: 8 TiB.
pub(crate) const PAGES_MAX: u64 = 1 << 31;

const _: () = assert!(PAGES_MAX == WRITE as u64, "a page number and a bit fit 32 bits");
