//! Decisions, each a value in and a value out: no I/O, no clock, no lock.

pub mod clock;
pub mod ghosts;
pub mod placement;
pub mod prefetch;
pub mod probation;
pub mod sampler;
pub mod watermarks;
