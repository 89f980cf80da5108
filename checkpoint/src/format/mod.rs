//! The files of a checkpoint, by themselves: what is in them, byte by byte, and what of it is refused.
