//! The receiving itself: which message may come when, and when the VM is complete.
//!
//! ```text
//!   heat ──▶ streams run ──(heat again)──▶ every stream's last round ended + state + final ──▶ complete
//! ```

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use swapd::{Placed, answered};
use tokio::sync::mpsc;

use super::accepted::{DataStream, TargetMemory};
use super::intake::{self, Intake, RoundEnd};
use super::ledger::Ledger;
use super::sink::{EngineSink, PlainSink, Sink, StreamInput};
use super::spool::{Spool, StateSpool};
use crate::limits::{CANCEL_POLL, PREPARE_LIMIT, SILENCE_LIMIT};
use crate::link::control::ControlLink;
use crate::link::error::SessionError;
use crate::link::guard::Guard;
use crate::link::{end, split};
use crate::outside::{Instant, JoinHandle, StdStream, sleep, spawn};
use crate::progress::{Phase, Progress};
use crate::wait::Wait;
use crate::wire::control::{Control, Totals};
use crate::wire::extents::Bounds;
use crate::wire::heat::{Assembly, Part};
use crate::wire::opening::{MAX_STREAMS, SessionHello};
use crate::wire::record::{Lane, Sequence};

/// A VM that is all here and does not run.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) state: Spool,
    pub(crate) placed: Placed,
    /// For the last pages to come to their places.
    pub(crate) took: Duration,
}

/// A session's receiving half. [`close`](Self::close) it, whatever happens.
pub(crate) struct Receiving<'a> {
    hello: &'a SessionHello,
    memory: &'a TargetMemory,
    pages: u64,
    ledger: Rc<RefCell<Ledger>>,
    /// Data streams that wait for the heat map.
    waiting: Vec<DataStream>,
    enders: Vec<StdStream>,
    tasks: Vec<JoinHandle<()>>,
    ends: mpsc::Receiver<RoundEnd>,
    ends_in: mpsc::Sender<RoundEnd>,
    rounds_done: u64,
    /// Streams on which the round behind those has ended.
    streams_ahead: u32,
    streams_done: u32,
    totals: Totals,
    heat: Assembly,
    state: Option<Spool>,
    state_complete: bool,
    announced: Option<Totals>,
}

