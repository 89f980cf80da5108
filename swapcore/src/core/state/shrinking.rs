//! Who waits for a smaller budget to be kept.

use crate::core::event::Ticket;

#[derive(Debug, Default)]
pub(crate) struct Shrinking {
    waiters: Vec<Ticket>,
    /// The fewest frames since a budget was asked for last, and the tick at which they had become so few.
    fewest: u64,
    since: u64,
}

impl Shrinking {
    pub(crate) fn wait(&mut self, ticket: Ticket, taken: u64, tick: u64) {
        self.waiters.push(ticket);
        (self.fewest, self.since) = (taken, tick);
    }

    pub(crate) fn is_awaited(&self) -> bool {
        !self.waiters.is_empty()
    }

    /// They are answered.
    pub(crate) fn take(&mut self) -> Vec<Ticket> {
        std::mem::take(&mut self.waiters)
    }

    /// For how many ticks no frame has left, of so many that are taken.
    pub(crate) fn stuck_for(&mut self, taken: u64, tick: u64) -> u64 {
        if taken < self.fewest {
            (self.fewest, self.since) = (taken, tick);
        }
        tick - self.since
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_frame_that_leaves_begins_the_wait_anew() {
        let mut shrinking = Shrinking::default();
        shrinking.wait(Ticket(1), 100, 7);
        assert_eq!(shrinking.stuck_for(100, 20), 13);
        assert_eq!(shrinking.stuck_for(99, 30), 0);
        assert_eq!(shrinking.stuck_for(100, 42), 12, "one that came back is none that left");
        assert_eq!((shrinking.take(), shrinking.is_awaited()), (vec![Ticket(1)], false));
    }
}
