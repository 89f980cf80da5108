//! The stages in which the VM runs here: rounds, until what is left fits the downtime.

use super::downtime::too_long;
use super::error::SendError;
use super::session::{Failed, Session};
use super::state_sink::too_much;
use super::steps::Step;
use crate::outside::planted;
use crate::pace::{Decision, Rules, Standing, decide};
use crate::vm::Expected;

/// The VM runs here, perhaps throttled, and its memory is being copied.
pub(super) struct Copying<'a> {
    pub(super) session: Session<'a>,
    pub(super) throttle: u8,
    pub(super) throttle_max: u8,
    /// The VM's name is given up.
    unnamed: bool,
    /// Of the VM itself, at the last look. Looked at before a round: pages are written meanwhile that nobody has
    /// counted.
    expected: Expected,
}

/// The VM runs here without its name, and may be stopped: what is left fits, or no further round is allowed.
pub(super) struct Converged<'a> {
    pub(super) copying: Copying<'a>,
    /// How things stood then.
    pub(super) standing: Standing,
}

impl<'a> Copying<'a> {
    pub(super) fn new(session: Session<'a>) -> Copying<'a> {
        Copying { session, throttle: 0, throttle_max: 0, unnamed: false, expected: Expected::default() }
    }

    /// Copies in rounds, and gives up the VM's name.
    ///
    /// # Errors
    /// The VM stays here as it was.
    pub(super) fn converge(mut self) -> Result<Converged<'a>, SendError> {
        match self.copy() {
            Ok(standing) => Ok(Converged { copying: self, standing }),
            Err(failed) => Err(self.stay(failed)),
        }
    }

    /// The VM does not leave. It runs; what else was done to it is undone.
    pub(super) fn stay(mut self, failed: Failed) -> SendError {
        self.set_throttle(0);
        if self.unnamed && !planted!(ForgetsTheName) {
            self.session.vm.take_name_back();
        }
        self.session.fail(failed)
    }

    fn copy(&mut self) -> Result<Standing, Failed> {
        let options = self.session.options;
        let rules = Rules {
            downtime_target: options.downtime_target,
            max_downtime: options.max_downtime,
            max_rounds: options.max_rounds,
            max_throttle: options.max_throttle,
        };
        self.look_ahead()?;
        // What devices had begun before writes were tracked.
        self.drain()?;
        self.session.step(Step::Copy, |session| session.on_rounds(async |rounds| rounds.first().await))?;
        loop {
            let standing = self.standing();
            let decision = decide(&rules, &standing);
            tracing::debug!(?standing, ?decision, "a round has ended");
            match decision {
                Decision::Go { throttle } => {
                    self.set_throttle(throttle);
                    self.look_ahead()?;
                    self.drain()?;
                    self.session.step(Step::Converge, |session| {
                        session.on_rounds(async |rounds| rounds.again(throttle).await)
                    })?;
                }
                Decision::Stop if self.unnamed => return Ok(standing),
                Decision::Stop => self.give_up_name()?,
                Decision::GiveUp => return Err(too_long(&self.session, &standing)),
            }
        }
    }

    fn standing(&self) -> Standing {
        let rounds = &self.session.rounds;
        Standing {
            rounds: rounds.round as u32,
            remaining_pages: rounds.remaining_pages(),
            sent_per_s: rounds.send_rate.per_s(),
            stopped_per_s: rounds.send_rate.per_s(),
            dirty_per_s: rounds.dirty_per_s(),
            throttle: self.throttle,
            vm_cost: self.expected.time,
            state_bytes: self.expected.state_bytes,
            link_cost: rounds.link_cost(),
        }
    }

    pub(super) fn set_throttle(&mut self, percent: u8) {
        if percent != self.throttle {
            self.session.vm.throttle(percent);
            self.throttle = percent;
            self.throttle_max = self.throttle_max.max(percent);
        }
    }

    /// Asks what of the downtime will be the VM's own. A VM whose state the target would not take (one of a
    /// former version) is not stopped to find that out.
    fn look_ahead(&mut self) -> Result<(), Failed> {
        self.expected = self.session.vm.expected();
        match too_much(self.expected.state_bytes, self.session.state_most) {
            Some(error) => Err(self.session.vm_failed(error)),
            None => Ok(()),
        }
    }

    /// Frees the VM's name. A name is a file, and its directory may be on a slow disk: so it goes before the VM is
    /// stopped. What was written meanwhile counts.
    fn give_up_name(&mut self) -> Result<(), Failed> {
        self.unnamed = true;
        self.session.step(Step::GiveUpName, |session| {
            let given = session.vm.give_up_name(session.id);
            session.asked(given)?;
            session.on_rounds(async |rounds| rounds.scan().await)
        })
    }

    /// Waits until devices have written all that they had begun to write. Pages that were reported as dirty, or not
    /// tracked yet, have their last bytes then, and can be sent.
    fn drain(&mut self) -> Result<(), Failed> {
        if planted!(SkipsTheDrains) {
            return Ok(());
        }
        let drained = self.session.vm.drain();
        self.session.asked(drained)
    }
}
