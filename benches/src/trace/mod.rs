//! Which pages are touched in which order, apart from any machine: recorded, or made from jobs, and replayed on
//! policies.
//!
//! ```text
//!  job file ─┐                    ┌─▶ trace file ─▶ Touches
//!  synthetic ┼─▶ Touches ─▶ save ─┘                   │
//!            └───────────────────────────────────────▶ replay: the engine's core,
//!                                                           policies of the literature, the optimum
//!  running VM ─▶ faults ─▶ trace file (record)
//! ```

pub(crate) mod file;
mod limits;
pub(crate) mod record;
mod reference;
pub(crate) mod replay;
pub(crate) mod synthetic;
pub(crate) mod touches;
