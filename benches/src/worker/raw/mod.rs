//! The engine `raw`: the least device traffic that the jobs need, as fast as the device does it, with no memory behind it.
//!
//! Nobody can beat it, and nobody reaches it: it knows the future, and nothing is touched.
//! A sample of it counts as touches those that the traffic done stands for, by each thread's furthest completed operation, and as times
//! those of the device's reads and writes.

mod burst;
mod device;
mod plan;
mod run;

pub(super) use run::run;
