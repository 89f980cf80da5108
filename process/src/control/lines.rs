//! JSON lines over a Unix socket, with a bounded length and a deadline a line.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest line that either side accepts, newline included.
pub const LINE_MAX: usize = 64 << 10;
/// Longest time between a line's first byte and its last, and for a line to be written.
pub const LINE_TIMEOUT: Duration = Duration::from_secs(10);

const READ_CHUNK: usize = 4096;

/// Why a line could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The other side has closed the connection; a line that it had begun is lost.
    #[error("the other side closed the connection")]
    Closed,
    /// The other side was silent, or did not read, for this long.
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// The process has chosen a version that it was not offered: what it says next may mean something else.
    #[error("it chose version {0} of the control protocol, which it was not offered")]
    Version(u16),
    /// A line is longer than [`LINE_MAX`]. Nothing more can be read: where the next one begins is not known.
    #[error("a line longer than {LINE_MAX} bytes")]
    TooLong,
    /// A line is no JSON, or not of the shape that was expected.
    #[error("not the expected JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// Any other error of the socket.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// One end of a connection.
#[derive(Debug)]
pub struct Lines {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Lines {
    /// Lines over a connected socket, of which nothing has been read yet.
    pub fn new(stream: UnixStream) -> Lines {
        Lines { stream, buffer: Vec::new() }
    }

    /// The socket, to poll or peek at. What is read from it directly is missing from a line.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Waits until there is something to read, or a signal was caught, at most `timeout`.
    pub fn wait(&self, timeout: Duration) {
        if !self.buffer.contains(&b'\n') {
            crate::signals::wait_readable(self.stream.as_fd(), Some(timeout));
        }
    }

    /// Writes one value as a line.
    ///
    /// # Errors
    /// If the other side is gone or does not read for [`LINE_TIMEOUT`].
    pub fn write<T: Serialize>(&mut self, value: &T) -> Result<(), LineError> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        self.stream.set_write_timeout(Some(LINE_TIMEOUT))?;
        self.stream.write_all(&line).map_err(|error| timed_out(error, LINE_TIMEOUT))
    }

    /// Reads one line as a value. Waits at most `idle` for it to begin.
    ///
    /// # Errors
    /// [`LineError::Closed`] at the end of the stream, and every other way in which there is no line.
    pub fn read<T: DeserializeOwned>(&mut self, idle: Duration) -> Result<T, LineError> {
        let line = self.read_line(idle)?;
        Ok(serde_json::from_slice(&line)?)
    }

    fn read_line(&mut self, idle: Duration) -> Result<Vec<u8>, LineError> {
        let mut searched = 0;
        let mut deadline = if self.buffer.is_empty() {
            (Instant::now() + idle, idle)
        } else {
            (Instant::now() + LINE_TIMEOUT, LINE_TIMEOUT)
        };
        loop {
            if let Some(at) = self.buffer[searched..].iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(searched + at + 1);
                return Ok(std::mem::replace(&mut self.buffer, rest));
            }
            searched = self.buffer.len();
            if searched >= LINE_MAX {
                return Err(LineError::TooLong);
            }
            let left = deadline.0.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(LineError::Timeout(deadline.1));
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut chunk = [0; READ_CHUNK];
            let count = match self.stream.read(&mut chunk) {
                Ok(0) => return Err(LineError::Closed),
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(timed_out(error, deadline.1)),
            };
            if searched == 0 {
                deadline = (Instant::now() + LINE_TIMEOUT, LINE_TIMEOUT);
            }
            self.buffer.extend_from_slice(&chunk[..count]);
        }
    }
}

fn timed_out(error: std::io::Error, after: Duration) -> LineError {
    match error.kind() {
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => LineError::Timeout(after),
        std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset => LineError::Closed,
        _ => LineError::Io(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_arrive_one_by_one_however_they_were_cut() {
        let (mut raw, ours) = UnixStream::pair().unwrap();
        let mut lines = Lines::new(ours);
        raw.write_all(b"1\n2\n\"thr").unwrap();
        assert_eq!(lines.read::<u32>(LINE_TIMEOUT).unwrap(), 1);
        assert_eq!(lines.read::<u32>(LINE_TIMEOUT).unwrap(), 2);
        raw.write_all(b"ee\"\n").unwrap();
        assert_eq!(lines.read::<String>(LINE_TIMEOUT).unwrap(), "three");
        drop(raw);
        assert!(matches!(lines.read::<u32>(LINE_TIMEOUT), Err(LineError::Closed)));
    }

    #[test]
    fn what_never_ends_is_refused() {
        let (mut raw, ours) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || raw.write_all(&vec![b'x'; 64 * LINE_MAX]));
        let mut lines = Lines::new(ours);
        assert!(matches!(lines.read::<String>(LINE_TIMEOUT), Err(LineError::TooLong)));
        drop(lines);
        assert!(writer.join().unwrap().is_err());
    }

    #[test]
    fn silence_ends_by_itself() {
        let (_raw, ours) = UnixStream::pair().unwrap();
        let read = Lines::new(ours).read::<u32>(Duration::from_millis(20));
        assert!(matches!(read, Err(LineError::Timeout(_))));
    }
}
