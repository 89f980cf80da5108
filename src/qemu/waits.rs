//! Chardevs with `server=on` and without `wait=off`: QEMU waits, before it has a monitor, until a client has connected.

use vmprocess::failure::Failure;

use super::options::{CommandLine, Word};
use super::props::{Props, Set};
use super::resources::is_character;

/// The options as written.
pub fn list(line: &CommandLine) -> Result<Vec<String>, Failure> {
    let mut found = Vec::new();
    for word in line.words() {
        if without_waiting(word)?.is_some() {
            found.push(word.shown());
        }
    }
    Ok(found)
}

/// Chardevs get `wait=off`. For a VM that arrives: its source waits, and its clients come when it is here.
pub(super) fn end(line: &mut CommandLine) -> Result<(), Failure> {
    for word in &mut line.words {
        if let Some(value) = without_waiting(word)? {
            word.value = Some(value);
        }
    }
    Ok(())
}

/// The option's value with `wait=off`, if it waits.
fn without_waiting(word: &Word) -> Result<Option<String>, Failure> {
    match word.name() {
        "chardev" => {
            let mut props = word.props()?;
            let waits = match &mut props {
                // Only if it is told to.
                Props::Json(value) => match value.pointer_mut("/backend/data/wait") {
                    Some(wait) if *wait == true => {
                        *wait = false.into();
                        true
                    }
                    _ => false,
                },
                Props::Text(_) => props.first("backend").as_deref() == Some("socket") && waits(&props),
            };
            if waits && matches!(props, Props::Text(_)) {
                props.set("wait", Set::Text("off"));
            }
            Ok(waits.then(|| props.print()))
        }
        name if is_character(name) => {
            let spec = word.value().unwrap_or_default();
            let (kind, rest) = spec.strip_prefix("mon:").unwrap_or(spec).split_once(':').unwrap_or_default();
            // For the debugger's TCP port QEMU adds this by itself.
            let listens = matches!(kind, "tcp" | "telnet" | "websocket" | "tn3270") && name != "gdb";
            if !(listens || kind == "unix") {
                return Ok(None);
            }
            let options = rest.split_once(',').map_or("", |(_, options)| options);
            let waits = Props::parse(&format!("x,{options}")).is_ok_and(|options| waits(&options));
            Ok(waits.then(|| format!("{},wait=off", spec.trim_end_matches(','))))
        }
        _ => Ok(None),
    }
}

fn waits(props: &Props) -> bool {
    props.is_on("server") && props.get("wait").is_none_or(|wait| super::props::is_on(&wait))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> CommandLine {
        CommandLine::parse(&text.split_whitespace().collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn nobody_is_waited_for() {
        for (text, after) in [
            ("-chardev socket,id=a,path=/s,server=on", "-chardev socket,id=a,path=/s,server=on,wait=off"),
            ("-chardev socket,id=a,path=/s,server,", "-chardev socket,id=a,path=/s,server,wait=off"),
            (
                "-chardev socket,id=a,port=1,server=on,wait=on,telnet=on",
                "-chardev socket,id=a,port=1,server=on,wait=off,telnet=on",
            ),
            (
                "-chardev socket,id=a,fd=3,server=yes,wait",
                "-chardev socket,id=a,fd=3,server=yes,wait,wait=off",
            ),
            ("-serial unix:/s,server", "-serial unix:/s,server,wait=off"),
            ("-serial mon:unix:/s,server=on", "-serial mon:unix:/s,server=on,wait=off"),
            ("-monitor telnet:127.0.0.1:4444,server", "-monitor telnet:127.0.0.1:4444,server,wait=off"),
            ("-qmp tcp::4444,server=on,wait=on", "-qmp tcp::4444,server=on,wait=on,wait=off"),
            ("-serial websocket::1,server,nodelay", "-serial websocket::1,server,nodelay,wait=off"),
            ("-gdb unix:/g,server", "-gdb unix:/g,server,wait=off"),
            (
                r#"-chardev {"id":"a","backend":{"type":"socket","data":{"wait":true}}}"#,
                r#"-chardev {"backend":{"data":{"wait":false},"type":"socket"},"id":"a"}"#,
            ),
        ] {
            let mut made = line(text);
            assert_eq!(list(&made).unwrap(), [text], "{text}");
            end(&mut made).unwrap();
            assert_eq!(made.print().join(" "), after);
            assert_eq!(list(&made).unwrap(), [""; 0], "{after}");
        }
        for text in [
            "-chardev socket,id=a,path=/s,server=on,wait=off",
            "-chardev socket,id=a,path=/s,server,nowait",
            "-chardev socket,id=a,path=/s",
            "-chardev pty,id=server",
            "-serial unix:/s,server,nowait -serial tcp::1 -serial stdio -monitor none -qmp unix:/s",
            "-gdb tcp::1234 -s -vnc unix:/v -netdev stream,id=n,server=on,addr.type=unix,addr.path=/s",
            r#"-chardev {"id":"a","backend":{"type":"socket","data":{"server":true}}}"#,
        ] {
            let mut made = line(text);
            assert_eq!(list(&made).unwrap(), [""; 0], "{text}");
            end(&mut made).unwrap();
            assert_eq!(made.print().join(" "), text);
        }
    }
}
