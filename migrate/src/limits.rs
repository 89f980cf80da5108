//! Every limit of this crate that is not part of the wire format: times, queues, shares.

use std::time::Duration;

/// How long connecting to the target may take.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// How long a connection may take to say what it is for.
pub const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// How long a target may take to accept (it may be starting an engine).
pub const ACCEPT_LIMIT: Duration = Duration::from_secs(60);
/// Nothing at all heard from the peer, or nothing taken by it, for this long: the link is broken.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(20);
/// A side that has nothing to say says so this often.
pub const ALIVE_EVERY: Duration = Duration::from_secs(4);
/// From the source's last word on memory to the target's `Prepared`.
pub const PREPARE_LIMIT: Duration = Duration::from_secs(60);
/// From the target's `Prepared` to the source's `Commit`; then the target discards the VM.
pub const COMMIT_LIMIT: Duration = Duration::from_secs(20);
/// From the source's `Commit` to the target's `Running`; then the source asks.
pub const RUNNING_LIMIT: Duration = Duration::from_secs(10);
/// How long the source asks what became of a commit before it leaves the VM paused and says so.
pub const RESOLVE_LIMIT: Duration = Duration::from_secs(60);
/// Between two such questions.
pub const RESOLVE_EVERY: Duration = Duration::from_millis(500);
/// How long one such question may take.
pub const RESOLVE_CALL_LIMIT: Duration = Duration::from_secs(5);
/// How long the target watches what the VM touches when the placement is to be checked.
pub const PLACEMENT_WINDOW: Duration = Duration::from_secs(1);
/// How much longer than that the source waits for the result.
pub const PLACEMENT_LIMIT: Duration = Duration::from_secs(10);
/// How often the cancel flag is looked at.
pub const CANCEL_POLL: Duration = Duration::from_millis(50);
/// How often the source asks its engine for written pages.
pub const SCAN_EVERY: Duration = Duration::from_millis(120);
/// How often the target hears, during the first round, what is known of heat by then.
pub const HEAT_EVERY: Duration = Duration::from_millis(750);
/// How long, from the beginning of a move, the source may watch what the VM writes before it moves on: a guest that needs longer to go once
/// around what it uses is not known in full.
pub const WATCH_LIMIT: Duration = Duration::from_secs(30);
/// How often the owner hears of progress.
pub const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// A limit on waiting for the peer as it holds in this process. Tests of what happens at its end cannot wait for minutes: in builds
/// with debug assertions, and only there, `VMEMD_TEST_HASTE=10` makes it a tenth.
pub fn patience(limit: Duration) -> Duration {
    #[cfg(debug_assertions)]
    {
        static HASTE: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
        let haste = || std::env::var("VMEMD_TEST_HASTE").ok()?.parse().ok();
        limit / *HASTE.get_or_init(|| haste().unwrap_or(1).max(1))
    }
    #[cfg(not(debug_assertions))]
    limit
}

const _: () = assert!(ALIVE_EVERY.as_secs() * 3 < SILENCE_LIMIT.as_secs());
const _: () = assert!(CANCEL_POLL.as_millis() < 100);
const _: () = assert!(COMMIT_LIMIT.as_secs() < RESOLVE_LIMIT.as_secs());
