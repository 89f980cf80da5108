//! What of a QEMU command line cannot work under vmemd: each with the reason and the remedy.
//!
//! [`refuse`] is about running at all, [`unmovable`] about moving to another host.

use std::fmt;

use vmprocess::failure::{Failure, FailureKind};

use super::options::{CommandLine, Word};
use super::props::{Props, is_on};

/// What our own additions are called, so that nobody else uses it.
pub(super) const OURS: &str = "vmemd-";

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

/// Options whose properties are looked at; what others say is text.
const JUDGED: &[&str] = &[
    "accel",
    "blockdev",
    "chardev",
    "cpu",
    "device",
    "drive",
    "icount",
    "machine",
    "net",
    "netdev",
    "nic",
    "numa",
    "object",
    "overcommit",
    "realtime",
    "run-with",
    "tpmdev",
];

/// Reason and remedy.
type Verdict = Option<(&'static str, &'static str)>;

const PINS: (&str, &str) = (
    "it keeps all guest memory pinned for a device, so none could be taken out of RAM",
    "use an emulated device instead, such as virtio-blk or virtio-net",
);
const VHOST_USER: (&str, &str) = (
    "its back end is another process that maps guest memory, and would not see what was taken out of RAM",
    "use the device inside QEMU: virtio-net with a tap (vhost=on is fine), virtio-blk with a drive, 9p for files",
);
const HOTPLUG: (&str, &str) = (
    "memory devices are not supported yet",
    "give all memory with -m; what the guest does not use costs nothing under vmemd",
);
const CONFIDENTIAL: (&str, &str) = (
    "the memory of a confidential guest is encrypted and pinned, so it cannot be stored or moved by the host",
    "run it without vmemd",
);
const XEN: (&str, &str) = ("under Xen guest memory is not QEMU's", "use -accel kvm or -accel tcg");
const PRIVILEGES: (&str, &str) = (
    "after it QEMU can no longer reach the store, and remove its control socket",
    "start vmemd itself as that user (access to /dev/kvm and /dev/userfaultfd is enough), or in a container",
);
const OWN_FILE: (&str, &str) = (
    "guest memory in a file of your own cannot be taken out of RAM by vmemd",
    "leave it out: vmemd makes the memory backend, from -m or from memory-backend-ram objects",
);
const HUGE: (&str, &str) = (
    "pages of hugetlbfs cannot be taken out of RAM",
    "leave it out: vmemd uses transparent huge pages where they fit",
);
const OURS_ALREADY: (&str, &str) = (
    "names that begin with `vmemd-` are vmemd's own",
    "give the command line as it was before vmemd changed it, or choose another id",
);

/// All that cannot work, or nothing.
pub fn refuse(line: &CommandLine) -> Result<(), Failure> {
    report("vmemd cannot run this QEMU command line", refusals(line)?)
}

/// All that QEMU, or we, cannot move to another host.
pub fn unmovable(line: &CommandLine) -> Result<(), Failure> {
    report("this VM cannot be moved", find(line, cannot_move)?)
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
    find(line, cannot_run)
}

fn find(line: &CommandLine, judge: fn(&str, &Props, &Word) -> Verdict) -> Result<Vec<Refusal>, Failure> {
    let mut found = Vec::new();
    for word in line.words() {
        let name = word.name();
        let props = if JUDGED.contains(&name) { word.props()? } else { Props::Text(Vec::new()) };
        if let Some((why, remedy)) = judge(name, &props, word) {
            found.push(Refusal { what: word.shown(), why, remedy });
        }
    }
    Ok(found)
}

