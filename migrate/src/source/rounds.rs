//! The rounds of a source's session: drives the reader, keeps to the protocol of rounds and heat maps with the target,
//! and reports progress.

use std::rc::Rc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::connect::Connected;
use super::discovery::{Discovery, Stakes};
use super::hot_room;
use super::sender;
use super::streams::{RECORDS_PER_STREAM, SendState, Streams};
use crate::limits::{CANCEL_POLL, HEAT_EVERY, PROGRESS_EVERY, SILENCE_LIMIT};
use crate::link::control::ControlLink;
use crate::link::error::SessionError;
use crate::link::guard::Guard;
use crate::link::state::SessionState;
use crate::link::{end, split};
use crate::outside::{
    DirtySubscription, EngineHandle, Instant, JoinHandle, StdStream, planted, sleep, spawn,
};
use crate::pace::SendRate;
use crate::progress::{Phase, Progress};
use crate::reader::Reader;
use crate::wait::Wait;
use crate::wire::control::Control;
use crate::wire::heat;
use crate::wire::record::{Lane, Sequence};

/// Questions and answers while the VM stands still: the round's end, the word that all is there, the commit.
const QUESTIONS: u32 = 3;

const DURING: &str = "sending the VM's memory";

/// Everything of a session that is on the runtime. [`close`](Self::close) it, whatever happens.
pub(crate) struct Rounds<'a> {
    reader: Reader<Streams>,
    pub(crate) sent: Rc<SendState>,
    pub(crate) control: ControlLink,
    pub(crate) guard: Guard<'a>,
    /// Rounds done.
    pub(crate) round: u64,
    pub(crate) send_rate: SendRate,
    progress: &'a dyn Fn(Progress),
    phase: Phase,
    throttle: u8,
    waiting: Option<Wait>,
    senders: Vec<JoinHandle<()>>,
    enders: Vec<StdStream>,
    discovery: Discovery,
    /// Pages that are not cold, by all that is known. A heat of 1 does not count: it says only that the page is in RAM.
    warm_pages: u64,
    /// RAM that the VM gets at the target.
    room_pages: u64,
    began: Instant,
    last_heat: Instant,
    last_progress: Instant,
}

