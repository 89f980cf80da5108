//! A QMP client: one command at a time over a Unix socket, one JSON value a line.
//!
//! ```text
//!   ask ──▶ writer ──▶ QEMU ──▶ reader's thread ──▶ answers ──▶ ask
//!                                 │ STOP, RESUME, SUSPEND, …
//!                                 └──▶ query-status ──▶ what the machine does ([`HeardState`])
//! ```
//! Every command carries a number that its answer repeats: the late answer to a command that was given up is skipped.
//! Every wait has an end, every line a greatest length. Rubbish ends the conversation.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};
use vmprocess::RunState;
use vmprocess::failure::Failure;

use crate::runstate;

/// Longest line that is read. QEMU's longest answers have a KiB for each image behind a disk.
const LINE_BYTES_MAX: usize = 16 << 20;
const CHUNK_BYTES: usize = 4096;
/// A command has some hundred bytes: QEMU takes it at once, or is not well.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the reader's thread may take to read what is there.
const LAST_WORDS_LIMIT: Duration = Duration::from_millis(200);
/// The number of what the reader's thread asks for itself.
const READERS_ID: u64 = 0;

#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    #[error("QEMU does not answer {command:?} within {timeout:?}")]
    Timeout { command: String, timeout: Duration },
    #[error(
        "QEMU has not made {path}: are `-chardev socket,id=vmemd-qmp,…` and `-mon chardev=vmemd-qmp,mode=control` on its \
         command line, as `vmemd qemu-args` prints them?"
    )]
    NoSocket {
        path: String,
        #[source]
        error: std::io::Error,
    },
    #[error("QEMU has closed its QMP socket")]
    Closed,
    #[error("QEMU's QMP socket")]
    Io(#[source] std::io::Error),
    #[error("what comes over the QMP socket is not QMP: {0}")]
    Rubbish(String),
    #[error("QEMU refuses {command:?}: {text}")]
    Refused { command: String, text: String },
}

/// A line from QEMU; which of the fields are there says what it is.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    event: Option<String>,
    data: Option<Value>,
    id: Option<u64>,
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<Refusal>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Refusal {
    desc: String,
}

type Received = Result<Line, QmpError>;

/// The machine's state, as QEMU has told it last.
#[derive(Clone, Debug, Default)]
pub(crate) struct HeardState(Arc<(Mutex<Heard>, Condvar)>);

#[derive(Debug, Default)]
struct Heard {
    /// QEMU's word for it (`running`, `paused`, `io-error`), and whether its vCPUs are let into the guest.
    word: String,
    running: bool,
    /// A question that was asked by the way has no answer yet.
    asked: bool,
    /// The cause of QEMU's end, if it said that it ends.
    ending: Option<String>,
    /// Nothing is heard any more.
    over: bool,
}

impl HeardState {
    pub(crate) fn get(&self) -> RunState {
        let heard = self.heard();
        runstate::of(&heard.word, heard.running)
    }

    pub(crate) fn set(&self, word: &str, running: bool) {
        let mut heard = self.heard();
        word.clone_into(&mut heard.word);
        heard.running = running;
    }

    /// QEMU's answer to `query-status`.
    pub(crate) fn answered(&self, answer: &Value) {
        self.set(answer["status"].as_str().unwrap_or_default(), answer["running"] == true);
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        lock(&self.0.0)
    }

    /// Of a conversation that has ended: why QEMU ends, if it said so. What it said last may not have been read yet.
    pub(crate) fn last_words(&self) -> Option<Failure> {
        let waited = self.0.1.wait_timeout_while(self.heard(), LAST_WORDS_LIMIT, |heard| !heard.over);
        let (heard, _) = waited.unwrap_or_else(PoisonError::into_inner);
        heard.ending.as_deref().map(runstate::why_ended)
    }

    fn over(&self) {
        self.heard().over = true;
        self.0.1.notify_all();
    }
}

#[derive(Debug)]
pub(crate) struct Qmp {
    writer: Arc<Mutex<UnixStream>>,
    answers: Receiver<Received>,
    heard_state: HeardState,
    last_id: u64,
    ended: bool,
}

impl Qmp {
    /// Connects to a QEMU that has mapped its memory: its sockets were there before that, in whatever order its command
    /// line is. Whether a monitor answers there is not known so soon; if it takes more than `usual`, the log says so.
    ///
    /// # Errors
    /// If there is no such socket, or nobody speaks QMP there within `timeout`.
    pub(crate) fn connect(path: &Path, usual: Duration, timeout: Duration) -> Result<Qmp, QmpError> {
        let stream = UnixStream::connect(path)
            .map_err(|error| QmpError::NoSocket { path: path.display().to_string(), error })?;
        Qmp::begin(stream, Some((path, usual)), timeout)
    }

    /// Begins a conversation.
    ///
    /// # Errors
    /// If nobody greets within `timeout`, or the other side does not speak QMP.
    pub(crate) fn over(stream: UnixStream, timeout: Duration) -> Result<Qmp, QmpError> {
        Qmp::begin(stream, None, timeout)
    }