fn cannot_run(name: &str, props: &Props, word: &Word) -> Verdict {
    match name {
        "object" => object(props),
        "device" => device(props),
        "netdev" | "nic" | "net" => network(props),
        "chardev" if ours(props.get("id")) => Some(OURS_ALREADY),
        "blockdev" | "drive" => storage(props),
        "hda" | "hdb" | "hdc" | "hdd" | "cdrom" => {
            word.value().is_some_and(|file| file.starts_with("nvme://")).then_some(PINS)
        }
        "machine" => machine(props),
        "accel" if props.first("accel").as_deref() == Some("xen") => Some(XEN),
        "xen-attach" | "xen-create" | "xen-domid" | "xen-domid-restrict" => Some(XEN),
        "numa" if props.first("type").as_deref() == Some("node") && props.get("mem").is_some() => Some((
            "a node that is a part of one memory is the old way, which newer QEMU no longer takes",
            "give each node its own: -object memory-backend-ram,id=ID,size=SIZE and -numa node,memdev=ID",
        )),
        "mem-path" => {
            let huge = word.value().is_some_and(|path| path.contains("huge"));
            Some(if huge { HUGE } else { OWN_FILE })
        }
        "overcommit" | "realtime" => locks(name, props),
        "daemonize" => Some((
            "a daemon is a copy of the process, and the threads that manage its memory are not copied",
            "start vmemd in the background: a systemd unit, or `setsid vmemd run …`",
        )),
        "chroot" | "runas" => Some(PRIVILEGES),
        "async-teardown" => Some(teardown()),
        "run-with" if props.get("chroot").is_some() || props.get("user").is_some() => Some(PRIVILEGES),
        "run-with" if props.is_on("async-teardown") => Some(teardown()),
        "incoming" => Some((
            "vmemd starts QEMU for a VM that arrives by itself",
            "leave it out, and bring the VM with `vmemd migrate`",
        )),
        "readconfig" => Some((
            "what stands in a file is not seen, and it may name memory or devices that cannot work",
            "write its contents as options on the command line",
        )),
        "preconfig" => Some((
            "the machine would be configured later, by what vmemd does not see",
            "write the configuration as options on the command line",
        )),
        _ => None,
    }
}

fn ours(id: Option<String>) -> bool {
    id.is_some_and(|id| id.starts_with(OURS))
}

fn object(props: &Props) -> Verdict {
    if ours(props.get("id")) {
        return Some(OURS_ALREADY);
    }
    match props.object()?.as_str() {
        "memory-backend-memfd" if props.is_on("hugetlb") => Some(HUGE),
        "memory-backend-file" => {
            let huge = props.get("mem-path").is_some_and(|path| path.contains("huge"));
            Some(if huge { HUGE } else { OWN_FILE })
        }
        "memory-backend-epc" => Some((
            "enclave memory (SGX) is encrypted, and only its own driver can take it out of RAM",
            "run it without vmemd, or without SGX",
        )),
        "sev-guest" | "sev-snp-guest" | "tdx-guest" | "s390-pv-guest" | "pef-guest" | "rme-guest" => {
            Some(CONFIDENTIAL)
        }
        "cryptodev-vhost-user" | "x-remote-object" | "x-vfio-user-server" => Some(VHOST_USER),
        _ => None,
    }
}

fn device(props: &Props) -> Verdict {
    let driver = props.first("driver")?;
    if driver.starts_with("vfio-") || driver.starts_with("vhost-vdpa") || driver == "pvrdma" {
        return Some(PINS);
    }
    if driver.starts_with("vhost-user-") || driver == "x-pci-proxy-dev" {
        return Some(VHOST_USER);
    }
    if driver.starts_with("virtio-mem")
        || driver.starts_with("virtio-pmem")
        || driver.starts_with("cxl-type3")
    {
        return Some(HOTPLUG);
    }
    if matches!(driver.as_str(), "pc-dimm" | "nvdimm" | "sgx-epc") {
        return Some(HOTPLUG);
    }
    if driver.starts_with("xen-pci") {
        return Some(XEN);
    }
    let gpu = driver.starts_with("virtio-gpu") || driver.starts_with("virtio-vga");
    if gpu && props.is_on("blob") {
        return Some((
            "blob resources pin the guest memory that they share with the host's display",
            "leave out blob=on",
        ));
    }
    None
}

fn network(props: &Props) -> Verdict {
    match props.first("type")?.as_str() {
        "vhost-user" => Some(VHOST_USER),
        "vhost-vdpa" => Some(PINS),
        _ => None,
    }
}

