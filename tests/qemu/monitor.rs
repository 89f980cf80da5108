//! A QMP monitor of the VM's user, beside vmemd's.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use super::BOOT;
use crate::common::wait_for;

pub(crate) struct Monitor(pub(crate) BufReader<UnixStream>);

impl Monitor {
    /// Connects to the monitor, once QEMU has made it.
    pub(crate) fn connect(path: &Path) -> Monitor {
        let stream = wait_for("QEMU's monitor", || UnixStream::connect(path).ok());
        stream.set_read_timeout(Some(BOOT)).expect("a socket");
        let mut monitor = Monitor(BufReader::new(stream));
        monitor.ask("qmp_capabilities", json!({}));
        monitor
    }

    /// Sends a line in one piece: QEMU may end before the end of a line that it has understood.
    pub(crate) fn says(&mut self, command: &str, arguments: Value) {
        let request = json!({ "execute": command, "arguments": arguments });
        self.0.get_mut().write_all(format!("{request}\n").as_bytes()).expect("QEMU's monitor");
    }

    pub(crate) fn line(&mut self) -> Value {
        let mut line = String::new();
        assert!(self.0.read_line(&mut line).expect("QEMU's monitor") > 0, "QEMU has ended");
        serde_json::from_str(&line).expect("QMP")
    }

    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Value {
        self.says(command, arguments);
        loop {
            let line = self.line();
            assert!(line.get("error").is_none(), "{command}: {line}");
            if let Some(value) = line.get("return") {
                return value.clone();
            }
        }
    }

    /// The answer of the monitor for people (HMP) to a line.
    pub(crate) fn human(&mut self, line: &str) -> String {
        let said = self.ask("human-monitor-command", json!({ "command-line": line }));
        said.as_str().expect("words").trim().to_owned()
    }

    /// Waits until QEMU sends this event.
    pub(crate) fn hears(&mut self, event: &str) {
        while self.line()["event"] != event {}
    }
}
