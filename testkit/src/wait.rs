//! Waiting for what gives no sign when it happens: other processes' files, sockets and counters are looked at again and again.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// How long anything that a test waits for may take on a slow, busy machine.
pub const DEADLINE: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(10);
/// The first looks follow each other at once: most of what is waited for is a matter of microseconds.
const AT_ONCE: Duration = Duration::from_millis(1);

/// Waits until `look` gives something.
///
/// # Panics
/// If it takes longer than `limit`; with what was waited for, which may tell what was seen last.
pub fn wait_until<T, W: Display>(
    limit: Duration,
    what: impl Fn() -> W,
    mut look: impl FnMut() -> Option<T>,
) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        let waited = begun.elapsed();
        assert!(waited < limit, "waited {limit:?} in vain for {}", what());
        if waited < AT_ONCE {
            std::thread::yield_now();
        } else {
            std::thread::sleep(POLL);
        }
    }
}

/// The same, no longer than [`DEADLINE`].
///
/// # Panics
/// If it takes longer.
pub fn wait_for<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    wait_until(DEADLINE, || what, look)
}

/// Waits until something holds.
///
/// # Panics
/// If it takes longer than [`DEADLINE`].
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    wait_for(what, || holds().then_some(()));
}
