//! The short commands: list, set, pause, resume, stop.

use std::panic::resume_unwind;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use vmprocess::control::client::{ACTION_TIMEOUT, STAT_TIMEOUT, VmClient};
use vmprocess::control::protocol::{Request, State, VmStat};
use vmprocess::control::rundir::{RunDir, SocketName};
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::size::Size;

use super::args::{NameArgs, SetArgs};
use super::terminal::{print, print_json};

/// How long a VM may take to end: a cancelled migration and a fault that is being served come first.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// One line of `list`.
#[derive(Serialize)]
struct Row {
    name: String,
    /// `stat`'s state, or `unknown` if the process does not answer.
    state: String,
    #[serde(flatten)]
    facts: Option<Facts>,
}

#[derive(Serialize)]
struct Facts {
    pid: u32,
    memory_bytes: u64,
    ram_budget_bytes: u64,
    resident_bytes: u64,
    stored_bytes: u64,
    workload: String,
    daemon: Option<String>,
}

pub(super) fn list(dir: &RunDir, as_json: bool) -> Result<(), Failure> {
    let rows = loop {
        if let Some(rows) = ask_all(dir, &dir.sockets()?) {
            break rows;
        }
    };
    if as_json {
        return print_json(&rows);
    }
    if rows.is_empty() {
        print(&format!("no VM runs here ({})", dir.path().display()));
        return Ok(());
    }
    print(&format!(
        "{:<20} {:<9} {:>8} {:>8} {:>9} {:>8} {:>8}  GUEST",
        "NAME", "STATE", "MEMORY", "BUDGET", "RESIDENT", "STORED", "PID"
    ));
    for Row { name, state, facts } in rows {
        print(&match facts {
            Some(facts) => format!(
                "{name:<20} {state:<9} {:>8} {:>8} {:>9} {:>8} {:>8}  {}",
                rounded(facts.memory_bytes),
                rounded(facts.ram_budget_bytes),
                rounded(facts.resident_bytes),
                rounded(facts.stored_bytes),
                facts.pid,
                facts.workload
            ),
            None => format!("{name:<20} {state:<9}"),
        });
    }
    Ok(())
}

fn rounded(bytes: u64) -> String {
    format!("{:#}", Size(bytes))
}

/// None: one has ended, or its socket was renamed (a hand-over), between being listed and being asked. The next list
/// tells.
fn ask_all(dir: &RunDir, sockets: &[SocketName]) -> Option<Vec<Row>> {
    // All at once: one that does not answer must not hold up the others.
    std::thread::scope(|scope| {
        let asked: Vec<_> = sockets.iter().map(|socket| scope.spawn(move || ask(dir, socket))).collect();
        asked.into_iter().map(|row| row.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}

/// None: it is not there any more.
fn ask(dir: &RunDir, socket: &SocketName) -> Option<Row> {
    match VmClient::connect_to(dir, socket).and_then(|mut vm| vm.stat()) {
        Ok(stat) => Some(row(stat)),
        Err(failure) if failure.kind == FailureKind::Name => None,
        Err(_) => Some(Row { name: socket.name().to_owned(), state: "unknown".to_owned(), facts: None }),
    }
}

fn row(stat: VmStat) -> Row {
    Row {
        name: stat.name,
        state: stat.state.name().to_owned(),
        facts: Some(Facts {
            pid: stat.pid,
            memory_bytes: stat.memory.memory_bytes,
            ram_budget_bytes: stat.memory.ram_budget_bytes,
            resident_bytes: stat.memory.resident_bytes,
            stored_bytes: stat.memory.stored_bytes,
            workload: stat.workload,
            daemon: stat.daemon,
        }),
    }
}

pub(super) fn set(dir: &RunDir, args: &SetArgs) -> Result<(), Failure> {
    let request = Request::SetRam { ram_bytes: args.ram.bytes() };
    let answer = VmClient::connect(dir, &args.name)?.ask(&request, ACTION_TIMEOUT)?;
    say(args.json.json, &answer, &format!("{} has {} of RAM now", args.name, args.ram))
}

pub(super) fn pause(dir: &RunDir, args: &NameArgs) -> Result<(), Failure> {
    let answer = VmClient::connect(dir, &args.name)?.ask(&Request::Pause, ACTION_TIMEOUT)?;
    let why = answer["reason"].as_str().map(|why| format!(": {why}")).unwrap_or_default();
    let text = match (answer["state"].as_str(), answer["already"].as_bool()) {
        (Some("incoming"), _) => format!("{} stays paused when it has come{why}", args.name),
        (_, Some(true)) => format!("{} is paused already{why}", args.name),
        _ => format!("{} is paused", args.name),
    };
    say(args.json.json, &answer, &text)
}

pub(super) fn resume(dir: &RunDir, args: &NameArgs) -> Result<(), Failure> {
    let mut vm = match in_doubt(dir, &args.name)? {
        Some(vm) => vm,
        None => VmClient::connect(dir, &args.name)?,
    };
    let answer = vm.ask(&Request::Resume, ACTION_TIMEOUT)?;
    let text = match answer["state"].as_str() {
        Some("moved") => format!("{} runs at the target; nothing was left to do here", args.name),
        _ if answer["already"] == true => format!("{} runs already", args.name),
        _ => format!("{} runs", args.name),
    };
    say(args.json.json, &answer, &text)
}

/// The VM of that name whose hand-over is in doubt: on the target's own host another process may have the name by now.
pub(super) fn in_doubt(dir: &RunDir, name: &str) -> Result<Option<VmClient>, Failure> {
    for socket in dir
        .sockets()?
        .iter()
        .filter(|socket| socket.name() == name && matches!(socket, SocketName::Leaving(..)))
    {
        let asked =
            VmClient::connect_to(dir, socket).and_then(|mut vm| vm.stat().map(|stat| (vm, stat.state)));
        if let Ok((vm, State::InDoubt)) = asked {
            return Ok(Some(vm));
        }
    }
    Ok(None)
}

pub(super) fn stop(dir: &RunDir, args: &NameArgs) -> Result<(), Failure> {
    end(dir, &args.name)?;
    say(
        args.json.json,
        &json!({ "name": args.name, "state": "stopped" }),
        &format!("{} is stopped", args.name),
    )
}

/// Ends a VM, and waits until its process has ended.
pub(super) fn end(dir: &RunDir, name: &str) -> Result<(), Failure> {
    // On a connection of its own: an engine that does not answer that is to be stopped all the same.
    let before = VmClient::connect(dir, name)?.ask(&Request::Stat, STAT_TIMEOUT).unwrap_or_default();
    let mut vm = VmClient::connect(dir, name)?;
    let ended = vm.stop(&before, ACTION_TIMEOUT)?;
    vm.wait_for_end(STOP_TIMEOUT)?;
    if ended["state"] == "moved" {
        let to = ended["to"].as_str().unwrap_or_default();
        let text = format!("{name:?} was not stopped: it had moved to {to} by then, and runs there");
        return Err(Failure::new(FailureKind::Moved, text));
    }
    Ok(())
}

pub(super) fn say(as_json: bool, value: &Value, text: &str) -> Result<(), Failure> {
    if as_json {
        return print_json(value);
    }
    print(text);
    Ok(())
}
