//! Linux's numbers of the errors that a store and a move meet. The core knows no libc; who links both asserts that they agree.

pub const EINTR: i32 = 4;
pub const EIO: i32 = 5;
pub const EAGAIN: i32 = 11;
pub const EBUSY: i32 = 16;
pub const EEXIST: i32 = 17;
pub const ENOSPC: i32 = 28;
