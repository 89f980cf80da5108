//! What goes over the wire, byte by byte: see `docs/wire.md`.

/// The version of everything in this module. A peer of another version is refused.
pub const VERSION: u16 = 1;
