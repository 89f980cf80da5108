//! How long to look for the next event before going to sleep.
//!
//! Waking a sleeping thread costs 10-40 µs where a read of the device takes 80: a loop that is fed every few tens of µs had
//! better stay awake. As KVM's halt polling does for vCPUs (Linux, Documentation/virt/kvm/halt-polling.rst), the time grows
//! while events come soon after the loop has gone to sleep, and shrinks when they do not. Unlike there, nobody tells us that
//! other threads want the processor; a yield that took long does.

/// Longest time: a read of the device and the guest's way to its next fault.
pub const SPIN_MAX_NS: u64 = 200_000;
/// First time.
const SPIN_MIN_NS: u64 = 10_000;
/// A yield that takes longer than this has run somebody else.
pub const YIELD_LONG_NS: u64 = 20_000;

/// How one wait went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wait {
    /// Events were there, or came while looking for them.
    Seen,
    /// Events came after so long in all, the loop having slept for them.
    Slept { ns: u64 },
    /// Others want the processor.
    Crowded,
}

/// The time, adapted by each wait.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spin {
    ns: u64,
}

impl Spin {
    pub fn ns(&self) -> u64 {
        self.ns
    }

    pub fn learn(&mut self, wait: Wait) {
        self.ns = match wait {
            Wait::Seen => self.ns,
            Wait::Slept { ns } if ns < SPIN_MAX_NS => (self.ns * 2).clamp(SPIN_MIN_NS, SPIN_MAX_NS),
            Wait::Slept { .. } | Wait::Crowded => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_with_events_that_come_soon_and_ends_with_those_that_do_not() {
        let mut spin = Spin::default();
        for _ in 0..10 {
            spin.learn(Wait::Slept { ns: 50_000 });
        }
        assert_eq!(spin.ns(), SPIN_MAX_NS);
        spin.learn(Wait::Seen);
        assert_eq!(spin.ns(), SPIN_MAX_NS);
        spin.learn(Wait::Slept { ns: 100_000_000 });
        assert_eq!(spin.ns(), 0, "an idle VM costs nothing");
        spin.learn(Wait::Slept { ns: 1000 });
        assert_eq!(spin.ns(), SPIN_MIN_NS);
        spin.learn(Wait::Crowded);
        assert_eq!(spin.ns(), 0);
    }
}
