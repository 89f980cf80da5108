//! The rounds of a source's session: what is sent when, and the scans meanwhile.

use std::rc::Rc;
use std::time::Duration;

use swapd::{BLOCK_PAGES, PageNo, Piece, Place, Run, answered};
use tokio::sync::mpsc;

use super::connect::Connected;
use super::discovery::{Discovery, Stakes};
use super::order::{self, BlockFacts};
use super::pace::{SendRate, WriteRate};
use super::send_state::{Lane, Outgoing, RECORDS_PER_STREAM, SendState};
use super::sender;
use super::tracker::Tracker;
use crate::limits::{
    CANCEL_POLL, HEAT_EVERY, MOVING_RETRIES, MOVING_RETRY, PROGRESS_EVERY, REREAD_WAITS, SCAN_EVERY,
    SILENCE_LIMIT,
};
use crate::link::control::ControlLink;
use crate::link::error::SessionError;
use crate::link::guard::Guard;
use crate::link::state::SessionState;
use crate::link::{end, split};
use crate::outside::{
    DirtySubscription, EngineHandle, Instant, JoinHandle, JoinSet, StdStream, StoredReader, planted, sleep,
    spawn,
};
use crate::progress::{Phase, Progress};
use crate::wait::Wait;
use crate::wire::control::Control;
use crate::wire::extents::stream_of;
use crate::wire::heat;
use crate::wire::record::{Kind, Lane as WireLane, MAX_RECORD_RUNS, Sequence};

/// Fillers a stream.
const FILLERS: usize = 2;
/// Pages looked at in one question to the engine, before the first round: 256 MiB.
const SURVEY_PAGES: u32 = 64 << 10;
/// Questions and answers while the VM stands still: the round's end, the word that all is there, the commit.
const QUESTIONS: u32 = 3;

const _: () = assert!(FILLERS < RECORDS_PER_STREAM);
const _: () = assert!(SURVEY_PAGES.is_multiple_of(BLOCK_PAGES));

const DURING: &str = "sending the VM's memory";

