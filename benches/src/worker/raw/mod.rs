//! The engine `raw`: the least device traffic that the jobs need, as fast as the device does it, with no memory
//! behind it.
//!
//! No engine can be faster, and none reaches it: it knows the future, and touches no memory. In its sample, the
//! touches are those that the completed traffic stands for: of each thread, up to its furthest completed operation.
//! The times are those of the device's reads and writes.

mod burst;
mod device;
mod plan;
mod run;

pub(super) use run::run;
