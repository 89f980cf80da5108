//! The tables of QEMU's options that cannot work under vmemd: to refuse one more, add a row. [`refuse`](super::refuse)
//! looks them up; its tests compare the tables with docs/qemu.md, and with the options that `options` knows.

use super::props::{Props, is_on};

/// The beginning of all ids of our own additions. A user's id may not begin so.
pub(super) const OURS: &str = "vmemd-";

/// Why something cannot be.
#[derive(Debug)]
pub(super) struct Reason {
    pub(super) why: &'static str,
    /// What to do instead.
    pub(super) remedy: &'static str,
}

/// Options that are refused: the first row that fits an option counts.
#[derive(Debug)]
pub(super) struct Row {
    /// Without dashes.
    pub(super) options: &'static [&'static str],
    pub(super) when: When,
    pub(super) reason: &'static Reason,
}

/// Of an option, when it is refused. Names may begin or end with a `*`: any letters, or none.
#[derive(Debug)]
pub(super) enum When {
    /// Always.
    Given,
    /// The property of that key, whose name may be left out if it comes first, is one of these.
    First(&'static str, &'static [&'static str]),
    /// The value, or one in it, begins with this.
    Begins(&'static str),
    /// A block driver at any depth is one of these.
    Driver(&'static [&'static str]),
    /// The whole value fits.
    Value(fn(&str) -> bool),
    /// The properties fit. docs/qemu.md says that in these words.
    Props(
        fn(&Props) -> bool,
        #[cfg_attr(not(test), expect(dead_code, reason = "for the test of the manual"))]
        &'static [&'static str],
    ),
}

const PINS: Reason = Reason {
    why: "it keeps all guest memory pinned for a device, so none could be taken out of RAM",
    remedy: "use an emulated device instead, such as virtio-blk or virtio-net",
};
const VHOST_USER: Reason = Reason {
    why: "its back end is another process that maps guest memory, and would not see what was taken out of RAM",
    remedy: "use the device inside QEMU: virtio-net with a tap (vhost=on is fine), virtio-blk with a drive, 9p for files",
};
const HOTPLUG: Reason = Reason {
    why: "memory devices are not supported yet",
    remedy: "give all memory with -m; what the guest does not use costs nothing under vmemd",
};
const CONFIDENTIAL: Reason = Reason {
    why: "the memory of a confidential guest is encrypted and pinned, so it cannot be stored or moved by the host",
    remedy: "run it without vmemd",
};
const ENCLAVE: Reason = Reason {
    why: "enclave memory (SGX) is encrypted, and only its own driver can take it out of RAM",
    remedy: "run it without vmemd, or without SGX",
};
const XEN: Reason =
    Reason { why: "under Xen guest memory is not QEMU's", remedy: "use -accel kvm or -accel tcg" };
const PRIVILEGES: Reason = Reason {
    why: "after it QEMU can no longer reach the store, and remove its control socket",
    remedy: "start vmemd itself as that user (access to /dev/kvm and /dev/userfaultfd is enough), or in a container",
};
const OWN_FILE: Reason = Reason {
    why: "guest memory in a file of your own cannot be taken out of RAM by vmemd",
    remedy: "leave it out: vmemd makes the memory backend, from -m or from memory-backend-ram objects",
};
const HUGE: Reason = Reason {
    why: "pages of hugetlbfs cannot be taken out of RAM",
    remedy: "leave it out: vmemd uses transparent huge pages where they fit",
};
const OURS_ALREADY: Reason = Reason {
    why: "names that begin with `vmemd-` are vmemd's own",
    remedy: "give the command line as it was before vmemd changed it, or choose another id",
};
const LOCKS: Reason = Reason {
    why: "memory that is locked can never be taken out of RAM",
    remedy: "leave it out: vmemd keeps what is in its budget from the host's own swap by itself",
};
const TEARDOWN: Reason = Reason {
    why: "a second process would hold the memory after the first has ended",
    remedy: "leave it out: under vmemd at most the budget is to be freed",
};
const BLOBS: Reason = Reason {
    why: "blob resources pin the guest memory that they share with the host's display",
    remedy: "leave out blob=on",
};
const PARTS: Reason = Reason {
    why: "a node that is a part of one memory is the old way, which newer QEMU no longer takes",
    remedy: "give each node its own: -object memory-backend-ram,id=ID,size=SIZE and -numa node,memdev=ID",
};
const DAEMON: Reason = Reason {
    why: "a daemon is a copy of the process, and the threads that manage its memory are not copied",
    remedy: "start vmemd in the background: a systemd unit, or `setsid vmemd run …`",
};
const INCOMING: Reason = Reason {
    why: "vmemd starts QEMU for a VM that arrives by itself",
    remedy: "leave it out, and bring the VM with `vmemd migrate`",
};
const UNSEEN: Reason = Reason {
    why: "what stands in a file is not seen, and it may name memory or devices that cannot work",
    remedy: "write its contents as options on the command line",
};
const LATER: Reason = Reason {
    why: "the machine would be configured later, by what vmemd does not see",
    remedy: "write the configuration as options on the command line",
};

fn is_ours(id: Option<String>) -> bool {
    id.is_some_and(|id| id.starts_with(OURS))
}

fn is_locked(value: Option<String>) -> bool {
    value.is_some_and(|value| is_on(&value) || value == "on-fault")
}

fn in_huge(path: Option<String>) -> bool {
    path.is_some_and(|path| path.contains("huge"))
}

fn is_gpu(props: &Props) -> bool {
    props.first("driver").is_some_and(|name| name.starts_with("virtio-gpu") || name.starts_with("virtio-vga"))
}

fn is(props: &Props, key: &str, value: &str) -> bool {
    props.first(key).as_deref() == Some(value)
}

fn row(options: &'static [&'static str], when: When, reason: &'static Reason) -> Row {
    Row { options, when, reason }
}

