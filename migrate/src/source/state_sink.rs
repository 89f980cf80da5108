//! Where a VM writes its state: a part that is full goes to the wire while the rest is still being made.
//!
//! At most one part is held here, and the queue behind it holds a few: so a VM that makes its state faster than the
//! link carries it waits, and the memory that all of it takes has a bound whatever the state's size.

use std::io::{self, Write};

use super::session::Session;
use crate::limits::SILENCE_LIMIT;
use crate::link::control::Outbox;
use crate::link::error::SessionError;
use crate::link::guard::Guard;
use crate::outside::{Instant, Runtime, timeout_at};
use crate::vm::VmError;
use crate::wire::control::{Control, MAX_STATE_PART};

const DURING: &str = "sending the VM's state";

/// Why a state has not gone out.
pub(super) enum Unsent {
    /// The VM did not save it.
    Vm(VmError),
    /// The session has ended.
    Session(SessionError),
    /// The VM may stand still no longer.
    TooLong,
}

pub(super) struct StateSink<'a> {
    runtime: &'a Runtime,
    guard: &'a Guard<'a>,
    outbox: Outbox,
    /// When the VM has stood still for as long as it may.
    until: Option<Instant>,
    /// Most bytes that the target takes.
    most: Option<u64>,
    part: Vec<u8>,
    /// Where in the state the part begins.
    at: u64,
    trouble: Option<Unsent>,
}

/// Has the VM save its state, and sends it. The last of it may be in the queue still. Returns how many bytes it has.
pub(super) fn save(session: &mut Session<'_>, stopped_at: Instant) -> Result<u64, Unsent> {
    let Session { runtime, rounds, vm, options, state_most, .. } = session;
    let mut sink = StateSink {
        runtime,
        guard: &rounds.guard,
        outbox: rounds.control.outbox().clone(),
        until: options.max_downtime.map(|max| stopped_at + max),
        most: *state_most,
        part: Vec::new(),
        at: 0,
        trouble: None,
    };
    let saved = vm.save(&mut sink);
    // Of a VM that could not write because of the session, the session's trouble is told.
    match (sink.trouble.take(), saved) {
        (Some(trouble), _) => Err(trouble),
        (None, Err(error)) => Err(Unsent::Vm(error)),
        (None, Ok(())) => sink.ship(true).map(|()| sink.at),
    }
}

/// Why a state of so many bytes cannot move, if so.
pub(super) fn too_much(bytes: u64, most: Option<u64>) -> Option<VmError> {
    most.filter(|most| bytes > *most).map(|most| VmError::TooMuchState { bytes, most })
}

impl StateSink<'_> {
    /// Sends what there is. A part that is not the last is waited for until the kernel has it.
    fn ship(&mut self, last: bool) -> Result<(), Unsent> {
        let bytes = std::mem::take(&mut self.part);
        let at = self.at;
        self.at += bytes.len() as u64;
        if let Some(error) = too_much(self.at, self.most) {
            return Err(Unsent::Vm(error));
        }
        // The VM may have taken its time, and nobody has listened meanwhile.
        self.guard.resume();
        // A link that has broken takes parts at once, and they are nowhere: what ends the session must be looked for.
        self.guard.check(DURING).map_err(Unsent::Session)?;
        let part = Control::State { at, bytes, last };
        let way = async { if last { self.outbox.send(part).await } else { self.outbox.deliver(part).await } };
        let sent = self.runtime.block_on(async {
            let sent = self.guard.wait(DURING, SILENCE_LIMIT, way);
            match self.until {
                Some(until) => timeout_at(until, sent).await.ok(),
                None => Some(sent.await),
            }
        });
        sent.ok_or(Unsent::TooLong)?.map_err(Unsent::Session)?;
        self.guard.check(DURING).map_err(Unsent::Session)
    }
}

impl Write for StateSink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Whether a full part is the last one shows only now.
        if self.trouble.is_none()
            && !bytes.is_empty()
            && self.part.len() == MAX_STATE_PART
            && let Err(trouble) = self.ship(false)
        {
            self.trouble = Some(trouble);
        }
        if self.trouble.is_some() {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the session has ended"));
        }
        let count = bytes.len().min(MAX_STATE_PART - self.part.len());
        self.part.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
