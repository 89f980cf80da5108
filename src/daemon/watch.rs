//! Ends the process of an arriving VM that has not answered within [`UP_LIMIT`], and tells the source why, while that
//! still waits for an answer. A QEMU may hang before it has a monitor: it opens a FIFO, waits for a disk, is stopped.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::time::Duration;

use migrate::RefuseKind;
use migrate::limits::{ACCEPT_LIMIT, scaled_for_tests};
use rustix::process::{Pid, Signal, kill_process_group};
use vmprocess::last_words::{LOG_BYTES_MAX, last_words};

/// How long it may take. Disks are opened meanwhile.
const UP_LIMIT: Duration = Duration::from_secs(45);
const _: () = assert!(UP_LIMIT.as_secs() + 5 < ACCEPT_LIMIT.as_secs(), "the source is to hear of it");

/// The record of a VM that is being taken, until its process has said that it is there.
#[derive(Debug)]
pub(super) struct Watch {
    /// Where the process says so.
    pub(super) streams: UnixStream,
    /// The source's connection, which is the process's too.
    pub(super) control: TcpStream,
    pub(super) log: Option<Log>,
}

/// A file that the process's standard error goes to, and where it ended before.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    start: u64,
}

impl Log {
    pub(super) fn new(path: PathBuf) -> Log {
        let start = path.metadata().map_or(0, |meta| meta.len());
        Log { path, start }
    }

    /// The last lines that were written to it since.
    fn last_words(&self) -> Option<String> {
        let mut file = File::open(&self.path).ok()?;
        let end = file.seek(SeekFrom::End(0)).ok()?;
        file.seek(SeekFrom::Start(self.start.max(end.saturating_sub(LOG_BYTES_MAX)))).ok()?;
        let mut said = Vec::new();
        file.take(LOG_BYTES_MAX).read_to_end(&mut said).ok()?;
        let said = String::from_utf8_lossy(&said);
        let lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
        Some(last_words(lines)).filter(|said| !said.is_empty())
    }
}

impl Watch {
    /// Waits until the process is there, or has ended, and ends it if neither comes in time. Returns why, for the
    /// daemon's log.
    pub(super) fn until_up(mut self, child: &mut Child) -> Option<String> {
        let limit = scaled_for_tests(UP_LIMIT);
        let waiting = self.streams.set_read_timeout(Some(limit));
        // A word, or the end of the connection with the process's.
        match waiting.and_then(|()| self.streams.read(&mut [0])) {
            Err(error)
                if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            _ => return None,
        }
        // With what it has started: it has a session of its own.
        // The group's leader is a child that has not been waited for: the number is nobody else's.
        if let Some(group) = Pid::from_raw(child.id() as i32) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = child.kill();
        let said = match &self.log {
            Some(log) => match log.last_words() {
                Some(words) => format!("its last words: {words}"),
                None => "it said nothing".to_owned(),
            },
            None => "what it said is in the daemon's log (or give `vmemd serve` --log-dir)".to_owned(),
        };
        let text = format!(
            "its process did not come up within {limit:?}, and was ended: something that it opens at its start keeps it \
             waiting (a FIFO, a disk that does not answer); {said}"
        );
        let _ = child.wait();
        migrate::refuse(&mut self.control, RefuseKind::Other, &text);
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_are_those_of_this_process() {
        let place = testkit::directory("watch");
        let path = place.path().join("log");
        std::fs::write(&path, "of another before\n").unwrap();
        let log = Log::new(path.clone());
        assert_eq!(log.last_words(), None);
        let mut said = std::fs::read_to_string(&path).unwrap();
        said.push_str("\n a: b\n\nc\n");
        std::fs::write(&path, said).unwrap();
        assert_eq!(log.last_words().as_deref(), Some("a: b; c"));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(log.last_words(), None);
    }
}
