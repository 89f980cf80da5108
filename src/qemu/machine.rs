//! Which machine QEMU makes: `pc`, `q35` and no `-machine` at all mean the newest of a family, which is another one in
//! another QEMU. A VM that may move says the version from the start.

use std::path::Path;

use serde::{Deserialize, Serialize};
use vmprocess::failure::{Failure, FailureKind};

use super::ask::Ask;
use super::options::{CommandLine, Word};

/// Of a QEMU binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub micro: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

impl Version {
    /// From the first line of `QEMU --version`.
    pub fn parse(text: &str) -> Result<Version, Failure> {
        let line = text.lines().next().unwrap_or_default();
        let number = |text: &str| {
            let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
            text[..end].parse::<u32>().ok()
        };
        let found = line.split_once("QEMU emulator version ").and_then(|(_, rest)| {
            let word = rest.split_whitespace().next()?;
            let mut parts = word.split('.').map(number);
            let (major, minor) = (parts.next()??, parts.next()??);
            Some(Version { major, minor, micro: parts.next().flatten().unwrap_or(0) })
        });
        found.ok_or_else(|| {
            let text = format!(
                "a QEMU says `QEMU emulator version …` to --version, this one said {line:?}: name the QEMU binary itself"
            );
            Failure::new(FailureKind::Usage, text)
        })
    }

    pub fn of(ask: &dyn Ask, binary: &Path) -> Result<Version, Failure> {
        Version::parse(&ask.ask(binary, &["--version"])?)
    }
}

/// The machines that a QEMU can make, from `-machine help`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machines {
    /// Name, and the name it is short for.
    known: Vec<(String, Option<String>)>,
    default: Option<String>,
}

/// What a command line's machine became.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pinned {
    pub machine: String,
    /// Its name ends with a version, so another QEMU that has it makes the same.
    pub versioned: bool,
}

impl Machines {
    pub fn parse(text: &str) -> Machines {
        let mut machines = Machines::default();
        for line in text.lines().skip(1) {
            let Some((name, about)) = line.split_once(char::is_whitespace) else { continue };
            if name.is_empty() {
                continue;
            }
            let alias = about.rsplit_once("(alias of ").and_then(|(_, rest)| rest.split(')').next());
            if about.contains("(default)") {
                machines.default = Some(name.to_owned());
            }
            machines.known.push((name.to_owned(), alias.map(str::to_owned)));
        }
        machines
    }

    pub fn of(ask: &dyn Ask, binary: &Path) -> Result<Machines, Failure> {
        Ok(Machines::parse(&ask.ask(binary, &["-machine", "help"])?))
    }

    pub fn has(&self, name: &str) -> bool {
        self.known.iter().any(|(known, _)| known == name)
    }

    /// The machine that a name, or none, means in this QEMU.
    pub fn resolve(&self, name: Option<&str>) -> Result<Pinned, Failure> {
        let Some(name) = name.or(self.default.as_deref()) else {
            let text = "this QEMU has no machine that it takes by itself: say which with -machine";
            return Err(Failure::new(FailureKind::Usage, text));
        };
        let Some((_, alias)) = self.known.iter().find(|(known, _)| known == name) else {
            let text =
                format!("this QEMU has no machine {name:?}: see its `-machine help`, or use a newer QEMU");
            return Err(Failure::new(FailureKind::Host, text));
        };
        let machine = alias.as_deref().unwrap_or(name).to_owned();
        let versioned = machine
            .rsplit_once('-')
            .is_some_and(|(_, tail)| tail.starts_with(|c: char| c.is_ascii_digit()) && tail.contains('.'))
            || red_hat(&machine);
        Ok(Pinned { machine, versioned })
    }

    /// Writes the version into the command line; everything else stays as it is.
    pub fn pin(&self, line: &mut CommandLine) -> Result<Pinned, Failure> {
        let asked = line.machine("type")?;
        let pinned = self.resolve(asked.as_deref())?;
        if asked.as_deref() == Some(pinned.machine.as_str()) {
            return Ok(pinned);
        }
        // The last one that names a machine counts; without any, every one is as good.
        let mut place = None;
        for (at, word) in line.words.iter().enumerate().filter(|(_, word)| word.name() == "machine") {
            if word.props()?.first("type").is_some() || place.is_none() {
                place = Some(at);
            }
        }
        match place {
            Some(at) => {
                let mut props = line.words[at].props()?;
                props.set_first("type", &pinned.machine);
                line.words[at].value = Some(props.print());
            }
            None => line.words.insert(0, Word::new("-machine", Some(pinned.machine.clone()))),
        }
        Ok(pinned)
    }
}

