//! Pages that could not leave, and for how long somebody has waited because of them.

use std::collections::VecDeque;

use crate::core::event::TICK_MS;
use crate::units::{PageNo, Run};

/// Somebody has waited for a frame in vain for so many ticks until that is told: 1 s.
const STARVED_TICKS: u64 = 10;

#[derive(Debug, Default)]
pub(crate) struct Pins {
    /// Pages that were given up, in order, each with the tick.
    given_up: VecDeque<(u64, Run)>,
    /// A victim was pinned since victims were chosen last.
    met: bool,
    /// The tick at which there was no victim to be found.
    none_at: Option<u64>,
    /// Ticks for which somebody has waited for a frame and nothing could leave.
    starved: u64,
    told: bool,
}

impl Pins {
    /// A victim could not leave.
    pub(crate) fn give_up(&mut self, page: PageNo, tick: u64) {
        self.met = true;
        match self.given_up.back_mut() {
            Some((given_up, run)) if *given_up == tick && run.end() == page => run.len += 1,
            _ => self.given_up.push_back((tick, Run::one(page))),
        }
    }

    /// Up to so many pages that were given up before this tick: they may be chosen again.
    pub(crate) fn next_again(&mut self, tick: u64, most: u32) -> Option<Run> {
        let (_, run) = self.given_up.front().copied().filter(|(given_up, _)| *given_up < tick && most > 0)?;
        self.given_up.pop_front();
        let again = run.part(0, run.len.min(most));
        if again.len < run.len {
            self.given_up.push_front((0, run.part(again.len, run.len - again.len)));
        }
        Some(again)
    }

    /// Victims are about to be chosen.
    pub(crate) fn look_anew(&mut self) {
        self.met = false;
    }

    pub(crate) fn met(&self) -> bool {
        self.met
    }

    /// All of memory has been looked at: before the next tick there will be none either.
    pub(crate) fn found_none(&mut self, tick: u64) {
        self.none_at = Some(tick);
    }

    pub(crate) fn may_find(&self, tick: u64) -> bool {
        self.none_at != Some(tick)
    }

    /// `stuck`: somebody waits for a frame, and has for so many ticks more, and nothing can leave.
    pub(crate) fn wait(&mut self, stuck: bool, ticks: u64) {
        self.starved = if stuck { self.starved + ticks } else { 0 };
    }

    /// Somebody has waited so for long enough.
    pub(crate) fn are_starving(&self) -> bool {
        self.starved >= STARVED_TICKS
    }

    /// True once, if that is to be told.
    pub(crate) fn tell(&mut self) -> bool {
        let tell = self.are_starving() && !self.told && !mutant!(StarvesInSilence);
        self.told |= tell;
        tell
    }

    /// It is over: true, if it had been told.
    pub(crate) fn end_telling(&mut self) -> bool {
        std::mem::take(&mut self.told)
    }

    pub(crate) fn starved_ms(&self) -> u64 {
        if self.told { self.starved * TICK_MS } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_given_up_come_again_from_the_next_tick_on_a_part_at_a_time() {
        let mut pins = Pins::default();
        (10..16).for_each(|page| pins.give_up(PageNo(page), 3));
        pins.give_up(PageNo(2), 4);
        assert_eq!(pins.next_again(3, 100), None);
        assert_eq!(pins.next_again(4, 4), Some(Run::new(PageNo(10), 4)));
        assert_eq!(pins.next_again(4, 0), None);
        assert_eq!(pins.next_again(4, 100), Some(Run::new(PageNo(14), 2)));
        assert_eq!((pins.next_again(4, 100), pins.next_again(5, 100)), (None, Some(Run::one(PageNo(2)))));
    }
}
