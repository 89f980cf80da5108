//! What a VM's process does for a checkpoint of it: its memory goes into an image, live, and its state into a file.
//!
//! ```text
//!   first round ──▶ rounds over what was written ──▶ stopped: last round, state ──▶ runs on ──▶ holes, map
//!        │                      │                                │
//!        └──────────────────────┴── failed, cancelled: runs on as before ◀── nothing held, nothing tracked
//! ```
//! The rounds are those of [`migrate::reader`], and when the VM is stopped is decided by [`migrate::pace`]. What is
//! written is not made durable here, nor is it a checkpoint: that is up to whoever has the archive, when the VM runs on
//! already.
//!
//! Stored pages do not come into the guest for it. Where the file system can, the image shares the store's blocks;
//! else they are read beside the engine.

mod error;
mod image;
mod options;
mod pages;
mod rate;
mod report;
mod rounds;
mod session;
mod state;
mod stopwatch;

pub use error::SaveError;
pub use options::{Base, Files, SaveOptions};
pub use report::{PauseParts, Phase, Progress, Saved};
pub use session::{Failed, Rest};

use migrate::{CancelFlag, LiveVm};

use crate::outside::EngineHandle;

/// Writes a checkpoint of a VM into `files`. Blocks; `progress` is called on this thread, several times a second.
///
/// # Errors
/// See [`SaveError`]. Whatever it is, the VM goes on as before, no page is held, no writes are tracked for it and the
/// throttle is undone. What the files have by then is of no use. All that was being written has ended: of a disk that
/// does not answer, this waits for that without limit, which [`save_at_once`] does not.
pub fn save(
    handle: &EngineHandle,
    vm: &mut dyn LiveVm,
    files: Files,
    base: Option<Base>,
    options: &SaveOptions,
    progress: &dyn Fn(Progress),
    cancel: &CancelFlag,
) -> Result<Saved, SaveError> {
    save_at_once(handle, vm, files, base, options, progress, cancel).map_err(|failed| {
        failed.rest.into_iter().for_each(|rest| rest.close());
        failed.error
    })
}

/// The same, but for a failure: it is told at once, and what a disk still has of it is left to the caller.
///
/// # Errors
/// As [`save`].
pub fn save_at_once<'a>(
    handle: &EngineHandle,
    vm: &mut dyn LiveVm,
    files: Files,
    base: Option<Base>,
    options: &SaveOptions,
    progress: &'a dyn Fn(Progress),
    cancel: &'a CancelFlag,
) -> Result<Saved, Failed<'a>> {
    session::Session::start(handle, vm, files, base, options, (progress, cancel))?.run()
}
