//! A hand-over in doubt: the commit was sent, and the target's word on it got lost. Until it is known what became of
//! it, the VM stands still here, because it may run there.
//!
//! ```text
//!               ┌── asked again and again, by itself or by `vmemd resolve` ──┐
//!   InDoubt ────┼─▶ not there, and never will be ─▶ Here                     │
//!               ├─▶ there ────────────────────────▶ Moved                    │
//!               └─▶ no answer ──────────────────────────────────────────────┘
//!                       └── somebody knows better: --force run-here, gone
//! ```
//! What the target says always counts: force is only heard where it says nothing.

use std::time::{Duration, Instant};

use migrate::limits::scaled_for_tests;
use migrate::tls::Security;
use migrate::{Outcome, SessionId};
use serde_json::{Value, json};
use tracing::{error, info, warn};

use crate::control::protocol::Force;
use crate::failure::{Failure, FailureKind, chain};
use crate::hold::Whereabouts;
use crate::source_vm::Leaving;
use crate::vm::{Vm, VmEvent, Waiting, lock};

/// How often the target is asked again, for as long as the doubt lasts.
const ASK_AGAIN_EVERY: Duration = Duration::from_secs(10);

/// Begins the doubt.
pub(crate) fn begin(vm: &Vm, session: SessionId, to: &str, security: &Security) {
    let said = "nobody has answered yet".to_owned();
    vm.locked(|state| {
        let (to, security, since) = (to.to_owned(), security.clone(), Instant::now());
        state.whereabouts = Whereabouts::InDoubt { session, security, to, since, said };
        (state.migration, state.waiting) = (None, Some(waiting()));
    });
    error!(vm = %vm.facts.name, to, %session, "in doubt: the VM stands still here; see `vmemd resolve {}`", vm.facts.name);
}

fn waiting() -> Waiting {
    Waiting::new(
        "the next time that the target is asked",
        ("ASK_AGAIN_EVERY", scaled_for_tests(ASK_AGAIN_EVERY)),
    )
}

/// Asks until the doubt has ended. The target may be cut off for hours: somebody need not be there when it comes back.
pub(crate) fn ask_until_known(vm: &Vm) {
    while vm.locked(|state| matches!(state.whereabouts, Whereabouts::InDoubt { .. })) {
        std::thread::sleep(scaled_for_tests(ASK_AGAIN_EVERY));
        if let Err(failure) = resolve(vm, None) {
            warn!(vm = %vm.facts.name, %failure, "while asking what became of a hand-over");
        }
    }
}

/// Asks the target what became of the VM, and acts by what it says; by `force`, if it says nothing. Tells the facts.
pub(crate) fn resolve(vm: &Vm, force: Option<Force>) -> Result<Value, Failure> {
    let name = &vm.facts.name;
    let _one_at_a_time = lock(&vm.resolving);
    let Whereabouts::InDoubt { session, security, to, since, .. } =
        vm.locked(|state| state.whereabouts.clone())
    else {
        return no_doubt(vm, force);
    };
    let asked = migrate::resolve(&to, &security, session);
    let said = match &asked {
        Ok(Outcome::RunningThere) => "it says that the VM runs there".to_owned(),
        Ok(Outcome::NotThere) => "it says that the VM does not run there, and never will".to_owned(),
        Err(error) => chain(error),
    };
    let state = match (asked, force) {
        (Ok(Outcome::RunningThere), _) | (Err(_), Some(Force::Gone)) => moved(vm, &to),
        (Ok(Outcome::NotThere), _) => come_back(vm, false)?,
        (Err(_), Some(Force::RunHere)) => come_back(vm, true)?,
        (Err(_), None) => {
            vm.locked(|state| {
                state.waiting = Some(waiting());
                if let Whereabouts::InDoubt { said: last, .. } = &mut state.whereabouts {
                    last.clone_from(&said);
                }
            });
            "in_doubt"
        }
    };
    if state != "in_doubt" {
        info!(vm = %name, %session, to, said, ?force, state, "the doubt has ended");
    }
    Ok(json!({
        "name": name,
        "state": state,
        "session": session,
        "to": to,
        "in_doubt_ms": since.elapsed().as_millis() as u64,
        "said": said,
        "ask_again_ms": scaled_for_tests(ASK_AGAIN_EVERY).as_millis() as u64,
    }))
}

/// For `vmemd resume`.
pub(crate) fn resume(vm: &Vm) -> Result<Value, Failure> {
    let facts = resolve(vm, None)?;
    match facts["state"].as_str() {
        Some("in_doubt") => {
            let (name, to) = (&vm.facts.name, facts["to"].as_str().unwrap_or_default());
            let said = facts["said"].as_str().unwrap_or_default();
            Err(Failure::new(
                FailureKind::InDoubt,
                format!("{name:?} may run at {to}, which does not say ({said}): see `vmemd resolve {name}`"),
            ))
        }
        state => vm.done(state.unwrap_or_default()),
    }
}

fn no_doubt(vm: &Vm, force: Option<Force>) -> Result<Value, Failure> {
    let stat = vm.stat()?;
    let state = stat.state.name();
    if force.is_some() {
        let asks = stat.waiting.filter(|_| state == "migrating").map(|waiting| {
            format!(", waiting for {} ({}, {} ms)", waiting.what, waiting.limit, waiting.limit_ms)
        });
        let text = format!("{:?} is not in doubt: it is {state}{}", vm.facts.name, asks.unwrap_or_default());
        return Err(Failure::new(FailureKind::Name, text));
    }
    Ok(json!({ "name": stat.name, "state": state, "waiting": stat.waiting }))
}

fn moved(vm: &Vm, to: &str) -> &'static str {
    vm.locked(|state| (state.whereabouts, state.waiting) = (Whereabouts::Moved { to: to.to_owned() }, None));
    let _ = vm.events.send(VmEvent::Moved);
    "moved"
}

/// `forced`: nobody has said that it does not run elsewhere. Then at least it must not run on this very host.
fn come_back(vm: &Vm, forced: bool) -> Result<&'static str, Failure> {
    let name = &vm.facts.name;
    let mut source = Leaving::in_doubt(vm);
    if forced {
        vm.claim(|claim| claim.take_name())?;
    }
    let resumed = source.come_back();
    let paused = vm.locked(|state| {
        (state.whereabouts, state.waiting) = (Whereabouts::Here, None);
        state.hold.paused().is_some()
    });
    vm.go_on();
    resumed.map_err(|error| {
        Failure::new(FailureKind::Vm, format!("{name:?} is here, and could not be resumed: {error}"))
    })?;
    Ok(if paused { "paused" } else { "running" })
}
