//! The source's session.

mod connect;
mod discovery;
mod filler;
mod handover;
mod order;
mod pace;
mod record;
mod rounds;
mod sender;
mod shipment;
mod tracker;

use std::rc::Rc;
use std::time::Duration;

use swapd::CommandError;

use crate::cancel::CancelFlag;
use crate::link::life::Life;
use crate::link::trouble::Trouble;
use crate::outside::{EngineHandle, Instant, Runtime, planted, runtime};
use crate::progress::{Phase, Progress};
use crate::report::Report;
use crate::session::SessionId;
use crate::tls::{Security, TlsError};
use crate::vm::{Expected, SourceVm, VmError};
use handover::said;
use pace::{Decision, Rules, Standing, decide};
use rounds::Rounds;

#[derive(Clone, Debug)]
pub struct SourceOptions {
    pub name: String,
    /// `HOST:PORT` of the target's daemon.
    pub to: String,
    pub security: Security,
    /// RAM that the VM shall have there; None: as the target likes.
    pub ram_bytes: Option<u64>,
    pub streams: u32,
    pub downtime_target: Duration,
    /// The VM is not stopped for longer: the migration gives up instead, as long as it may.
    pub max_downtime: Option<Duration>,
    pub max_rounds: u32,
    /// 0: never throttle.
    pub max_throttle: u8,
    /// Have the target measure how much of what the VM touches in the first second is in RAM.
    pub check_placement: bool,
    /// What the target needs to make the VM's machine, if that is not in its state.
    pub offer: Option<String>,
}

impl SourceOptions {
    /// With the defaults of `vmemd migrate`.
    pub fn new(name: impl Into<String>, to: impl Into<String>) -> SourceOptions {
        SourceOptions {
            name: name.into(),
            to: to.into(),
            security: Security::default(),
            ram_bytes: None,
            streams: 2,
            downtime_target: Duration::from_millis(50),
            max_downtime: None,
            max_rounds: 30,
            max_throttle: 99,
            check_placement: false,
            offer: None,
        }
    }
}

/// Why a VM did not move. Except for [`SendError::InDoubt`], it runs on at the source.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    #[error("cannot reach {to}: is `vmemd serve` running there?")]
    Unreachable { to: String, source: std::io::Error },
    /// It is not known to be the right one, or cannot be told in secret.
    #[error("{to} gets nothing")]
    Insecure { to: String, source: TlsError },
    #[error("{0}")]
    Options(String),
    #[error("no version in common: {0}")]
    Version(String),
    #[error("the target refused: {0}")]
    Refused(String),
    #[error("the target has no room: {0}")]
    NoRoom(String),
    #[error("the name is taken at the target: {0}")]
    NameTaken(String),
    #[error("the link to the target broke while {during}")]
    Link { during: &'static str, source: std::io::Error },
    /// The target said something that it must not say.
    #[error("the target sent rubbish: {0}")]
    Peer(String),
    /// The target gave up, and says why.
    #[error("the target gave up: {0}")]
    GaveUp(String),
    #[error("cancelled")]
    Cancelled,
    /// It would stand still, or did, for longer than it may.
    #[error("{0}")]
    Downtime(String),
    #[error("the VM failed")]
    Vm(#[from] VmError),
    #[error("the engine failed")]
    Engine(#[from] CommandError),
    /// The commit was sent and nothing is known of what became of it: the VM stays paused here, because it may
    /// run there. [`crate::resolve`] finds out.
    #[error(
        "the link broke during the hand-over and {to} does not answer: the VM stays paused here until \
             it is known whether it runs there (session {session})"
    )]
    InDoubt { session: SessionId, to: String },
}

impl SendError {
    /// Whether the VM runs on at the source. False: it is paused there, and may run at the target.
    pub fn still_here(&self) -> bool {
        !matches!(self, SendError::InDoubt { .. })
    }
}

impl From<Trouble> for SendError {
    fn from(trouble: Trouble) -> SendError {
        match trouble {
            Trouble::Link { during, source } => SendError::Link { during, source },
            Trouble::Peer(text) => SendError::Peer(text),
            Trouble::GaveUp(text) => SendError::GaveUp(text),
            Trouble::Cancelled => SendError::Cancelled,
            Trouble::Engine(error) => SendError::Engine(error),
            Trouble::Memory(source) => SendError::Link { during: "opening the store", source },
            Trouble::Unable(text) => SendError::Options(text),
        }
    }
}

