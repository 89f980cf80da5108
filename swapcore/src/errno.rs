//! Linux's numbers of the errors that a store and a move meet. The core knows no libc; who links both asserts that they
//! agree.

/// A signal came first.
pub const EINTR: i32 = 4;
/// I/O failed; the kernel says nothing else.
pub const EIO: i32 = 5;
/// There is no such device, or it is off.
pub const ENXIO: i32 = 6;
/// Not now: try again.
pub const EAGAIN: i32 = 11;
/// The host has no memory for it.
pub const ENOMEM: i32 = 12;
/// Somebody holds it: of a page, I/O under way.
pub const EBUSY: i32 = 16;
/// There is one already.
pub const EEXIST: i32 = 17;
/// The device is gone.
pub const ENODEV: i32 = 19;
/// The host has no room for more open files.
pub const ENFILE: i32 = 23;
/// No room is left on the device.
pub const ENOSPC: i32 = 28;
/// The other end has closed.
pub const EPIPE: i32 = 32;
/// The block layer's word for a device that another host has reserved.
pub const EBADE: i32 = 52;
/// A timer of the device ran out.
pub const ETIME: i32 = 62;
/// The machine is on no network.
pub const ENONET: i32 = 64;
/// The path to the device is lost.
pub const ENOLINK: i32 = 67;
/// Sending to the other end failed.
pub const ECOMM: i32 = 70;
/// The network is down.
pub const ENETDOWN: i32 = 100;
/// There is no way to the network.
pub const ENETUNREACH: i32 = 101;
/// The network dropped the connection.
pub const ENETRESET: i32 = 102;
/// This host gave the connection up.
pub const ECONNABORTED: i32 = 103;
/// The other end reset the connection.
pub const ECONNRESET: i32 = 104;
/// The kernel has no room for another buffer.
pub const ENOBUFS: i32 = 105;
/// The connection was never made, or is gone.
pub const ENOTCONN: i32 = 107;
/// The other end has shut down.
pub const ESHUTDOWN: i32 = 108;
/// No answer came in time.
pub const ETIMEDOUT: i32 = 110;
/// Nobody listens at the other end.
pub const ECONNREFUSED: i32 = 111;
/// The other host is down.
pub const EHOSTDOWN: i32 = 112;
/// There is no way to the other host.
pub const EHOSTUNREACH: i32 = 113;
/// The server does not know the file any more.
pub const ESTALE: i32 = 116;
/// The user's share of the file system is used up.
pub const EDQUOT: i32 = 122;
/// There is no medium in the device.
pub const ENOMEDIUM: i32 = 123;
