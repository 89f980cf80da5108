//! Which accelerator runs a guest. QEMU tries several if it is not told one, and begins with KVM if its own name ends
//! with `kvm`. Another host must not choose otherwise: a guest's state is its accelerator's.

use std::path::Path;

use vmprocess::failure::Failure;

use super::ask::Ask;
use super::options::{CommandLine, Word};
use super::props::Set;

/// What QEMU can do, by `-accel help`.
pub fn supported(ask: &dyn Ask, binary: &Path) -> Result<Vec<String>, Failure> {
    let said = ask.ask(binary, &["-accel", "help"])?;
    Ok(said.lines().skip(1).map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect())
}

/// Writes the accelerator that QEMU takes on this host into the command line, if that leaves a choice; everything else
/// stays as it is. `kvm` is whether KVM can be used here.
pub fn pin(line: &mut CommandLine, ask: &dyn Ask, binary: &Path, kvm: bool) -> Result<(), Failure> {
    let mut list = line.accelerators()?;
    if list.len() == 1 {
        return Ok(());
    }
    let asked = !list.is_empty();
    let supported = supported(ask, binary)?;
    if asked {
        // As QEMU does, which goes on to the next if it lacks one: another system's, or KVM for another architecture.
        list.retain(|accel| supported.contains(accel));
    } else {
        list = by_default(&supported, &binary.to_string_lossy());
    }
    let works = |accel: &&String| accel.as_str() != "kvm" || kvm;
    let Some(chosen) = list.iter().find(works).cloned() else { return Ok(()) };
    if !asked {
        line.words.push(Word::new("-accel", Some(chosen)));
        return Ok(());
    }
    // Of `-accel kvm,… -accel tcg,…` one stays, with its properties.
    let mut found = Vec::new();
    for (at, word) in line.words.iter().enumerate().filter(|(_, word)| word.name() == "accel") {
        found.push((at, word.props()?.first("accel")));
    }
    let keep = found.iter().find(|(_, accel)| *accel == Some(chosen.clone())).map(|(at, _)| *at);
    let mut at = 0;
    line.words.retain(|word| {
        at += 1;
        word.name() != "accel" || keep == Some(at - 1)
    });
    if keep.is_some() {
        return Ok(());
    }
    // `-machine accel=kvm:tcg`, where the last one counts.
    for word in line.words.iter_mut().filter(|word| word.name() == "machine") {
        let mut props = word.props()?;
        if props.get("accel").is_some() {
            props.set("accel", Set::Text(&chosen));
            word.value = Some(props.print());
        }
    }
    Ok(())
}

/// What a QEMU of that name tries, in this order.
fn by_default(supported: &[String], program: &str) -> Vec<String> {
    let order = if program.ends_with("kvm") { ["kvm", "tcg"] } else { ["tcg", "kvm"] };
    order.map(str::to_owned).into_iter().filter(|accel| supported.contains(accel)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Fake(&'static str);

    impl Ask for Fake {
        fn ask(&self, _: &Path, _: &[&str]) -> Result<String, Failure> {
            Ok(format!("Accelerators supported in QEMU binary:\n{}\n", self.0))
        }
    }

    fn pinned(text: &str, program: &str, supported: &'static str, kvm: bool) -> String {
        let words: Vec<_> = text.split_whitespace().collect();
        let mut line = CommandLine::parse(&words).unwrap();
        pin(&mut line, &Fake(supported), Path::new(program), kvm).unwrap();
        line.print().join(" ")
    }

    #[test]
    fn a_name_decides_where_the_line_does_not() {
        const BOTH: &str = "tcg\nkvm";
        for (program, supported, kvm, chosen) in [
            ("/usr/bin/qemu-system-x86_64", BOTH, true, "tcg"),
            ("/usr/bin/kvm", BOTH, true, "kvm"),
            ("/usr/libexec/qemu-kvm", BOTH, true, "kvm"),
            ("/usr/bin/kvm", BOTH, false, "tcg"),
            ("/usr/libexec/qemu-kvm", "kvm", true, "kvm"),
            ("/usr/bin/qemu-system-x86_64", "kvm", true, "kvm"),
            ("/usr/bin/kvm", "tcg", true, "tcg"),
        ] {
            let now = pinned("-m 1G", program, supported, kvm);
            assert_eq!(now, format!("-m 1G -accel {chosen}"), "{program}");
        }
        // QEMU says what it lacks.
        assert_eq!(pinned("-m 1G", "/usr/libexec/qemu-kvm", "kvm", false), "-m 1G");
    }

    #[test]
    fn a_choice_in_the_line_is_made_and_nothing_else_changed() {
        for (line, with, without) in [
            ("-accel kvm -m 1G", "-accel kvm -m 1G", "-accel kvm -m 1G"),
            ("-enable-kvm -m 1G", "-enable-kvm -m 1G", "-enable-kvm -m 1G"),
            ("-M q35,accel=tcg", "-M q35,accel=tcg", "-M q35,accel=tcg"),
            ("-M q35,accel=kvm:tcg -S", "-M q35,accel=kvm -S", "-M q35,accel=tcg -S"),
            ("-M q35,accel=tcg:kvm", "-M q35,accel=tcg", "-M q35,accel=tcg"),
            (
                "-accel kvm,kernel-irqchip=split -S -accel tcg,thread=multi",
                "-accel kvm,kernel-irqchip=split -S",
                "-S -accel tcg,thread=multi",
            ),
            // Those that this QEMU lacks are passed by.
            ("-M q35,accel=kvm:hvf:tcg", "-M q35,accel=kvm", "-M q35,accel=tcg"),
            ("-M q35,accel=hvf:whpx:kvm:tcg", "-M q35,accel=kvm", "-M q35,accel=tcg"),
            ("-accel hvf -accel kvm -accel nvmm -accel tcg -S", "-accel kvm -S", "-accel tcg -S"),
            // None is left, or none is known: QEMU says so.
            ("-M q35,accel=kvm:hvf", "-M q35,accel=kvm", "-M q35,accel=kvm:hvf"),
            ("-M q35,accel=hvf:whpx", "-M q35,accel=hvf:whpx", "-M q35,accel=hvf:whpx"),
            ("-M q35,accel=hvf", "-M q35,accel=hvf", "-M q35,accel=hvf"),
        ] {
            assert_eq!(pinned(line, "/usr/bin/kvm", "tcg\nkvm", true), with);
            assert_eq!(pinned(line, "/usr/bin/kvm", "tcg\nkvm", false), without);
        }
        // Of another architecture, on a host with KVM.
        for (line, now) in [
            ("-M virt,accel=kvm:tcg -S", "-M virt,accel=tcg -S"),
            ("-accel kvm -M virt -accel tcg", "-M virt -accel tcg"),
        ] {
            assert_eq!(pinned(line, "/usr/bin/qemu-system-aarch64", "tcg", true), now);
        }
    }
}
