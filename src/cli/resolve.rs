//! `vmemd resolve`: the facts about a hand-over in doubt, the target asked once more, and the end of the doubt.

use serde_json::Value;
use vmprocess::control::client::{ACTION_TIMEOUT, VmClient};
use vmprocess::control::protocol::{Force, Request};
use vmprocess::control::rundir::RunDir;
use vmprocess::failure::{Failure, FailureKind};

use super::args::ResolveArgs;
use super::terminal::{print_json, warn};
use super::vms::{in_doubt, say};

pub(super) fn resolve(dir: &RunDir, args: &ResolveArgs) -> Result<(), Failure> {
    let name = &args.name;
    let force = args.force.map(Force::from);
    let mut vm = match in_doubt(dir, name)? {
        Some(vm) => vm,
        None => VmClient::connect(dir, name)?,
    };
    if let Some(force) = force {
        warn(risk(force));
    }
    let facts = vm.ask(&Request::Resolve { force }, ACTION_TIMEOUT)?;
    let text = |field: &str| facts[field].as_str().unwrap_or("?");
    if text("state") != "in_doubt" {
        return say(args.json.json, &facts, &ended(name, &facts));
    }
    if args.json.json {
        print_json(&facts)?;
    }
    Err(Failure::new(FailureKind::InDoubt, doubt(name, &facts)))
}

fn risk(force: Force) -> &'static str {
    match force {
        Force::RunHere => {
            "warning: if the VM runs at the target, or ever does, it runs twice from now on, and both write to its disks"
        }
        Force::Gone => {
            "warning: if the VM does not run at the target, it is lost with all that its memory holds"
        }
    }
}

fn ended(name: &str, facts: &Value) -> String {
    let Some(said) = facts["said"].as_str() else {
        let waiting = match facts["waiting"]["for"].as_str() {
            Some(what) => format!(", waiting for {what}"),
            None => String::new(),
        };
        return format!("{name} is not in doubt: it is {}{waiting}", facts["state"].as_str().unwrap_or("?"));
    };
    let to = facts["to"].as_str().unwrap_or("?");
    match facts["state"].as_str() {
        Some("moved") => format!("asked {to}: {said}\n{name} has moved to {to}; nothing is left of it here"),
        state => format!("asked {to}: {said}\n{name} is {} here", state.unwrap_or("?")),
    }
}

/// What is known, and what can be done.
fn doubt(name: &str, facts: &Value) -> String {
    let text = |field: &str| facts[field].as_str().unwrap_or("?");
    let seconds = |field: &str| facts[field].as_u64().unwrap_or(0) / 1000;
    let (to, session, said) = (text("to"), text("session"), text("said"));
    let (since, again) = (seconds("in_doubt_ms"), seconds("ask_again_ms"));
    format!(
        "it is in doubt whether {name:?} runs at {to}
  session   {session}
  step      the commit was sent, and no answer to it came: the target may run the VM, so it stands still here
  since     {since} s
  asked     {to}, just now: {said}
  next      it is asked again every {again} s, and the doubt ends by itself when it answers
If it never will, and you know what became of the VM there (look at that host: `vmemd list`, its processes, its power):
  vmemd resolve {name} --force run-here   it does not run there and never will; if that is wrong, it runs twice
  vmemd resolve {name} --force gone       it runs there; if that is wrong, it is lost"
    )
}
