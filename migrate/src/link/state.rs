//! What all tasks of a session share: the first error, and the signs of life.

use std::cell::{Cell, RefCell};
use std::future::Future;

use tokio::sync::Notify;

use super::error::SessionError;

/// Lives on one thread.
#[derive(Debug, Default)]
pub(crate) struct SessionState {
    error: RefCell<Option<SessionError>>,
    failed: Cell<bool>,
    wake: Notify,
    beats: Cell<u64>,
    bytes_sent: Cell<u64>,
    bytes_received: Cell<u64>,
}

impl SessionState {
    /// The first error counts, but the peer's own reason explains a link that broke.
    pub(crate) fn fail(&self, error: SessionError) {
        let mut first = self.error.borrow_mut();
        let explains =
            matches!((&*first, &error), (Some(SessionError::Link { .. }), SessionError::GaveUp(_)));
        if !self.failed.get() || explains {
            *first = Some(error);
        }
        self.failed.set(true);
        self.wake.notify_waiters();
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failed.get()
    }

    pub(crate) fn take_error(&self) -> Option<SessionError> {
        self.error.borrow_mut().take()
    }

    /// What the peer is told about the error.
    pub(crate) fn farewell(&self) -> Option<String> {
        self.error.borrow().as_ref().map(SessionError::farewell)
    }

    pub(crate) fn is_link_error(&self) -> bool {
        matches!(&*self.error.borrow(), Some(SessionError::Link { .. }))
    }

    /// Waits for `work`; None if the session fails first. What is there already counts, even so.
    pub(crate) async fn unless_failed<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let failed = self.wake.notified();
        tokio::select! {
            biased;
            result = work => Some(result),
            () = async { if !self.has_failed() { failed.await } } => None,
        }
    }

    /// Waits until the session fails.
    pub(crate) async fn failure(&self) {
        self.unless_failed(std::future::pending::<()>()).await;
    }

    pub(crate) fn received(&self, bytes: usize) {
        self.beats.set(self.beats.get() + 1);
        self.bytes_received.set(self.bytes_received.get() + bytes as u64);
    }

    /// The peer takes what it gets, or at least its host does.
    pub(crate) fn sent(&self, bytes: usize) {
        self.beats.set(self.beats.get() + 1);
        self.sent_unheard(bytes);
    }

    /// So little that it would be sent even if nobody took it.
    pub(crate) fn sent_unheard(&self, bytes: usize) {
        self.bytes_sent.set(self.bytes_sent.get() + bytes as u64);
    }

    /// Changes with every sign that the peer lives.
    pub(crate) fn beats(&self) -> u64 {
        self.beats.get()
    }

    pub(crate) fn bytes_sent(&self) -> u64 {
        self.bytes_sent.get()
    }

    pub(crate) fn bytes_received(&self) -> u64 {
        self.bytes_received.get()
    }
}