    fn begin(
        stream: UnixStream,
        made_by_others: Option<(&Path, Duration)>,
        timeout: Duration,
    ) -> Result<Qmp, QmpError> {
        let deadline = Instant::now() + timeout;
        stream.set_write_timeout(Some(WRITE_TIMEOUT)).map_err(QmpError::Io)?;
        let reading = stream.try_clone().map_err(QmpError::Io)?;
        let (sender, answers) = channel();
        let writer = Arc::new(Mutex::new(stream));
        let heard_state = HeardState::default();
        let reader = Reader { stream: reading, writer: writer.clone(), heard_state: heard_state.clone() };
        std::thread::Builder::new()
            .name("vmemd-qmp".to_owned())
            .spawn(move || reader.run(&sender))
            .map_err(QmpError::Io)?;
        let mut qmp = Qmp { writer, answers, heard_state, last_id: READERS_ID, ended: false };
        let usual = made_by_others.map_or(timeout, |(_, usual)| usual.min(timeout));
        let mut greeting = qmp.answer("the greeting", Instant::now() + usual, usual);
        if let (Err(QmpError::Timeout { .. }), Some((path, _))) = (&greeting, made_by_others) {
            tracing::warn!(
                "QEMU does not answer on {} after {usual:?}: if it is not busy with opening its disks, is \
                 `-mon chardev=vmemd-qmp,mode=control` on its command line, as `vmemd qemu-args` prints it?",
                path.display()
            );
            greeting = qmp.answer("the greeting", deadline, timeout);
        }
        let greeting = greeting?;
        if greeting.greeting.is_none() {
            return Err(qmp.end(QmpError::Rubbish("no greeting".to_owned())));
        }
        qmp.ask("qmp_capabilities", Value::Null, deadline.saturating_duration_since(Instant::now()))?;
        send_query(&qmp.writer);
        Ok(qmp)
    }

    pub(crate) fn heard_state(&self) -> HeardState {
        self.heard_state.clone()
    }

    /// Has QEMU say what the machine does, for the next look, if that may have changed without a word. One that has
    /// said that it ends is not asked: it may abort.
    pub(crate) fn look_again(&self) {
        let mut heard = self.heard_state.heard();
        let may_tell = heard.ending.is_none() && runstate::is_unheard(&heard.word);
        if may_tell && !std::mem::replace(&mut heard.asked, true) {
            drop(heard);
            send_query(&self.writer);
        }
    }

    /// The same conversation, for ending it.
    pub(crate) fn monitor(&self) -> Option<UnixStream> {
        lock(&self.writer).try_clone().ok()
    }

    /// Nothing can be said any more: what is asked now does not reach QEMU.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Has QEMU do `command`, and returns what it answers.
    ///
    /// # Errors
    /// QEMU's refusal, or a conversation that broke. After a timeout the command may still be carried out.
    pub(crate) fn ask(
        &mut self,
        command: &str,
        arguments: Value,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        self.ask_with(command, arguments, None, timeout)
    }

    /// Has QEMU do all of these commands, one after the other, without waiting for an answer in between: what QEMU
    /// refuses is an answer like any other.
    ///
    /// # Errors
    /// A conversation that broke, as in [`Qmp::ask`].
    pub(crate) fn ask_all(
        &mut self,
        commands: &[(&str, Value)],
        timeout: Duration,
    ) -> Result<Vec<Result<Value, QmpError>>, QmpError> {
        let deadline = Instant::now() + timeout;
        let sent: Result<Vec<u64>, QmpError> =
            commands.iter().map(|(command, arguments)| self.say(command, arguments, None)).collect();
        let answer =
            |(id, (command, _)): (u64, &(&str, Value))| match self.heard(command, id, deadline, timeout) {
                Err(error) if !matches!(error, QmpError::Refused { .. }) => Err(error),
                answer => Ok(answer),
            };
        sent?.into_iter().zip(commands).map(answer).collect()
    }

    /// Gives QEMU a descriptor that commands then call `name`.
    ///
    /// # Errors
    /// As [`Qmp::ask`].
    pub(crate) fn give_fd(
        &mut self,
        name: &str,
        fd: BorrowedFd<'_>,
        timeout: Duration,
    ) -> Result<(), QmpError> {
        self.ask_with("getfd", json!({ "fdname": name }), Some(fd), timeout).map(|_| ())
    }

    fn ask_with(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        let deadline = Instant::now() + timeout;
        let id = self.say(command, &arguments, fd)?;
        self.heard(command, id, deadline, timeout)
    }