/// Moves a running VM. Blocks; `progress` is called on this thread, several times a second.
///
/// # Errors
/// See [`SendError`]. Whatever it is, holds are released, write tracking is off and the throttle is undone.
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
    let _tracking = Tracking::start(handle)?;
    let life = Rc::new(Life::default());
    let session = connected.session;
    let rounds = runtime.block_on(async { Rounds::start(handle, connected, &life, cancel, progress) })?;
    let mut moving = Moving {
        runtime: &runtime,
        rounds,
        vm,
        options,
        session,
        started,
        throttle: 0,
        throttle_max: 0,
        unnamed: false,
        expected: Expected::default(),
    };
    let result = moving.run();
    // Whoever failed has told `life`; what the tasks say when their sockets are shut down comes too late to count.
    let Moving { rounds, vm, .. } = moving;
    let last_word = if result.is_err() { vm.ended().or_else(|| life.farewell()) } else { None };
    runtime.block_on(rounds.close(last_word));
    result.map_err(|failed| match failed {
        Failed::Trouble => life.take_trouble().unwrap_or(Trouble::Cancelled).into(),
        Failed::Said(error) => error,
    })
}

/// How a session fails: with a trouble that its `Life` has, or with something that is said as it is.
enum Failed {
    Trouble,
    Said(SendError),
}

/// Write tracking, for as long as this lives.
struct Tracking<'a>(&'a EngineHandle);

impl<'a> Tracking<'a> {
    fn start(handle: &'a EngineHandle) -> Result<Tracking<'a>, SendError> {
        handle.track_writes(true)?;
        Ok(Tracking(handle))
    }
}

impl Drop for Tracking<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.track_writes(false) {
            tracing::warn!(%error, "write tracking could not be ended");
        }
    }
}

/// A VM on the move, while it runs here.
struct Moving<'a, 'b> {
    runtime: &'a Runtime,
    rounds: Rounds<'a>,
    vm: &'b mut dyn SourceVm,
    options: &'a SourceOptions,
    session: SessionId,
    started: Instant,
    throttle: u8,
    throttle_max: u8,
    /// The VM's name is given up, though it runs here still.
    unnamed: bool,
    /// Of the VM itself, at the last look. Looked at before a round: pages are written meanwhile that nobody has counted.
    expected: Expected,
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

    /// Asks what of the downtime will be the VM's own. A VM whose state the target would not take is not stopped to find that out.
    fn look_ahead(&mut self) -> Result<(), Failed> {
        self.expected = self.vm.expected();
        match handover::too_large(self.expected.state_bytes) {
            Some(error) => Err(said(self, error)),
            None => Ok(()),
        }
    }

    fn standing(&self) -> Standing {
        Standing {
            rounds: self.rounds.round as u32,
            left_pages: self.rounds.left_pages(),
            sent_per_s: self.rounds.send_rate.per_s(),
            written_per_s: self.rounds.write_rate.per_s().unwrap_or(0.0),
            throttle: self.throttle,
            vm_cost: self.expected.time,
            state_bytes: self.expected.state_bytes,
            link_cost: self.rounds.link_cost(),
        }
    }

    /// A name is a file, and its directory may be on a slow disk: so it goes before the VM is stopped. What was written meanwhile counts.
    fn give_up_name(&mut self) -> Result<(), Failed> {
        self.unnamed = true;
        let given = self.vm.give_up_name(self.session);
        self.rounds.watch.resume();
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
        self.rounds.watch.resume();
        drained.map_err(|error| said(self, error))
    }

    fn set_throttle(&mut self, percent: u8) {
        if percent != self.throttle {
            self.vm.throttle(percent);
            self.throttle = percent;
            self.throttle_max = self.throttle_max.max(percent);
        }
    }

    /// Tells the session's `Life` of a trouble before anything else can.
    fn checked<T>(&self, result: Result<T, Trouble>) -> Result<T, Failed> {
        result.map_err(|trouble| {
            self.rounds.watch.failed(trouble);
            Failed::Trouble
        })
    }
}
