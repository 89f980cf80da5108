//! How many frames are kept ready ahead of need, for a given budget.

/// Frames kept free at least, whatever the budget.
pub const LOW_MIN: u32 = 64;
/// Frames kept free at most: 4 MiB, two full prefetch windows and their faults.
pub const LOW_MAX: u32 = 1024;
/// One frame in this many is kept free.
pub const LOW_SHARE: u32 = 64;
/// One frame in this many waits in standby, where a touch rescues it without I/O.
pub const STANDBY_SHARE: u32 = 64;
/// Frames in standby at least, unless that is more than a sixteenth of the budget or a quarter of the slots.
pub const STANDBY_MIN: u32 = 128;

/// Reserve for a store that has failed, unused otherwise. While the store takes no writes, a few of these frames are
/// let go of a tick, so that an emulated vCPU (TCG), which can be stopped only behind the access that it is at, gets
/// there.
pub const RESERVE_MAX: u32 = 64;
/// One frame in this many at most.
pub const RESERVE_SHARE: u32 = 64;

/// Victims are chosen so many at a time.
pub const BATCH_MAX: u32 = 128;

/// All in frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watermarks {
    /// Below this many free frames, standby frames are taken.
    pub low: u32,
    /// Up to this many.
    pub high: u32,
    /// Pages that wait in standby.
    pub standby: u32,
    /// Victims are chosen when so many frames are missing from the goal.
    pub batch: u32,
    /// Kept for when the store fails.
    pub reserve: u32,
}

impl Watermarks {
    /// For a budget in frames, a memory of `pages` and a staging area of `slots`.
    pub fn of(budget: u64, pages: u64, slots: u32) -> Self {
        if budget >= pages {
            // Every page can have a frame of its own: nothing need ever leave.
            return Watermarks { low: 0, high: 0, standby: 0, batch: 1, reserve: 0 };
        }
        let share = |part: u32| u32::try_from(budget / u64::from(part)).unwrap_or(u32::MAX);
        // Whatever the budget, most slots are for pages that leave.
        let low_max = LOW_MAX.min(slots / 8);
        let low = share(LOW_SHARE).clamp(LOW_MIN.min(share(16)).min(low_max), low_max);
        let standby_max = slots / 4;
        let standby = share(STANDBY_SHARE).clamp(STANDBY_MIN.min(share(16)).min(standby_max), standby_max);
        let batch = BATCH_MAX.min((low + standby) / 2);
        let reserve = share(RESERVE_SHARE).min(RESERVE_MAX);
        Watermarks { low, high: low * 2, standby, batch, reserve }
    }

    /// Frames outside the guest that the engine aims for when memory is short.
    pub fn goal(&self) -> u32 {
        self.high + self.standby
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_budget_still_has_most_frames_in_the_guest() {
        let marks = Watermarks::of(4096, 8192, 2048);
        assert!(
            marks.low < marks.high && marks.goal() <= 4096 / 8 && marks.batch <= marks.goal(),
            "{marks:?}"
        );
    }

    #[test]
    fn a_budget_for_every_page_keeps_nothing_back() {
        assert_eq!(Watermarks::of(8192, 8192, 2048).goal(), 0);
    }
}
