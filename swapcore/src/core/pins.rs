//! Pages that cannot leave because something holds their frames: I/O under way for a moment, registered buffers
//! (io_uring, RDMA) for as long as they are registered.
//!
//! ```text
//!   victim ──pinned──▶ given up ──a later tick──▶ may be chosen again
//! ```
//! Others are chosen in its place at once. How many are tried again in a tick is bounded, so that a VM of which much is
//! pinned for good does not keep its engine busy with that. If all that could leave is pinned, whoever needs a frame
//! waits: that is told, with figures, and so is whoever waits for a smaller budget.

use super::Core;
use super::event::Action;
use crate::error::CommandError;
use crate::table::{Flag, PageState};
use crate::units::{PageNo, bytes_of};

/// Pages that may be chosen again in a tick: all of a budget of 8 GiB within some two minutes, for one percent of the
/// engine's time.
const AGAIN_A_TICK: u32 = 2048;
/// So many ticks without a frame less, and whoever waits for a smaller budget, or for pages to leave, is told so: 5 s.
const HELD_TICKS: u64 = 50;
/// The same while the store is at work: 30 s.
const WRITING_TICKS: u64 = 300;

impl Core {
    /// A victim could not leave.
    pub(super) fn give_up(&mut self, page: PageNo) {
        self.table.put(page, Flag::Pinned, true);
        self.pins.give_up(page, self.tick);
        self.evictions.refused(page);
    }

    /// Whether [`Core::make_ready`] is to be called again though nothing has happened.
    pub fn looks_for_others(&self) -> bool {
        self.pins.met()
    }

    pub(super) fn may_find_victims(&self) -> bool {
        let may_leave = self.table.count(PageState::Resident) > self.table.pinned();
        (may_leave && self.pins.may_find(self.tick)) || mutant!(RetriesPinnedAtOnce)
    }

    pub(super) fn tick_pins(&mut self, ticks: u64) {
        self.tell_short(ticks);
        self.tell_held();
        let mut left = if mutant!(NeverRetriesPinned) { 0 } else { AGAIN_A_TICK };
        while let Some(again) = self.pins.next_again(self.tick, left) {
            for page in again.pages() {
                self.table.put(page, Flag::Pinned, false);
                self.may_give_way(page);
            }
            left -= again.len;
        }
    }

    /// Somebody waits for a frame, no page is on its way out, and none can be.
    fn is_stuck(&self) -> bool {
        let outside = self.frames.at_hand_or_standby();
        self.waiters.any_deferred()
            && outside + self.leaving_soon() == 0
            && self.tiers.any_open()
            && self.receiving.is_none()
    }

    /// Somebody has waited for a frame, and nothing could leave, for long enough.
    pub(super) fn is_starved(&self) -> bool {
        self.pins.are_starving()
    }

    /// Pages on their way to tiers that take them.
    pub(super) fn leaving_soon(&self) -> u64 {
        let open = self.tiers.ids().filter(|tier| self.tiers.is_open(*tier));
        open.map(|tier| self.table.leaving_to(tier)).sum()
    }

    fn tell_short(&mut self, ticks: u64) {
        self.pins.wait(self.is_stuck(), ticks);
        // What a tier refuses, or does not end, is another matter, and told otherwise.
        if self.tiers.all_open() && self.pins.tell() {
            self.actions.push_back(Action::Short { pinned: self.table.pinned() });
        }
        if !self.waiters.any_deferred() && self.pins.end_telling() {
            self.actions.push_back(Action::Enough);
        }
    }

    fn patience(&self) -> u64 {
        if self.ios.writes() > 0 { WRITING_TICKS } else { HELD_TICKS }
    }

    /// Who waits for a smaller budget is told when it is not going to be kept any time soon.
    fn tell_held(&mut self) {
        if !self.shrinking.is_awaited() || mutant!(WaitsForPinnedForEver) {
            return;
        }
        // So that the figures are those of this moment.
        self.shrink_to_budget();
        if !self.shrinking.is_awaited() {
            return;
        }
        if self.shrinking.stuck_for(self.frames.taken(), self.tick) < self.patience() {
            return;
        }
        let [budget, held, pinned] =
            [self.frames.budget(), self.frames.taken(), self.table.pinned()].map(bytes_of);
        for ticket in self.shrinking.take() {
            let answer = Err(CommandError::StillAbove { budget, held, pinned });
            self.actions.push_back(Action::Answer { ticket, answer });
        }
    }

    /// Whoever wants something since that tick, which pinned pages are in the way of, has waited long enough.
    pub(super) fn has_waited_long(&self, since: u64) -> bool {
        self.tick - since >= self.patience()
    }
}

#[cfg(test)]
mod tests {
    use crate::core::{Core, CoreConfig, Event, PageOut, Request, Ticket, WalkStep};

    use super::*;
    use crate::units::Run;

    /// All moves out meet pinned pages; what else is to be done.
    fn all_pinned(core: &mut Core, event: Event<'_>) -> Vec<Action> {
        core.handle(event);
        let mut rest = Vec::new();
        loop {
            match core.next_action() {
                Some(Action::MoveOut { run, slots, .. }) => {
                    let pages = vec![PageOut::Pinned; run.len as usize];
                    core.handle(Event::MovedOut { run, slots, pages: &pages });
                }
                Some(Action::MoveIn { run, slots }) => {
                    core.handle(Event::MovedIn { run, slots, moved: run.len });
                }
                Some(other) => rest.push(other),
                None if core.is_walking() => core.handle(Event::Step),
                None => break,
            }
        }
        core.check();
        rest
    }

    /// A sample is taken in the event in which the answer is given: its pages are under way, and no less held for it.
    #[test]
    fn pages_that_are_tried_as_samples_count_as_held() {
        for sampled_at in 0..20 {
            let mut core = Core::new(CoreConfig {
                pages: 512,
                budget_frames: 256,
                budget_min: 48,
                slots: 512,
                blocks: 0,
                sampling: true,
                walk: WalkStep::default(),
            });
            let run = Run::new(PageNo(0), 100);
            run.pages().for_each(|page| drop(all_pinned(&mut core, Event::Fault(page))));
            // What has just been touched is left alone once; and samples come at other ticks in each turn.
            (0..=sampled_at).for_each(|_| drop(all_pinned(&mut core, Event::Tick { ticks: 1 })));
            let request = Event::Request { ticket: Ticket(1), request: Request::Evict(run) };
            let mut answer = all_pinned(&mut core, request);
            for _ in 0..2 * WRITING_TICKS {
                answer.retain(|action| matches!(action, Action::Answer { .. }));
                if !answer.is_empty() {
                    break;
                }
                answer = all_pinned(&mut core, Event::Tick { ticks: 1 });
            }
            assert!(
                matches!(
                    answer[..],
                    [Action::Answer { answer: Err(CommandError::Pinned { pages: 100 }), .. }]
                ),
                "{sampled_at}: {answer:?}"
            );
        }
    }
}
