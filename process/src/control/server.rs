//! Serves a VM's control socket: a thread a connection, of which there are only so many.

use std::fs::File;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, recv};
use serde_json::Value;
use tracing::{debug, warn};

use super::lines::{LINE_TIMEOUT, LineError, Lines};
use super::peer::Peers;
use super::protocol::{CheckpointStat, MigrationStat, Reply, Request};
use super::versions::{Asked, VERSIONS, no_request};
use crate::failure::{Failure, FailureKind};
use crate::passing::receive_fd;

/// Connections served at once; more are told to come back.
pub const CONNECTIONS_MAX: usize = 64;
/// A connection on which nothing is asked for so long is closed.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of a line that are looked at before it is read. A request to cancel is shorter.
pub(super) const PEEKED: usize = 64;
/// Pause after an accept that failed for want of descriptors or memory.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// The side that carries requests out.
pub trait Service: Send + Sync + 'static {
    /// Does what is asked, on the connection's own thread, and gives the value of the answer.
    ///
    /// # Errors
    /// The refusal or failure that the client is told.
    fn serve(&self, request: Request, client: &mut Client<'_>) -> Result<Value, Failure>;
}

/// The client that waits for the answer under way.
#[derive(Debug)]
pub struct Client<'a> {
    lines: &'a mut Lines,
}

impl Client<'_> {
    /// Tells how far the request is.
    ///
    /// # Errors
    /// If the client is gone.
    pub fn progress(&mut self, progress: MigrationStat) -> Result<(), LineError> {
        self.lines.write(&Reply::Progress(progress))
    }

    /// Tells how far the checkpoint is.
    ///
    /// # Errors
    /// If the client is gone.
    pub fn saving(&mut self, stat: CheckpointStat) -> Result<(), LineError> {
        self.lines.write(&Reply::Saving(stat))
    }

    /// Tells that the files of a checkpoint are written.
    ///
    /// # Errors
    /// If the client is gone.
    pub fn saved(&mut self, report: Value) -> Result<(), LineError> {
        self.lines.write(&Reply::Saved(report))
    }

    /// Has the client pass so many files.
    ///
    /// # Errors
    /// If it passes something else, or nothing in time.
    pub fn files(&mut self, count: u32) -> Result<Vec<File>, Failure> {
        let failed = |error: &dyn std::error::Error| {
            Failure::new(FailureKind::Usage, format!("the client does not pass the {count} files: {error}"))
        };
        self.lines.write(&Reply::Files(count)).map_err(|error| failed(&error))?;
        let mut files = Vec::new();
        for number in 0..count {
            match receive_fd(self.lines.stream(), LINE_TIMEOUT) {
                Ok((fd, tag)) if tag == number => files.push(File::from(fd)),
                Ok((_, tag)) => {
                    let text = format!("number {tag} instead of {number}");
                    return Err(failed(&std::io::Error::other(text)));
                }
                Err(error) => return Err(failed(&error)),
            }
        }
        Ok(files)
    }

    /// What the client says next, if it says something in this time.
    ///
    /// # Errors
    /// If it is gone, or says what is no request.
    pub fn says(&mut self, timeout: Duration) -> Result<Option<Request>, LineError> {
        let mut polled = [PollFd::new(self.lines.stream(), PollFlags::IN)];
        let timeout = Timespec::try_from(timeout).expect("a short time");
        match poll(&mut polled, Some(&timeout)) {
            Ok(ready) if ready > 0 => self.lines.read::<Request>(LINE_TIMEOUT).map(Some),
            _ => Ok(None),
        }
    }

    /// Tells part of a recording.
    ///
    /// # Errors
    /// If the client is gone.
    pub fn faults(&mut self, seen: swapd::FaultsSeen) -> Result<(), LineError> {
        self.lines.write(&Reply::Faults(seen))
    }

    /// Whether the client says that it wants no more of what is under way. Anything else that it says waits for its
    /// turn.
    pub fn cancels(&mut self) -> bool {
        let mut said = [0; PEEKED];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let length = recv(self.lines.stream(), &mut said, flags).map_or(0, |(length, _)| length);
        let line = said[..length].split(|byte| *byte == b'\n').next().unwrap_or_default();
        let cancels = matches!(serde_json::from_slice(line), Ok(Request::Cancel));
        cancels && self.lines.read::<Request>(IDLE_TIMEOUT).is_ok()
    }

    /// Whether the client has closed the connection (not only its sending half).
    pub fn gone(&self) -> bool {
        let mut polled = [PollFd::new(self.lines.stream(), PollFlags::empty())];
        let ready = poll(&mut polled, Some(&Timespec::default()));
        let closed = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
        ready.is_ok_and(|ready| ready > 0) && polled[0].revents().intersects(closed)
    }
}