/// Everything of a session that is on the runtime. [`close`](Self::close) it, whatever happens.
pub(crate) struct Rounds<'a> {
    pub(crate) ship: Rc<SendState>,
    dirty: DirtySubscription,
    pub(crate) control: ControlLink,
    pub(crate) guard: Guard<'a>,
    /// Rounds done.
    pub(crate) round: u64,
    pub(crate) send_rate: SendRate,
    pub(crate) write_rate: WriteRate,
    progress: &'a dyn Fn(Progress),
    phase: Phase,
    throttle: u8,
    waiting: Option<Wait>,
    outs: Vec<mpsc::Sender<Outgoing>>,
    senders: Vec<JoinHandle<()>>,
    enders: Vec<StdStream>,
    fillers: JoinSet<()>,
    base_heat: Vec<u8>,
    discovery: Discovery,
    /// Pages that are not cold, by all that is known: of those with a heat of 1 nothing is known but that they are in RAM.
    warm_pages: u64,
    /// RAM that the VM gets at the target.
    room_pages: u64,
    began: Instant,
    last_scan: Instant,
    /// How long that took.
    scan_took: Duration,
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
        let stored = StoredReader::of(handle).map_err(SessionError::Memory)?;
        let session = connected.session;
        let ship = Rc::new(SendState {
            handle: handle.clone(),
            stored,
            session_state: session_state.clone(),
            tracker: Tracker::new(swapd::units::pages_in(handle.memory_bytes())).into(),
            lanes: connected.streams.iter().map(|_| Lane::new()).collect(),
            pages_sent: Default::default(),
            patience: REREAD_WAITS.into(),
            last_given: None.into(),
        });
        let lanes = [WireLane::ToSource, WireLane::ToTarget];
        let control = ControlLink::start(connected.control, session, lanes, session_state).map_err(&link)?;
        let guard = Guard::new(session_state.clone(), cancel, control.outbox().clone());
        let (mut outs, mut senders, mut enders) = (Vec::new(), Vec::new(), Vec::new());
        for (index, socket) in connected.streams.into_iter().enumerate() {
            let (socket, ender) = split(socket).map_err(&link)?;
            let (out, parcels) = mpsc::channel(RECORDS_PER_STREAM);
            let sequence = Sequence::new(session, WireLane::Stream(index as u32));
            senders.push(spawn(sender::run(ship.clone(), index, socket, sequence, parcels)));
            outs.push(out);
            enders.push(ender);
        }
        let now = Instant::now();
        Ok(Rounds {
            ship,
            dirty,
            control,
            guard,
            round: 0,
            send_rate: SendRate::default(),
            write_rate: WriteRate::default(),
            progress,
            phase: Phase::Copying,
            throttle: 0,
            waiting: None,
            outs,
            senders,
            enders,
            fillers: JoinSet::new(),
            base_heat: Vec::new(),
            discovery: Discovery::default(),
            warm_pages: 0,
            room_pages: swapd::units::pages_in(connected.ram_bytes),
            began: now,
            last_scan: now,
            scan_took: Duration::ZERO,
            last_heat: now,
            last_progress: now,
        })
    }

    /// Round 1: heat, then what was never touched, then everything else but what is being written.
    pub(crate) async fn first(&mut self) -> Result<(), SessionError> {
        self.enter(Phase::Copying);
        let heat = answered(self.ship.handle.heat_async());
        self.base_heat = self.guard.wait("asking for heat", SILENCE_LIMIT, heat).await??;
        self.send_heat(self.base_heat.clone()).await?;
        let blocks = self.survey().await?;
        self.ship.assign(order::first_round(blocks));
        self.last_heat = Instant::now();
        self.send_measured().await?;
        self.send_known_heat().await?;
        self.scan().await?;
        self.watch_writes().await
    }

    /// After round 1: the VM runs on here, and nothing is sent but heat, as long as it shows more of what it uses and that matters there.
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
            if self.last_scan.elapsed() >= SCAN_EVERY {
                self.scan().await?;
            }
            if self.last_heat.elapsed() >= HEAT_EVERY {
                self.send_known_heat().await?;
            }
            self.tell_if_due();
        }
        self.send_known_heat().await
    }

    fn stakes(&self) -> Stakes {
        Stakes {
            memory: swapd::units::pages_in(self.ship.handle.memory_bytes()),
            room: self.room_pages,
            warm: self.warm_pages,
            around: self.ship.tracker.borrow().pages_around_written(),
            most: Wait::Writes.limit().1,
        }
    }

    /// What is hot is known better by and by: all that was written. Pages that went out as cold ones before may be among
    /// it, and the target keeps room for them.
    async fn send_known_heat(&mut self) -> Result<(), SessionError> {
        let known = self.ship.tracker.borrow().heat(&self.base_heat);
        self.warm_pages = known.iter().filter(|heat| **heat > 1).count() as u64;
        self.send_heat(known).await?;
        self.last_heat = Instant::now();
        Ok(())
    }

    /// A later round: what was written before it.
    pub(crate) async fn again(&mut self, throttle: u8) -> Result<(), SessionError> {
        if throttle != self.throttle {
            self.throttle = throttle;
            self.write_rate.forget();
        }
        self.begin_round();
        self.enter(Phase::Converging);
        self.send_measured().await?;
        self.scan().await
    }

    /// The last round, while the VM stands still: leaves nothing.
    pub(crate) async fn last(&mut self) -> Result<(), SessionError> {
        self.enter(Phase::Stopped);
        self.guard.resume();
        if !planted!(SkipsTheLastScan) {
            self.scan().await?;
        }
        for _ in 0..MOVING_RETRIES {
            self.begin_round();
            self.send_round().await?;
            if self.ship.tracker.borrow().next.count() == 0 {
                return self.end_round(true).await;
            }
            // Only pages that the engine is just moving are left.
            sleep(MOVING_RETRY).await;
        }
        Err(SessionError::Unable("the engine does not come to rest: some pages stay on the move".to_string()))
    }

    fn begin_round(&mut self) {
        let mut tracker = self.ship.tracker.borrow_mut();
        tracker.begin_round();
        let blocks: Vec<u32> =
            (0..tracker.blocks()).filter(|block| tracker.cover(*block).is_some()).collect();
        drop(tracker);
        self.ship.assign(blocks);
    }

    /// Sends a heat map, and waits until the target has taken it: pages that come after it are placed by it.
    async fn send_heat(&mut self, mut heat: Vec<u8>) -> Result<(), SessionError> {
        order::keep_hottest(&mut heat, order::hot_room(self.room_pages));
        for part in heat::parts(&heat) {
            let sent = self.control.outbox().send(Control::Heat(part));
            self.guard.wait("sending the heat map", SILENCE_LIMIT, sent).await?;
        }
        self.expect(Control::HeatTaken, Wait::Heat).await
    }

    async fn expect(&mut self, word: Control, wait: Wait) -> Result<(), SessionError> {
        let said = self.hear(wait).await?;
        if said == word { Ok(()) } else { Err(SessionError::Peer(format!("{said:?} instead of {word:?}"))) }
    }

    /// The target's next word.
    pub(crate) async fn hear(&mut self, wait: Wait) -> Result<Control, SessionError> {
        self.waits(Some(wait));
        let said = self.guard.wait_for(wait, self.control.next()).await;
        self.waits(None);
        said
    }

    /// Says what is waited for.
    pub(crate) fn waits(&mut self, wait: Option<Wait>) {
        self.waiting = wait;
        self.tell();
    }

    /// Looks where everything is. Sends what was never touched, and returns what is known of the other blocks.
    async fn survey(&mut self) -> Result<Vec<BlockFacts>, SessionError> {
        let pages = swapd::units::pages_in(self.ship.handle.memory_bytes());
        let mut zeros: Vec<Vec<Run>> = self.outs.iter().map(|_| Vec::new()).collect();
        let mut stored = vec![false; self.ship.tracker.borrow().blocks() as usize];
        for start in (0..pages).step_by(SURVEY_PAGES as usize) {
            let part = Run::new(PageNo(start), u64::from(SURVEY_PAGES).min(pages - start) as u32);
            let pieces = self.guard.wait(DURING, SILENCE_LIMIT, answered(self.ship.handle.hold_async(part)));
            let pieces = pieces.await;
            // Also if nobody waits for the hold any more: the engine comes to it before this.
            drop(self.ship.handle.release_async(part));
            for piece in pieces?? {
                self.note(piece, &mut zeros, &mut stored);
            }
        }
        for (out, runs) in self.outs.iter().zip(zeros) {
            for runs in runs.chunks(MAX_RECORD_RUNS as usize) {
                let sent = out.send(Outgoing::Bare(Kind::Zeros, runs.to_vec()));
                // A sender that is gone has failed the session already.
                let _ = self.guard.wait(DURING, SILENCE_LIMIT, sent).await?;
            }
        }
        let tracker = self.ship.tracker.borrow();
        let left = (0..tracker.blocks()).filter(|block| tracker.cover(*block).is_some());
        Ok(left
            .map(|block| {
                let first = block as usize * BLOCK_PAGES as usize;
                let heat = order::mean_heat(&self.base_heat[first..first + BLOCK_PAGES as usize]);
                BlockFacts { block, stored: stored[block as usize], heat }
            })
            .collect())
    }

    fn note(&self, piece: Piece, zeros: &mut [Vec<Run>], stored: &mut [bool]) {
        for run in by_blocks(piece.run) {
            match piece.place {
                Place::Zero => {
                    self.ship.tracker.borrow_mut().sent_untouched(run);
                    zeros[stream_of(run.start, self.ship.streams()) as usize].push(run);
                }
                Place::Stored | Place::Staged => stored[run.start.block()] = true,
                Place::Memory | Place::Moving | Place::Poisoned => {}
            }
        }
    }

    /// A round that is not the last, which shows how fast the link is.
    async fn send_measured(&mut self) -> Result<(), SessionError> {
        let (began, before) = (Instant::now(), self.ship.pages_sent.get());
        self.send_round().await?;
        self.end_round(false).await?;
        self.send_rate.round(self.ship.pages_sent.get() - before, began.elapsed());
        Ok(())
    }

    /// Lets the fillers work until all is sent that is to be sent now, and scans meanwhile.
    async fn send_round(&mut self) -> Result<(), SessionError> {
        for (stream, out) in self.outs.iter().enumerate() {
            for _ in 0..FILLERS {
                self.fillers.spawn_local(super::filler::run(self.ship.clone(), stream, out.clone()));
            }
        }
        loop {
            self.guard.check(DURING)?;
            tokio::select! {
                biased;
                done = self.fillers.join_next() => match done {
                    None => return self.guard.check(DURING),
                    Some(Ok(())) => {}
                    Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
                },
                word = self.control.next() => {
                return Err(SessionError::Peer(format!("{word:?} in the middle of a round")));
            }
                () = self.guard.session_state.failure() => {}
                () = sleep(CANCEL_POLL) => {}
            }
            if self.phase != Phase::Stopped && self.last_scan.elapsed() >= SCAN_EVERY {
                self.scan().await?;
            }
            if self.phase == Phase::Copying && self.last_heat.elapsed() >= HEAT_EVERY {
                self.send_known_heat().await?;
            }
            self.tell_if_due();
        }
    }

    /// Ends the round on every stream and waits until the target has all of it, so that the rate is what really arrives.
    async fn end_round(&mut self, last: bool) -> Result<(), SessionError> {
        self.round += 1;
        let round = self.round;
        for out in &self.outs {
            let sent = out.send(Outgoing::RoundEnd { round, last });
            let _ = self.guard.wait(DURING, SILENCE_LIMIT, sent).await?;
        }
        self.expect(Control::RoundDone { round }, Wait::Round).await
    }

    /// Asks what was written since the last time.
    pub(crate) async fn scan(&mut self) -> Result<(), SessionError> {
        let began = Instant::now();
        let written = answered(self.dirty.collect_async());
        let written = self.guard.wait("looking for written pages", SILENCE_LIMIT, written).await??;
        let mut tracker = self.ship.tracker.borrow_mut();
        written.left.iter().for_each(|run| tracker.left(*run));
        let new = written.seen.iter().map(|run| tracker.written(*run)).sum();
        drop(tracker);
        self.discovery.scan(self.began.elapsed(), new, Wait::Writes.limit().1);
        self.scan_took = began.elapsed();
        let pages = written.seen.iter().chain(&written.left).map(|run| u64::from(run.len)).sum();
        self.write_rate.scan(pages, self.last_scan.elapsed());
        self.last_scan = Instant::now();
        Ok(())
    }

    /// Something else begins: says so at once.
    pub(crate) fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.tell();
    }

    /// Reports progress, now and then.
    fn tell_if_due(&mut self) {
        if self.last_progress.elapsed() >= PROGRESS_EVERY {
            self.tell();
        }
    }

    fn tell(&mut self) {
        self.last_progress = Instant::now();
        let tracker = self.ship.tracker.borrow();
        let total = self.ship.handle.memory_bytes();
        let bytes = swapd::units::bytes_of;
        let open = bytes(tracker.todo.count() + tracker.next.count());
        (self.progress)(Progress {
            phase: self.phase,
            round: self.round as u32 + 1,
            bytes_total: total,
            bytes_done: total.saturating_sub(open),
            bytes_sent: self.guard.session_state.bytes_sent(),
            bytes_left: bytes(tracker.todo.count()),
            bytes_per_second: bytes(self.send_rate.per_s() as u64),
            throttle_percent: self.throttle,
            waiting: self.waiting.or(self.guard.is_silent().then_some(Wait::Peer)),
        });
    }

    /// What the last round costs besides pages: a look for written ones, and questions and answers on their way.
    pub(crate) fn link_cost(&self) -> Duration {
        self.scan_took + self.control.round_trip().unwrap_or_default() * QUESTIONS
    }

    pub(crate) fn left_pages(&self) -> u64 {
        self.ship.tracker.borrow().next.count()
    }

    /// Ends everything and waits until nothing is in flight and no page is held.
    pub(crate) async fn close(mut self, last_word: Option<String>) {
        // Tasks that wait for something else than their socket look at this.
        self.ship.session_state.fail(SessionError::Cancelled);
        self.control.close(&self.ship.session_state, last_word).await;
        self.enders.iter().for_each(end);
        drop(self.outs);
        while let Some(done) = self.fillers.join_next().await {
            if let Err(error) = done {
                std::panic::resume_unwind(error.into_panic());
            }
        }
        for sender in self.senders {
            if let Err(error) = sender.await {
                std::panic::resume_unwind(error.into_panic());
            }
        }
    }
}

/// Cuts a run at the borders of 2 MiB blocks.
fn by_blocks(run: Run) -> impl Iterator<Item = Run> {
    let mut rest = run;
    std::iter::from_fn(move || {
        (rest.len > 0).then(|| {
            let to_border = BLOCK_PAGES - (rest.start.0 % u64::from(BLOCK_PAGES)) as u32;
            let part = rest.part(0, rest.len.min(to_border));
            rest = rest.part(part.len, rest.len - part.len);
            part
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_at_blocks() {
        let cut: Vec<_> = by_blocks(Run::new(PageNo(510), 1000)).map(|run| (run.start.0, run.len)).collect();
        assert_eq!(cut, [(510, 2), (512, 512), (1024, 486)]);
    }
}