impl<'a> Receiving<'a> {
    pub(crate) fn new(
        hello: &'a SessionHello,
        memory: &'a TargetMemory,
        streams: Vec<DataStream>,
        spool: StateSpool,
    ) -> Receiving<'a> {
        let pages = swapd::units::pages_in(hello.memory_bytes);
        let (ends_in, ends) = mpsc::channel(MAX_STREAMS as usize);
        Receiving {
            hello,
            memory,
            pages,
            ledger: Rc::new(RefCell::new(Ledger::new(pages))),
            waiting: streams,
            enders: Vec::new(),
            tasks: Vec::new(),
            ends,
            ends_in,
            rounds_done: 0,
            streams_ahead: 0,
            streams_done: 0,
            totals: Totals::default(),
            heat: Assembly::new(pages),
            state: Some(Spool::new(spool)),
            state_complete: false,
            announced: None,
        }
    }

    /// Receives until everything is here and in its place.
    pub(crate) async fn run(
        &mut self,
        control: &mut ControlLink,
        guard: &Guard<'_>,
        progress: &dyn Fn(Progress),
    ) -> Result<Arrived, SessionError> {
        const DURING: &str = "receiving the VM";
        while !self.is_complete() {
            guard.check(DURING)?;
            tokio::select! {
                biased;
                Some(ended) = self.ends.recv() => self.round_ended(ended, control, guard).await?,
                message = control.next() => self.message(message, control, guard).await?,
                () = guard.session_state.failure() => {}
                () = sleep(CANCEL_POLL) => progress(self.progress(guard)),
            }
        }
        let announced = self.announced.unwrap_or_default();
        self.ledger.borrow().check_complete(announced, self.totals)?;
        let began = Instant::now();
        let placed = match self.memory {
            TargetMemory::Engine(handle) => {
                let finished = answered(handle.finish_receiving_async());
                guard.wait("placing the last pages", PREPARE_LIMIT, finished).await??
            }
            TargetMemory::Plain(_) => self.ledger.borrow().placed_plain(),
        };
        let state = self.state.take().expect("it arrives once");
        Ok(Arrived { state, placed, took: began.elapsed() })
    }

    fn is_complete(&self) -> bool {
        self.announced.is_some() && self.state_complete && self.streams_done == self.hello.streams
    }

    async fn message(
        &mut self,
        message: Control,
        control: &ControlLink,
        guard: &Guard<'_>,
    ) -> Result<(), SessionError> {
        match message {
            Control::Heat(part) if !self.state_complete => self.heat_part(part, control, guard).await,
            Control::State { at, bytes, last } if !self.state_complete && self.has_started() => {
                let state = self.state.as_mut().expect("it is still coming");
                if at != state.bytes() {
                    return Err(SessionError::Peer(format!(
                        "VM state from byte {at} after byte {}",
                        state.bytes()
                    )));
                }
                state.push(&bytes)?;
                self.state_complete = last;
                Ok(())
            }
            Control::Final(totals) if self.state_complete && self.announced.is_none() => {
                self.announced = Some(totals);
                Ok(())
            }
            message => Err(SessionError::Peer(format!("{} at the wrong time", name(&message)))),
        }
    }

    fn has_started(&self) -> bool {
        self.waiting.is_empty()
    }

    async fn heat_part(
        &mut self,
        part: Part,
        control: &ControlLink,
        guard: &Guard<'_>,
    ) -> Result<(), SessionError> {
        let Some(map) = self.heat.add(part)? else { return Ok(()) };
        if let TargetMemory::Engine(handle) = self.memory {
            let answer = match self.has_started() {
                false => handle.start_receiving_async(map),
                true => handle.update_heat_async(map),
            };
            guard.wait("taking the heat map", SILENCE_LIMIT, answered(answer)).await??;
        }
        self.start_streams(guard)?;
        control.outbox().send(Control::HeatTaken).await;
        Ok(())
    }

    /// Nothing is read from a data stream before the first heat map is known.
    fn start_streams(&mut self, guard: &Guard<'_>) -> Result<(), SessionError> {
        for stream in std::mem::take(&mut self.waiting) {
            let (socket, ender) = split(stream.socket).map_err(SessionError::link("starting its streams"))?;
            self.enders.push(ender);
            let input = StreamInput {
                socket,
                session_state: guard.session_state.clone(),
                ledger: self.ledger.clone(),
            };
            let bounds =
                Bounds { memory_pages: self.pages, stream: stream.index, streams: self.hello.streams };
            let sequence = Sequence::new(self.hello.session, Lane::Stream(stream.index));
            let intake = Intake { bounds, sequence, ends: self.ends_in.clone() };
            let sink = match self.memory {
                TargetMemory::Engine(handle) => Sink::Engine(EngineSink::new(handle.clone())),
                TargetMemory::Plain(memory) => Sink::Plain(PlainSink::new(memory.clone())),
            };
            self.tasks.push(spawn(intake::run(input, intake, sink)));
        }
        Ok(())
    }

    /// Tells the source when a round has ended on every stream.
    async fn round_ended(
        &mut self,
        ended: RoundEnd,
        control: &ControlLink,
        guard: &Guard<'_>,
    ) -> Result<(), SessionError> {
        // A source starts a round when the last one is done: so no stream can run ahead without bound.
        if ended.round != self.rounds_done + 1 {
            return Err(SessionError::Peer(format!("the end of round {} too early", ended.round)));
        }
        if ended.last {
            self.streams_done += 1;
            self.totals += ended.totals;
        }
        self.streams_ahead += 1;
        if self.streams_ahead == self.hello.streams {
            self.streams_ahead = 0;
            self.rounds_done += 1;
            // The next round may be the last. In it no page shall wait for a frame whose content is still being
            // written.
            if let TargetMemory::Engine(handle) = self.memory
                && !ended.last
            {
                let settled = answered(handle.settle_receiving_async());
                guard.wait("waiting for the store", PREPARE_LIMIT, settled).await??;
            }
            control.outbox().send(Control::RoundDone { round: ended.round }).await;
        }
        Ok(())
    }

    fn progress(&self, guard: &Guard<'_>) -> Progress {
        let seen = swapd::units::bytes_of(self.ledger.borrow().seen());
        Progress {
            phase: if self.state_complete { Phase::Stopped } else { Phase::Copying },
            round: self.rounds_done as u32 + 1,
            bytes_total: self.hello.memory_bytes,
            bytes_done: seen,
            bytes_sent: guard.session_state.bytes_received(),
            bytes_left: self.hello.memory_bytes - seen,
            bytes_per_second: 0,
            throttle_percent: 0,
            waiting: guard.is_silent().then_some(Wait::Peer),
        }
    }

    /// Ends the data streams and waits until nothing is in flight on them.
    pub(crate) async fn close(self) {
        drop(self.ends);
        self.enders.iter().for_each(end);
        self.waiting.iter().for_each(|stream| end(&stream.socket));
        for task in self.tasks {
            if let Err(error) = task.await {
                std::panic::resume_unwind(error.into_panic());
            }
        }
    }
}

/// What a message is called in an error.
fn name(message: &Control) -> &'static str {
    match message {
        Control::Heat(_) => "a heat map",
        Control::State { .. } => "VM state",
        Control::Final(_) => "the end of the memory",
        Control::Commit { .. } => "a commit",
        Control::Alive => "a sign of life",
        Control::Abort(_) => "an abort",
        _ => "a message that only a target may send",
    }
}
