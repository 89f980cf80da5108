//! A VM that comes from elsewhere: pages arrive, some of them again and again, while the store fails and recovers.

use super::Sim;
use super::coverage::{Fault, Outcome};
use super::operator::Asked;
use crate::api::ArrivedRun;
use crate::core::{Event, Request, Response, Ticket};
use crate::error::CommandError;
use crate::table::PageState;
use crate::units::{Run, SlotRun};

/// Grants asked for at a time: one a stream.
const STREAMS: usize = 2;

#[derive(Debug)]
pub(super) struct Session {
    /// Runs still to be sent.
    to_send: u64,
    came: Vec<bool>,
    granted: Vec<SlotRun>,
    asked: usize,
    finishing: bool,
    settling: bool,
}

impl Session {
    pub(super) fn new(pages: u64) -> Self {
        Session {
            to_send: pages / 4,
            came: vec![false; pages as usize],
            granted: Vec::new(),
            asked: 0,
            finishing: false,
            settling: false,
        }
    }
}

/// The answer to a request that nobody waits for.
const NOBODY: Ticket = Ticket(0);

impl Sim {
    pub(super) fn start_receiving(&mut self) {
        let heat = self.random_heat();
        self.session = Some(Session::new(self.pages));
        self.ask(Request::StartReceiving(heat), Asked::Other);
    }

    fn random_heat(&mut self) -> Vec<u8> {
        // Now and then all is hotter than what comes again: then that has no precedence.
        let least = if self.random.one_in(3) { 200 } else { 0 };
        let mut heat = || self.random.below(4).saturating_sub(1) as u8 * 40;
        (0..self.pages).map(|_| heat().max(least)).collect()
    }

    fn session(&mut self) -> &mut Session {
        self.session.as_mut().expect("only called while the VM is received")
    }

    /// One step of the session, of the disk, or of somebody who interferes.
    pub(super) fn step_receiving(&mut self) {
        match self.random.below(100) {
            0..50 => self.send_next(),
            50..88 => self.complete_io(),
            88..92 => self.tick(),
            92..95 => self.repair(),
            95..97 => self.change_budget(),
            97 => self.decay(),
            _ => match self.random.below(4) {
                3 if !self.session().settling => {
                    self.session().settling = true;
                    self.ask(Request::SettleReceiving, Asked::Settle);
                }
                0 => {
                    let heat = self.random_heat();
                    self.ask(Request::UpdateHeat(heat), Asked::Other);
                }
                1 => self.ask(Request::Stats, Asked::Other),
                _ => self.ask(Request::Heat, Asked::Other),
            },
        }
    }

    fn send_next(&mut self) {
        let session = self.session();
        if session.to_send == 0 {
            return self.end_session();
        }
        if let Some(slots) = session.granted.pop() {
            return self.send_run(slots);
        }
        let run = self.random_run(24);
        match self.random.below(8) {
            0 => {
                self.trace.add("arrive as zeros", run, None, None);
                self.replaced(run, Some(0));
                self.ask(Request::ArriveZero(run), Asked::Other);
            }
            1 if self.random.one_in(4) => {
                let run = self.in_memory(run);
                self.trace.add("arrive as lost", run, None, None);
                self.replaced(run, None);
                self.ask(Request::ArrivePoisoned(run), Asked::Other);
            }
            _ if self.session().asked < STREAMS => {
                self.session().asked += 1;
                let gone = self.random.one_in(self.odds.session_gone);
                self.ask(Request::GrantFrames(run.len), Asked::Frames { gone });
            }
            _ => {}
        }
    }

    fn replaced(&mut self, run: Run, truth: Option<u64>) {
        for page in run.pages() {
            self.abandon(page, Outcome::WrittenAnew);
            self.oracle.truth[page.index()] = truth;
            self.session().came[page.index()] = true;
        }
    }