#[derive(Debug, Default)]
struct Load {
    connections: usize,
    /// Requests whose answer has not been written yet.
    unanswered: usize,
}

/// The running server. Its threads end with the process.
#[derive(Clone, Debug)]
pub struct Server {
    load: Arc<(Mutex<Load>, Condvar)>,
}

impl Server {
    /// Serves every connection to `listener` from now on.
    ///
    /// # Errors
    /// If the kernel gives no thread.
    pub fn start(listener: UnixListener, service: Arc<dyn Service>) -> Result<Server, Failure> {
        let server = Server { load: Arc::default() };
        let accepting = server.clone();
        std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || accepting.accept(&listener, &service))
            .map_err(|error| Failure::io("cannot start the control thread", &error))?;
        Ok(server)
    }

    /// Waits until every request has its answer, at most `timeout`.
    pub fn wait_answered(&self, timeout: Duration) {
        let (load, changed) = &*self.load;
        let guard = load.lock().expect("the load's lock is never poisoned");
        let _ = changed.wait_timeout_while(guard, timeout, |load| load.unanswered > 0);
    }

    fn change(&self, change: impl FnOnce(&mut Load)) {
        let (load, changed) = &*self.load;
        change(&mut load.lock().expect("the load's lock is never poisoned"));
        changed.notify_all();
    }

    fn accept(&self, listener: &UnixListener, service: &Arc<dyn Service>) {
        let mut peers = Peers::default();
        loop {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) => {
                    debug!(%error, "accept");
                    std::thread::sleep(ACCEPT_RETRY);
                    continue;
                }
            };
            if let Err(failure) = peers.check(&stream) {
                refuse(stream, failure);
                continue;
            }
            let mut full = false;
            self.change(|load| {
                full = load.connections >= CONNECTIONS_MAX;
                load.connections += usize::from(!full);
            });
            if full {
                let text = format!("{CONNECTIONS_MAX} connections are open already: try again later");
                refuse(stream, Failure::new(FailureKind::Other, text));
                continue;
            }
            let (server, service) = (self.clone(), service.clone());
            let spawned = std::thread::Builder::new().name("control-client".to_owned()).spawn(move || {
                server.converse(stream, &*service);
                server.change(|load| load.connections -= 1);
            });
            if let Err(error) = spawned {
                warn!(%error, "no thread for a control connection");
                self.change(|load| load.connections -= 1);
            }
        }
    }

    fn converse(&self, stream: UnixStream, service: &dyn Service) {
        let mut lines = Lines::new(stream);
        let opened = Instant::now();
        loop {
            let read = match lines.read::<Value>(IDLE_TIMEOUT) {
                Ok(line) => Asked::new(line, &VERSIONS),
                Err(error @ (LineError::Json(_) | LineError::TooLong)) => Err(no_request(&error)),
                Err(error) => return debug!(%error, age = ?opened.elapsed(), "control connection ends"),
            };
            let Asked { request, version } = match read {
                Ok(read) => read,
                Err(failure) => {
                    let _ = lines.write(&Reply::Error(failure));
                    return;
                }
            };
            self.change(|load| load.unanswered += 1);
            let written = answer(&mut lines, request, version, service);
            self.change(|load| load.unanswered -= 1);
            if written.is_err() {
                return;
            }
        }
    }
}

/// The version goes ahead of the answer, which may be long in coming. A client that has gone by then is no reason not
/// to serve it: that is up to each request.
fn answer(
    lines: &mut Lines,
    request: Request,
    version: Option<u16>,
    service: &dyn Service,
) -> Result<(), LineError> {
    let told = version.map_or(Ok(()), |version| lines.write(&Reply::Version(version)));
    let reply = match service.serve(request, &mut Client { lines }) {
        Ok(value) => Reply::Ok(value),
        Err(failure) => Reply::Error(failure),
    };
    told.and_then(|()| lines.write(&reply))
}

