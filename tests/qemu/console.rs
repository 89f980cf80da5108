//! A serial console on a Unix socket. Bytes are kept for each connection; the lines are those of all connections, one
//! after the other: of one VM that moves, or of several lives of one that is restored.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(crate) struct Console {
    path: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    connections: Mutex<Vec<Connection>>,
    heard: Condvar,
}

/// A QEMU that connected, and all that it printed.
#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    printed: Vec<u8>,
    ended: bool,
}

impl Console {
    /// Takes connections until the test ends.
    pub(crate) fn listen(path: &Path) -> Console {
        let listener = UnixListener::bind(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let shared = Arc::new(Shared::default());
        let accepting = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut connections = accepting.connections.lock().expect("a lock");
                let (number, writing) = (connections.len(), stream.try_clone().expect("a clone"));
                connections.push(Connection { stream: writing, printed: Vec::new(), ended: false });
                let shared = accepting.clone();
                std::thread::spawn(move || shared.read(number, stream));
            }
        });
        Console { path: path.to_owned(), shared }
    }

    /// QEMU's arguments for it.
    pub(crate) fn args(&self) -> [String; 4] {
        let chardev = format!("socket,id=console,path={},server=off", self.path.display());
        ["-chardev".to_owned(), chardev, "-serial".to_owned(), "chardev:console".to_owned()]
    }

    /// Every whole line so far, without its end. A line that one QEMU began and the next ended is one line.
    pub(crate) fn lines(&self) -> Vec<String> {
        lines(&self.shared.connections.lock().expect("a lock"))
    }

    /// Every whole line of each connection. A VM that is restored does not go on where the one before it was killed:
    /// the line which that one began has no end.
    pub(crate) fn lines_of_each(&self) -> Vec<String> {
        let connections = self.shared.connections.lock().expect("a lock");
        connections.iter().flat_map(|connection| lines(std::slice::from_ref(connection))).collect()
    }

    /// Every whole line, once all that QEMU has printed so far has been read; none before that. Of a QEMU that stands
    /// still these are all its lines.
    pub(crate) fn all_lines(&self) -> Option<Vec<String>> {
        let connections = self.shared.connections.lock().expect("a lock");
        connections.iter().all(|connection| unread(&connection.stream) == 0).then(|| lines(&connections))
    }

    /// How many QEMUs have connected so far.
    pub(crate) fn connections(&self) -> usize {
        self.shared.connections.lock().expect("a lock").len()
    }

    /// Whether every QEMU that connected has gone: nothing more comes unless another connects.
    pub(crate) fn is_over(&self) -> bool {
        self.shared.connections.lock().expect("a lock").iter().all(|connection| connection.ended)
    }

    /// The first line that `wanted` likes, if one comes in time.
    pub(crate) fn find(&self, wanted: impl Fn(&str) -> bool, time: Duration) -> Option<String> {
        let deadline = Instant::now() + time;
        let mut connections = self.shared.connections.lock().expect("a lock");
        loop {
            if let Some(line) = lines(&connections).into_iter().find(|line| wanted(line)) {
                return Some(line);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            connections = self.shared.heard.wait_timeout(connections, left).expect("a lock").0;
        }
    }

    /// Types a line into the newest QEMU's console.
    pub(crate) fn type_line(&self, line: &str) {
        let mut connections = self.shared.connections.lock().expect("a lock");
        let connection = connections.last_mut().expect("no QEMU has connected");
        connection.stream.write_all(format!("{line}\n").as_bytes()).expect("QEMU reads its console");
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Shared {
    fn read(&self, number: usize, mut stream: UnixStream) {
        let mut buffer = [0; 4096];
        loop {
            wait_readable(&stream);
            // Read under the lock: what has left the socket is among the lines for whoever has the lock next.
            let mut connections = self.connections.lock().expect("a lock");
            let Ok(count @ 1..) = stream.read(&mut buffer) else {
                connections[number].ended = true;
                return;
            };
            connections[number].printed.extend_from_slice(&buffer[..count]);
            self.heard.notify_all();
        }
    }
}

/// Waits until a read of the stream would not wait.
fn wait_readable(stream: &UnixStream) {
    let mut poll = libc::pollfd { fd: stream.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, as the count says, which outlives the call.
    while unsafe { libc::poll(&raw mut poll, 1, -1) } < 0 {}
}

/// Bytes that have come and have not been read.
fn unread(stream: &UnixStream) -> i32 {
    let mut bytes = 0;
    // SAFETY: the request writes one int, which outlives the call.
    let asked = unsafe { libc::ioctl(stream.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    assert_eq!(asked, 0, "{}", std::io::Error::last_os_error());
    bytes
}

/// Only one of the VMs runs at any moment, each after the one before it: their bytes follow one another.
fn lines(connections: &[Connection]) -> Vec<String> {
    let bytes: Vec<u8> =
        connections.iter().flat_map(|connection| connection.printed.iter().copied()).collect();
    let text = String::from_utf8_lossy(&bytes);
    let (whole, _) = text.rsplit_once('\n').unwrap_or_default();
    whole.lines().map(|line| line.trim_end_matches('\r').to_owned()).collect()
}

/// The value of `name=` in a line of the checker.
pub(crate) fn field<T: std::str::FromStr>(line: &str, name: &str) -> T {
    line.split_whitespace()
        .filter_map(|word| word.split_once('='))
        .find_map(|(key, value)| if key == name { value.parse().ok() } else { None })
        .unwrap_or_else(|| panic!("no {name}=... that is right in {line:?}"))
}
