//! How large a guest can be.

use vmprocess::size::Size;

/// Most vCPUs of a guest.
pub const VCPUS_MAX: u32 = 8;
/// Least memory of a guest.
pub const MEMORY_MIN: Size = Size(32 << 20);
/// Most memory of a guest: KVM takes 2^31 - 1 pages a slot, and page numbers have 32 bits.
pub const MEMORY_MAX: Size = Size(8 << 40);
/// Memory comes in multiples of the guest's own large pages.
pub const MEMORY_STEP: Size = Size(2 << 20);
