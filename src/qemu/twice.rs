//! What a second life of a VM must not have while the first one runs: the same addresses in one network. The first one
//! may have another name by now: it may be a second life itself. So all VMs of the run directory are looked at.

use std::collections::BTreeMap;

use vmprocess::control::client::VmClient;
use vmprocess::control::rundir::RunDir;
use vmprocess::failure::{Failure, FailureKind};

use super::options::CommandLine;
use super::resources::{self, what::What};

/// Refuses a command line that gives a VM what another, of which it is a copy, has: both would answer.
///
/// # Errors
/// All of it, by name.
pub(super) fn check(line: &CommandLine, other: &str) -> Result<(), Failure> {
    let twice = of(line)?;
    if twice.is_empty() {
        return Ok(());
    }
    let lines: String = twice.iter().map(|line| format!("\n  {line}")).collect();
    let text = format!(
        "{other:?} runs, and a second life of it would have the same addresses:{lines}\ngive it others (a command line after --, or rules: \
         --qemu-rules), or say that it may (--same-addresses)"
    );
    Err(Failure::new(FailureKind::Name, text))
}

/// Refuses a command line that gives a VM an address that one of those that run here has.
///
/// # Errors
/// All of it, by name; or if the run directory cannot be read. A VM that does not answer is passed over.
pub(super) fn check_running(line: &CommandLine, dir: &RunDir) -> Result<(), Failure> {
    let ours = addresses(line)?;
    if ours.is_empty() {
        return Ok(());
    }
    let sockets = dir.sockets()?;
    let ask = |socket| VmClient::connect_to(dir, socket).and_then(|mut vm| vm.stat());
    // All at once: one that does not answer must not hold up the others.
    let lines: Vec<(String, CommandLine)> = std::thread::scope(|scope| {
        let asked: Vec<_> = sockets.iter().map(|socket| scope.spawn(move || ask(socket))).collect();
        let stats = asked.into_iter().filter_map(|asked| asked.join().ok()?.ok());
        stats.filter_map(|stat| Some((stat.name, line_of(stat.pid)?))).collect()
    });
    refuse(&ours, &lines)
}

/// The command line of a QEMU that runs: what it has, whoever started it, and whatever it was called then. None of
/// another program, for it has no such options.
fn line_of(pid: u32) -> Option<CommandLine> {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let words: Vec<&str> = text.split_terminator('\0').skip(1).collect();
    CommandLine::parse(&words).ok()
}

fn refuse(ours: &BTreeMap<String, String>, others: &[(String, CommandLine)]) -> Result<(), Failure> {
    let mut lines = String::new();
    for (name, line) in others {
        let theirs = addresses(line).unwrap_or_default();
        for (address, option) in ours.iter().filter(|(address, _)| theirs.contains_key(*address)) {
            lines += &format!("\n  `{option}`: {address}, as {name:?} has, which runs");
        }
    }
    if lines.is_empty() {
        return Ok(());
    }
    let text = format!(
        "two VMs would have the same addresses:{lines}\ngive it others (a command line after --, or rules: \
         --qemu-rules), or say that it may (--same-addresses)"
    );
    Err(Failure::new(FailureKind::Name, text))
}

/// The addresses that a command line gives by name, each with its option: of vsock, and in networks that are not QEMU's
/// own.
fn addresses(line: &CommandLine) -> Result<BTreeMap<String, String>, Failure> {
    let mut own = Vec::new();
    for word in line.words.iter().filter(|word| word.name() == "netdev" && word.value().is_some()) {
        let props = word.props()?;
        if props.first("type").is_some_and(|kind| kind == "user") {
            own.extend(props.get("id"));
        }
    }
    let mut found = BTreeMap::new();
    for word in line.words.iter().filter(|word| word.value().is_some()) {
        let mac = match word.name() {
            "device" => {
                let props = word.props()?;
                if let Some(cid) = props.get("guest-cid") {
                    found.insert(format!("vsock CID {cid}"), word.shown());
                }
                let inside = props.get("netdev").is_some_and(|id| own.contains(&id));
                props.get("mac").filter(|_| !inside)
            }
            "nic" => {
                let props = word.props()?;
                let inside = props.first("type").is_some_and(|kind| kind == "user" || kind == "none");
                props.get("mac").or_else(|| props.get("macaddr")).filter(|_| !inside)
            }
            _ => None,
        };
        if let Some(mac) = mac {
            found.insert(format!("MAC address {}", mac.to_lowercase()), word.shown());
        }
    }
    Ok(found)
}

fn of(line: &CommandLine) -> Result<Vec<String>, Failure> {
    let mut found = Vec::new();
    for resource in resources::list(line)? {
        let (name, option) = (&resource.name, &resource.option);
        match resource.what {
            What::Tap | What::TapMade => {
                found.push(format!("`{option}`: tap interface {name}, and the MAC address behind it"));
            }
            What::Bridge => found.push(format!("`{option}`: the MAC address on bridge {name}")),
            _ => {}
        }
    }
    for word in &line.words {
        let is_vsock = word.name() == "device" && word.value().is_some_and(|value| value.contains("vsock"));
        if is_vsock && let Some(cid) = word.props()?.get("guest-cid") {
            found.push(format!("`{}`: vsock CID {cid}", word.shown()));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> CommandLine {
        CommandLine::parse(&text.split_whitespace().collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn an_address_of_a_vm_that_runs_under_any_name_is_refused() {
        let with = |mac: &str, cid: u32| {
            line(&format!(
                "-m 1G -netdev tap,id=n,ifname=t1 -device virtio-net-pci,netdev=n,mac={mac} -device vhost-vsock-pci,guest-cid={cid}"
            ))
        };
        let ours = addresses(&with("52:54:00:AA:00:01", 7)).unwrap();
        let others = |mac, cid| vec![("a".to_owned(), line("-m 1G")), ("b".to_owned(), with(mac, cid))];
        refuse(&ours, &others("52:54:00:aa:00:02", 8)).unwrap();
        let failure = refuse(&ours, &others("52:54:00:aa:00:01", 8)).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Name);
        for says in
            ["mac=52:54:00:AA:00:01", "MAC address 52:54:00:aa:00:01, as \"b\" has", "--same-addresses"]
        {
            assert!(failure.text.contains(says), "{says}: {failure}");
        }
        assert!(!failure.text.contains("CID"), "{failure}");
        let text = refuse(&ours, &others("52:54:00:aa:00:02", 7)).unwrap_err().text;
        assert!(text.contains("vsock CID 7, as \"b\" has"), "{text}");
        // A network that nobody else is in.
        let own = line(
            "-netdev user,id=n -device virtio-net-pci,netdev=n,mac=52:54:00:00:00:01 -nic user,mac=52:54:00:00:00:02",
        );
        assert!(addresses(&own).unwrap().is_empty());
    }

    #[test]
    fn addresses_are_named() {
        let check = |text: &str| {
            let words: Vec<&str> = text.split_whitespace().collect();
            super::check(&CommandLine::parse(&words).unwrap(), "web")
        };
        check("-m 1G -netdev user,id=n -device virtio-net-pci,netdev=n,mac=52:54:00:00:00:01").unwrap();
        let text = check("-netdev tap,id=n,ifname=t0,script=no -netdev bridge,id=b,br=br0 -device vhost-vsock-pci,guest-cid=7")
            .unwrap_err()
            .text;
        for says in ["\"web\" runs", "tap interface t0", "on bridge br0", "vsock CID 7", "--same-addresses"] {
            assert!(text.contains(says), "{says}: {text}");
        }
    }
}
