//! What a second life of a VM must not have while the first one runs: the same addresses in one network.

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
