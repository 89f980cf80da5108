//! Questions to a QEMU binary: what it prints and ends.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use vmprocess::failure::{Failure, FailureKind};

/// It answers in a fraction of a second. One that does not must not keep the daemon from every other VM.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// More than any QEMU prints.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// Asks a QEMU binary.
pub trait Ask {
    /// What `binary args…` prints.
    fn ask(&self, binary: &Path, args: &[&str]) -> Result<String, Failure>;
}

/// Really asks it.
#[derive(Clone, Copy, Debug)]
pub struct Really;

impl Ask for Really {
    fn ask(&self, binary: &Path, args: &[&str]) -> Result<String, Failure> {
        ask_within(ANSWER_LIMIT, binary, args)
    }
}

fn ask_within(limit: Duration, binary: &Path, args: &[&str]) -> Result<String, Failure> {
    let shown = format!("{} {}", binary.display(), args.join(" "));
    let host = |text: String| Failure::new(FailureKind::Host, text);
    // The caller's preload is for the VM, not for a question.
    let said = output(limit, Command::new(binary).args(args).env_remove("LD_PRELOAD"))
        .map_err(|error| host(format!("`{shown}` cannot be started: {error}")))?;
    let Some((status, out, err)) = said else {
        return Err(host(format!("`{shown}` does not end within {limit:?}: is it a QEMU?")));
    };
    if !status.success() {
        return Err(host(format!("`{shown}` failed ({status}): {}", err.trim())));
    }
    Ok(out)
}

/// How a command ended, and what it printed. None, and it is killed, if it does not end in time.
pub(super) fn output(
    limit: Duration,
    command: &mut Command,
) -> std::io::Result<Option<(ExitStatus, String, String)>> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let said = answer(&mut child, Instant::now() + limit);
    if said.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    Ok(said)
}

/// None if it does not come in time.
fn answer(child: &mut Child, deadline: Instant) -> Option<(ExitStatus, String, String)> {
    let (out, err) = (read(child.stdout.take()?), read(child.stderr.take()?));
    let left = || deadline.saturating_duration_since(Instant::now());
    let (out, err) = (out.recv_timeout(left()).ok()?, err.recv_timeout(left()).ok()?);
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some((status, out, err)),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(LOOK_EVERY),
            _ => return None,
        }
    }
}

/// All of what comes, once it has ended.
fn read(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, all) = channel();
    std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = pipe.take(ANSWER_BYTES_MAX).read_to_end(&mut text);
        let _ = sender.send(String::from_utf8_lossy(&text).into_owned());
    });
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_answers_fails_or_is_given_up() {
        let sh = |script: &str, limit| ask_within(limit, Path::new("/bin/sh"), &["-c", script]);
        let long = Duration::from_secs(60);
        assert_eq!(sh("echo yes; echo no >&2", long).unwrap(), "yes\n");
        let failed = sh("echo yes; echo no >&2; exit 3", long).unwrap_err();
        assert!(failed.text.ends_with("failed (exit status: 3): no"), "{failed}");
        for hangs in ["exec sleep 60", "exec >&- 2>&-; exec sleep 60", "sleep 60 & exit 0"] {
            let begun = Instant::now();
            let given_up = sh(hangs, Duration::from_millis(50)).unwrap_err();
            assert!(given_up.text.contains("does not end within 50ms"), "{given_up}");
            assert!(begun.elapsed() < long, "{hangs}");
        }
        assert!(ask_within(long, Path::new("/no/such/program"), &[]).is_err());
    }
}
