//! Pages that could not leave, and for how long somebody has waited because of them.

use std::collections::VecDeque;

use crate::core::event::TICK_MS;
use crate::units::Run;

#[derive(Debug, Default)]
pub(crate) struct Pins {
    /// Pages that were given up, in order, each with the tick.
    pub(crate) given_up: VecDeque<(u64, Run)>,
    /// A victim was pinned since victims were chosen last.
    pub(crate) met: bool,
    /// The tick at which there was no victim to be found.
    pub(crate) none_at: Option<u64>,
    /// Ticks for which somebody has waited for a frame and nothing could leave.
    pub(crate) starved: u64,
    pub(crate) told: bool,
}

impl Pins {
    pub(crate) fn look_anew(&mut self) {
        self.met = false;
    }

    /// All of memory has been looked at: before the next tick there will be none either.
    pub(crate) fn found_none(&mut self, tick: u64) {
        self.none_at = Some(tick);
    }

    pub(crate) fn starved_ms(&self) -> u64 {
        if self.told { self.starved * TICK_MS } else { 0 }
    }
}
