//! What the seeds have reached: each cause of trouble, each kind of page, each ending.

use std::cell::RefCell;
use std::collections::BTreeMap;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Cause {
    WriteFails,
    WriteIsTorn,
    WriteIsShort,
    DiskIsFull,
    DiskHangs,
    HoleIsMade,
    CloneFails,
    PageIsShared,
    PageIsCopied,
    PageIsInBase,
    PageIsLost,
    PageIsSpoilt,
    BudgetChanges,
    EngineFails,
    StoreIsAway,
    Cancelled,
    CancelledWhilePaused,
    Throttled,
    Limited,
    Stopped,
    StoodStill,
    WithBase,
    WithClone,
    WithoutHoles,
    Encrypted,
    Named,
    CrashedBeforeTheName,
}

pub(crate) const CAUSES: [Cause; 27] = [
    Cause::WriteFails,
    Cause::WriteIsTorn,
    Cause::WriteIsShort,
    Cause::DiskIsFull,
    Cause::DiskHangs,
    Cause::HoleIsMade,
    Cause::CloneFails,
    Cause::PageIsShared,
    Cause::PageIsCopied,
    Cause::PageIsInBase,
    Cause::PageIsLost,
    Cause::PageIsSpoilt,
    Cause::BudgetChanges,
    Cause::EngineFails,
    Cause::StoreIsAway,
    Cause::Cancelled,
    Cause::CancelledWhilePaused,
    Cause::Throttled,
    Cause::Limited,
    Cause::Stopped,
    Cause::StoodStill,
    Cause::WithBase,
    Cause::WithClone,
    Cause::WithoutHoles,
    Cause::Encrypted,
    Cause::Named,
    Cause::CrashedBeforeTheName,
];

/// How sessions must have ended, some of them.
pub(crate) const ENDS: [&str; 12] = [
    "saved",
    "cancelled",
    "the checkpoint's image cannot be written: Input/output error",
    "the checkpoint's image cannot be written: No space left on device",
    "the checkpoint's state cannot be written",
    "the checkpoint's map cannot be written",
    "the VM has stood still for",
    "the VM failed: no Drain today",
    "the VM failed: no Pause today",
    "the VM failed: no Save today",
    "the VM failed: it could not be resumed",
    "the engine failed",
];

#[derive(Clone, Debug, Default)]
pub(crate) struct Coverage {
    causes: BTreeMap<Cause, u64>,
    ends: BTreeMap<String, u64>,
}

thread_local!(static COUNTED: RefCell<Coverage> = RefCell::default());

pub(crate) fn count(cause: Cause) {
    COUNTED.with_borrow_mut(|counted| *counted.causes.entry(cause).or_default() += 1);
}

pub(crate) fn count_end(how: String) {
    COUNTED.with_borrow_mut(|counted| *counted.ends.entry(how).or_default() += 1);
}

/// What was counted on this thread since the last time.
pub(crate) fn take() -> Coverage {
    COUNTED.take()
}

impl Coverage {
    pub(crate) fn add(&mut self, other: Coverage) {
        other.causes.into_iter().for_each(|(cause, count)| *self.causes.entry(cause).or_default() += count);
        other.ends.into_iter().for_each(|(how, count)| *self.ends.entry(how).or_default() += count);
    }

    pub(crate) fn missing(&self) -> Vec<String> {
        let causes = CAUSES.iter().filter(|cause| !self.causes.contains_key(cause));
        let ends = ENDS.iter().filter(|end| !self.ends.keys().any(|how| how.contains(**end)));
        causes.map(|cause| format!("{cause:?}")).chain(ends.map(ToString::to_string)).collect()
    }

    pub(crate) fn print(&self) {
        self.causes.iter().for_each(|(cause, count)| println!("  {count:>9}  {cause:?}"));
        println!("how sessions ended:");
        self.ends.iter().for_each(|(how, count)| println!("  {count:>9}  {how}"));
    }
}
