//! Most touches and pages of a list of touches, and so of a trace.

use crate::optimum::WRITE;

/// Most touches of one list: they take 1 GiB.
pub(crate) const TOUCHES_MAX: u64 = 1 << 28;
/// Page numbers have 31 bits: 8 TiB.
pub(crate) const PAGES_MAX: u64 = 1 << 31;

const _: () = assert!(PAGES_MAX == WRITE as u64, "a page number and a bit fit 32 bits");
