//! The seam between the reader and the network: a sink that sends whatever the reader finds as records of the wire.
//!
//! ```text
//!   reader ── PageBuffer ──▶ Streams ── Outgoing ──▶ sender ══ data stream ══▶ target
//!      ▲                                               │
//!      └───────────── free buffers (StreamState) ◀─────┘
//! ```
//! Pages are copied once, by the reader, into the buffer that leaves as a record: nothing is copied here.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use swapd::{BLOCK_PAGES, PageNo, Run};
use tokio::sync::{Notify, mpsc};

use super::record;
use crate::link::error::SessionError;
use crate::link::state::SessionState;
use crate::reader::{Closed, FILLERS, Found, PageBuffer, ReadError, Sink};
use crate::wire::control::Totals;
use crate::wire::extents::stream_of;
use crate::wire::record::RecordKind;

/// Records that a stream may have in the making and on their way: 4 MiB.
pub(crate) const RECORDS_PER_STREAM: usize = 4;

const _: () = assert!(FILLERS < RECORDS_PER_STREAM);

pub(crate) struct SendState {
    pub(crate) session_state: Rc<SessionState>,
    pub(crate) streams: Vec<StreamState>,
}

/// One data stream's share.
pub(crate) struct StreamState {
    free: RefCell<Vec<PageBuffer>>,
    freed: Notify,
    pub(crate) totals: Cell<Totals>,
}

/// What a stream's sender sends.
#[derive(Debug)]
pub(crate) enum Outgoing {
    Pages(PageBuffer),
    /// Zero or poisoned pages.
    Bare(RecordKind, Vec<Run>),
    RoundEnd {
        round: u64,
        last: bool,
    },
}

impl StreamState {
    fn new() -> StreamState {
        StreamState {
            free: RefCell::new((0..RECORDS_PER_STREAM).map(|_| record::empty()).collect()),
            freed: Notify::new(),
            totals: Cell::default(),
        }
    }

    /// Waits for a free buffer.
    async fn take_buffer(&self) -> PageBuffer {
        loop {
            if let Some(buffer) = self.free.borrow_mut().pop() {
                return buffer;
            }
            self.freed.notified().await;
        }
    }

    pub(crate) fn give_back(&self, mut buffer: PageBuffer) {
        buffer.clear();
        self.free.borrow_mut().push(buffer);
        self.freed.notify_one();
    }

    pub(crate) fn count(&self, kind: RecordKind, pages: u64) {
        let mut totals = self.totals.get();
        match kind {
            RecordKind::Pages => totals.pages += pages,
            RecordKind::Zeros => totals.zeros += pages,
            _ => totals.poisoned += pages,
        }
        self.totals.set(totals);
    }
}

impl SendState {
    pub(crate) fn new(session_state: &Rc<SessionState>, streams: usize) -> Rc<SendState> {
        Rc::new(SendState {
            session_state: session_state.clone(),
            streams: (0..streams).map(|_| StreamState::new()).collect(),
        })
    }

    pub(crate) fn totals(&self) -> Totals {
        self.streams.iter().fold(Totals::default(), |mut all, stream| {
            all += stream.totals.get();
            all
        })
    }
}

/// The reader's sink: a record of the wire for whatever it finds, on the data stream of its block.
pub(crate) struct Streams {
    state: Rc<SendState>,
    /// To the senders, which end when this has been dropped.
    outs: Vec<mpsc::Sender<Outgoing>>,
}

impl Streams {
    pub(crate) fn new(state: Rc<SendState>, outs: Vec<mpsc::Sender<Outgoing>>) -> Streams {
        Streams { state, outs }
    }

    /// Ends a round on every stream.
    pub(crate) async fn end_round(&self, round: u64, last: bool) {
        for out in &self.outs {
            // A sender that is gone has failed the session already.
            let _ = out.send(Outgoing::RoundEnd { round, last }).await;
        }
    }
}

impl Sink for Streams {
    fn queues(&self) -> u32 {
        self.outs.len() as u32
    }

    fn queue_of(&self, block: u32) -> u32 {
        stream_of(PageNo(u64::from(block) * u64::from(BLOCK_PAGES)), self.queues())
    }

    async fn buffer(&self, queue: u32) -> Option<PageBuffer> {
        let free = self.state.streams[queue as usize].take_buffer();
        self.state.session_state.unless_failed(free).await
    }

    fn unused(&self, queue: u32, buffer: PageBuffer) {
        self.state.streams[queue as usize].give_back(buffer);
    }

    async fn take(&self, queue: u32, found: Found) -> Result<(), Closed> {
        let outgoing = match found {
            Found::Pages(buffer) => Outgoing::Pages(buffer),
            Found::Zeros(runs) => Outgoing::Bare(RecordKind::Zeros, runs),
            Found::Lost(runs) => Outgoing::Bare(RecordKind::Poisoned, runs),
        };
        self.outs[queue as usize].send(outgoing).await.map_err(|_| Closed)
    }
}

impl From<ReadError> for SessionError {
    fn from(error: ReadError) -> SessionError {
        match error {
            ReadError::Engine(error) => SessionError::Engine(error),
            ReadError::Store(error) => SessionError::Memory(error),
            ReadError::Restless => SessionError::Unable(error.to_string()),
            // Only a placeholder: the streams take nothing any more because the session has failed, and it knows why.
            ReadError::Closed => SessionError::Link {
                during: "sending the VM's memory",
                source: std::io::ErrorKind::ConnectionAborted.into(),
            },
        }
    }
}