    /// Sends a command; its number.
    fn say(&mut self, command: &str, arguments: &Value, fd: Option<BorrowedFd<'_>>) -> Result<u64, QmpError> {
        if self.ended {
            return Err(QmpError::Closed);
        }
        self.last_id += 1;
        let id = self.last_id;
        let mut request = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            request["arguments"] = arguments.clone();
        }
        let written = write(&self.writer, &format!("{request}\n"), fd);
        written.map_err(|error| match error.kind() {
            std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset => {
                self.end(QmpError::Closed)
            }
            // Part of a line may have been written, which would spoil the next one.
            _ => self.end(QmpError::Io(error)),
        })?;
        Ok(id)
    }

    /// The answer to the command of that number.
    fn heard(
        &mut self,
        command: &str,
        id: u64,
        deadline: Instant,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        loop {
            let answer = self.answer(command, deadline, timeout)?;
            match (answer.id, answer.value, answer.error) {
                (Some(of), ..) if of < id => {}
                (Some(of), Some(value), None) if of == id => return Ok(value),
                (Some(of), None, Some(error)) if of == id => {
                    return Err(QmpError::Refused { command: command.to_owned(), text: error.desc });
                }
                // QEMU could not make out the request, so it cannot repeat its number.
                (None, None, Some(error)) => return Err(self.end(QmpError::Rubbish(error.desc))),
                _ => return Err(self.end(QmpError::Rubbish("an answer to nothing".to_owned()))),
            }
        }
    }

    fn answer(&mut self, command: &str, deadline: Instant, timeout: Duration) -> Received {
        match self.answers.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Ok(line)) => Ok(line),
            Ok(Err(error)) => Err(self.end(error)),
            Err(RecvTimeoutError::Timeout) => Err(QmpError::Timeout { command: command.to_owned(), timeout }),
            Err(RecvTimeoutError::Disconnected) => Err(self.end(QmpError::Closed)),
        }
    }

    /// Nothing is said any more: the answers could not be told apart.
    fn end(&mut self, why: QmpError) -> QmpError {
        self.ended = true;
        why
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        // The reader's thread sees the end.
        let _ = lock(&self.writer).shutdown(Shutdown::Both);
    }
}

fn write(writer: &Mutex<UnixStream>, line: &str, fd: Option<BorrowedFd<'_>>) -> std::io::Result<()> {
    let mut stream = lock(writer);
    let sent = match fd {
        Some(fd) => vmprocess::passing::send_with_fd(&stream, line.as_bytes(), &fd)?,
        None => 0,
    };
    stream.write_all(&line.as_bytes()[sent..])
}

fn send_query(writer: &Mutex<UnixStream>) {
    // If it cannot be sent, whoever asks next hears of it.
    let _ = write(writer, &format!("{}\n", json!({ "execute": "query-status", "id": READERS_ID })), None);
}

struct Reader {
    stream: UnixStream,
    writer: Arc<Mutex<UnixStream>>,
    heard_state: HeardState,
}

impl Reader {
    fn run(mut self, answers: &Sender<Received>) {
        self.read(answers);
        self.heard_state.over();
    }

    fn read(&mut self, answers: &Sender<Received>) {
        let mut lines = Lines::default();
        loop {
            let line = lines.next(&mut self.stream);
            let end = line.is_err();
            match line {
                Ok(Line { event: Some(event), data, .. }) => self.hear(&event, &data.unwrap_or_default()),
                Ok(Line { id: Some(READERS_ID), value, .. }) => {
                    self.heard_state.heard().asked = false;
                    if let Some(value) = value {
                        self.heard_state.answered(&value);
                    }
                }
                answer => {
                    if answers.send(answer).is_err() {
                        return;
                    }
                }
            }
            if end {
                let _ = self.stream.shutdown(Shutdown::Both);
                return;
            }
        }
    }

    /// Why a machine stands still, its status says, not the event. Nothing is asked at SHUTDOWN: QEMU (seen of 7.2)
    /// aborts if a command comes while it ends, and a machine that does not end (`-no-shutdown`) tells STOP as well.
    fn hear(&self, event: &str, data: &Value) {
        match event {
            "STOP" | "RESUME" | "RESET" | "SUSPEND" | "WAKEUP" | "WATCHDOG" | "GUEST_PANICKED" => {
                // It goes on.
                if matches!(event, "RESUME" | "RESET") {
                    self.heard_state.heard().ending = None;
                }
                send_query(&self.writer);
            }
            // With the machine stopped for it, which is not always said.
            "BLOCK_IO_ERROR" if data["action"] == "stop" => send_query(&self.writer),
            "SHUTDOWN" => {
                let cause = data["reason"].as_str().unwrap_or_default();
                self.heard_state.heard().ending = Some(cause.to_owned());
            }
            _ => {}
        }
    }
}

#[derive(Default)]
struct Lines {
    read: Vec<u8>,
}

impl Lines {
    fn next(&mut self, stream: &mut impl Read) -> Received {
        let mut searched = 0;
        loop {
            if let Some(end) = self.read[searched..].iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=searched + end).collect();
                return serde_json::from_slice(&line).map_err(|error| QmpError::Rubbish(error.to_string()));
            }
            searched = self.read.len();
            if searched > LINE_BYTES_MAX {
                return Err(QmpError::Rubbish(format!("a line of more than {LINE_BYTES_MAX} bytes")));
            }
            let mut chunk = [0; CHUNK_BYTES];
            match stream.read(&mut chunk) {
                Ok(0) => return Err(QmpError::Closed),
                Ok(count) => self.read.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                    return Err(QmpError::Closed);
                }
                Err(error) => return Err(QmpError::Io(error)),
            }
        }
    }
}

/// A panic elsewhere does not spoil what these locks protect: each change is complete in itself.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "qmp_tests.rs"]
mod tests;
