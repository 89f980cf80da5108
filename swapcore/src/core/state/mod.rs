//! The parts of the core's state: each of one concern, and none of them knows the core.

pub(crate) mod cold_hand;
pub(crate) mod dirty;
pub(crate) mod evictions;
pub(crate) mod frames;
pub(crate) mod io_end;
pub(crate) mod ios;
pub(crate) mod latch;
pub(crate) mod origin;
pub(crate) mod page_map;
pub(crate) mod pass;
pub(crate) mod pins;
pub(crate) mod receiving;
pub(crate) mod shrinking;
pub(crate) mod space;
pub(crate) mod tiers;
pub(crate) mod waiters;
pub(crate) mod walks;
