//! Finds in a QEMU command line the options that cannot work under vmemd, with reason and remedy, by the tables in
//! `refused.rs`.
//!
//! [`refuse`] is about running at all, [`unmovable`] about moving to another host.

use std::fmt;
use std::sync::LazyLock;

use vmprocess::failure::{Failure, FailureKind};

use super::options::{CommandLine, Word};
use super::props::Props;
use super::refused::{Row, When, cannot_move, cannot_run};

/// One thing that cannot be, why, and what to do instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The option as written.
    pub what: String,
    pub why: &'static str,
    pub remedy: &'static str,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {}: {}", self.what, self.why, self.remedy)
    }
}

static CANNOT_RUN: LazyLock<Vec<Row>> = LazyLock::new(cannot_run);
static CANNOT_MOVE: LazyLock<Vec<Row>> = LazyLock::new(cannot_move);

/// All that cannot work, or nothing.
pub fn refuse(line: &CommandLine) -> Result<(), Failure> {
    report("vmemd cannot run this QEMU command line", refusals(line)?)
}

/// All that QEMU, or we, cannot move to another host.
pub fn unmovable(line: &CommandLine) -> Result<(), Failure> {
    report("this VM cannot be moved", find(line, &CANNOT_MOVE)?)
}

fn report(head: &str, found: Vec<Refusal>) -> Result<(), Failure> {
    if found.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = found.iter().map(|refusal| format!("\n  {refusal}")).collect();
    Err(Failure::new(FailureKind::Usage, format!("{head}:{}", lines.concat())))
}

/// Each thing that cannot work, in the command line's order.
pub fn refusals(line: &CommandLine) -> Result<Vec<Refusal>, Failure> {
    find(line, &CANNOT_RUN)
}

fn find(line: &CommandLine, rows: &[Row]) -> Result<Vec<Refusal>, Failure> {
    let mut found = Vec::new();
    for word in line.words() {
        // Also properties that only the other table looks at: what cannot be read is refused in any case.
        let props = if reads_props(word.name()) { word.props()? } else { Props::Text(Vec::new()) };
        let fits = |row: &&Row| row.options.contains(&word.name()) && row.when.fits(word, &props);
        if let Some(Row { reason, .. }) = rows.iter().find(fits) {
            found.push(Refusal { what: word.shown(), why: reason.why, remedy: reason.remedy });
        }
    }
    Ok(found)
}

/// Whether a row looks at this option's properties. What other options say is text.
fn reads_props(name: &str) -> bool {
    let reads = |row: &Row| row.options.contains(&name) && row.when.reads_props();
    CANNOT_RUN.iter().chain(&*CANNOT_MOVE).any(reads)
}

impl When {
    fn reads_props(&self) -> bool {
        matches!(self, When::First(..) | When::Driver(_) | When::Props(..))
    }

    fn fits(&self, word: &Word, props: &Props) -> bool {
        match self {
            When::Given => true,
            When::First(key, names) => props.first(key).is_some_and(|value| is_one_of(&value, names)),
            When::Begins(start) => {
                word.value().is_some_and(|value| value.starts_with(start))
                    || any_value(props, |_, value| value.starts_with(start))
            }
            // In -blockdev the first word is the driver.
            When::Driver(names) => any_value(props, |key, value| {
                matches!(key, "" | "driver" | "format") && is_one_of(value, names)
            }),
            When::Value(fits) => word.value().is_some_and(fits),
            When::Props(fits, _) => fits(props),
        }
    }
}

/// Whether a value at any depth is such, by the last word of its path.
fn any_value(props: &Props, fits: impl Fn(&str, &str) -> bool) -> bool {
    let mut found = false;
    props.clone().visit(&mut |path, value| {
        found |= fits(path.rsplit('.').next().unwrap_or(path), value);
        None
    });
    found
}

