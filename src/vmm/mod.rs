//! The reference guest: a VM whose built-in program writes and verifies its own memory, so that a page which was
//! lost, stale, swapped or torn anywhere below it is noticed, with its number.
//!
//! The program runs in guest ring 3 alone and has no kernel, no devices and no interrupts (`docs/guest.md`). Its
//! memory belongs to somebody else, and any access to it may wait for a page fault to be served.

mod bytes;
mod config;
mod content;
mod counters;
mod error;
mod gate;
mod host;
mod image;
mod kick;
mod layout;
mod limits;
mod machine;
mod memory;
mod pace;
mod program;
mod registers;
pub(crate) mod state;
mod throttle;
mod vcpu;
mod vcpu_state;
mod workload;
pub mod zipf;

pub use config::MachineConfig;
pub use content::{PAGE_BYTES, PAGE_WORDS, page as page_content, word as page_word};
pub use counters::GuestCounters;
pub use error::VmmError;
pub use host::check_kvm;
pub use layout::overhead_bytes;
pub use limits::{MEMORY_MAX, MEMORY_MIN, MEMORY_STEP, VCPUS_MAX};
pub use machine::{ReferenceMachine, RunState};
pub use state::saved_config;
pub use throttle::THROTTLE_MAX;
pub use workload::{FillScope, Pattern, THETA_DEFAULT, THETA_MAX, Workload, WorkloadError};
