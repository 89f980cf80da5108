//! Waiting that ends: at a limit, at a cancel, when the session fails, or when the peer has been silent for too long.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use super::control::Outbox;
use super::error::SessionError;
use super::state::SessionState;
use crate::cancel::{CancelFlag, is_cancelled};
use crate::limits::{ALIVE_EVERY, CANCEL_POLL, SILENCE_LIMIT, scaled_for_tests};
use crate::outside::{Instant, planted, sleep};
use crate::wait::Wait;
use crate::wire::control::Control;

/// Of one session, for its main thread of control.
pub(crate) struct Guard<'a> {
    pub(crate) session_state: Rc<SessionState>,
    pub(crate) cancel: &'a CancelFlag,
    outbox: Outbox,
    heard: Cell<(u64, Instant)>,
    said: Cell<Instant>,
}

impl<'a> Guard<'a> {
    pub(crate) fn new(session_state: Rc<SessionState>, cancel: &'a CancelFlag, outbox: Outbox) -> Guard<'a> {
        let now = Instant::now();
        Guard { session_state, cancel, outbox, heard: Cell::new((0, now)), said: Cell::new(now) }
    }

    /// Waits for `work`, which must bear being dropped half-way.
    pub(crate) async fn wait<T>(
        &self,
        during: &'static str,
        limit: Duration,
        work: impl Future<Output = T>,
    ) -> Result<T, SessionError> {
        self.wait_at_most(during, scaled_for_tests(limit), work).await
    }

    /// Waits for what the other side is to do, `more` than the limit of that.
    pub(crate) async fn wait_for<T>(
        &self,
        wait: Wait,
        more: Duration,
        work: impl Future<Output = T>,
    ) -> Result<T, SessionError> {
        self.wait_at_most(wait.during(), wait.limit().1 + more, work).await
    }

    async fn wait_at_most<T>(
        &self,
        during: &'static str,
        limit: Duration,
        work: impl Future<Output = T>,
    ) -> Result<T, SessionError> {
        let deadline = Instant::now() + limit;
        tokio::pin!(work);
        loop {
            tokio::select! {
                biased;
                result = &mut work => return Ok(result),
                () = self.session_state.failure() => {}
                () = sleep(CANCEL_POLL) => {}
            }
            self.check(during)?;
            if Instant::now() >= deadline {
                return Err(SessionError::Link { during, source: io::ErrorKind::TimedOut.into() });
            }
        }
    }

    /// To be called at least every [`CANCEL_POLL`]: says why the session must end, or says that it lives.
    pub(crate) fn check(&self, during: &'static str) -> Result<(), SessionError> {
        if self.session_state.has_failed() {
            // Only a placeholder: the session's state has the error itself, and the peer's reason may still arrive.
            return Err(SessionError::Link { during, source: io::ErrorKind::ConnectionAborted.into() });
        }
        if is_cancelled(self.cancel) {
            return Err(SessionError::Cancelled);
        }
        let (beats, at) = self.heard.get();
        if beats != self.session_state.beats() {
            self.heard.set((self.session_state.beats(), Instant::now()));
        } else if at.elapsed() > scaled_for_tests(SILENCE_LIMIT) && !planted!(WaitsForever) {
            return Err(SessionError::Link { during, source: io::ErrorKind::TimedOut.into() });
        }
        if self.said.get().elapsed() > scaled_for_tests(ALIVE_EVERY) {
            self.said.set(Instant::now());
            self.outbox.try_send(Control::Alive);
        }
        Ok(())
    }

    /// Nothing was heard for so long that a sign of life is overdue.
    pub(crate) fn is_silent(&self) -> bool {
        self.heard.get().1.elapsed() > scaled_for_tests(ALIVE_EVERY) + scaled_for_tests(ALIVE_EVERY) / 2
    }

    /// The session ends of this, unless it has failed already.
    pub(crate) fn failed(&self, error: SessionError) {
        self.session_state.fail(error);
    }

    /// The session was left alone for a while (the thread did something else): silence is counted from now.
    pub(crate) fn resume(&self) {
        self.heard.set((self.session_state.beats(), Instant::now()));
    }
}
