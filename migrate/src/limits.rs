//! Every time limit of this crate, and whatever else bounds a session and is not part of the wire format. A number that
//! only one policy goes by stands beside that policy: `pace.rs`, `source/discovery.rs`, `reader/order.rs`.

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
/// Of a VM's state, what its target keeps in memory until it is loaded. The rest is in a file meanwhile.
pub const STATE_IN_MEMORY: usize = 64 << 20;
/// How long the next data stream of a session may take to be passed on to the process that receives the VM.
pub const STREAM_TIMEOUT: Duration = Duration::from_secs(20);
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
/// From the target's `Running` on, how long the source waits for the result of that.
pub const PLACEMENT_LIMIT: Duration = Duration::from_secs(11);
/// How long a session that ends waits for its last words to leave, or for the peer's to arrive.
pub(crate) const FAREWELL_LIMIT: Duration = Duration::from_millis(500);
/// How long it is tried to deliver what a session over TLS said last.
pub(crate) const LINGER_LIMIT: Duration = Duration::from_secs(5);
/// So many readings of a page must fail before it is given up as lost. Before each of them the store must have given
/// another page.
pub(crate) const BROKEN_TRIES: u32 = 4;
/// Between two readings of a page that is bad.
pub(crate) const REREAD_EVERY: Duration = Duration::from_millis(300);
/// A session waits between such readings no more often than this: a broken disk with a million bad pages would make it
/// wait for days.
pub(crate) const REREAD_WAITS: u32 = 32;
/// A store that gives nothing at all is waited for so long. Then the move ends, and the VM stays. Its pages do not
/// count as lost: of a store that is silent, nobody knows that.
pub(crate) const STORE_LIMIT: Duration = Duration::from_secs(10);
/// In the last round: between two looks at pages that the engine is just moving.
pub(crate) const MOVING_RETRY: Duration = Duration::from_micros(500);
/// How often they are looked at.
pub(crate) const MOVING_RETRIES: u32 = 20_000;
/// Between two looks whether a session's record is free.
pub(crate) const LOCK_RETRY: Duration = Duration::from_millis(20);
/// Messages of a control connection that wait to be written, or to be looked at.
pub(crate) const QUEUE: usize = 16;
/// The share of the VM's RAM at the target that is for hot pages. The rest is kept free to receive into.
pub(crate) const HOT_SHARE: f64 = 0.85;
/// How often the cancel flag is looked at.
pub const CANCEL_POLL: Duration = Duration::from_millis(50);
/// Between two scans for dirty pages at the source.
pub const SCAN_EVERY: Duration = Duration::from_millis(120);
/// Between two heat maps for the target during the first round, each with what is known by then.
pub const HEAT_EVERY: Duration = Duration::from_millis(750);
/// How long, from the beginning of a move, the source may watch what the VM writes before it moves on. A guest that
/// needs longer for one time around its working set is not known in full, and some of its pages are placed wrongly.
pub const WATCH_LIMIT: Duration = Duration::from_secs(30);
/// Between two reports of progress to the owner.
pub const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// A limit on waiting for the peer as it holds in this process. Tests of what happens at its end cannot wait for
/// minutes: in builds with debug assertions, and only there, `VMEMD_TEST_HASTE=10` makes it a tenth.
pub fn scaled_for_tests(limit: Duration) -> Duration {
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
const _: () = assert!(PLACEMENT_WINDOW.as_secs() * 2 < PLACEMENT_LIMIT.as_secs());
const _: () = assert!(FAREWELL_LIMIT.as_millis() < LINGER_LIMIT.as_millis());
const _: () = assert!(CANCEL_POLL.as_millis() < 100);
const _: () = assert!(COMMIT_LIMIT.as_secs() < RESOLVE_LIMIT.as_secs());
