//! The control connection: one task that reads, one that writes, a bounded queue for each.

use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::error::SessionError;
use super::state::SessionState;
use super::{end, read_exact, split};
use crate::limits::{FAREWELL_LIMIT, QUEUE};
use crate::outside::{JoinHandle, StdStream, TcpStream, round_trip, spawn, timeout};
use crate::session::SessionId;
use crate::wire::control::Control;
use crate::wire::record::{HEADER_BYTES, Header, Lane, Sequence};

const DURING: &str = "waiting for the peer's word";

type Letter = (Control, Option<oneshot::Sender<()>>);

/// Where messages to the peer go.
#[derive(Clone, Debug)]
pub(crate) struct Outbox(mpsc::Sender<Letter>);

impl Outbox {
    /// Queues a message if there is room.
    pub(crate) fn try_send(&self, message: Control) {
        // A full queue is a sign of life by itself.
        let _ = self.0.try_send((message, None));
    }

    /// Queues a message. If the link is broken, the session hears of that in its own way.
    pub(crate) async fn send(&self, message: Control) {
        let _ = self.0.send((message, None)).await;
    }

    /// Answers when the message has been handed to the kernel.
    pub(crate) async fn deliver(&self, message: Control) {
        let (done, written) = oneshot::channel();
        let _ = self.0.send((message, Some(done))).await;
        let _ = written.await;
    }
}

#[derive(Debug)]
pub(crate) struct ControlLink {
    outbox: Outbox,
    inbox: mpsc::Receiver<Control>,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
    ender: StdStream,
}

impl ControlLink {
    /// Must be called on the runtime. `from` and `to` are the lanes of what is read and written.
    pub(crate) fn start(
        socket: StdStream,
        session: SessionId,
        [from, to]: [Lane; 2],
        session_state: &Rc<SessionState>,
    ) -> std::io::Result<ControlLink> {
        let (socket, ender) = split(socket)?;
        let socket = Rc::new(socket);
        let (letters_in, letters_out) = mpsc::channel(QUEUE);
        let (messages_in, inbox) = mpsc::channel(QUEUE);
        let reading = read(socket.clone(), Sequence::new(session, from), messages_in, session_state.clone());
        let writing = write(socket, Sequence::new(session, to), letters_out, session_state.clone());
        let (reader, writer) = (spawn(reading), spawn(writing));
        Ok(ControlLink { outbox: Outbox(letters_in), inbox, reader, writer, ender })
    }

    pub(crate) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// How long a question and its answer are on their way, if that is known.
    pub(crate) fn round_trip(&self) -> Option<Duration> {
        round_trip(&self.ender)
    }

    /// The peer's next message, other than signs of life. If the link is broken this waits for ever, and the session
    /// has failed: whoever waits must look at that, too.
    pub(crate) async fn next(&mut self) -> Control {
        match self.inbox.recv().await {
            Some(message) => message,
            None => std::future::pending().await,
        }
    }

    /// Says a last word, and ends the connection. If the link broke, the peer's last word is waited for.
    pub(crate) async fn close(mut self, session_state: &SessionState, last_word: Option<String>) {
        if session_state.is_link_error() {
            let _ = timeout(FAREWELL_LIMIT, &mut self.reader).await;
        }
        if let Some(text) = last_word {
            let _ = timeout(FAREWELL_LIMIT, self.outbox.deliver(Control::Abort(text))).await;
        }
        end(&self.ender);
        drop(self.inbox);
        drop(self.outbox);
        // Other clones of the outbox may live on: the writer also ends with its socket.
        self.writer.abort();
        if !self.reader.is_finished() {
            let _ = self.reader.await;
        }
        let _ = self.writer.await;
    }
}

async fn read(
    socket: Rc<TcpStream>,
    mut sequence: Sequence,
    messages: mpsc::Sender<Control>,
    session_state: Rc<SessionState>,
) {
    loop {
        match read_one(&socket, &mut sequence, &session_state).await {
            Ok(Control::Alive) => {}
            Ok(Control::Abort(text)) => return session_state.fail(SessionError::GaveUp(text)),
            Ok(message) => {
                if messages.send(message).await.is_err() {
                    return;
                }
            }
            Err(error) => return session_state.fail(error),
        }
    }
}

async fn read_one(
    socket: &TcpStream,
    sequence: &mut Sequence,
    session_state: &SessionState,
) -> Result<Control, SessionError> {
    let (result, head) =
        read_exact(socket, Vec::with_capacity(HEADER_BYTES), 0, HEADER_BYTES, session_state).await;
    result.map_err(SessionError::link(DURING))?;
    let head: [u8; HEADER_BYTES] = head.try_into().expect("just read to that length");
    let header = Header::open(&head)?;
    if header.kind.is_data() {
        return Err(SessionError::Peer(format!("a {:?} record on the control connection", header.kind)));
    }
    let length = header.meta_bytes as usize;
    let mut body = Vec::with_capacity(length);
    if length > 0 {
        let (result, filled) = read_exact(socket, body, 0, length, session_state).await;
        result.map_err(SessionError::link(DURING))?;
        body = filled;
    }
    Header::verify(&head, &body, sequence)?;
    Ok(Control::decode(&header, &body)?)
}

async fn write(
    socket: Rc<TcpStream>,
    mut sequence: Sequence,
    mut letters: mpsc::Receiver<Letter>,
    session_state: Rc<SessionState>,
) {
    while let Some((message, done)) = letters.recv().await {
        let record = message.encode(&mut sequence);
        let length = record.len();
        let (result, _) = socket.write_all(record).await;
        if let Err(source) = result {
            return session_state.fail(SessionError::Link { during: "writing to the peer", source });
        }
        session_state.sent_unheard(length);
        if let Some(done) = done {
            // Whoever waited may have given up.
            let _ = done.send(());
        }
    }
}