    /// Frames have been granted.
    pub(super) fn granted(&mut self, slots: SlotRun, gone: bool) {
        // They come from the host when they are received into.
        for slot in slots.slots() {
            self.kernel.staging[slot.index()].get_or_insert(0xBAD);
        }
        let Some(session) = &mut self.session else { panic!("{slots:?} granted to nobody") };
        session.asked -= 1;
        if gone {
            self.coverage.injected(Fault::SessionGone);
            self.coverage.outcome(Fault::SessionGone, Outcome::Returned);
            self.asked.push((NOBODY, Asked::Other));
            self.hand(Event::Request { ticket: NOBODY, request: Request::ReturnFrames(slots) });
        } else {
            session.granted.push(slots);
        }
    }

    /// The session asks again.
    pub(super) fn not_granted(&mut self) {
        self.session().asked -= 1;
    }

    /// A run that fits into the frames; those left over go back.
    fn send_run(&mut self, granted: SlotRun) {
        let run = self.random_run(u64::from(granted.len));
        let run = self.in_memory(run);
        let slots = granted.part(0, run.len);
        if run.len < granted.len {
            let rest = granted.part(run.len, granted.len - run.len);
            self.ask(Request::ReturnFrames(rest), Asked::Other);
        }
        let mut values = Vec::new();
        let mut sums = Vec::new();
        for (page, slot) in run.pages().zip(slots.slots()) {
            // A page sent again may be the same.
            let stored = self.disk.content[page.index()];
            let value = if self.random.one_in(8) { stored } else { self.guest.new_value() };
            self.kernel.staging[slot.index()] = Some(value);
            sums.push(super::sum_of(page, value));
            values.push(value);
        }
        let again = run.pages().any(|page| self.session().came[page.index()]);
        self.session().to_send -= 1;
        self.trace.add("arrive", run, Some(slots), values.first().copied());
        let asked = Asked::Arrive { run, slots, values };
        self.ask(Request::Arrive(ArrivedRun { run, slots, sums, again }), asked);
    }

    pub(super) fn arrived(
        &mut self,
        run: Run,
        slots: SlotRun,
        values: &[u64],
        answer: Result<Response, CommandError>,
    ) {
        match answer {
            Ok(_) => {
                for (page, value) in run.pages().zip(values) {
                    self.replaced(Run::one(page), Some(*value));
                }
            }
            // The session will send them again, or end.
            Err(CommandError::Store(_)) => self.session().granted.push(slots),
            Err(error) => panic!("{run:?} cannot arrive: {error}"),
        }
    }

    fn end_session(&mut self) {
        if let Some(slots) = self.session().granted.pop() {
            self.ask(Request::ReturnFrames(slots), Asked::Other);
        } else if self.session().asked == 0 && !self.session().finishing {
            self.session().finishing = true;
            self.ask(Request::FinishReceiving, Asked::Finish);
        }
    }

    /// Everything is in its place, or the store has failed.
    pub(super) fn settled(&mut self, answer: &Result<Response, CommandError>) {
        if answer.is_ok() {
            let table = self.core.table();
            let moving = table.count(PageState::Leaving) + table.count(PageState::Arriving);
            assert_eq!(moving, 0, "it is settled, and pages are on their way");
        }
        if let Some(session) = &mut self.session {
            session.settling = false;
        }
    }

    pub(super) fn finished(&mut self, answer: Result<Response, CommandError>) {
        match answer {
            Ok(Response::Placed(placed)) => {
                assert_eq!((placed.pageins, placed.pageouts), (0, 0), "paging while receiving");
                let lost = self.oracle.truth.iter().filter(|truth| truth.is_none()).count() as u64;
                let placed = placed.pages_ram + placed.pages_store + placed.pages_zero;
                assert_eq!(placed + lost, self.pages, "every page is in its place");
                self.trace.note("received", placed);
                self.session = None;
            }
            Err(CommandError::Store(_)) => self.session().finishing = false,
            answer => panic!("the receiving ended with {answer:?}"),
        }
    }

    /// No disk, no operator is in the way any more: the rest of the session.
    pub(super) fn settle_receiving(&mut self) {
        self.session().to_send = self.session().to_send.min(3);
        for _ in 0..super::SETTLE_MAX {
            self.trace.now += 1;
            self.send_next();
            self.complete_io();
            self.walk();
            self.tick();
            if self.session.is_none() {
                return;
            }
        }
        panic!("the receiving does not end: {:?}", self.session);
    }
}