fn refuse(stream: UnixStream, failure: Failure) {
    let _ = Lines::new(stream).write(&Reply::Error(failure));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    struct Echo;

    impl Service for Echo {
        fn serve(&self, request: Request, client: &mut Client<'_>) -> Result<Value, Failure> {
            assert!(!client.gone());
            match request {
                Request::Stat => Ok("stat".into()),
                _ => Err(Failure::new(FailureKind::Name, "no")),
            }
        }
    }

    fn serve() -> (std::path::PathBuf, (Server, testkit::TempDir)) {
        let directory = testkit::directory("server");
        let path = directory.path().join("socket");
        let server = Server::start(UnixListener::bind(&path).unwrap(), Arc::new(Echo)).unwrap();
        (path, (server, directory))
    }

    #[test]
    fn answers_one_request_after_the_other() {
        let (path, _server) = serve();
        let mut lines = Lines::new(UnixStream::connect(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
        lines.write(&Request::Stat).unwrap();
        assert_eq!(lines.read::<Reply>(IDLE_TIMEOUT).unwrap(), Reply::Ok("stat".into()));
        lines.write(&Request::Pause).unwrap();
        assert_eq!(
            lines.read::<Reply>(IDLE_TIMEOUT).unwrap(),
            Reply::Error(Failure::new(FailureKind::Name, "no"))
        );
    }

    #[test]
    fn rubbish_gets_an_error_and_the_door() {
        let (path, _server) = serve();
        let mut stream = UnixStream::connect(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        stream.write_all(b"{\"op\":\"explode\"}\n").unwrap();
        let mut lines = Lines::new(stream);
        let Reply::Error(failure) = lines.read::<Reply>(IDLE_TIMEOUT).unwrap() else { panic!("an error") };
        assert_eq!(failure.kind, FailureKind::Usage);
        assert!(matches!(lines.read::<Reply>(IDLE_TIMEOUT), Err(LineError::Closed)));
    }

    /// What a process answers to this line, until it waits for the next or closes the connection.
    fn answers(line: &str) -> (Vec<Reply>, bool) {
        let (path, _server) = serve();
        let mut stream = UnixStream::connect(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        stream.write_all(format!("{line}\n{{\"op\":\"pause\"}}\n").as_bytes()).unwrap();
        let mut lines = Lines::new(stream);
        let paused = Reply::Error(Failure::new(FailureKind::Name, "no"));
        let mut replies = Vec::new();
        loop {
            match lines.read::<Reply>(IDLE_TIMEOUT) {
                Ok(reply) if reply == paused => return (replies, true),
                Ok(reply) => replies.push(reply),
                Err(error) => {
                    assert!(matches!(error, LineError::Closed), "{error}");
                    return (replies, false);
                }
            }
        }
    }

    #[test]
    fn the_version_is_told_to_whoever_knows_of_versions() {
        let stat = Reply::Ok("stat".into());
        assert_eq!(answers(r#"{"op":"stat"}"#), (vec![stat.clone()], true));
        let version = Reply::Version(1);
        for versions in ["[1,1]", "[0,1]", "[1,7]", "[0,65535]"] {
            let told = answers(&format!(r#"{{"op":"stat","versions":{versions}}}"#));
            assert_eq!(told, (vec![version.clone(), stat.clone()], true), "{versions}");
        }
    }

    #[test]
    fn other_versions_get_an_error_and_the_door() {
        for (versions, kind, says) in [
            ("[2,9]", FailureKind::Link, "version 1: use the vmemd with which the VM was started"),
            ("[0,0]", FailureKind::Link, "use a newer vmemd"),
            ("[9,2]", FailureKind::Usage, "versions 9 to 2 are none"),
            ("[1]", FailureKind::Usage, "versions"),
            ("true", FailureKind::Usage, "versions"),
        ] {
            let (replies, open) = answers(&format!(r#"{{"op":"stat","versions":{versions}}}"#));
            let [Reply::Error(failure)] = replies.as_slice() else { panic!("{versions}: {replies:?}") };
            assert!(failure.kind == kind && failure.text.contains(says) && !open, "{versions}: {failure:?}");
        }
    }

    #[test]
    fn the_number_of_connections_is_bounded() {
        let (path, _server) = serve();
        let mut open: Vec<Lines> =
            (0..CONNECTIONS_MAX).map(|_| Lines::new(UnixStream::connect(&path).unwrap())).collect();
        for lines in &mut open {
            lines.write(&Request::Stat).unwrap();
            lines.read::<Reply>(IDLE_TIMEOUT).unwrap();
        }
        let mut one_more = Lines::new(UnixStream::connect(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(one_more.read::<Reply>(IDLE_TIMEOUT).unwrap(), Reply::Error(_)));
    }
}
