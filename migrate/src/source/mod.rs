//! The source's session.

mod connect;
mod discovery;
mod error;
mod filler;
mod handover;
mod moving;
mod options;
mod order;
mod pace;
mod record;
mod rounds;
mod send_state;
mod sender;
mod state_sink;
mod tracker;

use std::rc::Rc;

use crate::cancel::CancelFlag;
use crate::link::error::SessionError;
use crate::link::state::SessionState;
use crate::outside::{EngineHandle, Instant, planted, runtime};
use crate::progress::{Phase, Progress};
use crate::report::Report;
use crate::vm::{Expected, SourceVm};
use crate::wire::control::state_limit;
use moving::{Failed, Moving, said};
use pace::{Decision, Rules, Standing, decide};
use rounds::Rounds;

pub use error::SendError;
pub use options::SourceOptions;

/// Moves a running VM. Blocks; `progress` is called on this thread, several times a second.
///
/// # Errors
/// See [`SendError`]. Whatever it is, holds are released, no writes are tracked for it and the throttle is undone.
pub fn send(
    handle: &EngineHandle,
    vm: &mut dyn SourceVm,
    options: &SourceOptions,
    progress: &dyn Fn(Progress),
    cancel: &CancelFlag,
) -> Result<Report, SendError> {
    let started = Instant::now();
    let memory_bytes = handle.memory_bytes();
    let waits = |wait| progress(Progress::waiting(Phase::Connecting, memory_bytes, wait));
    let connected = connect::connect(options, memory_bytes, &waits, cancel)?;
    let runtime = runtime().map_err(|error| SendError::Options(crate::target::no_ring(&error)))?;
    let dirty = handle.subscribe_dirty()?;
    let session_state = Rc::new(SessionState::default());
    let (session, state_most) = (connected.session, state_limit(connected.version));
    let rounds = runtime
        .block_on(async { Rounds::start(handle, dirty, connected, &session_state, cancel, progress) })?;
    let mut moving = Moving {
        runtime: &runtime,
        rounds,
        vm,
        options,
        session,
        state_most,
        started,
        throttle: 0,
        throttle_max: 0,
        unnamed: false,
        expected: Expected::default(),
    };
    let result = moving.run();
    // Whoever failed has told `life`; what the tasks say when their sockets are shut down comes too late to count.
    let Moving { rounds, vm, .. } = moving;
    let last_word = if result.is_err() { vm.ended().or_else(|| session_state.farewell()) } else { None };
    runtime.block_on(rounds.close(last_word));
    result.map_err(|failed| match failed {
        Failed::SessionError => session_state.take_error().unwrap_or(SessionError::Cancelled).into(),
        Failed::Said(error) => error,
    })
}

impl Moving<'_, '_> {
    fn run(&mut self) -> Result<Report, Failed> {
        let result = self.copy_and_converge().and_then(|standing| handover::run(self, &standing));
        if let Err(failed) = &result {
            self.set_throttle(0);
            let in_doubt = matches!(failed, Failed::Said(SendError::InDoubt { .. }));
            // Now that it goes on.
            if self.unnamed && !in_doubt && !planted!(ForgetsTheName) {
                self.vm.take_name_back();
            }
        }
        result
    }

    /// Rounds, until what is left fits the downtime. Says how things stand then.
    fn copy_and_converge(&mut self) -> Result<Standing, Failed> {
        let rules = Rules {
            downtime_target: self.options.downtime_target,
            max_downtime: self.options.max_downtime,
            max_rounds: self.options.max_rounds,
            max_throttle: self.options.max_throttle,
        };
        self.look_ahead()?;
        // What devices had begun before writes were tracked.
        self.drain()?;
        let first = self.runtime.block_on(self.rounds.first());
        self.checked(first)?;
        loop {
            let standing = self.standing();
            let decision = decide(&rules, &standing);
            tracing::debug!(?standing, ?decision, "a round has ended");
            match decision {
                Decision::Go { throttle } => {
                    self.set_throttle(throttle);
                    self.look_ahead()?;
                    self.drain()?;
                    let again = self.runtime.block_on(self.rounds.again(throttle));
                    self.checked(again)?;
                }
                Decision::Stop if self.unnamed => return Ok(standing),
                Decision::Stop => self.give_up_name()?,
                Decision::GiveUp => return Err(handover::too_long(self, &standing)),
            }
        }
    }

    /// Asks what of the downtime will be the VM's own. A VM whose state the target would not take (one of a former version) is not
    /// stopped to find that out.
    fn look_ahead(&mut self) -> Result<(), Failed> {
        self.expected = self.vm.expected();
        match state_sink::too_much(self.expected.state_bytes, self.state_most) {
            Some(error) => Err(said(self, error)),
            None => Ok(()),
        }
    }

    /// A name is a file, and its directory may be on a slow disk: so it goes before the VM is stopped. What was written meanwhile counts.
    fn give_up_name(&mut self) -> Result<(), Failed> {
        self.unnamed = true;
        let given = self.vm.give_up_name(self.session);
        self.rounds.guard.resume();
        given.map_err(|error| said(self, error))?;
        let looked = self.runtime.block_on(self.rounds.scan());
        self.checked(looked)
    }

    /// Has what was reported as written, or not tracked yet, get its last bytes from devices: then it can be sent.
    fn drain(&mut self) -> Result<(), Failed> {
        if planted!(SkipsTheDrains) {
            return Ok(());
        }
        let drained = self.vm.drain();
        self.rounds.guard.resume();
        drained.map_err(|error| said(self, error))
    }
}