/// The options with which a VM cannot run under vmemd.
pub(super) fn cannot_run() -> Vec<Row> {
    use When::{Begins, Driver, First, Given, Props, Value};
    vec![
        row(&["object", "chardev"], Props(|it| is_ours(it.get("id")), &["vmemd-"]), &OURS_ALREADY),
        row(
            &["object"],
            Props(|it| is(it, "qom-type", "memory-backend-memfd") && it.is_on("hugetlb"), &["hugetlb=on"]),
            &HUGE,
        ),
        row(
            &["object"],
            Props(
                |it| is(it, "qom-type", "memory-backend-file") && in_huge(it.get("mem-path")),
                &["memory-backend-file"],
            ),
            &HUGE,
        ),
        row(&["object"], First("qom-type", &["memory-backend-file"]), &OWN_FILE),
        row(&["object"], First("qom-type", &["memory-backend-epc"]), &ENCLAVE),
        row(
            &["object"],
            First(
                "qom-type",
                &["sev-guest", "sev-snp-guest", "tdx-guest", "s390-pv-guest", "pef-guest", "rme-guest"],
            ),
            &CONFIDENTIAL,
        ),
        row(
            &["object"],
            First("qom-type", &["cryptodev-vhost-user", "x-remote-object", "x-vfio-user-server"]),
            &VHOST_USER,
        ),
        row(&["device"], First("driver", &["vfio-*", "vhost-vdpa*", "pvrdma"]), &PINS),
        row(&["device"], First("driver", &["vhost-user-*", "x-pci-proxy-dev"]), &VHOST_USER),
        row(
            &["device"],
            First("driver", &["pc-dimm", "nvdimm", "virtio-mem*", "virtio-pmem*", "cxl-type3*", "sgx-epc"]),
            &HOTPLUG,
        ),
        row(&["device"], First("driver", &["xen-pci*"]), &XEN),
        row(
            &["device"],
            Props(|it| is_gpu(it) && it.is_on("blob"), &["virtio-gpu*", "virtio-vga*", "blob=on"]),
            &BLOBS,
        ),
        row(&["netdev", "nic", "net"], First("type", &["vhost-user"]), &VHOST_USER),
        row(&["netdev", "nic", "net"], First("type", &["vhost-vdpa"]), &PINS),
        row(&["blockdev", "drive"], Driver(&["nvme", "virtio-blk-vfio-pci", "virtio-blk-vhost-vdpa"]), &PINS),
        row(&["blockdev", "drive"], Driver(&["virtio-blk-vhost-user"]), &VHOST_USER),
        row(&["blockdev", "drive", "hda", "hdb", "hdc", "hdd", "cdrom"], Begins("nvme://"), &PINS),
        row(
            &["machine"],
            Props(
                |it| it.get("confidential-guest-support").is_some() || it.get("memory-encryption").is_some(),
                &["confidential-guest-support=", "memory-encryption="],
            ),
            &CONFIDENTIAL,
        ),
        row(&["machine"], First("type", &["xen*"]), &XEN),
        row(
            &["machine"],
            Props(
                |it| it.get("accel").is_some_and(|list| list.split(':').any(|accel| accel == "xen")),
                &["accel=xen"],
            ),
            &XEN,
        ),
        row(&["machine"], Props(|it| is_ours(it.get("memory-backend")), &["vmemd-"]), &OURS_ALREADY),
        row(&["accel"], First("accel", &["xen"]), &XEN),
        row(&["xen-attach", "xen-create", "xen-domid", "xen-domid-restrict"], Given, &XEN),
        row(
            &["numa"],
            Props(|it| is(it, "type", "node") && it.get("mem").is_some(), &["node", "mem="]),
            &PARTS,
        ),
        row(&["mem-path"], Value(|path| path.contains("huge")), &HUGE),
        row(&["mem-path"], Given, &OWN_FILE),
        row(&["overcommit"], Props(|it| is_locked(it.get("mem-lock")), &["mem-lock=on"]), &LOCKS),
        row(&["realtime"], Props(|it| is_locked(it.get("mlock")), &["mlock=on"]), &LOCKS),
        row(&["daemonize"], Given, &DAEMON),
        row(&["chroot", "runas"], Given, &PRIVILEGES),
        row(
            &["run-with"],
            Props(|it| it.get("chroot").is_some() || it.get("user").is_some(), &["chroot=", "user="]),
            &PRIVILEGES,
        ),
        row(&["async-teardown"], Given, &TEARDOWN),
        row(&["run-with"], Props(|it| it.is_on("async-teardown"), &["async-teardown=on"]), &TEARDOWN),
        row(&["incoming"], Given, &INCOMING),
        row(&["readconfig"], Given, &UNSEEN),
        row(&["preconfig"], Given, &LATER),
    ]
}