/// Names may begin or end with a `*`.
fn is_one_of(value: &str, names: &[&str]) -> bool {
    names.iter().any(|name| match (name.strip_prefix('*'), name.strip_suffix('*')) {
        (Some(end), _) => value.ends_with(end),
        (None, Some(start)) => value.starts_with(start),
        (None, None) => value == *name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn line(text: &str) -> CommandLine {
        CommandLine::parse(&text.split_whitespace().collect::<Vec<_>>()).unwrap()
    }

    /// Refused, with these words in reason or remedy; and nothing else in the line is.
    fn refused(text: &str, says: &str) {
        let found = refusals(&line(&format!("-m 1G {text} -S"))).unwrap();
        assert_eq!(found.len(), 1, "{text}: {found:?}");
        let shown = found[0].to_string();
        assert!(shown.contains(says), "{text}: {shown}");
        assert!(shown.starts_with(&format!("`{}", text.split(' ').next().unwrap())), "{shown}");
        assert!(
            refuse(&line(text))
                .unwrap_err()
                .text
                .starts_with("vmemd cannot run this QEMU command line:\n  `")
        );
    }

    #[test]
    fn what_pins_memory() {
        for text in [
            "-device vfio-pci,host=01:00.0",
            r#"-device {"driver":"vfio-pci","host":"0000:01:00.0"}"#,
            "-device vfio-ccw",
            "-device vhost-vdpa-device-pci,vhostdev=/dev/vhost-vdpa-0",
            "-netdev vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0",
            "-blockdev nvme,node-name=d,device=0000:01:00.0,namespace=1",
            r#"-blockdev {"driver":"raw","file":{"driver":"nvme","device":"1","namespace":1},"node-name":"d"}"#,
            "-drive file=nvme://0000:01:00.0/1,if=none",
            "-blockdev driver=virtio-blk-vfio-pci,node-name=d,path=/x",
            "-hda nvme://0000:01:00.0/1",
        ] {
            refused(text, "pinned for a device, so none could be taken out of RAM: use an emulated device");
        }
    }

    #[test]
    fn vhost_user() {
        for text in [
            "-netdev vhost-user,id=n,chardev=c",
            "-netdev type=vhost-user,id=n,chardev=c",
            "-device vhost-user-blk-pci,chardev=c",
            r#"-device {"driver":"vhost-user-fs-pci","chardev":"c","tag":"t"}"#,
            "-nic vhost-user,chardev=c",
            "-object cryptodev-vhost-user,id=c,chardev=x",
            "-device x-pci-proxy-dev,id=p,fd=3",
            "-blockdev virtio-blk-vhost-user,node-name=d,path=/x",
        ] {
            refused(text, "another process that maps guest memory");
        }
        refuse(&line("-netdev tap,id=n,vhost=on -device virtio-net-pci,netdev=n")).unwrap();
        refuse(&line("-netdev tap,id=n,vhost=on -device vhost-vsock-pci,guest-cid=3")).unwrap();
    }

    #[test]
    fn memory_of_ones_own() {
        for text in [
            "-object memory-backend-file,id=m,size=1G,mem-path=/dev/shm/a",
            "-mem-path /dev/shm",
            r#"-object {"qom-type":"memory-backend-file","id":"m","mem-path":"/a","size":1}"#,
        ] {
            refused(text, "file of your own cannot be taken out of RAM by vmemd: leave it out");
        }
        for text in [
            "-object memory-backend-memfd,id=m,size=1G,hugetlb=on",
            r#"-object {"qom-type":"memory-backend-memfd","id":"m","hugetlb":true,"size":1}"#,
            "-object memory-backend-file,id=m,size=1G,mem-path=/dev/hugepages",
            "-mem-path /dev/hugepages/vm",
        ] {
            refused(text, "hugetlbfs cannot be taken out of RAM: leave it out");
        }
        refused("-object memory-backend-epc,id=e,size=64M", "enclave memory");
        for device in
            ["pc-dimm,memdev=m", "nvdimm,memdev=m", "virtio-mem-pci,memdev=m", "virtio-pmem-pci,memdev=m"]
        {
            refused(
                &format!("-device {device}"),
                "memory devices are not supported yet: give all memory with -m",
            );
        }
        refused("-overcommit mem-lock=on", "locked can never be taken out of RAM: leave it out");
        refused("-overcommit mem-lock=on-fault", "locked can never");
        refused("-realtime mlock=on", "locked can never");
        refused("-numa node,nodeid=0,mem=512M", "-numa node,memdev=ID");
        refused("-device virtio-gpu-pci,blob=true", "leave out blob=on");
        refuse(&line("-overcommit mem-lock=off,cpu-pm=on -numa node,memdev=a -device virtio-gpu-pci"))
            .unwrap();
    }

    #[test]
    fn confidential_guests() {
        for text in [
            "-object sev-guest,id=s,cbitpos=47",
            "-object sev-snp-guest,id=s",
            "-object tdx-guest,id=t",
            "-machine q35,confidential-guest-support=s",
            "-M q35,memory-encryption=s",
        ] {
            refused(text, "confidential guest is encrypted and pinned");
        }
    }

    #[test]
    fn how_the_process_lives() {
        refused("-daemonize", "threads that manage its memory are not copied: start vmemd in the background");
        refused("--chroot /tmp", "can no longer reach the store");
        refused("-runas nobody", "start vmemd itself as that user");
        refused("-run-with user=nobody", "start vmemd itself as that user");
        refused("-run-with async-teardown=on", "a second process would hold the memory");
        refused("-async-teardown", "a second process would hold the memory");
        refused("-incoming defer", "bring the VM with `vmemd migrate`");
        refused("-readconfig vm.cfg", "write its contents as options");
        refused("-preconfig", "write the configuration as options");
        for text in ["-accel xen", "-machine pc,accel=kvm:xen", "-M xenfv", "-xen-domid 3"] {
            refused(text, "not QEMU's: use -accel kvm");
        }
        refuse(&line(
            "-accel kvm,kernel-irqchip=split -machine q35,kernel_irqchip=on -run-with exit-with-parent=on",
        ))
        .unwrap();
    }

    #[test]
    fn our_own_names() {
        for text in [
            "-object memory-backend-ram,id=vmemd-ram0,size=1G",
            "-chardev socket,id=vmemd-qmp,path=/a",
            "-machine q35,memory-backend=vmemd-ram0",
        ] {
            refused(text, "are vmemd's own");
        }
    }

    #[test]
    fn every_refusal_is_told_at_once() {
        let error = refuse(&line("-daemonize -append a,chroot,vfio-pci -mem-path /x -runas me")).unwrap_err();
        assert_eq!(error.kind, FailureKind::Usage);
        assert_eq!(error.text.lines().count(), 4, "{error}");
        let error = refuse(&line("-device {x}")).unwrap_err();
        assert!(error.text.starts_with("`-device {x}` cannot be read: it is not JSON"), "{error}");
    }

    /// Each row's options, and the words by which docs/qemu.md names what is refused of them.
    fn documented(row: &Row) -> Vec<String> {
        let said = match &row.when {
            When::Given => return row.options.iter().map(|option| format!("-{option}")).collect(),
            When::First(_, names) | When::Driver(names) => *names,
            When::Begins(start) => &[*start],
            When::Value(_) => &[],
            When::Props(_, said) => *said,
        };
        said.iter().map(|said| (*said).to_owned()).collect()
    }

    /// The words in backticks between these two headings of the manual.
    fn named_between(start: &str, end: &str) -> Vec<&'static str> {
        let manual = include_str!("../../docs/qemu.md");
        let (_, rest) = manual.split_once(start).unwrap();
        let (section, _) = rest.split_once(end).unwrap();
        let spans = section.split('`').skip(1).step_by(2);
        spans.flat_map(|span| span.split([' ', ','])).collect()
    }

    #[test]
    fn the_manual_names_all_that_is_refused() {
        for (rows, start, end) in [
            (&CANNOT_RUN, "\n## What is refused\n", "\n## What does not move\n"),
            (&CANNOT_MOVE, "\n## What does not move\n", "\n## Moving\n"),
        ] {
            let named = named_between(start, end);
            let missing: Vec<String> =
                rows.iter().flat_map(documented).filter(|word| !named.contains(&word.as_str())).collect();
            assert!(missing.is_empty(), "docs/qemu.md, {start:?}, does not name {missing:?}");
        }
    }

    #[test]
    fn whether_a_refused_option_has_a_value_is_known() {
        for option in CANNOT_RUN.iter().chain(&*CANNOT_MOVE).flat_map(|row| row.options) {
            let line = CommandLine::parse(&[format!("-{option}"), "x".to_owned()]).unwrap();
            assert_eq!(line.unknown(), [""; 0], "{option}: add it to ALONE or VALUED");
        }
    }

    #[test]
    fn what_stays_on_its_host() {
        for (text, says) in [
            ("-snapshot", "temporary file of this host"),
            ("-drive file=a,snapshot=on", "temporary file of this host"),
            ("-device nvme,drive=d", "use virtio-blk"),
            ("-device usb-host,hostbus=1", "stays here"),
            ("-virtfs local,path=/a,mount_tag=t", "file system of the host"),
            ("-fsdev local,path=/a,id=t", "file system of the host"),
            ("-cpu host,+invtsc", "leave out invtsc"),
            ("-cpu host,invtsc=on", "leave out invtsc"),
            ("-device virtio-vga-gl", "without gl"),
            ("-device vhost-scsi-pci,wwpn=x", "use virtio-scsi"),
            ("-tpmdev passthrough,id=t", "swtpm"),
            ("-icount shift=1,rr=record,rrfile=x", "leave out rr="),
            ("-device ivshmem-plain,memdev=m", "stays here"),
            ("-device amd-iommu", "intel-iommu"),
        ] {
            let error = unmovable(&line(text)).unwrap_err();
            assert!(
                error.text.starts_with("this VM cannot be moved:") && error.text.contains(says),
                "{error}"
            );
        }
        unmovable(&line("-cpu host,invtsc=on,tsc-frequency=2000000000 -drive file=a,snapshot=off")).unwrap();
    }

    proptest! {
        #[test]
        fn no_command_line_is_too_strange(args in proptest::collection::vec("(-device|-object|-machine|-numa|-blockdev|.*)", 0..8)) {
            if let Ok(line) = CommandLine::parse(&args) {
                let _ = (refuse(&line), unmovable(&line));
            }
        }
    }
}
