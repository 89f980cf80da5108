//! vmemd's moving of a running VM's memory to another host: wire format, source and target sessions.
//!
//! ```text
//!  send ── connect ─▶ rounds (pace, heat) ──────────▶ handover        receive ── receiving ─▶ handover
//!                       │ reader ─▶ records ─▶ senders ══ data streams ══▶ intakes ─▶ sinks ─▶ engine
//!                       └──────────────────────────────── control ──────────┘
//! ```
//! Each side is one thread with a tokio-uring runtime, from [`send`] or [`receive`] to its return; the VM and the
//! engine's blocking calls are only used between two turns of that runtime. `docs/wire.md` has the protocol. The
//! [`reader`] stands by itself: it copies the memory of a running VM, and knows nothing of networks.

#![deny(missing_docs)]

mod bitmap;
mod cancel;
mod hello;
pub mod limits;
mod link;
mod outside;
pub mod pace;
mod progress;
pub mod reader;
mod region;
mod registry;
mod report;
mod resolve;
mod session;
#[cfg(any(test, feature = "sim"))]
#[allow(
    unreachable_pub,
    missing_debug_implementations,
    missing_docs,
    clippy::new_without_default,
    reason = "has the shape of what it stands for, and is for tests alone"
)]
pub mod sim;
mod source;
mod target;
pub mod tls;
pub mod versions;
mod vm;
mod wait;
pub mod wire;

pub use cancel::CancelFlag;
pub use hello::{read_hello, refuse};
pub use progress::{Phase, Progress};
pub use registry::{Begun, Committed, Kept, Outcome, Registry, RegistryError};
pub use report::{DowntimeParts, Placement, Received, Report};
pub use resolve::{ReachError, ResolveError, answer_resolve, resolve};
pub use session::SessionId;
pub use source::{SendError, SourceOptions, send};
pub use target::{DataStream, PlainMemory, ReceiveError, StateSpool, TargetLink, TargetMemory, receive};
pub use vm::{Expected, LiveVm, SourceVm, TargetVm, VmError};
pub use wait::Wait;
pub use wire::opening::{Hello, RefuseKind, SessionHello, StreamHello};
