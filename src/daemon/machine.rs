//! The machine of a VM that asks to come: the reference guest, which is in its state, or a QEMU that this host starts.

use std::path::PathBuf;

use migrate::SessionHello;
use vmprocess::control::protocol::EngineKind;
use vmprocess::failure::Failure;
use vmprocess::size::Size;

use super::admission::Refusal;
use crate::qemu::ask::Really;
use crate::qemu::cpu::Cpu;
use crate::qemu::offer::{Accepted, Offer};
use crate::qemu::resources::ThisHost;
use crate::qemu::rewrite::LinePlan;
use crate::qemu::rules::Rules;
use crate::qemu::words::one_line;

/// The machine that the VM's process is to have.
#[derive(Debug)]
pub(super) enum MachineChoice {
    Reference,
    Qemu(Box<Qemu>),
}

#[derive(Debug)]
pub(super) struct Qemu {
    pub(super) binary: PathBuf,
    pub(super) plan: LinePlan,
    /// For the VM's way onward.
    pub(super) offer: String,
}

/// What this host makes of the VM's offer. Starts QEMU to ask what it can; changes nothing.
///
/// # Errors
/// If this daemon takes no QEMU VMs, or the host lacks any of what the VM needs.
pub(super) fn find(
    hello: &SessionHello,
    rules: Option<&Rules>,
    engine: EngineKind,
) -> Result<MachineChoice, Refusal> {
    let Some(text) = &hello.offer else { return Ok(MachineChoice::Reference) };
    let Some(rules) = rules else {
        return Err(Refusal::other(
            "it is a QEMU VM, and this daemon takes none, because their command lines can start programs: start it \
             with `vmemd serve --qemu-rules FILE` (a file without rules will do) if you trust whoever can reach it",
        ));
    };
    if engine == EngineKind::Plain {
        return Err(Refusal::other("it is a QEMU VM, and this daemon's --engine plain is not for these"));
    }
    let offer: Offer = serde_json::from_str(text)
        .map_err(|error| Refusal::other(format!("what the VM says of its QEMU cannot be read: {error}")))?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let accepted =
        offer.accept(rules, &ThisHost, &Really, &path, &Cpu::of_this_host()?).map_err(in_one_line)?;
    let Accepted { binary, plan, onward } = accepted;
    let (planned, said) = (plan.managed().bytes(), hello.memory_bytes);
    if planned != said {
        let text = format!("its command line has {:#} of memory, the VM {:#}", Size(planned), Size(said));
        return Err(Refusal::other(text));
    }
    let offer = serde_json::to_string(&onward).map_err(|error| Refusal::other(error.to_string()))?;
    Ok(MachineChoice::Qemu(Box::new(Qemu { binary, plan, offer })))
}

/// A refusal is shown as one line.
fn in_one_line(failure: Failure) -> Refusal {
    Refusal::other(one_line(&failure.text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use migrate::SessionId;

    fn hello(offer: Option<&str>) -> SessionHello {
        SessionHello {
            versions: migrate::wire::VERSIONS,
            session: SessionId([1; 16]),
            name: "db".to_owned(),
            memory_bytes: 1 << 30,
            ram_bytes: None,
            streams: 2,
            check_placement: false,
            offer: offer.map(str::to_owned),
        }
    }

    fn refused(offer: &str, rules: Option<&Rules>, engine: EngineKind) -> String {
        find(&hello(Some(offer)), rules, engine).unwrap_err().text
    }

    #[test]
    fn offers_that_cannot_be_taken_are_refused() {
        let rules = Rules::default();
        assert!(matches!(find(&hello(None), None, EngineKind::Plain), Ok(MachineChoice::Reference)));
        assert!(refused("{}", None, EngineKind::Vmemd).contains("`vmemd serve --qemu-rules FILE`"));
        assert!(refused("{}", Some(&rules), EngineKind::Plain).contains("--engine plain"));
        for rubbish in ["", "rubbish", "{}", "[1]", r#"{"binary":"/bin/sh","args":[],"more":1}"#] {
            let text = refused(rubbish, Some(&rules), EngineKind::Vmemd);
            assert!(text.contains("cannot be read"), "{text}");
        }
    }

    #[test]
    fn what_is_missing_is_told_in_one_line() {
        let offer = r#"{"binary":"/nowhere/qemu-system-none","version":{"major":7,"minor":2,"micro":0},
            "machine":{"machine":"pc-q35-7.2","versioned":true},"cpu":null,
            "args":["-m","1G","-drive","file=/nowhere/disk","-kernel","/nowhere/kernel"]}"#;
        let text = refused(offer, Some(&Rules::default()), EngineKind::Vmemd);
        assert!(!text.contains('\n'), "{text}");
        for says in
            ["/nowhere/qemu-system-none", "disk /nowhere/disk is missing here", "file /nowhere/kernel"]
        {
            assert!(text.contains(says), "{says}: {text}");
        }
    }
}
