use std::io::{BufRead, BufReader};
use std::thread::JoinHandle;

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);
const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": ["oob"]}}"#;

/// A QEMU that follows a script: a line that starts with '>' is expected from the client (its `execute`), others are
/// said. `$` stands for the number of the last command.
fn qemu(script: &'static [&'static str]) -> (UnixStream, JoinHandle<Vec<String>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let play = move || {
        let mut heard = Vec::new();
        let mut reader = BufReader::new(theirs.try_clone().unwrap());
        let mut id = Value::Null;
        for step in script {
            if let Some(command) = step.strip_prefix('>') {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                let request: Value = serde_json::from_str(&line).unwrap();
                assert_eq!(request["execute"], command, "{line}");
                id = request["id"].clone();
                heard.push(line);
            } else {
                let line = step.replace('$', &id.to_string());
                (&theirs).write_all(line.as_bytes()).unwrap();
                (&theirs).write_all(b"\n").unwrap();
            }
        }
        heard
    };
    (ours, std::thread::spawn(play))
}

fn over(script: &'static [&'static str]) -> (Result<Qmp, QmpError>, JoinHandle<Vec<String>>) {
    let (stream, qemu) = qemu(script);
    (Qmp::over(stream, PATIENCE), qemu)
}

#[test]
fn a_conversation_with_events_in_between() {
    let (qmp, qemu) = over(&[
        GREETING,
        ">qmp_capabilities",
        r#"{"event": "RESUME", "timestamp": {}}"#,
        r#"{"return": {}, "id": $}"#,
        ">query-status",
        ">query-status",
        ">migrate-incoming",
        r#"{"event": "MIGRATION", "data": {"status": "setup"}}"#,
        r#"{"return": {"a": 1}, "id": $}"#,
        ">stop",
        r#"{"error": {"class": "GenericError", "desc": "no"}, "id": $}"#,
    ]);
    let mut qmp = qmp.unwrap();
    let value = qmp.ask("migrate-incoming", json!({ "uri": "fd:x" }), PATIENCE).unwrap();
    assert_eq!(value, json!({ "a": 1 }));
    let refused = qmp.ask("stop", Value::Null, PATIENCE).unwrap_err();
    assert_eq!(refused.to_string(), r#"QEMU refuses "stop": no"#);
    let heard = qemu.join().unwrap();
    assert!(heard[3].contains(r#""arguments":{"uri":"fd:x"}"#), "{heard:?}");
    assert!(matches!(qmp.ask("stop", Value::Null, PATIENCE), Err(QmpError::Closed)));
}

#[test]
fn a_late_answer_is_not_taken_for_the_next_one() {
    let (qmp, qemu) = over(&[
        GREETING,
        ">qmp_capabilities",
        r#"{"return": {}, "id": $}"#,
        ">query-status",
        ">stop",
        ">cont",
        r#"{"return": {"late": true}, "id": 2}"#,
        r#"{"return": {}, "id": $}"#,
    ]);
    let mut qmp = qmp.unwrap();
    let late = qmp.ask("stop", Value::Null, Duration::from_millis(1)).unwrap_err();
    assert!(matches!(late, QmpError::Timeout { .. }), "{late}");
    assert_eq!(qmp.ask("cont", Value::Null, PATIENCE).unwrap(), json!({}));
    qemu.join().unwrap();
}

#[test]
fn why_the_machine_stands_still_is_asked_and_kept() {
    let (qmp, qemu) = over(&[
        GREETING,
        ">qmp_capabilities",
        r#"{"return": {}, "id": $}"#,
        ">query-status",
        r#"{"return": {"status": "running", "running": true}, "id": 0}"#,
        ">cont",
        r#"{"event": "STOP"}"#,
        ">query-status",
        r#"{"return": {"status": "guest-panicked", "running": false}, "id": $}"#,
        r#"{"return": {}, "id": 2}"#,
    ]);
    let mut qmp = qmp.unwrap();
    let heard_state = qmp.heard_state();
    // The answer to this comes after the status, on the same thread.
    qmp.ask("cont", Value::Null, PATIENCE).unwrap();
    qemu.join().unwrap();
    assert_eq!(heard_state.get().word, "guest-panicked");
}

#[test]
fn a_qemu_that_ends_is_asked_nothing() {
    let (qmp, qemu) = over(&[
        GREETING,
        ">qmp_capabilities",
        r#"{"return": {}, "id": $}"#,
        ">query-status",
        r#"{"return": {"status": "postmigrate", "running": false}, "id": 0}"#,
        ">quit",
        r#"{"event": "SHUTDOWN", "data": {"reason": "host-qmp-quit"}}"#,
        r#"{"return": {}, "id": $}"#,
        // Whatever the event has led to would have been said before this.
        ">stop",
        r#"{"return": {}, "id": $}"#,
    ]);
    let mut qmp = qmp.unwrap();
    qmp.ask("quit", Value::Null, PATIENCE).unwrap();
    qmp.look_again();
    qmp.ask("stop", Value::Null, PATIENCE).unwrap();
    qemu.join().unwrap();
}

#[test]
fn what_is_not_qmp_ends_the_conversation() {
    const CAPABLE: [&str; 3] = [GREETING, ">qmp_capabilities", r#"{"return": {}, "id": $}"#];
    for (said, expected) in [
        (&["HTTP/1.1 200 OK"][..], "not QMP"),
        (&[r#"{"return": {}}"#], "no greeting"),
        (&["{\"QMP\""], "not QMP"),
        (&[], "closed"),
        (&[GREETING, ">qmp_capabilities", r#"{"error": {"desc": "half a line"}}"#], "half a line"),
        (&[GREETING, ">qmp_capabilities", r#"{"return": {}, "id": 77}"#], "an answer to nothing"),
        (&[GREETING, ">qmp_capabilities", r#"{"return": {}, "id": -1}"#], "not QMP"),
        (&[GREETING, ">qmp_capabilities", r#"[1, 2]"#], "not QMP"),
    ] {
        let script: Vec<&'static str> = said.to_vec();
        let (qmp, qemu) = over(script.leak());
        let error = chain_of(&qmp.unwrap_err());
        qemu.join().unwrap();
        assert!(error.contains(expected), "{said:?}: {error}");
    }
    let (stream, qemu) = qemu(CAPABLE.to_vec().leak());
    let mut qmp = Qmp::over(stream, PATIENCE).unwrap();
    qemu.join().unwrap();
    assert!(qmp.ask("stop", Value::Null, PATIENCE).is_err());
    assert!(matches!(qmp.ask("stop", Value::Null, PATIENCE), Err(QmpError::Closed)));
}

fn chain_of(error: &QmpError) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    format!("{error}{cause}")
}

#[test]
fn an_endless_line_is_given_up() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let talker = std::thread::spawn(move || while theirs.write_all(&[b' '; 65536]).is_ok() {});
    let error = Qmp::over(ours, PATIENCE).unwrap_err();
    assert!(error.to_string().contains("a line of more than"), "{error}");
    talker.join().unwrap();
}

#[test]
fn silence_is_given_up() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let error = Qmp::over(ours, Duration::from_millis(10)).unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
    let error = Qmp::connect(Path::new("/nonexistent/qmp"), PATIENCE, PATIENCE).unwrap_err();
    assert!(matches!(error, QmpError::NoSocket { .. }), "{error}");
}

#[test]
fn who_greets_late_is_heard() {
    let place = testkit::directory("late");
    let path = place.path().join("qmp");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let error = Qmp::connect(&path, Duration::from_millis(1), Duration::from_millis(30)).unwrap_err();
    assert!(matches!(error, QmpError::Timeout { timeout, .. } if timeout.as_millis() == 30), "{error}");
    let late = std::thread::spawn(move || {
        let _given_up = listener.accept().unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let mut byte = [0];
        // Nothing is said to it before it has greeted.
        stream.set_read_timeout(Some(Duration::from_millis(30))).unwrap();
        assert!(stream.read(&mut byte).is_err());
        writeln!(stream, "{GREETING}").unwrap();
        stream.set_read_timeout(None).unwrap();
        let mut line = String::new();
        BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
        writeln!(stream, r#"{{"return": {{}}, "id": 1}}"#).unwrap();
        line
    });
    Qmp::connect(&path, Duration::from_millis(1), PATIENCE).unwrap();
    assert!(late.join().unwrap().contains("qmp_capabilities"));
}

#[test]
fn a_descriptor_goes_with_its_command() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (mut end, given) = UnixStream::pair().unwrap();
    let qemu = std::thread::spawn(move || {
        // Byte by byte: what is read beyond a line would take the descriptor with it.
        let skip_line = || {
            let mut byte = [0];
            while byte != *b"\n" {
                (&theirs).read_exact(&mut byte).unwrap();
            }
        };
        (&theirs).write_all(format!("{GREETING}\n").as_bytes()).unwrap();
        skip_line();
        (&theirs).write_all(b"{\"return\": {}, \"id\": 1}\n").unwrap();
        skip_line();
        let mut line = [0; 4096];
        let (fd, count) = vmprocess::passing::receive_with_fd(&theirs, &mut line, PATIENCE).unwrap();
        assert!(std::str::from_utf8(&line[..count]).unwrap().contains(r#"{"fdname":"x"}"#));
        (&theirs).write_all(b"{\"return\": {}, \"id\": 2}\n").unwrap();
        UnixStream::from(fd).write_all(b"state").unwrap();
    });
    let mut qmp = Qmp::over(ours, PATIENCE).unwrap();
    qmp.give_fd("x", std::os::fd::AsFd::as_fd(&given), PATIENCE).unwrap();
    drop(given);
    qemu.join().unwrap();
    let mut state = String::new();
    end.read_to_string(&mut state).unwrap();
    assert_eq!(state, "state");
}

#[test]
fn why_a_qemu_ends_is_kept_unless_it_goes_on() {
    const ENDS: &str = r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}"#;
    let (qmp, qemu) =
        over(&[GREETING, ">qmp_capabilities", r#"{"return": {}, "id": $}"#, ">query-status", ENDS]);
    let qmp = qmp.unwrap();
    qemu.join().unwrap();
    assert!(qmp.heard_state().last_words().unwrap().text.contains("the guest shut down"));

    let (qmp, qemu) = over(&[
        GREETING,
        ">qmp_capabilities",
        r#"{"return": {}, "id": $}"#,
        ">query-status",
        ENDS,
        r#"{"event": "RESUME"}"#,
        ">query-status",
    ]);
    let qmp = qmp.unwrap();
    qemu.join().unwrap();
    assert_eq!(qmp.heard_state().last_words(), None);
}

#[test]
fn a_state_that_changes_without_a_word_is_asked_for_when_somebody_looks() {
    let (qmp, qemu) = over(&[
        GREETING,
        ">qmp_capabilities",
        r#"{"return": {}, "id": $}"#,
        ">query-status",
        r#"{"return": {"status": "inmigrate", "running": false}, "id": 0}"#,
        ">stop",
        r#"{"return": {}, "id": $}"#,
        // By the way, and once.
        ">query-status",
        ">cont",
        r#"{"return": {"status": "paused", "running": false}, "id": 0}"#,
        r#"{"return": {}, "id": 3}"#,
        ">stop",
        r#"{"return": {}, "id": $}"#,
    ]);
    let mut qmp = qmp.unwrap();
    let heard_state = qmp.heard_state();
    qmp.ask("stop", Value::Null, PATIENCE).unwrap();
    assert_eq!(heard_state.get().word, "inmigrate");
    qmp.look_again();
    qmp.look_again();
    qmp.ask("cont", Value::Null, PATIENCE).unwrap();
    assert_eq!(heard_state.get().word, "paused");
    qmp.look_again();
    qmp.ask("stop", Value::Null, PATIENCE).unwrap();
    qemu.join().unwrap();
}
