//! A recording of the faults that the VM's engine serves, for as long as a client listens.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::control::server::Client;
use crate::failure::{Failure, FailureKind};
use crate::vm::Vm;

/// Longest recording: a day.
const SECONDS_MAX: u64 = 86_400;
/// Between two looks at the engine, as long as it has little to tell: it keeps some 60 000 faults in between.
const POLL: Duration = Duration::from_millis(20);
/// The client hears at least this often that the recording goes on.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);
/// For what is left when the time is over.
const DRAIN_MAX: Duration = Duration::from_secs(5);

/// Only one at a time: the engine has one recorder.
struct Turn<'a>(&'a AtomicBool);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

pub(crate) fn record_faults(vm: &Vm, seconds: u64, client: &mut Client<'_>) -> Result<Value, Failure> {
    vm.must_be_here("record the faults of")?;
    let name = &vm.facts.name;
    if !(1..=SECONDS_MAX).contains(&seconds) {
        let text = format!("a recording of {seconds} s: choose between 1 and {SECONDS_MAX}");
        return Err(Failure::new(FailureKind::Usage, text));
    }
    let engine = vm.memory()?.engine()?;
    if vm.recording.swap(true, Ordering::SeqCst) {
        let text = format!("the faults of {name:?} are being recorded already: wait for the end of that");
        return Err(Failure::new(FailureKind::Name, text));
    }
    let _turn = Turn(&vm.recording);
    let (mut recorded, mut dropped) = (0, 0);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut told = Instant::now();
    let outcome = loop {
        let seen = match engine.record_faults(true) {
            Ok(seen) => seen,
            Err(error) => break Err(Failure::from(error)),
        };
        let (now, left) = (Instant::now(), seen.left);
        recorded += seen.faults.len();
        dropped += seen.dropped;
        if !seen.faults.is_empty() || seen.dropped > 0 || now - told >= SIGN_OF_LIFE {
            told = now;
            if client.faults(seen).is_err() {
                break Err(Failure::new(FailureKind::Interrupted, "the client is gone"));
            }
        }
        if client.gone() {
            break Err(Failure::new(FailureKind::Interrupted, "the client is gone"));
        }
        if now >= end && (left == 0 || now >= end + DRAIN_MAX) {
            break Ok(());
        }
        if left == 0 {
            std::thread::sleep(POLL.min(end.saturating_duration_since(now)));
        }
    };
    let _ = engine.record_faults(false);
    outcome.map(|()| json!({ "name": name, "recorded": recorded, "dropped": dropped }))
}
