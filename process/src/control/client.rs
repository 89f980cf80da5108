//! Asks a VM's process something over its control socket.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use migrate::versions::Versions;
use serde_json::Value;

use super::lines::{LineError, Lines};
use super::protocol::{CheckpointRequest, CheckpointStat, MigrationStat, Reply, Request, VmStat};
use super::rundir::{RunDir, SocketName};
use super::versions::{Offer, UNSAID, VERSIONS, is_no_request, none_in_common};
use crate::failure::{Failure, FailureKind};
use crate::passing::send_fd;

/// How long a VM's process may take to say what it knows.
pub const STAT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long it may take to do something short: pausing waits for faults being served, a smaller budget for page-outs.
pub const ACTION_TIMEOUT: Duration = Duration::from_secs(120);
/// A migration tells its progress much more often than this.
pub const PROGRESS_TIMEOUT: Duration = Duration::from_secs(120);

/// A connection to a VM's process.
#[derive(Debug)]
pub struct VmClient {
    name: String,
    lines: Lines,
    /// The versions that this side knows.
    versions: Versions,
    /// The version that the VM's process has chosen; None until it has said so, and of one that does not know of
    /// versions.
    version: Option<u16>,
}

impl VmClient {
    fn over(name: &str, stream: UnixStream) -> VmClient {
        VmClient { name: name.to_owned(), lines: Lines::new(stream), versions: VERSIONS, version: None }
    }

    /// Connects to the VM of that name.
    ///
    /// # Errors
    /// [`FailureKind::Name`] if there is none.
    pub fn connect(dir: &RunDir, name: &str) -> Result<VmClient, Failure> {
        loop {
            let socket = dir.find(name)?;
            match VmClient::connect_to(dir, &socket) {
                // It lived when it was found: its socket has another name since (a hand-over), or it ended. The next
                // look tells.
                Err(failure) if failure.kind == FailureKind::Name => {}
                connected => return connected,
            }
        }
    }

