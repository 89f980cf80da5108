//! The VM as the session knows it: the guest, and who watches what is asked of it.

use std::cell::{Cell, RefCell};
use std::io::Write;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use migrate::sim::guest::{Chore, Guest};
use migrate::sim::world::world;
use migrate::{Expected, LiveVm, VmError};

use super::disk;
use super::faults::{Fault, Victims, When};
use crate::save::SaveError;

/// A VM is not kept standing still for longer, as the session promises; and what that may be late by.
const PAUSE_LIMIT: Duration = Duration::from_secs(60);
const LATE: Duration = Duration::from_secs(5);

pub(crate) struct Machine {
    pub(crate) guest: Rc<Guest>,
    /// What each page had when it stood still.
    at_pause: RefCell<Option<Vec<u64>>>,
    paused: Cell<Option<Duration>>,
    /// For how long it stood still, and saved its state meanwhile.
    stood: Cell<Duration>,
    saved_for: Cell<Duration>,
    /// Writes of the image that were under way when it was let go on.
    under_way: Cell<u32>,
    /// It did not go on when it was told to.
    stuck: Cell<bool>,
    strikes: RefCell<Vec<(Duration, Fault)>>,
    victims: RefCell<Option<Victims>>,
    cancelled_before: Cell<bool>,
}

impl Machine {
    pub(crate) fn new(guest: Rc<Guest>) -> Machine {
        Machine {
            guest,
            at_pause: RefCell::default(),
            paused: Cell::default(),
            stood: Cell::default(),
            saved_for: Cell::default(),
            under_way: Cell::default(),
            stuck: Cell::default(),
            strikes: RefCell::default(),
            victims: RefCell::default(),
            cancelled_before: Cell::default(),
        }
    }

    /// A session begins, in which this goes wrong.
    pub(crate) fn begin(&self, plan: Vec<(When, Fault)>, victims: Victims) {
        self.at_pause.take();
        self.paused.take();
        self.stood.take();
        self.saved_for.take();
        self.under_way.take();
        self.stuck.take();
        self.strikes.take();
        self.cancelled_before.take();
        for (when, fault) in plan {
            match when {
                When::AtPause(delay) => self.strikes.borrow_mut().push((delay, fault)),
                When::After(Duration::ZERO) => victims.strike(fault),
                When::After(time) => {
                    let victims = victims.clone();
                    world().after(time, move || victims.strike(fault));
                }
            }
        }
        *self.victims.borrow_mut() = Some(victims);
    }

    /// What each page had at the pause.
    pub(crate) fn at_pause(&self) -> Vec<u64> {
        self.at_pause.borrow().clone().expect("it was paused")
    }

    pub(crate) fn cancelled_before_pause(&self) -> bool {
        self.cancelled_before.get()
    }

    /// A session has ended: the VM is as it was before, and nothing is left of the session.
    pub(crate) fn check_end(&self, error: Option<&SaveError>, stop: bool) {
        let guest = &self.guest;
        guest.engine.assert_at_rest();
        assert_eq!(guest.throttle.get(), 0, "it stays throttled");
        assert!(
            self.stood.get() < PAUSE_LIMIT + self.saved_for.get() + LATE,
            "it stood for {:?}",
            self.stood.get()
        );
        match error {
            Some(SaveError::Vm(VmError::NotResumed(_))) => assert!(self.stuck.get(), "it did go on"),
            Some(_) => {
                assert!(!self.stuck.get(), "it did not go on, and nobody is told");
                assert_eq!(guest.runs.get(), !guest.stood_still, "it does not go on as before");
            }
            None => {
                assert!(!self.stuck.get(), "it did not go on, and nobody is told");
                assert_eq!(guest.runs.get(), !guest.stood_still && !stop, "it does not go on as it should");
                assert_eq!(self.under_way.get(), 0, "it went on before its last pages were written");
            }
        }
    }
}

impl LiveVm for &Machine {
    fn drain(&mut self) -> Result<(), VmError> {
        self.guest.drain()
    }

    fn pause(&mut self) -> Result<(), VmError> {
        assert!(self.paused.get().is_none(), "paused twice");
        self.paused.set(Some(world().now()));
        let victims = self.victims.borrow().clone().expect("a session has begun");
        self.cancelled_before.set(victims.cancel.load(Ordering::Relaxed));
        for (delay, fault) in self.strikes.take() {
            let victims = victims.clone();
            match delay {
                Duration::ZERO => victims.strike(fault),
                delay => world().after(delay, move || victims.strike(fault)),
            }
        }
        let paused = self.guest.pause();
        world().note(|| format!("the VM is paused: {paused:?}"));
        *self.at_pause.borrow_mut() = Some(self.guest.truth());
        paused
    }

    fn stood_still(&self) -> bool {
        self.guest.stood_still
    }

    fn resume(&mut self) -> Result<(), VmError> {
        let since = self.paused.get().expect("it goes on, and was not paused");
        self.under_way.set(disk::under_way());
        let resumed = self.guest.fails(Chore::Resume);
        self.stood.set(world().now() - since);
        world().note(|| format!("the VM goes on: {resumed:?}"));
        match resumed {
            Ok(()) => self.guest.runs.set(!self.guest.stood_still),
            Err(_) => self.stuck.set(true),
        }
        resumed
    }

    fn save(&mut self, to: &mut dyn Write) -> Result<(), VmError> {
        assert!(!self.guest.runs.get(), "its state is saved while it runs");
        let began = world().now();
        let saved = self.guest.save(to);
        self.saved_for.set(world().now() - began);
        saved
    }

    fn throttle(&mut self, percent: u8) {
        self.guest.throttle.set(percent);
    }

    fn expected(&mut self) -> Expected {
        let most = if world().random.one_in(3) { 200 } else { 5 };
        Expected {
            time: world().delay(Duration::from_millis(most)),
            state_bytes: world().random.below(1 << 20),
        }
    }
}
