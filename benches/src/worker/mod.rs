//! One run of one engine: a process whose threads touch memory as the jobs say, and what that took.
//!
//! ```text
//!   books ─▶ memory ─▶ prefill ─▶ ramp ─▶ │ measured │ ─▶ sample ─▶ optimum
//! ```
//! Books come before the memory under test, which may be all that is left of a cgroup's. All threads go from phase to phase together.

mod areas;
mod clock;
mod content;
mod hindsight;
mod memory;
mod raw;
mod run;
mod touch;
mod usage;

pub(crate) use run::main;
