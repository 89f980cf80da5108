//! The shared object that gives an unmodified QEMU its memory, loaded into it by `LD_PRELOAD`.
//!
//! ```text
//!   QEMU ── mmap, fallocate, madvise ──▶ interpose ─▶ backends ─▶ life ─▶ swapd (frames, store)
//!     ▲                                                            │
//!     └──────────────── QMP ◀── guest ◀── vmprocess (control socket, migration)
//! ```
//! It does nothing in a program that is not the QEMU of its settings. Its threads start when the first memory backend
//! is mapped (after QEMU has forked, if it does), take no signals, and end with the process.

#[cfg(test)]
#[macro_use]
extern crate testkit;

mod backends;
mod devices;
mod disks;
mod farewell;
mod generation;
mod guest;
mod images;
mod interpose;
mod inventory;
mod life;
mod ownership;
mod qmp;
mod restored;
mod runstate;
mod settings;
mod started;
mod throttle;
mod tuning;

use std::panic::catch_unwind;

/// Runs before QEMU's own `main`, when the process has one thread.
#[used]
#[unsafe(link_section = ".init_array")]
static BEGIN: extern "C" fn() = begin;

extern "C" fn begin() {
    // A panic has said what it is by now; a QEMU without its memory tier must not run.
    if catch_unwind(life::prepare).is_err() {
        std::process::abort();
    }
}

#[cfg(test)]
testkit::main!();
