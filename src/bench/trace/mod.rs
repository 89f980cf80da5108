//! Which pages are touched in which order, apart from any machine: made from jobs, replayed on policies.
//!
//! A [`Touches`] is the list; `reference` has policies from the literature to compare with; `replay` runs them all and prints.

mod reference;
pub(crate) mod replay;
pub(crate) mod synthetic;
pub(crate) mod touches;
