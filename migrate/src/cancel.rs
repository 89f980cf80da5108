//! A session can be cancelled from any thread, or a signal handler, by setting a flag.

use std::sync::atomic::{AtomicBool, Ordering};

/// Set to true to cancel. Looked at at least every [`crate::limits::CANCEL_POLL`].
pub type CancelFlag = AtomicBool;

pub(crate) fn is_cancelled(flag: &CancelFlag) -> bool {
    flag.load(Ordering::Relaxed)
}
