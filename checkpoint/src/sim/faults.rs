//! What goes wrong in a session, and when.

use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use migrate::CancelFlag;
use migrate::sim::guest::{Chore, Guest};
use migrate::sim::world::world;

use super::coverage::{Cause, count};
use super::disk::{self, Error};

/// A session without a limit and without trouble takes about so long.
const SESSION: Duration = Duration::from_secs(2);
/// Longer than a VM is kept standing still for it.
const HANG_MAX_S: u64 = 100;
const ENGINE_AWAY: Duration = Duration::from_secs(5);
/// So many pages go in or out when the VM's budget changes.
const BUDGET_PAGES: u64 = 60;

#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    Disk { skip: u32, times: u32, error: Error },
    Hang(Duration),
    Fails(Chore),
    EngineFails,
    StoreIsAway(u64),
    Spoilt,
    Budget,
    Cancel,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum When {
    After(Duration),
    /// So long after the VM was told to stand still.
    AtPause(Duration),
}

/// What faults act on.
#[derive(Clone)]
pub(crate) struct Victims {
    pub(crate) guest: Rc<Guest>,
    pub(crate) cancel: Rc<CancelFlag>,
    /// The session is over: what comes now comes too late.
    pub(crate) over: Rc<std::cell::Cell<bool>>,
}

pub(crate) fn draw() -> Vec<(When, Fault)> {
    let random = &world().random;
    let mut plan = Vec::new();
    // One session in four has none, but for the budget.
    for _ in 0..random.pick(&[0, 1, 1, 2]) {
        let fault = match random.below(16) {
            0..=5 => Fault::Disk {
                skip: random.below(random.pick(&[3, 20, 60])) as u32,
                times: 1 + random.below(3) as u32,
                error: random.pick(&[Error::Broken, Error::Torn, Error::Full]),
            },
            6 | 7 => Fault::Hang(Duration::from_secs(1 + random.below(HANG_MAX_S))),
            8..=10 => Fault::Fails(random.pick(&[Chore::Drain, Chore::Pause, Chore::Save, Chore::Resume])),
            11 => Fault::EngineFails,
            12 => Fault::StoreIsAway(random.below(200)),
            13 => Fault::Spoilt,
            _ => Fault::Cancel,
        };
        plan.push((when(), fault));
    }
    for _ in 0..random.below(3) {
        plan.push((when(), Fault::Budget));
    }
    plan
}

fn when() -> When {
    match world().random.below(4) {
        0 => When::After(Duration::ZERO),
        1 => When::After(world().delay(SESSION)),
        2 => When::AtPause(Duration::ZERO),
        _ => When::AtPause(world().delay(Duration::from_millis(400))),
    }
}

impl Victims {
    pub(crate) fn strike(&self, fault: Fault) {
        if self.over.get() {
            return;
        }
        world().note(|| format!("{fault:?}"));
        match fault {
            Fault::Disk { skip, times, error } => disk::fail(skip, times, error),
            Fault::Hang(time) => disk::hang(time),
            Fault::Fails(chore) => self.guest.failing.set(Some(chore)),
            Fault::EngineFails => {
                count(Cause::EngineFails);
                self.guest.engine.fail(true);
                let engine = self.guest.engine.clone();
                world().after(ENGINE_AWAY, move || engine.fail(false));
            }
            Fault::StoreIsAway(reads) => {
                count(Cause::StoreIsAway);
                self.guest.engine.be_away(reads);
            }
            Fault::Spoilt => {
                self.guest.lose_some();
                if self.guest.has_lost() {
                    count(Cause::PageIsSpoilt);
                }
            }
            Fault::Budget => {
                count(Cause::BudgetChanges);
                (0..BUDGET_PAGES).for_each(|_| self.guest.wander());
            }
            Fault::Cancel => {
                count(if self.guest.runs.get() { Cause::Cancelled } else { Cause::CancelledWhilePaused });
                self.cancel.store(true, Ordering::Relaxed);
            }
        }
    }
}
