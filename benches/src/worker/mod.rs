//! One run of one engine: a process whose threads touch memory as the jobs say, and what that took.
//!
//! ```text
//!   books ─▶ memory ─▶ prefill ─▶ ramp ─▶ │ measured │ ─▶ sample ─▶ optimum
//! ```
//! All that the run needs for itself (its *books*) is allocated before the memory under test, because that may take
//! all of a cgroup's memory. All threads enter each phase together.

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