/// Drivers at any depth that talk to a device, or another process, with guest memory in their hands.
fn storage(props: &Props) -> Verdict {
    let mut verdict = None;
    props.clone().visit(&mut |path, value| {
        let leaf = path.rsplit('.').next().unwrap_or(path);
        // In -blockdev the first word is the driver.
        if matches!(leaf, "" | "driver" | "format") {
            match value {
                "nvme" | "virtio-blk-vfio-pci" | "virtio-blk-vhost-vdpa" => verdict = Some(PINS),
                "virtio-blk-vhost-user" => verdict = Some(VHOST_USER),
                _ => {}
            }
        }
        if value.starts_with("nvme://") {
            verdict = Some(PINS);
        }
        None
    });
    verdict
}

fn machine(props: &Props) -> Verdict {
    if props.get("confidential-guest-support").is_some() || props.get("memory-encryption").is_some() {
        return Some(CONFIDENTIAL);
    }
    let xen = |name: String| name.starts_with("xen");
    if props.first("type").is_some_and(xen)
        || props.get("accel").is_some_and(|list| list.split(':').any(|accel| accel == "xen"))
    {
        return Some(XEN);
    }
    if ours(props.get("memory-backend")) {
        return Some(OURS_ALREADY);
    }
    None
}

fn locks(name: &str, props: &Props) -> Verdict {
    let value = match name {
        "overcommit" => props.get("mem-lock"),
        _ => props.get("mlock"),
    };
    let on = value.is_some_and(|value| is_on(&value) || value == "on-fault");
    on.then_some((
        "memory that is locked can never be taken out of RAM",
        "leave it out: vmemd keeps what is in its budget from the host's own swap by itself",
    ))
}

fn teardown() -> (&'static str, &'static str) {
    (
        "a second process would hold the memory after the first has ended",
        "leave it out: under vmemd at most the budget is to be freed",
    )
}

fn cannot_move(name: &str, props: &Props, word: &Word) -> Verdict {
    const LOCAL_DISK: (&str, &str) = (
        "what the guest wrote is in a temporary file of this host",
        "leave it out, with the disk on storage that both hosts reach",
    );
    const FILES: (&str, &str) = (
        "QEMU cannot move a guest that has a file system of the host mounted",
        "use a network file system inside the guest",
    );
    match name {
        "snapshot" => Some(LOCAL_DISK),
        "drive" if props.is_on("snapshot") => Some(LOCAL_DISK),
        "fsdev" | "virtfs" => Some(FILES),
        "cpu" => {
            let fixed = props.get("tsc-freq").or_else(|| props.get("tsc-frequency")).is_some();
            let asked = props.is_on("invtsc")
                || word.value().is_some_and(|cpu| cpu.split(',').any(|f| f == "+invtsc"));
            (asked && !fixed).then_some((
                "an invariant clock ends with the host that it was counted on",
                "leave out invtsc, or fix the rate with tsc-frequency=",
            ))
        }
        "icount" if props.get("rr").is_some() => {
            Some(("recording and replaying follow one process", "leave out rr="))
        }
        "tpmdev" if props.first("type").as_deref() == Some("passthrough") => {
            Some(("a chip of this host stays here", "use an emulated TPM: -tpmdev emulator with swtpm"))
        }
        "device" => {
            let driver = props.first("driver")?;
            match driver.as_str() {
                "nvme" => Some(("QEMU cannot save its state", "use virtio-blk or virtio-scsi")),
                "amd-iommu" => Some(("QEMU cannot save its state", "use intel-iommu or virtio-iommu-pci")),
                "rocker" | "hv-syndbg" => Some(("QEMU cannot save its state", "leave it out")),
                "usb-host" | "virtio-input-host-pci" | "virtio-input-host" => {
                    Some(("a device of this host stays here", "use an emulated one"))
                }
                "ivshmem-plain" | "ivshmem-doorbell" if !props.is_on("master") => {
                    Some(("memory shared with others of this host stays here", "leave it out"))
                }
                driver if driver.starts_with("vhost-scsi") && !props.is_on("migratable") => {
                    Some(("QEMU cannot save its state", "use virtio-scsi"))
                }
                driver if driver.ends_with("-gl-pci") || driver.ends_with("-gl") => Some((
                    "what a graphics card of this host holds cannot be saved",
                    "use virtio-vga without gl",
                )),
                driver if driver.starts_with("virtio-9p") => Some(FILES),
                _ => None,
            }
        }
        _ => None,
    }
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