    /// Connects to the VM whose socket that is: during a move two VMs of one host may have the same name.
    ///
    /// # Errors
    /// If the process ended meanwhile, or this user may not talk to it.
    pub fn connect_to(dir: &RunDir, socket: &SocketName) -> Result<VmClient, Failure> {
        let stream = dir.connect(socket).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
                Failure::new(FailureKind::Name, format!("the VM {:?} has just ended or moved", socket.name()))
            }
            std::io::ErrorKind::WouldBlock => Failure::new(
                FailureKind::Other,
                format!("the VM {:?} does not answer: its process stands still", socket.name()),
            ),
            std::io::ErrorKind::PermissionDenied => Failure::new(
                FailureKind::Host,
                format!("no permission to talk to the VM {:?}: use the account that runs it", socket.name()),
            ),
            _ => Failure::io(format!("cannot talk to the VM {:?}", socket.name()), &error),
        })?;
        Ok(VmClient::over(socket.name(), stream))
    }

    /// Asks for the VM's facts.
    ///
    /// # Errors
    /// If it does not answer in [`STAT_TIMEOUT`].
    pub fn stat(&mut self) -> Result<VmStat, Failure> {
        let value = self.ask(&Request::Stat, STAT_TIMEOUT)?;
        serde_json::from_value(value).map_err(|error| {
            Failure::new(FailureKind::Other, format!("the VM {:?} runs another vmemd: {error}", self.name))
        })
    }

    /// Asks, and waits for the answer. `timeout` is for each line of it, so progress keeps the waiting alive.
    ///
    /// # Errors
    /// The VM's refusal, or no answer.
    pub fn ask(&mut self, request: &Request, timeout: Duration) -> Result<Value, Failure> {
        self.make_sure()?;
        self.reply(request, timeout).map_err(|error| self.lost(&error))?
    }

    fn reply(&mut self, request: &Request, timeout: Duration) -> Result<Result<Value, Failure>, LineError> {
        self.say(request)?;
        loop {
            match self.hear(timeout)? {
                Reply::Ok(value) => return Ok(Ok(value)),
                Reply::Error(failure) => return Ok(Err(failure)),
                _ => {}
            }
        }
    }

    /// A process that knows of one version only does what it is asked without a look at ours. If it would misunderstand
    /// us, it is asked for its facts alone, which harms nothing.
    fn make_sure(&mut self) -> Result<(), Failure> {
        if self.versions.contains(&UNSAID) || self.version.is_some() {
            return Ok(());
        }
        self.reply(&Request::Stat, STAT_TIMEOUT).map_err(|error| self.lost(&error))??;
        match self.version {
            Some(_) => Ok(()),
            None => Err(none_in_common(self.versions.clone(), UNSAID..=UNSAID)),
        }
    }

    fn say(&mut self, request: &Request) -> Result<(), LineError> {
        self.lines.write(&Offer::new(request, &self.versions))
    }

    fn hear(&mut self, timeout: Duration) -> Result<Reply, LineError> {
        let reply = self.lines.read::<Reply>(timeout)?;
        if let Reply::Version(version) = reply {
            if !self.versions.contains(&version) {
                return Err(LineError::Version(version));
            }
            self.version = Some(version);
        }
        Ok(reply)
    }

    /// Asks for something long. `progress` is called on the way; a signal ends the waiting.
    ///
    /// # Errors
    /// The VM's refusal, no answer, or [`FailureKind::Interrupted`].
    pub fn ask_long(
        &mut self,
        request: &Request,
        progress: &mut dyn FnMut(MigrationStat),
    ) -> Result<Value, Failure> {
        self.make_sure()?;
        self.say(request).map_err(|error| self.lost(&error))?;
        let mut last = None;
        loop {
            self.lines.wait(PROGRESS_TIMEOUT);
            crate::signals::check()?;
            let reply = self.hear(PROGRESS_TIMEOUT);
            match reply.map_err(|error| self.lost_moving(&error, last.as_ref()))? {
                Reply::Progress(state) => progress(last.insert(state).clone()),
                Reply::Ok(value) => return Ok(value),
                Reply::Error(failure) => return Err(failure),
                _ => {}
            }
        }
    }

    /// Cancels the migration or the checkpoint that this connection has asked for, and says what became of it.
    ///
    /// # Errors
    /// The VM's, if it has not moved: it says where it is. None of it within `timeout`.
    pub fn cancel(&mut self, timeout: Duration) -> Result<Value, Failure> {
        self.say(&Request::Cancel).map_err(|error| self.lost(&error))?;
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.hear(left).map_err(|error| self.lost(&error))? {
                Reply::Ok(value) => return Ok(value),
                Reply::Error(failure) => return Err(failure),
                _ => {}
            }
        }
    }

    /// Has the VM saved into files that are open here, in the order of [`CheckpointRequest`]. Returns the report when
    /// they are written; the VM's process then waits for [`checkpointed`](Self::checkpointed). A signal ends the
    /// waiting, and does not cancel.
    ///
    /// # Errors
    /// The VM's refusal, no answer, or [`FailureKind::Interrupted`].
    pub fn checkpoint(
        &mut self,
        request: &CheckpointRequest,
        files: &[&File],
        progress: &mut dyn FnMut(CheckpointStat),
    ) -> Result<Value, Failure> {
        self.make_sure()?;
        self.say(&Request::Checkpoint(request.clone())).map_err(|error| self.lost(&error))?;
        loop {
            self.lines.wait(PROGRESS_TIMEOUT);
            crate::signals::check()?;
            match self.hear(PROGRESS_TIMEOUT).map_err(|error| self.lost(&error))? {
                Reply::Files(count) => self.pass(files, count)?,
                Reply::Saving(stat) => progress(stat),
                Reply::Saved(report) => return Ok(report),
                Reply::Error(failure) if is_no_request(&failure) => return Err(self.too_old("checkpoints")),
                Reply::Error(failure) => return Err(failure),
                _ => {}
            }
        }
    }

    fn pass(&self, files: &[&File], count: u32) -> Result<(), Failure> {
        if count as usize != files.len() {
            let text = format!("the VM {:?} wants {count} files of {}", self.name, files.len());
            return Err(Failure::new(FailureKind::Other, text));
        }
        for (number, file) in files.iter().enumerate() {
            send_fd(self.lines.stream(), file, number as u32)
                .map_err(|error| Failure::io(format!("cannot talk to the VM {:?}", self.name), &error))?;
        }
        Ok(())
    }

    /// Tells the VM's process that what it has saved is a checkpoint of this name now.
    ///
    /// # Errors
    /// If it does not answer: the VM may have ended meanwhile.
    pub fn checkpointed(&mut self, name: &str, bytes: u64) -> Result<Value, Failure> {
        self.ask(&Request::Checkpointed { name: name.to_owned(), bytes }, ACTION_TIMEOUT)
    }

    /// Has every fault told for so long; `each` gets them. A signal ends the waiting.
    ///
    /// # Errors
    /// The VM's refusal, no answer, [`FailureKind::Interrupted`], or an error of `each`.
    pub fn record_faults(
        &mut self,
        seconds: u64,
        each: &mut dyn FnMut(swapd::FaultsSeen) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        self.make_sure()?;
        self.say(&Request::RecordFaults { seconds }).map_err(|error| self.lost(&error))?;
        loop {
            self.lines.wait(PROGRESS_TIMEOUT);
            crate::signals::check()?;
            match self.hear(PROGRESS_TIMEOUT).map_err(|error| self.lost(&error))? {
                Reply::Faults(seen) => each(seen)?,
                Reply::Ok(_) => return Ok(()),
                Reply::Error(failure) => return Err(failure),
                _ => {}
            }
        }
    }

    /// Has the VM end, and waits until it is known what became of it; null if it has failed, or had ended by then.
    ///
    /// # Errors
    /// The VM's refusal, or no answer. [`FailureKind::InDoubt`] if its process ended without a word while it was
    /// moving, by what `before` says: what was heard of it last (null if nothing was).
    pub fn stop(&mut self, before: &Value, timeout: Duration) -> Result<Value, Failure> {
        self.make_sure()?;
        match self.reply(&Request::Stop, timeout) {
            Ok(Err(failure)) if failure.kind == FailureKind::Vm => Ok(Value::Null),
            Ok(answer) => answer,
            Err(LineError::Closed) => self.ended_unheard(before),
            Err(error) => Err(self.lost(&error)),
        }
    }

    /// The process was to stop its VM, and ended without a word: what it was at before that says where the VM may be.
    fn ended_unheard(&self, before: &Value) -> Result<Value, Failure> {
        let to = before["migration"]["to"].as_str();
        if to.is_none() && before["state"] != "in_doubt" {
            return Ok(Value::Null);
        }
        let (name, to) = (&self.name, to.unwrap_or("the target of its hand-over"));
        let text = format!(
            "the process of the VM {name:?} ended while it was moving, before it could say what became of it (it was killed, or \
             crashed: see its log): the VM runs at {to} or nowhere; see `vmemd list` there before you start it again"
        );
        Err(Failure::new(FailureKind::InDoubt, text))
    }

    /// Waits until the VM's process has ended. A signal ends the waiting.
    ///
    /// # Errors
    /// If it still lives after `timeout`, or [`FailureKind::Interrupted`].
    pub fn wait_for_end(&mut self, timeout: Duration) -> Result<(), Failure> {
        self.lines.wait(timeout);
        crate::signals::check()?;
        match self.lines.read::<Reply>(timeout) {
            Err(LineError::Timeout(after)) => Err(Failure::new(
                FailureKind::Vm,
                format!("the VM {:?} has not ended after {} s", self.name, after.as_secs()),
            )),
            _ => Ok(()),
        }
    }

    /// A process that was killed or crashed says nothing any more: what became of the VM follows from how far it was.
    fn lost_moving(&self, error: &LineError, last: Option<&MigrationStat>) -> Failure {
        let (LineError::Closed, Some(last)) = (error, last) else { return self.lost(error) };
        let (name, to) = (&self.name, &last.to);
        // From the pause on: the word of a later phase may not have got here.
        let text = if matches!(last.phase.as_str(), "stopped" | "hand_over" | "checking") {
            format!(
                "the process of the VM {name:?} ended in the middle of its hand-over (it was killed, or crashed: see its log): \
                 it runs at {to} or nowhere, as `vmemd list` there says"
            )
        } else {
            format!(
                "the process of the VM {name:?} ended while it was moving (it was killed, or crashed: see its log): nothing is \
                 left to move, and {to} gives up what it has got"
            )
        };
        Failure::new(FailureKind::Vm, text)
    }

    /// The VM's process is of a vmemd that knows nothing of this.
    fn too_old(&self, what: &str) -> Failure {
        let text = format!(
            "the VM {:?} runs in a vmemd from before {what}: it gets a newer one when it is started anew, or moves to a host \
             that has it (to another daemon of this host will do)",
            self.name
        );
        Failure::new(FailureKind::Link, text)
    }

    fn lost(&self, error: &LineError) -> Failure {
        match error {
            LineError::Closed => Failure::new(
                FailureKind::Vm,
                format!("the process of the VM {:?} ended before it answered", self.name),
            ),
            error => Failure::new(FailureKind::Other, format!("the VM {:?}: {error}", self.name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// What comes of a `stop` of a VM that was so before, says this, if anything, and then closes the connection.
    fn stopped(before: &Value, answer: Option<&Value>) -> Result<Value, Failure> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut vm = VmClient::over("db", ours);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut lines = Lines::new(theirs);
                assert_eq!(lines.read::<Request>(PATIENCE).unwrap(), Request::Stop);
                if let Some(answer) = answer {
                    lines.write(answer).unwrap();
                }
            });
            vm.stop(before, PATIENCE)
        })
    }

    /// What a client that knows these versions hears of a process that answers so, and what it has asked by then.
    fn paused(versions: Versions, answers: &[Value]) -> (Result<Value, Failure>, Vec<Value>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut vm = VmClient { versions, ..VmClient::over("db", ours) };
        std::thread::scope(|scope| {
            let process = scope.spawn(move || {
                let mut lines = Lines::new(theirs);
                let mut asked = Vec::new();
                let mut answers = answers.iter();
                while let Ok(request) = lines.read(PATIENCE) {
                    asked.push(request);
                    // Up to the one that ends an answer.
                    for answer in answers.by_ref() {
                        // A client that has heard enough has left.
                        let _ = lines.write(answer);
                        if answer.get("ok").or(answer.get("error")).is_some() {
                            break;
                        }
                    }
                }
                asked
            });
            let answer = vm.ask(&Request::Pause, PATIENCE);
            drop(vm);
            (answer, process.join().unwrap())
        })
    }

    #[test]
    fn a_process_is_asked_in_a_version_that_it_knows() {
        let done = json!({ "ok": { "state": "paused" } });
        let said = |version: u16| json!({ "version": version });
        let ok = Ok(done["ok"].clone());
        // One that knows of one version only; one that says which; one that says so on the way to an answer.
        let ours = json!({ "op": "pause", "versions": [1, 3] });
        for answers in [vec![done.clone()], vec![said(1), done.clone()], vec![said(3), said(3), done.clone()]]
        {
            assert_eq!(paused(1..=3, &answers), (ok.clone(), vec![ours.clone()]));
        }
        // One that might misunderstand is asked for its facts before.
        let [stat, pause] = ["stat", "pause"].map(|op| json!({ "op": op, "versions": [2, 3] }));
        let facts = json!({ "ok": {} });
        let new = [said(2), facts.clone(), said(2), done.clone()];
        assert_eq!(paused(2..=3, &new), (ok, vec![stat.clone(), pause]));
        let (answer, asked) = paused(2..=3, &[facts, done.clone()]);
        let failure = answer.unwrap_err();
        assert_eq!((failure.kind, asked), (FailureKind::Link, vec![stat]));
        let text = "the command speaks versions 2 to 3 of the control protocol, the VM's process version 1: use the vmemd with \
                    which the VM was started";
        assert_eq!(failure.text, text);
    }

    #[test]
    fn a_process_from_before_checkpoints_is_said_to_be_too_old() {
        let request = CheckpointRequest {
            downtime_target_ms: 50,
            max_rounds: 30,
            max_throttle: 99,
            rate: None,
            base: None,
            stop: false,
            without_disks: false,
            plain: false,
            encrypted: false,
        };
        let said = |failure: Failure| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let mut vm = VmClient::over("db", ours);
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    let mut lines = Lines::new(theirs);
                    lines.read::<Value>(PATIENCE).unwrap();
                    lines.write(&json!({ "error": failure })).unwrap();
                });
                vm.checkpoint(&request, &[], &mut |_| {}).unwrap_err()
            })
        };
        // Word for word what the vmemd before this one says.
        let old = "this is no request: unknown variant `checkpoint`, expected one of `stat`, `pause`; docs/control.md describes them";
        let failure = said(Failure::new(FailureKind::Usage, old));
        assert_eq!(failure.kind, FailureKind::Link);
        assert!(
            failure.text.contains("before checkpoints") && !failure.text.contains("variant"),
            "{failure}"
        );
        let other = Failure::new(FailureKind::Usage, "the base's map: it is cut off");
        assert_eq!(said(other.clone()), other);
    }

    #[test]
    fn a_version_that_was_not_offered_is_not_spoken() {
        let done = json!({ "ok": { "state": "paused" } });
        for version in [json!(0), json!(4), json!(65536), json!([1]), json!(null)] {
            let (answer, _) = paused(1..=3, &[json!({ "version": version }), done.clone()]);
            assert_eq!(answer.unwrap_err().kind, FailureKind::Other, "{version}");
        }
    }

    #[test]
    fn a_process_that_ends_unheard_has_its_vm_stopped_only_if_that_was_not_moving() {
        let running = json!({ "state": "running", "migration": null });
        let moving = json!({ "state": "migrating", "migration": { "to": "b:7", "phase": "hand_over" } });
        let in_doubt = json!({ "state": "in_doubt", "migration": null });
        let failed = |kind| json!({ "error": Failure::new(kind, "why") });
        let done = json!({ "ok": { "state": "stopped" } });
        for (before, answer, expected) in [
            (&running, None, Ok(Value::Null)),
            (&Value::Null, None, Ok(Value::Null)),
            (&moving, None, Err((FailureKind::InDoubt, "runs at b:7 or nowhere"))),
            (&in_doubt, None, Err((FailureKind::InDoubt, "runs at the target"))),
            (&running, Some(done.clone()), Ok(done["ok"].clone())),
            (&moving, Some(done.clone()), Ok(done["ok"].clone())),
            (&Value::Null, Some(done.clone()), Ok(done["ok"].clone())),
            (&running, Some(failed(FailureKind::Vm)), Ok(Value::Null)),
            (&moving, Some(failed(FailureKind::InDoubt)), Err((FailureKind::InDoubt, "why"))),
            (&running, Some(failed(FailureKind::Other)), Err((FailureKind::Other, "why"))),
        ] {
            match (stopped(before, answer.as_ref()), expected) {
                (Ok(value), Ok(expected)) => assert_eq!(value, expected, "{before}: {answer:?}"),
                (Err(failure), Err((kind, says))) => {
                    assert!(
                        failure.kind == kind && failure.text.contains(says),
                        "{before}: {answer:?}: {failure}"
                    );
                }
                (value, expected) => panic!("{before}: {answer:?}: {value:?}, not {expected:?}"),
            }
        }
    }
}
