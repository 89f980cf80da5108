//! Whether a guest finds the same processor at the target: with `-cpu host` (or `max`) under KVM it has seen the
//! source's.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use vmprocess::failure::{Failure, FailureKind};

use super::options::CommandLine;

/// Flags that the kernel makes up about the host; no guest sees them.
const OF_THE_KERNEL: &[&str] = &[
    "acc_power",
    "acpi",
    "amd_lbr_v2",
    "aperfmperf",
    "arat",
    "arch_lbr",
    "arch_perfmon",
    "art",
    "bts",
    "cdp_l2",
    "cdp_l3",
    "constant_tsc",
    "cpb",
    "cpuid",
    "cpuid_fault",
    "cqm",
    "cqm_llc",
    "cqm_mbm_local",
    "cqm_mbm_total",
    "cqm_occup_llc",
    "dtes64",
    "dtherm",
    "ds_cpl",
    "dts",
    "epb",
    "ept",
    "ept_ad",
    "est",
    "extapic",
    "extd_apicid",
    "flexpriority",
    "hfi",
    "hw_pstate",
    "hwp",
    "hwp_act_window",
    "hwp_epp",
    "hwp_notify",
    "hwp_pkg_req",
    "ida",
    "intel_ppin",
    "mba",
    "monitor",
    "mwaitx",
    "nonstop_tsc",
    "nonstop_tsc_s3",
    "nopl",
    "pbe",
    "pebs",
    "perfmon_v2",
    "pln",
    "proc_feedback",
    "pti",
    "pts",
    "rapl",
    "rdt_a",
    "rep_good",
    "ring3mwait",
    "sme",
    "sev",
    "sev_es",
    "sev_snp",
    "smx",
    "split_lock_detect",
    "tm",
    "tm2",
    "tme",
    "tpr_shadow",
    "tsc_known_freq",
    "tsc_reliable",
    "user_shstk",
    "vnmi",
    "vpid",
    "xtopology",
    "xtpr",
];

/// Most flags that are taken from another host.
const MAX_FLAGS: usize = 1024;

/// A host's processor, as far as guests can see it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    pub vendor: String,
    pub flags: BTreeSet<String>,
}

impl Cpu {
    /// From the text of `/proc/cpuinfo`: its first processor.
    pub fn parse(text: &str) -> Cpu {
        let value = |names: &[&str]| {
            text.lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(key, _)| names.contains(&key.trim()))
                .map(|(_, value)| value.trim())
        };
        let flags = value(&["flags", "Features"]).unwrap_or_default();
        let seen = flags.split_whitespace().filter(|flag| !OF_THE_KERNEL.contains(flag));
        Cpu {
            vendor: value(&["vendor_id", "CPU implementer"]).unwrap_or_default().to_owned(),
            flags: seen.map(str::to_owned).collect(),
        }
    }

    pub fn of_this_host() -> Result<Cpu, Failure> {
        let text = std::fs::read_to_string("/proc/cpuinfo")
            .map_err(|error| Failure::io("reading /proc/cpuinfo", &error))?;
        Ok(Cpu::parse(&text))
    }

    /// Whether this is what another host could have said.
    pub(super) fn is_sane(&self) -> bool {
        self.flags.len() <= MAX_FLAGS
    }

    /// What a guest that has seen this processor would miss on another.
    pub(super) fn lost_on(&self, target: &Cpu) -> Option<String> {
        if self.vendor != target.vendor {
            return Some(format!(
                "its guest sees a processor of {:?} (-cpu host), and this host's is of {:?}: start it with a model \
                 that both have, such as -cpu qemu64",
                self.vendor, target.vendor
            ));
        }
        let lost: Vec<&str> = self.flags.difference(&target.flags).map(String::as_str).collect();
        (!lost.is_empty()).then(|| {
            format!(
                "its guest sees processor features (-cpu host) that this host lacks: {}: start it with a model that \
                 both have, or turn them off as in -cpu host,-{}",
                lost.join(" "),
                lost[0].replace('_', "-")
            )
        })
    }
}

/// The processor model that a command line names.
pub fn model(line: &CommandLine) -> Option<&str> {
    line.all("cpu").last().and_then(|word| word.value()).map(|cpu| cpu.split(',').next().unwrap_or(cpu))
}