const LOCAL_DISK: Reason = Reason {
    why: "what the guest wrote is in a temporary file of this host",
    remedy: "leave it out, with the disk on storage that both hosts reach",
};
const FILES: Reason = Reason {
    why: "QEMU cannot move a guest that has a file system of the host mounted",
    remedy: "use a network file system inside the guest",
};
const CLOCK: Reason = Reason {
    why: "an invariant clock ends with the host that it was counted on",
    remedy: "leave out invtsc, or fix the rate with tsc-frequency=",
};
const REPLAY: Reason = Reason { why: "recording and replaying follow one process", remedy: "leave out rr=" };
const CHIP: Reason = Reason {
    why: "a chip of this host stays here",
    remedy: "use an emulated TPM: -tpmdev emulator with swtpm",
};
const UNSAVED: &str = "QEMU cannot save its state";
const NVME: Reason = Reason { why: UNSAVED, remedy: "use virtio-blk or virtio-scsi" };
const AMD_IOMMU: Reason = Reason { why: UNSAVED, remedy: "use intel-iommu or virtio-iommu-pci" };
const UNSAVED_DEVICE: Reason = Reason { why: UNSAVED, remedy: "leave it out" };
const VHOST_SCSI: Reason = Reason { why: UNSAVED, remedy: "use virtio-scsi" };
const HOST_DEVICE: Reason = Reason { why: "a device of this host stays here", remedy: "use an emulated one" };
const SHARED: Reason =
    Reason { why: "memory shared with others of this host stays here", remedy: "leave it out" };
const GRAPHICS: Reason = Reason {
    why: "what a graphics card of this host holds cannot be saved",
    remedy: "use virtio-vga without gl",
};

/// The options with which a VM runs, and cannot move to another host.
pub(super) fn cannot_move() -> Vec<Row> {
    use When::{First, Given, Props};
    vec![
        row(&["snapshot"], Given, &LOCAL_DISK),
        row(&["drive"], Props(|it| it.is_on("snapshot"), &["snapshot=on"]), &LOCAL_DISK),
        row(&["fsdev", "virtfs"], Given, &FILES),
        row(
            &["cpu"],
            Props(
                |it| {
                    let fixed = it.get("tsc-freq").or_else(|| it.get("tsc-frequency")).is_some();
                    (it.is_on("invtsc") || it.get("+invtsc").is_some()) && !fixed
                },
                &["invtsc", "tsc-frequency="],
            ),
            &CLOCK,
        ),
        row(&["icount"], Props(|it| it.get("rr").is_some(), &["rr="]), &REPLAY),
        row(&["tpmdev"], First("type", &["passthrough"]), &CHIP),
        row(&["device"], First("driver", &["nvme"]), &NVME),
        row(&["device"], First("driver", &["amd-iommu"]), &AMD_IOMMU),
        row(&["device"], First("driver", &["rocker", "hv-syndbg"]), &UNSAVED_DEVICE),
        row(
            &["device"],
            First("driver", &["usb-host", "virtio-input-host-pci", "virtio-input-host"]),
            &HOST_DEVICE,
        ),
        row(
            &["device"],
            Props(
                |it| {
                    let shares = is(it, "driver", "ivshmem-plain") || is(it, "driver", "ivshmem-doorbell");
                    shares && !it.is_on("master")
                },
                &["ivshmem-plain", "ivshmem-doorbell", "master=on"],
            ),
            &SHARED,
        ),
        row(
            &["device"],
            Props(
                |it| {
                    let scsi = it.first("driver").is_some_and(|name| name.starts_with("vhost-scsi"));
                    scsi && !it.is_on("migratable")
                },
                &["vhost-scsi*", "migratable=on"],
            ),
            &VHOST_SCSI,
        ),
        row(&["device"], First("driver", &["*-gl-pci", "*-gl"]), &GRAPHICS),
        row(&["device"], First("driver", &["virtio-9p*"]), &FILES),
    ]
}
