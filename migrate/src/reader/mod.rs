//! The reader: copies a VM's memory while the VM runs, in rounds, and hands what it finds to a [`Sink`].
//!
//! ```text
//!   survey ──▶ blocks, coldest first ──▶ fillers ──▶ Sink: pages in a buffer · zeros · lost pages
//!                 ▲                         │
//!   next round ───┴── tracker ◀── scans ◀───┴── the guest writes meanwhile
//! ```
//! A migration is a reader whose sink makes records of the wire; whoever writes memory to a file hands in another sink.
//! So the reader must know nothing of where pages go: a `use` of a connection, of the wire or of a session from here
//! makes `scripts/circles` fail.
//!
//! A reader may have memory tracked *in portions*: each is a few blocks, which are tracked, and read right after that.
//! So what the guest writes most, and what comes last, is protected for as short a time as can be.
//!
//! The owner drives the reader, from one thread with a tokio-uring runtime. It says when a round begins, when to scan,
//! and when the VM stands still. The rules that keep a page from being missed are in `docs/dirty-pages.md`. The owner's
//! part of them: whatever devices write must have ended ([`LiveVm::drain`](crate::LiveVm::drain)) between a scan
//! and the round that follows, and the last scan comes after the VM has been stopped.

mod buffer;
mod dirty_rate;
mod error;
mod filler;
mod hold;
mod order;
mod rounds;
mod shared;
mod sink;
mod stored;
mod tracker;
mod watch;

// The real world, or the simulated one: whichever lies beside this module.
use super::outside;
pub use crate::region::Region;
pub use buffer::PageBuffer;
pub use error::ReadError;
pub use rounds::{FILLERS, Reader, Scanned};
pub use sink::{Closed, Found, MAX_RUNS, Sink, StoredRun};