impl<'a> Rounds<'a> {
    /// Must be called on the runtime.
    pub(crate) fn start(
        handle: &EngineHandle,
        dirty: DirtySubscription,
        connected: Connected,
        session_state: &Rc<SessionState>,
        cancel: &'a crate::CancelFlag,
        progress: &'a dyn Fn(Progress),
    ) -> Result<Rounds<'a>, SessionError> {
        let link = SessionError::link("starting the streams");
        let session = connected.session;
        let sent = SendState::new(session_state, connected.streams.len());
        let directions = [Lane::ToSource, Lane::ToTarget];
        let control =
            ControlLink::start(connected.control, session, directions, session_state).map_err(&link)?;
        let guard = Guard::new(session_state.clone(), cancel, control.outbox().clone());
        let (mut outs, mut senders, mut enders) = (Vec::new(), Vec::new(), Vec::new());
        for (index, socket) in connected.streams.into_iter().enumerate() {
            let (socket, ender) = split(socket).map_err(&link)?;
            let (out, outgoing) = mpsc::channel(RECORDS_PER_STREAM);
            let sequence = Sequence::new(session, Lane::Stream(index as u32));
            senders.push(spawn(sender::run(sent.clone(), index, socket, sequence, outgoing)));
            outs.push(out);
            enders.push(ender);
        }
        let now = Instant::now();
        Ok(Rounds {
            reader: Reader::new(handle, dirty, Streams::new(sent.clone(), outs))?,
            sent,
            control,
            guard,
            round: 0,
            send_rate: SendRate::default(),
            progress,
            phase: Phase::Copying,
            throttle: 0,
            waiting: None,
            senders,
            enders,
            discovery: Discovery::default(),
            warm_pages: 0,
            room_pages: swapd::units::pages_in(connected.ram_bytes),
            began: now,
            last_heat: now,
            last_progress: now,
        })
    }

    /// The first round: the heat map, then pages that were never touched, then all others but those that are being
    /// written.
    pub(crate) async fn first(&mut self) -> Result<(), SessionError> {
        let heat = self.guard.wait("asking for heat", SILENCE_LIMIT, self.reader.ask_heat()).await??.to_vec();
        self.send_heat(heat).await?;
        while self.guard.wait(DURING, SILENCE_LIMIT, self.reader.survey()).await?? {}
        self.last_heat = Instant::now();
        self.reader.begin_first_round();
        self.send_measured().await?;
        self.send_known_heat().await?;
        self.scan().await?;
        self.watch_writes().await
    }

    /// After the first round: the VM runs on here and nothing is sent but heat, as long as the scans find more pages of
    /// its working set and the target has a use for that ([`Discovery`]).
    async fn watch_writes(&mut self) -> Result<(), SessionError> {
        if !self.discovery.goes_on(self.began.elapsed(), &self.stakes()) {
            return Ok(());
        }
        while self.discovery.goes_on(self.began.elapsed(), &self.stakes()) {
            self.waiting = Some(Wait::Writes);
            self.guard.check(DURING)?;
            tokio::select! {
                biased;
                word = self.control.next() => {
                    return Err(SessionError::Peer(format!("{word:?} while the VM was watched")));
                }
                () = self.guard.session_state.failure() => {}
                () = sleep(CANCEL_POLL) => {}
            }
            if self.reader.scan_is_due() {
                self.scan().await?;
            }
            if self.last_heat.elapsed() >= HEAT_EVERY {
                self.send_known_heat().await?;
            }
            self.report_if_due();
        }
        self.send_known_heat().await
    }

    fn stakes(&self) -> Stakes {
        Stakes {
            memory: swapd::units::pages_in(self.reader.memory_bytes()),
            room: self.room_pages,
            warm: self.warm_pages,
            around: self.reader.pages_around_dirty(),
            most: Wait::Writes.limit().1,
        }
    }

    /// Sends a better heat map: the scans have found more dirty pages, and those are hot. Some of them were sent as
    /// cold ones before; the target keeps room in RAM for them.
    async fn send_known_heat(&mut self) -> Result<(), SessionError> {
        let known = self.reader.known_heat();
        self.warm_pages = known.iter().filter(|heat| **heat > 1).count() as u64;
        self.send_heat(known).await?;
        self.last_heat = Instant::now();
        Ok(())
    }

    /// A later round: the pages that scans have found dirty before it.
    pub(crate) async fn again(&mut self, throttle: u8) -> Result<(), SessionError> {
        if throttle != self.throttle {
            self.throttle = throttle;
            self.reader.forget_dirty_rate();
        }
        self.reader.begin_round();
        self.report();
        self.send_measured().await?;
        self.scan().await
    }

    /// The last round, while the VM stands still: leaves nothing.
    pub(crate) async fn last(&mut self) -> Result<(), SessionError> {
        self.guard.resume();
        if !planted!(SkipsTheLastScan) {
            self.scan().await?;
        }
        self.reader.begin_last_round();
        self.send_round().await?;
        self.end_round(true).await
    }

    /// Sends a heat map, and waits until the target has taken it: pages that come after it are placed by it.
    async fn send_heat(&mut self, mut heat: Vec<u8>) -> Result<(), SessionError> {
        hot_room::keep_hottest(&mut heat, hot_room::hot_room(self.room_pages));
        for part in heat::parts(&heat) {
            let sent = self.control.outbox().send(Control::Heat(part));
            self.guard.wait("sending the heat map", SILENCE_LIMIT, sent).await?;
        }
        self.expect(Control::HeatTaken, Wait::Heat).await
    }

    async fn expect(&mut self, word: Control, wait: Wait) -> Result<(), SessionError> {
        let said = self.receive_word(wait).await?;
        if said == word { Ok(()) } else { Err(SessionError::Peer(format!("{said:?} instead of {word:?}"))) }
    }

    /// The target's next word.
    pub(crate) async fn receive_word(&mut self, wait: Wait) -> Result<Control, SessionError> {
        self.receive_word_later(wait, Duration::ZERO).await
    }

    /// The same, with more time than the wait's own limit: for what takes the longer the more there is of it.
    pub(crate) async fn receive_word_later(
        &mut self,
        wait: Wait,
        more: Duration,
    ) -> Result<Control, SessionError> {
        self.waits(Some(wait));
        let said = self.guard.wait_for(wait, more, self.control.next()).await;
        self.waits(None);
        said
    }

    /// Notes what is waited for, and reports it.
    pub(crate) fn waits(&mut self, wait: Option<Wait>) {
        self.waiting = wait;
        self.report();
    }

    /// Sends a round that is not the last, and notes how fast the link was.
    async fn send_measured(&mut self) -> Result<(), SessionError> {
        let (began, before) = (Instant::now(), self.reader.pages_given());
        self.send_round().await?;
        self.end_round(false).await?;
        self.send_rate.round(self.reader.pages_given() - before, began.elapsed());
        Ok(())
    }

    /// Sends all pages of the round that has begun, and scans meanwhile.
    async fn send_round(&mut self) -> Result<(), SessionError> {
        loop {
            self.guard.check(DURING)?;
            tokio::select! {
                biased;
                more = self.reader.step() => if !more? {
                    return self.guard.check(DURING);
                },
                word = self.control.next() => {
                    return Err(SessionError::Peer(format!("{word:?} in the middle of a round")));
                }
                () = self.guard.session_state.failure() => {}
                () = sleep(CANCEL_POLL) => {}
            }
            if self.phase != Phase::Stopped && self.reader.scan_is_due() {
                self.scan().await?;
            }
            if self.phase == Phase::Copying && self.last_heat.elapsed() >= HEAT_EVERY {
                self.send_known_heat().await?;
            }
            self.report_if_due();
        }
    }

    /// Ends the round on every data stream, and waits until the target has all of it. So the rate that is measured is
    /// that at which pages arrive, not that at which sockets take them.
    async fn end_round(&mut self, last: bool) -> Result<(), SessionError> {
        self.round += 1;
        let round = self.round;
        let said = self.reader.sink().end_round(round, last);
        self.guard.wait(DURING, SILENCE_LIMIT, said).await?;
        self.expect(Control::RoundDone { round }, Wait::Round).await
    }

    /// Scans for dirty pages.
    pub(crate) async fn scan(&mut self) -> Result<(), SessionError> {
        let scanned =
            self.guard.wait("looking for written pages", SILENCE_LIMIT, self.reader.scan()).await??;
        self.discovery.scan(self.began.elapsed(), scanned.new, Wait::Writes.limit().1);
        Ok(())
    }

    /// Another phase begins: reports it at once.
    pub(crate) fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.report();
    }

    /// Reports progress, now and then.
    fn report_if_due(&mut self) {
        if self.last_progress.elapsed() >= PROGRESS_EVERY {
            self.report();
        }
    }

    fn report(&mut self) {
        self.last_progress = Instant::now();
        let total = self.reader.memory_bytes();
        let bytes = swapd::units::bytes_of;
        let open = bytes(self.reader.pages_left() + self.reader.pages_for_next());
        (self.progress)(Progress {
            phase: self.phase,
            round: self.round as u32 + 1,
            bytes_total: total,
            bytes_done: total.saturating_sub(open),
            bytes_sent: self.guard.session_state.bytes_sent(),
            bytes_left: bytes(self.reader.pages_left()),
            bytes_per_second: bytes(self.send_rate.per_s() as u64),
            throttle_percent: self.throttle,
            waiting: self.waiting.or(self.guard.is_silent().then_some(Wait::Peer)),
        });
    }

    /// What the last round costs besides pages: a scan, and questions and answers on their way.
    pub(crate) fn link_cost(&self) -> Duration {
        self.reader.scan_took() + self.control.round_trip().unwrap_or_default() * QUESTIONS
    }

    pub(crate) fn remaining_pages(&self) -> u64 {
        self.reader.pages_for_next()
    }

    /// Pages that become dirty a second, as far as that is known.
    pub(crate) fn dirty_per_s(&self) -> f64 {
        self.reader.dirty_per_s().unwrap_or(0.0)
    }

    /// The VM's memory.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.reader.memory_bytes()
    }

    /// Ends everything and waits until nothing is in flight and no page is held.
    pub(crate) async fn close(self, last_word: Option<String>) {
        // Tasks that wait for something else than their socket look at this.
        self.sent.session_state.fail(SessionError::Cancelled);
        self.control.close(&self.sent.session_state, last_word).await;
        self.enders.iter().for_each(end);
        // The senders end when the streams have nothing more for them.
        drop(self.reader.close().await);
        for sender in self.senders {
            if let Err(error) = sender.await {
                std::panic::resume_unwind(error.into_panic());
            }
        }
    }
}
