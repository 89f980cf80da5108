//! Waiting for events that give no sign: other processes' files, sockets and counters are looked at every 10 ms.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// Longest time that a test waits for anything: long enough for a slow and busy machine.
pub const DEADLINE: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(10);
/// For this long looks follow each other without a pause: most events come within microseconds.
const AT_ONCE: Duration = Duration::from_millis(1);

/// Waits until `look` gives something.
///
/// # Panics
/// If it takes longer than `limit`. The message has `what`, which may name what was seen last.
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

/// Waits until `look` gives something, no longer than [`DEADLINE`].
///
/// # Panics
/// If it takes longer.
pub fn wait_for<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    wait_until(DEADLINE, || what, look)
}

/// Waits until `holds` is true.
///
/// # Panics
/// If it takes longer than [`DEADLINE`].
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    wait_for(what, || holds().then_some(()));
}