/// Whether the guest sees what the host's processor can do.
pub fn shows_host(line: &CommandLine) -> Result<bool, Failure> {
    Ok(line.uses_kvm()? && matches!(model(line), Some("host" | "max")))
}

/// Features that the command line takes away from the guest.
pub(super) fn turned_off(line: &CommandLine) -> BTreeSet<String> {
    let text = line.all("cpu").last().and_then(|word| word.value()).unwrap_or_default();
    let off = |part: &str| {
        let name = part
            .strip_prefix('-')
            .or_else(|| part.strip_suffix("=off"))
            .or_else(|| part.strip_suffix("=no"))?;
        Some(name.replace('-', "_"))
    };
    text.split(',').skip(1).filter_map(off).collect()
}

/// Whether `QEMU -cpu help` knows a model.
pub fn known(help: &str, model: &str) -> bool {
    let models = help.split("Recognized CPUID flags").next().unwrap_or(help);
    // `x86 qemu64   …` in older QEMU, `  qemu64   …` in newer.
    models.lines().any(|line| line.split_whitespace().take(2).any(|word| word == model))
}

/// As [`known`], or an error.
pub(super) fn check_model(help: &str, model: &str) -> Result<(), Failure> {
    if known(help, model) {
        return Ok(());
    }
    let text =
        format!("this QEMU has no processor model {model:?}: see its `-cpu help`, or use a newer QEMU");
    Err(Failure::new(FailureKind::Host, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> CommandLine {
        CommandLine::parse(&text.split_whitespace().collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn the_first_processor_counts() {
        let cpu = Cpu::parse(
            "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu sse avx2 constant_tsc\n\n\
             processor\t: 1\nvendor_id\t: Other\nflags\t\t: none\n",
        );
        assert_eq!(cpu.vendor, "GenuineIntel");
        assert_eq!(cpu.flags.iter().map(String::as_str).collect::<Vec<_>>(), ["avx2", "fpu", "sse"]);
        let arm = Cpu::parse("Features\t: fp asimd\nCPU implementer\t: 0x41\n");
        assert_eq!((arm.vendor.as_str(), arm.flags.len()), ("0x41", 2));
        assert_eq!(Cpu::parse(""), Cpu::default());
        assert!(!Cpu::of_this_host().unwrap().flags.is_empty());
    }

    #[test]
    fn the_target_needs_what_the_source_has() {
        let cpu = |vendor: &str, flags: &str| Cpu::parse(&format!("vendor_id: {vendor}\nflags: {flags}\n"));
        let small = cpu("A", "fpu sse");
        let large = cpu("A", "fpu sse avx2 avx512_bf16");
        assert_eq!(small.lost_on(&large), None);
        assert_eq!(large.lost_on(&large), None);
        let lost = large.lost_on(&small).unwrap();
        assert!(
            lost.contains("lacks: avx2 avx512_bf16: start it") && lost.contains("-cpu host,-avx2"),
            "{lost}"
        );
        assert!(small.lost_on(&cpu("B", "fpu sse")).unwrap().contains("a processor of \"A\""));
    }

    #[test]
    fn which_guests_see_the_host() {
        for (text, seen) in [
            ("-accel kvm -cpu host", true),
            ("-enable-kvm -cpu host,-arch-capabilities", true),
            ("-M q35,accel=kvm -cpu max", true),
            ("-accel kvm -cpu qemu64", false),
            ("-accel kvm", false),
            ("-accel tcg -cpu max", false),
        ] {
            assert_eq!(shows_host(&line(text)).unwrap(), seen, "{text}");
        }
        let off = turned_off(&line("-cpu host,-arch-capabilities,avx2=off,+sse"));
        assert_eq!(off.iter().map(String::as_str).collect::<Vec<_>>(), ["arch_capabilities", "avx2"]);
    }

    #[test]
    fn models() {
        let old = "Available CPUs:\nx86 486                   (alias configured by machine type)\nx86 qemu64  QEMU\n\nRecognized CPUID flags:\n  sse avx\n";
        let new = "Available CPUs:\n  486                   x\n  qemu64  QEMU\n\nRecognized CPUID flags:\n  sse avx\n";
        for help in [old, new] {
            check_model(help, "qemu64").unwrap();
            let error = check_model(help, "sse").unwrap_err();
            assert!(error.text.starts_with("this QEMU has no processor model \"sse\": see"), "{error}");
        }
    }
}