/// `pc-q35-rhel9.4.0` and such.
fn red_hat(machine: &str) -> bool {
    machine.rsplit_once("-rhel").is_some_and(|(_, tail)| tail.starts_with(|c: char| c.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HELP: &str = "Supported machines are:
microvm              microvm (i386)
pc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-7.2)
pc-i440fx-7.2        Standard PC (i440FX + PIIX, 1996) (default)
pc-i440fx-1.7        Standard PC (i440FX + PIIX, 1996) (deprecated)
q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)
pc-q35-7.2           Standard PC (Q35 + ICH9, 2009)
pc-q35-rhel9.4.0     RHEL-9.4.0 PC (Q35 + ICH9, 2009)
none                 empty machine
";

    fn pin(line: &str) -> (String, bool) {
        let words: Vec<_> = line.split_whitespace().collect();
        let mut line = CommandLine::parse(&words).unwrap();
        let pinned = Machines::parse(HELP).pin(&mut line).unwrap();
        assert_eq!(line.machine("type").unwrap(), Some(pinned.machine));
        (line.print().join(" "), pinned.versioned)
    }

    #[test]
    fn short_names_get_their_version() {
        for (line, pinned) in [
            ("-m 1G", "-machine pc-i440fx-7.2 -m 1G"),
            ("-M q35,accel=kvm -m 1G", "-M pc-q35-7.2,accel=kvm -m 1G"),
            ("-machine accel=tcg,type=pc", "-machine accel=tcg,type=pc-i440fx-7.2"),
            ("-machine usb=off", "-machine pc-i440fx-7.2,usb=off"),
            ("-machine pc -machine usb=off", "-machine pc-i440fx-7.2 -machine usb=off"),
            ("-machine pc -M q35 -machine usb=off", "-machine pc -M pc-q35-7.2 -machine usb=off"),
            ("-machine pc-q35-7.2,usb=off", "-machine pc-q35-7.2,usb=off"),
            ("-machine pc-q35-rhel9.4.0", "-machine pc-q35-rhel9.4.0"),
        ] {
            assert_eq!(pin(line), (pinned.to_owned(), true), "{line}");
        }
        assert_eq!(pin("-M microvm"), ("-M microvm".to_owned(), false));
    }

    #[test]
    fn a_machine_that_is_not_there_is_named() {
        let machines = Machines::parse(HELP);
        let error = machines.resolve(Some("pc-q35-10.0")).unwrap_err();
        assert_eq!(
            error.text,
            "this QEMU has no machine \"pc-q35-10.0\": see its `-machine help`, or use a newer QEMU"
        );
        let error = Machines::parse("Supported machines are:\nvirt x\n").resolve(None).unwrap_err();
        assert!(error.text.contains("say which with -machine"), "{error}");
    }

    #[test]
    fn versions() {
        let version = |text: &str| Version::parse(text).map(|version| version.to_string());
        assert_eq!(
            version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright").unwrap(),
            "7.2.22"
        );
        assert_eq!(version("QEMU emulator version 10.0.2+ds-2 (x)").unwrap(), "10.0.2");
        assert_eq!(version("QEMU emulator version 9.1").unwrap(), "9.1.0");
        assert!(version("bash 5").unwrap_err().text.contains("this one said \"bash 5\""));
        assert!(Version::parse("").is_err());
        assert!(Version { major: 10, minor: 0, micro: 0 } > Version { major: 7, minor: 2, micro: 22 });
    }

    proptest! {
        #[test]
        fn no_output_is_too_strange(text in "\\PC*|(.|\n)*") {
            let machines = Machines::parse(&text);
            let _ = (machines.resolve(None), machines.resolve(Some(&text)), Version::parse(&text));
        }
    }
}
